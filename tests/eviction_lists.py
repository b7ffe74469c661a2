"""Ragged lists in a shuffled, poisoned pool, and the definition of select_blocks in plain Python."""

import math
from dataclasses import dataclass

import numpy as np
import torch

LARGEST = 1.5 * 2.0**126


@dataclass
class Lists:
    """Ragged lists in one pool, their blocks shuffled; everything that no list holds is poisoned."""

    scores: torch.Tensor
    positions: torch.Tensor
    tables: torch.Tensor
    lens: torch.Tensor
    size: int

    def slots(self, b: int, h: int) -> list[tuple[int, int]]:
        """(block, offset) of each slot of one list in order."""
        table = self.tables[b, h].tolist()
        return [(table[i // self.size], i % self.size) for i in range(int(self.lens[b, h]))]

    def read(self, side: torch.Tensor, b: int, h: int) -> list:
        return [side[slot].tolist() for slot in self.slots(b, h)]


def make_lists(batch, heads, blocks, size, *, values="continuous", lens=None, seed=0) -> Lists:
    generator = torch.Generator().manual_seed(seed)
    total = batch * heads * blocks + 2
    if lens is None:
        lens = torch.randint(0, blocks * size + 1, (batch, heads), generator=generator)
        lens.view(-1)[:3] = torch.tensor([0, 1, blocks * size])[: lens.numel()]
    lens = torch.as_tensor(lens, dtype=torch.int32).expand(batch, heads).contiguous()
    tables = torch.randperm(total, generator=generator)[: batch * heads * blocks].view(batch, heads, blocks).int()
    scores = torch.full((total, size), math.nan)
    positions = torch.full((total, size), -(2**31), dtype=torch.int32)
    lists = Lists(scores, positions, tables, lens, size)
    for b, h in np.ndindex(batch, heads):
        count = int(lens[b, h])
        if values == "continuous":
            new = torch.rand(count, generator=generator)
        elif values == "ties":
            new = torch.randint(-1, 2, (count,), generator=generator).float()
        else:  # anything that a float32 can be
            new = torch.randn(count, generator=generator)
            odd = torch.randint(0, 8, (count,), generator=generator)
            for which, value in enumerate((math.nan, math.inf, -math.inf, -0.0, 3e38)):
                new[odd == which] = value
        where = sorted(torch.randperm(3 * blocks * size, generator=generator)[:count].tolist())
        for slot, score, position in zip(lists.slots(b, h), new, where, strict=True):
            scores[slot], positions[slot] = score, position
        # What lies past the list's end must not be read.
        tables[b, h, -(-count // size) :] = 2**31 - 1
    return lists


def on(device, *tensors):
    """Copies: an operator that changes its arguments leaves the test's own alone."""
    return [None if tensor is None else tensor.to(device, copy=True) for tensor in tensors]


def ranked(lists: Lists, b, h, positions, protect_first, protect_last):
    """The slots of one list from the best down, their scores, and how many are protected."""
    score = lists.read(lists.scores, b, h)
    count = len(score)
    place = lists.read(lists.positions, b, h) if positions else list(range(count))
    protected = [p < protect_first or p > place[-1] - protect_last for p in place]

    def key(slot):
        value = score[slot]
        return protected[slot], not math.isnan(value), 0.0 if math.isnan(value) else value, slot

    order = sorted(range(count), key=key, reverse=True)
    return order, [score[slot] for slot in order], sum(protected)


def worth(scores, size):
    """The value of each block of a ranked list, in the arithmetic that is promised (float32, one after another)."""
    finite = [np.float32(-LARGEST if math.isnan(s) else max(-LARGEST, min(LARGEST, s))) for s in scores]
    lacking = -len(finite) % size
    finite += [min(finite[-1], np.float32(0))] * lacking if finite else []
    values = []
    for start in range(0, len(finite), size):
        total = np.float32(0)
        for value in finite[start : start + size]:
            total += value * np.float32(1 / size)
        values.append(total)
    return values


def expected_choice(
    lists: Lists, budget, *, positions=False, protect_first=0, protect_last=0, min_per_head=0, scope="head"
):
    batch, heads, blocks = lists.tables.shape
    size = lists.size
    new_lens = torch.zeros(batch, heads, dtype=torch.int32)
    keep = torch.zeros(batch, heads, blocks * size, dtype=torch.bool)
    for b in range(batch):
        rank = [ranked(lists, b, h, positions, protect_first, protect_last) for h in range(heads)]
        most = [-(-len(order) // size) for order, _, _ in rank]
        share = [-(-max(fixed, min(len(order), min_per_head)) // size) for order, _, fixed in rank]
        values = [worth(scores, size) for _, scores, _ in rank]
        while sum(share) < int(budget[b]):
            open_heads = [h for h in range(heads) if share[h] < most[h]]
            if not open_heads:
                break
            if scope == "head":  # the poorest head gets the next block
                chosen = min(open_heads, key=lambda h: (share[h], h))
            else:
                chosen = min(open_heads, key=lambda h: (-values[h][share[h]], share[h], h))
            share[chosen] += 1
        for h, (order, _, _) in enumerate(rank):
            new_lens[b, h] = min(len(order), share[h] * size)
            keep[b, h, order[: new_lens[b, h]]] = True
    return new_lens, keep
