"""``flash_attn.bert_padding``: padded batches to packed tokens and back. All functions have gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from kvops import checks

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """``input[indices]``: ``[N, ...]`` and ``[T]`` -> ``[T, ...]``."""
    return input[indices]


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`index_first_axis`, and ``input`` without its gradient."""
    return input[indices], input.detach()


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """The inverse of :func:`index_first_axis`: ``[T, ...]`` at ``indices`` of ``[first_axis_dim, ...]``, else 0."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_put((indices,), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a batch that are no padding.

    Args:
        hidden_states: ``[B, S, ...]``.
        attention_mask: bool or int ``[B, S]``, 1 for real tokens.
        unused_mask: the same for tokens that get room but are not used.

    Returns: the tokens ``[T, ...]``; their indices in ``[B * S]``, int64 ``[T]``; the cumulative lengths int32
    ``[B + 1]``; the largest length, which is read from the device; the number of used tokens int32 ``[B]``.
    """
    checks.expect_shape("attention_mask", attention_mask, "[batch, seqlen]", *hidden_states.shape[:2])
    kept = attention_mask.bool()
    used = kept.sum(1, dtype=torch.int32)
    if unused_mask is not None:
        checks.expect_shape("unused_mask", unused_mask, "[batch, seqlen]", *attention_mask.shape)
        kept = kept | unused_mask.bool()
    return *_packed(hidden_states, kept, kept.sum(1, dtype=torch.int32)), used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """:func:`unpad_input` of rows with several sequences each.

    ``attention_mask_in_length`` int ``[B, S]`` has the lengths of the sequences of a row, one after the other, then
    zeros. Without the last result of :func:`unpad_input`.
    """
    checks.expect_shape("attention_mask_in_length", attention_mask_in_length, "[B, S]", *hidden_states.shape[:2])
    place = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    kept = place < attention_mask_in_length.sum(1, keepdim=True)
    lens = attention_mask_in_length[attention_mask_in_length > 0]
    return _packed(hidden_states, kept, lens.to(torch.int32))


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undo :func:`unpad_input`: ``[T, ...]`` -> ``[batch, seqlen, ...]``, with zeros for padding."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _packed(hidden_states: Tensor, kept: Tensor, lens: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    indices = kept.flatten().nonzero()[:, 0]
    cu_seqlens = torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lens.max()) if len(lens) else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest
