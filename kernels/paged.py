"""Helpers of the launch functions of the paged cache: strides by slot and by list."""

import torch
import triton


def padded(head_dim: int) -> int:
    """The width of a tile that holds ``head_dim``: a power of two that a matrix product accepts."""
    return max(16, triton.next_power_of_2(head_dim))


def as_bytes(cache: torch.Tensor) -> torch.Tensor:
    """A float8 cache as bytes: not every GPU supports the type, and the interpreter does not."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def slot_strides(side: torch.Tensor | None) -> tuple[int, int, int]:
    """Block, slot and head strides of [num_blocks, block_size] or [num_blocks, block_size, heads]."""
    if side is None:
        return 0, 0, 0
    return side.stride(0), side.stride(1), side.stride(2) if side.dim() == 3 else 0


def list_strides(per_list: torch.Tensor, k_cache: torch.Tensor) -> tuple[int, int]:
    """Sequence and head strides of tables or lengths; the heads of a 4-D cache share them."""
    return per_list.stride(0), 0 if k_cache.dim() == 4 else per_list.stride(1)
