"""Which slots survive, and moving them together: the CPU implementations of :mod:`kvops.ops.eviction`."""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

from kvops.checks import expect_inside

# Scores are valued within these limits, so that the sum of a block is a number whatever its scores are.
LARGEST = 1.5 * 2.0**126
# Lengths and positions are int32: larger ones mean no more.
_MOST = 2**31 - 1
# Bytes are moved, whatever they mean: float8 and NaN payloads included.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def preferences(x: Tensor, order: Tensor) -> Tensor:
    """int64, all different: they order as float32 ``x`` does, NaN lowest, and equal ones as ``order`` (int64) does."""
    bits = (x + 0.0).view(torch.int32)  # the two zeros are equal
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).masked_fill_(x.isnan(), 1 - 2**31)
    return torch.add(order, keys.long(), alpha=2**32)


def best(keys: Tensor, number: Tensor) -> Tensor:
    """bool: the ``number`` [...] largest of each row of ``keys`` [..., N], which are all different."""
    rank = torch.empty_like(keys).scatter_(
        -1, keys.argsort(-1, descending=True), torch.arange(keys.shape[-1]).expand_as(keys)
    )
    return rank < number[..., None]


def _blocks(slots: Tensor, size: int) -> Tensor:
    return (slots + (size - 1)) // size


def even_shares(least: list[int], most: list[int], budget: int) -> list[int]:
    """Blocks of each head when all get the same share of ``budget``, but stay between ``least`` and ``most``.

    The level is the highest at which the sum is within the budget, and what then remains goes to the heads that could
    use one more, the first heads first.
    """

    def shares(level: int) -> list[int]:
        return [min(max(level, low), high) for low, high in zip(least, most, strict=True)]

    level = bisect_right(range(1, max(most) + 1), budget, key=lambda level: sum(shares(level)))
    even = shares(level)
    left = budget - sum(even)
    for head, (low, high) in enumerate(zip(least, most, strict=True)):
        if left > 0 and low <= level < high:
            even[head] += 1
            left -= 1
    return even


def competed_shares(ranked: Tensor, lens: Tensor, least: Tensor, most: Tensor, budget: Tensor, size: int) -> Tensor:
    """Blocks of each head [B, H] when the most valuable blocks of all heads together fill the budget [B].

    ``ranked`` [B, H, N] are each head's scores, best first. The value of a block is the sum of its scores; slots that
    the last block of a list lacks count as its lowest score or 0, whichever is less. So values descend within a head,
    and taking blocks by value, the earlier of equals first, keeps the largest sum that the budget can hold.
    """
    batch, heads, slots = ranked.shape
    block, head = torch.arange(slots // size), torch.arange(heads)[:, None]
    values = ranked.nan_to_num(-LARGEST).clamp_(-LARGEST, LARGEST)
    lowest = values.gather(2, (lens[..., None] - 1).clamp_(min=0)).clamp_(max=0)
    values = torch.where(torch.arange(slots) < lens[..., None], values, lowest) * (1 / size)
    worth = torch.zeros(batch, heads, len(block), dtype=torch.float32)
    for slot in values.view(batch, heads, len(block), size).unbind(3):
        worth.add_(slot)  # one order of summation, here and in the kernels
    worth.masked_fill_((block < least[..., None]) | (block >= most[..., None]), -torch.inf)
    room = (torch.minimum(budget, most.sum(1)) - least.sum(1)).clamp_(min=0)
    order = -(block * heads + head).flatten()  # of equals the lower block, then the lower head
    return least + best(preferences(worth.flatten(1), order), room).view_as(worth).sum(2)


def select_blocks(
    scores: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    budget: Tensor,
    *,
    positions: Tensor | None = None,
    protect_first: int = 0,
    protect_last: int = 0,
    min_per_head: int = 0,
    scope: str = "head",
) -> tuple[Tensor, Tensor]:
    """See :func:`kvops.select_blocks`. Every list is sorted as a whole."""
    table, size, lens = block_tables.shape[2], scores.shape[1], seq_lens.long()
    expect_inside(block_tables, lens, *scores.shape)
    blocks = -(-int(lens.max()) // size) if lens.numel() else 0
    keep = torch.zeros(*lens.shape, table * size, dtype=torch.bool)
    if blocks == 0:
        return torch.zeros_like(seq_lens), keep
    slot = torch.arange(blocks * size)
    inside = slot < lens[..., None]
    lists = torch.where(inside[..., ::size], block_tables[..., :blocks], 0)  # tables hold anything past a length
    x = scores[lists].flatten(2)
    protected = torch.zeros_like(inside)
    if protect_first or protect_last:
        place, last = slot, lens[..., None] - 1
        if positions is not None:
            place = positions[lists].flatten(2)
            last = place.gather(2, last.clamp(min=0))
        protected |= place < (min(protect_first, _MOST) if protect_first else -_MOST - 1)
        if protect_last:
            protected |= place > last - min(protect_last, _MOST)
        protected &= inside
    x = x.masked_fill(protected, torch.inf).masked_fill(~inside, torch.nan)
    # Of equals the later one, those that are protected before all others, and what is no slot of the list last.
    keys = preferences(x, slot + len(slot) * (protected.long() - (~inside).long()))
    least = _blocks(torch.maximum(lens.clamp(max=min_per_head), protected.sum(2)), size)
    most, budget = _blocks(lens, size), budget.long().clamp(min=0)
    if scope == "sequence":
        ranked = x.gather(2, keys.argsort(2, descending=True))
        shares = competed_shares(ranked, lens, least, most, budget, size)
    else:
        each = zip(least.tolist(), most.tolist(), budget.tolist(), strict=True)
        shares = torch.tensor([even_shares(*row) for row in each])
    kept = torch.minimum(lens, shares * size)
    keep[..., : len(slot)] = best(keys, kept)
    return kept.int(), keep


def compact(
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    keep: Tensor,
    *,
    positions: Tensor | None = None,
    scores: Tensor | None = None,
    k_slot_scale: Tensor | None = None,
    v_slot_scale: Tensor | None = None,
) -> Tensor:
    """See :func:`kvops.compact`."""
    size = k_cache.shape[1]
    expect_inside(block_tables, seq_lens, len(k_cache), size)
    kept = keep & (torch.arange(keep.shape[2]) < seq_lens[..., None])
    target = kept.cumsum(2) - 1
    moved = kept & (target != torch.arange(keep.shape[2]))
    b, h, source = moved.nonzero(as_tuple=True)
    target = target[moved]
    source_block, target_block = (block_tables[b, h, slot // size].long() for slot in (source, target))
    for side in (k_cache, v_cache, positions, scores, k_slot_scale, v_slot_scale):
        if side is not None:
            bits = side.view(INTEGERS[side.element_size()])
            bits[target_block, target % size] = bits[source_block, source % size]  # all are read before one is written
    lens = kept.sum(2)
    freed = _blocks(seq_lens, size) - _blocks(lens, size)
    seq_lens.copy_(lens)
    return freed.int()
