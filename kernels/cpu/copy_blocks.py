"""Copies of whole blocks of a cache, on the CPU."""

from typing import NamedTuple

import torch
from numba import int32, uint8

from kvops.kernels.cpu.arguments import OUTSIDE, Binding, side_bytes, unpack
from kvops.kernels.cpu.jit import inner, jit
from kvops.kernels.cpu.threads import run_shares, worth
from kvops.kernels.cpu.vector import address_of, copy
from kvops.prepared import prepared


class Call(NamedTuple):
    k_cache: uint8[:, :, :]  # [num_blocks, block_size, D] bytes, and so are the next five, or empty
    v_cache: uint8[:, :, :]
    positions: uint8[:, :, :]
    scores: uint8[:, :, :]
    k_slot_scale: uint8[:, :, :]
    v_slot_scale: uint8[:, :, :]
    source: int32[:]
    target: int32[:]


@jit
def _copy_block(side, source, target):
    _, slots, width = side.shape
    if side.strides[1] == width:  # a block in one piece
        slots, width = min(slots, 1), slots * width
    for slot in range(slots):
        start = address_of(side) + slot * side.strides[1]
        copy(start + target * side.strides[0], start + source * side.strides[0], width)


@inner
def _copy_share(share, shares, call):
    for i in range(share, len(call.source), shares):
        if call.target[i] >= 0:
            _copy_block(call.k_cache, call.source[i], call.target[i])
            _copy_block(call.v_cache, call.source[i], call.target[i])
            _copy_block(call.positions, call.source[i], call.target[i])
            _copy_block(call.scores, call.source[i], call.target[i])
            _copy_block(call.k_slot_scale, call.source[i], call.target[i])
            _copy_block(call.v_slot_scale, call.source[i], call.target[i])


@jit
def _copy_blocks(addresses, table, threads):
    call = unpack(Call, addresses, table)
    for i in range(len(call.source)):
        most = max(call.source[i], call.target[i])
        if call.target[i] >= 0 and not (call.source[i] >= 0 and most < len(call.k_cache)):
            return OUTSIDE
    size = len(call.source) * call.k_cache.shape[1] * (call.k_cache.shape[2] + call.v_cache.shape[2])
    return run_shares(_copy_share, (call,), worth(threads, size))


def _bind(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
    k_slot_scale: torch.Tensor | None = None,
    v_slot_scale: torch.Tensor | None = None,
) -> Binding:
    return Binding(
        _copy_blocks,
        Call,
        k_cache=k_cache,
        v_cache=v_cache,
        positions=side_bytes(positions),
        scores=side_bytes(scores),
        k_slot_scale=side_bytes(k_slot_scale),
        v_slot_scale=side_bytes(v_slot_scale),
        source=source,
        target=target,
    )


@prepared(_bind)
def copy_blocks(
    binding: Binding,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
    k_slot_scale: torch.Tensor | None = None,
    v_slot_scale: torch.Tensor | None = None,
) -> None:
    """See :func:`kvops.copy_blocks`."""
    binding(k_cache, v_cache, positions, scores, k_slot_scale, v_slot_scale, source, target)
