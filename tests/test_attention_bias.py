"""flash_attention with a bias or a mask of any shape: against float64, its gradient, and rows that see nothing."""

import itertools
import math

import pytest
import torch
from attention_cases import Case
from oracle import assert_accurate, attention, attention_backward
from rounding import rounded

import kvops

NAMES = ("dq", "dk", "dv", "dsinks", "dbias")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """``torch.empty`` comes filled with NaN: what nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Shapes [batch, heads, queries, keys] of a bias, 0 for the whole size.
CASES = [
    (Case("a whole matrix", 2, 37, 40, (4, 2), (32, 16)), (0, 0, 0, 0)),
    (Case("relative positions, as in T5", 2, 33, 33, (2, 2), (16, 16), scale=1.0), (1, 0, 0, 0)),
    (Case("a matrix for each sequence under a causal window", 2, 40, 40, (2, 1), (16, 16), True, 20), (0, 1, 0, 0)),
    (Case("one matrix for all", 2, 20, 40, (2, 1), (16, 32), window_right=5), (1, 1, 0, 0)),
    (Case("padding of keys", 3, 37, 40, (2, 1), (16, 16)), (0, 1, 1, 0)),
    (Case("queries alone", 2, 37, 20, (2, 1), (16, 16), True), (0, 0, 0, 1)),
    (Case("a number for each head", 2, 20, 37, (2, 1), (16, 16)), (1, 0, 1, 1)),
    (
        Case("everything at once", 2, 40, 50, (4, 2), (24, 16), True, 30, -1, 0.2, 2.0, True, "batch"),
        (1, 0, 0, 0),
    ),
]


def make_bias(case: Case, shape, dtype, hidden=0.3):
    sizes = case.batch, case.heads[0], case.num_queries, case.num_keys
    shape = [own or whole for own, whole in zip(shape, sizes, strict=True)]
    keep = torch.rand(shape) > hidden
    if dtype == torch.bool:
        return keep
    return torch.randn(shape).masked_fill(~keep, float("-inf")).to(dtype)


def check_forward(q, k, v, mask, window, **scoring):
    actual = kvops.flash_attention(q, k, v, **window, **scoring)
    exact = attention(q, k, v, mask=mask, **scoring)
    same = rounded(q.dtype, attention, q, k, v, mask=mask, **scoring)
    for name, *values in zip(("out", "lse"), actual, exact, same):  # noqa: B905 - the oracle returns P as well
        assert_accurate(*values, name)
    return actual


def check_backward(q, k, v, mask, window, **scoring):
    """Against autograd through the oracle, given its forward."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    tensors = {name: scoring[name] for name in ("sinks", "bias") if scoring.get(name) is not None}
    wide = {name: x.double().requires_grad_() for name, x in tensors.items() if x.is_floating_point()}
    out, lse, _ = attention(*leaves, mask=mask, **scoring | wide)
    dout, dlse = torch.randn(out.shape).to(q.dtype), torch.randn(lse.shape)
    outputs = out, lse.masked_fill(lse == float("-inf"), 0.0)
    exact = dict(
        zip(
            ["dq", "dk", "dv", *(f"d{name}" for name in wide)],
            torch.autograd.grad(outputs, [*leaves, *wide.values()], (dout.double(), dlse.double())),
            strict=True,
        )
    )
    out, lse = out.detach().to(q.dtype), lse.detach().float()
    given = dout, q, k, v, out, lse
    same = rounded(q.dtype, attention_backward, *given, mask=mask, dlse=dlse, **scoring)
    actual = kvops.flash_attention_backward(*given, dlse=dlse, **window, **scoring)
    if "bias" in wide:
        scoring.pop("sinks", None)
        bias = scoring.pop("bias")
        dbias = kvops.flash_attention_bias_backward(*given, bias, dlse=dlse, **window, **scoring)
        assert dbias.dtype == bias.dtype
        actual = *actual, dbias
    for name, one, low in zip(NAMES, actual, same):  # noqa: B905 - a mask has no gradient
        if name in exact:
            assert_accurate(one, exact[name], low, name)


@pytest.mark.parametrize("kind", [torch.float32, torch.bool], ids=str)
@pytest.mark.parametrize(("case", "shape"), CASES, ids=str)
def test_agrees_with_float64(backend, case: Case, shape, kind):
    scoring = case.scoring() | {"bias": make_bias(case, shape, kind)}
    q, k, v = case.inputs(torch.float32)
    check_forward(q, k, v, case.mask, case.window, **scoring)
    check_backward(q, k, v, case.mask, case.window, **scoring)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(backend, dtype):
    case, shape = CASES[-1]
    scoring = case.scoring() | {"bias": make_bias(case, shape, dtype)}
    q, k, v = case.inputs(dtype)
    check_forward(q, k, v, case.mask, case.window, **scoring)
    check_backward(q, k, v, case.mask, case.window, **scoring)


@pytest.mark.parametrize("kind", [torch.float32, torch.bool], ids=str)
@pytest.mark.parametrize("sinks", [None, 0.5, float("inf"), float("-inf")])
def test_rows_that_a_bias_hides_from_all_keys_are_empty(backend, sinks, kind):
    q, k, v = torch.randn(1, 5, 2, 16), torch.randn(1, 40, 1, 16), torch.randn(1, 40, 1, 16)
    bias = torch.ones(5, 40, dtype=torch.bool)
    bias[1:3] = False
    bias[4, 1:] = False
    if kind != torch.bool:
        bias = torch.zeros(5, 40).masked_fill(~bias, float("-inf"))
    options = {"bias": bias, "sinks": None if sinks is None else torch.full((2,), sinks)}
    out, lse = kvops.flash_attention(q, k, v, **options)
    assert not out[:, 1:3].any()
    assert (lse[..., 1:3] == float("-inf")).all()
    rest = torch.tensor([0, 3, 4])
    expected, expected_lse = kvops.flash_attention(q[:, rest], k, v, **options | {"bias": bias[rest]})
    torch.testing.assert_close(out[:, rest], expected)
    torch.testing.assert_close(lse[..., rest], expected_lse)
    gradients = kvops.flash_attention_backward(
        torch.ones_like(out), q, k, v, out, lse, dlse=torch.ones_like(lse), **options
    )
    assert all(x.isfinite().all() for x in gradients)
    assert not gradients[0][:, 1:3].any()


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min])
def test_the_lowest_numbers_hide_a_key(backend, lowest):
    """Models mask with them. Times log2(e) they are -inf, and no number of their own."""
    q, k, v = torch.randn(1, 3, 1, 16), torch.randn(1, 5, 1, 16), torch.randn(1, 5, 1, 16)
    keep = torch.tensor([[1, 0, 1, 1, 0], [0] * 5, [1] * 5]).bool()
    bias = torch.zeros(3, 5).masked_fill(~keep, lowest)
    results = [kvops.flash_attention(q, k, v, bias=x) for x in (bias, keep)]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert not results[0][0][:, 1].any()


@pytest.mark.parametrize("kind", [torch.float32, torch.bool], ids=str)
def test_a_hidden_key_that_is_no_number_spoils_no_row(backend, kind):
    q, k, v = torch.randn(1, 5, 1, 16), torch.randn(1, 40, 1, 16), torch.randn(1, 40, 1, 16)
    bias = torch.ones(5, 40, dtype=torch.bool)
    bias[:, 7] = False
    if kind != torch.bool:
        bias = torch.zeros(5, 40).masked_fill(~bias, float("-inf"))
    expected = kvops.flash_attention(q, k, v, bias=bias)
    k[:, 7] = float("nan")
    for one, other in zip(kvops.flash_attention(q, k, v, bias=bias), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", [torch.float32, torch.bool], ids=str)
def test_a_bias_is_read_in_place_whatever_its_strides(backend, kind):
    case = Case("", 2, 20, 33, (2, 1), (16, 16))
    whole = make_bias(case, (0, 0, 0, 0), kind)
    q, k, v = case.inputs(torch.float32)
    expected = kvops.flash_attention(q, k, v, bias=whole)
    for order in itertools.permutations(range(4)):
        back = [order.index(d) for d in range(4)]
        view = whole.permute(order).contiguous().permute(back)
        for one, other in zip(kvops.flash_attention(q, k, v, bias=view), expected, strict=True):
            torch.testing.assert_close(one, other)
    row = whole[:1, :1, :1]
    for one, other in zip(
        kvops.flash_attention(q, k, v, bias=row.expand_as(whole)), kvops.flash_attention(q, k, v, bias=row[0, 0, 0]),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other)


def test_autograd_sums_the_gradient_over_what_the_bias_broadcasts_over(backend):
    case = Case("", 2, 20, 33, (4, 2), (16, 16), causal=True)
    q, k, v = case.inputs(torch.float32)
    whole = torch.randn(2, 4, 20, 33, requires_grad=True)
    out, lse = kvops.flash_attention(q, k, v, causal=True, bias=whole)
    weights = torch.randn_like(out), torch.randn_like(lse)
    for shape in ((2, 4, 20, 33), (1, 4, 20, 33), (4, 1, 33), (20, 1), (33,), (2, 1, 1, 33), ()):
        small = torch.randn(shape, requires_grad=True)
        total = small.detach().expand(2, 4, 20, 33).clone().requires_grad_()
        gradients = [
            torch.autograd.grad(kvops.flash_attention(q, k, v, causal=True, bias=bias), bias, weights)[0]
            for bias in (small, total)
        ]
        torch.testing.assert_close(gradients[0], gradients[1].sum_to_size(shape))
        again = torch.autograd.grad(kvops.flash_attention(q, k, v, causal=True, bias=small), small, weights)[0]
        assert torch.equal(again, gradients[0])


def test_the_bias_of_softcapped_scores_is_outside_of_the_cap(backend):
    q, k, v = torch.randn(1, 3, 1, 16), torch.randn(1, 5, 1, 16), torch.randn(1, 5, 1, 16)
    bias = torch.full((3, 5), 7.0, requires_grad=True)
    _, lse = kvops.flash_attention(q, k, v, softcap=0.5, bias=bias)
    plain = kvops.flash_attention(q, k, v, softcap=0.5)[1]
    torch.testing.assert_close(lse, plain + 7.0)
    (gradient,) = torch.autograd.grad(lse.sum(), bias)
    torch.testing.assert_close(gradient.sum(-1), torch.ones(3))  # of each lse: 1


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_nothing_to_attend_to(backend, empty):
    sizes = {"batch": 2, "queries": 3, "keys": 3} | {empty: 0}
    q, k = torch.randn(sizes["batch"], sizes["queries"], 2, 16), torch.randn(sizes["batch"], sizes["keys"], 1, 16)
    for shape in ((sizes["batch"], 2, sizes["queries"], sizes["keys"]), (1, 2, 1, 1)):
        bias = torch.zeros(shape, requires_grad=True)
        out, lse = kvops.flash_attention(q, k, k, bias=bias)
        assert not out.any()
        assert (lse == float("-inf")).all()
        (gradient,) = torch.autograd.grad(out.sum(), bias)
        assert gradient.shape == bias.shape
        assert not gradient.any()


def test_are_well_formed_operators(backend):
    q, k, v = (torch.randn(1, 3, heads, 16, requires_grad=True) for heads in (2, 1, 1))
    bias = torch.randn(2, 3, 3, requires_grad=True)
    ops = torch.ops.kvops
    torch.library.opcheck(ops.flash_attention.default, (q, k, v), {"causal": True, "bias": bias})
    torch.library.opcheck(ops.flash_attention.default, (q, k, v), {"bias": torch.ones(3, 3).bool()})
    q, k, v, bias = (x.detach() for x in (q, k, v, bias))
    out, lse = kvops.flash_attention(q, k, v, bias=bias)
    given = out, q, k, v, out, lse
    torch.library.opcheck(ops.flash_attention_backward.default, given, {"bias": bias})
    torch.library.opcheck(ops.flash_attention_bias_backward.default, (*given, bias), {"dlse": torch.randn_like(lse)})


def test_a_compiled_training_step_has_the_same_loss_and_gradients():
    def step(weight, x, bias):
        q, k, v = (x @ weight).unflatten(-1, (3, 2, 16)).unbind(2)
        out, lse = kvops.flash_attention(q, k, v, causal=True, bias=bias)
        return out.square().mean() + 0.1 * lse.mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (9, 21):
        x, weight, bias = torch.randn(2, length, 24), torch.randn(24, 96), torch.randn(2, length, length)
        results = []
        for function in (step, compiled):
            leaves = weight.clone().requires_grad_(), bias.clone().requires_grad_()
            loss = function(leaves[0], x, leaves[1])
            results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (torch.zeros(2, 4, 5, 6), ValueError, r"bias: expected a shape that broadcasts to .* = \[2, 4, 5, 7\], got"),
        (torch.zeros(3, 1, 1, 7), ValueError, r"bias: .* got \[3, 1, 1, 7\]"),
        (torch.zeros(1, 1, 1, 1, 7), ValueError, r"bias: .* got \[1, 1, 1, 1, 7\]"),
        (torch.zeros(5, 7).double(), TypeError, r"bias: expected dtype bool or .*, got float64"),
        (torch.zeros(5, 7).int(), TypeError, r"bias: expected dtype .*, got int32"),
        (torch.zeros(5, 7, device="meta"), ValueError, r"bias: expected the device of q"),
    ],
)
def test_bad_input_is_refused(bias, error, message):
    q, k, v = torch.zeros(2, 5, 4, 16), torch.zeros(2, 7, 2, 16), torch.zeros(2, 7, 2, 8)
    with pytest.raises(error, match=message):
        kvops.flash_attention(q, k, v, bias=bias)


def test_a_mask_has_no_gradient():
    q = torch.zeros(1, 5, 1, 16)
    with pytest.raises(TypeError, match="bias: expected a float dtype, got bool: a mask has no gradient"):
        kvops.flash_attention_bias_backward(q, q, q, q, q, torch.zeros(1, 1, 5), torch.ones(5, 5).bool())


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_that_see_no_key_stay_zero_beside_a_key_of_nan(backend, kind):
    """Where a bias hid all rows, so that no other row showed the NaN, they were NaN on a CPU."""
    q, k, v = (torch.randn(2, 6, heads, 16) for heads in (4, 2, 2))
    k[:, 3] = math.nan
    bias = torch.zeros(1, 1, dtype=torch.bool) if kind == "bool" else torch.full((1, 1), -math.inf)
    lengths = torch.tensor([0, 6, 12]).int()
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    for out, lse in (
        kvops.flash_attention(q, k, v, bias=bias),
        kvops.flash_attention_varlen(*packed, lengths, lengths, 6, 6, bias=bias),
    ):
        assert (out == 0).all()
        assert (lse == -math.inf).all()
