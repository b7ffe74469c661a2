"""Warps that run in step: their registers, and where each thread stands."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvops.autotune.machine.memory import SHARED_WINDOW

if TYPE_CHECKING:
    from kvops.autotune.machine.grid import Grid

_VIEWS = {"u16": ("u16", "i16", "f16"), "u32": ("u32", "i32", "f32"), "u64": ("u64", "i64", "f64")}
_NUMPY = {"u": np.uint8, "i": np.int8, "f": np.float16}


def dtype_of(name: str) -> Any:
    """``"u32"`` -> ``numpy.uint32``; ``"pred"`` is a bool."""
    if name == "pred":
        return np.bool_
    return np.dtype(f"{name[0]}{int(name[1:]) // 8}").type


class Team:
    """The threads of some warps, of one program or of several, one element of each array to a thread.

    ``rows["f32"][i]`` is register ``i`` of 32 bits as floats; ``rows["u32"][i]`` are the same bits.
    """

    def __init__(self, grid: Grid, slots: Sequence[int], programs: Sequence[int], warps: Sequence[int]) -> None:
        self.grid, self.clocks, self.slots = grid, grid.clocks, tuple(slots)
        threads = np.concatenate([np.arange(32 * warp, 32 * warp + 32) for warp in warps])
        self.size = len(slots) * len(threads)
        self.tid = np.tile(threads, len(slots)).astype(np.uint32)
        self.lane = self.tid & np.uint32(31)
        self.warp = (self.tid >> np.uint32(5)).astype(np.int64)
        self.slot = np.repeat(np.array(slots, np.int64), len(threads))
        self.program = np.repeat(np.array(programs, np.int64), len(threads))
        self.identity = self.program * 64 + self.warp + 1
        self.row = self.slot * grid.num_warps + self.warp
        self.shared_base = self.slot * grid.shared.stride - SHARED_WINDOW
        self.wide = self.size > 32
        self.everyone = np.arange(self.size)
        x, y, _ = grid.shape
        index = (self.program % x, self.program // x % y, self.program // (x * y))
        self._own_clocks, self._own_version = np.zeros(0, np.int32), -1
        self.special = {
            "%tid.x": self.tid,
            "%laneid": self.lane,
            "%warpid": self.warp.astype(np.uint32),
            "%ntid.x": self._constant(grid.num_warps * 32),
        }
        for axis, name in enumerate("xyz"):
            self.special[f"%ctaid.{name}"] = index[axis].astype(np.uint32)
            self.special[f"%nctaid.{name}"] = self._constant(grid.shape[axis])
            if axis:
                self.special[f"%tid.{name}"] = self._constant(0)
                self.special[f"%ntid.{name}"] = self._constant(1)
        self.rows: dict[str, list[np.ndarray]] = {}
        for kind, count in grid.program.register_counts.items():
            held = np.zeros((count, self.size), dtype_of(kind))
            for view in _VIEWS.get(kind, (kind,)):
                self.rows[view] = list(held.view(dtype_of(view)))
        # Control: one block for all, or a block for each thread once they have parted.
        self.block = 0
        self.blocks: np.ndarray | None = None
        self.done = np.zeros(self.size, bool)
        self.waiting = np.zeros(self.size, bool)
        self.barrier = np.zeros(self.size, np.int32)
        self.barrier_count = np.zeros(self.size, np.int32)
        self.barrier_at = np.zeros(self.size, np.int32)
        self.last_block = -1
        self.failed_wait = False  # the last block had an mbarrier whose phase was not over
        # cp.async: commits so far by thread, and the copies under way.
        self.commits = np.zeros(self.size, np.int64)
        self.copies: list[Any] = []
        # wgmma: registers that products under way write (accumulators) or read, and their groups.
        self.accumulators: dict[tuple[str, int], int] = {}
        self.held: dict[tuple[str, int], int] = {}
        self.products: list[Any] = []
        self.product_groups: deque[list[Any]] = deque()
        # TMA stores by warp: those since the last commit, and groups.
        self.stores: dict[int, list[Any]] = {}
        self.store_groups: dict[int, deque[list[Any]]] = {}

    def _constant(self, value: int) -> np.ndarray:
        return np.full(self.size, value, np.uint32)

    def full(self, value: Any) -> np.ndarray:
        """``value`` for each thread, where it was a constant."""
        if type(value) is np.ndarray and value.ndim:
            return value
        return np.broadcast_to(value, (self.size,))

    def clocks_of_warps(self) -> np.ndarray:
        """By thread: the clock of its own warp."""
        if self._own_version != self.clocks.version:
            self._own_clocks = self.clocks.table[self.row, self.warp]
            self._own_version = self.clocks.version
        return self._own_clocks

    def select(self, mask: np.ndarray | None, at: int) -> np.ndarray:
        """The threads that execute instruction ``at``; it is covered if there are any."""
        if mask is None:
            self.grid.execution.covered[at] = True
            return self.everyone
        lanes = np.flatnonzero(mask)
        if lanes.size:
            self.grid.execution.covered[at] = True
        return lanes

    def warps_of(self, lanes: np.ndarray) -> list[tuple[int, int, int]]:
        """(slot, warp, first of these lanes in it) of the warps that have a thread among ``lanes``."""
        _, first = np.unique(self.row[lanes], return_index=True)
        return [(int(self.slot[lane]), int(self.warp[lane]), int(lane)) for lane in lanes[first]]

    # --- products under way: registers that nobody may touch ---

    def touch(self, at: int, reads: frozenset[tuple[str, int]], writes: frozenset[tuple[str, int]]) -> None:
        """Instruction ``at`` reads and writes these registers while products are under way."""
        for registers in (reads, writes):
            for register in registers & self.accumulators.keys():
                kind = "an accumulator is touched before wgmma.wait_group"
                self.grid.execution.fault(kind, at, other=self.accumulators[register])
                return
        for register in writes & self.held.keys():
            kind = "an operand of a wgmma is overwritten before wgmma.wait_group"
            self.grid.execution.fault(kind, at, other=self.held[register])
            return
