"""What the launch functions of dense and packed attention share: strides and padding."""

import torch
import triton


def padded(head_dim: int) -> int:
    """The width of a tile that holds ``head_dim``: a power of two that a matrix product accepts."""
    return max(16, triton.next_power_of_2(head_dim))


def token_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Batch, token and head strides of [batch, seqlen, heads, head_dim]; packed tensors have no batch."""
    return tensor.stride()[:3] if tensor.dim() == 4 else (0, *tensor.stride()[:2])


def row_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Batch and head strides of [batch, heads, seqlen]; packed tensors have no batch."""
    return tensor.stride()[:2] if tensor.dim() == 3 else (0, tensor.stride(0))


def slope_stride(alibi_slopes: torch.Tensor | None) -> int:
    """Batch stride of ALiBi slopes [heads] or [batch, heads]."""
    return alibi_slopes.stride(0) if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0
