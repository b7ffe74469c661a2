"""Check and time one candidate on this GPU, in the process of a worker.

For comparable times the clocks are warmed up, the L2 cache is cold at every launch, and candidates take turns. Every
output is filled with NaN before a kernel writes it. A call for which the host takes long, such as one of several short
launches, is replayed from a CUDA graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from kvops.autotune.devices import this_gpu
from kvops.autotune.lookup import override, specs
from kvops.autotune.prune import build_workload
from kvops.autotune.spec import Config, Workload

# Far more than any L2 cache. Writing it takes 0.3 ms at 3 TB/s; meanwhile the host queues the next launch, so that the
# GPU's time is measured and not the host's.
_FLUSH_BYTES = 1 << 30
_WARM_UP_SECONDS = 0.5
# A call that takes the host longer might not be queued when the GPU is done with the buffer: 0.13 ms at 8 TB/s.
_HOST_SECONDS = 100e-6
# A larger error of the default configuration is not rounding: the reference or the kernel is wrong.
HOPELESS = 0.05


def relative_error(actual: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest |actual - expected| / |expected| of the outputs, in float64.

    It is infinite for a NaN, for a shape that differs and for any wrong integer.
    """
    if len(actual) != len(expected):
        return float("inf")
    worst = 0.0
    for ours, theirs in zip(actual, expected, strict=True):
        if ours.shape != theirs.shape:
            return float("inf")
        if not ours.is_floating_point():
            if not torch.equal(ours, theirs.to(ours.device, ours.dtype)):
                return float("inf")
            continue
        a, e = ours.double(), theirs.to(ours.device).double()
        same = a == e  # equal infinities: the lse of empty rows
        difference = torch.where(same, 0.0, a - e)
        size = torch.where(e.isfinite(), e, 0.0).norm()
        error = (difference.norm() / size if size > 0 else difference.norm()).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory that is allocated inside with NaN (integers: their largest value)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill


def _outputs(op: str, config: Config, workload: Workload) -> tuple[Any, ...]:
    with override(op, config), poisoned():
        outputs = workload.run()
    torch.cuda.synchronize()
    return tuple(outputs)


class _Trial:
    """A problem on the GPU, with the outputs of its default configuration."""

    def __init__(self, op: str, values: tuple[int, ...]) -> None:
        self.op, self.spec = op, specs()[op]
        problem = dict(zip(self.spec.fields, values, strict=True))
        self.large = build_workload(self.spec, problem, "cuda", False)
        self.small = build_workload(self.spec, problem, "cuda", True)
        default = self.spec.heuristic(problem, this_gpu())
        outputs = _outputs(op, default, self.small)
        self.exact = outputs if self.small.exact is None else tuple(self.small.exact())
        rounding = max((torch.finfo(out.dtype).eps for out in outputs if out.is_floating_point()), default=0.0)
        error = relative_error(outputs, self.exact)
        if error > HOPELESS:
            raise ValueError(f"{op}: the default configuration {default} is off by {error:.3g} from the reference")
        # Another order of the same arithmetic may double the default's error, or add one rounding.
        self.limit = 2 * max(error, rounding)
        self.expected = _outputs(op, default, self.large)

    def check(self, config: Config) -> dict[str, float]:
        error = relative_error(_outputs(self.op, config, self.small), self.exact)
        if error <= self.limit:
            # Both have errors here, which add up.
            error = max(error, relative_error(_outputs(self.op, config, self.large), self.expected) / 2)
        return {"error": error, "limit": self.limit}


@cache
def _trial(op: str, values: tuple[int, ...]) -> _Trial:
    return _Trial(op, values)


def _trial_of(op: str, problem: dict[str, int]) -> _Trial:
    return _trial(op, tuple(problem[name] for name in specs()[op].fields))


def check(op: str, problem: dict[str, int], config: dict[str, Any]) -> dict[str, float]:
    """``{"error", "limit"}`` of one configuration, which is correct if the error is within the limit."""
    trial = _trial_of(op, problem)
    return trial.check(trial.spec.config_from_json(config))


@cache
def _scratch() -> torch.Tensor:
    """The buffer that flushes the L2 cache. Making it warms up the clocks, once per process."""
    scratch = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    until = time.perf_counter() + _WARM_UP_SECONDS
    while time.perf_counter() < until:
        scratch.zero_()
        torch.cuda.synchronize()
    return scratch


def timed_call(
    op: str, config: Config, run: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> Callable[[], object]:
    """``run`` with this configuration, as it is timed: from a CUDA graph if the host takes long for it.

    A call that cannot be captured is timed as it is.
    """

    def call() -> None:
        with override(op, config):
            run()

    call()  # compiles
    torch.cuda.synchronize()
    started = clock()
    call()
    seconds = clock() - started
    torch.cuda.synchronize()
    if seconds <= _HOST_SECONDS:
        return call
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    return graph.replay


def measure(op: str, problem: dict[str, int], configs: Sequence[dict[str, Any]], rounds: int) -> list[list[float]]:
    """Microseconds of every configuration, once per round. Each round begins with another configuration."""
    trial = _trial_of(op, problem)
    chosen = [trial.spec.config_from_json(config) for config in configs]
    calls = [timed_call(op, config, trial.large.run) for config in chosen]
    scratch = _scratch()
    samples: list[list[float]] = [[] for _ in chosen]
    for turn in range(-2, rounds):
        for step in range(len(chosen)):
            place = (step + turn) % len(chosen)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            scratch.zero_()
            start.record()
            calls[place]()
            end.record()
            end.synchronize()
            if turn >= 0:
                samples[place].append(1e3 * start.elapsed_time(end))
    return samples
