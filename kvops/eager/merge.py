"""The union of two attentions over disjoint keys on the CPU, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from kvops.eager.attention import cast, compute_dtype
from kvops.eager.softmax import merge, union_weights


def _empty_as_minus_inf(lse: Tensor) -> Tensor:
    """Some kernels, FlashAttention-2's among them, give an empty row an lse of +inf."""
    return lse.masked_fill(lse == float("inf"), float("-inf"))


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(out_a.dtype)
    lse_a, lse_b = _empty_as_minus_inf(lse_a), _empty_as_minus_inf(lse_b)
    out, lse = merge(cast(out_a, dtype), lse_a.mT, cast(out_b, dtype), lse_b.mT)  # lse [..., S, H]
    # Not contiguous(), which returns a view for one token or head: autograd refuses changes of one in place.
    return cast(out, out_a.dtype).contiguous(), lse.mT.clone(memory_format=torch.contiguous_format)


def merge_attention_backward(
    dout: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, dlse: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(dout.dtype)
    wide = dout.to(dtype)
    weight_a, weight_b, _ = union_weights(_empty_as_minus_inf(lse_a), _empty_as_minus_inf(lse_b))
    # d weight_a / d lse_a = weight_a * weight_b = -d weight_b / d lse_a
    change = (wide * (out_a.to(dtype) - out_b.to(dtype))).sum(-1).transpose(-2, -1) * weight_a * weight_b
    gradients: list[Tensor] = []
    for weight, own_change in ((weight_a, change), (weight_b, -change)):
        dpart = wide * weight.transpose(-2, -1).unsqueeze(-1)
        if dlse is not None:
            # An empty part has no gradient, whatever dlse holds there.
            own_change = own_change + (dlse * weight).masked_fill(weight == 0, 0.0)
        gradients += [dpart.to(dout.dtype).contiguous(), own_change.contiguous()]
    return gradients[0], gradients[1], gradients[2], gradients[3]
