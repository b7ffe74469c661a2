"""Copies of whole blocks: the CPU implementation of :mod:`kvops.ops.blocks`."""

from __future__ import annotations

import torch
from torch import Tensor

from kvops.checks import expect_data
from kvops.eager.eviction import INTEGERS


def expect_blocks(source: Tensor, target: Tensor, num_blocks: int) -> None:
    """Check that blocks that are copied, and their targets, are in the cache."""
    inside = (source >= 0) & (source < num_blocks)
    expect_data("source", f"blocks from 0 to {num_blocks - 1}", inside | (target < 0))
    expect_data("target", f"blocks up to {num_blocks - 1}", target < num_blocks)


def copy_blocks(
    k_cache: Tensor,
    v_cache: Tensor,
    source: Tensor,
    target: Tensor,
    *,
    positions: Tensor | None = None,
    scores: Tensor | None = None,
    k_slot_scale: Tensor | None = None,
    v_slot_scale: Tensor | None = None,
) -> None:
    expect_blocks(source, target, len(k_cache))
    entries = (target >= 0).nonzero().flatten()
    if len(entries) == 0:
        return
    source, target = source[entries].long(), target[entries].long()
    for side in (k_cache, v_cache, positions, scores, k_slot_scale, v_slot_scale):
        if side is not None:
            bits = side.view(INTEGERS[side.element_size()])
            bits.index_copy_(0, target, torch.index_select(bits, 0, source))
