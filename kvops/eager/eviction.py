"""Which slots survive, and moving them together: the CPU implementations of :mod:`kvops.ops.eviction`."""

from __future__ import annotations

import torch
from torch import Tensor

# Ranks are made on integers that order like the scores: NaN below -inf, what is no slot below that, what is protected
# above +inf.
ABSENT = -(2**31)
NAN = ABSENT + 1
PROTECTED = 2**31 - 1
# Scores are valued within these limits, so that the sum of a block is a number whatever its scores are.
LARGEST = 1.5 * 2.0**126
# Bytes are moved, whatever they mean: float8 and NaN payloads included.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def ordered_keys(x: Tensor) -> Tensor:
    """int32 keys that order as float32 ``x`` does; NaN lowest, the two zeros equal."""
    bits = (x + 0.0).view(torch.int32)
    return torch.where(x.isnan(), NAN, bits ^ ((bits >> 31) & PROTECTED))


def ordered_values(keys: Tensor) -> Tensor:
    """The finite float32 values of :func:`ordered_keys`, infinities and NaN at the limits."""
    values = (keys ^ ((keys >> 31) & PROTECTED)).view(torch.float32)
    return torch.where(keys == NAN, -LARGEST, values.clamp(-LARGEST, LARGEST))


def even_shares(least: Tensor, most: Tensor, budget: Tensor) -> Tensor:
    """Blocks of each head (int32 ``[B, H]``) when all get the same share of ``budget`` ``[B]``.

    Heads stay between ``least`` and ``most``: the level is the highest at which the sum is within the budget, and what
    then remains goes to the heads that could use one more, the first heads first.
    """
    level = torch.zeros_like(budget)
    for bit in reversed(range(int(most.amax()).bit_length())):
        higher = level + 2**bit
        shares = torch.clamp(higher[:, None], least, most)
        level = torch.where(shares.sum(1) <= budget, higher, level)
    shares = torch.clamp(level[:, None], least, most)
    more = (level[:, None] >= least) & (level[:, None] < most)
    left = budget - shares.sum(1)
    return (shares + (more & (more.cumsum(1) <= left[:, None]))).to(torch.int32)


def competed_shares(keys: Tensor, lens: Tensor, least: Tensor, most: Tensor, budget: Tensor, size: int) -> Tensor:
    """Blocks of each head (int32 ``[B, H]``) when the most valuable blocks of all heads together fill the budget.

    ``keys`` ``[B, H, N]`` descend. The value of a block is the sum of its scores; slots that the last block of a list
    lacks count as its lowest score or 0, whichever is less. So values descend within a head, and taking blocks by
    value, the earlier of equals first, keeps the largest sum that the budget can hold.
    """
    batch, heads, slots = keys.shape
    blocks = slots // size
    last = keys.gather(2, (lens.long() - 1).clamp_(min=0)[..., None])
    padding = ordered_values(last).clamp_(max=0)
    values = torch.where(keys == ABSENT, padding, ordered_values(keys)).mul_(1 / size).view(batch, heads, blocks, size)
    total = torch.zeros(batch, heads, blocks)
    for slot in range(size):  # one order of summation, here and in the kernel
        total += values[..., slot]
    block = torch.arange(blocks)
    candidate = (block >= least[..., None]) & (block < most[..., None])
    worth = torch.where(candidate, ordered_keys(total), ABSENT)
    # Among equals the lower block, then the lower head comes first: they lie in this order when heads vary fastest.
    order = worth.transpose(1, 2).reshape(batch, blocks * heads).argsort(dim=1, descending=True, stable=True)
    room = torch.minimum(budget - least.sum(1), (most - least).sum(1))
    taken = torch.zeros(order.shape, dtype=torch.int32)
    taken.scatter_(1, order, (torch.arange(blocks * heads) < room[:, None]).to(torch.int32))
    return least + taken.view(batch, blocks, heads).sum(1, dtype=torch.int32)


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
    keep = torch.zeros(batch, heads, table * size, dtype=torch.bool)
    # Beyond int32 they mean no more than at its end.
    protect_first, protect_last, min_per_head = (min(n, PROTECTED) for n in (protect_first, protect_last, min_per_head))
    blocks = -(-int(seq_lens.amax()) // size) if seq_lens.numel() else 0
    if blocks == 0:
        return torch.zeros(batch, heads, dtype=torch.int32), keep
    slot = torch.arange(blocks * size, dtype=torch.int32)
    lens = seq_lens[..., None]
    present = slot < lens
    # Tables hold anything past a list's length.
    used = torch.arange(blocks) * size < lens
    lists = torch.where(used, block_tables[..., :blocks], 0).long()
    keys = ordered_keys(scores[lists].flatten(2))
    place = slot if positions is None else positions[lists].flatten(2)
    last = lens.long() - 1 if positions is None else place.gather(2, (lens.long() - 1).clamp_(min=0))
    recent = (place > last - protect_last) & (protect_last > 0)
    protected = ((place < protect_first) | recent) & present
    keys = torch.where(present, torch.where(protected, PROTECTED, keys), ABSENT)

    # Of equal scores the later slot wins: the sort is stable and sees the list from its end.
    keys, order = keys.flip(2).sort(dim=2, descending=True, stable=True)
    floor = torch.maximum(protected.sum(2, dtype=torch.int32), seq_lens.clamp(max=min_per_head))
    least, most = (floor + (size - 1)) // size, (seq_lens + (size - 1)) // size
    budget = budget.clamp(min=0)
    if scope == "head":
        shares = even_shares(least, most, budget)
    else:
        shares = competed_shares(keys, seq_lens, least, most, budget, size)
    new_lens = torch.minimum(seq_lens, shares * size).contiguous()
    chosen = torch.zeros(order.shape, dtype=torch.bool).scatter_(2, order, slot < new_lens[..., None])
    keep[..., : blocks * size] = chosen.flip(2)
    return new_lens, keep


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
    size = k_cache.shape[1]
    kept = keep & (torch.arange(keep.shape[2]) < seq_lens[..., None])
    new_lens = kept.sum(2, dtype=torch.int32)
    target = kept.cumsum(2, dtype=torch.int32) - 1
    moved = kept & (target != torch.arange(keep.shape[2], dtype=torch.int32))
    batch, head, source = moved.nonzero(as_tuple=True)
    target = target[batch, head, source]
    slots = [block_tables[batch, head, slot // size].long() * size + slot % size for slot in (source, target)]
    for side in (k_cache, v_cache, positions, scores):
        if side is not None:
            _move(side.view(INTEGERS[side.element_size()]), *slots)
    freed = ((seq_lens + (size - 1)) // size - (new_lens + (size - 1)) // size).contiguous()
    seq_lens.copy_(new_lens)
    return freed


def _move(side: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy slots of ``[num_blocks, block_size, ...]`` to others; all are read before one is written."""
    size = side.shape[1]
    if side.stride(0) == size * side.stride(1):
        slots = side.view(-1, *side.shape[2:])
        # Whole rows at once: a tenth of the time that indexing element by element takes.
        slots.index_copy_(0, target, slots.index_select(0, source))
    else:
        side[target // size, target % size] = side[source // size, source % size]
