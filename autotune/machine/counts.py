"""What an execution did, counted: bytes and sectors of global memory, bank conflicts, instructions by pipe.

Give ``Options(counter=Counter())`` to ``on_machine``. These are counts of the compiled code, not measurements: they say
nothing about time.
"""

from __future__ import annotations

from collections import Counter as Tally
from typing import TYPE_CHECKING

import numpy as np

from kvops.autotune.machine.ptx import Instruction, Program

if TYPE_CHECKING:
    from kvops.autotune.machine.memory import Space
    from kvops.autotune.machine.team import Team

_SECTOR = 5  # 32 bytes, as a shift
_BANKS = 32
_ADDRESS_BITS = 47
_PIPES = {
    "matrix": ("mma", "wgmma"),
    "special": ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"),
    "memory": ("ld", "st", "atom", "red", "ldmatrix", "stmatrix", "cp"),
    "control": ("bra", "brx", "ret", "exit", "bar", "barrier", "mbarrier", "fence", "elect"),
    "warp": ("shfl", "vote", "redux", "match", "activemask"),
    "convert": ("cvt",),
    "move": ("mov", "selp", "cvta", "prmt"),
}


def pipe_of(instruction: Instruction) -> str:
    """What executes it: "matrix", "special", "memory", "control", "warp", "convert", "move", "float" or "integer"."""
    for pipe, names in _PIPES.items():
        if instruction.base in names:
            return "parameter" if instruction.opcode.startswith("ld.param") else pipe
    return "float" if instruction.type in ("f32", "f16", "f64") else "integer"


def matrix_work(instruction: Instruction) -> float:
    """Floating-point operations of a warp that executes it: 2 m n k for a warp, a quarter of that for a warp group."""
    for part in instruction.parts:
        if part.startswith("m") and "n" in part and "k" in part and part[1:2].isdigit():
            m, rest = part[1:].split("n")
            n, k = rest.split("k")
            work = 2.0 * int(m) * int(n) * int(k)
            return work / 4 if instruction.base == "wgmma" else work
    return 0.0


class Counter:
    """Adds up what launches do.

    ``global_bytes``: each warp counts a place once, whatever number of its threads read it by one instruction.
    ``conflicts`` has, by instruction, the most words of one bank of shared memory that one access of a warp asked for;
    ``loop_conflicts`` those of instructions in loops.
    """

    def __init__(self) -> None:
        self.global_bytes = self.sectors = 0
        self.wavefronts = self.fewest_wavefronts = 0
        self.conflicts: dict[str, int] = {}
        self.loop_conflicts: dict[str, int] = {}
        self.pipes: Tally[str] = Tally()
        self.matrix_operations = 0.0
        self._blocks: dict[int, list[tuple[str, float]]] = {}

    @property
    def instructions(self) -> int:
        """Of warps."""
        return sum(self.pipes.values())

    def block(self, program: Program, block: int, warps: int) -> None:
        """Some warps execute a block."""
        entries = program.blocks[block]
        key = id(entries)
        if key not in self._blocks:
            self._blocks[key] = [(pipe_of(entry), matrix_work(entry)) for entry in entries]
        for pipe, work in self._blocks[key]:
            self.pipes[pipe] += warps
            self.matrix_operations += warps * work

    def bytes(self, at: int, space: Space, size: int) -> None:
        """A tensor copy moves whole rows of a tensor."""
        if space.name == "global memory":
            self.global_bytes += size
            self.sectors += -(-size >> _SECTOR)

    def access(self, team: Team, at: int, space: Space, lanes: np.ndarray, index: np.ndarray, size: int) -> None:
        warps = team.row[lanes] + 1024 * team.program[lanes]
        if space.name == "global memory":
            warp = np.unique(warps, return_inverse=True)[1] << _ADDRESS_BITS
            self.global_bytes += np.unique(warp | index).size * size
            self.sectors += np.unique(warp | index >> _SECTOR).size
            return
        # 32 threads go together with words of 4 bytes, 16 with 8 bytes, 8 with 16.
        together = min(32, 128 // size)
        group = warps * 32 + team.lane[lanes].astype(np.int64) // together
        words = (index >> 2)[:, None] + np.arange(max(1, size // 4))
        pairs = np.unique(np.stack([np.repeat(group, words.shape[1]), words.reshape(-1)]), axis=1)
        banks = pairs[0] * _BANKS + pairs[1] % _BANKS
        _, first, counts = np.unique(banks, return_index=True, return_counts=True)
        most: dict[int, int] = {}
        for owner, count in zip(pairs[0][first].tolist(), counts.tolist(), strict=True):
            most[owner] = max(most.get(owner, 0), count)
        self.wavefronts += sum(most.values())
        self.fewest_wavefronts += len(most)
        program = space.execution.program
        place = f"{space.execution.kernel}: {program.instructions[at].place}"
        for found in (self.conflicts, self.loop_conflicts) if at in program.in_loops else (self.conflicts,):
            found[place] = max(found.get(place, 0), max(most.values()))
