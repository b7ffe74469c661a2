"""Write new keys and values into the last slots of each head's list of blocks, on the CPU."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import float32, int32, int64, uint8

from kvops.kernels.cpu.arguments import OUTSIDE, Binding, for_heads, per_head, unpack
from kvops.kernels.cpu.elements import E5M2, FORMATS, INT8, padded, to_e4m3, to_e5m2, to_int8, widen
from kvops.kernels.cpu.jit import exact, inner, jit
from kvops.kernels.cpu.paged_items import list_of, new_tokens
from kvops.kernels.cpu.tables import blocks_are_inside, counts_are_inside
from kvops.kernels.cpu.threads import run_shares, worth
from kvops.kernels.cpu.vector import address_of, copy
from kvops.prepared import prepared


class Call(NamedTuple):
    """The arguments of one call; what is not given has size 0. Keys and values are bytes."""

    k: uint8[:, :, :, :]  # [B, T, Hkv, D]; packed [1, tokens, Hkv, D]
    v: uint8[:, :, :, :]
    k_cache: uint8[:, :, :, :]  # [num_blocks, block_size, Hkv, D]
    v_cache: uint8[:, :, :, :]
    tables: int32[:, :, :]  # [B, Hkv, max_blocks]
    lens: int32[:, :]  # [B, Hkv]
    counts: int32[:]  # [B], real tokens
    starts: int32[:]  # [B + 1], where the tokens of each packed sequence begin
    positions: int32[:, :, :]  # [num_blocks, block_size, Hkv]
    token_positions: int32[:, :]  # [B, T]; packed [1, tokens]
    scores: float32[:, :, :]  # [num_blocks, block_size, Hkv]
    k_scale: float32[:]  # [Hkv]
    v_scale: float32[:]
    k_slot_scale: float32[:, :, :]  # [num_blocks, block_size, Hkv]
    v_slot_scale: float32[:, :, :]
    tokens: int64  # the most new tokens of a sequence
    element: int64  # of k and v
    k_element: int64  # of k_cache
    v_element: int64


@jit
def _row_scale(row, element):
    """The scale of a row in a cache of this format: its largest finite magnitude becomes the largest number of the
    format. Not below the smallest normal float32, by which zeros are divided."""
    most = np.float32(0)
    for x in row:
        magnitude = abs(x)
        if magnitude < np.inf:
            most = max(most, magnitude)
    largest = 127.0 if element == INT8 else 57344.0 if element == E5M2 else 448.0
    return max(np.float32(np.float64(most) / largest), np.float32(1.1754943508222875e-38))


@exact
def _quotient(x, scale):
    """Rounded once: LLVM may make a product with the inverse of any other, a quotient in float64 included."""
    return x / scale


@jit
def _write(source, element, target, target_element, width, scale, slot_scales, block, offset, h, room):
    """One row of ``width`` bytes; in another format its numbers divided by ``scale``, or by a scale of their own, which
    is written to ``slot_scales``."""
    if target_element == element:
        copy(address_of(target), address_of(source), width)
        return
    widen(address_of(source), element, len(target), address_of(room))
    if slot_scales.size:
        scale = _row_scale(room[: len(target)], target_element)
        slot_scales[block, offset, h] = scale
    for d in range(len(target)):
        x = _quotient(room[d], scale)
        if target_element == INT8:
            target[d] = to_int8(x)
        elif target_element == E5M2:
            target[d] = to_e5m2(x)
        else:
            target[d] = to_e4m3(x)


@inner
def _append_share(share, shares, call):
    B, T, Hkv, _ = call.k.shape
    size = call.k_cache.shape[1]
    room = np.empty(padded(max(call.k_cache.shape[3], call.v_cache.shape[3])), np.float32)
    rows = B * T * Hkv
    for row in range(rows * share // shares, rows * (share + 1) // shares):
        b, n, h = row // (T * Hkv), row // Hkv % T, row % Hkv
        sequence = list_of(call.starts, n) if call.starts.size else b
        if sequence == len(call.lens):
            continue
        _, first_token, count = new_tokens(call, sequence)
        t = n - first_token
        if t < 0 or t >= count:
            continue
        slot = call.lens[sequence, h] - count + t
        if slot < 0:
            continue
        block, offset = call.tables[sequence, h, slot // size], slot % size
        k_scale = call.k_scale[h] if call.k_scale.size else np.float32(1)
        v_scale = call.v_scale[h] if call.v_scale.size else np.float32(1)
        _write(
            call.k[b, n, h], call.element, call.k_cache[block, offset, h], call.k_element, call.k.shape[3], k_scale,
            call.k_slot_scale, block, offset, h, room,
        )  # fmt: skip
        _write(
            call.v[b, n, h], call.element, call.v_cache[block, offset, h], call.v_element, call.v.shape[3], v_scale,
            call.v_slot_scale, block, offset, h, room,
        )  # fmt: skip
        if call.positions.size:
            call.positions[block, offset, h] = call.token_positions[b, n]
        if call.scores.size:
            call.scores[block, offset, h] = 0


@inner
def _writes_inside(call):
    """Whether the tokens are in k, the lists that get some fit in their tables, and the blocks of these tokens are in
    the cache."""
    if not counts_are_inside(call.counts, call.tokens):
        return False
    num_blocks, size = call.k_cache.shape[:2]
    for b in range(len(call.lens)):
        _, _, count = new_tokens(call, b)
        for h in range(call.lens.shape[1] if count > 0 else 0):
            length = np.int64(call.lens[b, h])
            if not 0 <= length <= call.tables.shape[2] * size:
                return False
            first = max(length - count, 0) // size
            if not blocks_are_inside(call.tables[b, h], first, -(-length // size), num_blocks):
                return False
    return True


@jit
def _append(addresses, table, threads):
    call = unpack(Call, addresses, table)
    if not _writes_inside(call):
        return OUTSIDE
    return run_shares(_append_share, (call,), worth(threads, call.k.size + call.v.size))


def _bind(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    **given: Any,
) -> Binding:
    token_positions = given.get("token_positions")
    if cu_seqlens_q is not None:
        k, v = k[None], v[None]
        token_positions = None if token_positions is None else token_positions[None]
    heads = k.shape[2]
    if k_cache.dim() == 4:
        block_tables, seq_lens = (x.unsqueeze(1).expand(-1, heads, *x.shape[1:]) for x in (block_tables, seq_lens))
    return Binding(
        _append,
        Call,
        k=k,
        v=v,
        k_cache=per_head(k_cache, heads, 4),
        v_cache=per_head(v_cache, heads, 4),
        tables=block_tables,
        lens=seq_lens,
        counts=given.get("q_lens"),
        starts=cu_seqlens_q,
        positions=per_head(given.get("positions"), heads, 3),
        token_positions=token_positions,
        scores=per_head(given.get("scores"), heads, 3),
        k_scale=for_heads(given.get("k_scale"), heads),
        v_scale=for_heads(given.get("v_scale"), heads),
        k_slot_scale=per_head(given.get("k_slot_scale"), heads, 3),
        v_slot_scale=per_head(given.get("v_slot_scale"), heads, 3),
        tokens=k.shape[1],
        element=FORMATS[k.dtype],
        k_element=FORMATS[k_cache.dtype],
        v_element=FORMATS[v_cache.dtype],
    )


@prepared(_bind)
def paged_append(
    binding: Binding,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    q_lens: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    token_positions: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    k_slot_scale: torch.Tensor | None = None,
    v_slot_scale: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    **bound: object,
) -> None:
    """See :func:`kvops.paged_append`."""
    binding(
        k, v, k_cache, v_cache, block_tables, seq_lens, q_lens, cu_seqlens_q, positions, token_positions, scores,
        k_scale, v_scale, k_slot_scale, v_slot_scale,
    )  # fmt: skip
