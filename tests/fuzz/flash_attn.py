"""flash-attn's functions on kvops, each as flash-attn's own reference has it, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from oracle import attention, attention_mask
from rounding import rounded
from torch import Tensor

from fuzz.inputs import DTYPES, HEAD_DIMS, backend, close, often
from kvops.integrations import flash_attn

_KINDS = ("dense", "kvpacked", "qkvpacked", "varlen", "varlen kvpacked", "varlen qkvpacked", "varlen pages")


@dataclass(frozen=True)
class Case:
    seed: int = 0
    backend: str = "eager"
    dtype: str = "float32"
    kind: str = "dense"  # or one of _KINDS, or "cache"
    lengths: tuple[tuple[int, int], ...] = ((1, 1),)  # queries and keys of each sequence
    kv_heads: int = 1
    group: int = 1
    head_dim: int = 2
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    scale: float | None = None
    alibi: bool = False
    mixed: bool = False  # the last dimension of the inputs is strided
    page_size: int = 0  # of a cache in pages; 0: rows
    new: int = 0  # keys that a cache takes in
    rotary: int = 0  # half of the dimensions that are rotated
    interleaved: bool = True
    chosen: bool = False  # cache_batch_idx
    one_length: bool = False  # cache_seqlens is a number
    backward: bool = False


def draw(r: Random) -> Case:
    on_triton, longest = r.random() < 0.1, r.choice((3, 20, 60))
    kind = r.choice((*_KINDS, "cache", "cache", "cache", "cache"))
    head_dim = r.choice(HEAD_DIMS[1:10] if on_triton else HEAD_DIMS[1:])
    causal = r.random() < 0.5
    left, right = (often(r, -1, 0, r.randint(0, longest), p=0.7) for _ in range(2))
    tokens = r.choice((1, 1, 2, 5))
    lengths = tuple((r.randint(0, longest), r.randint(0, longest)) for _ in range(r.randint(1, 3)))
    if kind == "cache":
        right = -1 if tokens > 1 and not causal else right
        lengths = tuple((tokens, keys) for _, keys in lengths)
    if kind in ("dense", "kvpacked", "qkvpacked"):
        lengths = (lengths[0],) * len(lengths)
    if kind == "varlen pages" and not causal:
        right = -1
    if "qkv" in kind:
        lengths = tuple((keys, keys) for _, keys in lengths)
    return Case(
        seed=r.randrange(2**31),
        backend="triton" if on_triton else "eager",
        dtype=r.choice(tuple(DTYPES)),
        kind=kind,
        lengths=lengths,
        kv_heads=r.choice((1, 2, 3)),
        group=1 if "qkv" in kind else often(r, 1, 2, 4),
        head_dim=head_dim,
        causal=causal,
        window=(left, right),
        softcap=often(r, 0.0, 2.0, 30.0),
        scale=often(r, None, 0.2, -0.3),
        alibi=r.random() < 0.2 and kind != "cache" and "pages" not in kind,
        mixed=r.random() < 0.2,
        page_size=often(r, 0, 1, 16) if kind == "cache" else 0,
        new=often(r, 0, 1, tokens, 7, p=0.4),
        rotary=r.randint(0, head_dim // 2),
        interleaved=r.random() < 0.5,
        chosen=r.random() < 0.3,
        one_length=r.random() < 0.2,
        backward=r.random() < 0.4,
    )


def check(case: Case) -> None:
    with backend(case.backend):
        if case.kind == "cache":
            _check_cache(case)
        else:
            _check_function(case)


def _made(case: Case, g: torch.Generator, *shape: int) -> Tensor:
    x = torch.randn(shape, generator=g).to(DTYPES[case.dtype])
    return torch.stack([x, x + 1], -1)[..., 0] if case.mixed else x


def _options(case: Case, slopes: Tensor | None) -> dict[str, Any]:
    return {
        "softmax_scale": case.scale,
        "causal": case.causal,
        "window_size": case.window,
        "softcap": case.softcap,
        "alibi_slopes": slopes,
    }


def _expected(case: Case, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None) -> Any:
    """One sequence without its batch dimension -> out [Sq, Hq, D] and lse [Hq, Sq]."""
    mask = attention_mask(len(q), len(k), causal=case.causal, window_left=case.window[0], window_right=case.window[1])
    scoring = {"scale": case.scale, "softcap": case.softcap, "alibi_slopes": slopes}
    out, lse, _ = attention(q[None], k[None], v[None], mask=mask, **scoring)
    return out[0], lse[0]


def _check_function(case: Case) -> None:
    g = torch.Generator().manual_seed(case.seed)
    heads, kv_heads, D = case.kv_heads * case.group, case.kv_heads, case.head_dim
    slopes = torch.rand(heads, generator=g) if case.alibi else None
    options = _options(case, slopes)
    queries, keys = (sum(pair[side] for pair in case.lengths) for side in (0, 1))
    q = _made(case, g, queries, heads, D)
    kv = _made(case, g, keys, 2, kv_heads, D)
    if "qkv" in case.kind:
        qkv = _made(case, g, keys, 3, kv_heads, D)
        q, kv = qkv[:, 0], qkv[:, 1:]
    k, v = kv.unbind(1)
    ends = [torch.tensor([0, *(pair[side] for pair in case.lengths)]).cumsum(0).int() for side in (0, 1)]
    longest = [max(pair[side] for pair in case.lengths) for side in (0, 1)]
    batch = len(case.lengths)

    def rows(x: Tensor) -> Tensor:
        return x.unflatten(0, (batch, len(x) // batch))

    lengths = (*ends, *longest)
    end = {"return_attn_probs": True, **options}
    if case.kind == "dense":
        out, lse, _ = flash_attn.flash_attn_func(rows(q), rows(k), rows(v), **end)
    elif case.kind == "kvpacked":
        out, lse, _ = flash_attn.flash_attn_kvpacked_func(rows(q), rows(kv), **end)
    elif case.kind == "qkvpacked":
        out, lse, _ = flash_attn.flash_attn_qkvpacked_func(rows(qkv), **end)
    elif case.kind == "varlen":
        out, lse, _ = flash_attn.flash_attn_varlen_func(q, k, v, *lengths, **end)
    elif case.kind == "varlen kvpacked":
        out, lse, _ = flash_attn.flash_attn_varlen_kvpacked_func(q, kv, *lengths, **end)
    elif case.kind == "varlen qkvpacked":
        out, lse, _ = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, ends[1], longest[1], **end)
    else:
        pages, table = _paged(case, k, v, ends[1], g)
        out, lse, _ = flash_attn.flash_attn_varlen_func(q, *pages, *lengths, **end, block_table=table)
    if "varlen" not in case.kind:
        out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)

    def expected(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        of = [[slice(int(end[b]), int(end[b + 1])) for end in ends] for b in range(batch)]
        parts = [_expected(case, q[rows], k[keys], v[keys], slopes) for rows, keys in of]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], 1)

    exact, low = expected(q, k, v), rounded(q.dtype, expected, q, k, v)
    close(out, exact[0], low[0], "out")
    close(lse, exact[1], low[1], "lse")


def _paged(case: Case, k: Tensor, v: Tensor, ends: Tensor, g: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Packed keys and values in shuffled pages."""
    size = case.page_size or 16
    lens = ends.diff().tolist()
    width = max(-(-n // size) for n in lens) + 1
    order = torch.randperm(len(lens) * width, generator=g).view(len(lens), width)
    pages = [torch.full((order.numel(), size, *x.shape[1:]), float("nan"), dtype=x.dtype) for x in (k, v)]
    for b, n in enumerate(lens):
        for i in range(n):
            for side, x in zip(pages, (k, v), strict=True):
                side[order[b, i // size], i % size] = x[int(ends[b]) + i]
    return (pages[0], pages[1]), order.int()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, first: int, moving: bool, interleaved: bool) -> Tensor:
    """x [T, H, D] in float32, dimension by dimension, rounded once."""
    result, half = x.float().clone(), cos.shape[1]
    for t in range(len(x)):
        at = first + t * moving
        for i in range(half):
            one, two = (2 * i, 2 * i + 1) if interleaved else (i, half + i)
            c, s = cos[at, i].float(), sin[at, i].float()
            a, b = x[t, :, one].float(), x[t, :, two].float()
            result[t, :, one], result[t, :, two] = a * c - b * s, a * s + b * c
    return result.to(x.dtype)


def _check_cache(case: Case) -> None:
    g = torch.Generator().manual_seed(case.seed)
    dtype, batch = DTYPES[case.dtype], len(case.lengths)
    heads, kv_heads, D, T = case.kv_heads * case.group, case.kv_heads, case.head_dim, case.lengths[0][0]
    held = [case.lengths[0][1] if case.one_length else keys for _, keys in case.lengths]
    room = max(held) + case.new + 1
    q = _made(case, g, batch, T, heads, D)
    new = [_made(case, g, batch, case.new, kv_heads, D) for _ in range(2)]
    rows = [torch.randn(batch, room, kv_heads, D, generator=g).to(dtype) for _ in range(2)]
    arguments: dict[str, Any] = _options(case, None)
    del arguments["alibi_slopes"]
    where = torch.arange(batch)
    if case.page_size:
        size = case.page_size
        width = -(-room // size)
        table = torch.randperm(batch * width, generator=g).view(batch, width).int()
        caches = [torch.full((batch * width, size, kv_heads, D), float("nan"), dtype=dtype) for _ in range(2)]
        for cache, row in zip(caches, rows, strict=True):
            for b in range(batch):
                for i in range(room):
                    cache[table[b, i // size], i % size] = row[b, i]
        arguments["block_table"] = table
    else:
        if case.chosen:
            where = torch.randperm(batch + 2, generator=g)[:batch]
            arguments["cache_batch_idx"] = where.int()
        caches = [torch.full((batch + 2, room, kv_heads, D), float("nan"), dtype=dtype) for _ in range(2)]
        for cache, row in zip(caches, rows, strict=True):
            cache[where] = row
    arguments["cache_seqlens"] = held[0] if case.one_length else torch.tensor(held, dtype=torch.int32)
    right_q, right_k = q, new[0]
    if case.new:
        arguments |= {"k": new[0], "v": new[1]}
        if case.rotary:
            angle = torch.rand(2 * room + case.page_size + T, case.rotary, generator=g) * 6
            cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
            arguments |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": case.interleaved}
            moving = case.causal or max(case.window) >= 0
            right_q = torch.stack([_rotated(q[b], cos, sin, held[b], moving, case.interleaved) for b in range(batch)])
            right_k = torch.stack(
                [_rotated(new[0][b], cos, sin, held[b], True, case.interleaved) for b in range(batch)]
            )
    out, lse = flash_attn.flash_attn_with_kvcache(q, *caches, **arguments, return_softmax_lse=True)
    stored = _rows_of(case, caches, arguments.get("block_table"), where, room)
    for b in range(batch):
        end = held[b] + case.new
        for row, found, values in zip(rows, stored, (right_k, new[1]), strict=True):
            row[b, held[b] : end] = values[b]
            _same_rounding(found[b, :end], row[b, :end])

    # What is attended to is what is stored, rounding and all.
    def expected(q: Tensor, *stored: Tensor) -> tuple[Tensor, Tensor]:
        parts = [_expected(case, q[b], *(side[b, : held[b] + case.new] for side in stored), None) for b in range(batch)]
        return torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])

    exact, low = expected(right_q, *stored), rounded(dtype, expected, right_q, *stored)
    close(out, exact[0], low[0], "out")
    close(lse, exact[1], low[1], "lse")


def _rows_of(case: Case, caches: list[Tensor], table: Tensor | None, where: Tensor, room: int) -> list[Tensor]:
    if table is None:
        return [cache[where] for cache in caches]
    return [cache[table.long()].flatten(1, 2)[:, :room] for cache in caches]


def _same_rounding(found: Tensor, right: Tensor) -> None:
    """Equal but for a last bit here and there, where the sum of two products was contracted."""
    assert not found.isnan().any(), "the cache: NaN"
    differ = found != right
    eps = torch.finfo(found.dtype).eps
    far = (found.float() - right.float()).abs() > 2 * eps * (right.float().abs() + 1e-3)
    few = int(differ.sum()) <= 3 + 0.02 * differ.numel() or found.dtype == torch.float32
    assert few, f"the cache: {int(differ.sum())} of {differ.numel()} rounded otherwise"
    assert not bool(far.any()), f"the cache: {int(far.sum())} values are others"
