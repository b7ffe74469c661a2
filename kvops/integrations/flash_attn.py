"""flash-attn's functions on kvops: the same names, arguments, defaults and layouts, on any device that kvops runs on.

    from kvops.integrations.flash_attn import flash_attn_func  # or:
    kvops.integrations.flash_attn.install()  # makes them `flash_attn` where that package is not installed

They follow flash-attn 2.8. Differences: ``dropout_p`` must be 0; a row that sees no key has an lse of -inf; results
are always deterministic; the matrix of probabilities, which flash-attn returns for its tests alone, is None.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kvops import checks
from kvops.ops.attention import flash_attention
from kvops.ops.dense import check_lengths, check_lengths_data
from kvops.ops.paged import paged_append, paged_attention
from kvops.ops.varlen import flash_attention_varlen
from kvops.rotary import rotate

VERSION = "2.8.3"

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Result = Tensor | tuple[Tensor, Tensor, None]


def install() -> bool:
    """Make these functions importable as ``flash_attn`` and ``flash_attn.flash_attn_interface`` in this process.

    Does nothing if the real package is installed. Returns whether ``flash_attn`` now has these functions.
    """
    present = sys.modules.get("flash_attn")
    if present is not None:
        return getattr(present, "flash_attn_func", None) is flash_attn_func
    if importlib.util.find_spec("flash_attn") is not None:
        return False
    package, interface = ModuleType("flash_attn", __doc__), ModuleType("flash_attn.flash_attn_interface", __doc__)
    for module in (package, interface):
        module.__spec__ = ModuleSpec(module.__name__, None, is_package=module is package)
        for name in __all__:
            setattr(module, name, globals()[name])
        sys.modules[module.__name__] = module
    package.__version__ = VERSION  # type: ignore[attr-defined]
    package.__path__ = []
    package.flash_attn_interface = interface  # type: ignore[attr-defined]
    return True


def _options(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    if dropout_p != 0:
        raise ValueError(f"dropout_p: expected 0, got {dropout_p}: kvops has no dropout")
    return {
        "scale": softmax_scale,
        "causal": causal,
        "window_left": window_size[0],
        "window_right": window_size[1],
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }


def _last_contiguous(x: Tensor) -> Tensor:
    """As in flash-attn: a copy if the last dimension is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _result(out: Tensor, lse: Tensor, return_attn_probs: bool) -> Result:
    return (out, lse, None) if return_attn_probs else out


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """q ``[B, Sq, Hq, D]``, k and v ``[B, Sk, Hkv, D]`` -> ``[B, Sq, Hq, D]``; see :func:`kvops.flash_attention`.

    With ``return_attn_probs`` it also returns lse, float32 ``[B, Hq, Sq]``, and None.
    """
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    q, k, v = map(_last_contiguous, (q, k, v))
    return _result(*flash_attention(q, k, v, **options), return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` of q ``[B, Sq, Hq, D]`` and kv ``[B, Sk, 2, Hkv, D]``."""
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    checks.expect_shape("kv", kv, "[batch, seqlen, 2, heads, head_dim]", None, None, 2, None, None)
    q, kv = map(_last_contiguous, (q, kv))
    return _result(*flash_attention(q, *kv.unbind(2), **options), return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` of qkv ``[B, S, 3, H, D]``."""
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    checks.expect_shape("qkv", qkv, "[batch, seqlen, 3, heads, head_dim]", None, None, 3, None, None)
    return _result(*flash_attention(*_last_contiguous(qkv).unbind(2), **options), return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """q ``[Tq, Hq, D]``, k and v ``[Tk, Hkv, D]`` -> ``[Tq, Hq, D]``; see :func:`kvops.flash_attention_varlen`.

    With a ``block_table``, int32 ``[B, max_blocks]``, k and v are pages ``[num_blocks, page_size, Hkv, D]`` and
    ``cu_seqlens_k`` has the lengths of the sequences. With ``return_attn_probs`` it also returns lse, float32
    ``[Hq, Tq]``, and None.
    """
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    q = _last_contiguous(q)
    if block_table is None:
        k, v = map(_last_contiguous, (k, v))
        return _result(*flash_attention_varlen(q, k, v, *lengths, **options), return_attn_probs)
    checks.expect_rank("k", k, "[num_blocks, page_size, heads, head_dim]")
    checks.expect_rank("block_table", block_table, "[batch, max_blocks]")
    check_lengths(q, k, *lengths)
    if checks.may_look(cu_seqlens_q):
        check_lengths_data(len(q), block_table.numel() * k.shape[1], *lengths)
    # The paged operator takes the queries of each sequence in a separate row.
    q_lens = cu_seqlens_q.diff()
    token = torch.arange(max_seqlen_q if len(q) else 0, device=q.device)
    place = (cu_seqlens_q[:-1, None] + token).clamp(max=max(len(q) - 1, 0))
    out, lse = _paged(q[place], k, v, block_table, cu_seqlens_k.diff(), q_lens, options)
    packed_out, packed_lse = q.new_zeros(*q.shape[:2], out.shape[-1]), lse.new_full((q.shape[1], len(q)), -torch.inf)
    real = token < q_lens[:, None]
    packed_out[place[real]] = out[real]
    packed_lse[:, place[real]] = lse.transpose(0, 1)[:, real]
    return _result(packed_out, packed_lse, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_varlen_func` of q ``[Tq, Hq, D]`` and kv ``[Tk, 2, Hkv, D]``."""
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    checks.expect_shape("kv", kv, "[tokens, 2, heads, head_dim]", None, 2, None, None)
    q, kv = map(_last_contiguous, (q, kv))
    k, v = kv.unbind(1)
    out, lse = flash_attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)
    return _result(out, lse, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_varlen_func` of qkv ``[T, 3, H, D]``."""
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    checks.expect_shape("qkv", qkv, "[tokens, 3, heads, head_dim]", None, 3, None, None)
    q, k, v = _last_contiguous(qkv).unbind(1)
    out, lse = flash_attention_varlen(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
    return _result(out, lse, return_attn_probs)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append new keys and values to a cache, then attend to it. There is no gradient.

    Args:
        q: ``[B, T, Hq, D]``.
        k_cache, v_cache: ``[B_cache, S, Hkv, D]``, or pages ``[num_blocks, page_size, Hkv, D]`` with a ``block_table``.
        k, v: ``[B, T_new, Hkv, D]``, written in place after the first ``cache_seqlens`` tokens.
        rotary_cos, rotary_sin: ``[S_rotary, R / 2]``, with S_rotary at least the size of a row of the cache. The first
            R dimensions of k and q are rotated, in float32 and rounded once: k, and q if causal or in a window, by the
            positions from ``cache_seqlens`` on; other q all by ``cache_seqlens``.
        cache_seqlens: the length of each row before this call, a number or int32 ``[B]``; not updated. None for S.
        cache_batch_idx: int32 or int64 ``[B]``, the row of the cache for each row of q.
        block_table: int32 ``[B, max_blocks]``.
        rotary_interleaved: rotate pairs of neighbours (GPT-J) instead of halves (GPT-NeoX).
        num_splits: ignored; the kernels choose it.

    Returns ``[B, T, Hq, D]``. With ``return_softmax_lse`` it also returns lse, float32 ``[B, Hq, T]``.

    Raises ValueError for wrong shapes, and for ``alibi_slopes``, ``cache_leftpad`` and a window to the right of several
    queries that are not causal, which :func:`kvops.paged_attention` does not support. On the CPU and with
    ``KVOPS_DEBUG=1`` it is also raised for tokens that do not fit and for rows out of range. Raises TypeError for wrong
    dtypes.
    """
    if cache_leftpad is not None:
        raise ValueError(
            "cache_leftpad: expected None, because kvops has no padding in a cache; move rows to their first slots"
        )
    if (k is None) != (v is None):
        raise ValueError(f"v: expected along with k, got {'only k' if v is None else 'only v'}")
    checks.expect_rank("q", q, "[batch, tokens, heads, head_dim]")
    checks.expect_rank("k_cache", k_cache, "[batch or num_blocks, tokens, heads, head_dim]")
    if cache_seqlens is None and (block_table is not None or k is not None):
        raise ValueError("cache_seqlens: expected a number or int32 [batch] with new keys or pages, got None")
    cache_seqlens = _cache_lengths(k_cache.shape[1] if cache_seqlens is None else cache_seqlens, q)
    block_table = _pages(block_table, cache_batch_idx, k_cache, q)
    seq_lens = cache_seqlens if k is None else cache_seqlens + k.shape[1]
    room = block_table.shape[1] * k_cache.shape[1]
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_sin: expected along with rotary_cos, got only one of them")
    if rotary_cos is not None and rotary_sin is not None:
        _check_rotary(rotary_cos, rotary_sin, q, room)
    if checks.may_look(seq_lens):
        expected = f"numbers that the cache has room for, new tokens included ({room} of them)"
        checks.expect_data("cache_seqlens", expected, (cache_seqlens >= 0) & (seq_lens <= room))
    if k is not None and v is not None:
        if rotary_cos is not None and rotary_sin is not None:
            new = cache_seqlens[:, None] + torch.arange(k.shape[1], device=q.device)
            moving = causal or max(window_size) >= 0
            own = cache_seqlens[:, None] + torch.arange(q.shape[1], device=q.device) * moving
            k = _rotate(k, rotary_cos, rotary_sin, new, rotary_interleaved)
            q = _rotate(q, rotary_cos, rotary_sin, own, rotary_interleaved)
        k, v = map(_last_contiguous, (k, v))
        paged_append(k, v, k_cache, v_cache, block_table, seq_lens)
    elif rotary_cos is not None:
        raise ValueError("rotary_cos: expected None without new keys k and v: only those and their queries are rotated")
    options = _options(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes)
    out, lse = _paged(_last_contiguous(q), k_cache, v_cache, block_table, seq_lens, None, options)
    return (out, lse) if return_softmax_lse else out


def _paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    q_lens: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    if options.pop("alibi_slopes") is not None:
        raise ValueError("alibi_slopes: expected None, because paged attention has no ALiBi; use flash_attn_func")
    right = options.pop("window_right")
    if right >= 0 and not options["causal"] and q.shape[1] > 1:
        raise ValueError(f"window_size: expected no limit to the right over a cache unless causal, got {right}")
    return paged_attention(q, k_cache, v_cache, block_table, seq_lens, q_lens=q_lens, **options)


def _cache_lengths(cache_seqlens: int | Tensor, q: Tensor) -> Tensor:
    """``cache_seqlens`` as int32 ``[B]``."""
    batch = q.shape[0]
    if not isinstance(cache_seqlens, Tensor):
        checks.expect_int("cache_seqlens", cache_seqlens, 0)
        return torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    checks.expect_dtype("cache_seqlens", cache_seqlens, torch.int32)
    checks.expect_shape("cache_seqlens", cache_seqlens, "[batch]", batch)
    return cache_seqlens


def _pages(block_table: Tensor | None, cache_batch_idx: Tensor | None, k_cache: Tensor, q: Tensor) -> Tensor:
    """The block table, int32 ``[B, max_blocks]``. Without one, each row of the cache is one long page."""
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError("cache_batch_idx: expected None along with a block_table, which names the pages")
        _check_rows_of_cache(cache_batch_idx, k_cache, q)
        return cache_batch_idx.to(torch.int32)[:, None]
    if block_table is None:
        checks.expect_at_least("k_cache.shape[0]", k_cache.shape[0], q.shape[0])
        return torch.arange(q.shape[0], dtype=torch.int32, device=q.device)[:, None]
    checks.expect_rank("block_table", block_table, "[batch, max_blocks]")
    return block_table


def _check_rows_of_cache(cache_batch_idx: Tensor, k_cache: Tensor, q: Tensor) -> None:
    checks.expect_dtype("cache_batch_idx", cache_batch_idx, torch.int32, torch.int64)
    checks.expect_shape("cache_batch_idx", cache_batch_idx, "[batch]", q.shape[0])
    checks.expect_same_device("cache_batch_idx", cache_batch_idx, "q", q)
    if checks.may_look(cache_batch_idx):
        rows = k_cache.shape[0]
        inside = (cache_batch_idx >= 0) & (cache_batch_idx < rows)
        checks.expect_data("cache_batch_idx", f"rows of k_cache from 0 to {rows - 1}", inside)


def _check_rotary(cos: Tensor, sin: Tensor, q: Tensor, room: int) -> None:
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        checks.expect_rank(name, table, "[positions, rotary_dim / 2]")
        checks.expect_dtype(name, table, *checks.FLOAT_DTYPES)
        checks.expect_same_device(name, table, "q", q)
    checks.expect_shape("rotary_sin", sin, "[positions, rotary_dim / 2] of rotary_cos", *cos.shape)
    checks.expect_at_least("rotary_cos.shape[0] (positions, as many as the cache has room for)", cos.shape[0], room)
    if 2 * cos.shape[1] > q.shape[3]:
        raise ValueError(
            f"rotary_cos: expected at most head_dim / 2 = {q.shape[3] // 2} columns, one for each pair of dimensions "
            f"that is rotated, got {cos.shape[1]}"
        )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x ``[B, T, H, D]`` with its first dimensions rotated by ``positions`` ``[B, T]`` of the tables ``[S, R / 2]``."""
    width = 2 * cos.shape[1]
    rotary, unchanged = x[..., :width].float(), x[..., width:]
    angles = (table[positions.long()].unsqueeze(2).float() for table in (cos, sin))
    if interleaved:
        halves = rotate(rotary.unflatten(-1, (-1, 2)).mT.flatten(-2), *angles)
        rotated = halves.unflatten(-1, (2, -1)).mT.flatten(-2)
    else:
        rotated = rotate(rotary, *angles)
    return torch.cat((rotated.to(x.dtype), unchanged), dim=-1)
