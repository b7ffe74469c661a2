"""The bias of dense attention, tile by tile."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A bias below this hides a key, as in the kernels: times log2(e) it is below the range of float32.
_HIDDEN = torch.finfo(torch.float32).min * math.log(2)


def four_dims(bias: Tensor) -> Tensor:
    """A view with 4 dimensions, [batch, heads, queries, keys]; those that are missing have size 1."""
    return bias[(None,) * (4 - bias.dim())]


def bias_tile(bias: Tensor, rows: slice, keys: slice, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """The part [1 or B, 1 or Hq, rows, keys] of a bias [1 or B, 1 or Hq, Sq, Sk], -inf where it hides a key, and
    whether it hides any."""
    part = bias[:, :, rows, keys]
    if part.dtype == torch.bool:
        return torch.where(part, 0.0, -torch.inf).to(dtype), True
    part = part.to(dtype)
    if part.numel() == 0 or part.amin() >= _HIDDEN:
        return part, part.numel() == 0
    return part.masked_fill(part < _HIDDEN, -torch.inf), True
