"""Who touched a piece of memory last, and whether that is ordered before who touches it now: vector clocks.

Every warp has a clock for each warp of its program and for each mbarrier: what it knows to have happened. Barriers and
mbarriers hand that knowledge on. A write remembers the writer and the writer's clock; an access by a warp that does not
know of that clock yet may come before or after it on a GPU: that is a race, in whatever order they ran here.

Shadow memory has one cell for each granule, the size of the smallest access of the kernel.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kvops.autotune.machine.report import Execution
    from kvops.autotune.machine.team import Team
    from kvops.autotune.machine.updates import Update

# mbarriers of one program that a vector clock has room for.
MAX_MBARRIERS = 32
# Among the slots with unordered writes: what an mbarrier announces no barrier orders.
_BY_MBARRIERS = -1
# Instructions whose reads are kept until a write asks who has read.
_UNNOTED = 500
_WARP_BITS = 6
_CELL_BITS = 40


class Clocks:
    """``table[slot * num_warps + warp]`` is what a warp knows: the clocks of all warps, then phases of mbarriers."""

    def __init__(self, slots: int, num_warps: int) -> None:
        self.num_warps = num_warps
        self.width = num_warps + MAX_MBARRIERS
        self.table = np.zeros((slots * num_warps, self.width), np.int32)
        self.version = 0  # counts changes of a warp's own clock
        # By slot and warp: for each fence between the proxies, the warp's own clock and what it knew.
        self.fences: dict[tuple[int, int], list[tuple[int, np.ndarray]]] = {}

    def clear(self, slot: int) -> None:
        self.version += 1
        rows = slice(slot * self.num_warps, (slot + 1) * self.num_warps)
        self.table[rows] = 0
        self.table[rows, : self.num_warps] = np.eye(self.num_warps, dtype=np.int32)
        for key in [key for key in self.fences if key[0] == slot]:
            del self.fences[key]

    def join(self, slot: int, warps: list[int]) -> None:
        """What one of these warps knows, all know from here on: a barrier."""
        self.version += 1
        rows = slot * self.num_warps + np.array(warps)
        self.table[rows] = self.table[rows].max(0)
        self.table[rows, warps] += 1

    def join_all(self, slots: Sequence[int]) -> None:
        """A barrier of all warps, in each of these slots."""
        self.version += 1
        table = self.table.reshape(-1, self.num_warps, self.width)
        held = table[slots]
        held[:] = held.max(1, keepdims=True)
        warps = np.arange(self.num_warps)
        held[:, warps, warps] += 1
        table[slots] = held

    def row(self, slot: int, warp: int) -> np.ndarray:
        return self.table[slot * self.num_warps + warp]

    def tick(self, slot: int, warp: int) -> None:
        self.version += 1
        self.table[slot * self.num_warps + warp, warp] += 1

    def fence(self, slot: int, warp: int) -> None:
        """The writes that this warp knows of may be read through the asynchronous proxy, by warps that know of it."""
        self.tick(slot, warp)
        row = self.row(slot, warp)
        self.fences.setdefault((slot, warp), []).append((int(row[warp]), row.copy()))

    def fenced(self, slot: int, warp: int) -> np.ndarray:
        """The clocks of all warps up to which a fence stands between their writes and what ``warp`` does now."""
        known = self.row(slot, warp)
        bound = np.zeros(self.width, np.int32)
        for other in range(self.num_warps):
            for clock, snapshot in reversed(self.fences.get((slot, other), ())):
                if clock <= known[other]:
                    np.maximum(bound, snapshot, out=bound)
                    break
        return bound


# Team, lanes, cells, the clocks of all of the team's threads, instruction.
_Read = tuple["Team", np.ndarray, np.ndarray, np.ndarray, int]


class _Shadow:
    def __init__(self, execution: Execution, size: int, num_warps: int) -> None:
        self.execution, self.num_warps = execution, num_warps
        self.writer = np.zeros(size, np.int64)
        self.write_clock = np.zeros(size, np.int32)
        self.write_at = np.full(size, -1, np.int32)
        self.read_at = np.full(size, -1, np.int32)
        self.atomic = np.zeros(size, bool)

    def _race(
        self, what: str, team: Team, lanes: np.ndarray, bad: np.ndarray, at: int, others: np.ndarray, benign: bool
    ) -> None:
        """``bad`` is [lanes, cells]; ``others`` has the instruction that each of them clashes with."""
        lane = int(lanes[np.flatnonzero(bad.any(1))[0]])
        other = int(others[bad][0])
        detail = f"warp {int(team.warp[lane])} of program {int(team.program[lane])}"
        self.execution.fault(what, at, detail, other=other, lanes=int(bad.any(1).sum()), benign=benign)


class SharedShadow(_Shadow):
    """Shared memory: ``writer`` is a warp, or ``num_warps`` + an mbarrier for a copy that this mbarrier announced.

    What a barrier of the whole program has ordered needs no look at clocks: ``unordered`` has the slots with writes
    since their last one, and reads are noted only once a thread writes before the next one.
    """

    def __init__(self, execution: Execution, size: int, num_warps: int) -> None:
        super().__init__(execution, size, num_warps)
        self.initialised = np.zeros(size, bool)
        self.reads = np.zeros((size, num_warps), np.int32)  # clock of each warp's last read
        self.copies = np.zeros(size, np.int16)  # asynchronous writes under way
        self.async_reads = np.zeros(size, np.int16)  # asynchronous reads under way
        self.generic = np.zeros(size, bool)  # last written by ordinary stores
        self.asynchronous = False  # whether any copy or asynchronous read has begun
        self.unordered: set[int] = set()
        self.unordered_reads = False
        self.unnoted: list[_Read] = []

    def clear(self, slot: int, start: int, end: int) -> None:
        self._note_reads()
        self.unordered.discard(slot)
        part = slice(start, end)
        for array in (self.writer, self.write_clock, self.initialised, self.reads, self.copies, self.async_reads):
            array[part] = 0
        self.atomic[part] = self.generic[part] = False

    def barrier(self, slots: Sequence[int], everyone: bool) -> None:
        """All warps of these slots have met; ``everyone``: these are all the slots in which programs run."""
        self.unordered.difference_update(slots)
        if everyone:
            self.unnoted.clear()
            self.unordered_reads = False

    def read(self, team: Team, lanes: np.ndarray, cells: np.ndarray, at: int) -> None:
        if self.unordered:
            known = team.clocks.table[team.row[lanes][:, None], self.writer.take(cells)]
            bad = known < self.write_clock.take(cells)
            if np.count_nonzero(bad):
                kind = "race in shared memory, read after write"
                self._race(kind, team, lanes, bad, at, self.write_at[cells], benign=False)
        self._must_hold_data(lanes, cells, at)
        self.unnoted.append((team, lanes, cells, team.clocks_of_warps(), at))
        if len(self.unnoted) > _UNNOTED:
            self._note_reads()

    def _note_reads(self) -> None:
        for team, lanes, cells, clocks, at in self.unnoted:
            self.reads[cells, team.warp[lanes][:, None]] = clocks[lanes][:, None]
            self.read_at[cells] = at
            self.unordered_reads = True
        self.unnoted.clear()

    def _must_hold_data(self, lanes: np.ndarray, cells: np.ndarray, at: int) -> None:
        held = self.initialised.take(cells)
        if np.count_nonzero(held) != held.size:
            self.execution.fault("shared memory is read before it is written", at, lanes=int((~held).any(-1).sum()))
        if self.asynchronous:
            bad = self.copies.take(cells) > 0
            if np.count_nonzero(bad):
                self.execution.fault("shared memory is read while a copy to it is under way", at, lanes=int(bad.sum()))

    def write(
        self,
        team: Team,
        lanes: np.ndarray,
        cells: np.ndarray,
        at: int,
        same: Callable[[], np.ndarray] | None = None,
        atomic: bool = False,
        generic: bool = True,
    ) -> None:
        """``same`` tells, lane by lane, whether memory holds the very value already."""
        self._note_reads()
        rows, warps = team.row[lanes][:, None], team.warp[lanes][:, None]
        table = team.clocks.table
        ordered = self.atomic[cells] if atomic else np.zeros(1, bool)
        if self.unordered:
            bad = (table[rows, self.writer.take(cells)] < self.write_clock.take(cells)) & ~ordered
            if np.count_nonzero(bad):
                benign = same is not None and bool(same()[bad.any(1)].all())
                kind = "race in shared memory, write after write" + (" of the same value" if benign else "")
                self._race(kind, team, lanes, bad, at, self.write_at[cells], benign)
        if self.unordered_reads:
            late = self.reads[cells] > table[team.row[lanes], : self.num_warps][:, None, :]
            bad = late.any(2) & ~ordered
            if bad.any():
                self._race("race in shared memory, write after read", team, lanes, bad, at, self.read_at[cells], False)
        if self.asynchronous and (self.async_reads[cells] > 0).any():
            self.execution.fault("shared memory is written while a wgmma or a TMA store reads it", at)
        self.unordered.update(team.slots)
        self.writer[cells] = warps
        self.write_clock[cells] = table[rows, warps]
        self.write_at[cells] = at
        self.initialised[cells] = True
        self.atomic[cells] = atomic
        self.generic[cells] = generic

    def meet(self, team: Team, lanes: np.ndarray, cells: np.ndarray, at: int, same: Callable[[], np.ndarray]) -> None:
        """Two warps that run in step have stored in one cell by one instruction; ``same`` tells whether memory holds
        each lane's value now."""
        bad = self.writer[cells] != team.warp[lanes][:, None]
        if bad.any():
            benign = bool(same()[bad.any(1)].all())
            kind = "race in shared memory, write after write" + (" of the same value" if benign else "")
            self._race(kind, team, lanes, bad, at, self.write_at[cells], benign)

    def read_asynchronously(self, team: Team, lanes: np.ndarray, cells: np.ndarray, at: int, what: str) -> None:
        """wgmma, or a TMA store, by the warps of ``lanes``: until :meth:`finish_reading` nobody may write to these
        cells (each of them once)."""
        self.asynchronous = True
        rows = team.row[lanes]
        bad = team.clocks.table[rows].min(0)[self.writer[cells]] < self.write_clock[cells]
        if bad.any():
            kind = f"race in shared memory, {what} after write"
            self._race(kind, team, lanes[:1], bad[None], at, self.write_at[cells][None], False)
        self._must_hold_data(lanes[:1], cells[None], at)
        generic = self.generic[cells]
        if generic.any():
            bound = np.min([team.clocks.fenced(int(team.slot[x]), int(team.warp[x])) for x in lanes.tolist()], axis=0)
            bad = generic & (bound[self.writer[cells]] < self.write_clock[cells])
            if bad.any():
                other = int(self.write_at[cells][bad][0])
                kind = f"{what} of what ordinary stores have written, without fence.proxy.async between"
                self.execution.fault(kind, at, other=other)
        self.async_reads[cells] += 1
        self.read_at[cells] = at

    def finish_reading(self, team: Team, lanes: np.ndarray, cells: np.ndarray) -> None:
        """The read is over, and the warps of ``lanes`` know that."""
        self._note_reads()
        self.unordered_reads = True
        self.async_reads[cells] -= 1
        for lane in lanes.tolist():
            warp = int(team.warp[lane])
            self.reads[cells, warp] = team.clocks.row(int(team.slot[lane]), warp)[warp]

    def copy_asynchronously(self, team: Team, lane: int, cells: np.ndarray, at: int) -> None:
        """A TMA load begins: from now until its mbarrier says so, nobody may touch these cells."""
        self._note_reads()
        self.asynchronous = True
        lanes, row = np.array([lane]), team.clocks.table[team.row[lane]]
        bad = row[self.writer[cells]] < self.write_clock[cells]
        if bad.any():
            self._race(
                "race in shared memory, TMA load after write",
                team,
                lanes,
                bad[None],
                at,
                self.write_at[cells][None],
                False,
            )
        late = (self.reads[cells] > row[: self.num_warps]).any(1)
        if late.any():
            self._race(
                "race in shared memory, TMA load after read",
                team,
                lanes,
                late[None],
                at,
                self.read_at[cells][None],
                False,
            )
        if (self.async_reads[cells] > 0).any():
            kind = "shared memory is overwritten by a TMA load while a wgmma or a TMA store reads it"
            self.execution.fault(kind, at)
        if (self.copies[cells] > 0).any():
            self.execution.fault("two copies to the same shared memory are under way", at)
        self.copies[cells] += 1

    def finish_copy(self, cells: np.ndarray, writer: int, clock: int, at: int) -> None:
        self.copies[cells] -= 1
        self.unordered.add(_BY_MBARRIERS)
        self.writer[cells] = writer
        self.write_clock[cells] = clock
        self.write_at[cells] = at
        self.initialised[cells] = True
        self.atomic[cells] = self.generic[cells] = False


class GlobalShadow(_Shadow):
    """Global memory: ``writer`` is program * 64 + warp + 1, ``reader`` program + 1, and 0 is nobody. Programs of one
    launch are never ordered.

    Tensor ``t`` begins at ``first_cells[t]``. Reads of a tensor are noted only once a thread writes to it.
    """

    def __init__(self, execution: Execution, size: int, num_warps: int, first_cells: list[int]) -> None:
        super().__init__(execution, size, num_warps)
        self.first_cells = first_cells
        self.written: set[int] = set()
        self.unnoted: dict[int, list[_Read]] = {}
        self.unnoted_count = 0
        self.all_initialised = True
        self.initialised = np.ones(size, bool)
        self.reader = np.zeros(size, np.int64)
        self.reads = np.zeros((size, num_warps), np.int32)  # clock of the last read of each of the reader's warps
        self.many_programs = np.zeros(size, bool)
        self.updates: Mapping[int, Update] = {}  # see updates.py
        # Loads of these whose store is still to come, by the store: threads, cells and the instruction.
        self.loaded: dict[int, list[tuple[np.ndarray, np.ndarray, int]]] = {}
        self.updating: set[int] = set()  # those of these stores that go where their values were loaded from

    @staticmethod
    def _unordered(team: Team, lanes: np.ndarray, other: np.ndarray, clock: np.ndarray) -> np.ndarray:
        """Whether the other's access, at ``clock`` of its own, may still come after one of these lanes."""
        program, warp = (other - 1) >> _WARP_BITS, (other - 1) & ((1 << _WARP_BITS) - 1)
        elsewhere = program != team.program[lanes][:, None]
        known = team.clocks.table[team.row[lanes][:, None], np.where(elsewhere, 0, warp)]
        return (other > 0) & (elsewhere | (known < clock))

    def _where(self, team: Team, lanes: np.ndarray, bad: np.ndarray, other: np.ndarray) -> str:
        mine = team.program[lanes][np.nonzero(bad)[0][0]]
        between = ((other[bad][0] - 1) >> _WARP_BITS) != mine
        return "global memory between programs" if between else "global memory within a program"

    def read(self, team: Team, lanes: np.ndarray, cells: np.ndarray, at: int) -> None:
        if not self.all_initialised:
            bad = ~self.initialised[cells]
            if bad.any():
                self.execution.fault("global memory is read before it is written", at, lanes=int(bad.any(1).sum()))
        if at in self.updates:
            self.loaded.setdefault(self.updates[at].store, []).append((lanes, cells, at))
        else:
            self._ordered_read(team, lanes, cells, at)

    def _tensors(self, cells: np.ndarray) -> range:
        """Those that lie between the first and the last of these cells."""
        ends = int(cells[:, 0].min()), int(cells[:, -1].max())
        first, last = (bisect_right(self.first_cells, end) - 1 for end in ends)
        return range(first, last + 1)

    def settle(self, team: Team, lanes: np.ndarray, cells: np.ndarray, at: int) -> None:
        """Store ``at`` is due, for ``lanes``. Of what was loaded for it, only what a thread (or a warp, whose threads
        exchange values) loaded in one place and stores in another counts as read."""
        self.updating.discard(at)
        for loaders, loaded, load in self.loaded.pop(at, ()):
            of_warp = self.updates[load].by_warp
            unit, storing = (team.row[loaders], team.row[lanes]) if of_warp else (loaders, lanes)
            kept = np.isin((unit[:, None] << _CELL_BITS) | loaded, (storing[:, None] << _CELL_BITS) | cells).all(1)
            stored = np.isin(unit, storing)
            if (kept & stored).any():
                self.updating.add(at)
            read = np.flatnonzero(~kept & stored)
            if read.size:
                self._ordered_read(team, loaders[read], loaded[read], load)

    def _ordered_read(self, team: Team, lanes: np.ndarray, cells: np.ndarray, at: int) -> None:
        read: _Read = team, lanes, cells, team.clocks_of_warps(), at
        tensors = self._tensors(cells)
        if self.written.isdisjoint(tensors) and len(tensors) == 1:
            self.unnoted.setdefault(tensors[0], []).append(read)
            self.unnoted_count += 1
            if self.unnoted_count > _UNNOTED:
                self._note_reads(list(self.unnoted))
            return
        me = team.identity[lanes][:, None]
        writer = self.writer[cells]
        if writer.any():
            bad = (writer != me) & self._unordered(team, lanes, writer, self.write_clock[cells])
            if bad.any():
                kind = f"race in {self._where(team, lanes, bad, writer)}, read after write"
                self._race(kind, team, lanes, bad, at, self.write_at[cells], False)
        self._note_read(*read)

    def _note_reads(self, tensors: Iterable[int]) -> None:
        for tensor in tensors:
            reads = self.unnoted.pop(tensor, [])
            self.unnoted_count -= len(reads)
            for read in reads:
                self._note_read(*read)

    def _note_read(self, team: Team, lanes: np.ndarray, cells: np.ndarray, clocks: np.ndarray, at: int) -> None:
        program = team.program[lanes][:, None] + 1
        before = self.reader[cells]
        elsewhere = (before > 0) & (before != program)
        if elsewhere.any():
            self.many_programs[cells[elsewhere]] = True
        self.reader[cells] = program
        if len(team.slots) > 1:  # several programs read by this instruction
            elsewhere = self.reader[cells] != program
            if elsewhere.any():
                self.many_programs[cells[elsewhere]] = True
        self.reads[cells, team.warp[lanes][:, None]] = clocks[lanes][:, None]
        self.read_at[cells] = at

    def write(
        self,
        team: Team,
        lanes: np.ndarray,
        cells: np.ndarray,
        at: int,
        same: Callable[[], np.ndarray] | None = None,
        atomic: bool = False,
        generic: bool = True,
    ) -> None:
        tensors = self._tensors(cells)
        self._note_reads(tensors)
        self.written.update(tensors)
        me = team.identity[lanes][:, None]
        ordered = self.atomic[cells] if atomic else np.zeros(1, bool)
        writer = self.writer[cells]
        if writer.any():
            bad = (writer != me) & ~ordered & self._unordered(team, lanes, writer, self.write_clock[cells])
            if bad.any():
                benign = same is not None and self._may_meet(at) and bool(same()[bad.any(1)].all())
                kind = f"race in {self._where(team, lanes, bad, writer)}, write after write"
                self._race(
                    kind + (" of the same value" if benign else ""), team, lanes, bad, at, self.write_at[cells], benign
                )
        reader = self.reader[cells]
        if reader.any():
            elsewhere = (reader != team.program[lanes][:, None] + 1) | self.many_programs[cells]
            known = team.clocks.table[team.row[lanes], : self.num_warps][:, None, :]
            bad = elsewhere | (self.reads[cells] > known).any(2)
            bad &= (reader > 0) & ~ordered
            if bad.any():
                between = bool(elsewhere[bad][0])
                where = "between programs" if between else "within a program"
                kind = f"race in global memory {where}, write after read"
                self._race(kind, team, lanes, bad, at, self.read_at[cells], False)
        self.writer[cells] = me
        self.write_clock[cells] = team.clocks.table[team.row[lanes], team.warp[lanes]][:, None]
        self.write_at[cells] = at
        self.initialised[cells] = True
        self.atomic[cells] = atomic

    def _may_meet(self, at: int) -> bool:
        """Whether two warps may store one value by this instruction: not where they have loaded it from that place."""
        return at not in self.updating

    def meet(self, team: Team, lanes: np.ndarray, cells: np.ndarray, at: int, same: Callable[[], np.ndarray]) -> None:
        """See :meth:`SharedShadow.meet`."""
        bad = self.writer[cells] != team.identity[lanes][:, None]
        if bad.any():
            benign = self._may_meet(at) and bool(same()[bad.any(1)].all())
            kind = f"race in {self._where(team, lanes, bad, self.writer[cells])}, write after write"
            kind += " of the same value" if benign else ""
            self._race(kind, team, lanes, bad, at, self.write_at[cells], benign)
