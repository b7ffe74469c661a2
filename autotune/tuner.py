"""The search for the fastest correct configuration, by successive halving.

Every candidate is checked against the reference first. Correct candidates are timed in turns. The slower half is
dropped and the others are timed twice as often, until a few are left. Those are timed again beside the heuristic's
choice, so that a lucky timing does not win. Differences within the noise are ties. The earlier candidate wins a tie,
and the heuristic's choice is the first, so that ranks and runs agree.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvops.autotune import timing
from kvops.autotune.ledger import Ledger
from kvops.autotune.records import Times
from kvops.autotune.spec import Config, OpSpec, Problem, config_to_json
from kvops.autotune.worker import CandidateError, CandidateLostError, Worker
from kvops.extras import require

_FINALISTS = 4
_FIRST_ROUNDS = 4
_FINAL_ROUNDS = 30
_FINAL_STAGE = 1000
# Two medians are equal if they differ by less than this many standard errors, or less than this part of them.
_NOISE = 3.0
_RELATIVE_NOISE = 0.005


class Bench(Protocol):
    """Runs candidates. Both methods raise CandidateError for a candidate that fails."""

    def check(self, config: Config) -> dict[str, float]:
        """``{"error", "limit"}`` of a candidate against the reference."""

    def measure(self, configs: Sequence[Config], rounds: int) -> list[list[float]]:
        """``rounds`` times in microseconds for each configuration, measured in turns."""


class WorkerBench:
    """Runs candidates on this machine's GPU, in a process with a time limit."""

    def __init__(self, worker: Worker, spec: OpSpec, problem: Problem, time_limit: float) -> None:
        self._worker, self._name, self._problem, self._limit = worker, spec.name, dict(problem), time_limit

    def check(self, config: Config) -> dict[str, float]:
        arguments = self._name, self._problem, config_to_json(config)
        return self._worker.call(f"{timing.__name__}:check", *arguments, limit=self._limit)

    def measure(self, configs: Sequence[Config], rounds: int) -> list[list[float]]:
        arguments = self._name, self._problem, [config_to_json(config) for config in configs], rounds
        return self._worker.call(f"{timing.__name__}:measure", *arguments, limit=self._limit)


@dataclass(frozen=True)
class Result:
    """The result of tuning one problem. ``rejected`` has pairs (configuration, reason)."""

    winner: Config
    time: Times
    check: dict[str, float]
    runner_up: tuple[Config, float] | None
    heuristic_us: float | None
    rejected: tuple[tuple[Config, str], ...]


class BudgetSpent(Exception):  # noqa: N818 - not an error: the next run resumes
    """The time limit has passed; the ledger has the results so far."""


def quantile(samples: Sequence[float], part: float) -> float:
    ordered = sorted(samples)
    place = part * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(samples: Sequence[float]) -> Times:
    p20, p50, p80 = (quantile(samples, part) for part in (0.2, 0.5, 0.8))
    return Times(round(p20, 3), round(p50, 3), round(p80, 3), len(samples))


def _standard_error(times: Times) -> float:
    """Standard error of the median for normal samples, from quantiles, which outliers do not change."""
    return 1.2533 * (times.p80 - times.p20) / 1.6832 / math.sqrt(times.count)


def same_speed(a: Times, b: Times) -> bool:
    difference = abs(a.p50 - b.p50)
    noise = _NOISE * math.hypot(_standard_error(a), _standard_error(b))
    return difference <= max(noise, _RELATIVE_NOISE * min(a.p50, b.p50))


def decide(times: Sequence[Times]) -> int:
    """The index of the first candidate that is as fast as the fastest."""
    best = min(times, key=lambda time: time.p50)
    return next(place for place, time in enumerate(times) if same_speed(time, best))


def tune(
    candidates: Sequence[Config],
    bench: Bench,
    ledger: Ledger,
    *,
    deadline: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[str, int, int], None] | None = None,
) -> Result:
    """Tune one problem. ``candidates`` are in the order that decides ties; the first is the heuristic's choice.

    ``progress`` is called with (step, done, total) after every step. Raises BudgetSpent when ``clock`` passes
    ``deadline``, and RuntimeError if every candidate is rejected or tuning is not possible (``refuse_to_tune``).
    """
    refuse_to_tune()

    def step(what: str, done: int, total: int) -> None:
        if progress:
            progress(what, done, total)
        if deadline is not None and clock() > deadline:
            raise BudgetSpent(what)

    checks: dict[Config, dict[str, float]] = {}
    for place, config in enumerate(candidates):
        result = _check(config, bench, ledger)
        if result is not None:
            checks[config] = result
        step("check", place + 1, len(candidates))
    survivors = list(checks)
    stage, rounds = 0, _FIRST_ROUNDS
    while len(survivors) > _FINALISTS:
        times = _measure(stage, survivors, rounds, bench, ledger)
        fastest = sorted(times, key=lambda config: times[config].p50)[: max(_FINALISTS, (len(times) + 1) // 2)]
        kept = {*fastest, candidates[0]}  # the winner must beat the heuristic's choice
        survivors = [config for config in times if config in kept]
        step("halve", len(candidates) - len(survivors), len(candidates))
        stage, rounds = stage + 1, 2 * rounds
        if len(survivors) == len(times):
            break  # only the heuristic's choice and the finalists are left
    times = _measure(_FINAL_STAGE, survivors, _FINAL_ROUNDS, bench, ledger)
    if not times:
        raise RuntimeError(f"all {len(candidates)} candidates were rejected: {ledger.rejection_of(candidates[0])}")
    finalists = list(times)
    winner = finalists[decide([times[config] for config in finalists])]
    losers = sorted((config for config in finalists if config != winner), key=lambda config: times[config].p50)
    rejected = [(config, ledger.rejection_of(config)) for config in candidates]
    step("final", len(candidates), len(candidates))
    return Result(
        winner=winner,
        time=times[winner],
        check=checks[winner],
        runner_up=(losers[0], times[losers[0]].p50) if losers else None,
        heuristic_us=times[candidates[0]].p50 if candidates[0] in times else None,
        rejected=tuple((config, reason) for config, reason in rejected if reason is not None),
    )


def _check(config: Config, bench: Bench, ledger: Ledger) -> dict[str, float] | None:
    """Error and limit of a candidate. One that is wrong or fails gives None, with the reason in the ledger."""
    if ledger.rejection_of(config) is not None:
        return None
    result = ledger.check_of(config)
    if result is None:
        ledger.start(config)
        try:
            result = bench.check(config)
        except CandidateError as error:
            ledger.reject(config, _last_line(error))
            return None
        if not result["error"] <= result["limit"]:
            ledger.reject(config, f"wrong: off by {result['error']:.3g}, allowed {result['limit']:.3g}")
            return None
        ledger.check(config, result)
    return result


def _measure(stage: int, configs: Sequence[Config], rounds: int, bench: Bench, ledger: Ledger) -> dict[Config, Times]:
    """Times in the order of ``configs``, without candidates that fail.

    A stage comes from the ledger as a whole or not at all: times that were not taken in turns cannot be compared.
    """
    known = [ledger.samples_of(stage, config) for config in configs]
    if all(samples is not None for samples in known):
        return {config: summary(samples) for config, samples in zip(configs, known, strict=True) if samples}
    alive = list(configs)
    while alive:
        try:
            samples = bench.measure(alive, rounds)
            break
        except CandidateError as error:
            alive = _without_culprits(alive, error, bench, ledger)
    else:
        return {}
    for config, own in zip(alive, samples, strict=True):
        ledger.measured(stage, config, own)
    return {config: summary(own) for config, own in zip(alive, samples, strict=True)}


def _without_culprits(configs: Sequence[Config], error: CandidateError, bench: Bench, ledger: Ledger) -> list[Config]:
    """Run each candidate alone to find the one that fails. If none does, drop the last, so that the search ends."""
    alive = []
    for config in configs:
        try:
            bench.measure([config], 1)
            alive.append(config)
        except CandidateError as own:
            ledger.reject(config, _last_line(own))
    if len(alive) == len(configs):
        ledger.reject(alive[-1], f"failed beside others: {_last_line(error)}")
        alive.pop()
    return alive


def _last_line(error: Exception) -> str:
    prefix = "" if isinstance(error, CandidateLostError) else "failed: "
    return prefix + (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]


def refuse_to_tune() -> None:
    """Raises RuntimeError while a CUDA graph is captured, while torch.compile traces, and in deterministic mode.

    A measurement there would not time the kernel as it runs, or would change results that must not change.
    """
    import torch

    if torch.compiler.is_compiling():
        raise RuntimeError("tune: torch.compile is tracing; tune before that")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune: a CUDA graph is being captured; tune before that")
    if torch.are_deterministic_algorithms_enabled():
        raise RuntimeError("tune: deterministic algorithms are enabled; tune without them and keep the records")


def environment() -> dict[str, str]:
    """Versions of driver, CUDA, torch and Triton, for records."""
    import torch

    triton = require("triton")

    versions: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__}
    versions["cuda"] = torch.version.cuda or torch.version.hip
    if torch.cuda.is_available():
        versions["driver"] = _driver_version()
    return {name: str(value) for name, value in versions.items() if value}


def _driver_version() -> str | None:
    try:
        with open("/proc/driver/nvidia/version") as file:
            words = file.readline().split()
        return next((word for word in words if word[0].isdigit() and "." in word), None)
    except OSError:
        return None
