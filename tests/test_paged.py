"""Attention over the ragged paged cache."""

import dataclasses
import random

import pytest
import torch
from oracle import assert_accurate
from paged_lists import QUANTISED, Lists, check, expected, make_lists, quantise, queries
from rounding import LEVELS, error_of_half, rounded

import kvops

NUMBA = True


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
    """A mean of ones is 1; partial results joined by exp(lse_a - lse) lose 4e-4 at 1e4."""
    lists = make_lists(lengths, block_size=16, head_dim=16, device=device)
    lists.k_cache[..., 0] = torch.where(lists.k_cache[..., 0].isnan(), torch.nan, level)
    lists.v_cache.copy_(torch.where(lists.v_cache.isnan(), torch.nan, 1.0))
    q = queries(lists, 2)
    q[..., 0] = 1.0
    out, _ = kvops.paged_attention(q, *lists.arguments, scale=1.0)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=4e-6, atol=0)


@pytest.mark.parametrize("level", LEVELS)
def test_one_key_and_a_sink_of_its_score_share_a_row(backend, device, level):
    """A sink joined by exp(lse_a - lse) loses 2e-4 at 2^13."""
    lists = make_lists([[1, 1]], block_size=16, head_dim=16, device=device)
    lists.k_cache.copy_(torch.where(lists.k_cache.isnan(), torch.nan, 1.0))
    lists.v_cache.copy_(torch.where(lists.v_cache.isnan(), torch.nan, 1.0))
    q = torch.zeros_like(queries(lists, 2))
    q[..., 0] = level
    out, _ = kvops.paged_attention(q, *lists.arguments, scale=1.0, sinks=torch.full((4,), level, device=device))
    torch.testing.assert_close(out, torch.full_like(out, 0.5), rtol=error_of_half(level), atol=0)


@pytest.mark.parametrize(("num_tokens", "options"), [(1, {}), (1, {"softcap": 2.0}), (3, {}), (40, {})])
def test_an_infinite_sink_leaves_nothing_to_the_keys(backend, device, num_tokens, options):
    """On the CPU a softcap and many tokens gave NaN, and NaN scores with them; the kernels always did."""
    lists = make_lists([[50, 61]], block_size=8, head_dim=16, device=device)
    q = queries(lists, 2, num_tokens)
    scores = lists.scores.clone()
    sinks = torch.tensor([float("inf"), float("inf"), 0.0, 0.0], device=device)
    out, lse = kvops.paged_attention(q, *lists.arguments, sinks=sinks, scores=scores, **options)
    expected, expected_lse = kvops.paged_attention(q, *lists.arguments, sinks=torch.zeros(4, device=device), **options)
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


@pytest.mark.parametrize("level", [float("-inf"), float("inf")])
def test_an_infinite_sink_beside_an_empty_list_gives_zeros(backend, device, level):
    """The kernels subtracted -inf from -inf: NaN."""
    lists = make_lists([[0, 30]], block_size=16, head_dim=16, device=device)
    for options in ({}, {"schedule": kvops.paged_schedule(lists.seq_lens, 16, num_programs=3)}):
        out, lse = kvops.paged_attention(
            queries(lists, 2), *lists.arguments, sinks=torch.full((4,), level, device=device), **options
        )
        assert (out[:, :, :2] == 0).all()
        assert (lse[:, :2] == float("-inf")).all()
        assert not out.isnan().any()


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


E4M3, E5M2, INT8 = QUANTISED


@pytest.mark.parametrize(
    ("k_dtype", "v_dtype", "scale"),
    [
        *((dtype, dtype, scale) for dtype in QUANTISED for scale in ("none", "number", "tensor", "head")),
        *((E4M3, E5M2, "head"), (E5M2, INT8, "head"), (INT8, E4M3, "number"), (INT8, E5M2, "none")),
        *((dtype, None, "head") for dtype in QUANTISED),
        *((None, dtype, "number") for dtype in QUANTISED),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_and_int8_caches(backend, device, k_dtype, v_dtype, scale, dtype):
    """Each side in a dtype of its own; None: that of the queries."""
    lists = make_lists([[40, 6, 70], [7, 0, 33]], block_size=8, head_dim=32, device=device)
    k8, v8 = (
        quantise(cache.nan_to_num(448.0) * (8 if side == INT8 else 1), side or dtype)
        for cache, side in ((lists.k_cache * 4, k_dtype), (lists.v_cache * 4, v_dtype))
    )
    k_scale, v_scale = {
        "none": (None, None),
        "number": (0.25, 0.5),
        "tensor": (torch.tensor(0.25, device=device), torch.tensor(0.5, device=device)),
        "head": (torch.tensor([0.1, 0.2, 0.4], device=device), torch.tensor([0.3, 0.2, 0.1], device=device)),
    }[scale]
    k_scale, v_scale = None if k_dtype is None else k_scale, None if v_dtype is None else v_scale
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
        # By a power of two nothing is rounded: the oracle reads what the scaled cache says.
        k_dtype, v_dtype = draw.choice([*QUANTISED, dtype]), draw.choice([*QUANTISED, dtype])
        k_factor, v_factor = (
            {E4M3: factor, E5M2: factor, INT8: 0.03125}.get(side) for side, factor in ((k_dtype, 0.5), (v_dtype, 2.0))
        )
        k8 = quantise(lists.k_cache.float() / (k_factor or 1.0), k_dtype)
        v8 = quantise(lists.v_cache.float() / (v_factor or 1.0), v_dtype)
        wide = dataclasses.replace(
            lists, k_cache=k8.to(dtype) * (k_factor or 1.0), v_cache=v8.to(dtype) * (v_factor or 1.0)
        )
        stored = dataclasses.replace(lists, k_cache=k8, v_cache=v8)
        check(q, wide, cache=stored, scores=True, scales=(k_factor, v_factor), **options)
    else:
        check(q, lists, scores=True, **options)


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


def test_strided_queries_tables_and_lengths(backend, device):
    lists = make_lists([[40, 6], [7, 33]], block_size=8, head_dim=32, device=device)
    q = queries(lists, 2, 2)
    plain = kvops.paged_attention(q, *lists.arguments)
    spread = q.transpose(1, 2).contiguous().transpose(1, 2)
    tables = lists.block_tables.repeat_interleave(2, -1)[..., ::2]
    lens = lists.seq_lens.t().contiguous().t()
    for a, b in zip(plain, kvops.paged_attention(spread, lists.k_cache, lists.v_cache, tables, lens), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_rounded_to_the_nearest_and_ties_to_even(backend, device, dtype):
    """Tolerances do not see a result that is cut off: it is wrong by less than two units. The mean of two is exact."""
    lists = make_lists([[2, 2]], block_size=2, head_dim=64, dtype=dtype, device=device)
    q = torch.zeros(1, 1, 2, 64, dtype=dtype, device=device)
    out, _ = kvops.paged_attention(q, *lists.arguments)
    values = lists.v_cache[lists.block_tables[0, :, 0].long()].float()  # [2, 2, 64]
    assert torch.equal(out[0, 0], values.mean(1).to(dtype))
    assert (out[0, 0].float() != values.mean(1)).any()
