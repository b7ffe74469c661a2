"""torch.func over attention: grad, vjp and jacrev give autograd's gradients, vmap what a loop gives, in any order."""

import pytest
import torch
from torch.func import grad, jacrev, jvp, vjp, vmap

import kvops

B, SQ, SK, HQ, HKV, D = 2, 3, 5, 4, 2, 8


def dense(*mapped):
    return (
        torch.randn(*mapped, B, SQ, HQ, D),
        torch.randn(*mapped, B, SK, HKV, D),
        torch.randn(*mapped, B, SK, HKV, D - 2),
    )


OPTIONS = {
    "plain": {},
    "window softcap": {"causal": True, "window_left": 2, "softcap": 2.0},
    "bias of all": {"bias": (HQ, SQ, SK)},
    "bias with a batch of one": {"bias": (1, HQ, 1, SK)},
    "bias of a batch": {"bias": (B, 1, SQ, SK)},
    "slopes": {"alibi_slopes": (HQ,)},
    "slopes of a batch": {"alibi_slopes": (B, HQ)},
    "sinks": {"sinks": (HQ,), "causal": True},
    "dropout": {"dropout_p": 0.3, "dropout_seed": torch.tensor([5]), "bias": (HQ, SQ, SK)},
}


def options_of(case):
    return {name: torch.randn(value) if isinstance(value, tuple) else value for name, value in OPTIONS[case].items()}


def mapped(value):
    """Three others like it."""
    return torch.randn(3, *value.shape) if value.is_floating_point() else torch.randint(99, (3, *value.shape))


def loss(q, k, v, **options):
    """A number that both results have a part in."""
    out, lse = kvops.flash_attention(q, k, v, **options)
    return out.square().sum() + lse.sin().sum()


def learned(options):
    return {name: value for name, value in options.items() if name in ("sinks", "bias")}


def by_autograd(function, *leaves):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(function(*leaves), leaves)


def expect_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def with_learned(case):
    """The loss as a function of q, k, v and what is learned, and these."""
    options = options_of(case)
    names = list(learned(options))

    def function(q, k, v, *values):
        return loss(q, k, v, **options | dict(zip(names, values, strict=True)))

    return function, [options[name] for name in names]


@pytest.mark.parametrize("case", OPTIONS)
def test_grad_is_that_of_autograd(backend, case):
    function, values = with_learned(case)
    inputs = (*dense(), *values)
    expect_equal(grad(function, argnums=tuple(range(len(inputs))))(*inputs), by_autograd(function, *inputs))
    value, pull = vjp(function, *inputs)
    expect_equal(pull(torch.tensor(2.0)), [2 * x for x in by_autograd(function, *inputs)])
    assert torch.equal(value, function(*inputs))


@pytest.mark.parametrize("case", OPTIONS)
def test_gradients_of_each_sample_are_those_of_a_loop(backend, case):
    """vmap over grad; what is learned is the same for all samples, and has a gradient for each."""
    function, values = with_learned(case)
    q, k, v = dense(3)
    numbers = tuple(range(3 + len(values)))
    mapped = vmap(grad(function, argnums=numbers), in_dims=(0, 0, 0, *(None for _ in values)))(q, k, v, *values)
    expected = [by_autograd(function, q[i], k[i], v[i], *values) for i in range(3)]
    expect_equal(mapped, map(torch.stack, zip(*expected, strict=True)))


@pytest.mark.parametrize("case", OPTIONS)
def test_vmap_is_a_loop_and_has_its_gradient(backend, case):
    """Keys are the same for all, values are mapped along another dimension, what else there is along the first."""
    options = options_of(case)
    q, k, v = dense(3)
    k, v = k[0], v.movedim(0, 2)
    tensors = {name: mapped(value) for name, value in options.items() if isinstance(value, torch.Tensor)}
    rest = {name: value for name, value in options.items() if name not in tensors}

    def one(q, k, v, *values):
        return kvops.flash_attention(q, k, v, **rest | dict(zip(tensors, values, strict=True)))

    actual = vmap(one, in_dims=(0, None, 2, *(0 for _ in tensors)))(q, k, v, *tensors.values())
    rows = [one(q[i], k, v[:, :, i], *(x[i] for x in tensors.values())) for i in range(3)]
    expect_equal(actual, map(torch.stack, zip(*rows, strict=True)))

    def all_of(q, k, v):
        return vmap(lambda q, v: loss(q, k, v, **options), in_dims=(0, 2))(q, v).sum()

    def looped(q, k, v):
        return sum(loss(q[i], k, v[:, :, i], **options) for i in range(3))

    expected = by_autograd(looped, q, k, v)
    expect_equal(grad(all_of, argnums=(0, 1, 2))(q, k, v), expected)
    expect_equal(by_autograd(all_of, q, k, v), expected)


def test_mapped_dropout_draws_as_the_randomness_of_vmap_says():
    q, k, v = dense()

    def one(q):
        return kvops.flash_attention(q, k, v, dropout_p=0.5)[0]

    rows = q.expand(3, *q.shape)
    same, different = (vmap(one, randomness=kind)(rows) for kind in ("same", "different"))
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="random operation"):
        vmap(one)(rows)


def test_packed_sequences_and_merged_parts_have_grad_and_vmap(backend):
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    sinks = torch.randn(HQ)

    def function(q, k, v):
        a = kvops.flash_attention_varlen(q, k, v, ends, ends, 3, 3, causal=True, sinks=sinks)
        b = kvops.flash_attention_varlen(q, v, k, ends, ends, 3, 3, causal=True)
        out, lse = kvops.merge_attention(*a, *b)
        return out.square().sum() + lse.sin().sum()

    inputs = [torch.randn(3, 5, heads, D) for heads in (HQ, HKV, HKV)]
    rows = [[x[i] for x in inputs] for i in range(3)]
    expected = [by_autograd(function, *row) for row in rows]
    expect_equal(grad(function, argnums=(0, 1, 2))(*rows[0]), expected[0])
    mapped = vmap(grad(function, argnums=(0, 1, 2)))(*inputs)
    expect_equal(mapped, map(torch.stack, zip(*expected, strict=True)))


def test_merged_batches_are_mapped(backend):
    parts = [torch.randn(3, *shape) for shape in ((B, SQ, HQ, D), (B, HQ, SQ), (B, SQ, HQ, D), (B, HQ, SQ))]

    def function(*parts):
        out, lse = kvops.merge_attention(*parts)
        return out.square().sum() + lse.sin().sum()

    expected = [by_autograd(function, *(x[i] for x in parts)) for i in range(3)]
    mapped = vmap(grad(function, argnums=(0, 1, 2, 3)))(*parts)
    expect_equal(mapped, map(torch.stack, zip(*expected, strict=True)))


def test_masks_of_padding_are_mapped_through_torchs_signature(backend):
    q, k, v = (torch.randn(3, B, heads, tokens, D) for heads, tokens in ((HQ, SQ), (HKV, SK), (HKV, SK)))
    mask = torch.rand(3, B, 1, 1, SK) < 0.7
    mask[..., 0] = True

    def function(q, k, v, mask):
        return kvops.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).square().sum()

    rows = [[x[i] for x in (q, k, v)] for i in range(3)]
    expected = [by_autograd(lambda q, k, v, i=i: function(q, k, v, mask[i]), *row) for i, row in enumerate(rows)]
    mapped = vmap(grad(function, argnums=(0, 1, 2)))(q, k, v, mask)
    expect_equal(mapped, map(torch.stack, zip(*expected, strict=True)))


def test_the_jacobian_of_every_output(backend):
    q, k, v = dense()
    jacobian = jacrev(lambda q: kvops.flash_attention(q, k, v)[1])(q)
    assert jacobian.shape == (B, HQ, SQ, B, SQ, HQ, D)
    one = by_autograd(lambda q: kvops.flash_attention(q, k, v)[1][1, 2, 0], q)[0]
    torch.testing.assert_close(jacobian[1, 2, 0], one)


def test_second_derivatives_and_forward_mode_are_refused(backend):
    q, k, v = dense()

    def first(q):
        return grad(loss)(q, k, v).square().sum()

    for second in (
        lambda: grad(first)(q),
        lambda: vmap(grad(first))(q[None]),
        lambda: by_autograd(first, q),
        lambda: by_autograd(lambda q: vmap(grad(loss), in_dims=(0, None, None))(q[None], k, v).sum(), q),
    ):
        with pytest.raises(RuntimeError, match=r"^kvops.flash_attention has no second derivative, only the first"):
            second()
    with pytest.raises(RuntimeError, match=r"^kvops.flash_attention has no forward-mode derivative \(jvp\)"):
        jvp(lambda q: loss(q, k, v), (q,), (q,))
    with pytest.raises(RuntimeError, match=r"^alibi_slopes: expected a tensor without gradient"):
        grad(lambda slopes: loss(q, k, v, alibi_slopes=slopes))(torch.ones(HQ))


def test_checks_name_arguments_under_transforms():
    q, k, v = dense(2)
    with pytest.raises(TypeError, match=r"^k: expected the dtype of q"):
        vmap(loss)(q, k.half(), v)
    with pytest.raises(ValueError, match=r"^k: expected shape"):
        grad(loss)(q[0], k[0, :1], v[0])


def test_transforms_compile_into_one_graph():
    q, k, v = dense(2)
    for function in (
        lambda q, k, v: grad(loss)(q[0], k[0], v[0]),
        lambda q, k, v: vmap(grad(loss))(q, k, v),
    ):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(q, k, v), function(q, k, v))
