"""Paged attention with a bias or a mask over slots: against float64, and rows that see nothing."""

import dataclasses
import itertools
import math
import random

import pytest
import torch
from paged_lists import QUANTISED, check, make_lists, quantise, queries

import kvops

NUMBA = True
KINDS = [torch.float32, torch.bool]


def make_bias(shape, dtype, device, hidden=0.3):
    keep = torch.rand(shape, device=device) > hidden
    if dtype == torch.bool:
        return keep
    return torch.randn(shape, device=device).masked_fill(~keep, -math.inf).to(dtype)


def counts(*values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def poisoned(bias, lists):
    """``bias`` with NaN (True of a mask) past the ends of lists, where it has a row for each of them."""
    B, Hkv = lists.seq_lens.shape
    if bias.shape[0] == B > 1 and bias.shape[1] > 1 and bias.shape[3] > 1:
        ends = lists.seq_lens.repeat_interleave(bias.shape[1] // Hkv, 1)[..., None, None]
        past = torch.arange(bias.shape[3], device=bias.device) >= ends
        bias = bias.masked_fill(past, True if bias.dtype == torch.bool else math.nan)
    return bias


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_agrees_with_float64_whatever_it_broadcasts_over(backend, device, kind, num_tokens):
    """Nine query heads of three KV heads."""
    lists = make_lists([[41, 3, 0], [9, 64, 33]], block_size=16, head_dim=32, device=device)
    sizes = 2, 9, num_tokens, 70
    for whole in itertools.product((False, True), repeat=4):
        shape = [size if own else 1 for own, size in zip(whole, sizes, strict=True)]
        bias = poisoned(make_bias(shape, kind, device), lists)
        check(queries(lists, 3, num_tokens), lists, bias=bias, scores=True)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_fewer_dimensions_and_any_strides(backend, device, kind):
    lists = make_lists([[41, 9], [30, 17]], block_size=8, head_dim=16, device=device)
    q = queries(lists, 2, 3)
    whole = make_bias((2, 4, 3, 48), kind, device)
    for bias in (whole[0, 0, 0], whole[0, 0], whole[0], whole[0, 0, 0, 0]):
        expected = kvops.paged_attention(q, *lists.arguments, bias=bias.expand(2, 4, 3, 48).contiguous())
        results = [kvops.paged_attention(q, *lists.arguments, bias=bias)]
        if bias.dim() > 1:
            results.append(kvops.paged_attention(q, *lists.arguments, bias=bias.mT.contiguous().mT))
            spread = bias.repeat_interleave(2, -1)[..., ::2]
            results.append(kvops.paged_attention(q, *lists.arguments, bias=spread))
        if bias.dim():
            results.append(kvops.paged_attention(q, *lists.arguments, bias=bias.expand(2, 4, 3, 48)))
        for one, other in itertools.product(results, [expected]):
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(backend, device, dtype):
    lists = make_lists([[70, 33], [9, 41]], block_size=16, head_dim=64, dtype=dtype, device=device)
    for kind in (dtype, torch.float32, torch.bool):
        bias = make_bias((2, 1, 5, 80), kind, device)
        check(queries(lists, 3, 5, dtype), lists, bias=bias, scores=True, sinks=torch.randn(6, device=device))


@pytest.mark.parametrize("seed", range(8))
def test_features_in_any_combination(backend, device, seed):
    draw = random.Random(seed)
    block_size, group = draw.choice([1, 8, 16, 32]), draw.choice([1, 3, 4, 7])
    T, head_dim = draw.choice([1, 2, 5, 20, 40]), draw.choice([16, 40, 64])
    dtype = draw.choice([torch.float32, torch.float16])
    lists = make_lists(
        [draw.choices([0, 1, block_size, 40, 130], k=2) for _ in range(3)], block_size=block_size, head_dim=head_dim,
        device=device, dtype=dtype,
    )  # fmt: skip
    drawn = draw.choices([0, 1, T, T], k=3)
    options: dict = {"softcap": draw.choice([0.0, 3.0]), "score_decay": draw.choice([1.0, 0.5])}
    options |= {"causal": draw.random() < 0.6, "score_reduce": draw.choice(["sum", "sumsq", "max"])}
    if draw.random() < 0.5:
        options["sinks"] = torch.randn(2 * group, device=device)
    if draw.random() < 0.4:  # a tree needs its tokens in the list
        drawn = [min(count, least) for count, least in zip(drawn, lists.seq_lens.amin(1).tolist(), strict=True)]
        options["tree_mask"] = torch.rand(3, T, T, device=device) < 0.6
    if draw.random() < 0.5:
        options["score_last"] = draw.choice([0, 1, 3])
    if draw.random() < 0.5:
        options["alibi_slopes"] = torch.rand(draw.choice([(2 * group,), (3, 2 * group)]), device=device) / 10
    window = draw.choice(["none", "slots", "positions"])
    if window != "none":
        options["window_left"] = draw.choice([0, 30, 90])
    if window == "positions":
        options["query_positions"] = torch.randint(0, 400, (3, T), dtype=torch.int32, device=device)
    shape = [draw.choice([1, size]) for size in (3, 2 * group, T)] + [draw.choice([1, 131, 160])]
    kind = draw.choice([dtype, torch.float32, torch.bool])
    options["bias"] = poisoned(make_bias(shape, kind, device, hidden=draw.choice([0.1, 0.9])), lists)
    q = queries(lists, group, T, dtype)
    options["q_lens"] = counts(*drawn, device=device)
    check(q, lists, scores=True, packed=draw.random() < 0.5, batch_invariant=draw.random() < 0.3, **options)
    stored = [quantise(cache, side) for cache, side in ((lists.k_cache, QUANTISED[0]), (lists.v_cache, QUANTISED[2]))]
    wide = dataclasses.replace(lists, k_cache=stored[0].to(dtype), v_cache=stored[1].to(dtype))
    cache = dataclasses.replace(lists, k_cache=stored[0], v_cache=stored[1])
    if draw.random() < 0.5:
        options |= {
            name: torch.rand(lists.scores.shape, device=device) + 0.5 for name in ("k_slot_scale", "v_slot_scale")
        }
    check(q, wide, cache=cache, scores=True, given_out=True, **options)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_lists_that_are_cut_among_programs(backend, device, kind, num_tokens):
    """And scores of the slots that rows see, from the stash or computed again."""
    lists = make_lists([[700, 300], [0, 41]], block_size=16, head_dim=32, device=device)
    q = queries(lists, 3, num_tokens)
    schedule = kvops.paged_schedule(lists.seq_lens, 16, num_programs=5)
    options = {"bias": make_bias((2, 6, num_tokens, 701), kind, device), "scores": True}
    check(q, lists, schedule=schedule, **options)
    check(q, lists, score_reduce="max", sinks=torch.randn(6, device=device), batch_invariant=True, **options)


def test_a_batch_invariant_call_has_the_same_bits_alone(backend, device):
    lists = make_lists([[600, 33], [9, 300], [45, 257]], block_size=16, head_dim=32, device=device)
    q = queries(lists, 3, 2)
    for shape in ((3, 6, 2, 608), (1, 1, 2, 608), (6, 1, 1)):
        bias = make_bias(shape, torch.float32, device)
        whole = kvops.paged_attention(q, *lists.arguments, bias=bias, batch_invariant=True)
        for b in range(3):
            own = bias[b : b + 1] if len(shape) == 4 and shape[0] > 1 else bias
            lists_of = lists.block_tables[b : b + 1], lists.seq_lens[b : b + 1]
            alone = kvops.paged_attention(
                q[b : b + 1], lists.k_cache, lists.v_cache, *lists_of, bias=own, batch_invariant=True
            )
            for one, other in zip(alone, whole, strict=True):
                assert torch.equal(one[0], other[b])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("sinks", [None, 0.5, math.inf, -math.inf])
@pytest.mark.parametrize("num_tokens", [5, 40])
def test_rows_that_a_bias_hides_whole_are_empty(backend, device, kind, sinks, num_tokens):
    lists = make_lists([[50, 61]], block_size=8, head_dim=16, device=device)
    q = queries(lists, 2, num_tokens)
    keep = torch.ones(num_tokens, 64, dtype=torch.bool, device=device)
    keep[1:3] = False
    bias = keep if kind == torch.bool else torch.zeros_like(keep, dtype=kind).masked_fill(~keep, -math.inf)
    options = {"sinks": None if sinks is None else torch.full((4,), sinks, device=device)}
    scores = lists.scores.clone()
    out, lse = kvops.paged_attention(q, *lists.arguments, bias=bias, scores=scores, **options)
    assert (out[:, 1:3] == 0).all()
    assert (lse[..., 1:3] == -math.inf).all()
    assert torch.equal(scores.isnan(), lists.scores.isnan())
    rest = [0, *range(3, num_tokens)]
    plain, plain_lse = kvops.paged_attention(q, *lists.arguments, **options)
    torch.testing.assert_close(out[:, rest], plain[:, rest])
    torch.testing.assert_close(lse[..., rest], plain_lse[..., rest])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_slots_that_all_rows_are_hidden_from_keep_their_scores(backend, device, kind):
    lists = make_lists([[20, 3], [9, 16]], block_size=8, head_dim=16, device=device)
    for T in (1, 3, 40):
        scores = lists.scores.clone()
        keep = torch.zeros(2, 4, 1, 20, dtype=torch.bool, device=device)
        keep[0, 1, :, 5:7] = True  # one head of a group of two sees two slots
        bias = keep if kind == torch.bool else torch.zeros_like(keep, dtype=kind).masked_fill(~keep, -math.inf)
        arguments = queries(lists, 2, T), *lists.arguments
        kvops.paged_attention(*arguments, bias=bias, scores=scores, score_decay=0.5, causal=False)
        changed = (scores != lists.scores) & ~lists.scores.isnan()
        block, offset = lists.slots(0, 0)
        expected = torch.zeros_like(changed)
        expected[block[5:7], offset[5:7]] = True
        assert torch.equal(changed, expected)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_hidden_key_that_is_no_number_spoils_no_row(backend, device, kind):
    lists = make_lists([[41, 9]], block_size=8, head_dim=16, device=device)
    bias = torch.ones(5, 48, dtype=torch.bool, device=device)
    bias[:, 7] = False
    if kind != torch.bool:
        bias = torch.zeros(5, 48, device=device).masked_fill(~bias, -math.inf)
    q = queries(lists, 2, 5)
    expected = kvops.paged_attention(q, *lists.arguments, bias=bias, causal=False)
    for head in range(2):
        lists.k_cache[tuple(x[7] for x in lists.slots(0, head))] = math.nan
    scores = lists.scores.clone()
    actual = kvops.paged_attention(q, *lists.arguments, bias=bias, scores=scores, causal=False)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(scores.isnan(), lists.scores.isnan())


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min])
def test_the_lowest_numbers_hide_a_slot(backend, device, lowest):
    lists = make_lists([[5, 5]], block_size=8, head_dim=16, device=device)
    keep = torch.tensor([[1, 0, 1, 1, 0], [0] * 5, [1] * 5], device=device).bool()
    bias = torch.zeros(3, 5, device=device).masked_fill(~keep, lowest)
    q = queries(lists, 1, 3)
    results = [kvops.paged_attention(q, *lists.arguments, bias=x, causal=False) for x in (bias, keep)]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert not results[0][0][:, 1].any()


def test_slots_that_the_bias_does_not_have_are_hidden(backend, device, monkeypatch):
    """And KVOPS_DEBUG=1 refuses lists that are longer than it."""
    lists = make_lists([[41, 9], [70, 33]], block_size=8, head_dim=16, device=device)
    for kind in KINDS:
        check(queries(lists, 2, 3), lists, bias=make_bias((2, 1, 3, 33), kind, device), scores=True)
        check(queries(lists, 2, 40), lists, bias=make_bias((1, 4, 40, 33), kind, device), scores=True)
    monkeypatch.setenv("KVOPS_DEBUG", "1")
    q = queries(lists, 2, 3)
    lists.block_tables[lists.block_tables > 1000] = 0
    for slots in (70, 100, 1):
        kvops.paged_attention(q, *lists.arguments, bias=make_bias((3, slots), torch.bool, device))
    with pytest.raises(ValueError, match="seq_lens: expected lengths up to the 69 slots of bias"):
        kvops.paged_attention(q, *lists.arguments, bias=make_bias((3, 69), torch.bool, device))


@pytest.mark.parametrize("uniform", [False, True])
def test_a_bidirectional_range_inside_a_causal_text(backend, device, uniform):
    """vLLM's and Gemma's images: the tokens of an image see each other. A prompt in two chunks, then one token."""
    B, T, Hkv, D = 2, 24, 2, 16
    k, v = torch.randn(2, B, T, Hkv, D, device=device)
    q = torch.randn(B, T, 4, D, device=device)
    image = torch.full((B, T), -1, device=device)
    image[0, 3:9], image[0, 14:20], image[1, 5:12] = 0, 1, 0
    place = torch.arange(T, device=device)
    mask = place <= place[:, None]
    mask = mask | ((image[:, :, None] == image[:, None]) & (image >= 0)[:, None])  # [B, T, S]
    expected, _ = kvops.flash_attention(q, k, v, bias=mask[:, None])
    if uniform:
        cache = torch.zeros(2, 8, 8, Hkv, D, device=device)
        tables = torch.arange(8, dtype=torch.int32, device=device).view(B, 4)
    else:
        cache = torch.zeros(2, 16, 8, D, device=device)
        tables = torch.arange(16, dtype=torch.int32, device=device).view(B, Hkv, 4)
    for first, last in ((0, 12), (12, 23), (23, 24)):
        lens = torch.full(tables.shape[:-1], last, dtype=torch.int32, device=device)
        kvops.paged_append(k[:, first:last], v[:, first:last], *cache, tables, lens)
        bias = mask[:, None, first:last, :last]
        out, _ = kvops.paged_attention(q[:, first:last], *cache, tables, lens, bias=bias, causal=False)
        torch.testing.assert_close(out, expected[:, first:last])


def test_the_flat_custom_mask_of_flashinfer(backend, device):
    """[sum of qo_len * kv_len], one mask after another: packed, each row of it becomes a row of the bias."""
    lists = make_lists([[20, 20], [9, 9], [33, 33]], block_size=8, head_dim=16, device=device)
    lengths, kv_lengths = [4, 1, 6], [20, 9, 33]
    masks = [torch.rand(n, m, device=device) < 0.6 for n, m in zip(lengths, kv_lengths, strict=True)]
    flat = torch.cat([mask.flatten() for mask in masks])

    q_lens, kv_lens = torch.tensor(lengths, device=device), torch.tensor(kv_lengths, device=device)
    row_lens = kv_lens.repeat_interleave(q_lens)  # of each token
    column = torch.arange(max(kv_lengths), device=device)
    bias = torch.zeros(len(row_lens), len(column), dtype=torch.bool, device=device)
    bias[column < row_lens[:, None]] = flat

    q = torch.randn(len(bias), 4, 16, device=device)
    starts = torch.nn.functional.pad(q_lens.cumsum(0), (1, 0)).int()
    out, lse = kvops.paged_attention(q, *lists.arguments, cu_seqlens_q=starts, max_seqlen_q=6, bias=bias, causal=False)
    for b, (mask, (first, last)) in enumerate(zip(masks, itertools.pairwise(starts.tolist()), strict=True)):
        lists_of = lists.block_tables[b : b + 1], lists.seq_lens[b : b + 1]
        alone, alone_lse = kvops.paged_attention(
            q[None, first:last], lists.k_cache, lists.v_cache, *lists_of, bias=mask, causal=False
        )
        torch.testing.assert_close(out[first:last], alone[0])
        torch.testing.assert_close(lse[:, first:last], alone_lse[0])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_opcheck(backend, device, kind):
    lists = make_lists([[20, 3], [9, 16]], block_size=8, head_dim=32, device=device)
    caches = [cache.nan_to_num(0.0) for cache in (lists.k_cache, lists.v_cache)]
    tables = lists.block_tables.clamp(max=len(caches[0]) - 1), lists.seq_lens
    tests = ("test_schema", "test_faketensor")
    if backend == "eager" or device.type == "cuda":  # tracing is the same for both, and the interpreter is slow
        tests = (*tests, "test_aot_dispatch_dynamic")
    packed = {"cu_seqlens_q": counts(0, 1, 4, device=device), "max_seqlen_q": 3}
    for q, options in (
        (torch.randn(2, 2, 4, 32, device=device), {"bias": make_bias((2, 4, 2, 24), kind, device)}),
        (torch.randn(4, 4, 32, device=device), packed | {"bias": make_bias((4, 20), kind, device)}),
    ):
        torch.library.opcheck(torch.ops.kvops.paged_attention.default, (q, *caches, *tables), options, test_utils=tests)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"bias": torch.ones(2, 6, 2, 40).double()}, TypeError, "bias: expected dtype bool or float16 or"),
        ({"bias": torch.ones(2, 6, 2, 40).int()}, TypeError, "bias: expected dtype bool or float16 or"),
        (
            {"bias": torch.ones(2, 3, 2, 40)},
            ValueError,
            r"bias: expected a shape that broadcasts to \[batch, heads, seqlen_q, seqlen_k\] = \[2, 6, 2, 40\], got",
        ),
        ({"bias": torch.ones(3, 1, 2, 40)}, ValueError, r"bias: expected .* got \[3, 1, 2, 40\]"),
        ({"bias": torch.ones(1, 3, 40)}, ValueError, r"bias: expected .* got \[1, 3, 40\]"),
        ({"bias": torch.ones(1, 2, 6, 2, 40)}, ValueError, "bias: expected a shape"),
        ({"bias": torch.ones(2, 0)}, ValueError, r"bias.shape\[-1\] \(slots\): expected at least 1, got 0"),
        ({"bias": torch.ones(2, 40, requires_grad=True)}, RuntimeError, "an input requires one"),
        (
            {
                "q": torch.randn(5, 6, 32), "cu_seqlens_q": torch.tensor([0, 2, 5]).int(), "max_seqlen_q": 3,
                "bias": torch.ones(1, 6, 5, 40),
            },
            ValueError,
            r"bias: expected a shape that broadcasts to \[heads, total_q, max_seqlen_k\] = \[6, 5, 40\], got",
        ),
    ],
)  # fmt: skip
def test_bad_bias_is_named(changes, kind, message):
    lists = make_lists([[20, 3, 8], [9, 16, 0]], block_size=8, head_dim=32)
    arguments = {"q": torch.randn(2, 2, 6, 32), "k_cache": lists.k_cache, "v_cache": lists.v_cache}
    arguments |= {"block_tables": lists.block_tables, "seq_lens": lists.seq_lens}
    with pytest.raises(kind, match=message):
        kvops.paged_attention(**(arguments | changes))
