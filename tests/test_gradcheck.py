"""torch.autograd.gradcheck of what trains on a CPU: the eager formulas in float64 against finite differences.

The operators refuse float64, so the eager functions stand in for them below the same autograd function.
"""

import pytest
import torch

from kvops.eager import attention, merge, varlen
from kvops.ops.gradients import _Attention

SCORINGS = {
    "causal": {"causal": True},
    "window": {"window_left": 1, "window_right": 2, "scale": 0.7},
    "softcap and slopes": {"causal": True, "softcap": 1.5},
    "dropout": {"causal": True, "dropout_p": 0.4},
}


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def finite(out, lse):
    """An empty row's lse is -inf, which has no finite difference."""
    return out, lse.masked_fill(lse == float("-inf"), 0.0)


def check_attention(forward, backwards, layout, options, q, k, v, slopes, bias=None):
    seed = torch.tensor([5]) if "dropout_p" in options else None

    def function(q, k, v, sinks, bias=bias):
        return finite(*_Attention.apply(forward, backwards, layout, options, q, k, v, sinks, slopes, bias, seed))

    sinks = leaf(q.shape[-2])
    assert torch.autograd.gradcheck(function, (q, k, v, sinks) if bias is None else (q, k, v, sinks, bias))
    assert torch.autograd.gradcheck(lambda *x: function(*x, None), (q, k, v))


@pytest.mark.parametrize("name", SCORINGS)
def test_dense_attention(name):
    slopes = torch.tensor([0.3, 0.1], dtype=torch.float64) if "slopes" in name else None
    q, k, v = leaf(1, 4, 2, 3), leaf(1, 5, 1, 3), leaf(1, 5, 1, 2)
    backwards = attention.flash_attention_backward, attention.flash_attention_bias_backward
    check_attention(attention.flash_attention, backwards, (), SCORINGS[name], q, k, v, slopes)


@pytest.mark.parametrize("name", SCORINGS)
@pytest.mark.parametrize("shape", [(2, 2, 4, 5), (1, 2, 4, 5), (2, 1, 1, 5), (4, 1), (5,)], ids=str)
def test_a_bias(name, shape):
    backwards = attention.flash_attention_backward, attention.flash_attention_bias_backward
    q, k, v = leaf(2, 4, 2, 3), leaf(2, 5, 1, 3), leaf(2, 5, 1, 2)
    check_attention(attention.flash_attention, backwards, (), SCORINGS[name], q, k, v, None, leaf(*shape))


@pytest.mark.parametrize("shape", [None, (2, 8, 3), (1, 8, 3), (2, 1, 3), (8, 1), ()], ids=str)
@pytest.mark.parametrize("name", SCORINGS)
def test_packed_attention(name, shape):
    """Sequences of 2, 0, 3 and 2 queries with 3, 2, 1 and 0 keys, and a token after the last one."""
    slopes = torch.tensor([[0.3, 0.1]] * 4, dtype=torch.float64) if "slopes" in name else None
    cu_seqlens_q, cu_seqlens_k = torch.tensor([0, 2, 2, 5, 7]).int(), torch.tensor([0, 3, 5, 6, 6]).int()
    q, k, v = leaf(8, 2, 2), leaf(7, 1, 2), leaf(7, 1, 3)
    layout = cu_seqlens_q, cu_seqlens_k, 3, 3
    check_attention(
        varlen.flash_attention_varlen,
        (varlen.flash_attention_varlen_backward, varlen.flash_attention_varlen_bias_backward),
        layout,
        SCORINGS[name],
        q,
        k,
        v,
        slopes,
        None if shape is None else leaf(*shape),
    )


def test_merged_attention():
    class Merge(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *parts):
            ctx.save_for_backward(*parts)
            ctx.set_materialize_grads(False)
            return merge.merge_attention(*parts)

        @staticmethod
        def backward(ctx, dout, dlse):
            dout = torch.zeros_like(ctx.saved_tensors[0]) if dout is None else dout
            return merge.merge_attention_backward(dout, *ctx.saved_tensors, dlse=dlse)

    parts = [leaf(1, 3, 2, 2), leaf(1, 2, 3), leaf(1, 3, 2, 2), leaf(1, 2, 3)]
    assert torch.autograd.gradcheck(Merge.apply, parts)
    for empty in (1, 3):  # a row of one part sees no key: it is all the other's
        some = [x.detach().clone() for x in parts]
        some[empty][0, 1, 2] = float("-inf")
        fixed = some[empty]
        others = [x.requires_grad_() for place, x in enumerate(some) if place != empty]

        def function(*others, empty=empty, fixed=fixed):
            return Merge.apply(*others[:empty], fixed, *others[empty:])

        assert torch.autograd.gradcheck(function, others)
