"""Eviction: select the slots of a ragged paged cache that fit a budget, and move them together to free blocks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvops import checks
from kvops.eager import eviction as eager
from kvops.ops.registry import caller, register

SCOPES = ("head", "sequence")


def _check_lists(block_tables: Tensor, seq_lens: Tensor, num_blocks: int, block_size: int, where: str) -> None:
    """Tables int32 [B, Hkv, max_blocks] and lengths int32 [B, Hkv] into the blocks of ``where``."""
    checks.expect_at_least(f"{where}: block_size", block_size, 1)
    checks.expect_dtype("block_tables", block_tables, torch.int32)
    checks.expect_rank("block_tables", block_tables, "[B, Hkv, max_blocks]")
    checks.expect_last_contiguous("block_tables", block_tables)
    checks.expect_dtype("seq_lens", seq_lens, torch.int32)
    checks.expect_shape("seq_lens", seq_lens, "[B, Hkv]", *block_tables.shape[:2])
    checks.expect_same_device("seq_lens", seq_lens, "block_tables", block_tables)
    if checks.debug() and checks.has_data(seq_lens):
        checks.expect_inside(block_tables, seq_lens, num_blocks, block_size)


def _check_side(name: str, side: Tensor, dtype: torch.dtype, num_blocks: int, block_size: int) -> None:
    checks.expect_dtype(name, side, dtype)
    checks.expect_shape(name, side, "[num_blocks, block_size]", num_blocks, block_size)
    checks.expect_last_contiguous(name, side)


def _check_select_blocks(
    scores: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    budget: Tensor,
    *,
    positions: Tensor | None = None,
    protect_first: int = 0,
    protect_last: int = 0,
    min_per_head: int = 0,
    scope: str = "head",
) -> None:
    checks.expect_dtype("scores", scores, torch.float32)
    checks.expect_rank("scores", scores, "[num_blocks, block_size]")
    checks.expect_last_contiguous("scores", scores)
    num_blocks, block_size = scores.shape
    _check_lists(block_tables, seq_lens, num_blocks, block_size, "scores")
    checks.expect_same_device("block_tables", block_tables, "scores", scores)
    checks.expect_dtype("budget", budget, torch.int32)
    checks.expect_shape("budget", budget, "[B]", block_tables.shape[0])
    checks.expect_same_device("budget", budget, "scores", scores)
    if positions is not None:
        _check_side("positions", positions, torch.int32, num_blocks, block_size)
        checks.expect_same_device("positions", positions, "scores", scores)
    checks.expect_at_least("protect_first", protect_first, 0)
    checks.expect_at_least("protect_last", protect_last, 0)
    checks.expect_at_least("min_per_head", min_per_head, 0)
    checks.expect_choice("scope", scope, SCOPES)


def _fake_select_blocks(
    scores: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    budget: Tensor,
    *,
    positions: Tensor | None = None,
    protect_first: int = 0,
    protect_last: int = 0,
    min_per_head: int = 0,
    scope: str = "head",
) -> tuple[Tensor, Tensor]:
    batch, heads, table = block_tables.shape
    return (
        scores.new_empty((batch, heads), dtype=torch.int32),
        scores.new_empty((batch, heads, table * scores.shape[1]), dtype=torch.bool),
    )


def _check_compact(
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    keep: Tensor,
    *,
    positions: Tensor | None = None,
    scores: Tensor | None = None,
    k_slot_scale: Tensor | None = None,
    v_slot_scale: Tensor | None = None,
) -> None:
    checks.expect_rank("k_cache", k_cache, "[num_blocks, block_size, D]")
    checks.expect_last_contiguous("k_cache", k_cache)
    num_blocks, block_size = k_cache.shape[:2]
    checks.expect_shape("v_cache", v_cache, "[num_blocks, block_size, Dv]", num_blocks, block_size, None)
    checks.expect_last_contiguous("v_cache", v_cache)
    for name, side in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.expect_at_least(f"{name}.shape[-1] (head_dim)", side.shape[-1], 1)
        if side.element_size() not in eager.INTEGERS:
            raise TypeError(f"{name}: expected elements of 1, 2, 4 or 8 bytes, got {side.dtype}")
    checks.expect_same_device("v_cache", v_cache, "k_cache", k_cache)
    _check_lists(block_tables, seq_lens, num_blocks, block_size, "k_cache")
    checks.expect_same_device("block_tables", block_tables, "k_cache", k_cache)
    checks.expect_dtype("keep", keep, torch.bool)
    batch, heads, table = block_tables.shape
    checks.expect_shape("keep", keep, "[B, Hkv, max_blocks * block_size]", batch, heads, table * block_size)
    checks.expect_last_contiguous("keep", keep)
    checks.expect_same_device("keep", keep, "k_cache", k_cache)
    sides = {"positions": positions, "scores": scores, "k_slot_scale": k_slot_scale, "v_slot_scale": v_slot_scale}
    for name, array in sides.items():
        if array is not None:
            _check_side(name, array, torch.int32 if name == "positions" else torch.float32, num_blocks, block_size)
            checks.expect_same_device(name, array, "k_cache", k_cache)


def _fake_compact(
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    keep: Tensor,
    *,
    positions: Tensor | None = None,
    scores: Tensor | None = None,
    k_slot_scale: Tensor | None = None,
    v_slot_scale: Tensor | None = None,
) -> Tensor:
    return seq_lens.new_empty(seq_lens.shape)


_select_blocks = caller(
    register(
        "select_blocks(Tensor scores, Tensor block_tables, Tensor seq_lens, Tensor budget, *, Tensor? positions=None, "
        'int protect_first=0, int protect_last=0, int min_per_head=0, str scope="head") -> (Tensor, Tensor)',
        check=_check_select_blocks,
        fake=_fake_select_blocks,
        eager=eager.select_blocks,
        kernel="kvops.kernels.select_blocks:select_blocks",
        cpu="kvops.kernels.cpu.select_blocks:select_blocks",
    )
)

_compact = caller(
    register(
        "compact(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor block_tables, Tensor(c!) seq_lens, Tensor keep, *, "
        "Tensor(d!)? positions=None, Tensor(e!)? scores=None, Tensor(f!)? k_slot_scale=None, "
        "Tensor(g!)? v_slot_scale=None) -> Tensor",
        check=_check_compact,
        fake=_fake_compact,
        eager=eager.compact,
        kernel="kvops.kernels.compact:compact",
        cpu="kvops.kernels.cpu.compact:compact",
    )
)


def select_blocks(
    scores: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    budget: Tensor,
    *,
    positions: Tensor | None = None,
    protect_first: int = 0,
    protect_last: int = 0,
    min_per_head: int = 0,
    scope: Literal["head", "sequence"] = "head",
) -> tuple[Tensor, Tensor]:
    """Choose the slots that survive if each sequence may hold ``budget`` blocks in all its heads together.

    Heads get whole blocks. A head with n blocks keeps its best ``min(seq_len, n * block_size)`` slots, so that blocks
    are filled. Slots with higher scores survive, and of equal scores the later slot. NaN counts as lowest, below -inf.
    The choice for a sequence does not depend on the rest of the batch.

    Args:
        scores: float32 ``[num_blocks, block_size]``, addressed by slot like the cache.
        block_tables: int32 ``[B, Hkv, max_blocks]``. "Heads" may be any number of (layer, head) pairs laid along Hkv.
        seq_lens: int32 ``[B, Hkv]``, slots in use of each list.
        budget: int32 ``[B]``, blocks. A negative one counts as 0.
        positions: int32 ``[num_blocks, block_size]``, the original positions, in which protection is measured.
        protect_first: positions below this number are always kept (attention sinks). Without ``positions``, the place
            in the list counts.
        protect_last: the number of last positions of a list that are always kept, counted from its last slot.
        min_per_head: the least slots that each head keeps (or all, if it has fewer).
        scope: ``"head"``: all heads of a sequence get the same share of the budget. Blocks that a head cannot use
            (because its list is shorter) and the remainder go to the other heads, the first heads first. A head whose
            protected slots and minimum take more than its share gets these, and the others get less.
            ``"sequence"``: heads compete. The next best ``block_size`` slots of a head are a candidate. Its value is
            the sum of their scores (missing slots of a list's last block count as its lowest score or 0, whichever is
            less). The most valuable candidates of all heads are kept; of equal ones the one that ranks higher in its
            own head, then the one of the first head. For non-negative scores the kept sum is the maximum.

    Returns:
        ``new_lens`` int32 ``[B, Hkv]`` and ``keep`` bool ``[B, Hkv, max_blocks * block_size]`` in list order, False
        past a list's length.

    The blocks kept never exceed the budget, unless the protected slots and minimums alone do. These are then kept, and
    nothing else.

    After Feng et al., "Ada-KV" (2024), and Rehg, "KV-Compress" (2024), for competition between heads. Raises ValueError
    for wrong shapes, devices, strides or values, and on the CPU, and elsewhere with ``KVOPS_DEBUG=1``, for table
    entries and lengths out of range; TypeError for wrong dtypes.
    """
    return _select_blocks(
        scores,
        block_tables,
        seq_lens,
        budget,
        positions=positions,
        protect_first=protect_first,
        protect_last=protect_last,
        min_per_head=min_per_head,
        scope=scope,
    )


def compact(
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    keep: Tensor,
    *,
    positions: Tensor | None = None,
    scores: Tensor | None = None,
    k_slot_scale: Tensor | None = None,
    v_slot_scale: Tensor | None = None,
) -> Tensor:
    """Move the kept slots of every list to its front, in order and in place, and shorten the list to them.

    Bytes are moved, so any dtype of 1, 2, 4 or 8 bytes is moved exactly, float8 included. The lists must not share
    blocks.

    Args:
        k_cache, v_cache: ``[num_blocks, block_size, D]`` and ``[..., Dv]``, changed in place.
        block_tables: int32 ``[B, Hkv, max_blocks]``, not changed.
        seq_lens: int32 ``[B, Hkv]``, replaced by the number of kept slots.
        keep: bool ``[B, Hkv, max_blocks * block_size]`` in list order; entries past a list's length are ignored.
        positions, scores: int32 and float32 ``[num_blocks, block_size]``, moved along if given.
        k_slot_scale, v_slot_scale: float32 ``[num_blocks, block_size]``, moved along if given: the scales of the slots
            of a float8 or int8 cache.

    Returns:
        ``freed`` int32 ``[B, Hkv]``: the number of blocks of the old list that are no longer needed. They are the last
        ones of the list. The caller returns them to its pool.

    Raises ValueError for wrong shapes, devices or strides, and on the CPU, and elsewhere with ``KVOPS_DEBUG=1``, for
    table entries and lengths out of range; TypeError for wrong dtypes.
    """
    return _compact(  # type: ignore[no-any-return]
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        keep,
        positions=positions,
        scores=scores,
        k_slot_scale=k_slot_scale,
        v_slot_scale=v_slot_scale,
    )
