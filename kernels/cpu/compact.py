"""Moving the kept slots of every list to its front, in order and in place, on the CPU."""

from typing import NamedTuple

import torch
from numba import boolean, int32, uint8

from kvops.kernels.cpu.arguments import OUTSIDE, Binding, side_bytes, unpack
from kvops.kernels.cpu.jit import inner, jit
from kvops.kernels.cpu.tables import lists_are_inside
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
    tables: int32[:, :, :]  # [B, Hkv, max_blocks]
    lens: int32[:, :]  # [B, Hkv]
    keep: boolean[:, :, :]  # [B, Hkv, max_blocks * block_size]
    freed: int32[:, :]  # [B, Hkv]


@jit
def _move(side, block, offset, to_block, to_offset):
    if side.size:
        source = address_of(side) + block * side.strides[0] + offset * side.strides[1]
        target = address_of(side) + to_block * side.strides[0] + to_offset * side.strides[1]
        copy(target, source, side.shape[2])


@inner
def _compact_share(share, shares, call):
    B, Hkv, _ = call.tables.shape
    size = call.k_cache.shape[1]
    for i in range(share, B * Hkv, shares):
        b, h = i // Hkv, i % Hkv
        table, length, kept = call.tables[b, h], call.lens[b, h], 0
        for slot in range(length):
            if not call.keep[b, h, slot]:
                continue
            if slot != kept:
                block, offset, to_block, to_offset = table[slot // size], slot % size, table[kept // size], kept % size
                _move(call.k_cache, block, offset, to_block, to_offset)
                _move(call.v_cache, block, offset, to_block, to_offset)
                _move(call.positions, block, offset, to_block, to_offset)
                _move(call.scores, block, offset, to_block, to_offset)
                _move(call.k_slot_scale, block, offset, to_block, to_offset)
                _move(call.v_slot_scale, block, offset, to_block, to_offset)
            kept += 1
        call.lens[b, h] = kept
        call.freed[b, h] = -(-length // size) - -(-kept // size)


@jit
def _compact(addresses, table, threads):
    call = unpack(Call, addresses, table)
    if not lists_are_inside(call.tables, call.lens, len(call.k_cache), call.k_cache.shape[1]):
        return OUTSIDE
    slots = 0
    for b in range(call.lens.shape[0]):
        for h in range(call.lens.shape[1]):
            slots += call.lens[b, h]
    threads = worth(threads, slots * (call.k_cache.shape[2] + call.v_cache.shape[2]))
    return run_shares(_compact_share, (call,), threads)


def _bind(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    keep: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
    k_slot_scale: torch.Tensor | None = None,
    v_slot_scale: torch.Tensor | None = None,
) -> Binding:
    return Binding(
        _compact,
        Call,
        k_cache=k_cache,
        v_cache=v_cache,
        positions=side_bytes(positions),
        scores=side_bytes(scores),
        k_slot_scale=side_bytes(k_slot_scale),
        v_slot_scale=side_bytes(v_slot_scale),
        tables=block_tables,
        lens=seq_lens,
        keep=keep,
        freed=torch.empty(seq_lens.shape, dtype=torch.int32),
    )


@prepared(_bind)
def compact(
    binding: Binding,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    keep: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
    k_slot_scale: torch.Tensor | None = None,
    v_slot_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`kvops.compact`."""
    freed = torch.empty(seq_lens.shape, dtype=torch.int32)
    sides = positions, scores, k_slot_scale, v_slot_scale
    binding(k_cache, v_cache, *sides, block_tables, seq_lens, keep, freed)
    return freed
