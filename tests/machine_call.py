"""One call of a launch function on the machine for PTX, beside the same call of the eager operator; and all cases."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from kvops.autotune.machine import Execution


@dataclass(frozen=True)
class Call:
    """``launch`` on the machine and ``operator`` in eager get equal arguments; results and what both write to must
    agree to ``tolerance`` (0: bit by bit)."""

    launch: Callable[..., Any]
    operator: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tolerance: float = 0.0
    compare: Callable[[Any], Any] = lambda results: results

    def run(self) -> None:
        """Raises AssertionError where they differ."""
        copies: dict[int, torch.Tensor] = {}

        def copied(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return copies.setdefault(id(value), value.clone())

        args, kwargs = [copied(value) for value in self.args], {name: copied(v) for name, v in self.kwargs.items()}
        got = self.launch(*self.args, **self.kwargs)
        want = self.operator(*args, **kwargs)
        pairs = list(zip(_tuple(self.compare(got)), _tuple(self.compare(want)), strict=True))
        pairs += [
            (value, copies[id(value)])
            for value in (*self.args, *self.kwargs.values())
            if isinstance(value, torch.Tensor)
        ]
        for place, (a, b) in enumerate(pairs):
            if not isinstance(a, torch.Tensor):
                continue
            torch.testing.assert_close(
                a.double(),
                b.double(),
                rtol=0,
                atol=self.tolerance,
                equal_nan=True,
                msg=lambda text, place=place: f"result {place}: {text}",
            )


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


CASES: dict[str, Callable[[], Call]] = {}
HOPPER = "gluon"  # cases whose names begin so run on sm_90 alone


def case(function: Callable[[], Call]) -> Callable[[], Call]:
    CASES[function.__name__] = function
    return function


def names_for(target: str, only: str = "", skip: Collection[str] = ()) -> list[str]:
    """The cases of a target whose names contain ``only`` and begin with none of ``skip``."""
    return [
        name
        for name in CASES
        if only in name and not name.startswith(tuple(skip)) and (target == "sm_90" or not name.startswith(HOPPER))
    ]


def sites(execution: Execution) -> list[dict[str, Any]]:
    """Barriers, waits, arrivals and fences of a kernel, each with its place: source line, instruction, and number among
    its equals."""
    found, seen = [], Counter()
    for entry in execution.program.synchronisation:
        place = f"{entry.place.file.rsplit('/', 1)[-1]}:{entry.place.line}", entry.opcode
        seen[place] += 1
        covered = bool(execution.covered[entry.index])
        found.append(
            {"line": place[0], "instruction": place[1], "number": seen[place], "index": entry.index, "covered": covered}
        )
    return found


def identity(execution: Execution) -> str:
    """Changes with the instructions of a kernel: a row of the mutation table holds for this very code."""
    opcodes = " ".join(entry.opcode for entry in execution.program.instructions)
    return hashlib.sha256(opcodes.encode()).hexdigest()[:12]
