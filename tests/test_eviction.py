"""select_blocks and compact against plain Python that ranks, shares and moves one slot at a time."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import kvops

NUMBA = True
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


def select(lists: Lists, budget, device, positions=False, **keywords):
    scores, tables, lens, budget, positions = on(
        device,
        lists.scores,
        lists.tables,
        lists.lens,
        torch.as_tensor(budget, dtype=torch.int32),
        lists.positions if positions else None,
    )
    new_lens, keep = kvops.select_blocks(scores, tables, lens, budget, positions=positions, **keywords)
    return new_lens.cpu(), keep.cpu()


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


SCOPES = pytest.mark.parametrize("scope", ["head", "sequence"])
PROTECTION = {"protect_first": 2, "protect_last": 7, "min_per_head": 9}


@SCOPES
@pytest.mark.parametrize(
    ("values", "size", "positions", "protection"),
    [
        ("continuous", 4, False, {}),
        ("continuous", 3, True, PROTECTION),
        ("ties", 4, True, {"protect_last": 3}),
        ("ties", 1, False, {"min_per_head": 2}),
        ("any", 5, False, PROTECTION),
    ],
)
def test_the_choice_is_that_of_the_definition(backend, device, scope, values, size, positions, protection):
    lists = make_lists(2, 3, 4, size, values=values, seed=size)
    for budget in ([3, 5], [9, 100]):
        keywords = {"positions": positions, "scope": scope, **protection}
        new_lens, keep = select(lists, budget, device, **keywords)
        wanted_lens, wanted_keep = expected_choice(lists, budget, **keywords)
        assert torch.equal(new_lens, wanted_lens)
        assert torch.equal(keep, wanted_keep)


@SCOPES
def test_blocks_are_within_budget_full_and_used_up(backend, device, scope):
    """Seen elsewhere: later sequences under-evicted by a wrong offset, half-empty blocks, negative lengths."""
    lists = make_lists(4, 2, 5, 4, seed=3)
    budget = torch.tensor([4, 0, 10, 5])
    new_lens, keep = select(lists, budget, device, scope=scope)
    assert (new_lens >= 0).all()
    assert torch.equal(keep.sum(2).int(), new_lens)
    blocks = (new_lens + 3) // 4
    held = ((lists.lens + 3) // 4).sum(1)
    assert torch.equal(blocks.sum(1), torch.minimum(budget, held))
    assert torch.equal(new_lens, torch.minimum(lists.lens, blocks * 4))


@SCOPES
def test_a_sequence_is_treated_alike_in_any_batch(backend, device, scope):
    lists = make_lists(3, 2, 4, 4, values="ties", seed=4)
    budget = torch.tensor([3, 5, 4])
    new_lens, keep = select(lists, budget, device, positions=True, scope=scope, protect_last=2)
    for b in (1, 2):
        one = Lists(lists.scores, lists.positions, lists.tables[b : b + 1], lists.lens[b : b + 1], 4)
        alone = select(one, budget[b : b + 1], device, positions=True, scope=scope, protect_last=2)
        assert torch.equal(alone[0][0], new_lens[b])
        assert torch.equal(alone[1][0], keep[b])


def test_competing_heads_keep_the_largest_sum_that_fits(backend, device):
    lists = make_lists(2, 3, 4, 4, seed=5)
    budget = [5, 8]
    _, keep = select(lists, budget, device, scope="sequence")
    for b in range(2):
        ordered = [sorted(lists.read(lists.scores, b, h), reverse=True) for h in range(3)]
        best = max(
            sum(sum(scores[: 4 * n]) for scores, n in zip(ordered, counts, strict=True))
            for counts in itertools.product(range(5), repeat=3)
            if sum(counts) <= budget[b]
        )
        kept = sum(
            score
            for h in range(3)
            for score, kept in zip(lists.read(lists.scores, b, h), keep[b, h], strict=False)
            if kept
        )
        assert kept == pytest.approx(best, rel=1e-6)


def test_equal_scores_spread_over_the_heads_and_favour_recent_tokens(backend, device):
    lists = make_lists(1, 3, 4, 4, lens=16)
    lists.scores.fill_(0)
    new_lens, keep = select(lists, [7], device, scope="sequence")
    assert new_lens.tolist() == [[12, 8, 8]]
    assert keep[0, 1].tolist() == [False] * 8 + [True] * 8


def test_shares_that_short_heads_cannot_use_go_to_the_others(backend, device):
    lists = make_lists(1, 4, 8, 2, lens=[[1, 16, 16, 5]])
    new_lens, _ = select(lists, [13], device, scope="head")
    # One block for the first, three for the last; nine are left for two, the earlier gets the odd one.
    assert new_lens.tolist() == [[1, 10, 8, 5]]


@SCOPES
def test_protection_and_floor_win_over_the_budget(backend, device, scope):
    lists = make_lists(2, 3, 4, 4, lens=[[16, 9, 3], [12, 0, 16]])
    new_lens, keep = select(lists, [2, 0], device, scope=scope, protect_first=2, protect_last=3)
    assert new_lens.tolist() == [[8, 8, 3], [8, 0, 8]]
    assert keep[..., :2].sum() == 10
    assert keep[0, 0, 13:].all()
    new_lens, _ = select(lists, [0, 1], device, scope=scope, min_per_head=4)
    assert new_lens.tolist() == [[4, 4, 3], [4, 0, 4]]


@SCOPES
def test_the_worst_scores_that_there_are_come_before_slots_that_are_not(backend, device, scope):
    """-inf and NaN within the budget, in lists that end inside a block."""
    lists = make_lists(1, 1, 3, 4, lens=10)  # as many NaN as slots that are not
    for slot, score in zip(lists.slots(0, 0), [math.nan, -math.inf, math.nan, *range(7)], strict=True):
        lists.scores[slot] = score
    _, keep = select(lists, [3], device, scope=scope)
    assert keep[0, 0].tolist() == [True] * 10 + [False] * 2
    for seed in range(3):
        lists = make_lists(2, 2, 3, 4, values="any", seed=seed)
        held = ((lists.lens + 3) // 4).sum(1)
        for budget in (held, held - 1):
            new_lens, keep = select(lists, budget, device, scope=scope)
            wanted_lens, wanted_keep = expected_choice(lists, budget, scope=scope)
            assert torch.equal(new_lens, wanted_lens)
            assert torch.equal(keep, wanted_keep)


@SCOPES
@pytest.mark.parametrize("protection", [{"protect_first": 3}, {"protect_last": 3}, {"min_per_head": 3}])
def test_each_protection_alone_of_full_lists(backend, device, scope, protection):
    lists = make_lists(2, 2, 3, 4, lens=12, seed=8)
    new_lens, keep = select(lists, [3, 1], device, scope=scope, **protection)
    wanted_lens, wanted_keep = expected_choice(lists, [3, 1], scope=scope, **protection)
    assert torch.equal(new_lens, wanted_lens)
    assert torch.equal(keep, wanted_keep)


def test_protection_is_measured_in_original_positions(backend, device):
    lists = make_lists(1, 1, 2, 4, lens=8)
    for slot, position in zip(lists.slots(0, 0), [0, 3, 4, 50, 96, 97, 99, 100], strict=True):
        lists.positions[slot], lists.scores[slot] = position, -position
    _, keep = select(lists, [1], device, positions=True, protect_first=4, protect_last=2)
    assert keep[0, 0].tolist() == [True, True, False, False, False, False, True, True]
    huge = select(lists, [0], device, positions=True, protect_first=2**40, protect_last=2**40, min_per_head=2**40)
    assert huge[1].all()


@pytest.mark.parametrize("protect_last", [0, 1])
def test_without_protection_of_the_first_no_position_is_first(backend, device, protect_last):
    """The kernel protected positions below 0, and so did eager beside a protection of the last."""
    lists = make_lists(1, 1, 2, 4, lens=5)
    for place, slot in enumerate(lists.slots(0, 0)):
        lists.positions[slot] = place - 5
    new_lens, _ = select(lists, [0], device, positions=True, protect_last=protect_last)
    assert new_lens.tolist() == [[4 * protect_last]]


@SCOPES
def test_choosing_twice_gives_equal_bits(backend, device, scope):
    lists = make_lists(2, 3, 4, 4, values="any", seed=6)
    first, second = (select(lists, [5, 7], device, scope=scope) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@SCOPES
def test_choosing_from_nothing(backend, device, scope):
    for batch, heads, blocks in ((0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 3, 2)):
        lists = make_lists(batch, heads, blocks, 4, lens=torch.zeros(batch, heads))
        new_lens, keep = select(lists, [1] * batch, device, scope=scope, **PROTECTION)
        assert new_lens.shape == (batch, heads)
        assert not new_lens.any()
        assert keep.shape == (batch, heads, blocks * 4)
        assert not keep.any()


def test_many_lists_are_chosen_from_in_one_call(device):
    """30 layers of 3 heads at 2,000 tokens, on the eager path: every kept slot beats every dropped one of its list."""
    lists = make_lists(1, 90, 125, 16, lens=2000)
    new_lens, keep = select(lists, [90 * 125 // 4], device, scope="sequence")
    assert int(new_lens.sum()) == 90 * 125 // 4 * 16
    for h in (0, 44, 89):
        scores = torch.tensor(lists.read(lists.scores, 0, h))
        assert scores[keep[0, h]].min() > scores[~keep[0, h]].max()


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
        (torch.uint8, (3, 8)),
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


def arguments(device, batch=2, heads=3):
    lists = make_lists(batch, heads, 4, 4, lens=16)
    total = len(lists.scores)
    k, v, keep = torch.rand(total, 4, 8), torch.rand(total, 4, 5), torch.rand(batch, heads, 16) < 0.5
    budget = torch.full((batch,), 2 * heads, dtype=torch.int32)
    scores, tables, lens, budget, positions, k, v, keep = on(
        device,
        lists.scores,
        lists.tables,
        lists.lens,
        budget,
        lists.positions,
        k,
        v,
        keep,
    )
    choose = {
        "scores": scores,
        "block_tables": tables,
        "seq_lens": lens,
        "budget": budget,
        "positions": positions,
        "protect_first": 1,
        "protect_last": 2,
        "min_per_head": 3,
        "scope": "sequence",
    }
    shift = {
        "k_cache": k,
        "v_cache": v,
        "block_tables": tables,
        "seq_lens": lens.clone(),
        "keep": keep,
        "positions": positions,
        "scores": scores.clone(),
    }
    return choose, shift


def call(operator, keywords):
    names = {"select_blocks": 4, "compact": 5}[operator]
    values = list(keywords.values())
    return getattr(torch.ops.kvops, operator).default(*values[:names], **dict(list(keywords.items())[names:]))


def test_opcheck(backend, device):
    choose, shift = arguments(device, batch=1, heads=2)
    shift["scores"].nan_to_num_(0.5)  # opcheck compares what was changed, and NaN is not equal to itself
    for operator, keywords, names in (("select_blocks", choose, 4), ("compact", shift, 5)):
        values = tuple(keywords.values())
        torch.library.opcheck(
            getattr(torch.ops.kvops, operator).default, values[:names], dict(list(keywords.items())[names:])
        )


def test_evicting_compiles_as_one_graph(backend, device):
    choose, shift = arguments(device, batch=2, heads=2)

    def evict(k, v, lens, scores, positions, budget):
        new_lens, keep = kvops.select_blocks(
            scores, choose["block_tables"], lens, budget, positions=positions, protect_last=2, scope="sequence"
        )
        freed = kvops.compact(k, v, choose["block_tables"], lens, keep, positions=positions, scores=scores)
        return new_lens, freed

    names = ("k_cache", "v_cache", "seq_lens", "scores", "positions")
    plain = [shift[name].clone() for name in names]
    traced = [shift[name].clone() for name in names]
    wanted = evict(*plain, choose["budget"])
    got = torch.compile(evict, fullgraph=True, backend="aot_eager", dynamic=True)(*traced, choose["budget"])
    for have, want in zip((*got, *traced[:3]), (*wanted, *plain[:3]), strict=True):
        assert torch.equal(have, want)


def test_a_gradient_is_refused(device):
    choose, _ = arguments(device)
    choose["scores"].requires_grad_()
    with pytest.raises(RuntimeError, match="select_blocks has no gradient"):
        call("select_blocks", choose)


def other(shape, dtype=torch.int32):
    return lambda tensor: torch.zeros(shape, dtype=dtype, device=tensor.device)


BAD = [
    ("select_blocks", "scores", lambda t: t.half(), TypeError, "scores: expected dtype float32, got float16"),
    ("select_blocks", "scores", lambda t: t[0], ValueError, "scores: expected 2 dimensions"),
    (
        "select_blocks",
        "scores",
        lambda t: t.t().contiguous().t(),
        ValueError,
        "scores: expected the last dimension contig",
    ),
    ("select_blocks", "scores", lambda t: t[:, :0], ValueError, "scores: block_size: expected at least 1, got 0"),
    ("select_blocks", "block_tables", lambda t: t.long(), TypeError, "block_tables: expected dtype int32, got int64"),
    ("select_blocks", "block_tables", lambda t: t[0], ValueError, r"block_tables: expected 3 dimensions \[B, Hkv, max"),
    (
        "select_blocks",
        "seq_lens",
        lambda t: t[:, :2],
        ValueError,
        r"seq_lens: expected shape \[B, Hkv\] = \[2, 3\], got",
    ),
    ("select_blocks", "seq_lens", lambda t: t.float(), TypeError, "seq_lens: expected dtype int32, got float32"),
    ("select_blocks", "seq_lens", lambda t: t.to("meta"), ValueError, "seq_lens: expected the device of block_tables"),
    ("select_blocks", "budget", other(3), ValueError, r"budget: expected shape \[B\] = \[2\], got \[3\]"),
    ("select_blocks", "budget", other(2, torch.int64), TypeError, "budget: expected dtype int32, got int64"),
    ("select_blocks", "budget", lambda t: t.to("meta"), ValueError, "budget: expected the device of scores"),
    ("select_blocks", "positions", other((26, 5)), ValueError, r"positions: expected shape \[num_blocks, block_size\]"),
    ("select_blocks", "positions", lambda t: t.long(), TypeError, "positions: expected dtype int32, got int64"),
    ("select_blocks", "protect_first", lambda _: -1, ValueError, "protect_first: expected at least 0, got -1"),
    ("select_blocks", "protect_last", lambda _: -2, ValueError, "protect_last: expected at least 0, got -2"),
    ("select_blocks", "min_per_head", lambda _: -3, ValueError, "min_per_head: expected at least 0, got -3"),
    ("select_blocks", "scope", lambda _: "layer", ValueError, "scope: expected one of 'head', 'sequence', got 'layer'"),
    (
        "compact",
        "k_cache",
        lambda t: t[:, :, None],
        ValueError,
        r"k_cache: expected 3 dimensions \[num_blocks, block_s",
    ),
    ("compact", "k_cache", lambda t: t.transpose(1, 2), ValueError, "k_cache: expected the last dimension contiguous"),
    (
        "compact",
        "k_cache",
        lambda t: t.to(torch.complex128),
        TypeError,
        "k_cache: expected elements of 1, 2, 4 or 8 by",
    ),
    (
        "compact",
        "v_cache",
        lambda t: t[1:],
        ValueError,
        r"v_cache: expected shape .* = \[26, 4, any\], got \[25, 4, 5\]",
    ),
    (
        "compact",
        "v_cache",
        lambda t: t[..., :0],
        ValueError,
        r"v_cache.shape\[-1\] \(head_dim\): expected at least 1, got 0",
    ),
    ("compact", "v_cache", lambda t: t.to("meta"), ValueError, "v_cache: expected the device of k_cache"),
    (
        "compact",
        "block_tables",
        lambda t: t.to("meta"),
        ValueError,
        "seq_lens: expected the device of block_tables, meta",
    ),
    ("compact", "keep", lambda t: t.int(), TypeError, "keep: expected dtype bool, got int32"),
    ("compact", "keep", lambda t: t[..., :15], ValueError, r"keep: expected shape .* = \[2, 3, 16\], got \[2, 3, 15\]"),
    ("compact", "scores", lambda t: t.double(), TypeError, "scores: expected dtype float32, got float64"),
    ("compact", "positions", lambda t: t[:-1], ValueError, "positions: expected shape"),
]


@pytest.mark.parametrize(("operator", "name", "spoil", "error", "message"), BAD)
def test_bad_input_is_named(device, operator, name, spoil, error, message):
    keywords = arguments(device)[operator == "compact"]
    keywords[name] = spoil(keywords[name])
    with pytest.raises(error, match=message):
        call(operator, keywords)


def test_debug_checks_what_only_the_device_knows(device, monkeypatch):
    monkeypatch.setenv("KVOPS_DEBUG", "1")
    choose, shift = arguments(device)
    call("select_blocks", choose)
    choose["seq_lens"][1, 2] = 17
    with pytest.raises(
        ValueError, match=r"seq_lens: expected lengths in 0..16, got 1 that are not, the first at \[1, 2\]"
    ):
        call("select_blocks", choose)
    shift["block_tables"][0, 1, 3] = 26
    with pytest.raises(ValueError, match=r"block_tables: expected block numbers in 0..25, got 1 .* \[0, 1, 3\]"):
        call("compact", shift)
