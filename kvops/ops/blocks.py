"""Copies of whole blocks of a ragged paged cache, for copy-on-write."""

from __future__ import annotations

import torch
from torch import Tensor

from kvops import checks
from kvops.eager import blocks as eager
from kvops.eager.eviction import INTEGERS
from kvops.ops.registry import caller, register


def _check_copy_blocks(
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
    checks.expect_rank("k_cache", k_cache, "[num_blocks, block_size, D]")
    num_blocks, block_size = k_cache.shape[:2]
    checks.expect_shape("v_cache", v_cache, "[num_blocks, block_size, Dv]", num_blocks, block_size, None)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.element_size() not in INTEGERS:
            raise TypeError(f"{name}: expected elements of 1, 2, 4 or 8 bytes, got {cache.dtype}")
        checks.expect_last_contiguous(name, cache)
    sides = {"positions": positions, "scores": scores, "k_slot_scale": k_slot_scale, "v_slot_scale": v_slot_scale}
    for name, side in sides.items():
        if side is not None:
            checks.expect_dtype(name, side, torch.int32 if name == "positions" else torch.float32)
            checks.expect_shape(name, side, "[num_blocks, block_size]", num_blocks, block_size)
            checks.expect_last_contiguous(name, side)
    for name, numbers in (("source", source), ("target", target)):
        checks.expect_dtype(name, numbers, torch.int32)
        checks.expect_rank(name, numbers, "[N]")
    checks.expect_shape("target", target, "[N] as source", source.shape[0])
    others = {"v_cache": v_cache, "source": source, "target": target}
    for name, other in (others | sides).items():
        if other is not None:
            checks.expect_same_device(name, other, "k_cache", k_cache)
    if checks.debug() and checks.has_data(source):
        eager.expect_blocks(source, target, num_blocks)


def _fake_copy_blocks(*args: object, **kwargs: object) -> None:
    return None


_copy_blocks = caller(
    register(
        "copy_blocks(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor source, Tensor target, *, "
        "Tensor(c!)? positions=None, Tensor(d!)? scores=None, Tensor(e!)? k_slot_scale=None, "
        "Tensor(f!)? v_slot_scale=None) -> ()",
        check=_check_copy_blocks,
        fake=_fake_copy_blocks,
        eager=eager.copy_blocks,
        kernel="kvops.kernels.copy_blocks:copy_blocks",
        cpu="kvops.kernels.cpu.copy_blocks:copy_blocks",
    )
)


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
    """Copy blocks of a cache to other blocks of it, byte by byte.

    The number of copies may be known on the device alone: an entry with a negative target copies nothing.

    Args:
        k_cache, v_cache: ``[num_blocks, block_size, D]`` and ``[..., Dv]`` of any dtype of 1, 2, 4 or 8 bytes, written.
        source: int32 ``[N]``, the blocks to read; ignored if the target is negative.
        target: int32 ``[N]``, the blocks to write. They must differ from each other and from every source.
        positions, scores: int32 and float32 ``[num_blocks, block_size]``, copied along where given.
        k_slot_scale, v_slot_scale: float32 ``[num_blocks, block_size]``, copied along where given: the scales of the
            slots of a float8 or int8 cache.

    Raises ValueError for wrong shapes, devices or strides, and on the CPU, and elsewhere with ``KVOPS_DEBUG=1``, for
    numbers out of range; TypeError for wrong dtypes.
    """
    _copy_blocks(
        k_cache,
        v_cache,
        source,
        target,
        positions=positions,
        scores=scores,
        k_slot_scale=k_slot_scale,
        v_slot_scale=v_slot_scale,
    )
