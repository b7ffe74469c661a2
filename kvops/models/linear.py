"""A linear layer that reads its weights at full speed for the few rows of a decoding step on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvops.ops.registry import backend

# Rows up to which the CPU kernel was faster than torch.
_FEW = 32


class Linear(nn.Linear):
    """``nn.Linear``, which for a few rows in float32 on a CPU runs a kernel that numba compiles, outside of autograd.

    Decoding is bound by reading the weights, and the BLAS that torch calls reads them slowly where there are few rows.
    The matrices of SmolLM2-135M on one core of an AMD EPYC, torch 2.13: 55, 84, 102 and 127 ms of processor time for 1,
    2, 4 and 8 rows against 44, 49, 60 and 83 ms.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        if not 0 < rows <= _FEW or not _has_kernel(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        from kvops.kernels.cpu.linear import linear, serves

        if not serves(self.weight):
            return F.linear(x, self.weight, self.bias)
        out = linear(x.reshape(rows, -1).contiguous(), self.weight).view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether numba's kernel takes tensors of this kind: no subclasses, and nothing that is traced."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and type(x) is Tensor
        and type(weight) is nn.Parameter
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and backend() == "numba"
    )
