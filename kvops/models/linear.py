"""A linear layer that reads its weights at full speed for the few rows of a decoding step on a CPU."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvops.ops.registry import backend
from kvops.private_torch import has_any_global_hook, transforms_are_active

# Rows up to which the CPU kernel was faster than torch.
_FEW = 32


class Linear(nn.Linear):
    """``nn.Linear``, which for a few rows in float32 on a CPU runs a kernel that numba compiles, outside of autograd.

    Decoding is bound by reading the weights, and the BLAS that torch calls reads them slowly where there are few rows.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply(x) if _has_kernel(self, x) else F.linear(x, self.weight, self.bias)

    def _multiply(self, x: Tensor, *options: Any) -> Tensor:
        """The kernel's product; ``options`` follow the bias in :func:`kvops.kernels.cpu.linear.linear`."""
        weight = self.weight
        return _kernels().linear(_rows(x), weight, self.bias, *options).view(*x.shape[:-1], weight.shape[0])


def rotated_heads(
    norm: nn.RMSNorm, linear: Linear, x: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [B, T, heads, D] of ``linear(norm(x))``, with q and k behind a rotary embedding.

    ``heads`` counts those of q, and those of k, which v has too. cos, sin [B, T, 1, D]; the first half of the sines is
    negative (see :mod:`kvops.rotary`).
    """
    rotated, head_dim = sum(heads), cos.shape[-1]
    if (
        _has_kernel(linear, x, norm)
        and cos.shape[:-1] == sin.shape[:-1] == (*x.shape[:-1], 1)  # one for all rows is for torch
        and _is_plain(cos)
        and _is_plain(sin)
        and not _has_hooks(norm, linear)
    ):
        done = linear._multiply(x, norm.weight, norm.eps, cos, sin, rotated)
        return done.unflatten(-1, (-1, head_dim)).split((*heads, heads[1]), dim=2)  # type: ignore[return-value]
    plain = linear(norm(x)).unflatten(-1, (-1, head_dim))
    rotating = plain[:, :, :rotated]
    q, k = torch.addcmul(rotating * cos, rotating.roll(head_dim // 2, -1), sin).split(heads, dim=2)
    return q, k, plain[:, :, rotated:]


def after_attention(
    x: Tensor, attended: Tensor, projection: Linear, norm: nn.RMSNorm, gate_up: Linear, down: Linear
) -> Tensor:
    """y + down(silu(gate) * up), where y is x + projection(attended) and ``gate_up(norm(y))`` has gate and up side by
    side; the layers have no bias. x [B, T, hidden], attended [B, T, heads * D]."""
    if (
        _has_kernel(projection, attended)
        and _has_kernel(gate_up, x, norm)
        and _serves(down.weight)
        and projection.bias is gate_up.bias is down.bias is None
        and attended.shape[:-1] == x.shape[:-1]
        and projection.weight.shape[0] == x.shape[-1]
        and down.weight.shape == (x.shape[-1], gate_up.weight.shape[0] // 2)
        and not _has_hooks(projection, norm, gate_up, down)
    ):
        weights = projection.weight, norm.weight, gate_up.weight, down.weight
        return _kernels().after_attention(_rows(x), _rows(attended), *weights, norm.eps).view(x.shape)
    y = x + projection(attended)
    gate, up = gate_up(norm(y)).chunk(2, dim=-1)
    return y + down(F.silu(gate) * up)


def _has_kernel(layer: Linear, x: Tensor, norm: nn.RMSNorm | None = None) -> bool:
    """Whether numba's kernel takes these rows of a layer: few, in memory as they are, and nothing that is traced. What
    does not fit is left to torch, whose errors say so."""
    weight = layer.weight  # modules search for a parameter, which takes a microsecond
    return (
        not torch.is_grad_enabled()
        and x.dtype == torch.float32
        and 0 < x.numel() <= _FEW * x.shape[-1]
        and x.is_cpu
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not x.is_neg()
        and not transforms_are_active()
        and backend() == "numba"
        and _serves(weight)
        and x.shape[-1] == weight.shape[1]
        and (layer.bias is None or _is_plain(layer.bias))
        and (norm is None or _normalises(norm, weight.shape[1:]))
    )


def _normalises(norm: nn.RMSNorm, shape: torch.Size) -> bool:
    """Whether the kernel's norm is this one: it has a weight and an eps."""
    weight: Tensor | None = norm.weight
    return norm.eps is not None and weight is not None and _is_plain(weight) and weight.shape == shape


def _serves(weight: Tensor) -> bool:
    return type(weight) is nn.Parameter and _is_plain(weight) and _kernels().serves(weight)  # type: ignore[no-any-return]


def _is_plain(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_cpu and x.is_contiguous()


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _has_hooks(*modules: nn.Module) -> bool:
    return has_any_global_hook() or any(
        bool(module._forward_pre_hooks) or bool(module._forward_hooks) for module in modules
    )


@functools.cache
def _kernels() -> ModuleType:
    """The module of the kernel, which brings numba."""
    from kvops.kernels.cpu import linear

    return linear
