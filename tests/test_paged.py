"""Attention over the ragged paged cache."""

import dataclasses
import math
import random

import pytest
import torch
from oracle import assert_accurate
from paged_lists import POISON_BLOCK, Lists, expected, make_lists
from rounding import rounded
from torch import Tensor

import kvops
from kvops.eager import paged as eager
from kvops.eager import paged_decode
from kvops.eager.paged_rows import Rows

NUMBA = True


@pytest.fixture(autouse=True)
def _eager_where_a_test_is_about_it(request, monkeypatch):
    if request.function.__name__.startswith("test_eager_"):
        monkeypatch.setenv("KVOPS_CPU", "eager")


def check(
    q: Tensor,
    lists: Lists,
    *,
    scores: bool = False,
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
    cache: Lists | None = None,
    scales: tuple[float, float] | None = None,
    **options,
) -> None:
    """out, lse and scores against float64; slots of nobody keep their NaN. ``cache`` in place of ``lists``."""
    options = {name: value for name, value in options.items() if value is not None}
    exact = expected(q, lists, **options)
    same = rounded(q.dtype, expected, q, lists, **options)
    options["batch_invariant"] = batch_invariant
    positions = lists.positions if "query_positions" in options else None
    updated = lists.scores.clone() if scores else None
    if scales is not None:
        options["k_scale"], options["v_scale"] = scales
    out, lse = kvops.paged_attention(
        q, *(cache or lists).arguments, positions=positions, scores=updated, schedule=schedule, **options
    )
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    assert_accurate(out, exact[0], same[0], "out")
    assert_accurate(lse, exact[1], same[1], "lse")
    if updated is not None:
        owned = ~exact[2].isnan()
        assert torch.equal(updated.cpu().isnan(), ~owned)
        assert_accurate(updated.cpu()[owned], exact[2][owned], same[2][:, owned], "scores")


def queries(lists: Lists, group: int, num_tokens: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    B, Hkv = lists.seq_lens.shape
    return torch.randn(B, num_tokens, Hkv * group, lists.k_cache.shape[-1]).to(dtype).to(lists.k_cache.device)


@pytest.mark.parametrize(
    ("block_size", "head_dim", "value_dim", "group", "dtype"),
    [
        (1, 64, 64, 3, torch.float32),
        (8, 40, 40, 1, torch.float32),
        (16, 64, 64, 3, torch.float16),
        (16, 128, 96, 5, torch.bfloat16),
        (24, 80, 80, 6, torch.float32),
        (32, 96, 128, 7, torch.float16),
        (64, 256, 256, 4, torch.bfloat16),
        (128, 64, 17, 16, torch.float32),
    ],
)
def test_decoding_reads_the_slots_of_each_list_and_no_other(
    backend, device, block_size, head_dim, value_dim, group, dtype
):
    lengths = [[0, 1, block_size - 1], [block_size, block_size + 1, 150]]
    lists = make_lists(
        lengths, block_size=block_size, head_dim=head_dim, value_dim=value_dim, dtype=dtype, device=device
    )
    check(queries(lists, group, dtype=dtype), lists, scores=True)


def test_one_long_list_among_short_ones(backend, device):
    lists = make_lists([[3, 700, 1], [0, 0, 17]], block_size=16, head_dim=64, device=device)
    check(queries(lists, 3), lists, scores=True)


def test_lists_that_are_all_empty_give_zero_and_minus_infinity(backend, device):
    lists = make_lists([[0, 0], [0, 0]], block_size=16, head_dim=64, device=device)
    check(queries(lists, 2, 3), lists, scores=True, sinks=torch.randn(4, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_drafts_see_the_past_and_themselves(backend, device, dtype):
    lists = make_lists([[70, 33, 5], [41, 8, 100]], block_size=8, head_dim=64, dtype=dtype, device=device)
    check(queries(lists, 3, 5, dtype), lists, scores=True)


def test_ragged_drafts_sit_at_the_end_of_the_lists(backend, device):
    lists = make_lists([[70, 6], [9, 41], [20, 30]], block_size=8, head_dim=40, device=device)
    q_lens = torch.tensor([6, 2, 0], dtype=torch.int32, device=device)
    for causal in (True, False):
        check(queries(lists, 2, 6), lists, q_lens=q_lens, causal=causal, scores=True)


@pytest.mark.parametrize(("num_tokens", "batch"), [(24, 1), (40, 3)])
def test_a_chunk_of_prefill_whose_rows_fill_several_tiles(backend, device, num_tokens, batch):
    lengths = [[100, 50], [40, 64], [41, 90]][:batch]
    lists = make_lists(lengths, block_size=16, head_dim=32, device=device)
    options = {"score_decay": 0.5} if batch == 1 else {"score_reduce": "max", "window_left": 20, "softcap": 2.0}
    check(queries(lists, 3, num_tokens), lists, scores=True, **options)


def test_a_list_shorter_than_the_drafts_stays_in_bounds(backend, device):
    lists = make_lists([[2, 9]], block_size=4, head_dim=32, device=device)
    check(queries(lists, 2, 5), lists, scores=True)
    tree = torch.ones(5, 5, dtype=torch.bool, device=device).tril()
    kvops.paged_attention(queries(lists, 2, 5), *lists.arguments, tree_mask=tree)


@pytest.mark.parametrize("window_left", [0, 1, 17, 1000])
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_windows_count_slots(backend, device, window_left, num_tokens):
    lists = make_lists([[90, 33, 5], [41, 0, 10]], block_size=8, head_dim=32, device=device)
    check(queries(lists, 3, num_tokens), lists, window_left=window_left, scores=True, score_decay=0.25)


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_windows_count_original_positions_where_given(backend, device, num_tokens):
    lists = make_lists([[90, 33, 5], [41, 0, 10]], block_size=8, head_dim=32, device=device)
    query_positions = torch.tensor([[100], [70]], device=device) + torch.arange(num_tokens, device=device)
    check(
        queries(lists, 3, num_tokens), lists, window_left=60, query_positions=query_positions.int(), scores=True,
        score_decay=0.25,
    )  # fmt: skip


@pytest.mark.parametrize("far", [2**31 - 1, 2**32, 2**63 - 1])
def test_the_widest_window_is_none(backend, device, far):
    """A window of 2^32 less an int32 position wrapped round to one of 0; the last positions of all lost the first."""
    lists = make_lists([[9, 1, 5]], block_size=8, head_dim=16, device=device)
    q = queries(lists, 1, 2)
    free = kvops.paged_attention(q, *lists.arguments)
    for now in (None, 31, 2**31 - 1):
        options = {}
        if now is not None:
            query_positions = torch.tensor([[now - 1, now]], dtype=torch.int32, device=device)
            options = {"positions": lists.positions, "query_positions": query_positions}
        for wide, all_seen in zip(
            kvops.paged_attention(q, *lists.arguments, window_left=far, **options), free, strict=True
        ):
            torch.testing.assert_close(wide, all_seen)


def test_softcap_scale_and_sinks(backend, device):
    lists = make_lists([[90, 33], [41, 0]], block_size=16, head_dim=64, device=device)
    sinks = torch.tensor([0.0, 5.0, -100.0, 300.0], device=device)
    check(queries(lists, 2, 2), lists, sinks=sinks, softcap=3.0, scale=0.7, scores=True)


@pytest.mark.parametrize("level", [1e4, 1e5])
@pytest.mark.parametrize("lengths", [[[1, 1]], [[40, 9]], [[1500, 1300]], [[2100, 1300], [70, 5]]], ids=str)
def test_probabilities_sum_to_one_however_large_scores_are(backend, device, lengths, level):
    """A mean of ones is 1; what tiles, runs and sinks gave was joined by exp(lse_a - lse), which loses 4e-4 at 1e4."""
    lists = make_lists(lengths, block_size=16, head_dim=16, device=device)
    if lengths == [[1, 1]]:  # exact scores
        lists.k_cache.copy_(torch.where(lists.k_cache.isnan(), torch.nan, 0.0))
    lists.k_cache[..., 0] = torch.where(lists.k_cache[..., 0].isnan(), torch.nan, level)
    lists.v_cache.copy_(torch.where(lists.v_cache.isnan(), torch.nan, 1.0))
    q = queries(lists, 2)
    q[..., 0] = 1.0
    out, _ = kvops.paged_attention(q, *lists.arguments, scale=1.0)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=4e-6, atol=0)
    if lengths == [[1, 1]]:
        out, _ = kvops.paged_attention(q, *lists.arguments, scale=1.0, sinks=torch.full((4,), level, device=device))
        torch.testing.assert_close(out, torch.full_like(out, 0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("num_tokens", "options"), [(1, {}), (1, {"softcap": 2.0}), (3, {}), (40, {})])
def test_eager_leaves_nothing_to_the_keys_beside_an_infinite_sink(num_tokens, options, monkeypatch):
    """A softcap and many tokens gave NaN, and NaN scores with them."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    lists = make_lists([[50, 61]], block_size=8, head_dim=16)
    q = queries(lists, 2, num_tokens)
    scores = lists.scores.clone()
    sinks = torch.tensor([float("inf"), float("inf"), 0.0, 0.0])
    out, lse = kvops.paged_attention(q, *lists.arguments, sinks=sinks, scores=scores, **options)
    expected, expected_lse = kvops.paged_attention(q, *lists.arguments, sinks=torch.zeros(4), **options)
    assert (out[:, :, :2] == 0).all()
    assert (lse[:, :2] == float("inf")).all()
    torch.testing.assert_close(out[:, :, 2:], expected[:, :, 2:])
    torch.testing.assert_close(lse[:, 2:], expected_lse[:, 2:])
    assert torch.equal(scores.isnan(), lists.scores.isnan())


@pytest.mark.parametrize("options", [{}, {"window_left": 20}], ids=str)
@pytest.mark.parametrize("lengths", [[[40, 33]], [[600, 550]], [[40, 33]] * 8, [[9, 300], [520, 70], [5, 6]]], ids=str)
@pytest.mark.parametrize("num_tokens", [3, 40])
def test_a_key_that_is_nan_spoils_only_the_tokens_that_see_it(backend, device, num_tokens, lengths, options):
    """The newest token's key: what hid it from the older ones on the CPU was added to its score."""
    lists = make_lists([[max(n, num_tokens) for n in row] for row in lengths], block_size=8, head_dim=16, device=device)
    q, results = queries(lists, 2, num_tokens), []
    for bad in (None, float("nan")):
        if bad is not None:
            last = (lists.seq_lens - 1).long()
            blocks = lists.block_tables.gather(2, (last // 8)[..., None])[..., 0].long()
            lists.k_cache[blocks, last % 8, 5] = bad
        scores = lists.scores.clone()
        out, lse = kvops.paged_attention(q, *lists.arguments, scores=scores, **options)
        results.append((out[:, :-1], lse[..., :-1]))
    assert out[:, -1].isnan().all()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_the_widest_window_is_none_in_lists_shorter_than_the_new_tokens(backend, device):
    """On the CPU the place of a token before the list less 2^63 - 1 wrapped round: the whole list was hidden."""
    lists = make_lists([[1, 2]], block_size=4, head_dim=16, device=device)
    q, tree = queries(lists, 1, 3), torch.ones(3, 3, dtype=torch.bool, device=device)
    for options in ({}, {"tree_mask": tree}, {"causal": False}):
        free = kvops.paged_attention(q, *lists.arguments, **options)
        for far in (2**31 - 1, 2**63 - 1):
            bounded = kvops.paged_attention(q, *lists.arguments, window_left=far, **options)
            for one, other in zip(bounded, free, strict=True):
                torch.testing.assert_close(one, other)


def test_sinks_do_not_join_rows_that_a_window_empties(backend, device):
    lists = make_lists([[20, 3]], block_size=16, head_dim=32, device=device)
    far = torch.tensor([[1000]], dtype=torch.int32, device=device)
    check(
        queries(lists, 2), lists, sinks=torch.randn(4, device=device), window_left=5, query_positions=far, scores=True
    )


@pytest.mark.parametrize("per_sequence", [False, True])
def test_a_tree_mask_replaces_causality_among_the_new_tokens(backend, device, per_sequence):
    lists = make_lists([[40, 6], [7, 33]], block_size=8, head_dim=32, device=device)
    tree = torch.rand(2, 6, 6, device=device) < 0.4
    tree |= torch.eye(6, dtype=torch.bool, device=device)
    q_lens = torch.tensor([6, 4], dtype=torch.int32, device=device)
    tree = tree if per_sequence else tree[0]
    check(queries(lists, 3, 6), lists, tree_mask=tree, q_lens=q_lens, scores=True)
    check(queries(lists, 3, 6), lists, tree_mask=tree, window_left=10, causal=False)


@pytest.mark.parametrize("reduce", ["sum", "sumsq", "max"])
def test_scores_are_exact_probabilities(backend, device, reduce):
    lists = make_lists([[140, 33, 5], [41, 0, 10]], block_size=16, head_dim=64, dtype=torch.float16, device=device)
    check(queries(lists, 3, 3, torch.float16), lists, scores=True, score_reduce=reduce, score_decay=0.9)


def test_scores_of_one_query_head_sum_to_the_tokens(backend, device):
    lists = make_lists([[140, 33]], block_size=16, head_dim=64, device=device)
    scores = torch.zeros_like(lists.scores)
    kvops.paged_attention(queries(lists, 1, 4), *lists.arguments, scores=scores)
    for head in range(2):
        torch.testing.assert_close(scores.cpu()[lists.slots(0, head)].sum(), torch.tensor(4.0))


@pytest.mark.parametrize("layout", ["NHD", "HND", "interleaved"])
def test_a_uniform_cache_of_any_strides_gives_what_ragged_lists_give(backend, device, layout):
    block_size, Hkv, D, Dv = 8, 3, 40, 24
    lens = torch.tensor([37, 0, 16], dtype=torch.int32, device=device)
    tables = torch.randperm(20, device=device)[:18].view(3, 6).int()
    storage = torch.randn(20, block_size, Hkv, D + Dv, device=device)
    if layout == "HND":
        storage = storage.transpose(1, 2).contiguous().transpose(1, 2)
    k_cache, v_cache = storage[..., :D], storage[..., D:]
    if layout == "NHD":
        k_cache, v_cache = k_cache.contiguous(), v_cache.contiguous()
    scores = torch.rand(20, block_size, Hkv, device=device)
    positions = torch.randint(0, 40, (20, block_size, Hkv), dtype=torch.int32, device=device)

    # The same slots as ragged lists: block n of head h becomes block n * Hkv + h.
    heads = torch.arange(Hkv, device=device)[:, None]
    ragged = Lists(
        k_cache.transpose(1, 2).reshape(-1, block_size, D),
        v_cache.transpose(1, 2).reshape(-1, block_size, Dv),
        (tables[:, None] * Hkv + heads).int(),
        lens[:, None].expand(3, Hkv).contiguous(),
        positions.transpose(1, 2).reshape(-1, block_size),
        scores.transpose(1, 2).reshape(-1, block_size),
    )
    q = torch.randn(3, 2, 6, D, device=device)
    query_positions = torch.full((3, 2), 40, dtype=torch.int32, device=device)
    options = {"window_left": 30, "query_positions": query_positions, "score_decay": 0.5}
    exact, same = expected(q, ragged, **options), rounded(q.dtype, expected, q, ragged, **options)
    for schedule in (None, kvops.paged_schedule(lens, block_size, num_programs=5)):
        updated = scores.clone()
        out, lse = kvops.paged_attention(
            q, k_cache, v_cache, tables, lens, positions=positions, scores=updated, schedule=schedule, **options
        )
        assert_accurate(out, exact[0], same[0], "out")
        assert_accurate(lse, exact[1], same[1], "lse")
        assert_accurate(updated.transpose(1, 2).reshape(-1, block_size), exact[2], same[2], "scores")


def test_positions_of_a_uniform_cache_may_be_shared_by_its_heads(backend, device):
    lens, tables = torch.tensor([20], dtype=torch.int32, device=device), torch.tensor([[2, 0, 1]], device=device).int()
    k_cache, v_cache = torch.randn(2, 3, 8, 2, 32, device=device)
    positions = torch.randint(0, 30, (3, 8), dtype=torch.int32, device=device)
    q, query_positions = torch.randn(1, 1, 4, 32, device=device), torch.full((1, 1), 30, device=device).int()
    options = {"window_left": 15, "query_positions": query_positions}
    shared = kvops.paged_attention(q, k_cache, v_cache, tables, lens, positions=positions, **options)
    by_head = positions[..., None].expand(3, 8, 2).contiguous()
    for a, b in zip(
        shared, kvops.paged_attention(q, k_cache, v_cache, tables, lens, positions=by_head, **options), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", ["none", "number", "tensor", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_caches(backend, device, scale, dtype):
    lists = make_lists([[40, 6, 70], [7, 0, 33]], block_size=8, head_dim=32, device=device)
    k8, v8 = (cache.nan_to_num(448.0).to(torch.float8_e4m3fn) for cache in (lists.k_cache * 4, lists.v_cache * 4))
    k_scale, v_scale = {
        "none": (None, None),
        "number": (0.25, 0.5),
        "tensor": (torch.tensor(0.25, device=device), torch.tensor(0.5, device=device)),
        "head": (torch.tensor([0.1, 0.2, 0.4], device=device), torch.tensor([0.3, 0.2, 0.1], device=device)),
    }[scale]
    q = queries(lists, 2, 2, dtype)
    out, lse = kvops.paged_attention(q, k8, v8, lists.block_tables, lists.seq_lens, k_scale=k_scale, v_scale=v_scale)

    # Without scales: a scale per head is a factor of that head's queries, and of its outputs.
    heads = lists.seq_lens.shape[1]
    k_factor, v_factor = (
        torch.ones(heads) if factor is None else torch.as_tensor(factor).cpu().expand(heads)
        for factor in (k_scale, v_scale)
    )
    wide = Lists(k8.float(), v8.float(), lists.block_tables, lists.seq_lens, lists.positions, lists.scores)

    def scaled():
        factors = (factor.double().repeat_interleave(2)[:, None] for factor in (k_factor, v_factor))
        o, s, _ = expected(q.cpu().double() * next(factors), wide)
        return o * next(factors), s

    exact, same = scaled(), rounded(dtype, scaled)
    assert_accurate(out, exact[0], same[0], "out")
    assert_accurate(lse, exact[1], same[1], "lse")


def test_scales_as_numbers_reach_the_operator(backend, device):
    lists = make_lists([[9, 5]], block_size=8, head_dim=32, device=device)
    k8, v8 = (cache.nan_to_num(0.0).to(torch.float8_e4m3fn) for cache in (lists.k_cache, lists.v_cache))
    arguments = queries(lists, 1), k8, v8, lists.block_tables, lists.seq_lens
    half, two = torch.tensor(0.5, device=device), torch.tensor([2.0, 2.0], device=device)
    tensors = torch.ops.kvops.paged_attention(*arguments, k_scale=half, v_scale=two)
    for k_scale, v_scale in ((0.5, 2.0), (0.5, two), (half, 2.0)):
        numbers = torch.ops.kvops.paged_attention(*arguments, k_scale=k_scale, v_scale=v_scale)
        assert torch.equal(numbers[0], tensors[0])
        assert torch.equal(numbers[1], tensors[1])


@pytest.mark.parametrize("seed", range(10))
def test_features_in_any_combination(backend, device, seed):
    """Drawn at random: what other tests try one by one. NaN stands in every slot that must not be read."""
    draw = random.Random(seed)
    block_size, group = draw.choice([1, 8, 16, 32, 64, 128]), draw.choice([1, 2, 3, 5, 6, 7, 8, 12, 16])
    num_tokens, head_dim = draw.choice([1, 1, 2, 5, 9]), draw.choice([16, 40, 64, 80, 128, 256])
    value_dim = draw.choice([head_dim, head_dim, 24, 96])
    dtype = draw.choice([torch.float32, torch.float16])
    lengths = [0, 1, block_size - 1, block_size, block_size + 1, 100, 180]
    lists = make_lists(
        [draw.choices(lengths, k=2) for _ in range(2)], block_size=block_size, head_dim=head_dim, value_dim=value_dim,
        dtype=dtype, device=device,
    )  # fmt: skip
    options: dict = {"causal": draw.random() < 0.8, "softcap": draw.choice([0.0, 3.0])}
    options |= {"score_reduce": draw.choice(["sum", "sumsq", "max"]), "score_decay": draw.choice([1.0, 0.5])}
    if draw.random() < 0.5:
        options["sinks"] = torch.randn(2 * group, device=device)
    if draw.random() < 0.5:
        counts = draw.choices(range(num_tokens + 1), k=2)
        # A tree needs its tokens in the list.
        counts = [min(count, least) for count, least in zip(counts, lists.seq_lens.amin(1).tolist(), strict=True)]
        options["q_lens"] = torch.tensor(counts, dtype=torch.int32, device=device)
        if draw.random() < 0.5:
            options["tree_mask"] = torch.rand(2, num_tokens, num_tokens, device=device) < 0.6
    window = draw.choice(["none", "slots", "positions"])
    if window != "none":
        options["window_left"] = draw.choice([0, 30, 90])
    if window == "positions":
        # Positions go up by 2 in the mean.
        options["query_positions"] = torch.randint(0, 400, (2, num_tokens), dtype=torch.int32, device=device)
    q = queries(lists, group, num_tokens, dtype)
    if draw.random() < 0.4:
        k8, v8 = (cache.to(torch.float8_e4m3fn) for cache in (lists.k_cache, lists.v_cache))
        # By a power of two nothing is rounded: the oracle reads what the scaled cache says.
        wide = dataclasses.replace(lists, k_cache=k8.to(dtype) * 0.5, v_cache=v8.to(dtype) * 2.0)
        check(
            q, wide, cache=dataclasses.replace(lists, k_cache=k8, v_cache=v8), scores=True, scales=(0.5, 2.0), **options
        )
    else:
        check(q, lists, scores=True, **options)


@pytest.mark.parametrize("num_programs", [1, 3, 64])
def test_any_number_of_programs_gives_the_same_attention(backend, device, num_programs):
    lists = make_lists([[300, 0, 5], [41, 1, 130]], block_size=16, head_dim=32, device=device)
    schedule = kvops.paged_schedule(lists.seq_lens, 16, num_programs=num_programs)
    check(queries(lists, 3, 2), lists, scores=True, schedule=schedule)


@pytest.mark.parametrize(
    ("block_size", "unit", "least"), [(1, 16, 128), (16, 16, 128), (24, 24, 128), (128, 64, 128), (16, 256, 256)]
)
def test_a_schedule_gives_every_unit_to_one_program(backend, device, block_size, unit, least):
    options = {"num_programs": 7, "batch_invariant": unit == 256}
    lens = torch.randint(0, 500, (3, 2, 4), dtype=torch.int32, device=device)
    lens[0], lens[1, 0] = 0, 0
    schedule = kvops.paged_schedule(lens, block_size, **options)
    for layer in range(3):
        assert torch.equal(schedule[layer], kvops.paged_schedule(lens[layer], block_size, **options))
        share, prefix, first = schedule[layer, 0].item(), schedule[layer, 1:10].tolist(), schedule[layer, 10:].tolist()
        units = [-(-length // unit) for length in lens[layer].flatten().tolist()]
        assert prefix == [sum(units[:n]) for n in range(9)]
        assert 7 * share >= prefix[-1]
        assert share * unit >= least
        for program, index in enumerate(first):
            if program * share < prefix[-1]:
                assert prefix[index] <= program * share < prefix[index + 1]


def test_equal_inputs_give_equal_bits(backend, device):
    lists = make_lists([[300, 0, 5], [41, 1, 130]], block_size=16, head_dim=64, device=device)
    q = queries(lists, 3, 2)
    results = []
    for _ in range(2):
        scores = lists.scores.clone()
        results.append((*kvops.paged_attention(q, *lists.arguments, scores=scores), scores.nan_to_num(7.0)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def spread(lists: Lists, others: Lists, place: int) -> Lists:
    """The sequences of ``lists`` from row ``place`` on among those of ``others``, every block elsewhere in the pool."""
    own, other = lists.k_cache.shape[0], others.k_cache.shape[0]
    order = torch.randperm(own + other)
    merged = {}
    for name in ("k_cache", "v_cache", "positions", "scores"):
        both = torch.cat([getattr(lists, name), getattr(others, name)])
        merged[name] = torch.empty_like(both)
        merged[name][order] = both
    wide = max(lists.block_tables.shape[2], others.block_tables.shape[2])
    tables = []
    for part, first, count in ((lists, 0, own), (others, own, other)):
        table = torch.full((*part.block_tables.shape[:2], wide), POISON_BLOCK, dtype=torch.int32)
        real = part.block_tables < count
        table[..., : real.shape[2]][real] = order[first + part.block_tables[real].long()].int()
        tables.append(table)
    table = torch.cat([tables[1][:place], tables[0], tables[1][place:]])
    lens = torch.cat([others.seq_lens[:place], lists.seq_lens, others.seq_lens[place:]])
    return Lists(merged["k_cache"], merged["v_cache"], table, lens, merged["positions"], merged["scores"])


@pytest.mark.parametrize(
    ("num_tokens", "dtype", "options"),
    [
        (1, torch.float32, {}),
        (3, torch.float16, {"score_reduce": "max", "window_left": 300, "sinks": torch.linspace(-1, 3, 6)}),
        (30, torch.float32, {"softcap": 4.0, "score_reduce": "sumsq"}),
    ],
)
def test_batch_invariant_attention_gives_a_sequence_the_same_bits_in_any_batch(
    backend, device, num_tokens, dtype, options
):
    """Alone, among others, at another place, with other programs; 520 slots are three units of the schedule."""
    own = make_lists([[520, 258]], block_size=16, head_dim=40, dtype=dtype)
    own_q = torch.randn(1, num_tokens, 6, 40).to(dtype)
    count = max(1, num_tokens - 1)
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    results = []
    for lengths, place, num_programs in (([], 0, 3), ([[0, 31], [60, 300]], 1, 2), ([[290, 0]], 0, 64)):
        lists, q, q_lens = own, own_q, [num_tokens] * len(lengths)
        q_lens.insert(place, count)
        if lengths:
            others = make_lists(lengths, block_size=16, head_dim=40, dtype=dtype)
            other_q = torch.randn(len(lengths), num_tokens, 6, 40).to(dtype)
            lists, q = spread(own, others, place), torch.cat([other_q[:place], own_q, other_q[place:]])
        lists = Lists(*(getattr(lists, name).to(device) for name in Lists.__dataclass_fields__))
        scores = lists.scores.clone()
        schedule = kvops.paged_schedule(lists.seq_lens, 16, num_programs=num_programs, batch_invariant=True)
        out, lse = kvops.paged_attention(
            q.to(device), *lists.arguments, q_lens=torch.tensor(q_lens, dtype=torch.int32, device=device),
            scores=scores, schedule=schedule, batch_invariant=True, **options,
        )  # fmt: skip
        results.append((out[place], lse[place], *(scores.cpu()[lists.slots(place, head)] for head in range(2))))
    for alone, *batched in zip(*results, strict=True):
        assert all(torch.equal(alone, other) for other in batched)


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_batch_invariant_attention_is_as_accurate(backend, device, num_tokens):
    lists = make_lists([[0, 530, 1], [255, 256, 257], [0, 0, 0]], block_size=24, head_dim=32, device=device)
    check(queries(lists, 3, num_tokens), lists, scores=True, batch_invariant=True)
    check(queries(lists, 3, num_tokens), lists, window_left=300, batch_invariant=True)


def test_batch_invariant_attention_over_a_uniform_cache_and_its_ragged_form(backend, device):
    tables = torch.randperm(60, device=device).view(3, 20).int()
    lens = torch.tensor([300, 0, 257], dtype=torch.int32, device=device)
    k_cache, v_cache = torch.randn(2, 60, 16, 2, 32, device=device)
    q = torch.randn(3, 2, 6, 32, device=device)
    together = kvops.paged_attention(q, k_cache, v_cache, tables, lens, batch_invariant=True)
    for b in range(3):
        row = slice(b, b + 1)
        alone = kvops.paged_attention(q[row], k_cache, v_cache, tables[row], lens[row], batch_invariant=True)
        for a, part in zip(together, alone, strict=True):
            assert torch.equal(a[row], part)
    ragged = (tables[:, None] * 2 + torch.arange(2, device=device)[:, None]).int()
    caches = (cache.transpose(1, 2).reshape(-1, 16, 32) for cache in (k_cache, v_cache))
    lists = kvops.paged_attention(q, *caches, ragged, lens[:, None].expand(3, 2), batch_invariant=True)
    assert torch.equal(together[0], lists[0])
    assert torch.equal(together[1], lists[1])


@pytest.mark.parametrize("shape", [(0, 1, 6), (2, 0, 6)])
def test_no_sequences_and_no_tokens(backend, device, shape):
    B, T, Hq = shape
    cache = torch.randn(4, 8, 32, device=device)
    tables = torch.zeros(B, 3, 2, dtype=torch.int32, device=device)
    lens = torch.zeros(B, 3, dtype=torch.int32, device=device)
    q = torch.randn(B, T, Hq, 32, device=device)
    out, lse = kvops.paged_attention(q, cache, cache, tables, lens)
    assert out.shape == (B, T, Hq, 32)
    assert lse.shape == (B, Hq, T)
    kvops.paged_append(
        torch.randn(B, T, 3, 32, device=device), torch.randn(B, T, 3, 32, device=device), cache, cache, tables, lens
    )
    assert kvops.paged_schedule(lens, 8, num_programs=4).shape == (2 + 3 * B + 4,)


@pytest.mark.parametrize("scored", [False, True])
def test_batch_invariant_attention_over_tables_without_room(backend, device, scored):
    """No list can have a part then; the merge took the buffer of parts to be missing, and failed."""
    q = torch.randn(2, 1, 4, 16, device=device)
    cache = torch.full((3, 8, 16), math.nan, device=device)
    lens = torch.zeros(2, 2, dtype=torch.int32, device=device)
    tables = torch.empty(2, 2, 0, dtype=torch.int32, device=device)
    scores = torch.rand(3, 8, device=device) if scored else None
    out, lse = kvops.paged_attention(q, cache, cache, tables, lens, scores=scores, batch_invariant=True)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_strided_queries_tables_and_lengths(backend, device):
    lists = make_lists([[40, 6], [7, 33]], block_size=8, head_dim=32, device=device)
    q = queries(lists, 2, 2)
    plain = kvops.paged_attention(q, *lists.arguments)
    spread = q.transpose(1, 2).contiguous().transpose(1, 2)
    tables = lists.block_tables.repeat_interleave(2, -1)[..., ::2]
    lens = lists.seq_lens.t().contiguous().t()
    for a, b in zip(plain, kvops.paged_attention(spread, lists.k_cache, lists.v_cache, tables, lens), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("consecutive", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 3, 70])
def test_eager_long_lists_in_place_and_gathered(consecutive, num_tokens, monkeypatch):
    """More slots than a gathered tile, than a short list, and than one core's share of a product."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    lists = make_lists([[2301, 700, 5], [1100, 0, 1027]], block_size=16, head_dim=32, consecutive=consecutive)
    lists.block_tables[0, 0, 30:60] = lists.block_tables[0, 0, 30:60].flip(0)
    if consecutive:  # the blocks moved in the table only: move what they hold too
        k, v = lists.k_cache.clone(), lists.v_cache.clone()
        held = lists.block_tables[0, 0, 30:60].long()
        lists.k_cache[held], lists.v_cache[held] = k[held.flip(0)], v[held.flip(0)]
    check(queries(lists, 3, num_tokens), lists, scores=True)
    check(queries(lists, 3, num_tokens), lists, scores=True, window_left=900)


@pytest.mark.parametrize(("block_size", "dtype"), [(1, torch.float32), (16, torch.float16), (24, torch.float32)])
@pytest.mark.parametrize(
    ("few", "pad", "chunk"), [(0, 0, 1), (0, 0, 1 << 19), (0, 1 << 30, 1), (0, 1 << 30, 1 << 19), (99, 0, 1)]
)
def test_eager_serves_few_rows_in_tiles(few, pad, chunk, block_size, dtype, monkeypatch):
    """Lists one by one, cut into tiles or padded to one each, all at once or some at a time."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(paged_decode, "_FEW", few)
    monkeypatch.setattr(paged_decode, "_CHUNK", chunk)
    monkeypatch.setattr(paged_decode, "_PAD", pad)
    served = []
    monkeypatch.setattr(eager, "attend_tiles", lambda *a, **k: served.append(1) or paged_decode.attend_tiles(*a, **k))
    lengths = [[0, 1, block_size - 1, block_size], [block_size + 1, 127, 128, 129], [900, 3, 0, 2], [7, 260, 5, 400]]
    lists = make_lists(lengths, block_size=block_size, head_dim=32, dtype=dtype)
    q_lens = torch.tensor([3, 0, 2, 3], dtype=torch.int32)
    sinks = torch.linspace(-1, 6, 12)
    check(queries(lists, 3, 1, dtype), lists, scores=True, score_decay=0.5)
    check(queries(lists, 3, 3, dtype), lists, scores=True, q_lens=q_lens, sinks=sinks, score_reduce="sumsq")
    check(queries(lists, 3, 5, dtype), lists, scores=True, score_reduce="max")
    check(queries(lists, 3, 3, dtype), lists, scores=True, q_lens=q_lens, causal=False)
    lists = make_lists([[max(length, 1) for length in row] for row in lengths], block_size=block_size, head_dim=32)
    check(queries(lists, 3, 1), lists, scores=True)  # no list is empty: one mask for all rows
    assert len(served) == 5


@pytest.mark.parametrize(("few", "pad"), [(0, 0), (0, 1 << 30), (99, 0)])
def test_eager_tiles_of_a_uniform_cache_are_those_of_its_ragged_form(few, pad, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(paged_decode, "_FEW", few)
    monkeypatch.setattr(paged_decode, "_PAD", pad)
    tables = torch.randperm(160).view(8, 20).int()
    lens = torch.tensor([300, 0, 7, 16, 1, 30, 2, 9], dtype=torch.int32)
    k_cache, v_cache = torch.randn(2, 160, 16, 2, 32)
    q, old_scores = torch.randn(8, 1, 6, 32), torch.rand(160, 16, 2)
    scores, ragged_scores = old_scores.clone(), old_scores.transpose(1, 2).reshape(-1, 16)
    out = kvops.paged_attention(q, k_cache, v_cache, tables, lens, scores=scores, score_decay=0.5)
    ragged = (tables[:, None] * 2 + torch.arange(2)[:, None]).int()
    caches = (cache.transpose(1, 2).reshape(-1, 16, 32) for cache in (k_cache, v_cache))
    options = {"scores": ragged_scores, "score_decay": 0.5}
    lists = kvops.paged_attention(q, *caches, ragged, lens[:, None].expand(8, 2), **options)
    assert all(torch.equal(a, b) for a, b in zip(out, lists, strict=True))
    assert torch.equal(scores.transpose(1, 2).reshape(-1, 16), ragged_scores)
    after = tables[2, 0], slice(7, None)  # past the end of a list
    assert torch.equal(scores[after], old_scores[after])


def swap_blocks(lists: Lists, table: Tensor, first: int) -> None:
    """The same list with two of its blocks in each other's place in the pool."""
    a, b = int(table[first]), int(table[first + 1])
    for cache in (lists.k_cache, lists.v_cache, lists.positions, lists.scores):
        cache[[a, b]] = cache[[b, a]]
    table[first], table[first + 1] = b, a


def test_eager_runs_begin_and_end_anywhere(monkeypatch):
    """Runs of consecutive blocks between scattered ones; a window begins inside a run."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(paged_decode, "_FEW", 0)
    lists = make_lists([[1999, 1333]], block_size=16, head_dim=32, consecutive=True)
    for first in (0, 40, 77):
        for table in (lists.block_tables[0, 0], lists.block_tables[0, 1]):
            swap_blocks(lists, table, first)
    for window_left in (-1, 500, 1111):
        check(queries(lists, 3), lists, scores=True, window_left=window_left)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("broken", [False, True])
def test_eager_reads_what_all_lists_have_side_by_side_where_it_is(broken, threads, monkeypatch):
    """A run that all lists have alike, and what each has behind it: nothing, a part of a block, or scattered blocks."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(paged_decode, "_FEW", 0)
    monkeypatch.setattr(paged_decode, "_LONG", 256)
    monkeypatch.setattr(eager, "_LONG", 256)
    runs = []
    read = Rows.alike
    monkeypatch.setattr(Rows, "alike", lambda *arguments: runs.append(arguments[-1]) or read(*arguments))
    lists = make_lists([[608, 601], [607, 593]], block_size=16, head_dim=32, consecutive=True)
    if broken:
        swap_blocks(lists, lists.block_tables[1, 0], 25)
    run = 25 * 16 if broken else 37 * 16
    sinks = torch.linspace(-1, 6, 6)
    check(queries(lists, 3), lists, scores=True, score_decay=0.5, sinks=sinks)
    check(queries(lists, 3, 2), lists, scores=True, score_reduce="sumsq", causal=False)
    check(queries(lists, 3, 3), lists, scores=True, score_reduce="max")
    assert runs == 4 * [run] + 2 * [run if broken else 36 * 16]  # 593 slots, of which the first of 3 tokens sees 591
    q_lens = torch.tensor([2, 0], dtype=torch.int32)
    check(queries(lists, 3, 2), lists, scores=True, q_lens=q_lens)  # a list of which nobody sees anything
    whole = make_lists([[512, 512]], block_size=16, head_dim=32, consecutive=True)
    check(queries(whole, 3), whole, scores=True)
    assert runs[6:] == 2 * [512]


@pytest.mark.parametrize("threads", [1, 3])
def test_eager_reads_what_each_of_few_lists_begins_with_where_it_is(threads, monkeypatch):
    """Runs of different lengths, a list without one, and a list that is one run."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(paged_decode, "_LONG", 128)
    monkeypatch.setattr(paged_decode, "_PAD", 0)
    runs = []
    read = Rows.alike
    monkeypatch.setattr(Rows, "alike", lambda *arguments: runs.append(arguments[-1]) or read(*arguments))
    lists = make_lists([[608, 900, 512]], block_size=16, head_dim=32, consecutive=True)
    for head, first in ((0, 25), (1, 3)):
        swap_blocks(lists, lists.block_tables[0, head], first)
    sinks = torch.linspace(-1, 6, 9)
    check(queries(lists, 3), lists, scores=True, score_decay=0.5, sinks=sinks)
    assert runs == [400, 400, 512, 512]
    check(queries(lists, 3, 2), lists, scores=True, score_reduce="sumsq", causal=False)
    assert runs[4:] == [400, 400, 512, 512]
    check(queries(lists, 3, 3), lists, scores=True, score_reduce="max")
    assert runs[8:] == [400, 400, 496, 496]  # the first of 3 tokens sees 510 slots of the last list


def test_eager_memory_is_linear_in_the_lengths(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor) and not tensor._is_view():
                    largest = max(largest, tensor.numel())
            return result

    lists = make_lists([[8000, 8000]], block_size=16, head_dim=16)
    with Watch():
        eager.paged_attention(queries(lists, 2, 256), *lists.arguments, scores=lists.scores, window_left=7900)
    assert largest <= 8000 * 132, "a matrix of queries by slots is 512 x 8000 for a list"


def test_eager_computes_in_float64_where_given_it():
    lists = make_lists([[70, 33]], block_size=16, head_dim=32, dtype=torch.float64)
    q = queries(lists, 3, 2, torch.float64)
    out, lse = eager.paged_attention(q, *lists.arguments)
    exact = expected(q, lists)
    assert (out - exact[0]).abs().max() < 1e-13
    assert (lse - exact[1]).abs().max() < 1e-13
