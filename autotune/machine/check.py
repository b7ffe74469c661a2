"""Whether a configuration of a kernel family is right: its compiled code runs on the machine, against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from kvops.autotune.devices import by_name
from kvops.autotune.lookup import override, specs
from kvops.autotune.machine.grid import Options
from kvops.autotune.machine.launch import on_machine
from kvops.autotune.prune import build_workload
from kvops.autotune.spec import Config, Problem
from kvops.autotune.timing import HOPELESS, relative_error

# Instructions that a team may take for a candidate: 100 times what the largest small problem needs.
_LIMIT = 50_000_000


@dataclass(frozen=True)
class Verdict:
    """``error`` and ``limit`` are relative, as the tuner's; ``faults`` as the machine words them."""

    error: float
    limit: float
    faults: tuple[str, ...]
    seconds: float

    @property
    def right(self) -> bool:
        return self.error <= self.limit and not self.faults


def _run(op: str, problem: Problem, config: Config, target: str, seed: int) -> tuple[float, float, Verdict]:
    """(error, a rounding of the outputs, verdict without a limit)."""
    torch.manual_seed(seed)
    workload = build_workload(specs()[op], problem, "cpu", True)
    expected = None if workload.exact is None else tuple(workload.exact())
    with override(op, config), on_machine(target, options=Options(seed=seed, limit=_LIMIT)) as machine:
        outputs = tuple(workload.run())
    if not machine.executions:
        raise ValueError(f"{op}: its workload launched no kernel")
    error = 0.0 if expected is None else relative_error(outputs, expected)
    rounding = max((torch.finfo(out.dtype).eps for out in outputs if out.is_floating_point()), default=0.0)
    faults = tuple(f"{execution}: {fault}" for execution in machine.executions for fault in execution.faults)
    return error, rounding, Verdict(error, error, faults, sum(execution.seconds for execution in machine.executions))


@cache
def _limit(op: str, values: tuple[int, ...], target: str) -> float:
    """Twice the default configuration's own error, or two roundings, as in the tuner."""
    spec = specs()[op]
    problem = dict(zip(spec.fields, values, strict=True))
    error, rounding, _ = _run(op, problem, spec.heuristic(problem, by_name(target)), target, 0)
    return 2 * max(min(error, HOPELESS), rounding)


def check_candidate(op: str, problem: dict[str, int], config: dict[str, Any], target: str, seed: int) -> Verdict:
    """Runs a small problem of this key with one configuration; the default configuration sets the limit of the error.

    A default that is off by more than 5% is wrong itself: the limit is never above 10%.
    """
    spec = specs()[op]
    limit = _limit(op, tuple(problem[name] for name in spec.fields), target)
    error, _, verdict = _run(op, problem, spec.config_from_json(config), target, seed)
    return Verdict(error, limit, verdict.faults, verdict.seconds)
