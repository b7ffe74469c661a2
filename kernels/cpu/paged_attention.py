"""Attention over the ragged paged cache on the CPU.

Items of work (see ``paged_items``) follow from a list alone, and the partial results of a list are merged in order: the
bits depend neither on the number of threads nor on the other lists.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import boolean, float32, int64

from kvops.kernels.cpu.arguments import Binding, for_heads, per_head, unpack
from kvops.kernels.cpu.elements import FLOAT32, FORMATS, LOG2_E, exp2, padded, widen
from kvops.kernels.cpu.jit import jit
from kvops.kernels.cpu.paged_items import (
    PIECE,
    ROWS,
    Call,
    by_slots,
    cut,
    first_item,
    item_slots,
    list_of,
    seen_slots,
)
from kvops.kernels.cpu.threads import run_shares
from kvops.kernels.cpu.vector import multiply_add, multiply_transposed, touch
from kvops.prepared import prepared

TILE = 64  # slots of K and V that are widened to float32 at once; they stay in the first level of the cache
LINE = 64  # bytes that come from memory at once
_NEAR = 4 << 20  # bytes of K and V that may still be in a cache
_LEAST_WORK = 1 << 14  # elements of K and V that a thread should have at least

SUM, SUM_OF_SQUARES, MAX = 0, 1, 2
_REDUCE = {"sum": SUM, "sumsq": SUM_OF_SQUARES, "max": MAX}


@jit
def _load_queries(q, b, first_head, group, first, rows, factor, queries):
    """Rows ``first`` onward of [T * group], times ``factor``."""
    for r in range(rows):
        t, head = (first + r) // group, first_head + (first + r) % group
        for d in range(q.shape[3]):
            queries[r, d] = q[b, t, head, d] * factor


@jit
def _query_factor(call, h):
    """The scale of the scores; without a softcap times log2(e), which makes them logarithms to base 2."""
    factor = call.scale * (1.0 if call.softcap > 0 else LOG2_E)
    return np.float32(factor * call.k_scale[h] if call.k_scale.size else factor)


@jit
def _locate(cache, element, width, far, table, h, first, count, tile, rows):
    """Where the slots [first, first + count) of a list stand as float32 rows of whole vectors: in the cache itself, or
    in ``tile`` [TILE + 1, padded width], to which they are copied. Writes the addresses of the rows; the number of rows
    is rounded up by fours with the last of the tile, which is 0.

    The products read four rows at a time, an order in which memory is slow: rows that are ``far``, likely in no cache,
    are touched in their own order before.
    """
    size = cache.shape[1]
    in_place = element == FLOAT32 and width == tile.shape[1]
    block, offset, j = first // size, first % size, 0
    while j < count:
        address = cache.ctypes.data + h * cache.strides[2] + table[block] * cache.strides[0] + offset * cache.strides[1]
        for _ in range(min(size - offset, count - j)):
            rows[j] = address
            if in_place:
                for byte in range(0, 4 * width if far else 0, LINE):
                    touch(address + byte)
            else:
                rows[j] = tile.ctypes.data + j * tile.strides[0]
                widen(address, element, width, rows[j])
            address += cache.strides[1]
            j += 1
        block, offset = block + 1, 0
    for j in range(count, -(-count // 4) * 4):
        rows[j] = tile.ctypes.data + TILE * tile.strides[0]


@jit
def _cap(softcap, rows, count, s):
    for r in range(rows):
        for j in range(count):
            s[r, j] = np.float32(softcap * LOG2_E) * np.tanh(s[r, j] / np.float32(softcap))


@jit
def _mask(call, span, b, h, first_row, rows, first, count, s):
    """Put -inf where a row does not see a slot."""
    group = call.q.shape[2] // call.lens.shape[1]
    length, tokens = span[0], span[1]
    causal, window_left = by_slots(call)
    table, size = call.tables[b, h], call.k_cache.shape[1]
    for r in range(rows):
        t = (first_row + r) // group
        begin, end = seen_slots(length, tokens, t, causal, window_left)
        for j in range(min(max(begin - first, 0), count)):
            s[r, j] = -np.inf
        for j in range(min(max(end - first, 0), count), count):
            s[r, j] = -np.inf
        if call.query_positions.size and t < tokens:
            oldest = np.int64(call.query_positions[b, t]) - call.window_left
            for j in range(count):
                if call.positions[table[(first + j) // size], (first + j) % size, h] < oldest:
                    s[r, j] = -np.inf
        if call.tree.size and t < tokens:
            for j in range(max(length - tokens - first, 0), count):
                if not call.tree[b, t, first + j - (length - tokens)]:
                    s[r, j] = -np.inf


class Scratch(NamedTuple):
    """What a thread works in."""

    queries: float32[:, ::1]  # [ROWS, D], head sizes rounded up to whole vectors
    keys: float32[:, ::1]  # [TILE + 1, D], the last row is 0
    key_rows: int64[::1]  # [TILE], addresses
    s: float32[:, ::1]  # [ROWS, TILE], the scores, then the probabilities
    values: float32[:, ::1]  # [TILE + 1, Dv]
    value_rows: int64[::1]  # [TILE]
    far: boolean  # whether K and V are too large for a cache of the processor


@jit
def _scratch(threads, head_dim, value_dim):
    """The scratch memory of all threads; see :func:`_own`."""
    D, Dv = padded(head_dim), padded(value_dim)
    return (
        np.empty((threads, ROWS, D), np.float32),
        np.empty((threads, TILE + 1, D), np.float32),
        np.empty((threads, TILE), np.int64),
        np.empty((threads, ROWS, TILE), np.float32),
        np.empty((threads, TILE + 1, Dv), np.float32),
        np.empty((threads, TILE), np.int64),
    )


@jit
def _own(scratches, share, call, items):
    """The scratch memory of one thread, with 0 where products read what nothing writes."""
    queries, keys, key_rows, s, values, value_rows = scratches
    head_dim, value_dim = call.q.shape[3], call.out.shape[3]
    far = items.costs[-1] * (head_dim + value_dim) * 4 > _NEAR
    scratch = Scratch(queries[share], keys[share], key_rows[share], s[share], values[share], value_rows[share], far)
    scratch.s[:] = 0
    scratch.queries[:, head_dim:] = 0
    scratch.keys[:TILE, head_dim:] = 0
    scratch.keys[TILE] = 0
    scratch.values[:TILE, value_dim:] = 0
    scratch.values[TILE] = 0
    return scratch


@jit
def _locate_keys(call, scratch, b, h, first, count):
    _locate(
        call.k_cache, call.element, call.q.shape[3], scratch.far, call.tables[b, h], h, first, count, scratch.keys,
        scratch.key_rows,
    )  # fmt: skip


@jit
def _locate_values(call, scratch, b, h, first, count):
    _locate(
        call.v_cache, call.element, call.out.shape[3], scratch.far, call.tables[b, h], h, first, count, scratch.values,
        scratch.value_rows,
    )  # fmt: skip


@jit
def _score(call, scratch, span, b, h, first_row, rows, first, count):
    """scratch.s [rows, count]: the scores of the loaded queries and keys, as logarithms to base 2."""
    multiply_transposed(scratch.queries, rows, scratch.key_rows, count, scratch.queries.shape[1], scratch.s)
    if call.softcap > 0:
        _cap(call.softcap, rows, count, scratch.s)
    _mask(call, span, b, h, first_row, rows, first, count, scratch.s)


@jit
def _soften(s, count, acc):
    """One step of the online softmax: s [count] becomes weights, and acc [Dv + 2] is rescaled to the new maximum."""
    Dv = len(acc) - 2
    largest = acc[Dv + 1]
    for j in range(count):
        largest = s[j] if s[j] > largest else largest
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


@jit
def _attend(call, scratch, span, b, h, first_row, rows, begin, end, partial, stash):
    """One item: rows [first_row, first_row + rows) over the slots [begin, end) of a list.

    partial [rows, padded Dv + 2]: the weighted sum of V, the sum of the weights and the largest score. stash
    [rows, PIECE] keeps the scores, where it has room for them.
    """
    group, Dv = call.q.shape[2] // call.lens.shape[1], scratch.values.shape[1]
    _load_queries(call.q, b, h * group, group, first_row, rows, _query_factor(call, h), scratch.queries)
    for r in range(len(partial)):
        partial[r, : Dv + 1] = 0
        partial[r, Dv + 1] = -np.inf
    for first in range(begin, end, TILE):
        count = min(TILE, end - first)
        _locate_keys(call, scratch, b, h, first, count)
        _score(call, scratch, span, b, h, first_row, rows, first, count)
        if stash.size:
            for r in range(rows):
                for j in range(count):
                    stash[r, first - begin + j] = scratch.s[r, j]
        _locate_values(call, scratch, b, h, first, count)
        for r in range(rows):
            _soften(scratch.s[r], count, partial[r])
        multiply_add(scratch.s, rows, count, scratch.value_rows, scratch.values.shape[1], partial)


@jit
def _attend_share(share, shares, call, items, scratches, partials, stash):
    Hkv, group = call.lens.shape[1], call.q.shape[2] // call.lens.shape[1]
    rows = call.q.shape[1] * group
    scratch = _own(scratches, share, call, items)
    for item in range(first_item(items, share, shares), first_item(items, share + 1, shares)):
        i = list_of(items.starts, item)
        first_row = (item - items.starts[i]) * ROWS if items.row_tiles > 1 else 0
        begin, end = item_slots(items, item, i)
        _attend(
            call, scratch, items.spans[i], i // Hkv, i % Hkv, first_row, min(ROWS, rows - first_row), begin, end,
            partials[item], stash[min(item, len(stash) - 1)],
        )  # fmt: skip


@jit
def _merge_share(share, shares, call, items, partials):
    """out and lse of a share of the lists from the partial results of their items."""
    B, Hkv = call.lens.shape
    group, Dv = call.q.shape[2] // Hkv, call.out.shape[3]
    weight, largest_score = partials.shape[2] - 2, partials.shape[2] - 1
    lists = B * Hkv
    for i in range(lists * share // shares, lists * (share + 1) // shares):
        b, h = i // Hkv, i % Hkv
        factor = call.v_scale[h] if call.v_scale.size else np.float32(1)
        for r in range(call.q.shape[1] * group):
            t, head = r // group, h * group + r % group
            out = call.out[b, t, head]
            out[:] = 0
            if items.row_tiles > 1:
                first = items.starts[i] + r // ROWS
                last = min(first + 1, items.starts[i + 1])
            else:
                first, last = items.starts[i], items.starts[i + 1]
            largest = np.float32(-np.inf)
            for item in range(first, last):
                largest = max(largest, partials[item, r % ROWS, largest_score])
            if largest == -np.inf:
                call.lse[b, head, t] = -np.inf
                continue
            sink = call.sinks[head] * np.float32(LOG2_E) if call.sinks.size else np.float32(-np.inf)
            largest = max(largest, sink)
            if sink == np.inf:
                call.lse[b, head, t] = np.inf
                continue
            total = exp2(sink - largest)
            for item in range(first, last):
                partial = partials[item, r % ROWS]
                share_of_all = exp2(partial[largest_score] - largest)
                total += share_of_all * partial[weight]
                for d in range(Dv):
                    out[d] += share_of_all * partial[d]
            for d in range(Dv):
                out[d] *= factor / total
            call.lse[b, head, t] = (largest + np.log2(total)) / np.float32(LOG2_E)


@jit
def _reduce(lse_of, first_head, group, reduce, first_row, rows, s, count, reduced, seen):
    """Add the rows' probabilities of each slot to ``reduced``, and mark the slots that a row sees."""
    for r in range(rows):
        lse = lse_of[first_head + (first_row + r) % group, (first_row + r) // group] * np.float32(LOG2_E)
        if lse == -np.inf:
            continue
        for j in range(count):
            seen[j] |= s[r, j] != -np.inf
            p = exp2(s[r, j] - lse)
            if reduce == MAX:
                reduced[j] = max(reduced[j], p)
            else:
                reduced[j] += p * p if reduce == SUM_OF_SQUARES else p


@jit
def _score_again(call, scratch, span, b, h, begin, end, reduced, seen):
    """The reduced probabilities of the slots [begin, end) of a list whose scores were not kept."""
    group = call.q.shape[2] // call.lens.shape[1]
    rows = call.q.shape[1] * group
    for first in range(begin, end, TILE):
        count, done = min(TILE, end - first), first - begin
        _locate_keys(call, scratch, b, h, first, count)
        for first_row in range(0, rows, ROWS):
            some = min(ROWS, rows - first_row)
            _load_queries(call.q, b, h * group, group, first_row, some, _query_factor(call, h), scratch.queries)
            _score(call, scratch, span, b, h, first_row, some, first, count)
            _reduce(
                call.lse[b],
                h * group,
                group,
                call.reduce,
                first_row,
                some,
                scratch.s,
                count,
                reduced[done:],
                seen[done:],
            )


@jit
def _score_share(share, shares, call, items, scratches, stash):
    """Update the scores of a share of the pieces of lists."""
    Hkv, group = call.lens.shape[1], call.q.shape[2] // call.lens.shape[1]
    rows = call.q.shape[1] * group
    scratch = _own(scratches, share, call, items)
    reduced, seen = np.empty(PIECE, np.float32), np.empty(PIECE, np.bool_)
    size = call.k_cache.shape[1]
    for item in range(first_item(items, share, shares), first_item(items, share + 1, shares)):
        i = list_of(items.starts, item)
        b, h = i // Hkv, i % Hkv
        begin, end = item_slots(items, item, i)
        reduced[:] = 0
        seen[:] = False
        if stash.size:
            _reduce(call.lse[b], h * group, group, call.reduce, 0, rows, stash[item], end - begin, reduced, seen)
        else:
            _score_again(call, scratch, items.spans[i], b, h, begin, end, reduced, seen)
        for j in range(end - begin):
            if seen[j]:
                block, offset = call.tables[b, h, (begin + j) // size], (begin + j) % size
                call.scores[block, offset, h] = np.float32(call.decay) * call.scores[block, offset, h] + reduced[j]


@jit
def _run(addresses, table, threads):
    call = unpack(Call, addresses, table)
    rows = call.q.shape[1] * (call.q.shape[2] // call.lens.shape[1])
    row_tiles = -(-rows // ROWS)
    items = cut(call, row_tiles)
    count, height = items.starts[-1], -(-min(rows, ROWS) // 4) * 4  # rows are multiplied by fours
    partials = np.empty((count, height, padded(call.out.shape[3]) + 2), np.float32)
    threads = max(1, min(threads, items.costs[-1] * (call.q.shape[3] + call.out.shape[3]) // _LEAST_WORK))
    scored = call.scores.size > 0
    stash = np.empty((max(count, 1), height, PIECE if scored and row_tiles == 1 else 0), np.float32)
    scratches = _scratch(threads, call.q.shape[3], call.out.shape[3])
    succeeded = run_shares(_attend_share, (call, items, scratches, partials, stash), threads)
    succeeded &= run_shares(_merge_share, (call, items, partials), threads)
    if scored:
        pieces = items if row_tiles == 1 else cut(call, 1)
        succeeded &= run_shares(_score_share, (call, pieces, scratches, stash), threads)
    return succeeded


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
    **given: Any,
) -> Binding:
    B, T, Hq, D = q.shape
    heads = k_cache.shape[2] if k_cache.dim() == 4 else block_tables.shape[1]
    if k_cache.dim() == 4:
        block_tables, seq_lens = (x.unsqueeze(1).expand(B, heads, *x.shape[1:]) for x in (block_tables, seq_lens))
    far = window_left >= 0 and given.get("query_positions") is not None
    sinks, tree = given.get("sinks"), given.get("tree_mask")
    return Binding(
        _run,
        Call,
        q=q.float(),
        k_cache=per_head(k_cache, heads, 4),
        v_cache=per_head(v_cache, heads, 4),
        element=FORMATS[k_cache.dtype],
        tables=block_tables,
        lens=seq_lens,
        counts=given.get("q_lens"),
        positions=per_head(given.get("positions"), heads, 3) if far else None,
        query_positions=given.get("query_positions") if far else None,
        tree=None if tree is None else tree.expand(B, T, T),
        sinks=None if sinks is None else sinks.float(),
        k_scale=for_heads(given.get("k_scale"), heads),
        v_scale=for_heads(given.get("v_scale"), heads),
        scores=per_head(given.get("scores"), heads, 3),
        out=torch.empty(B, T, Hq, v_cache.shape[-1], dtype=torch.float32, device="meta"),
        lse=torch.empty(B, Hq, T, dtype=torch.float32, device="meta"),
        scale=D**-0.5 if scale is None else scale,
        softcap=softcap,
        decay=score_decay,
        window_left=min(window_left, 1 << 33),  # further than two int32 positions lie apart
        causal=causal,
        reduce=_REDUCE[score_reduce],
    )


@prepared(_bind)
def paged_attention(
    binding: Binding,
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
    scores: torch.Tensor | None = None,
    **bound: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kvops.paged_attention`. Every call is batch invariant and balanced without a ``schedule``."""
    B, T, Hq, _ = q.shape
    out = torch.empty(B, T, Hq, v_cache.shape[-1], dtype=torch.float32)
    lse = torch.empty(B, Hq, T, dtype=torch.float32)
    sinks = None if sinks is None else sinks.float()
    binding(
        q.float(), k_cache, v_cache, block_tables, seq_lens, q_lens, positions, query_positions, tree_mask, sinks,
        k_scale, v_scale, scores, out, lse,
    )  # fmt: skip
    return out.to(q.dtype), lse
