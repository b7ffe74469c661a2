"""Which slots survive, and moving them together: the CPU implementations of :mod:`kvops.ops.eviction`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from operator import add

import torch
from torch import Tensor

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


def largest(x: Tensor, number: list[list[int]], ranked: Tensor, preferred: Callable[[], Tensor]) -> Tensor:
    """bool: the ``number`` ``[B][H]`` best of each row of float32 ``x`` ``[B, H, N]``, in which -inf may mean nothing.

    ``ranked`` are the largest of ``x`` as ``topk`` finds them. All from some finite value on are the best if they are
    so many: only equals on both sides of a limit, -inf and NaN need the :func:`preferences` of ``preferred()``.
    """
    chosen = _from_nth(x, number, ranked, torch.finfo(x.dtype).min)
    if chosen.sum(2).tolist() == number:
        return chosen
    keys = preferred()
    return _from_nth(keys, number, keys.topk(ranked.shape[2]).values, torch.iinfo(keys.dtype).min)


def _from_nth(x: Tensor, number: list[list[int]], ranked: Tensor, least: float) -> Tensor:
    """bool: all of each row of ``x`` that are at least the ``number``-th of ``ranked``, and ``least``; none where
    ``number`` is 0."""
    if ranked.shape[2] == 0:
        return torch.zeros(x.shape, dtype=torch.bool)
    place = torch.tensor([[[n - 1] for n in each] for each in number])
    if min(map(min, number)) > 0:
        return x >= ranked.gather(2, place).clamp_(min=least)
    return (x >= ranked.gather(2, place.clamp(min=0)).clamp_(min=least)).logical_and_(place >= 0)


def even_shares(least: list[int], most: list[int], budget: int) -> list[int]:
    """Blocks of each head when all get the same share of ``budget``, but stay between ``least`` and ``most``.

    The level is the highest at which the sum is within the budget, and what then remains goes to the heads that could
    use one more, the first heads first.
    """

    def shares(level: int) -> list[int]:
        return [min(max(level, low), high) for low, high in zip(least, most, strict=True)]

    level = budget // len(least)
    if not max(least) <= level < min(most):  # some head gets more than its share, or less
        level = bisect_right(range(1, max(most) + 1), budget, key=lambda level: sum(shares(level)))
    even = shares(level)
    left = budget - sum(even)
    for head, (low, high) in enumerate(zip(least, most, strict=True)):
        if left > 0 and low <= level < high:
            even[head] += 1
            left -= 1
    return even


def competed_shares(
    ranked: Tensor,
    lengths: list[list[int]],
    least: list[list[int]],
    most: list[list[int]],
    budget: list[int],
    size: int,
) -> list[list[int]]:
    """Blocks of each head (``[B][H]``) when the most valuable blocks of all heads together fill the budget.

    ``ranked`` ``[B, H, N]`` are each head's best scores, best first, and no head takes more. The value of a block is
    the sum of its scores; slots that the last block of a list lacks count as its lowest score or 0, whichever is less.
    So values descend within a head, and taking blocks by value, the earlier of equals first, keeps the largest sum that
    the budget can hold.
    """
    batch, heads, slots = ranked.shape
    blocks = slots // size
    values = ranked.clamp(-LARGEST, LARGEST)
    if min(map(min, lengths)) < slots:
        lens = torch.tensor(lengths)[..., None]
        padding = values.gather(2, (lens - 1).clamp_(0, slots - 1)).clamp_(max=0)
        values = torch.where(torch.arange(slots) < lens, values, padding)
    worth = torch.zeros(batch, heads, blocks, dtype=torch.float32)
    for slot in values.mul_(1 / size).view(batch, heads, blocks, size).unbind(3):
        worth.add_(slot)  # one order of summation, here and in the kernel
    if any(map(any, least)) or min(map(min, most)) < blocks:
        first, stop, block = torch.tensor(least)[..., None], torch.tensor(most)[..., None], torch.arange(blocks)
        worth.masked_fill_((block < first) | (block >= stop), -torch.inf)
    fixed = [*map(sum, least)]
    room = [[max(0, min(total, sum(high)) - low)] for total, low, high in zip(budget, fixed, most, strict=True)]

    rivals = worth.view(batch, 1, heads * blocks)

    def preferred() -> Tensor:  # of equals the lower block, then the lower head
        return preferences(rivals, -(torch.arange(blocks) * heads + torch.arange(heads)[:, None]).flatten())

    taken = largest(rivals, room, rivals.topk(max(map(max, room))).values, preferred)
    won = taken.view(batch, heads, blocks).sum(2).tolist()
    return [[*map(add, *pair)] for pair in zip(least, won, strict=True)]


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
    batch, heads, table = block_tables.shape
    size = scores.shape[1]
    # Lists are few beside their slots: what concerns whole lists is counted on the host.
    lengths = seq_lens.tolist()
    shortest, longest = (bound(map(bound, lengths)) if seq_lens.numel() else 0 for bound in (min, max))
    blocks = -(-longest // size)
    slots = blocks * size
    if blocks == 0:
        return torch.zeros(batch, heads, dtype=torch.int32), torch.zeros(batch, heads, table * size, dtype=torch.bool)
    lists = block_tables if blocks == table else block_tables[..., :blocks]
    if shortest <= slots - size:  # tables hold anything past a list's length
        lists = torch.where(torch.arange(0, slots, size) < seq_lens[..., None], lists, 0)
    lists = lists.flatten()
    x = scores.index_select(0, lists).view(batch, heads, slots)
    absent = protected = None
    if shortest < slots:
        absent = torch.arange(slots) >= seq_lens[..., None]
        x.masked_fill_(absent, -torch.inf)
    floor = [[min(length, min_per_head) for length in each] for each in lengths]
    if protect_first or protect_last:
        place, last = torch.arange(slots), seq_lens[..., None] - 1
        if positions is not None:
            place = positions.index_select(0, lists).view(batch, heads, slots)
            last = place.gather(2, last.long().clamp_(min=0))
        protected = place < (min(protect_first, _MOST) if protect_first else -_MOST - 1)
        if protect_last:
            protected = protected | (place > last - min(protect_last, _MOST))
        if absent is not None:
            protected = protected & ~absent
        x.masked_fill_(protected, torch.inf)
        fixed = protected.expand_as(x).sum(2).tolist()
        floor = [[*map(max, *pair)] for pair in zip(floor, fixed, strict=True)]
    least, most = ([[-(-n // size) for n in each] for each in numbers] for numbers in (floor, lengths))
    budgets = [max(0, number) for number in budget.tolist()]
    if scope == "sequence":  # no head can win more than the budget: only so many of its best are put in order
        reach = min(blocks, max(*budgets, *map(max, least))) * size
        ranked = x.topk(reach).values
        if ranked[..., :1].isnan().any():
            ranked = x.masked_fill(x.isnan(), -LARGEST).topk(reach).values
        most = [[min(number, reach // size) for number in each] for each in most]
        shares = competed_shares(ranked, lengths, least, most, budgets, size)
    else:
        shares = [*map(even_shares, least, most, budgets)]
    kept = [
        [min(length, share * size) for length, share in zip(*pair, strict=True)]
        for pair in zip(lengths, shares, strict=True)
    ]
    if scope == "head":
        ranked = x.topk(max(map(max, kept))).values

    def preferred() -> Tensor:
        slot = torch.arange(slots)  # of equals the later one
        order = slot if protected is None else torch.where(protected, slot + slots, slot)
        if absent is None:
            return preferences(x, order)
        return preferences(x.masked_fill(absent, torch.nan), torch.where(absent, order - slots, order))

    chosen = largest(x, kept, ranked, preferred)
    if blocks < table:
        chosen = torch.nn.functional.pad(chosen, (0, table * size - slots))
    return torch.tensor(kept, dtype=torch.int32), chosen


def compact(
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    keep: Tensor,
    *,
    positions: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    size, table, width = k_cache.shape[1], block_tables.shape[2], keep.shape[2]
    slot = torch.arange(width)
    kept = keep & (slot < seq_lens[..., None])
    target = kept.cumsum(2).sub_(1)
    place = (kept & (target != slot)).flatten().nonzero()[:, 0]
    lists = torch.div(place, width, rounding_mode="trunc")
    moves = torch.stack((place - lists * width, target.flatten()[place]))  # from where to where in a list
    page = torch.div(moves, size, rounding_mode="trunc")
    block = block_tables.flatten()[torch.add(page, lists, alpha=table)]
    sources, targets = torch.add(moves, block - page, alpha=size).unbind()
    for side in (k_cache, v_cache, positions, scores):
        if side is not None:
            _move(side.view(INTEGERS[side.element_size()]), sources, targets)
    old, new = seq_lens.tolist(), kept.sum(2).tolist()
    seq_lens.copy_(torch.tensor(new, dtype=torch.int32).view_as(seq_lens))
    freed = [[-(-n // size) + (-m // size) for n, m in zip(*pair, strict=True)] for pair in zip(old, new, strict=True)]
    return torch.tensor(freed, dtype=torch.int32).view_as(seq_lens)


def _move(side: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy slots of ``[num_blocks, block_size, ...]`` to others; all are read before one is written."""
    size = side.shape[1]
    if side.stride(0) == size * side.stride(1):
        slots = side.view(-1, *side.shape[2:])
        # Whole rows at once: a tenth of the time that indexing element by element takes.
        slots.index_copy_(0, target, slots.index_select(0, source))
    else:
        side[target // size, target % size] = side[source // size, source % size]
