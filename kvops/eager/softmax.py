"""Softmax over the keys of a row: probabilities with lse, sinks, and the union of two parts."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities over the last dimension of the scores, which are overwritten, and lse; 0 and -inf where all are
    -inf."""
    limits = torch.finfo(scores.dtype)
    shift = scores.amax(-1, keepdim=True).clamp_(limits.min, limits.max)  # inf - inf is NaN
    p = scores.sub_(shift).exp_()
    total = p.sum(-1, keepdim=True)
    lse = (total.log() + shift)[..., 0]
    return p.div_(total.masked_fill_(total == 0, 1.0)), lse


def union_weights(lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of two parts of a softmax in their union, and its lse; 0 and -inf where both are empty.

    The weights are divided by their own sum: exp(lse_a - lse) has the rounding of lse, 5e-4 where lse is 1e4.
    """
    m = torch.maximum(lse_a, lse_b)
    limits = torch.finfo(m.dtype)
    shift = m.clamp(min=limits.min, max=limits.max)  # inf - inf is NaN
    weight_a, weight_b = torch.exp(lse_a - shift), torch.exp(lse_b - shift)
    total = weight_a + weight_b
    lse = m + total.log()
    total.masked_fill_(total == 0, 1.0)
    return weight_a.div_(total), weight_b.div_(total), lse


def beside_sinks(lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """What a row keeps of its weight beside a sink, which broadcasts to lse, and its lse. Rows without a key stay
    empty."""
    weight, _, union = union_weights(lse, sinks.to(lse.dtype).expand_as(lse))
    return weight, torch.where(lse == -torch.inf, lse, union)


def sink_probability(sinks: Tensor, lse: Tensor) -> Tensor:
    """exp(sinks - lse) for sinks that broadcast to lse, 0 in an empty row; an infinite sink has all of its row."""
    largest = torch.finfo(lse.dtype).max
    p = torch.exp(sinks.to(lse.dtype).clamp(max=largest) - lse.clamp(max=largest))
    return p.masked_fill_(lse == -torch.inf, 0.0)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys: out [..., D], lse [...]."""
    weight_a, weight_b, lse = union_weights(lse_a, lse_b)
    return torch.mul(out_a, weight_a[..., None]).addcmul_(out_b, weight_b[..., None]), lse
