"""Choosing the slots that survive, on the CPU: keys in order, shares of the budget, and the best slots of each list.

Every score becomes a 32-bit key that orders as the score does, and a stable radix sort puts each list in order: the
worst slot first, of equals the earlier one.
"""

from typing import NamedTuple

import numpy as np
import torch
from numba import boolean, float32, int32, int64, uint32

from kvops.kernels.cpu.arguments import OUTSIDE, Binding, unpack
from kvops.kernels.cpu.elements import bits_to_float, float_to_bits
from kvops.kernels.cpu.jit import exact, inner, jit
from kvops.kernels.cpu.tables import lists_are_inside
from kvops.kernels.cpu.threads import run_shares, worth
from kvops.prepared import prepared

LARGEST = np.float32(1.5 * 2.0**126)  # scores are valued within these limits, so that any sum of a block is a number
_NAN, _PROTECTED = np.uint32(0), np.uint32(0xFFFFFFFF)  # the keys below and above those of all other scores
_SIGN = np.uint32(0x80000000)


class Call(NamedTuple):
    scores: float32[:, :]  # [num_blocks, block_size]
    positions: int32[:, :]  # [num_blocks, block_size] or empty
    tables: int32[:, :, :]  # [B, H, max_blocks]
    lens: int32[:, :]  # [B, H]
    budget: int32[:]  # [B]
    new_lens: int32[:, :]
    keep: boolean[:, :, :]  # [B, H, max_blocks * block_size]
    protect_first: int64
    protect_last: int64
    min_per_head: int64
    compete: int64


class Lists(NamedTuple):
    """What is found out about the lists: the blocks that each keeps at least, at most and in the end, the slots in
    order, and the keys of what the candidate blocks are worth."""

    least: int64[:, ::1]  # [B, H]
    most: int64[:, ::1]
    shares: int64[:, ::1]
    order: int32[:, :, ::1]  # [B, H, slots]
    worth: uint32[:, :, ::1]  # [B, H, max_blocks]


@jit
def _key(x):
    if np.isnan(x):
        return _NAN
    bits = float_to_bits(np.float32(0) if x == 0 else x)  # the two zeros are equal
    return ~bits if bits & _SIGN else bits | _SIGN


@jit
def _value(key):
    """The score of a key within the limits."""
    if key == _PROTECTED:
        return LARGEST
    if key == _NAN:
        return -LARGEST
    return min(max(bits_to_float(key & ~_SIGN if key & _SIGN else ~key), -LARGEST), LARGEST)


@jit
def _sort(keys, order, count):
    """Sort ``count`` keys, ascending and stable, and ``order`` along with them: four digits of 8 bits."""
    spare_keys, spare_order = np.empty(count, np.uint32), np.empty(count, np.int32)
    from_keys, to_keys, from_order, to_order = keys, spare_keys, order, spare_order
    for digit in range(4):
        shift = np.uint32(8 * digit)
        starts = np.zeros(257, np.int64)
        for i in range(count):
            starts[((from_keys[i] >> shift) & np.uint32(255)) + 1] += 1
        for d in range(256):
            starts[d + 1] += starts[d]
        for i in range(count):
            d = (from_keys[i] >> shift) & np.uint32(255)
            to_keys[starts[d]], to_order[starts[d]] = from_keys[i], from_order[i]
            starts[d] += 1
        from_keys, to_keys, from_order, to_order = to_keys, from_keys, to_order, from_order


@exact
def _worth(keys, length, block, size):
    """The sum of the scores of a list's ``block``, counted from its best; slots that the list lacks count as its lowest
    score or 0, whichever is less. One order of summation, here, in the eager code and on a GPU."""
    padding = min(_value(keys[0]), np.float32(0))
    total = np.float32(0)
    for place in range(block * size, (block + 1) * size):
        total += (_value(keys[length - 1 - place]) if place < length else padding) * np.float32(1 / size)
    return total


@inner
def _rank_list(call, lists, b, h, keys):
    table, size, length = call.tables[b, h], call.scores.shape[1], np.int64(call.lens[b, h])
    last = length - 1
    if call.positions.size and length:
        last = np.int64(call.positions[table[last // size], last % size])
    protected = 0
    for slot in range(length):
        block, offset = table[slot // size], slot % size
        place = np.int64(call.positions[block, offset]) if call.positions.size else slot
        first = call.protect_first > 0 and place < call.protect_first
        if first or (call.protect_last > 0 and place > last - call.protect_last):
            keys[slot] = _PROTECTED
            protected += 1
        else:
            keys[slot] = _key(call.scores[block, offset])
        lists.order[b, h, slot] = slot
    _sort(keys, lists.order[b, h], length)
    floor = max(protected, min(length, call.min_per_head))
    lists.least[b, h], lists.most[b, h] = -(-floor // size), -(-length // size)
    if call.compete:
        for block in range(lists.least[b, h], lists.most[b, h]):
            lists.worth[b, h, block] = _key(_worth(keys, length, block, size))


@inner
def _rank_share(share, shares, call, lists):
    B, H, slots = call.keep.shape
    keys = np.empty(slots, np.uint32)
    for i in range(share, B * H, shares):
        _rank_list(call, lists, i // H, i % H, keys)


@jit
def _at_level(level, least, most):
    """The blocks of all heads together where each has ``level`` of them, within what it must and can keep."""
    total = 0
    for h in range(len(least)):
        total += min(max(level, least[h]), most[h])
    return total


@jit
def _share_evenly(least, most, budget, shares):
    """The highest level within the budget; what then remains goes to the heads that could use one more, the first heads
    first."""
    level, highest = 0, np.max(most)
    while level < highest:
        middle = (level + highest + 1) // 2
        if _at_level(middle, least, most) <= budget:
            level = middle
        else:
            highest = middle - 1
    left = budget - _at_level(level, least, most)
    for h in range(len(least)):
        shares[h] = min(max(level, least[h]), most[h])
        if left > 0 and least[h] <= level < most[h]:
            shares[h] += 1
            left -= 1


@jit
def _compete(worth, least, most, budget, shares):
    """The most valuable blocks of all heads, as many as the budget has room for beyond what they keep in any case; of
    equals the one that stands higher in its own head, then the first head."""
    H, candidates = len(least), np.sum(most) - np.sum(least)
    keys, heads = np.empty(candidates, np.uint32), np.empty(candidates, np.int32)
    i = 0
    for block in range(worth.shape[1] - 1, -1, -1):
        for h in range(H - 1, -1, -1):
            if least[h] <= block < most[h]:
                keys[i], heads[i] = worth[h, block], h
                i += 1
    _sort(keys, heads, candidates)
    shares[:] = least
    room = min(max(budget - np.sum(least), 0), candidates)
    for i in range(candidates - room, candidates):
        shares[heads[i]] += 1


@inner
def _divide_share(share, shares, call, lists):
    """The blocks of each head of a share of the sequences."""
    for b in range(share, len(call.budget), shares):
        budget = max(np.int64(call.budget[b]), 0)
        if call.compete:
            _compete(lists.worth[b], lists.least[b], lists.most[b], budget, lists.shares[b])
        else:
            _share_evenly(lists.least[b], lists.most[b], budget, lists.shares[b])


@inner
def _keep_share(share, shares, call, lists):
    B, H, _ = call.keep.shape
    for i in range(share, B * H, shares):
        b, h = i // H, i % H
        length = np.int64(call.lens[b, h])
        kept = min(length, lists.shares[b, h] * call.scores.shape[1])
        call.new_lens[b, h] = kept
        call.keep[b, h] = False
        for place in range(length - kept, length):
            call.keep[b, h, lists.order[b, h, place]] = True


@jit
def _select_blocks(addresses, table, threads):
    call = unpack(Call, addresses, table)
    B, H, slots = call.keep.shape
    if B * H == 0:
        return True
    if not lists_are_inside(call.tables, call.lens, *call.scores.shape):
        return OUTSIDE
    lists = Lists(
        np.empty((B, H), np.int64),
        np.empty((B, H), np.int64),
        np.empty((B, H), np.int64),
        np.empty((B, H, slots), np.int32),
        np.empty((B, H, call.tables.shape[2]), np.uint32),
    )
    threads = worth(threads, 32 * B * H * slots)
    succeeded = run_shares(_rank_share, (call, lists), threads)
    succeeded &= run_shares(_divide_share, (call, lists), min(threads, B))
    succeeded &= run_shares(_keep_share, (call, lists), threads)
    return succeeded


def _bind(
    scores: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    budget: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    protect_first: int = 0,
    protect_last: int = 0,
    min_per_head: int = 0,
    scope: str = "head",
) -> Binding:
    new_lens, keep = _results(scores, block_tables)
    return Binding(
        _select_blocks,
        Call,
        scores=scores,
        positions=positions,
        tables=block_tables,
        lens=seq_lens,
        budget=budget,
        new_lens=new_lens,
        keep=keep,
        protect_first=protect_first,
        protect_last=min(protect_last, 1 << 33),  # further than two positions lie apart
        min_per_head=min_per_head,
        compete=scope == "sequence",
    )


def _results(scores: torch.Tensor, block_tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, table = block_tables.shape
    new_lens = torch.empty(batch, heads, dtype=torch.int32)
    return new_lens, torch.empty(batch, heads, table * scores.shape[1], dtype=torch.bool)


@prepared(_bind)
def select_blocks(
    binding: Binding,
    scores: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    budget: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    **options: int | str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kvops.select_blocks`."""
    new_lens, keep = _results(scores, block_tables)
    binding(scores, positions, block_tables, seq_lens, budget, new_lens, keep)
    return new_lens, keep
