"""Which tests of the GPU run go to which process, in which order.

First they compile what they launch, on all cores, then they run (``compile_costs.json`` has the times of both). The
tests of one function, which launch one kernel, go to one process, or to neighbours where they are too many: none waits
for what another compiles. Tests of kernels that every GPU runs come before those of kernels that must prove themselves
first: a run that ends early has what matters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

COSTS = Path(__file__).parent / "compile_costs.json"
# Files of tests in the order of what they are worth; files that are not named stand between these and the last ones.
FIRST = ("paged", "attention", "attention_backward", "varlen", "cache_attention", "eviction", "compaction", "verify")
LAST = ("gluon_flash_forward", "gluon_flash_backward", "gluon_varlen")


def rank(test: str) -> int:
    """0 for a test of what every program launches, 1 for others, 2 for the kernels that are not in use yet."""
    name = test.partition("::")[0].rpartition("/")[2].removeprefix("test_").removesuffix(".py")
    return 0 if name in FIRST else 2 if name in LAST else 1


def function_of(test: str) -> str:
    return test.partition("[")[0]


@cache
def planned() -> dict[str, Any]:
    """What ``python -m bench.gpu.plan`` found."""
    return dict(json.loads(COSTS.read_text()))


def costs_of(step: str) -> dict[str, float]:
    """Seconds per test of a function, in the step ``"compile"`` or ``"test"``."""
    return dict(planned()["seconds_per_test"][step])


def shares(tests: Sequence[T], names: Sequence[str], count: int, costs: Mapping[str, float]) -> list[list[T]]:
    """``tests`` in ``count`` shares of about the same cost, each in the order of :func:`rank`.

    ``costs`` are seconds per test of a function; another function's tests count as one. Within a rank the order of
    ``tests`` is kept and cut into pieces, so that a function goes to as few shares as its cost allows.
    """
    found: list[list[T]] = [[] for _ in range(count)]
    for kind in range(3):
        own = [
            (test, costs.get(function_of(name), 1.0))
            for test, name in zip(tests, names, strict=True)
            if rank(name) == kind
        ]
        total = sum(seconds for _, seconds in own)
        before = 0.0
        for test, seconds in own:
            found[min(count - 1, int((before + seconds / 2) / total * count))].append(test)
            before += seconds
    return found
