"""flash_attention_backward and the gradient of flash_attention: against autograd through float64."""

import pytest
import torch
from attention_cases import CASES_AND_DTYPES, Case
from oracle import assert_accurate, attention, attention_backward, attention_mask
from rounding import rounded

import kvops


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """``torch.empty`` comes filled with NaN: what nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(q, k, v, dout, dlse, mask, window, **scoring):
    """Compare the backward operator, given the exact forward, with autograd through the oracle."""
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    exact_scoring = dict(scoring)
    if scoring.get("sinks") is not None:
        exact_scoring["sinks"] = scoring["sinks"].double().requires_grad_()
        inputs.append(exact_scoring["sinks"])
    out, lse, _ = attention(*inputs[:3], mask=mask, **exact_scoring)
    outputs, gradients = [out], [dout.double()]
    if dlse is not None:
        outputs.append(lse.masked_fill(lse == float("-inf"), 0.0))
        gradients.append(dlse.double())
    exact = torch.autograd.grad(outputs, inputs, gradients)
    out, lse = out.detach().to(q.dtype), lse.detach().float()
    same = rounded(q.dtype, attention_backward, dout, q, k, v, out, lse, mask=mask, dlse=dlse, **scoring)
    actual = kvops.flash_attention_backward(dout, q, k, v, out, lse, dlse=dlse, **window, **scoring)
    for name, *values in zip(("dq", "dk", "dv", "dsinks"), actual, exact, same):  # noqa: B905 - dsinks may be missing
        assert_accurate(*values, name)


@pytest.mark.parametrize(("case", "dtype"), CASES_AND_DTYPES, ids=str)
def test_agrees_with_float64(backend, case: Case, dtype):
    q, k, v = case.inputs(dtype)
    dout = torch.randn(*q.shape[:3], v.shape[3]).to(dtype)
    check(q, k, v, dout, None, case.mask, case.window, **case.scoring())


@pytest.mark.parametrize("sinks", [None, (0.3, -0.5)])
def test_the_gradient_through_lse(backend, sinks):
    sinks = None if sinks is None else torch.tensor(sinks)
    q, k, v = torch.randn(1, 40, 2, 16), torch.randn(1, 33, 1, 16), torch.randn(1, 33, 1, 24)
    dout, dlse = torch.randn(1, 40, 2, 24), torch.randn(1, 2, 40)
    mask = attention_mask(40, 33, causal=True)
    check(q, k, v, dout, dlse, mask, {"causal": True}, sinks=sinks)


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_nothing_to_attend_to(backend, empty):
    sizes = {"batch": 1, "queries": 3, "keys": 3} | {empty: 0}
    q = torch.randn(sizes["batch"], sizes["queries"], 2, 16, requires_grad=True)
    k = torch.randn(sizes["batch"], sizes["keys"], 1, 16, requires_grad=True)
    sinks = torch.zeros(2, requires_grad=True)
    out, lse = kvops.flash_attention(q, k, k, causal=True, sinks=sinks)
    for gradient in torch.autograd.grad((out, lse), (q, k, sinks), (torch.ones_like(out), torch.ones_like(lse))):
        assert (gradient == 0).all()


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "window"),
    [
        (150, 400, {"causal": True}),
        (400, 400, {"causal": True, "window_left": 200}),
        (400, 300, {"window_left": 100, "window_right": 40}),
    ],
)
@pytest.mark.parametrize("scoring", [{}, {"softcap": 3.0}, {"alibi_slopes": torch.tensor([0.02, 0.5])}])
def test_eager_joins_its_tiles(monkeypatch, num_queries, num_keys, window, scoring):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("kvops.eager.window._TILE_ELEMENTS", 1 << 14)  # tiles of 64 keys
    q, k, v = torch.randn(1, num_queries, 2, 16), torch.randn(1, num_keys, 1, 16), torch.randn(1, num_keys, 1, 16)
    check(q, k, v, torch.randn_like(q), None, attention_mask(num_queries, num_keys, **window), window, **scoring)


def test_views_are_read_in_place(backend):
    fused = torch.full((2, 40, 7, 48), float("nan"))
    fused[..., :6, :32] = torch.randn(2, 40, 6, 32)
    q, k, v = fused[:, :, :4, :32], fused[:, :, 4:5, :32], fused[:, :, 5:6, :32]
    dout = torch.randn(2, 4, 40, 32).transpose(1, 2)
    check(q, k, v, dout, None, attention_mask(40, 40, causal=True), {"causal": True})


def test_the_same_bits_twice(backend):
    q, k, v = torch.randn(1, 40, 2, 16), torch.randn(1, 40, 1, 16), torch.randn(1, 40, 1, 16)
    out, lse = kvops.flash_attention(q, k, v, causal=True)
    runs = [kvops.flash_attention_backward(out, q, k, v, out, lse, causal=True) for _ in range(2)]
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two)


def test_autograd_calls_the_operator(backend):
    """Also with the expanded gradients that a sum hands back, and with lse alone."""
    q, k, v = (torch.randn(1, 20, heads, 16, requires_grad=True) for heads in (2, 1, 1))
    sinks = torch.randn(2, requires_grad=True)
    options = {"causal": True, "sinks": sinks}
    out, lse = kvops.flash_attention(q, k, v, **options)
    inputs = (q, k, v, sinks)
    ones, zeros = torch.ones_like(out), torch.zeros_like(out)
    with torch.no_grad():
        from_out = kvops.flash_attention_backward(ones, q, k, v, out, lse, **options)
        from_lse = kvops.flash_attention_backward(zeros, q, k, v, out, lse, dlse=torch.ones_like(lse), **options)
    for actual, expected in zip(torch.autograd.grad(out.sum(), inputs, retain_graph=True), from_out, strict=True):
        assert torch.equal(actual, expected)
    actual = torch.autograd.grad(lse.sum(), inputs, allow_unused=True)
    for gradient, expected in zip(actual, from_lse, strict=True):
        assert torch.equal(gradient, expected)


def test_is_a_well_formed_operator(backend):
    q, k, v = torch.randn(1, 3, 2, 16), torch.randn(1, 3, 1, 16), torch.randn(1, 3, 1, 16)
    sinks = torch.randn(2)
    out, lse = kvops.flash_attention(q, k, v, causal=True, sinks=sinks)
    options = {"causal": True, "sinks": sinks, "dlse": torch.randn_like(lse)}
    torch.library.opcheck(torch.ops.kvops.flash_attention_backward.default, (out, q, k, v, out, lse), options)
    torch.library.opcheck(torch.ops.kvops.flash_attention_backward.default, (out, q, k, v, out, lse))


def test_a_compiled_training_step_has_the_same_loss_and_gradients():
    def step(weight, x):
        q, k, v = (x @ weight).unflatten(-1, (3, 2, 16)).unbind(2)
        out, lse = kvops.flash_attention(q, k, v, causal=True)
        return out.square().mean() + 0.1 * lse.mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (9, 21):
        x, results = torch.randn(2, length, 24), []
        weight = torch.randn(24, 96)
        for function in (step, compiled):
            parameter = weight.clone().requires_grad_()
            loss = function(parameter, x)
            loss.backward()
            results.append((loss.detach(), parameter.grad))
        torch.testing.assert_close(*results)


def test_an_infinite_sink_takes_all_of_its_rows(backend):
    """exp(inf - inf) made the gradient of the sink NaN."""
    q, k, v = torch.randn(1, 5, 2, 16), torch.randn(1, 7, 1, 16), torch.randn(1, 7, 1, 16)
    sinks = torch.tensor([float("inf"), 0.5])
    exact = kvops.flash_attention(q, k, v, causal=True, sinks=torch.tensor([1e30, 0.5]))
    out, lse = exact[0], exact[1].where(exact[1] < 1e20, float("inf"))
    gradients = [
        kvops.flash_attention_backward(
            torch.ones_like(out), q, k, v, out, lse, causal=True, sinks=sinks, dlse=torch.ones_like(lse)
        )
        for sinks, lse in ((sinks, lse), (torch.tensor([1e30, 0.5]), exact[1]))
    ]
    for one, other in zip(*gradients, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other)
    assert gradients[0][3][0] == 5  # the gradient of 5 rows' lse


def test_slopes_that_want_a_gradient_are_refused():
    q = torch.randn(1, 5, 1, 16)
    with pytest.raises(RuntimeError, match="alibi_slopes: expected a tensor without gradient"):
        kvops.flash_attention(q, q, q, alibi_slopes=torch.ones(1, requires_grad=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dout": torch.zeros(2, 5, 4, 16)}, ValueError, r"dout: expected shape .*\[2, 5, 4, 8\], got \[2, 5, 4, 16\]"),
        ({"dout": torch.zeros(2, 5, 4, 8).half()}, TypeError, r"dout: expected the dtype of q, float32, got float16"),
        ({"out": torch.zeros(2, 6, 4, 8)}, ValueError, r"out: expected shape .*got \[2, 6, 4, 8\]"),
        ({"out": torch.zeros(2, 5, 8, 4).mT}, ValueError, r"out: expected the last dimension contiguous"),
        ({"lse": torch.zeros(2, 5, 4)}, ValueError, r"lse: expected shape .*\[2, 4, 5\], got \[2, 5, 4\]"),
        ({"lse": torch.zeros(2, 4, 5).half()}, TypeError, r"lse: expected dtype float32, got float16"),
        ({"dlse": torch.zeros(2, 4)}, ValueError, r"dlse: expected shape .*got \[2, 4\]"),
        ({"k": torch.zeros(2, 7, 3, 16)}, ValueError, r"q: expected a number of query heads divisible by the 3"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    shapes = {"dout": (2, 5, 4, 8), "q": (2, 5, 4, 16), "k": (2, 7, 2, 16), "v": (2, 7, 2, 8), "out": (2, 5, 4, 8)}
    arguments = {name: torch.zeros(shape) for name, shape in shapes.items()} | {"lse": torch.zeros(2, 4, 5)} | change
    positional = [arguments.pop(name) for name in (*shapes, "lse")]
    with pytest.raises(error, match=message):
        kvops.flash_attention_backward(*positional, **arguments)
