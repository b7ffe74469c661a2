"""flash_attention, forward: against float64, at the edges, as an operator."""

import pytest
import torch
from attention_cases import CASES_AND_DTYPES, Case
from oracle import assert_accurate, attention, attention_mask
from rounding import LEVELS, error_of_half, rounded

import kvops


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """``torch.empty`` comes filled with NaN: what nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(q, k, v, mask=None, window=None, **scoring):
    out, lse = kvops.flash_attention(q, k, v, **(window or {}), **scoring)
    exact = attention(q, k, v, mask=mask, **scoring)
    same = rounded(q.dtype, attention, q, k, v, mask=mask, **scoring)
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    assert_accurate(out, exact[0], same[0], "out")
    assert_accurate(lse, exact[1], same[1], "lse")
    return out, lse


@pytest.mark.parametrize(("case", "dtype"), CASES_AND_DTYPES, ids=str)
def test_agrees_with_float64(backend, case: Case, dtype):
    check(*case.inputs(dtype), case.mask, case.window, **case.scoring())


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_nothing_to_attend_to(backend, empty, length):
    sizes = {"batch": 1, "queries": 3, "keys": 3} | {empty: 0}
    q = torch.randn(sizes["batch"], sizes["queries"], 2, 16)
    k = torch.randn(sizes["batch"], sizes["keys"], 1, 16)
    out, lse = kvops.flash_attention(q, k, k, causal=True, window_left=length, sinks=torch.zeros(2))
    assert out.shape == q.shape
    assert lse.shape == (sizes["batch"], 2, sizes["queries"])
    assert (out == 0).all()
    assert (lse == float("-inf")).all()


def test_views_are_read_in_place(backend):
    """Heads of one projection side by side, a time-major batch, and NaN wherever no element of a view lies."""
    fused = torch.full((2, 40, 7, 48), float("nan"))
    fused[..., :6, :32] = torch.randn(2, 40, 6, 32)
    q, k, v = fused[:, :, :4, :32], fused[:, :, 4:5, :32], fused[:, :, 5:6, :32]
    check(q, k, v, attention_mask(40, 40, causal=True), {"causal": True})
    # [seqlen, batch, heads, head_dim] in memory, then [batch, heads, seqlen, head_dim].
    for order, back in (((1, 0, 2, 3), (1, 0, 2, 3)), ((0, 2, 1, 3), (0, 2, 1, 3))):
        check(*(x.permute(order).contiguous().permute(back) for x in (q, k, v)))


def test_keys_that_no_query_sees_are_not_read(backend):
    q, k, v = torch.randn(1, 10, 1, 16), torch.randn(1, 200, 1, 16), torch.randn(1, 200, 1, 16)
    window = {"causal": True, "window_left": 20}
    expected = kvops.flash_attention(q, k, v, **window)
    k[:, :128], v[:, :128] = float("nan"), float("nan")
    for tensor, other in zip(kvops.flash_attention(q, k, v, **window), expected, strict=True):
        assert torch.equal(tensor, other)


@pytest.mark.parametrize("far", [2**31 - 1, 2**63 - 1])
def test_the_widest_window_is_none(backend, far):
    """A bound of 2^31 - 1 added to a position wrapped round in the kernels: nothing was seen, or all scored twice."""
    q, k, v = torch.randn(1, 3, 2, 16), torch.randn(1, 5, 1, 16), torch.randn(1, 5, 1, 16)
    results = []
    for left, right in ((-1, -1), (far, far)):
        window = {"window_left": left, "window_right": right}
        out, lse = kvops.flash_attention(q, k, v, **window)
        gradients = kvops.flash_attention_backward(out, q, k, v, out, lse, **window)
        scores = kvops.attention_scores(q, k, lse, **window)
        results.append((out, lse, *gradients, scores))
        assert (kvops.attention_scores(q, k, lse, **window, skip_recent=far) == 0).all()
    for bounded, free in zip(*results, strict=True):
        torch.testing.assert_close(bounded, free)


def test_scores_far_apart_do_not_overflow(backend):
    q, k, v = torch.randn(1, 40, 1, 16) * 30, torch.randn(1, 70, 1, 16) * 30, torch.randn(1, 70, 1, 16)
    check(q, k, v, sinks=torch.tensor([500.0]))
    check(q, k, v, sinks=torch.tensor([-500.0]))


@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize(
    "window",
    [{"causal": True, "window_left": 2}, {"window_left": 2}, {"window_left": 0, "window_right": 3}, {"causal": True}],
    ids=str,
)
def test_few_queries_see_the_keys_of_their_window_alone(backend, queries, window):
    """One query under a window saw all keys on the CPU: the keys that it sees need no mask."""
    q, k, v = torch.randn(2, queries, 6, 16), torch.randn(2, 40, 2, 16), torch.randn(2, 40, 2, 16)
    check(q, k, v, attention_mask(queries, 40, **window), window)


def test_a_sink_of_minus_infinity_is_none(backend):
    q, k, v = torch.randn(1, 5, 2, 16), torch.randn(1, 40, 1, 16), torch.randn(1, 40, 1, 16)
    out, lse = kvops.flash_attention(q, k, v, sinks=torch.full((2,), float("-inf")))
    expected, expected_lse = kvops.flash_attention(q, k, v)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_an_infinite_sink_leaves_nothing_to_the_keys(backend):
    """The kernels subtracted infinity from itself: NaN."""
    q, k, v = torch.randn(1, 5, 2, 16), torch.randn(1, 3, 1, 16), torch.randn(1, 3, 1, 16)
    out, lse = kvops.flash_attention(q, k, v, causal=True, sinks=torch.tensor([float("inf"), 0.0]))
    expected, expected_lse = kvops.flash_attention(q, k, v, causal=True, sinks=torch.zeros(2))
    assert (out[:, :, 0] == 0).all()
    assert lse[0, 0].tolist() == [float("-inf")] * 2 + [float("inf")] * 3  # rows that see no key stay empty
    assert torch.equal(out[:, :, 1], expected[:, :, 1])
    assert torch.equal(lse[:, 1], expected_lse[:, 1])


@pytest.mark.parametrize("level", [1e2, 1e4, 1e5])
def test_probabilities_sum_to_one_however_large_scores_are(backend, level):
    """A mean of ones is 1. Parts that were joined by exp(lse_a - lse) lost 4e-4 of it where lse was 1e4."""
    q, k = torch.randn(1, 6, 1, 16), torch.randn(1, 40, 1, 16)
    k[..., 0], q[..., 0] = level**0.5, level**0.5
    out, lse = kvops.flash_attention(q, k, torch.ones_like(k), causal=True, scale=1.0)
    assert (lse > level / 2).all()
    torch.testing.assert_close(out, torch.ones_like(out), rtol=2e-6, atol=0)


@pytest.mark.parametrize("level", LEVELS)
def test_one_key_and_a_sink_of_its_score_share_a_row(backend, level):
    q, one = torch.full((1, 1, 1, 1), level), torch.ones(1, 1, 1, 1)
    out, _ = kvops.flash_attention(q, one, one, scale=1.0, sinks=torch.tensor([level]))
    torch.testing.assert_close(out.item(), 0.5, rtol=error_of_half(level), atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "options",
    [
        {"window_left": 3, "window_right": 2},
        {"causal": True},
        {"causal": True, "window_left": 9},
        {"causal": True, "alibi_slopes": torch.tensor([0.1])},
        {"causal": True, "softcap": 3.0},
    ],
    ids=str,
)
def test_a_key_that_is_no_number_spoils_only_the_rows_that_see_it(backend, options, bad):
    """What hides a key on the CPU is added to its score, and NaN and -inf are NaN."""
    q, k, v = torch.randn(1, 70, 1, 16), torch.randn(1, 70, 1, 16), torch.randn(1, 70, 1, 16)
    expected, expected_lse = kvops.flash_attention(q, k, v, **options)
    k[:, 39, :, 4] = bad
    out, lse = kvops.flash_attention(q, k, v, **options)
    window = {name: value for name, value in options.items() if name not in ("alibi_slopes", "softcap")}
    unspoilt = ~attention_mask(70, 70, **window)[:, 39]
    torch.testing.assert_close(out[:, unspoilt], expected[:, unspoilt])
    torch.testing.assert_close(lse[..., unspoilt], expected_lse[..., unspoilt])


def test_the_same_bits_twice(backend):
    q, k, v = torch.randn(1, 40, 2, 16), torch.randn(1, 40, 1, 16), torch.randn(1, 40, 1, 16)
    for one, two in zip(*(kvops.flash_attention(q, k, v, causal=True) for _ in range(2)), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "window"),
    [
        (150, 700, {"causal": True}),
        (400, 400, {"causal": True, "window_left": 200}),
        (400, 300, {"window_left": 100, "window_right": 40}),
        (300, 300, {"window_right": 3}),
    ],
)
@pytest.mark.parametrize("scoring", [{}, {"softcap": 3.0}, {"alibi_slopes": torch.tensor([0.02, 0.5])}])
def test_eager_joins_its_tiles(monkeypatch, num_queries, num_keys, window, scoring):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("kvops.eager.window._TILE_ELEMENTS", 1 << 14)  # tiles of 64 keys
    q, k, v = torch.randn(1, num_queries, 2, 16), torch.randn(1, num_keys, 1, 16), torch.randn(1, num_keys, 1, 16)
    check(q, k, v, attention_mask(num_queries, num_keys, **window), window, **scoring)


def test_is_a_well_formed_operator(backend):
    q, k, v = (torch.randn(1, 3, heads, 16, requires_grad=True) for heads in (2, 1, 1))
    options = {"causal": True, "window_left": 1, "sinks": torch.randn(2, requires_grad=True)}
    torch.library.opcheck(torch.ops.kvops.flash_attention.default, (q, k, v), options)
    torch.library.opcheck(torch.ops.kvops.flash_attention.default, (q.detach(), k.detach(), v.detach()))


def test_compiles_into_one_graph_with_dynamic_shapes():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(q, k, v):
        return kvops.flash_attention(q, k, v, causal=True, window_left=7)

    for length in (9, 21):
        q, k, v = torch.randn(2, length, 4, 16), torch.randn(2, length, 2, 16), torch.randn(2, length, 2, 16)
        for actual, expected in zip(
            compiled(q, k, v), kvops.flash_attention(q, k, v, causal=True, window_left=7), strict=True
        ):
            torch.testing.assert_close(actual, expected)


GOOD = {"q": (2, 5, 4, 16), "k": (2, 7, 2, 16), "v": (2, 7, 2, 8)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(5, 4, 16)}, ValueError, r"q: expected 4 dimensions .*got shape \[5, 4, 16\]"),
        ({"q": torch.zeros(2, 5, 4, 16).double()}, TypeError, r"q: expected dtype float16 or .*got float64"),
        ({"k": torch.zeros(2, 7, 2, 16).half()}, TypeError, r"k: expected the dtype of q, float32, got float16"),
        ({"k": torch.zeros(3, 7, 2, 16)}, ValueError, r"k: expected shape .*\[2, any, any, 16\], got \[3, 7, 2, 16\]"),
        ({"k": torch.zeros(2, 7, 2, 32)}, ValueError, r"k: expected shape .*got \[2, 7, 2, 32\]"),
        ({"v": torch.zeros(2, 6, 2, 16)}, ValueError, r"v: expected shape .*\[2, 7, 2, any\], got \[2, 6, 2, 16\]"),
        ({"q": torch.zeros(2, 5, 3, 16)}, ValueError, r"q: expected a number of query heads divisible by the 2"),
        ({"q": torch.zeros(2, 5, 16, 4).mT}, ValueError, r"q: expected the last dimension contiguous"),
        ({"k": torch.zeros(2, 7, 2, 16, device="meta")}, ValueError, r"k: expected the device of q"),
        ({"window_left": -2}, ValueError, r"window_left: expected at least -1, got -2"),
        ({"window_right": -3}, ValueError, r"window_right: expected at least -1, got -3"),
        ({"softcap": -1.0}, ValueError, r"softcap: expected at least 0.0, got -1.0"),
        ({"softcap": float("inf")}, ValueError, r"softcap: expected a finite number, got inf"),
        ({"scale": float("nan")}, ValueError, r"scale: expected a finite number, got nan"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks: expected shape \[heads\] = \[4\], got \[2\]"),
        ({"sinks": torch.zeros(4, dtype=torch.int32)}, TypeError, r"sinks: expected dtype .*got int32"),
        ({"alibi_slopes": torch.zeros(3, 4)}, ValueError, r"alibi_slopes: expected shape .*\[2, 4\], got \[3, 4\]"),
        ({"alibi_slopes": torch.zeros(5)}, ValueError, r"alibi_slopes: expected shape .*\[4\], got \[5\]"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    arguments = {name: torch.zeros(shape) for name, shape in GOOD.items()} | change
    with pytest.raises(error, match=message):
        kvops.flash_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
