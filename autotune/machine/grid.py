"""Runs the grid of a launch: which warps run in step, who runs next, and barriers."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvops.autotune.machine.counts import Counter
from kvops.autotune.machine.instructions.asynchronous import Descriptor, MBarrier, finish_store
from kvops.autotune.machine.memory import Allocation, GlobalMemory, SharedMemory, Space
from kvops.autotune.machine.ptx import Program
from kvops.autotune.machine.races import MAX_MBARRIERS, Clocks
from kvops.autotune.machine.report import Execution, Stopped
from kvops.autotune.machine.team import Team
from kvops.autotune.machine.translate import (
    BARRIER,
    BRANCH,
    EXIT,
    FALL,
    GOTO,
    SWITCH,
    BlockWriter,
    Outcome,
    watched_registers,
)
from kvops.autotune.machine.updates import updates_of

# What may run in step. The results and the races found are the same: vector clocks know what a barrier orders, in
# whatever order warps ran. Single warps meet in orders drawn from the seed; whole programs are 5 to 20 times as fast.
LOCKSTEP = ("warp", "warpgroup", "program")
# Threads that a team of several programs should have: NumPy costs about the same for 32 and for 1000.
_THREADS = 2048
# Waits in a row that find nothing, of all teams together, before it is a deadlock.
_PATIENCE = 2000


@dataclass(frozen=True)
class Options:
    """How a launch is run.

    ``lockstep``: see ``LOCKSTEP``; "" chooses programs, and warp groups for kernels that specialise warps. ``check``
    looks for races and uninitialised memory; without it only results, bounds and alignment count. ``limit`` is how many
    instructions of teams a launch may take. ``counter`` sees every access to memory. ``first_fault_ends`` spares the
    rest of a launch that has a fault.
    """

    lockstep: str = ""
    seed: int = 0
    check: bool = True
    limit: int = 1 << 60
    counter: Counter | None = None
    first_fault_ends: bool = False


class Grid:
    """One launch: memory, clocks and the teams that run."""

    def __init__(
        self,
        program: Program,
        shape: Sequence[int],
        parameters: Mapping[str, bytes],
        allocations: Sequence[Allocation],
        shared_bytes: int,
        num_warps: int,
        descriptors: Mapping[int, Descriptor] | None = None,
        options: Options | None = None,
    ) -> None:
        self.program, self.parameters, self.num_warps = program, parameters, num_warps
        self.options = options = options or Options()
        self.shape = (*map(int, shape), 1, 1)[:3]
        self.descriptors = dict(descriptors or {})
        covered = np.zeros(len(program.instructions), bool)
        self.execution = Execution(program.name, self.shape, program, options.seed, covered)
        self.execution.first_fault_ends = options.first_fault_ends
        self.lockstep = options.lockstep or ("warpgroup" if _specialises_warps(program) else "program")
        if self.lockstep not in LOCKSTEP:
            raise ValueError(f"lockstep: expected one of {', '.join(LOCKSTEP)}, got {self.lockstep!r}")
        total = int(np.prod(self.shape))
        self.watched = watched_registers(program)
        # Products under way belong to a team: programs that part in one team would share them.
        if self.lockstep == "program" and not self.watched:
            self.batch = max(1, min(_THREADS // (32 * num_warps), total))
            self.slots = self.batch
        else:
            self.batch, self.slots = 1, min(1 if self.lockstep == "program" else 2, total)
        granules = program.granules
        self.clocks = Clocks(self.slots, num_warps)
        self.shared = SharedMemory(
            self.execution, shared_bytes, self.slots, granules["shared"], num_warps, options.check
        )
        self.memory = GlobalMemory(self.execution, allocations, granules["global"], num_warps, options.check)
        if self.memory.shadow is not None:
            self.memory.shadow.updates = updates_of(program)
        self.mbarriers: dict[tuple[int, int], MBarrier] = {}
        self._mbarrier_numbers: dict[tuple[int, int], int] = {}
        self.numbers = np.random.default_rng(options.seed)
        self.order = random.Random(options.seed)
        self._steps = self._idle = 0
        self._teams: dict[int, list[Team]] = {}

    def space(self, name: str) -> Space:
        return self.shared if name == "shared" else self.memory

    def number_of_mbarrier(self, slot: int, address: int) -> int:
        number = self._mbarrier_numbers.setdefault(
            (slot, address), sum(known == slot for known, _ in self._mbarrier_numbers)
        )
        if number >= MAX_MBARRIERS:
            self.stop(f"more than {MAX_MBARRIERS} mbarriers")
        return number

    def stop(self, reason: str) -> None:
        raise Stopped(reason)

    def count_access(self, team: Team, at: int, space: Space, lanes: np.ndarray, index: np.ndarray, size: int) -> None:
        if self.options.counter is not None and lanes.size:
            self.options.counter.access(team, at, space, lanes, index, size)

    def count_bytes(self, at: int, space: Space, size: int) -> None:
        """What a tensor copy moves: whole rows, no thread has an address."""
        if self.options.counter is not None:
            self.options.counter.bytes(at, space, size)

    # --- who runs next ---

    def run(self) -> Execution:
        """Every program of the grid, to its end or to the first fault that nothing can follow."""
        start = time.perf_counter()
        try:
            with np.errstate(all="ignore"):
                self._run()
        except Stopped:
            pass
        self.execution.seconds = time.perf_counter() - start
        return self.execution

    def _run(self) -> None:
        queue = deque(self._drawn_order())
        free = list(range(self.slots))
        live: list[Team] = []
        while queue or live:
            while queue and len(free) >= min(self.batch, len(queue)):
                count = min(self.batch, len(queue))
                slots = [free.pop() for _ in range(count)]
                live += self._start(slots, [queue.popleft() for _ in range(count)])
            ready = [team for team in live if not (team.waiting | team.done).all()]
            if not ready:
                self._deadlock(live, "every warp waits at a barrier that cannot be complete")
            team = ready[0] if len(ready) == 1 else self.order.choice(ready)
            self._turn(team, live)
            if team.done.all():
                live.remove(team)
                for slot in team.slots:
                    if all(other.done.all() for other in self._teams[slot]) and slot not in free:
                        free.append(slot)
                        self._teams[slot] = []

    def _drawn_order(self) -> list[int]:
        order = list(range(int(np.prod(self.shape))))
        self.order.shuffle(order)
        return order

    @property
    def drawn(self) -> bool:
        """Whether anything in this launch hung on the seed: where nothing did, every seed gives the same execution."""
        new = random.Random(self.options.seed), np.random.default_rng(self.options.seed)
        orders = self.order.getstate() != new[0].getstate()
        return orders or self.numbers.bit_generator.state != new[1].bit_generator.state

    def _start(self, slots: list[int], programs: list[int]) -> list[Team]:
        for slot in slots:
            self.clocks.clear(slot)
            self.shared.clear(slot)
            for key in [key for key in self.mbarriers if key[0] == slot]:
                del self.mbarriers[key]
        count = {"warp": 1, "warpgroup": 4, "program": self.num_warps}[self.lockstep]
        groups = [range(first, min(first + count, self.num_warps)) for first in range(0, self.num_warps, count)]
        teams = [Team(self, slots, programs, group) for group in groups]
        for slot in slots:
            self._teams[slot] = teams
        return teams

    def _turn(self, team: Team, live: list[Team]) -> None:
        """A block, or as many as the team can run where nobody else is there to run."""
        alone = len(live) == 1
        while True:
            team.failed_wait = False
            together = team.blocks is None
            executed = self._together(team) if together else self._apart(team)
            self._steps += executed
            self.execution.instructions += executed * (team.size // 32)
            self._idle = self._idle + 1 if team.failed_wait else 0
            if self._idle > _PATIENCE:
                self._deadlock(live, "every warp waits for an mbarrier whose phase does not end")
            if self._steps > self.options.limit:
                self.execution.fault("no end", detail=f"more than {self.options.limit} instructions")
                self.stop("no end")
            if not alone or (team.waiting | team.done).all():
                return

    def _deadlock(self, live: list[Team], detail: str) -> None:
        team = live[0]
        waiting = np.flatnonzero(team.waiting)
        block = team.block if team.blocks is None else int(team.blocks[0])
        entries = self.program.blocks[min(block, len(self.program.blocks) - 1)]
        at = int(team.barrier_at[waiting[0]]) if waiting.size else entries[0].index
        self.execution.fault("deadlock", at, detail)
        self.stop("deadlock")

    # --- one block ---

    def _function(self, block: int, mask: np.ndarray | None, team: Team) -> Callable[..., Outcome]:
        masked = mask is not None
        if self.options.counter is not None:
            warps = team.size // 32 if mask is None else int(mask.reshape(-1, 32).any(1).sum())
            self.options.counter.block(self.program, block, warps)
        function = self.program.functions.get((block, masked))
        if function is None:
            function = BlockWriter(self.program, block, masked, self.watched).function()
            self.program.functions[block, masked] = function
        return function

    def _together(self, team: Team) -> int:
        """All threads of the team are in one block."""
        block = team.block
        kind, *rest = self._function(block, None, team)(team, None)
        if kind == FALL:
            team.block = block + 1
        elif kind == GOTO:
            team.block = rest[0]
        elif kind == BRANCH:
            taken = team.full(rest[0])
            if taken.all():
                team.block = rest[1]
            elif not taken.any():
                team.block = block + 1
            else:
                team.blocks = np.where(taken, rest[1], block + 1)
        elif kind == BARRIER:
            team.block = block + 1
            self._arrive(team, None, *rest)
            if team.waiting.any() and not team.waiting.all():
                team.blocks = np.full(team.size, team.block)
        elif kind == SWITCH:
            targets = np.array(rest[1])[np.minimum(team.full(rest[0]), len(rest[1]) - 1)]
            team.block = int(targets[0])
            if (targets != targets[0]).any():
                team.blocks = targets
        elif rest[0] is None:
            self._exit(team, np.ones(team.size, bool))
        else:
            team.blocks = np.full(team.size, block + 1)
            self._exit(team, team.full(rest[0]))
        return len(self.program.blocks[block])

    def _apart(self, team: Team) -> int:
        """Threads have parted: those of the lowest block run; where that one only waits, another drawn at random."""
        blocks = team.blocks
        assert blocks is not None
        live = ~(team.done | team.waiting)
        standing = blocks[live]
        block = int(standing.min())
        if block == team.last_block:
            others = np.unique(standing).tolist()
            block = int(others[0] if len(others) == 1 else self.order.choice(others))
        team.last_block = block
        mask = live & (blocks == block)
        if mask.all():
            team.block, team.blocks = block, None
            return 0
        kind, *rest = self._function(block, mask, team)(team, mask)
        if kind == FALL:
            blocks[mask] = block + 1
        elif kind == GOTO:
            blocks[mask] = rest[0]
        elif kind == BRANCH:
            blocks[mask] = np.where(team.full(rest[0])[mask], rest[1], block + 1)
        elif kind == BARRIER:
            blocks[mask] = block + 1
            self._arrive(team, mask, *rest)
        elif kind == SWITCH:
            targets = np.array(rest[1])[np.minimum(team.full(rest[0]), len(rest[1]) - 1)]
            blocks[mask] = targets[mask]
        elif kind == EXIT:
            blocks[mask] = block + 1
            self._exit(team, mask if rest[0] is None else mask & team.full(rest[0]))
        return len(self.program.blocks[block])

    def _exit(self, team: Team, mask: np.ndarray) -> None:
        team.done |= mask
        for row in np.unique(team.row[mask]).tolist():
            pending = [*team.stores.pop(row, [])]
            for group in team.store_groups.pop(row, ()):
                pending += group
            for store in pending:
                self.execution.fault("a warp ends while its TMA store reads shared memory", store.at)
                finish_store(team, store)
        for slot in team.slots:
            self._release(slot)

    # --- barriers ---

    def _arrive(self, team: Team, mask: np.ndarray | None, at: int, number: Any, count: Any) -> None:
        if self._all_arrive(team, mask, at, number, count):
            return
        lanes = team.select(mask, at)
        team.waiting[lanes] = True
        team.barrier_at[lanes] = at
        team.barrier[lanes] = team.full(number)[lanes]
        team.barrier_count[lanes] = team.full(count)[lanes]
        for slot in np.unique(team.slot[lanes]).tolist():
            self._release(slot)

    def _all_arrive(self, team: Team, mask: np.ndarray | None, at: int, number: Any, count: Any) -> bool:
        """Whether whole programs have arrived, by one instruction: nobody waits then."""
        if self.lockstep != "program" or isinstance(number, np.ndarray) or isinstance(count, np.ndarray):
            return False
        if int(count) not in (0, 32 * self.num_warps):
            return False
        slots, everyone = list(team.slots), mask is None
        if mask is not None:
            here = mask.reshape(len(slots), -1)
            whole = np.asarray(here.all(1))
            if (whole != here.any(1)).any():
                return False
            slots = [slot for slot, complete in zip(slots, whole.tolist(), strict=True) if complete]
        self.execution.covered[at] = True
        self.clocks.join_all(slots)
        if self.shared.shadow is not None:
            self.shared.shadow.barrier(slots, everyone)
        return True

    def _release(self, slot: int) -> None:
        """Let those go on whose barrier is complete."""
        teams = self._teams[slot]
        here = [team.waiting & (team.slot == slot) for team in teams]
        numbers = {int(n) for team, waits in zip(teams, here, strict=True) for n in np.unique(team.barrier[waits])}
        for number in numbers:
            waits = [own & (team.barrier == number) for team, own in zip(teams, here, strict=True)]
            arrived = sum(int(own.sum()) for own in waits)
            counts = {
                int(n) for team, own in zip(teams, waits, strict=True) for n in np.unique(team.barrier_count[own])
            }
            places = {int(n) for team, own in zip(teams, waits, strict=True) for n in np.unique(team.barrier_at[own])}
            at = min(places)
            if len(counts) > 1:
                self.execution.fault("threads wait at one barrier with different counts", at, str(sorted(counts)))
            gone = sum(int((team.done & (team.slot == slot)).sum()) for team in teams)
            expected = max(counts) or 32 * self.num_warps - gone
            if arrived < expected:
                continue
            if arrived > expected:
                self.execution.fault("more threads wait at a barrier than it counts", at)
            if len(places) > 1 and number == 0 and not max(counts):
                kind = "warps of a program wait at different barriers"
                self.execution.fault(kind, at, other=max(places))
            warps: set[int] = set()
            for team, own in zip(teams, waits, strict=True):
                warps.update(np.unique(team.warp[own]).tolist())
                team.waiting &= ~own
            self.clocks.join(slot, sorted(warps))
            if len(warps) == self.num_warps and self.shared.shadow is not None:
                self.shared.shadow.barrier([slot], everyone=False)


def run_with_seeds(prepared: Callable[[int], Grid], seeds: Sequence[int]) -> Grid:
    """Run a launch with each seed, from the same memory: it must leave the same bits. Returns the last run.

    A launch in which nothing was drawn is the same with every seed and runs once.
    """
    first, *others = seeds
    held = prepared(first)
    before = held.memory.contents() if others else []
    held.run()
    if others and held.drawn:
        results = held.memory.contents()
        for seed in others:
            held = prepared(seed)
            held.memory.restore(before)
            held.run()
            if not all(np.array_equal(a, b) for a, b in zip(results, held.memory.contents(), strict=True)):
                held.execution.fault("another seed gives other results", detail=f"than seed {first}")
    return held


def _specialises_warps(program: Program) -> bool:
    return any(entry.base in ("brx", "setmaxnreg") for entry in program.instructions)
