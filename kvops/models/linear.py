"""A linear layer that reads its weights at full speed for the few rows of a decoding step on a CPU."""

from __future__ import annotations

import functools
from types import ModuleType

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

    def forward(self, x: Tensor, norm: nn.RMSNorm | None = None) -> Tensor:
        """``norm`` comes before the product; the kernel does both at once."""
        weight, bias, shape = self.weight, self.bias, x.shape
        rows = shape.numel() // max(shape[-1], 1)
        if not 0 < rows <= _FEW or not _has_kernel(x, weight):
            return F.linear(x if norm is None else norm(x), weight, bias)
        x = x.reshape(rows, shape[-1]).contiguous()
        if norm is None:
            out = _kernels().linear(x, weight)
        else:
            out = _kernels().linear(x, weight, norm.weight, norm.eps)
        if len(shape) != 2:
            out = out.view(*shape[:-1], out.shape[-1])
        return out if bias is None else out + bias


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether numba's kernel takes tensors of this kind: no subclasses, and nothing that is traced."""
    return (
        not torch.is_grad_enabled()
        and x.dtype == torch.float32
        and x.is_cpu
        and type(x) is Tensor
        and type(weight) is nn.Parameter
        and not torch.compiler.is_compiling()
        and backend() == "numba"
        and _kernels().serves(weight)
    )


@functools.cache
def _kernels() -> ModuleType:
    """The module of the kernel, which brings numba."""
    from kvops.kernels.cpu import linear

    return linear
