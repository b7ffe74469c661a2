"""Attention over the ragged paged cache on the CPU.

Items of work (see ``paged_items``) follow from a list alone, and the partial results of a list are merged in order: the
bits depend neither on the number of threads nor on the other lists.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import boolean, float32

from kvops.kernels.cpu.arguments import OUTSIDE, Binding, for_heads, in_float32, per_head, unpack
from kvops.kernels.cpu.elements import FORMATS, LOG2_E, exp2, larger, padded
from kvops.kernels.cpu.jit import inner, jit
from kvops.kernels.cpu.paged_items import (
    PIECE,
    ROWS,
    Call,
    Place,
    add_bias,
    by_slots,
    cap,
    cut,
    first_item,
    multiply_by_slot_scales,
    new_tokens,
    place_of,
    reads_inside,
    seen_by_rows,
    seen_slots,
    spans_of,
    take_off_distances,
)
from kvops.kernels.cpu.paged_rows import TILE, Rows, ahead, bring, locate, widened
from kvops.kernels.cpu.threads import run_shares
from kvops.kernels.cpu.vector import largest_of, multiply_add, multiply_transposed
from kvops.prepared import prepared

_NEAR = 4 << 20  # bytes of K and V that may still be in a cache
_LEAST_WORK = 1 << 14  # elements of K and V that a thread should have at least

SUM, SUM_OF_SQUARES, MAX = 0, 1, 2
_REDUCE = {"sum": SUM, "sumsq": SUM_OF_SQUARES, "max": MAX}


@inner
def _load_queries(call, b, h, first, rows, queries):
    """Rows ``first`` onward of [T * group] of a list, times the scale of their scores."""
    group = call.q.shape[2] // call.lens.shape[1]
    row, first_token, _ = new_tokens(call, b)
    factor = _query_factor(call, h)
    for r in range(rows):
        t, head = first_token + (first + r) // group, h * group + (first + r) % group
        for d in range(call.q.shape[3]):
            queries[r, d] = call.q[row, t, head, d] * factor


@inner
def _query_factor(call, h):
    """The scale of the scores; without a softcap times log2(e), which makes them logarithms to base 2."""
    factor = call.scale * (1.0 if call.softcap > 0 else LOG2_E)
    return np.float32(factor * call.k_scale[h] if call.k_scale.size else factor)


@inner
def _mask(call, span, b, h, first_row, rows, first, count, s):
    """Put -inf where a row does not see a slot."""
    group, length, tokens = call.q.shape[2] // call.lens.shape[1], span[0], span[1]
    causal, window_left = by_slots(call)
    table, size = call.tables[b, h], call.k_cache.shape[1]
    row, first_token, _ = new_tokens(call, b)
    for r in range(rows):
        t = (first_row + r) // group
        begin, end = seen_slots(length, tokens, t, causal, window_left)
        for j in range(min(max(begin - first, 0), count)):
            s[r, j] = -np.inf
        for j in range(min(max(end - first, 0), count), count):
            s[r, j] = -np.inf
        if call.query_positions.size and call.window_left >= 0:
            oldest = np.int64(call.query_positions[row, first_token + t]) - call.window_left
            for j in range(count):
                if call.positions[table[(first + j) // size], (first + j) % size, h] < oldest:
                    s[r, j] = -np.inf
        if call.tree.size:
            for j in range(max(length - tokens - first, 0), count):
                if not call.tree[b, t, first + j - (length - tokens)]:
                    s[r, j] = -np.inf


class Scratch(NamedTuple):
    """What a thread works in."""

    queries: float32[:, ::1]  # [ROWS, D], head sizes rounded up to whole vectors
    s: float32[:, ::1]  # [ROWS, TILE], the scores, then the probabilities
    keys: Rows
    values: Rows
    far: boolean  # whether K and V are too large for a cache of the processor


@jit
def _scratch(threads, head_dim, value_dim):
    """The scratch memory of all threads; see :func:`_own`."""
    D, Dv = padded(head_dim), padded(value_dim)
    return (
        np.empty((threads, ROWS, D), np.float32),
        np.empty((threads, ROWS, TILE), np.float32),
        np.empty((threads, TILE + 1, D), np.float32),
        np.empty((threads, TILE + 1, Dv), np.float32),
        np.empty((threads, 4, TILE), np.int64),
    )


@inner
def _own(scratches, share, call, items):
    """The scratch memory of one thread, with 0 where products read what nothing writes."""
    queries, s, keys, values, places = scratches
    s[share] = 0
    queries[share, :, call.q.shape[3] :] = 0
    keys[share, :, call.q.shape[3] :] = 0
    keys[share, TILE] = 0
    values[share, :, call.out.shape[3] :] = 0
    values[share, TILE] = 0
    far = items.slots * (call.k_cache.shape[3] + call.v_cache.shape[3]) > _NEAR
    return Scratch(
        queries[share],
        s[share],
        Rows(places[share, 0], keys[share], places[share, 1]),
        Rows(places[share, 2], values[share], places[share, 3]),
        far,
    )


@inner
def _score(call, scratch, span, b, h, first_row, rows, first, count, then):
    """scratch.s [rows, count]: the scores of the loaded queries and the located keys, as logarithms to base 2.
    ``then``: what is read next."""
    keys = widened(scratch.keys, call.k_element, call.q.shape[3], count)
    multiply_transposed(scratch.queries, rows, keys, count, scratch.queries.shape[1], scratch.s, then)
    # What few calls have is compiled apart: inlined, it would slow down all of them.
    if call.k_slot_scale.size:
        multiply_by_slot_scales(call.k_slot_scale, call.tables[b, h], h, rows, first, count, scratch.s)
    if call.softcap > 0:
        cap(call.softcap, rows, count, scratch.s)
    if call.slopes.size:
        take_off_distances(call, span, b, h, first_row, rows, first, count, scratch.s)
    if call.bias.size:
        group = call.q.shape[2] // call.lens.shape[1]
        row, first_token, _ = new_tokens(call, b)
        add_bias(call.bias, row, h * group, group, first_token, first_row, rows, first, count, scratch.s)
    _mask(call, span, b, h, first_row, rows, first, count, scratch.s)


@jit
def _soften(s, count, acc):
    """One step of the online softmax: s [count] becomes weights, and acc [Dv + 2] is rescaled to the new maximum."""
    Dv = len(acc) - 2
    largest = largest_of(s, count, acc[Dv + 1])
    shift = largest if largest > -np.inf else np.float32(0)
    old = exp2(acc[Dv + 1] - shift)
    total = np.float32(0)
    for j in range(count):
        p = exp2(s[j] - shift)
        s[j] = p
        total += p
    if old != 1:
        for d in range(Dv + 1):
            acc[d] *= old
    acc[Dv] += total
    acc[Dv + 1] = largest


@inner
def _locate_keys(call, scratch, i, first, end):
    """Locate the keys of the tile from slot ``first`` of list ``i`` on. Returns how many they are."""
    Hkv, count = call.lens.shape[1], min(TILE, end - first)
    locate(scratch.keys, call.k_cache, call.tables[i // Hkv, i % Hkv], i % Hkv, first, count)
    return count


@inner
def _attend(call, scratch, spans, place, then, partial, stash):
    """One item; the keys of its first tile are located, and in the end those of the item ``then``.

    partial [rows, padded Dv + 2]: the weighted sum of V, the sum of the weights and the largest score. stash
    [rows, PIECE] keeps the scores, where it has room for them.
    """
    Hkv, Dv = call.lens.shape[1], scratch.values.copies.shape[1]
    b, h, first_row, rows = place.i // Hkv, place.i % Hkv, place.first_row, place.rows
    _load_queries(call, b, h, first_row, rows, scratch.queries)
    for r in range(len(partial)):
        partial[r, : Dv + 1] = 0
        partial[r, Dv + 1] = -np.inf
    for first in range(place.begin, place.end, TILE):
        count = min(TILE, place.end - first)
        locate(scratch.values, call.v_cache, call.tables[b, h], h, first, count)
        values = ahead(scratch.values, count if scratch.far else 0, call.v_cache)
        _score(call, scratch, spans[place.i], b, h, first_row, rows, first, count, values)
        if stash.size:
            for r in range(rows):
                for j in range(count):
                    stash[r, first - place.begin + j] = scratch.s[r, j]
        for r in range(rows):
            _soften(scratch.s[r], count, partial[r])
        if call.v_slot_scale.size:
            multiply_by_slot_scales(call.v_slot_scale, call.tables[b, h], h, rows, first, count, scratch.s)
        if first + TILE < place.end:
            next_keys = _locate_keys(call, scratch, place.i, first + TILE, place.end)
        else:
            next_keys = _locate_keys(call, scratch, then.i, then.begin, then.end)
        rows_of_values = widened(scratch.values, call.v_element, call.out.shape[3], count)
        keys = ahead(scratch.keys, next_keys if scratch.far else 0, call.k_cache)
        multiply_add(scratch.s, rows, count, rows_of_values, Dv, partial, keys)


@inner
def _attend_share(share, shares, call, items, scratches, partials, stash):
    scratch = _own(scratches, share, call, items)
    first, last = first_item(items, share, shares), first_item(items, share + 1, shares)
    if first == last:
        return
    place = place_of(call, items, first)
    count = _locate_keys(call, scratch, place.i, place.begin, place.end)
    if scratch.far:
        bring(scratch.keys, count, call.k_cache.shape[3])
    for item in range(first, last):
        then = place_of(call, items, item + 1) if item + 1 < last else Place(0, 0, 0, 0, 0)
        _attend(call, scratch, items.spans, place, then, partials[item], stash[min(item, len(stash) - 1)])
        place = then


@inner
def _merge_share(share, shares, call, items, partials):
    """out and lse of a share of the lists from the partial results of their items."""
    B, Hkv = call.lens.shape
    group, Dv = call.q.shape[2] // Hkv, call.out.shape[3]
    weight, largest_score = partials.shape[2] - 2, partials.shape[2] - 1
    for i in range(B * Hkv * share // shares, B * Hkv * (share + 1) // shares):
        b, h = i // Hkv, i % Hkv
        factor = call.v_scale[h] if call.v_scale.size else np.float32(1)
        row, first_token, count = new_tokens(call, b)
        for r in range((count if call.starts.size else call.tokens) * group):
            t, head = first_token + r // group, h * group + r % group
            out = call.out[row, t, head]
            out[:] = 0
            first, last = items.starts[i], items.starts[i + 1]
            if r >= count * group:
                last = first
            elif items.tiles[i] > 1:
                first += r // ROWS
                last = min(first + 1, last)
            largest, weights = np.float32(-np.inf), np.float32(0)
            for item in range(first, last):
                largest = max(largest, partials[item, r % ROWS, largest_score])
                weights += partials[item, r % ROWS, weight]
            if largest == -np.inf and weights == 0:  # the weights of scores that are all NaN are NaN
                call.lse[row, head, t] = -np.inf
                continue
            sink = call.sinks[head] * np.float32(LOG2_E) if call.sinks.size else np.float32(-np.inf)
            largest = max(largest, sink)
            if sink == np.inf:
                call.lse[row, head, t] = np.inf
                continue
            total = exp2(sink - largest)
            merged = partials[first, r % ROWS]  # a row in one piece, as out need not be
            for item in range(first, last):
                partial = partials[item, r % ROWS]
                share_of_all = exp2(partial[largest_score] - largest)
                total += share_of_all * partial[weight]
                for d in range(Dv):
                    merged[d] = share_of_all * partial[d] + (merged[d] if item > first else np.float32(0))
            for d in range(Dv):
                out[d] = merged[d] * (factor / total)
            call.lse[row, head, t] = (largest + np.log2(total)) / np.float32(LOG2_E)


@inner
def _reduce(call, b, h, first_row, rows, s, count, reduced, seen):
    """Add the rows' probabilities of each slot to ``reduced``, and mark the slots that a row sees."""
    group, reduce = call.q.shape[2] // call.lens.shape[1], call.reduce
    row, first_token, tokens = new_tokens(call, b)
    for r in range(max(0, (tokens - call.last) * group - first_row), rows):
        head, t = h * group + (first_row + r) % group, first_token + (first_row + r) // group
        lse = call.lse[row, head, t] * np.float32(LOG2_E)
        if lse == -np.inf:
            continue
        for j in range(count):
            seen[j] |= s[r, j] != -np.inf
            p = exp2(s[r, j] - lse)
            if reduce == MAX:
                reduced[j] = larger(p, reduced[j])
            else:
                reduced[j] += p * p if reduce == SUM_OF_SQUARES else p


@inner
def _score_again(call, scratch, span, b, h, begin, end, reduced, seen):
    """The reduced probabilities of the slots [begin, end) of a list whose scores were not kept."""
    group = call.q.shape[2] // call.lens.shape[1]
    rows, scored = span[1] * group, max(0, span[1] - call.last) * group
    nothing = ahead(scratch.keys, 0, call.k_cache)
    for first in range(begin, end, TILE):
        count, done = min(TILE, end - first), first - begin
        _locate_keys(call, scratch, b * call.lens.shape[1] + h, first, end)
        for first_row in range(scored // ROWS * ROWS, rows, ROWS):
            some = min(ROWS, rows - first_row)
            seen_from, seen_to = seen_by_rows(call, span, first_row, some)
            if seen_to <= first or first + count <= seen_from:
                continue
            _load_queries(call, b, h, first_row, some, scratch.queries)
            _score(call, scratch, span, b, h, first_row, some, first, count, nothing)
            _reduce(call, b, h, first_row, some, scratch.s, count, reduced[done:], seen[done:])


@inner
def _score_share(share, shares, call, items, scratches, stash):
    """Update the scores of a share of the pieces of lists."""
    Hkv = call.lens.shape[1]
    scratch = _own(scratches, share, call, items)
    reduced, seen = np.empty(PIECE, np.float32), np.empty(PIECE, np.bool_)
    size = call.k_cache.shape[1]
    for item in range(first_item(items, share, shares), first_item(items, share + 1, shares)):
        i, _, rows, begin, end = place_of(call, items, item)
        b, h = i // Hkv, i % Hkv
        decay = call.decays[b] if call.decays.size else np.float32(call.decay)
        reduced[:] = 0
        seen[:] = False
        if stash.size:
            _reduce(call, b, h, 0, rows, stash[item], end - begin, reduced, seen)
        else:
            _score_again(call, scratch, items.spans[i], b, h, begin, end, reduced, seen)
        for j in range(end - begin):
            if seen[j]:
                block, offset = call.tables[b, h, (begin + j) // size], (begin + j) % size
                call.scores[block, offset, h] = decay * call.scores[block, offset, h] + reduced[j]


@jit
def _run(addresses, table, threads):
    call = unpack(Call, addresses, table)
    rows = call.tokens * (call.q.shape[2] // call.lens.shape[1])
    spans = spans_of(call)
    if not reads_inside(call, spans):  # first of all: much memory would be taken for long lists
        return OUTSIDE
    items = cut(call, spans, True)
    count, height = items.starts[-1], -(-min(rows, ROWS) // 4) * 4  # rows are multiplied by fours
    partials = np.empty((count, height, padded(call.out.shape[3]) + 2), np.float32)
    threads = max(1, min(threads, items.slots * (call.q.shape[3] + call.out.shape[3]) // _LEAST_WORK))
    kept = call.scores.size > 0 and rows <= ROWS
    stash = np.empty((max(count, 1), height, PIECE if kept else 0), np.float32)
    scratches = _scratch(threads, call.q.shape[3], call.out.shape[3])
    succeeded = run_shares(_attend_share, (call, items, scratches, partials, stash), threads)
    succeeded &= run_shares(_merge_share, (call, items, partials), threads)
    if call.scores.size:
        pieces = items if kept else cut(call, spans, False)
        succeeded &= run_shares(_score_share, (call, pieces, scratches, stash), threads)
    return succeeded


class _Kind(NamedTuple):
    """What calls alike have in common. Results are float32 first: ``out`` itself where it is (``in_place``)."""

    binding: Binding
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    in_place: bool
    exact: bool  # q is float32


def _bind(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    causal: bool = True,
    window_left: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    score_reduce: str = "sum",
    score_decay: float = 1.0,
    score_last: int = -1,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    out: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    **given: Any,
) -> _Kind:
    B, D = seq_lens.shape[0], q.shape[-1]
    tokens = q.shape[1] if max_seqlen_q is None else max_seqlen_q
    heads = k_cache.shape[2] if k_cache.dim() == 4 else block_tables.shape[1]
    if k_cache.dim() == 4:
        block_tables, seq_lens = (x.unsqueeze(1).expand(B, heads, *x.shape[1:]) for x in (block_tables, seq_lens))
    query_positions = given.get("query_positions") if window_left >= 0 or alibi_slopes is not None else None
    sinks, tree = given.get("sinks"), given.get("tree_mask")
    out_shape, lse_shape = (*q.shape[:-1], v_cache.shape[-1]), (*q.shape[:-3], q.shape[-2], q.shape[-3])
    in_place = out is not None and out.dtype == torch.float32
    exact = q.dtype == torch.float32
    bias = in_float32(bias)
    if bias is not None:
        slots = block_tables.shape[-1] * k_cache.shape[1]  # what one for all slots is expanded to
        if bias.dim() and bias.shape[-1] > 1:
            slots = bias.shape[-1]
        bias = bias.expand(*q.shape[:-3], q.shape[-2], q.shape[-3], slots)
    q = q.float()
    result, lse = out if in_place else q.new_empty(out_shape), q.new_empty(lse_shape)
    if cu_seqlens_q is not None:
        q, result, lse = q[None], result[None], lse[None]
        bias = None if bias is None else bias[None]
        query_positions = None if query_positions is None else query_positions[None]
    binding = Binding(
        _run,
        Call,
        q=q,
        k_cache=per_head(k_cache, heads, 4),
        v_cache=per_head(v_cache, heads, 4),
        k_element=FORMATS[k_cache.dtype],
        v_element=FORMATS[v_cache.dtype],
        tables=block_tables,
        lens=seq_lens,
        counts=given.get("q_lens"),
        starts=cu_seqlens_q,
        positions=None if query_positions is None else per_head(given.get("positions"), heads, 3),
        query_positions=query_positions,
        tree=None if tree is None else tree.expand(B, tokens, tokens),
        sinks=None if sinks is None else sinks.float(),
        slopes=None if alibi_slopes is None else alibi_slopes.float().expand(B, -1),
        bias=bias,
        k_scale=for_heads(given.get("k_scale"), heads),
        v_scale=for_heads(given.get("v_scale"), heads),
        k_slot_scale=per_head(given.get("k_slot_scale"), heads, 3),
        v_slot_scale=per_head(given.get("v_slot_scale"), heads, 3),
        scores=per_head(given.get("scores"), heads, 3),
        decays=given.get("score_decays"),
        out=result,
        lse=lse,
        scale=D**-0.5 if scale is None else scale,
        softcap=softcap,
        decay=score_decay,
        tokens=tokens,
        window_left=min(window_left, 1 << 33),  # further than two int32 positions lie apart
        causal=causal,
        reduce=_REDUCE[score_reduce],
        last=tokens if score_last < 0 else min(score_last, tokens),
    )
    return _Kind(binding, out_shape, lse_shape, in_place, exact)


@prepared(_bind)
def paged_attention(
    kind: _Kind,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    q_lens: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    query_positions: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    k_slot_scale: torch.Tensor | None = None,
    v_slot_scale: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    score_decays: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    **bound: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kvops.paged_attention`. Every call is batch invariant and balanced without a ``schedule``."""
    queries = q.float()
    lse = queries.new_empty(*kind.lse_shape)  # sizes one by one: a tuple takes 0.5 µs more
    result = out if out is not None and kind.in_place else queries.new_empty(*kind.out_shape)
    if cu_seqlens_q is not None:  # the kernel does not write what belongs to no sequence
        lse.fill_(-torch.inf)
        if result is not out:
            result.zero_() if out is None else result.copy_(out)
    sinks = None if sinks is None else sinks.float()
    slopes = None if alibi_slopes is None else alibi_slopes.float()
    kind.binding(
        queries, k_cache, v_cache, block_tables, seq_lens, q_lens, cu_seqlens_q, positions, query_positions,
        tree_mask, sinks, slopes, in_float32(bias), k_scale, v_scale, k_slot_scale, v_slot_scale, scores, score_decays,
        result, lse,
    )  # fmt: skip
    if out is None:
        return (result if kind.exact else result.to(q.dtype)), lse
    if result is not out:
        out.copy_(result)
    return q.new_empty(0), lse
