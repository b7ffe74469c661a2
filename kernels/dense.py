"""Helpers of the launch functions of dense and packed attention: strides, padding and tensor descriptors."""

from dataclasses import replace
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from kvops.autotune.config import CAUSAL, FULL, WINDOW, AttentionConfig

# More than the distance of any two tokens. A window of 2^31 - 1 plus a position would overflow int32.
FAR = 1 << 30


def padded(head_dim: int) -> int:
    """The width of a tile that holds ``head_dim``: a power of two that a matrix product accepts."""
    return max(16, triton.next_power_of_2(head_dim))


def token_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Batch, token and head strides of [batch, seqlen, heads, head_dim]; packed tensors have no batch."""
    return tensor.stride()[:3] if tensor.dim() == 4 else (0, *tensor.stride()[:2])


def longest(max_seqlen: int, tokens: torch.Tensor) -> int:
    """The length that sizes the grid of a packed call: ``max_seqlen``, but at most all tokens together."""
    return min(max_seqlen, tokens.shape[0])


def row_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Batch and head strides of [batch, heads, seqlen]; packed tensors have no batch."""
    return tensor.stride()[:2] if tensor.dim() == 3 else (0, tensor.stride(0))


def slope_stride(alibi_slopes: torch.Tensor | None) -> int:
    """Batch stride of ALiBi slopes [heads] or [batch, heads]."""
    return alibi_slopes.stride(0) if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0


def bias_arguments(bias: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> tuple[Any, ...]:
    """The bias, with a mask as uint8, and its strides over [batch, heads, seqlen_q, seqlen_k], or over the same batch,
    heads, all packed queries and the keys of a sequence: 0 where it is the same for all. All None without a bias: the
    kernels then compile without it."""
    if bias is None:
        return (None,) * 5
    if bias.dtype == torch.bool:
        bias = bias.view(torch.uint8)
    if q.dim() == 4:
        return bias, *bias.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1]).stride()
    bias = bias[(None,) * (3 - bias.dim())]
    return bias, 0, *bias.expand(q.shape[1], q.shape[0], bias.shape[2] if bias.shape[2] != 1 else 2).stride()


def dropout_arguments(dropout_p: float, dropout_seed: torch.Tensor | None) -> tuple[Any, ...]:
    """The seed, the smallest random word that keeps a probability (the bits of a uint32 as int32) and the share that is
    kept. All None without dropout: the kernels then compile without it."""
    if not dropout_p:
        return (None,) * 3
    word = min(round(dropout_p * 2**32), 2**32 - 1)
    return dropout_seed, word - 2**32 if word >= 2**31 else word, 1.0 - dropout_p


def beside_others(
    config: AttentionConfig, loop: str, v: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor | None
) -> AttentionConfig:
    """The configuration for a call that may have a bias or the seed of a dropout: for each of them the tiles of the
    ``loop`` ("block_m" or "block_n") are half as wide.

    A tile of bias needs as many registers as the scores; at the full width it spills (forward, sm_80 and sm_90). Beside
    dropout, values of more than 128 spill at half of it (forward, sm_90), and float32 with eight warps (sm_90).
    """
    if bias is None and seed is None:
        return config
    halvings = (bias is not None) + (0 if seed is None else 1 + (v.shape[-1] > 128))
    tile = {loop: max(16, getattr(config, loop) >> halvings)}
    if seed is not None and v.element_size() == 4:
        tile["num_warps"] = min(4, config.num_warps)
    return replace(config, **tile)


def mask_bounds(causal: bool, window_left: int, window_right: int) -> tuple[int, int]:
    """The window to the left and to the right of a query, -1 for no limit; a causal mask has 0 to the right."""
    return min(window_left, FAR), 0 if causal else min(window_right, FAR)


def mask_kind(window_left: int, window_right: int) -> int:
    """The kind of mask that a configuration is chosen for; a causal mask has ``window_right`` 0."""
    if window_left >= 0 or window_right > 0:
        return WINDOW
    return CAUSAL if window_right == 0 else FULL


def dense_problem(
    q: torch.Tensor, v: torch.Tensor, batch: int, seqlen_q: int, seqlen_k: int, window_left: int, window_right: int
) -> tuple[int, ...]:
    """The problem of the families of dense attention: their key, then their sizes."""
    width = max(padded(q.shape[-1]), padded(v.shape[-1]))
    return width, q.element_size(), mask_kind(window_left, window_right), batch * q.shape[-2], seqlen_q, seqlen_k


def _described(tensor: torch.Tensor) -> tuple[list[int], list[int]]:
    """Shape and strides for the descriptor of [batch, seqlen, heads, head_dim]."""
    shape = list(tensor.shape) if tensor.dim() == 4 else [1, *tensor.shape]
    # A dimension of size 1 may have any stride, also one that TMA rejects.
    strides = [stride if size > 1 else 8 for stride, size in zip(token_strides(tensor), shape, strict=False)]
    return shape, [*strides, 1]


def describable(tensor: torch.Tensor) -> bool:
    """Whether TMA can read a 16-bit [batch, seqlen, heads, head_dim] or [total_tokens, heads, head_dim] without a copy.

    Base and strides must be multiples of 16 bytes, and no dimension may be empty or expanded (stride 0).
    """
    shape, strides = _described(tensor)
    return (
        tensor.element_size() == 2
        and tensor.data_ptr() % 16 == 0
        and all(shape)
        and all(stride > 0 and stride % 8 == 0 for stride in strides[:3])
    )


def descriptor(tensor: torch.Tensor, rows: int, width: int) -> TensorDescriptor:
    """A descriptor of a ``describable`` tensor: a block is ``rows`` tokens of one head, zero-padded to ``width``."""
    shape, strides = _described(tensor)
    return TensorDescriptor(tensor, shape, strides, [1, rows, 1, width])
