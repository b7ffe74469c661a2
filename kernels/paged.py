"""Helpers of the launch functions of the paged cache: strides by slot and by list."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton

# More slots than a list has.
EVERY_SLOT = 2**31 - 1


def padded(head_dim: int) -> int:
    """The width of a tile that holds ``head_dim``: a power of two that a matrix product accepts."""
    return max(16, triton.next_power_of_2(head_dim))


def as_bytes(cache: torch.Tensor) -> torch.Tensor:
    """A float8 e4m3 cache as bytes, as not every GPU supports the type; any other cache as it is."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def slot_strides(side: torch.Tensor | None) -> tuple[int, int, int]:
    """Block, slot and head strides of [num_blocks, block_size] or [num_blocks, block_size, heads]."""
    if side is None:
        return 0, 0, 0
    return side.stride(0), side.stride(1), side.stride(2) if side.dim() == 3 else 0


def slot_scale_strides(side: str, scale: torch.Tensor | None) -> dict[str, Any]:
    """Strides of the scales of slots by the names of parameters. None without them: then a kernel is compiled as if it
    did not have these parameters."""
    values = (None, None, None) if scale is None else slot_strides(scale)
    return dict(zip([f"stride_{side}_slot_{axis}" for axis in "bsh"], values, strict=True))


def in_every_row(cu_seqlens: torch.Tensor, *packed: torch.Tensor | None) -> tuple[Any, ...]:
    """Packed tensors ``[tokens, ...]`` with a dimension of stride 0 for the sequences, whose tokens begin elsewhere."""
    batch = cu_seqlens.shape[0] - 1
    return tuple(x if x is None else x.expand(batch, *x.shape) for x in packed)


def list_strides(per_list: torch.Tensor, k_cache: torch.Tensor) -> tuple[int, int]:
    """Sequence and head strides of tables or lengths; the heads of a 4-D cache share them."""
    return per_list.stride(0), 0 if k_cache.dim() == 4 else per_list.stride(1)


def bias_numbers(bias: torch.Tensor | None, batch: int, heads: int, tokens: int) -> dict[str, Any]:
    """The strides of a bias over [batch, heads, tokens, slots], 0 where it is the same for all, and the slots that it
    has. All None without one: the kernels then compile without it."""
    names = ("stride_bias_b", "stride_bias_h", "stride_bias_t", "stride_bias_s", "bias_slots")
    if bias is None:
        return dict.fromkeys(names)
    slots = bias.shape[-1] if bias.dim() else 1
    *row, slot = bias.expand(batch, heads, tokens, slots).stride()
    return dict(zip(names, (*row, *((0, EVERY_SLOT) if slots == 1 else (slot, slots))), strict=True))


def scale_stride(scale: torch.Tensor | None) -> int:
    """The head stride of the scales of a float8 or int8 cache: 0 for one that all heads share."""
    return 0 if scale is None or scale.dim() == 0 else scale.stride(0)


def strides(name: str, axes: str, values: Sequence[int]) -> dict[str, int]:
    """Strides by the names of parameters: ``stride_qb``, ``stride_qt``, ``stride_qh`` for ``"stride_q", "bth"``."""
    return {name + axis: value for axis, value in zip(axes, values, strict=True)}


def positional(kernel: Any, first: str, numbers: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a launch passes from the parameter ``first`` on: each number by its name, in the order of the kernel's
    parameters. ``numbers`` may have more. Raises KeyError for a parameter without a number."""
    names = kernel.arg_names
    return tuple(numbers[name] for name in names[names.index(first) :])
