"""attention_scores: against the float64 softmax, reduced."""

import pytest
import torch
from attention_cases import CASES, Case
from oracle import assert_accurate, attention, attention_mask
from rounding import rounded

import kvops

NUMBA = True


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """``torch.empty`` comes filled with NaN: what nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def reduced(p, kv_heads, query_start=0, skip_recent=0, reduce="sum", group="sum"):
    """p [B, Hq, Sq, Sk] reduced over what counts -> [B, Hkv, Sk]."""
    num_queries, num_keys = p.shape[2:]
    counts = torch.ones(num_queries, num_keys, dtype=torch.bool)
    counts[: query_start if query_start >= 0 else max(0, query_start + num_queries)] = False
    if skip_recent:
        distance = (torch.arange(num_queries) + num_keys - num_queries)[:, None] - torch.arange(num_keys)
        counts &= distance >= skip_recent
    p = p.masked_fill(~counts, 0.0)
    over_queries = {"sum": p.sum(2), "sumsq": p.square().sum(2), "max": p.amax(2)}[reduce]
    heads = over_queries.unflatten(1, (kv_heads, -1))
    return {"sum": heads.sum(2), "mean": heads.mean(2), "max": heads.amax(2)}[group]


def check(q, k, v, mask=None, window=None, reduction=None, **scoring):
    window, reduction = window or {}, reduction or {}

    def exact(q, k, v, **scoring):
        return reduced(attention(q, k, v, mask=mask, **scoring)[2], k.shape[2], **reduction)

    expected, same = exact(q, k, v, **scoring), rounded(q.dtype, exact, q, k, v, **scoring)
    lse = attention(q, k, v, mask=mask, **scoring)[1].float()
    scoring.pop("sinks", None)
    actual = kvops.attention_scores(q, k, lse, **window, **reduction, **scoring)
    assert actual.dtype == torch.float32
    assert_accurate(actual, expected, same, "scores")
    return actual


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64(backend, case: Case):
    check(*case.inputs(torch.float32), case.mask, case.window, **case.scoring())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend, dtype):
    q, k = torch.randn(1, 40, 3, 64).to(dtype), torch.randn(1, 70, 1, 64).to(dtype)
    check(q, k, k, attention_mask(40, 70, causal=True), {"causal": True})


@pytest.mark.parametrize("reduce", ["sum", "sumsq", "max"])
@pytest.mark.parametrize("group", ["sum", "mean", "max"])
@pytest.mark.parametrize("which", [{}, {"query_start": 35, "skip_recent": 3}])
def test_every_reduction(backend, reduce, group, which):
    q, k = torch.randn(1, 40, 4, 16), torch.randn(1, 50, 2, 16)
    check(q, k, k, attention_mask(40, 50, causal=True), {"causal": True}, {"reduce": reduce, "group": group, **which})


@pytest.mark.parametrize("which", [{"query_start": -3}, {"query_start": -999}, {"skip_recent": 40}])
def test_the_queries_that_count(backend, which):
    q, k = torch.randn(1, 40, 2, 16), torch.randn(1, 50, 1, 16)
    check(q, k, k, attention_mask(40, 50, causal=True), {"causal": True}, which)


@pytest.mark.parametrize("which", [{"query_start": 40}, {"query_start": 7, "skip_recent": 2}, {"skip_recent": 1}])
def test_windows_and_both_directions(backend, which):
    q, k = torch.randn(1, 40, 2, 16), torch.randn(1, 50, 2, 16)
    check(q, k, k, reduction=which)
    window = {"window_left": 9, "window_right": 5}
    check(q, k, k, attention_mask(40, 50, **window), window, which)


def test_every_query_gives_one(backend):
    q, k = torch.randn(1, 70, 3, 16), torch.randn(1, 70, 1, 16)
    _, lse = kvops.flash_attention(q, k, k, causal=True)
    scores = kvops.attention_scores(q, k, lse, causal=True)
    torch.testing.assert_close(scores.sum(), torch.tensor(3 * 70.0))


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_nothing_to_reduce(backend, empty, reduce):
    sizes = {"batch": 1, "queries": 3, "keys": 3} | {empty: 0}
    q = torch.randn(sizes["batch"], sizes["queries"], 2, 16)
    k = torch.randn(sizes["batch"], sizes["keys"], 1, 16)
    lse = torch.zeros(sizes["batch"], 2, sizes["queries"])
    scores = kvops.attention_scores(q, k, lse, reduce=reduce, group="max")
    assert scores.shape == (sizes["batch"], 1, sizes["keys"])
    if empty == "queries":
        assert (scores == 0).all()


@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_eager_joins_its_tiles(monkeypatch, reduce):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("KVOPS_CPU", "eager")
    monkeypatch.setattr("kvops.eager.window._TILE_ELEMENTS", 1 << 14)  # tiles of 64 keys
    q, k = torch.randn(1, 300, 4, 16), torch.randn(1, 400, 2, 16)
    window = {"causal": True, "window_left": 250}
    check(q, k, k, attention_mask(300, 400, **window), window, {"reduce": reduce, "query_start": 10})


def test_the_same_bits_twice(backend):
    q, k, lse = torch.randn(1, 40, 2, 16), torch.randn(1, 40, 1, 16), torch.randn(1, 2, 40)
    assert torch.equal(*(kvops.attention_scores(q, k, lse, causal=True) for _ in range(2)))


def test_views_are_read_in_place(backend):
    fused = torch.full((2, 40, 6, 48), float("nan"))
    fused[..., :5, :32] = torch.randn(2, 40, 5, 32)
    q, k = fused[:, :, :4, :32], fused[:, :, 4:5, :32]
    check(q, k, k, attention_mask(40, 40, causal=True), {"causal": True})


def test_is_a_well_formed_operator(backend):
    q, k, lse = torch.randn(1, 3, 2, 16), torch.randn(1, 3, 1, 16), torch.randn(1, 2, 3)
    options = {"causal": True, "query_start": 2, "reduce": "sumsq", "group": "mean"}
    torch.library.opcheck(torch.ops.kvops.attention_scores.default, (q, k, lse), options)


def test_compiles_into_one_graph_with_dynamic_shapes():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(q, k, lse):
        return kvops.attention_scores(q, k, lse, causal=True, query_start=-4, reduce="max")

    for length in (9, 21):
        q, k, lse = torch.randn(2, length, 4, 16), torch.randn(2, length, 2, 16), torch.randn(2, 4, length)
        expected = kvops.attention_scores(q, k, lse, causal=True, query_start=-4, reduce="max")
        torch.testing.assert_close(compiled(q, k, lse), expected)


def test_a_gradient_is_refused():
    q = torch.randn(1, 5, 1, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"kvops\.attention_scores has no gradient"):
        kvops.attention_scores(q, q, torch.zeros(1, 1, 5))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reduce": "mean"}, ValueError, r"reduce: expected one of 'sum', 'sumsq', 'max', got 'mean'"),
        ({"group": "min"}, ValueError, r"group: expected one of 'sum', 'mean', 'max', got 'min'"),
        ({"skip_recent": -1}, ValueError, r"skip_recent: expected at least 0, got -1"),
        ({"window_left": -2}, ValueError, r"window_left: expected at least -1, got -2"),
        ({"softcap": -1.0}, ValueError, r"softcap: expected at least 0.0, got -1.0"),
        ({"lse": torch.zeros(2, 5, 4)}, ValueError, r"lse: expected shape .*\[2, 4, 5\], got \[2, 5, 4\]"),
        ({"lse": torch.zeros(2, 4, 5).half()}, TypeError, r"lse: expected dtype float32, got float16"),
        ({"k": torch.zeros(2, 7, 3, 16)}, ValueError, r"q: expected a number of query heads divisible by the 3"),
        ({"k": torch.zeros(2, 7, 2, 8)}, ValueError, r"k: expected shape .*got \[2, 7, 2, 8\]"),
        ({"alibi_slopes": torch.zeros(2, 5)}, ValueError, r"alibi_slopes: expected shape .*got \[2, 5\]"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    arguments = {"q": torch.zeros(2, 5, 4, 16), "k": torch.zeros(2, 7, 2, 16), "lse": torch.zeros(2, 4, 5)} | change
    q, k, lse = (arguments.pop(name) for name in ("q", "k", "lse"))
    with pytest.raises(error, match=message):
        kvops.attention_scores(q, k, lse, **arguments)
