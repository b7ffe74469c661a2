"""Packed requests, one after another without padding, as rows padded to one length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def starts_and_lengths(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Where requests begin, int64 ``[batch]``, and how long they are, int32 ``[batch]``."""
    return cu_seqlens[:-1].long(), cu_seqlens[1:] - cu_seqlens[:-1]


def padded(packed: Tensor, starts: Tensor, width: int) -> Tensor:
    """``[batch, width, ...]``: so many rows of ``packed`` from each start on; whatever there is behind the last one."""
    if packed.shape[0] == 0:
        return packed.new_zeros(starts.shape[0], width, *packed.shape[1:])
    places = starts[:, None] + torch.arange(width, device=packed.device)
    return packed[places.clamp(0, packed.shape[0] - 1)]


def verify_padded(
    verify_draft: Callable[..., Any],
    target_logits: Tensor,
    draft_tokens: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    draft_probs: Tensor | None = None,
    **options: Any,
) -> Any:
    """``verify_draft`` of packed requests, on padded copies of their rows; without synchronising the host."""
    starts, lens = starts_and_lengths(cu_seqlens)
    return verify_draft(
        padded(target_logits, starts + torch.arange(len(starts), device=starts.device), max_seqlen + 1),
        padded(draft_tokens, starts, max_seqlen),
        draft_lens=lens,
        draft_probs=None if draft_probs is None else padded(draft_probs, starts, max_seqlen),
        **options,
    )
