"""Paged attention of packed queries: sequences that decode and sequences that are prefilled, in one call."""

import math
import random

import pytest
import torch
from paged_lists import POISON_BLOCK, check, make_lists, queries

import kvops

NUMBA = True


def counts(*values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "group", "dtype"),
    [
        (64, 64, 3, torch.float32),
        (40, 40, 1, torch.float32),
        (80, 24, 6, torch.float16),
        (96, 128, 3, torch.float32),
        (128, 128, 4, torch.bfloat16),
        (256, 256, 2, torch.float16),
    ],
)
def test_decoding_and_prefill_in_one_call(backend, device, head_dim, value_dim, group, dtype):
    """Longer than a tile of rows beside one token and none; a sequence whose other head has fewer slots than tokens."""
    lists = make_lists(
        [[70, 33], [9, 300], [0, 17], [45, 30], [64, 1]], block_size=16, head_dim=head_dim, value_dim=value_dim,
        dtype=dtype, device=device,
    )  # fmt: skip
    q_lens = counts(1, 5, 0, 30, 1, device=device)
    check(queries(lists, group, 30, dtype), lists, q_lens=q_lens, scores=True, packed=True)
    check(queries(lists, group, 30, dtype), lists, q_lens=q_lens, packed=True, given_out=True, causal=False)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_packed_decoding_whose_lists_are_cut(backend, device, batch_invariant):
    lists = make_lists([[3, 700], [0, 0], [530, 17]], block_size=16, head_dim=64, device=device)
    q_lens = counts(1, 1, 1, device=device)
    check(queries(lists, 3), lists, q_lens=q_lens, scores=True, packed=True, batch_invariant=batch_invariant)
    schedule = kvops.paged_schedule(lists.seq_lens, 16, num_programs=5)
    drafts = {"q_lens": counts(2, 0, 3, device=device), "scores": True, "packed": True}
    if not batch_invariant:
        check(queries(lists, 2, 3), lists, schedule=schedule, score_reduce="sumsq", **drafts)
    check(queries(lists, 2, 3), lists, batch_invariant=batch_invariant, score_reduce="max", **drafts)


@pytest.mark.parametrize("given_out", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_packed_queries_in_any_combination(backend, device, seed, given_out):
    draw = random.Random(seed)
    block_size, group, T = draw.choice([1, 8, 16, 32]), draw.choice([1, 3, 4, 7]), draw.choice([1, 2, 5, 20])
    lists = make_lists(
        [draw.choices([0, 1, block_size, 40, 130], k=2) for _ in range(3)], block_size=block_size,
        head_dim=draw.choice([16, 40, 64]), device=device, dtype=draw.choice([torch.float32, torch.float16]),
    )  # fmt: skip
    drawn = draw.choices([0, 1, 1, T], k=3)
    options: dict = {"softcap": draw.choice([0.0, 3.0]), "score_decay": draw.choice([1.0, 0.5])}
    if draw.random() < 0.5:
        options["sinks"] = torch.randn(2 * group, device=device)
    if draw.random() < 0.5:  # a tree needs its tokens in the list
        drawn = [min(count, least) for count, least in zip(drawn, lists.seq_lens.amin(1).tolist(), strict=True)]
        options["tree_mask"] = torch.rand(3, T, T, device=device) < 0.6
    if draw.random() < 0.5:
        options["score_last"] = draw.choice([0, 1, 3])
    if draw.random() < 0.5:
        options |= {"score_decay": 1.0, "score_decays": torch.tensor([0.0, 0.5, 1.0], device=device)}
    if draw.random() < 0.5:
        options["alibi_slopes"] = torch.rand(draw.choice([(2 * group,), (3, 2 * group)]), device=device) / 10
    window = draw.choice(["none", "slots", "positions"])
    if window != "none":
        options["window_left"] = draw.choice([0, 30, 90])
    if window == "positions":
        options["query_positions"] = torch.randint(0, 400, (3, T), dtype=torch.int32, device=device)
    q = queries(lists, group, T, lists.k_cache.dtype)
    q_lens = counts(*drawn, device=device)
    check(q, lists, q_lens=q_lens, scores=True, packed=True, given_out=given_out, **options)
    check(q, lists, q_lens=q_lens, given_out=given_out, **options)


def test_two_calls_fill_one_tensor(backend, device):
    """Each has a part of the sequences, and leaves the tokens of the others alone."""
    lists = make_lists([[70, 33], [9, 41], [50, 17], [45, 30]], block_size=16, head_dim=32, device=device)
    starts = torch.tensor([0, 1, 2, 22, 27], dtype=torch.int32, device=device)
    q = torch.randn(27, 6, 32, device=device)
    whole, lse = kvops.paged_attention(q, *lists.arguments, cu_seqlens_q=starts, max_seqlen_q=20)
    for dtype in (torch.float32, torch.float16):
        out = torch.full_like(q, math.nan, dtype=dtype)
        caches = [cache.to(dtype) for cache in (lists.k_cache, lists.v_cache)]
        parts = []
        for rows, most in ((slice(2), 1), (slice(2, 4), 20)):
            ends = starts[rows.start or 0 : rows.stop + 1]
            lists_of = lists.block_tables[rows], lists.seq_lens[rows]
            options = {"cu_seqlens_q": ends, "max_seqlen_q": most}
            parts.append(kvops.paged_attention(q.to(dtype), *caches, *lists_of, **options, out=out)[1])
        tolerance = {} if dtype == torch.float32 else {"atol": 4e-3, "rtol": 4e-3}
        torch.testing.assert_close(out.float(), whole, **tolerance)
        assert (parts[0][:, 2:] == -math.inf).all()
        torch.testing.assert_close(torch.maximum(*parts), lse, **tolerance)


def test_packed_queries_of_a_uniform_cache_in_float8(backend, device):
    """vLLM's: pages of all heads, one table and one length for each sequence, numbers as scales."""
    Hkv, D, size = 2, 32, 8
    cache = torch.randn(20, size, Hkv, 2 * D, device=device).to(torch.float8_e4m3fn)
    k_cache, v_cache = cache[..., :D], cache[..., D:]
    tables = torch.randperm(20, device=device)[:18].view(3, 6).int()
    lens = torch.tensor([37, 3, 16], dtype=torch.int32, device=device)
    q = torch.randn(3, 6, 4, D, device=device)
    scales = {"k_scale": 0.5, "v_scale": 2.0}
    wide, lse = kvops.paged_attention(
        q, k_cache, v_cache, tables, lens, q_lens=counts(6, 1, 2, device=device), **scales
    )
    packed = torch.cat([q[0], q[1, :1], q[2, :2]])
    out, packed_lse = kvops.paged_attention(
        packed, k_cache, v_cache, tables, lens, cu_seqlens_q=counts(0, 6, 7, 9, device=device), max_seqlen_q=6, **scales
    )
    torch.testing.assert_close(out, torch.cat([wide[0], wide[1, :1], wide[2, :2]]))
    torch.testing.assert_close(packed_lse, torch.cat([lse[0], lse[1, :, :1], lse[2, :, :2]], 1))


@pytest.mark.parametrize("starts", [[0], [0, 0, 0]])
def test_no_sequences_and_no_tokens_of_any(backend, device, starts):
    lists = make_lists([[5, 9]] * 2, block_size=8, head_dim=16, device=device)
    B = len(starts) - 1
    starts = counts(*starts, device=device)
    for most in (0, 3):
        for tokens in (0, 4):
            q = torch.full((tokens, 4, 16), math.nan, device=device)
            arguments = lists.k_cache, lists.v_cache, lists.block_tables[:B], lists.seq_lens[:B]
            packed = {"cu_seqlens_q": starts, "max_seqlen_q": most}
            out, lse = kvops.paged_attention(q, *arguments, scores=lists.scores, **packed)
            assert out.shape == (tokens, 4, 16)
            assert (out == 0).all()
            assert lse.shape == (4, tokens)
            assert (lse == -math.inf).all()
            before = lists.k_cache.clone()
            kvops.paged_append(q[:, :2], q[:, :2], *arguments, **packed)
            assert torch.equal(before.nan_to_num(-7.0), lists.k_cache.nan_to_num(-7.0))


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_packed_tokens_go_where_padded_ones_go(backend, device, dtype, uniform):
    """Lists that are empty, full, and shorter than the new tokens; tokens of no sequence in front and behind."""
    lists = make_lists([[20, 3], [9, 16], [7, 0], [12, 30]], block_size=8, head_dim=16, device=device)
    tables, lens = lists.block_tables, lists.seq_lens
    shape = lists.k_cache.shape
    if uniform:
        tables, lens, shape = tables[:, 1], lens[:, 1], (*shape[:2], 2, 16)
    source = torch.float32 if dtype == torch.float8_e4m3fn else dtype
    new = torch.randn(2, 4, 5, 2, 16, device=device).to(source)
    real, q_lens = [4, 0, 1, 5], counts(4, 0, 1, 5, device=device)
    numbers = torch.arange(20, dtype=torch.int32, device=device).view(4, 5)
    results = []
    for packed in (False, True):
        caches = [torch.full(shape, 7.0, device=device).to(dtype) for _ in range(2)]
        sides = torch.full(shape[:-1], -1, dtype=torch.int32, device=device), torch.ones(shape[:-1], device=device)
        k, v, token_positions, options = *new, numbers, {"q_lens": q_lens}
        if packed:
            starts = counts(2, 6, 6, 7, 12, device=device)
            options = {"cu_seqlens_q": starts, "max_seqlen_q": 5}
            k, v, token_positions = (
                torch.cat([x[:1, 0], x[:1, 0], *(x[b, :n] for b, n in enumerate(real)), x[0, :1]])
                for x in (*new, numbers)
            )
        scales = {"k_scale": 0.5, "v_scale": 2.0} if dtype == torch.float8_e4m3fn else {}
        kvops.paged_append(
            k, v, *caches, tables, lens, positions=sides[0], token_positions=token_positions, scores=sides[1],
            **options, **scales,
        )  # fmt: skip
        results.append([*(cache.float() for cache in caches), *sides])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert (results[0][2] >= 0).any()


@pytest.mark.parametrize("last", [0, 1, 4, 16, 2**40])
def test_the_last_tokens_score_with_a_decay_for_each_sequence(backend, device, last):
    """A chunk of prefill, whose last queries observe, beside drafts and decoding: in one call."""
    lists = make_lists([[70, 33], [9, 41], [50, 17], [45, 30]], block_size=8, head_dim=32, device=device)
    decays = torch.tensor([0.0, 0.5, 1.0, 2.0], device=device)
    q_lens = counts(30, 1, 5, 0, device=device)
    for reduce, packed in (("sum", True), ("max", False), ("sumsq", True)):
        options = {"score_last": last, "score_decays": decays, "score_reduce": reduce, "packed": packed}
        check(queries(lists, 3, 30), lists, q_lens=q_lens, scores=True, **options)
    check(queries(lists, 3, 5), lists, scores=True, score_last=last, score_decay=0.5, window_left=20)


@pytest.mark.parametrize("num_tokens", [1, 4, 40])
def test_alibi_slopes(backend, device, num_tokens):
    """By slots, and by original positions, which evicted lists have gaps in."""
    lists = make_lists([[90, 33, 50], [41, 64, 110]], block_size=8, head_dim=32, device=device)
    query_positions = (torch.tensor([[200], [170]], device=device) + torch.arange(num_tokens, device=device)).int()
    q = queries(lists, 3, num_tokens)
    for slopes in (torch.linspace(0, 0.2, 9, device=device), torch.rand(2, 9, device=device) / 8):
        check(q, lists, alibi_slopes=slopes, scores=True, causal=num_tokens != 4)
        check(q, lists, alibi_slopes=slopes, query_positions=query_positions, softcap=2.0, scores=True)
        check(q, lists, alibi_slopes=slopes, query_positions=query_positions, window_left=100, scores=True)
        check(q, lists, alibi_slopes=slopes, window_left=20)


def test_alibi_is_that_of_dense_attention(backend, device):
    T, D = 13, 16
    q, k, v = torch.randn(3, 1, T, 2, D, device=device)
    cache = torch.zeros(2, 8, 4, D, device=device)
    tables = torch.arange(8, dtype=torch.int32, device=device).view(1, 2, 4)
    lens = torch.full((1, 2), T, dtype=torch.int32, device=device)
    kvops.paged_append(k, v, *cache, tables, lens)
    slopes = torch.tensor([0.5, 0.03], device=device)
    for causal in (True, False):
        out, lse = kvops.paged_attention(q, *cache, tables, lens, alibi_slopes=slopes, causal=causal)
        dense, dense_lse = kvops.flash_attention(q, k, v, alibi_slopes=slopes, causal=causal)
        torch.testing.assert_close(out, dense)
        torch.testing.assert_close(lse, dense_lse)


def inputs(**changes):
    lists = make_lists([[20, 3, 8], [9, 16, 0]], block_size=8, head_dim=32)
    found = {"q": torch.randn(5, 6, 32), "k_cache": lists.k_cache, "v_cache": lists.v_cache}
    found |= {"block_tables": lists.block_tables, "seq_lens": lists.seq_lens}
    return found | {"cu_seqlens_q": counts(0, 2, 5, device="cpu"), "max_seqlen_q": 3} | changes


ERRORS = [
    ({"q": torch.randn(2, 3, 6, 32)}, ValueError, r"q: expected 3 dimensions \[tokens, query_heads, head_dim\]"),
    ({"max_seqlen_q": None}, ValueError, "max_seqlen_q: expected along with cu_seqlens_q, got None"),
    ({"cu_seqlens_q": None}, ValueError, "cu_seqlens_q: expected along with max_seqlen_q, got None"),
    ({"cu_seqlens_q": torch.tensor([0, 2, 5])}, TypeError, "cu_seqlens_q: expected dtype int32, got int64"),
    ({"cu_seqlens_q": torch.zeros(0).int()}, ValueError, r"cu_seqlens_q.shape\[0\] .*expected at least 1, got 0"),
    ({"cu_seqlens_q": torch.zeros(4).int()}, ValueError, r"block_tables: expected shape .* = \[3, any, any\]"),
    ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q: expected at least 0, got -1"),
    ({"q_lens": torch.ones(2).int()}, ValueError, "q_lens: expected None with cu_seqlens_q"),
    ({"tree_mask": torch.ones(5, 5).bool()}, ValueError, r"tree_mask: expected shape \[tokens, tokens\] = \[3, 3\]"),
    ({"out": torch.empty(5, 6, 32).half()}, TypeError, "out: expected dtype float32, got float16"),
    ({"out": torch.empty(5, 6, 31)}, ValueError, r"out: expected shape .* = \[5, 6, 32\], got"),
    ({"out": torch.empty(5, 6, 64)[..., ::2]}, ValueError, "out: expected the last dimension contiguous"),
    ({"score_last": -2}, ValueError, "score_last: expected at least -1, got -2"),
    ({"score_decays": torch.ones(3)}, ValueError, r"score_decays: expected shape \[batch\] = \[2\]"),
    ({"score_decays": torch.ones(2).half()}, TypeError, "score_decays: expected dtype float32"),
    ({"score_decays": torch.ones(2), "score_decay": 0.5}, ValueError, "score_decay: expected only one of"),
    ({"alibi_slopes": torch.ones(5)}, ValueError, r"alibi_slopes: expected shape \[heads\] = \[6\]"),
    ({"alibi_slopes": torch.ones(3, 6)}, ValueError, r"alibi_slopes: expected shape \[batch, heads\] = \[2, 6\]"),
    (
        {"positions": torch.zeros(12, 8).int(), "query_positions": torch.zeros(4).int()},
        ValueError,
        r"(positions: expected shape|query_positions: expected shape \[tokens\] = \[5\])",
    ),
    # what only the data tells: checked at every call on the CPU
    ({"cu_seqlens_q": counts(0, 3, 2, device="cpu")}, ValueError, "cu_seqlens_q: expected lengths from 0 to"),
    ({"cu_seqlens_q": counts(0, 1, 5, device="cpu")}, ValueError, "max_seqlen_q = 3, got 4 of sequence 1"),
    (
        {"cu_seqlens_q": counts(0, 3, 6, device="cpu")},
        ValueError,
        "cu_seqlens_q: expected ends within the 5 tokens of q",
    ),
    (
        {"cu_seqlens_q": counts(-1, 2, 5, device="cpu")},
        ValueError,
        "cu_seqlens_q: expected places of at least 0, got -1",
    ),
]


@pytest.mark.parametrize(("changes", "kind", "message"), ERRORS)
def test_bad_packed_input_is_named(changes, kind, message):
    with pytest.raises(kind, match=message):
        kvops.paged_attention(**inputs(**changes))


def test_bad_packed_input_of_append_is_named():
    given = inputs()
    q = given.pop("q")
    new = {"k": q[:, :3], "v": q[:, :3]}
    kvops.paged_append(**new, **given)
    for changes, kind, message in (
        ({"k": q[None, :, :3]}, ValueError, r"k: expected 3 dimensions \[tokens, heads, head_dim\]"),
        ({"v": q[:4, :3]}, ValueError, r"v: expected shape \[tokens, heads, value_dim\] = \[5, 3, 32\]"),
        ({"max_seqlen_q": None}, ValueError, "max_seqlen_q: expected along with cu_seqlens_q"),
        ({"max_seqlen_q": 2}, ValueError, "max_seqlen_q = 2, got 3 of sequence 1"),
        ({"cu_seqlens_q": counts(0, 3, 6, device="cpu")}, ValueError, "within the 5 tokens of k, got 6"),
    ):
        with pytest.raises(kind, match=message):
            kvops.paged_append(**(new | given | changes))


def test_a_packed_step_compiles_without_a_graph_break(backend, device):
    def step(q, k, v, k_cache, v_cache, tables, lens, starts, out):
        packed = {"cu_seqlens_q": starts, "max_seqlen_q": 4}
        kvops.paged_append(k, v, k_cache, v_cache, tables, lens, **packed)
        result, lse = kvops.paged_attention(q, k_cache, v_cache, tables, lens, **packed)
        _, same = kvops.paged_attention(q, k_cache, v_cache, tables, lens, out=out, **packed)
        return result, lse, same

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths, real in (([[20, 3]], [3]), ([[9, 16], [4, 5]], [1, 4])):
        lists = make_lists(lengths, block_size=8, head_dim=32, device=device)
        starts = torch.tensor([0, *real], device=device).cumsum(0).int()
        q, k, v = (torch.randn(sum(real), heads, 32, device=device) for heads in (4, 2, 2))
        caches = [lists.k_cache, lists.v_cache, lists.block_tables, lists.seq_lens, starts, torch.zeros_like(q)]
        copies = [tensor.clone() for tensor in caches]
        wanted, got = step(q, k, v, *caches), compiled(q, k, v, *copies)
        assert torch.equal(wanted[0], caches[-1])
        for a, b in zip((*wanted, *caches), (*got, *copies), strict=True):
            assert torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0))


def test_opcheck_of_packed_calls(backend, device):
    lists = make_lists([[20, 3], [9, 16]], block_size=8, head_dim=32, device=device)
    caches = [cache.nan_to_num(0.0) for cache in (lists.k_cache, lists.v_cache)]
    # Two lists that write to one block would race.
    tables = lists.block_tables.where(lists.block_tables != POISON_BLOCK, 0), lists.seq_lens
    packed = {"cu_seqlens_q": counts(0, 1, 4, device=device), "max_seqlen_q": 3}
    q = torch.randn(6, 4, 32, device=device)
    tests = ("test_schema", "test_faketensor")
    if backend == "eager" or device.type == "cuda":  # tracing is the same for both, and the interpreter is slow
        tests = (*tests, "test_aot_dispatch_dynamic")
    slopes = {"alibi_slopes": torch.rand(4, device=device)}
    for options in (packed, packed | {"out": torch.zeros_like(q)} | slopes):
        torch.library.opcheck(torch.ops.kvops.paged_attention.default, (q, *caches, *tables), options, test_utils=tests)
    new = torch.randn(6, 2, 32, device=device)
    torch.library.opcheck(torch.ops.kvops.paged_append.default, (new, new, *caches, *tables), packed, test_utils=tests)
