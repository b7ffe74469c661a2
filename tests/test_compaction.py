"""compact against plain Python that moves one slot at a time."""

import numpy as np
import pytest
import torch
from eviction_lists import Lists, make_lists, on

import kvops

NUMBA = True


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def filled(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Every bit pattern is possible, NaNs with payload among them."""
    size = torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8).view(dtype)


def move(lists: Lists, keep, sides, device):
    moved = on(device, *sides)
    lens, tables, keep = on(device, lists.lens, lists.tables, keep)
    k, v, positions, scores = moved
    freed = kvops.compact(k, v, tables, lens, keep, positions=positions, scores=scores)
    return [None if side is None else side.cpu() for side in moved], lens.cpu(), freed.cpu()


def expect_moved(lists: Lists, keep, before, after):
    """Kept slots in order at the front, byte for byte; blocks of no list untouched."""
    mine = set()
    for b, h in np.ndindex(*lists.lens.shape):
        slots = lists.slots(b, h)
        mine.update(block for block, _ in slots)
        kept = [slot for i, slot in enumerate(slots) if keep[b, h, i]]
        for target, source in zip(slots, kept, strict=False):
            for old, new in zip(before, after, strict=True):
                if old is not None:
                    assert torch.equal(bytes_of(new[target].reshape(-1)), bytes_of(old[source].reshape(-1)))
    others = [block for block in range(len(before[0])) if block not in mine]
    for old, new in zip(before, after, strict=True):
        if old is not None:
            assert torch.equal(bytes_of(new[others]), bytes_of(old[others]))


@pytest.mark.parametrize(
    ("dtype", "widths"),
    [
        (torch.float32, (8, 5)),
        (torch.float16, (80, 40)),
        (torch.bfloat16, (16, 1)),
        (torch.float8_e4m3fn, (24, 130)),
        (torch.float8_e5m2, (16, 16)),
        (torch.int8, (3, 8)),
        (torch.int64, (2, 3)),
    ],
)
def test_compaction_keeps_every_byte_in_order(backend, device, dtype, widths):
    lists = make_lists(2, 3, 6, 4, seed=7)
    keep = torch.rand(2, 3, 24) < 0.6  # also past the ends, where it means nothing
    total = len(lists.scores)
    sides = [filled(dtype, total, 4, width) for width in widths] + [lists.positions, lists.scores]
    before = [side.clone() for side in sides]
    after, lens, freed = move(lists, keep, sides, device)
    expect_moved(lists, keep, before, after)
    within = keep & (torch.arange(24) < lists.lens[..., None])
    assert torch.equal(lens, within.sum(2).int())
    assert torch.equal(freed, (lists.lens + 3) // 4 - (lens + 3) // 4)


def test_compaction_of_a_list_longer_than_one_chunk(backend, device):
    lists = make_lists(1, 1, 90, 16, lens=1431)
    keep = torch.rand(1, 1, 1440) < 0.9
    sides = [filled(torch.float32, len(lists.scores), 16, 8), filled(torch.float16, len(lists.scores), 16, 72)]
    before = [side.clone() for side in sides]
    after, _, _ = move(lists, keep, [*sides, None, None], device)
    expect_moved(lists, keep, before, after[:2])


def test_compaction_of_strided_caches_and_lengths(backend, device):
    """Keys and values side by side in the last dimension, blocks of another layer between, a layer of all lengths."""
    lists = make_lists(2, 2, 4, 4, seed=8)
    total = len(lists.scores)
    both = filled(torch.float16, 4, total, 3, 32).transpose(0, 1)[:, :, 1]  # [total, 4, 32]
    k, v = both[..., :20], both[..., 20:]
    sides = [k, v, torch.randint(9, (total, 2, 4), dtype=torch.int32)[:, 1], torch.rand(total, 2, 4)[:, 0]]
    before = [side.clone() for side in sides]
    keep = torch.rand(2, 16, 2).transpose(1, 2).contiguous() < 0.5
    all_lens = torch.zeros(2, 5, 2, dtype=torch.int32)
    all_lens[:, 3] = lists.lens
    lens, tables = on(device, all_lens, lists.tables)
    if device.type != "cpu":
        sides = [side.to(device) for side in sides]
    kvops.compact(sides[0], sides[1], tables, lens[:, 3], keep.to(device), positions=sides[2], scores=sides[3])
    expect_moved(lists, keep, before, [side.cpu() for side in sides])
    within = keep & (torch.arange(16) < lists.lens[..., None])
    assert torch.equal(lens[:, 3].cpu(), within.sum(2).int())
    assert not lens[:, :3].any()


def test_compaction_of_nothing_and_of_everything(backend, device):
    lists = make_lists(2, 3, 4, 4, seed=9)
    k = filled(torch.float16, len(lists.scores), 4, 8)
    for keep, wanted in (
        (torch.ones(2, 3, 16, dtype=torch.bool), lists.lens),
        (torch.zeros(2, 3, 16, dtype=torch.bool), 0),
    ):
        after, lens, freed = move(lists, keep, [k.clone(), k.clone(), None, None], device)
        assert torch.equal(bytes_of(after[0]), bytes_of(k))
        assert torch.equal(lens, torch.zeros_like(lens) + wanted)
        assert torch.equal(freed, (lists.lens + 3) // 4 - (lens + 3) // 4)
    for batch, blocks in ((0, 4), (2, 0)):
        lists = make_lists(batch, 3, blocks, 4, lens=torch.zeros(batch, 3))
        keep = torch.zeros(batch, 3, 4 * blocks, dtype=torch.bool)
        _, lens, freed = move(lists, keep, [k[:2].clone(), k[:2].clone(), None, None], device)
        assert lens.shape == freed.shape == (batch, 3)
