"""A linear layer that reads its weights at full speed for the few rows of a decoding step on a CPU."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvops.ops.registry import backend
from kvops.private_torch import has_any_global_hook

# Rows up to which the CPU kernel was faster than torch.
_FEW = 32


class Linear(nn.Linear):
    """``nn.Linear``, which for a few rows in float32 on a CPU runs a kernel that numba compiles, outside of autograd.

    Decoding is bound by reading the weights, and the BLAS that torch calls reads them slowly where there are few rows.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply(x) if self._has_kernel(x) else F.linear(x, self.weight, self.bias)

    def after(self, norm: nn.RMSNorm, x: Tensor) -> Tensor:
        """``self(norm(x))``, by the kernel at once if neither module has a hook that would see what is between."""
        if not self._has_kernel(x) or _has_hooks(self, norm):
            return self(norm(x))  # type: ignore[no-any-return]
        return self._multiply(x, norm.weight, norm.eps)

    def _has_kernel(self, x: Tensor) -> bool:
        """Whether numba's kernel takes these rows: few, no subclasses, and nothing that is traced."""
        weight = self.weight  # modules search for a parameter, which takes a microsecond
        return (
            not torch.is_grad_enabled()
            and x.dtype == torch.float32
            and 0 < x.numel() <= _FEW * x.shape[-1]
            and x.is_cpu
            and type(x) is Tensor
            and type(weight) is nn.Parameter
            and not torch.compiler.is_compiling()
            and backend() == "numba"
            and _kernels().serves(weight)
        )

    def _multiply(self, x: Tensor, *norm: Any) -> Tensor:
        shape, bias = x.shape, self.bias
        out = _kernels().linear(x.reshape(-1, shape[-1]).contiguous(), self.weight, *norm)
        if len(shape) != 2:
            out = out.view(*shape[:-1], out.shape[-1])
        return out if bias is None else out + bias


def feed_forward(x: Tensor, norm: nn.RMSNorm, gate_up: Linear, down: Linear) -> Tensor:
    """x + down(silu(gate) * up), where ``gate_up(norm(x))`` has gate and up side by side; the layers have no bias.

    It is one kernel where :class:`Linear` runs one, if no module has a hook that would see what is between.
    """
    if gate_up._has_kernel(x) and _kernels().serves(down.weight) and not _has_hooks(norm, gate_up, down):
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return _kernels().feed_forward(rows, norm.weight, gate_up.weight, down.weight, norm.eps).view(x.shape)
    gate, up = gate_up(norm(x)).chunk(2, dim=-1)
    return x + down(F.silu(gate) * up)


def _has_hooks(*modules: nn.Module) -> bool:
    return has_any_global_hook() or any(
        bool(module._forward_pre_hooks) or bool(module._forward_hooks) for module in modules
    )


@functools.cache
def _kernels() -> ModuleType:
    """The module of the kernel, which brings numba."""
    from kvops.kernels.cpu import linear

    return linear
