"""What the launch functions of dense and packed attention share: strides and padding."""

import torch
import triton

from kvops.autotune.config import CAUSAL, FULL, WINDOW


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


def mask_kind(window_left: int, window_right: int) -> int:
    """What the bounds of a mask are to a configuration; a causal mask has ``window_right`` 0."""
    if window_left >= 0 or window_right > 0:
        return WINDOW
    return CAUSAL if window_right == 0 else FULL
