"""Ragged lists in a shuffled, poisoned pool, attention over them written out list by list, and the comparison."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from oracle import assert_accurate, attention
from rounding import rounded
from torch import Tensor

import kvops

# Entries of a block table past the end of its list: reading one would be far out of bounds.
POISON_BLOCK = 2**30


# What a cache may hold beside the dtype of its queries.
QUANTISED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


def quantise(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What the operators store of float32 ``x`` in a cache of ``dtype``; NaN is 0 in int8."""
    if dtype == torch.int8:
        return x.nan_to_num(0.0).clamp(-127, 127).round().to(dtype)
    if dtype not in QUANTISED:
        return x.to(dtype)
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


def quantise_by_slot(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the operators store of float32 ``x`` [..., D] with a scale for each slot, and these scales."""
    most = x.abs().masked_fill(~x.isfinite(), 0.0).amax(-1)
    scale = most / (127 if dtype == torch.int8 else torch.finfo(dtype).max)
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return quantise(x / scale[..., None], dtype), scale


@dataclass
class Lists:
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    positions: Tensor
    scores: Tensor

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.k_cache, self.v_cache, self.block_tables, self.seq_lens

    def slots(self, batch: int, head: int) -> tuple[Tensor, Tensor]:
        """Block and offset of the slots of one list, in order."""
        size = self.k_cache.shape[1]
        slot = torch.arange(int(self.seq_lens[batch, head]))
        return self.block_tables.cpu()[batch, head][slot // size].long(), slot % size


def make_lists(
    lengths: list[list[int]], *, block_size: int, head_dim: int, value_dim: int | None = None,
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
) -> Lists:  # fmt: skip
    """Every slot that belongs to no list is NaN, and so is its score; positions have gaps, as after eviction."""
    value_dim = head_dim if value_dim is None else value_dim
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    used = (seq_lens + block_size - 1) // block_size
    max_blocks = int(used.max()) + 2
    num_blocks = int(used.sum()) + 3
    order = torch.randperm(num_blocks)
    tables = torch.full((*seq_lens.shape, max_blocks), POISON_BLOCK, dtype=torch.int32)
    lists = Lists(
        torch.full((num_blocks, block_size, head_dim), math.nan),
        torch.full((num_blocks, block_size, value_dim), math.nan),
        tables,
        seq_lens,
        torch.full((num_blocks, block_size), -(2**31), dtype=torch.int32),
        torch.full((num_blocks, block_size), math.nan),
    )
    taken = 0
    for batch in range(seq_lens.shape[0]):
        for head in range(seq_lens.shape[1]):
            count = int(used[batch, head])
            tables[batch, head, :count] = order[taken : taken + count].int()
            taken += count
            block, offset = lists.slots(batch, head)
            length = len(block)
            lists.k_cache[block, offset] = torch.randn(length, head_dim)
            lists.v_cache[block, offset] = torch.randn(length, value_dim)
            lists.positions[block, offset] = torch.cumsum(torch.randint(1, 4, (length,)), 0).int()
            lists.scores[block, offset] = torch.rand(length)
    return Lists(
        lists.k_cache.to(dtype).to(device),
        lists.v_cache.to(dtype).to(device),
        *(side.to(device) for side in (tables, seq_lens, lists.positions, lists.scores)),
    )


def expected(
    q: Tensor,
    lists: Lists,
    *,
    q_lens: Tensor | None = None,
    causal: bool = True,
    window_left: int = -1,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    tree_mask: Tensor | None = None,
    score_reduce: str = "sum",
    score_decay: float = 1.0,
    alibi_slopes: Tensor | None = None,
    score_last: int = -1,
    score_decays: Tensor | None = None,
    k_slot_scale: Tensor | None = None,
    v_slot_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and the updated scores in float64."""
    q, lists = q.cpu(), Lists(*(getattr(lists, name).cpu() for name in Lists.__dataclass_fields__))
    B, T, Hq, _ = q.shape
    Hkv = lists.seq_lens.shape[1]
    group = Hq // Hkv
    out = torch.zeros(B, T, Hq, lists.v_cache.shape[-1], dtype=torch.float64)
    lse = torch.full((B, Hq, T), -math.inf, dtype=torch.float64)
    scores = lists.scores.double()
    for b in range(B):
        count = T if q_lens is None else int(q_lens[b])
        for h in range(Hkv):
            block, offset = lists.slots(b, h)
            length = len(block)
            slot, query = torch.arange(length), length - count + torch.arange(T)
            if tree_mask is not None:
                tree = tree_mask.cpu().expand(B, T, T)[b]
                new = slot - (length - count)
                mask = (new < 0) | tree[:, new.clamp(0, max(T - 1, 0))]
            elif causal:
                mask = slot <= query[:, None]
            else:
                mask = torch.ones(T, length, dtype=torch.bool)
            mask = mask & (torch.arange(T) < count)[:, None]
            if window_left >= 0 and query_positions is not None:
                mask &= lists.positions[block, offset] >= query_positions.cpu()[b][:, None] - window_left
            elif window_left >= 0:
                mask &= slot >= query[:, None] - window_left
            distance = query[:, None] - slot
            if query_positions is not None:
                distance = query_positions.cpu()[b][:, None] - lists.positions[block, offset]
            heads = slice(h * group, (h + 1) * group)
            own_bias = None if bias is None else _bias_of(bias.cpu().expand(B, Hq, T, -1)[b, heads], length)
            k, v = lists.k_cache[block, offset][None, :, None], lists.v_cache[block, offset][None, :, None]
            if v_slot_scale is not None:  # not of P: its rounding in float16 would be that of tiny numbers
                v = v.double() * v_slot_scale.cpu().double()[block, offset][:, None, None]
            o, s, p = attention(
                q[b : b + 1, :, heads], k, v, mask=mask, scale=scale, softcap=softcap,
                sinks=None if sinks is None else sinks.cpu()[heads],
                alibi_slopes=None if alibi_slopes is None else alibi_slopes.cpu().expand(B, Hq)[b, heads],
                distance=distance, bias=own_bias,
                key_scales=None if k_slot_scale is None else k_slot_scale.cpu()[block, offset],
            )  # fmt: skip
            out[b, :, heads], lse[b, heads] = o[0], s[0]
            counted = slice(0 if score_last < 0 else max(0, count - score_last), None)
            if own_bias is not None:
                mask = mask & (own_bias if own_bias.dtype == torch.bool else own_bias > -math.inf)
            mask = mask.expand(group, T, length)[:, counted].flatten(0, 1)
            p = p[0, :, counted].flatten(0, 1)  # [group * tokens, length]
            if length and len(mask):
                decay = score_decay if score_decays is None else float(score_decays[b])
                reduced = p.amax(0) if score_reduce == "max" else (p * p if score_reduce == "sumsq" else p).sum(0)
                old = scores[block, offset]
                scores[block, offset] = torch.where(mask.any(0), decay * old + reduced, old)
    return out, lse, scores


def _bias_of(bias: Tensor, length: int) -> Tensor:
    """The bias of a list, [group, tokens, length]: slots that it does not have are hidden."""
    if bias.shape[-1] == 1:
        return bias.expand(*bias.shape[:2], length)
    hidden = False if bias.dtype == torch.bool else -math.inf
    return torch.nn.functional.pad(bias[..., :length], (0, max(0, length - bias.shape[-1])), value=hidden)


def check(
    q: Tensor,
    lists: Lists,
    *,
    scores: bool = False,
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
    cache: Lists | None = None,
    scales: tuple[float | None, float | None] | None = None,
    packed: bool = False,
    given_out: bool = False,
    operator: Callable[..., tuple[Tensor, Tensor]] = kvops.paged_attention,
    **options,
) -> None:
    """Hold out, lse and scores to float64; slots that belong to no list keep their NaN.

    ``cache`` is given to the operator in place of ``lists`` where the two differ (float8, int8). ``packed``: the real
    tokens lie end to end, with poisoned ones around them. ``given_out``: the result is written into a strided tensor of
    NaN.
    """
    options = {name: value for name, value in options.items() if value is not None}
    exact = expected(q, lists, **options)
    same = rounded(q.dtype, expected, q, lists, **options)
    options["batch_invariant"] = batch_invariant
    positions = lists.positions if "query_positions" in options else None
    updated = lists.scores.clone() if scores else None
    if scales is not None:
        options["k_scale"], options["v_scale"] = scales
    options |= {"positions": positions, "scores": updated, "schedule": schedule}
    given, real = q, None
    if packed:
        given, real, options = pack(q, options)
    if given_out:
        shape = *given.shape[:-1], lists.v_cache.shape[-1]
        options["out"] = torch.full((*shape[:-2], 2 * shape[-2], shape[-1]), math.nan, dtype=q.dtype, device=q.device)[
            ..., ::2, :
        ]
    out, lse = operator(given, *(cache or lists).arguments, **options)
    assert out.dtype == q.dtype
    if given_out:
        assert out is options["out"]
    if real is not None:
        outside = torch.ones(len(given), dtype=torch.bool, device=q.device)
        outside[real[real >= 0]] = False
        assert (out[outside].isnan() if given_out else out[outside] == 0).all()
        assert (lse[:, outside] == -math.inf).all()
        out, lse = unpack(real, out, lse)
    assert lse.dtype == torch.float32
    assert_accurate(out, exact[0], same[0], "out")
    assert_accurate(lse, exact[1], same[1], "lse")
    if updated is not None:
        owned = ~exact[2].isnan()
        assert torch.equal(updated.cpu().isnan(), ~owned)
        assert_accurate(updated.cpu()[owned], exact[2][owned], same[2][:, owned], "scores")


def pack(q: Tensor, options: dict) -> tuple[Tensor, Tensor, dict]:
    """The real tokens of q [B, T, Hq, D] end to end between tokens of NaN, the place of each token among them [B, T]
    (-1: not real), and the options of the packed call."""
    B, T = q.shape[:2]
    counts = [T] * B if options.get("q_lens") is None else options["q_lens"].tolist()
    starts = [3, *(3 + sum(counts[: b + 1]) for b in range(B))]
    packed = torch.full((starts[-1] + 2, *q.shape[2:]), math.nan, dtype=q.dtype, device=q.device)
    positions = torch.full(packed.shape[:1], -(2**31), dtype=torch.int32, device=q.device)
    real = torch.full((B, T), -1, device=q.device)
    for b, (start, count) in enumerate(zip(starts, counts, strict=False)):
        packed[start : start + count] = q[b, :count]
        real[b, :count] = torch.arange(start, start + count, device=q.device)
        if "query_positions" in options:
            positions[start : start + count] = options["query_positions"][b, :count]
    bias = options.get("bias")
    if bias is not None:  # [B, Hq, T, S] -> [Hq, tokens, S]
        size = bias.shape
        if size[0] == size[2] == 1:
            options = options | {"bias": bias[0]}
        else:
            poison = True if bias.dtype == torch.bool else math.nan
            flat = torch.full((size[1], len(packed), size[3]), poison, dtype=bias.dtype, device=q.device)
            for b, (start, count) in enumerate(zip(starts, counts, strict=False)):
                flat[:, start : start + count] = bias.expand(B, -1, T, -1)[b, :, :count]
            options = options | {"bias": flat}
    options = {name: value for name, value in options.items() if name != "q_lens"}
    if "query_positions" in options:
        options["query_positions"] = positions
    starts = torch.tensor(starts, dtype=torch.int32, device=q.device)
    return packed, real, options | {"cu_seqlens_q": starts, "max_seqlen_q": T}


def unpack(real: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """out [B, T, Hq, D] and lse [B, Hq, T] of packed results: 0 and -inf where ``real`` (see ``pack``) is -1."""
    padding = real < 0
    out, lse = out[real.clamp(min=0)], lse[:, real.clamp(min=0)].transpose(0, 1)
    return out.masked_fill(padding[..., None, None], 0.0), lse.masked_fill(padding[:, None], -math.inf)


def queries(lists: Lists, group: int, num_tokens: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    B, Hkv = lists.seq_lens.shape
    return torch.randn(B, num_tokens, Hkv * group, lists.k_cache.shape[-1]).to(dtype).to(lists.k_cache.device)
