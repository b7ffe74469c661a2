"""merge_attention: two attentions over disjoint keys are one over all of them, forward and backward."""

import pytest
import torch
from oracle import assert_accurate, attention
from rounding import rounded

import kvops

NUMBA = True


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """``torch.empty`` comes filled with NaN: what nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def parts(dtype=torch.float64, head_dim=40):
    """Two parts of five heads, 9 queries; row 2 is empty in a, row 3 in b, row 4 in both."""
    q, k, v = (torch.randn(2, tokens, 5, head_dim, dtype=torch.float64) for tokens in (9, 12, 12))
    mask = torch.rand(9, 12) < 0.7
    mask[2, :7], mask[3, 7:], mask[4] = False, False, False
    whole = attention(q, k, v, mask=mask)[:2]
    a = attention(q, k[:, :7], v[:, :7], mask=mask[:, :7])[:2]
    b = attention(q, k[:, 7:], v[:, 7:], mask=mask[:, 7:])[:2]
    inputs = [x.to(dtype) for x in (*a, *b)]
    return whole, [x.float() if x.dim() == 3 else x for x in inputs] if dtype != torch.float64 else inputs


def written_out(out_a, lse_a, out_b, lse_b):
    """The union in the dtype of its inputs, with autograd."""
    lse = torch.logaddexp(lse_a, lse_b)
    finite = lse.masked_fill(lse == float("-inf"), 0.0)
    weights = ((x - finite).exp().transpose(-2, -1).unsqueeze(-1) for x in (lse_a, lse_b))
    out = sum(x.to(lse.dtype) * weight for x, weight in zip((out_a, out_b), weights, strict=True))
    return out.to(out_a.dtype), lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_two_parts_are_the_whole(backend, dtype):
    (whole, whole_lse), inputs = parts(dtype)
    out, lse = kvops.merge_attention(*inputs)
    same, same_lse = rounded(dtype, written_out, *inputs)
    assert out.dtype == dtype
    assert_accurate(out, whole, same, "out")
    assert_accurate(lse, whole_lse, same_lse, "lse")
    assert (out[:, 4] == 0).all()
    assert (lse[..., 4] == float("-inf")).all()


def packed(x):
    return x.flatten(0, 1) if x.dim() == 4 else x.transpose(0, 1).flatten(1)


def test_packed_parts_are_merged_the_same(backend):
    _, inputs = parts(torch.float32)
    expected = kvops.merge_attention(*inputs)
    actual = kvops.merge_attention(*map(packed, inputs))
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, packed(other))


def test_views_are_read_in_place(backend):
    _, inputs = parts(torch.float32)
    expected = kvops.merge_attention(*inputs)
    views = []
    for x in inputs:
        holder = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan")).transpose(0, 1).contiguous().transpose(0, 1)
        holder[..., : x.shape[-1]] = x
        views.append(holder[..., : x.shape[-1]])
    torch.testing.assert_close(kvops.merge_attention(*views), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("through", ["out", "lse", "both"])
def test_the_gradient_agrees_with_float64(backend, dtype, through):
    _, inputs = parts(dtype)
    dout, dlse = torch.randn(inputs[0].shape).to(dtype), torch.randn(inputs[1].shape)
    gradients = {"out": (dout, None), "lse": (None, dlse), "both": (dout, dlse)}[through]

    def gradient(function, inputs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        chosen = [(y, g.to(y.dtype)) for y, g in zip(function(*leaves), gradients, strict=True) if g is not None]
        outputs, outer = zip(*chosen, strict=True)
        found = torch.autograd.grad(outputs, leaves, outer, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]

    def reference(out_a, lse_a, out_b, lse_b):
        # Autograd knows no gradient of -inf: such a part is far below the other instead.
        return written_out(out_a, lse_a.clamp(min=-1e4), out_b, lse_b.clamp(min=-1e4))

    def reference_gradient(*inputs):
        found = gradient(reference, inputs)
        for value in found:  # the row that is empty in both parts has no gradient
            (value[:, 4] if value.dim() == 4 else value[..., 4]).zero_()
        return found

    actual = gradient(kvops.merge_attention, inputs)
    exact, same = reference_gradient(*(x.double() for x in inputs)), rounded(dtype, reference_gradient, *inputs)
    for name, *values in zip(("dout_a", "dlse_a", "dout_b", "dlse_b"), actual, exact, same, strict=True):
        assert_accurate(*values, name)


def test_attention_in_two_parts_trains_like_the_whole(backend):
    q, k, v = (torch.randn(1, tokens, 2, 16, requires_grad=True) for tokens in (5, 40, 40))
    weight = torch.randn(1, 5, 2, 16)
    out, lse = kvops.flash_attention(q, k, v)
    expected = torch.autograd.grad((out * weight).sum() + lse.sum(), (q, k, v))
    halves = [kvops.flash_attention(q, k[:, rows], v[:, rows]) for rows in (slice(0, 25), slice(25, 40))]
    out, lse = kvops.merge_attention(*halves[0], *halves[1])
    actual = torch.autograd.grad((out * weight).sum() + lse.sum(), (q, k, v))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("level", [0.0, 1e4, -1e4, 1e5])
def test_weights_sum_to_one_however_large_lse_is(backend, level):
    """They were exp(lse_a - lse), with the rounding of lse: 5e-4 at 1e4, 4e-3 at 1e5."""
    lse_a, lse_b = level + torch.randn(1, 5, 9), level + torch.randn(1, 5, 9)
    ones = torch.ones(1, 9, 5, 16)
    out, _ = kvops.merge_attention(ones, lse_a, ones, lse_b)
    torch.testing.assert_close(out, ones, rtol=1e-6, atol=0)
    dout_a, _, dout_b, _ = kvops.merge_attention_backward(ones, ones, lse_a, ones, lse_b)
    torch.testing.assert_close(dout_a + dout_b, ones, rtol=1e-6, atol=0)
    share = torch.sigmoid(lse_a.double() - lse_b.double()).transpose(1, 2)[..., None].expand_as(ones)
    torch.testing.assert_close(dout_a.double(), share, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_rounded_to_the_nearest_and_ties_to_even(backend, dtype):
    """Tolerances do not see a result that is cut off. The mean of two is exact in float32."""
    a, b = torch.randn(2, 1, 3, 2, 64).to(dtype)
    lse = torch.zeros(1, 2, 3)
    out, _ = kvops.merge_attention(a, lse, b, lse)
    mean = (a.float() + b.float()) / 2
    assert torch.equal(out, mean.to(dtype))
    assert (out.float() != mean).any()


def test_an_lse_of_plus_infinity_is_an_empty_part(backend):
    """FlashAttention-2 says so of a row without keys; the other part was lost."""
    _, inputs = parts(torch.float32)
    plus = [x.where(x > float("-inf"), float("inf")) if x.dim() == 3 else x for x in inputs]
    assert (plus[1] == float("inf")).any()
    for one, other in zip(kvops.merge_attention(*plus), kvops.merge_attention(*inputs), strict=True):
        assert torch.equal(one, other)
    dout, dlse = torch.randn_like(inputs[0]), torch.randn_like(inputs[1])
    gradients = [kvops.merge_attention_backward(dout, *x, dlse=dlse) for x in (plus, inputs)]
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_an_lse_that_is_nan_is_not_hidden(backend):
    out, lse = torch.ones(1, 1, 1, 16), torch.zeros(1, 1, 1)
    merged, merged_lse = kvops.merge_attention(out, lse * float("nan"), out, lse)
    assert merged.isnan().all()
    assert merged_lse.isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 2, 16), (1, 0, 2, 16), (0, 2, 16)])
def test_nothing_to_merge(backend, shape):
    out, lse = torch.zeros(shape), torch.zeros(*shape[:-3], shape[-2], shape[-3])
    merged, merged_lse = kvops.merge_attention(out.requires_grad_(), lse, out, lse)
    assert merged.shape == out.shape
    assert merged_lse.shape == lse.shape
    (gradient,) = torch.autograd.grad(merged.sum(), out)
    assert gradient.shape == out.shape


def test_is_a_well_formed_operator(backend):
    inputs = [x[:1, ..., :3].contiguous() for x in parts(torch.float32)[1]]
    inputs[0], inputs[2] = (torch.randn(1, 3, 5, 16) for _ in range(2))
    dout, dlse = torch.randn_like(inputs[0]), torch.randn_like(inputs[1])
    torch.library.opcheck(torch.ops.kvops.merge_attention_backward.default, (dout, *inputs), {"dlse": dlse})
    torch.library.opcheck(torch.ops.kvops.merge_attention.default, tuple(x.requires_grad_() for x in inputs))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.zeros(4, 16)}, ValueError, r"out_a: expected 4 dimensions .*got shape \[4, 16\]"),
        ({0: torch.zeros(2, 5, 4, 16).double()}, TypeError, r"out_a: expected dtype float16 or .*got float64"),
        ({1: torch.zeros(2, 5, 4)}, ValueError, r"lse_a: expected shape .*\[2, 4, 5\], got \[2, 5, 4\]"),
        ({2: torch.zeros(2, 5, 4, 8)}, ValueError, r"out_b: expected shape .*got \[2, 5, 4, 8\]"),
        ({2: torch.zeros(2, 5, 4, 16).half()}, TypeError, r"out_b: expected the dtype of out_a, float32, got float16"),
        ({3: torch.zeros(2, 4, 5).half()}, TypeError, r"lse_b: expected dtype float32, got float16"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    arguments = [torch.zeros(2, 5, 4, 16), torch.zeros(2, 4, 5), torch.zeros(2, 5, 4, 16), torch.zeros(2, 4, 5)]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(error, match=message):
        kvops.merge_attention(*arguments)
