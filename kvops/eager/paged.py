"""Paged append, attention and schedule in plain PyTorch: the readable reference, and what serves without numba.

A *list* is the blocks of one (sequence, KV head). Attention takes one list after another and copies the slots that a
tile of its query tokens may see into a matrix. The copies grow with the longest list, and of the scores at most
``_MAX_SCORES`` are held at once, or those of one token.
"""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvops.checks import QUANTISED_DTYPES, expect_counts, expect_inside
from kvops.eager.attention import compute_dtype, default_scale
from kvops.eager.bias import bias_tile
from kvops.eager.softmax import beside_sinks, softmax

# Scores held at once: 4 MiB in float32.
_MAX_SCORES = 1 << 20

# A share of a schedule is not cut below this many slots.
_MIN_SHARE = 128
# Slots per unit of a batch-invariant schedule.
_INVARIANT_UNIT = 256
# What stands for the number of programs where there is no GPU.
CPU_PROGRAMS = 8

# The largest int8 that is stored: as far from 0 on both sides, and -128 stays unused.
_LARGEST_INT8 = 127


def _divided(x: Tensor, by: int | Tensor) -> Tensor:
    """``x / by``, neither of them negative, rounded up."""
    return torch.div(x + (by - 1), by, rounding_mode="trunc")


def schedule_ends(lens: Tensor, block_size: int, batch_invariant: bool) -> tuple[Tensor, int]:
    """Where each list of ``lens`` [L, lists] ends in the line of all: int64 [L, lists] in units, and the slots of a
    unit: about a block, or the slots that a batch-invariant call gives a partial result of their own."""
    unit = _INVARIANT_UNIT if batch_invariant else min(max(block_size, 16), 64)
    return _divided(lens.clamp(min=0), unit).cumsum(1), unit


def paged_schedule(
    seq_lens: Tensor, block_size: int, *, num_programs: int = 0, batch_invariant: bool = False
) -> Tensor:
    """See :func:`kvops.paged_schedule`. A row holds the share of a program, the prefix sums of the lists' units with a
    leading 0, and the list in which each program begins."""
    num_programs = num_programs or CPU_PROGRAMS
    lens = seq_lens.flatten(1) if seq_lens.dim() == 3 else seq_lens.flatten()[None]  # [L, lists]
    ends, unit = schedule_ends(lens, block_size, batch_invariant)
    zero = ends.new_zeros(len(lens), num_programs + 2)
    total = ends[:, -1:] if ends.shape[1] else zero[:, :1]
    share = _divided(total, num_programs).clamp_(min=-(-_MIN_SHARE // unit))
    # Program p begins behind all lists that end up to p * share. To count them by the first program that they are
    # behind of takes a quarter of the time of searching for each program's beginning.
    ended = zero[:, 1:].scatter_(1, _divided(ends, share), 1, reduce="add")
    schedule = torch.cat([share, zero[:, :1], ends, ended[:, :-1].cumsum(1)], 1).to(torch.int32)
    return schedule if seq_lens.dim() == 3 else schedule[0]


def _bits(x: Tensor) -> Tensor:
    """Indexing knows no float8: it is moved as bytes."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def _quantised(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 in float8 or int8: rounded to nearest even and clamped. NaN stays NaN in float8 and becomes 0 in int8."""
    if dtype == torch.int8:
        return x.nan_to_num(0.0).round().clamp(-_LARGEST_INT8, _LARGEST_INT8).to(dtype)
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def _row_scales(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale of each float32 row in a cache of ``dtype``: its largest finite magnitude becomes the largest number of
    the dtype. Not below the smallest normal float32, by which zeros are divided."""
    largest = _LARGEST_INT8 if dtype == torch.int8 else torch.finfo(dtype).max
    most = rows.abs().nan_to_num(0.0, posinf=0.0).amax(-1)
    return (most / largest).clamp(min=torch.finfo(torch.float32).tiny)


def _counts(q_lens: Tensor | None, batch: int, num_tokens: int, name: str) -> Tensor:
    """int64 [batch]: the real tokens of each sequence, of ``num_tokens`` in the argument ``name``."""
    if q_lens is None:
        return torch.full((batch,), num_tokens)
    expect_counts("q_lens", q_lens, num_tokens, name)
    return q_lens.long()


def paged_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    q_lens: Tensor | None = None,
    positions: Tensor | None = None,
    token_positions: Tensor | None = None,
    scores: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_slot_scale: Tensor | None = None,
    v_slot_scale: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
) -> None:
    """See :func:`kvops.paged_append`."""
    Hkv, size = k.shape[-2], k_cache.shape[1]
    uniform = k_cache.dim() == 4
    if uniform:
        block_tables, seq_lens = block_tables[:, None].expand(-1, Hkv, -1), seq_lens[:, None].expand(-1, Hkv)
    if cu_seqlens_q is None:
        T = k.shape[1]
        count = _counts(q_lens, len(k), T, "k")
        first = torch.arange(len(k)) * T
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        token_positions = None if token_positions is None else token_positions.flatten()
    else:
        first, count = cu_seqlens_q[:-1].long(), cu_seqlens_q.diff().long()
    lens = seq_lens.long().where(count[:, None] > 0, 0)  # rows without tokens may hold anything
    expect_inside(block_tables, lens, len(k_cache), size, lens - count[:, None])
    sequence = torch.repeat_interleave(count)  # of each real token
    number = torch.arange(len(sequence)) - (count.cumsum(0) - count)[sequence]  # within its sequence
    slot = lens[sequence] + (number - count[sequence])[:, None]  # [tokens, Hkv]
    written = slot >= 0
    t, h = written.nonzero(as_tuple=True)
    slot, place = slot[written], (first[sequence] + number)[t]
    block, offset = block_tables[sequence[t], h, slot // size].long(), slot % size

    def write(side: Tensor, values: Tensor, by_head: bool) -> None:
        _bits(side)[(block, offset, h) if by_head else (block, offset)] = _bits(values)

    for cache, new, scale, slot_scale in (
        (k_cache, k, k_scale, k_slot_scale),
        (v_cache, v, v_scale, v_slot_scale),
    ):
        values = new[place, h]
        if cache.dtype in QUANTISED_DTYPES:
            values = values.float() if scale is None else values.float() / scale.expand(Hkv)[h, None]
            if slot_scale is not None:
                of_rows = _row_scales(values, cache.dtype)
                write(slot_scale, of_rows, uniform)
                values = values / of_rows[:, None]
            values = _quantised(values, cache.dtype)
        write(cache, values, uniform)
    if positions is not None and token_positions is not None:
        write(positions, token_positions[place], positions.dim() == 3)
    if scores is not None:
        write(scores, scores.new_zeros(len(slot)), uniform)


class _Tokens(NamedTuple):
    """The new tokens of a list: which of its slots each of them sees."""

    length: int  # slots of the list
    num_tokens: int  # real tokens, which stand in its last slots
    causal: bool
    window_left: int  # -1 for no limit
    tree: Tensor | None  # bool [T, T]
    positions: Tensor | None  # int64 [T], original positions, in which distances are then measured, or None: in slots

    def span(self, first: int, last: int) -> tuple[int, int]:
        """The slots [low, high) that some of the tokens ``first`` to ``last`` may see."""
        before = self.length - self.num_tokens  # slots before token 0
        high = max(0, before + last) if self.causal else self.length
        low = 0
        if self.window_left >= 0 and self.positions is None:
            low = max(0, before + first - self.window_left)
        return min(low, high), high

    def distances(self, first: int, last: int, low: int, high: int, positions: Tensor | None) -> Tensor:
        """int64 [last - first, high - low], how far each token is behind each slot; positions [high - low] of the
        slots."""
        if positions is not None and self.positions is not None:
            return self.positions[first:last, None] - positions
        return torch.arange(first, last)[:, None] + (self.length - self.num_tokens) - torch.arange(low, high)

    def seen(self, first: int, last: int, low: int, high: int, distances: Tensor) -> Tensor:
        """bool [last - first, high - low]."""
        before = self.length - self.num_tokens
        query = torch.arange(first, last)[:, None] + before  # the slot of each token
        slot = torch.arange(low, high)
        seen = slot <= query if self.causal else torch.ones(last - first, high - low, dtype=torch.bool)
        if self.window_left >= 0:
            seen &= distances <= self.window_left
        if self.tree is not None:
            new = (slot - before).clamp(max=self.tree.shape[1] - 1)  # the token of each slot
            seen &= (new < 0) | self.tree[first:last, new.clamp(min=0)]
        return seen


def _by_head(side: Tensor, heads: int, dims: int) -> list[Tensor]:
    """A cache or side array as each head sees it: [num_blocks, block_size, ...], of ``dims`` dimensions."""
    return list(side.unbind(2)) if side.dim() > dims else [side] * heads


def _read(side: Tensor, table: Tensor, low: int, high: int) -> Tensor:
    """The slots [low, high) of a list, a copy."""
    size = side.shape[1]
    first = low // size
    copied = _bits(side).index_select(0, table[first : -(-high // size)]).view(side.dtype)
    return copied.flatten(0, 1)[low - first * size : high - first * size]


class _Reduced:
    """What the slots of a list get of all query rows."""

    def __init__(self, length: int, reduce: str, dtype: torch.dtype) -> None:
        self.reduce = reduce
        self.values, self.seen = torch.zeros(length, dtype=dtype), torch.zeros(length, dtype=torch.bool)

    def add(self, p: Tensor, low: int, seen: Tensor) -> None:
        """p [rows, n] of the slots from ``low`` on, those that are ``seen`` [tokens, 1 or group, n]."""
        values = self.values[low : low + p.shape[1]]
        if self.reduce == "max":
            torch.maximum(values, p.amax(0), out=values)
        else:
            values += (p.square() if self.reduce == "sumsq" else p).sum(0)
        self.seen[low : low + p.shape[1]] |= seen.flatten(0, 1).any(0)

    def write(self, scores: Tensor, table: Tensor, decay: float | Tensor) -> None:
        slot = self.seen.nonzero()[:, 0]
        place = table[slot // scores.shape[1]].long(), slot % scores.shape[1]
        scores[place] = decay * scores[place] + self.values[slot].to(scores.dtype)


# Over 80 lines: 32 are the signature.
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    q_lens: Tensor | None = None,
    causal: bool = True,
    window_left: int = -1,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    tree_mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_slot_scale: Tensor | None = None,
    v_slot_scale: Tensor | None = None,
    scores: Tensor | None = None,
    score_reduce: str = "sum",
    score_decay: float = 1.0,
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    out: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    score_last: int = -1,
    score_decays: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`kvops.paged_attention`. Every call is batch invariant, and needs no ``schedule``: each product has a
    shape and an alignment that follow from its list alone."""
    B, (Hq, D) = len(seq_lens), q.shape[-2:]
    T = q.shape[1] if max_seqlen_q is None else max_seqlen_q
    heads = k_cache.shape[2] if k_cache.dim() == 4 else block_tables.shape[1]
    if k_cache.dim() == 4:
        block_tables, seq_lens = block_tables[:, None].expand(B, heads, -1), seq_lens[:, None].expand(B, heads)
    group = Hq // heads
    dtype = compute_dtype(q.dtype)
    keys, values = _by_head(k_cache, heads, 3), _by_head(v_cache, heads, 3)
    key_scales, value_scales = (
        None if side is None else _by_head(side, heads, 2) for side in (k_slot_scale, v_slot_scale)
    )
    window_left = min(window_left, 1 << 32)  # further than two int32 positions lie apart
    measured = window_left >= 0 or alibi_slopes is not None  # distances are
    places = _by_head(positions, heads, 2) if measured and positions is not None else None
    own_places = query_positions.long() if measured and query_positions is not None else None
    slopes = None if alibi_slopes is None else alibi_slopes.to(dtype).expand(B, Hq)
    tree = None if tree_mask is None else tree_mask.expand(B, T, T)
    capacity = block_tables.shape[2] * k_cache.shape[1]
    if bias is not None:  # [B, Hq, T, S]; packed [Hq, tokens, S]
        capacity = bias.shape[-1] if bias.dim() and bias.shape[-1] > 1 else capacity
        bias = bias.expand(*q.shape[:-3], Hq, q.shape[-3], capacity)
    if cu_seqlens_q is not None:
        count = cu_seqlens_q.diff().long()
        of_sequence: list[Any] = [(slice(start, end),) for start, end in pairwise(cu_seqlens_q.tolist())]
    else:
        count = _counts(q_lens, B, T, "q")
        of_sequence = [(b, slice(tokens)) for b, tokens in enumerate(count.tolist())]
    lens = seq_lens.long().where(count[:, None] > 0, 0)  # rows without tokens may hold anything
    by_slots = window_left >= 0 and query_positions is None
    read_from = lens - count[:, None] - window_left if by_slots else None
    expect_inside(block_tables, lens, len(k_cache), k_cache.shape[1], read_from)
    lengths = lens.tolist()
    result = q.new_zeros(*q.shape[:-1], v_cache.shape[-1]) if out is None else out
    if out is not None and cu_seqlens_q is None:
        out.zero_()
    lse = q.new_full((*q.shape[:-3], Hq, q.shape[-3]), -torch.inf, dtype=dtype)

    for b, h in product(range(B), range(heads)):
        new = of_sequence[b]  # the place of its tokens in q and in the results
        own = slice(h * group, (h + 1) * group)
        rows = (q[new][:, own].to(dtype) * default_scale(scale, D)).flatten(0, 1)  # a copy, aligned as any other
        tokens = _Tokens(
            lengths[b][h],
            len(rows) // group,
            causal and tree is None,
            window_left,
            None if tree is None else tree[b],
            None if own_places is None else own_places[new],
        )
        table, own_out, own_lse = block_tables[b, h], result[new][:, own], lse.mT[new][:, own]
        own_out.zero_()
        if k_scale is not None:
            rows *= k_scale.expand(heads)[h]
        reduced = None if scores is None else _Reduced(tokens.length, score_reduce, dtype)
        step = max(1, _MAX_SCORES // (group * max(1, tokens.length)))
        for first in range(0, tokens.num_tokens, step):
            last = min(first + step, tokens.num_tokens)
            low, high = tokens.span(first, last)
            high = min(high, capacity)
            if low >= high:
                continue
            k, v = (_read(cache[h], table, low, high).to(dtype) for cache in (keys, values))
            if key_scales is not None:
                k *= _read(key_scales[h], table, low, high)[:, None]
            if value_scales is not None:
                v *= _read(value_scales[h], table, low, high)[:, None]
            s = rows[first * group : last * group] @ k.mT
            if softcap > 0:
                s.div_(softcap).tanh_().mul_(softcap)
            slot_places = None if places is None else _read(places[h], table, low, high)
            distances = tokens.distances(first, last, low, high, slot_places)
            by_token = s.view(last - first, group, -1)
            if slopes is not None:
                by_token -= slopes[b, own, None] * distances.abs()[:, None]
            seen = tokens.seen(first, last, low, high, distances)[:, None]
            if bias is not None:
                place = (*new[:-1], own, new[-1])
                of_rows = bias[place][None]  # [1, group, tokens, S]
                added = bias_tile(of_rows, slice(first, last), slice(low, high), dtype)[0][0].transpose(0, 1)
                by_token += added
                seen = seen & (added != -torch.inf)  # [tokens, group, n]
            by_token.masked_fill_(~seen, -torch.inf)
            p, found = softmax(s)
            found = found.view(last - first, group)
            if sinks is not None:
                weight, found = beside_sinks(found, sinks[own])
                p *= weight.view(-1, 1)
            mean = p @ v if v_scale is None else (p @ v) * v_scale.expand(heads)[h]
            own_out[first:last] = mean.view(last - first, group, -1).to(q.dtype)
            own_lse[first:last] = found
            scored = 0 if score_last < 0 else max(0, tokens.num_tokens - score_last - first)
            if reduced is not None and scored < last - first:
                reduced.add(p[scored * group :], low, seen[scored:])
        if scores is not None and reduced is not None:
            reduced.write(
                _by_head(scores, heads, 2)[h], table, score_decay if score_decays is None else score_decays[b]
            )
    return (result if out is None else q.new_empty(0)), lse


def paged_latent_attention(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    value_dim: int,
    scale: float,
    q_lens: Tensor | None = None,
    causal: bool = True,
    softcap: float = 0.0,
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    out: Tensor | None = None,
    cache_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`kvops.paged_latent_attention`: the first columns of the keys are the values."""
    return paged_attention(
        q,
        cache,
        cache[..., :value_dim],
        block_tables,
        seq_lens,
        q_lens=q_lens,
        causal=causal,
        scale=scale,
        softcap=softcap,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        out=out,
        k_scale=cache_scale,
        v_scale=cache_scale,
    )
