"""Attention over a cache that takes in new tokens, with flash-attn's names and layouts."""

from __future__ import annotations

import torch
from torch import Tensor

from kvops import checks
from kvops.integrations.flash_attn.interface import last_contiguous, options_of
from kvops.integrations.flash_attn.pages import attend_to_pages, attend_to_rows, sees_no_later_slots
from kvops.integrations.flash_attn.rotary import rotate_by_positions
from kvops.ops.paged import paged_append


# Over 80 lines: 60 are the signature and its documentation.
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
    *,
    attention_chunk: int = 0,
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
        cache_leftpad: int32 ``[B]``, how many tokens at the beginning of each row are not part of it (but count in
            ``cache_seqlens`` and in positions); without a ``block_table``.
        cache_batch_idx: int32 or int64 ``[B]``, the row of the cache for each row of q.
        block_table: int32 ``[B, max_blocks]``.
        rotary_interleaved: rotate pairs of neighbours (GPT-J) instead of halves (GPT-NeoX).
        num_splits: ignored; the kernels choose it.
        attention_chunk: queries see the tokens of their own chunk of so many; 0 for no chunks.

    Returns ``[B, T, Hq, D]``. With ``return_softmax_lse`` it also returns lse, float32 ``[B, Hq, T]``.

    Keys are read in place. With ``alibi_slopes`` and one of ``cache_leftpad``, ``attention_chunk`` and a window to the
    right the rows are packed sequences, and pages or rows that ``cache_batch_idx`` selects are copied.

    Raises ValueError for wrong shapes, and for ``cache_leftpad`` along with a ``block_table``, as flash-attn does. On
    the CPU and with ``KVOPS_DEBUG=1`` it is also raised for tokens that do not fit and for rows out of range. Raises
    TypeError for wrong dtypes.
    """
    if cache_leftpad is not None:
        if block_table is not None:
            raise ValueError("cache_leftpad: expected None along with a block_table: leave out whole pages")
        checks.expect_dtype("cache_leftpad", cache_leftpad, torch.int32)
        checks.expect_shape("cache_leftpad", cache_leftpad, "[batch]", q.shape[0])
        checks.expect_same_device("cache_leftpad", cache_leftpad, "q", q)
    checks.expect_int("attention_chunk", attention_chunk, 0)
    in_order = block_table is None and cache_batch_idx is None
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
        if cache_leftpad is not None:
            within = (cache_leftpad >= 0) & (cache_leftpad <= seq_lens)
            checks.expect_data("cache_leftpad", "numbers from 0 to the tokens of each row", within)
    if k is not None and v is not None:
        if rotary_cos is not None and rotary_sin is not None:
            new = cache_seqlens[:, None] + torch.arange(k.shape[1], device=q.device)
            moving = causal or max(window_size) >= 0
            own = cache_seqlens[:, None] + torch.arange(q.shape[1], device=q.device) * moving
            k = rotate_by_positions(k, rotary_cos, rotary_sin, new, rotary_interleaved)
            q = rotate_by_positions(q, rotary_cos, rotary_sin, own, rotary_interleaved)
        k, v = map(last_contiguous, (k, v))
        paged_append(k, v, k_cache, v_cache, block_table, seq_lens)
    elif rotary_cos is not None:
        raise ValueError("rotary_cos: expected None without new keys k and v: only those and their queries are rotated")
    options = options_of(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes)
    q = last_contiguous(q)
    bounded = cache_leftpad is not None or attention_chunk or not sees_no_later_slots(options, q.shape[1])
    if alibi_slopes is not None and bounded and in_order:
        rows = k_cache[: len(q)], v_cache[: len(q)]
        out, lse = attend_to_rows(q, *rows, seq_lens, None, options, cache_leftpad, attention_chunk)
    else:
        caches = k_cache, v_cache
        out, lse = attend_to_pages(
            q, *caches, block_table, seq_lens, None, options, leftpad=cache_leftpad, attention_chunk=attention_chunk
        )
    return (out, lse) if return_softmax_lse else out


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
