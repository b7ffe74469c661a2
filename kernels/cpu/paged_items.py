"""How attention over the ragged paged cache is cut into work on the CPU, and which slots a query token sees.

A *list* is the blocks of one (sequence, KV head). Lists of few query rows are cut into pieces of ``PIECE`` slots, the
rows of tall ones into tiles of ``ROWS``; either is an item of work with a partial result. A list is cut by its own
queries, whatever others have. The items of all lists are shared among the threads by what they cost.
"""

from typing import NamedTuple

import numpy as np
from numba import boolean, float32, float64, int32, int64, uint8

from kvops.kernels.cpu.elements import LOG2_E, tanh
from kvops.kernels.cpu.jit import inner, jit
from kvops.kernels.cpu.tables import blocks_are_inside, counts_are_inside

PIECE = 256  # slots of a piece
ROWS = 32  # query rows that walk a list together
_READING = 16  # what it costs to read a slot, where 1 is what it costs to compute with it for one row


class Call(NamedTuple):
    """The arguments of one call, with their numba types; what is not given has size 0."""

    q: float32[:, :, :, :]  # [B, T, Hq, D]; packed [1, tokens, Hq, D]
    # [num_blocks, block_size, Hkv, D] bytes; the stride of Hkv is 0 where a block has the slots of one head
    k_cache: uint8[:, :, :, :]
    v_cache: uint8[:, :, :, :]
    k_element: int64  # of k_cache
    v_element: int64
    tables: int32[:, :, :]  # [B, Hkv, max_blocks]
    lens: int32[:, :]  # [B, Hkv]
    counts: int32[:]  # [B], real query tokens, all of them where it is empty
    starts: int32[:]  # [B + 1], where the tokens of each packed sequence begin
    positions: int32[:, :, :]  # [num_blocks, block_size, Hkv]
    query_positions: int32[:, :]  # [B, T]; packed [1, tokens]
    tree: boolean[:, :, :]  # [B, T, T]
    sinks: float32[:]  # [Hq]
    slopes: float32[:, :]  # [B, Hq]
    bias: float32[:, :, :, :]  # [B, Hq, T, slots]; packed [1, Hq, tokens, slots]
    k_scale: float32[:]  # [Hkv]
    v_scale: float32[:]
    k_slot_scale: float32[:, :, :]  # [num_blocks, block_size, Hkv]
    v_slot_scale: float32[:, :, :]
    scores: float32[:, :, :]  # [num_blocks, block_size, Hkv]
    decays: float32[:]  # [B]
    out: float32[:, :, :, :]  # as q
    lse: float32[:, :, :]  # [B, Hq, T]; packed [1, Hq, tokens]
    scale: float64
    softcap: float64
    decay: float64
    tokens: int64  # the most query tokens of a sequence
    window_left: int64
    causal: int64
    reduce: int64
    last: int64  # so many of the last tokens of a sequence score


class Items(NamedTuple):
    """How the work is cut: the items of all lists in one line."""

    spans: int64[:, ::1]  # [lists, 4]: slots of the list, real query tokens, and the slots [begin, end) that they see
    starts: int64[::1]  # [lists + 1], the first item of each list
    tiles: int64[::1]  # [lists], tiles of rows; a list of one is cut into pieces
    costs: int64[::1]  # [items + 1], what the items before it cost
    slots: int64  # that all items read


@jit
def seen_slots(length, count, t, causal, window_left):
    """The slots [begin, end) of a list that token ``t`` of ``count`` sees."""
    own = length - count + t
    begin = max(own - window_left, 0) if window_left >= 0 else 0
    end = max(own + 1, 0) if causal else length
    return (begin, end) if t < count else (0, 0)


@inner
def by_slots(call):
    """Causality and the window as far as slots decide: a tree replaces the one, positions measure the other."""
    return call.causal != 0 and call.tree.size == 0, call.window_left if call.query_positions.size == 0 else -1


@inner
def seen_by_rows(call, span, first_row, rows):
    """The slots [begin, end) of a list that some of these rows see, as far as slots decide."""
    group = call.q.shape[2] // call.lens.shape[1]
    causal, window_left = by_slots(call)
    begin, _ = seen_slots(span[0], span[1], first_row // group, causal, window_left)
    _, end = seen_slots(span[0], span[1], (first_row + rows - 1) // group, causal, window_left)
    return begin, end


@inner
def new_tokens(call, b):
    """Where the new tokens of a sequence are, (row of q or k, first token), and how many of them are real."""
    if call.starts.size:
        first = np.int64(call.starts[b])
        return 0, first, np.int64(call.starts[b + 1]) - first
    if call.counts.size:
        return b, np.int64(0), np.int64(call.counts[b])
    return b, np.int64(0), call.tokens


@inner
def spans_of(call):
    """The spans of all lists: see :class:`Items`."""
    B, Hkv = call.lens.shape
    spans = np.zeros((B * Hkv, 4), np.int64)
    causal, window_left = by_slots(call)
    for i in range(B * Hkv):
        _, _, count = new_tokens(call, i // Hkv)
        length = np.int64(call.lens[i // Hkv, i % Hkv]) if count else 0  # rows without tokens may hold anything
        begin, _ = seen_slots(length, count, 0, causal, window_left)
        _, end = seen_slots(length, count, count - 1, causal, window_left)
        spans[i, 0], spans[i, 1], spans[i, 2], spans[i, 3] = length, count, begin, end
    return spans


@inner
def reads_inside(call, spans):
    """Whether the tokens are in q, the lists fit in their tables, and all that is read lies in the cache."""
    if not counts_are_inside(call.counts, call.tokens):
        return False
    Hkv, size = call.lens.shape[1], call.k_cache.shape[1]
    for i in range(len(spans)):
        length, _, begin, end = spans[i]
        if not 0 <= length <= call.tables.shape[2] * size:
            return False
        table = call.tables[i // Hkv, i % Hkv]
        if begin < end and not blocks_are_inside(table, begin // size, -(-end // size), len(call.k_cache)):
            return False
    return True


@inner
def cut(call, spans, by_rows):
    """``by_rows``: lists whose rows fill several tiles are cut into these, and not into pieces."""
    lists, Hkv = len(spans), call.lens.shape[1]
    group = call.q.shape[2] // Hkv if Hkv else 1
    starts, tiles = np.zeros(lists + 1, np.int64), np.ones(lists, np.int64)
    for i in range(lists):
        _, count, begin, end = spans[i]
        if by_rows:
            tiles[i] = max(1, -(-count * group // ROWS))
        pieces = -(-end // PIECE) - begin // PIECE if tiles[i] == 1 else tiles[i]
        starts[i + 1] = starts[i] + (pieces if begin < end else 0)
    costs, slots = np.zeros(starts[-1] + 1, np.int64), 0
    items = Items(spans, starts, tiles, costs, slots)
    for item in range(starts[-1]):
        place = place_of(call, items, item)
        slots += place.end - place.begin
        costs[item + 1] = costs[item] + (place.end - place.begin) * (_READING + place.rows)
    return Items(spans, starts, tiles, costs, slots)


@inner
def first_item(items, share, shares):
    """Where a share begins, so that all cost about the same."""
    return list_of(items.costs, items.costs[-1] * share // shares)


@jit
def list_of(starts, place):
    """The last list that begins at or before ``place``: binary search."""
    low, high = 0, len(starts)
    while high - low > 1:
        middle = (low + high) // 2
        if starts[middle] <= place:
            low = middle
        else:
            high = middle
    return low


class Place(NamedTuple):
    """An item of work: rows [first_row, first_row + rows) over the slots [begin, end) of list ``i``."""

    i: int64
    first_row: int64
    rows: int64
    begin: int64
    end: int64


@inner
def place_of(call, items, item):
    """The place of an item: a piece of its list, or a tile of rows and the slots that they see, one at least."""
    i = list_of(items.starts, item)
    number, rows = item - items.starts[i], items.spans[i, 1] * (call.q.shape[2] // call.lens.shape[1])
    if items.tiles[i] == 1:
        begin, end = items.spans[i, 2], items.spans[i, 3]
        first = (begin // PIECE + number) * PIECE
        return Place(i, 0, rows, max(first, begin), min(first + PIECE, end))
    first_row = number * ROWS
    rows = min(ROWS, rows - first_row)
    begin, end = seen_by_rows(call, items.spans[i], first_row, rows)
    return Place(i, first_row, rows, begin, max(end, begin + 1))


@jit
def cap(softcap, rows, count, s):
    """Make scores ``softcap * tanh(score / softcap)``, as logarithms to base 2."""
    for r in range(rows):
        for j in range(count):
            s[r, j] = np.float32(softcap * LOG2_E) * tanh(s[r, j] / np.float32(softcap))


@inner
def take_off_distances(call, span, b, h, first_row, rows, first, count, s):
    """ALiBi: take off each row's slope times the distance of a slot."""
    group = call.q.shape[2] // call.lens.shape[1]
    table, size = call.tables[b, h], call.k_cache.shape[1]
    row, first_token, tokens = new_tokens(call, b)
    for r in range(rows):
        t = (first_row + r) // group
        slope = call.slopes[b, h * group + (first_row + r) % group] * np.float32(LOG2_E)
        own = (
            np.int64(call.query_positions[row, first_token + t]) if call.query_positions.size else span[0] - tokens + t
        )
        for j in range(count):
            place = np.int64(first + j)
            if call.query_positions.size:
                place = np.int64(call.positions[table[place // size], place % size, h])
            s[r, j] -= slope * np.float32(abs(own - place))


@inner
def add_bias(bias, row, first_head, group, first_token, first_row, rows, first, count, s):
    """Add the bias of each row and slot. Where it is -inf, or has no such slot, it hides it whatever the score is."""
    biased = min(max(bias.shape[3] - first, 0), count)
    for r in range(rows):
        head, t = first_head + (first_row + r) % group, first_token + (first_row + r) // group
        for j in range(biased):
            added = bias[row, head, t, first + j] * np.float32(LOG2_E)
            s[r, j] = added if added == -np.inf else s[r, j] + added
        for j in range(biased, count):
            s[r, j] = -np.inf


@inner
def multiply_by_slot_scales(scales, table, h, rows, first, count, s):
    """Multiply the columns of s [rows, count] by the scales of their slots."""
    size = scales.shape[1]
    for j in range(count):
        scale = scales[table[(first + j) // size], (first + j) % size, h]
        for r in range(rows):
            s[r, j] *= scale
