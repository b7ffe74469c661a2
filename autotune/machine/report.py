"""What the machine found: faults with both accesses, and what a launch executed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from kvops.autotune.machine.ptx import Place, Program


class Stopped(Exception):  # noqa: N818 - a launch ends early, with a fault that says why
    """The launch cannot go on, or need not."""


class MachineFaultError(AssertionError):
    """A launch on the machine had faults; the message has each with its source lines and the seed."""


@dataclass
class Fault:
    """One kind of fault at one pair of instructions, in a launch.

    ``lanes`` counts the threads that met it. ``benign`` marks what no result depends on: two warps that store the same
    value in one place, which replicated layouts do on purpose.
    """

    kind: str
    detail: str
    place: Place | None
    other: Place | None = None
    benign: bool = False
    lanes: int = 0

    def __str__(self) -> str:
        lines = [f"{self.kind}: {self.detail}" if self.detail else self.kind]
        lines += [f"    at  {self.place}"] if self.place else []
        lines += [f"    and {self.other}"] if self.other else []
        return "\n".join(lines)


@dataclass
class Execution:
    """One launch that the machine has run.

    ``covered[i]`` says whether instruction ``i`` was executed by a thread at all; ``instructions`` counts those that
    warps executed.
    """

    kernel: str
    grid: tuple[int, ...]
    program: Program
    seed: int
    covered: np.ndarray
    found: dict[tuple[str, int, int], Fault] = field(default_factory=dict)
    instructions: int = 0
    seconds: float = 0.0
    first_fault_ends: bool = False

    @property
    def faults(self) -> list[Fault]:
        """Those that matter."""
        return [fault for fault in self.found.values() if not fault.benign]

    def fault(
        self, kind: str, at: int = -1, detail: str = "", *, other: int = -1, lanes: int = 1, benign: bool = False
    ) -> None:
        """Note a fault at instruction ``at``; ``other`` is the instruction that it clashes with."""
        fault = self.found.get((kind, at, other))
        if fault is None:
            instructions = self.program.instructions
            place = instructions[at].place if at >= 0 else None
            second = instructions[other].place if other >= 0 else None
            fault = self.found[kind, at, other] = Fault(kind, detail, place, second, benign)
        fault.lanes += lanes
        if self.first_fault_ends and not benign:
            raise Stopped(kind)

    def __str__(self) -> str:
        return f"{self.kernel} on a grid of {self.grid}, seed {self.seed}"


def raise_faults(executions: Iterable[Execution]) -> None:
    """Raise :class:`MachineFaultError` with every fault of these launches; do nothing where there is none."""
    lines = []
    for execution in executions:
        for fault in execution.faults:
            lines.append(f"{execution}: {fault}")
    if lines:
        more = f"\nand {len(lines) - 20} more faults" if len(lines) > 20 else ""
        raise MachineFaultError("\n".join(lines[:20]) + more)
