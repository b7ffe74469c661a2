"""select_blocks against plain Python that ranks and shares one slot at a time; contracts of it and of compact."""

import itertools
import math

import pytest
import torch
from eviction_lists import Lists, expected_choice, make_lists, on

import kvops

NUMBA = True


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
        ValueError, match=r"seq_lens: expected lengths up to the 16 slots of a table, got 1 .* the first at \[1, 2\]"
    ):
        call("select_blocks", choose)
    shift["block_tables"][0, 1, 3] = 26
    with pytest.raises(ValueError, match=r"block_tables: expected blocks from 0 to 25 .* \[0, 1, 3\]"):
        call("compact", shift)
