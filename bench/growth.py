"""How time and memory grow with context, batch, heads and vocabulary: slopes on log-log axes, held to theory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import measure
from bench.case import LLAMA_8B, SMOLLM, Case, Inputs, Model
from bench.cases import dense, eviction, paged, scores, verification
from bench.results import Row
from bench.timing import Clock, quantiles

# A slope may be so far from theory's: small sizes pay for launches, large ones leave the caches.
TOLERANCE = 0.25


@dataclass(frozen=True)
class Sweep:
    """One quantity varied, everything else held."""

    name: str
    axis: str
    values: tuple[int, ...]
    case: Callable[[int], Case]
    time: float
    """What the time grows with, in theory: the power of ``axis``."""
    memory: float | None
    """The same for the memory that the call itself takes, outputs included; None: not held to anything."""


def ladder(first: int, last: int) -> tuple[int, ...]:
    """Powers of two."""
    return tuple(first << step for step in range((last // first).bit_length()))


def sweeps(gpu: bool) -> list[Sweep]:
    """1k to 128k on a GPU; a few heads and what takes a second at most on a CPU."""
    if gpu:
        model, window, context = LLAMA_8B, 4096, 8192
        prompts = contexts = ladder(1024, 131072)
        batches, heads = ladder(1, 64), ladder(8, 64)
    else:
        model, window, context = replace(SMOLLM, heads=3, kv_heads=1), 256, 4096
        prompts, contexts = ladder(1024, 8192), ladder(4096, 131072)
        batches, heads = ladder(1, 32), ladder(1, 8)
    sliding = replace(model, window=window)

    def with_heads(kv_heads: int) -> Model:
        return replace(model, name=f"{kv_heads} KV heads", heads=kv_heads * model.group, kv_heads=kv_heads)

    long = tuple(value for value in prompts if value >= 4 * window) or prompts[-2:]

    def with_vocabulary(vocab: int) -> Case:
        return verification.chain(replace(model, vocab=vocab), 32, 7)

    return [
        Sweep("prompt", "tokens", prompts, lambda n: dense.forward(model, 1, n), 2, 1),
        Sweep("prompt, backward", "tokens", prompts, lambda n: dense.backward(model, 1, n), 2, 1),
        Sweep("prompt, sliding window", "tokens", long, lambda n: dense.forward(sliding, 1, n), 1, 1),
        Sweep("scores of the last 32 queries", "tokens", contexts, lambda n: scores.scores(model, 1, n, last=32), 1, 1),
        Sweep("decoding", "context", contexts, lambda n: paged.attention(model, 1, n, spread="equal"), 1, None),
        Sweep("decoding, sliding window", "context", contexts, lambda n: paged.attention(sliding, 1, n), 0, 0),
        Sweep("decoding", "batch", batches, lambda n: paged.attention(model, n, context), 1, None),
        Sweep("decoding", "KV heads", heads, lambda n: paged.attention(with_heads(n), 8, context), 1, None),
        Sweep("selecting blocks", "context", contexts, lambda n: eviction.select(model, 1, n, scope="sequence"), 1, 1),
        Sweep("compacting", "context", contexts, lambda n: eviction.compact(model, 1, n), 1, None),
        Sweep("verifying greedy drafts", "vocabulary", ladder(16384, 262144), with_vocabulary, 1, 1),
    ]


def run(sweep: Sweep, clock: Clock, dtype: torch.dtype, *, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One row for each value. All sizes are timed in turns, so that none has the quiet minutes for itself.

    ValueError where a result is wrong: a time would mean nothing.
    """
    prepared: dict[str, tuple[int, Case, Inputs]] = {}
    memory = {}
    for value in sweep.values:
        case = sweep.case(value)
        inputs = measure.build(case, clock.device, dtype)
        wrong = measure.complaint(case, inputs, dtype)
        if wrong:
            raise ValueError(f"{case.name}: {wrong}")
        prepared[str(value)] = value, case, inputs
        memory[str(value)] = peak_bytes(case, inputs, clock.device)
    samples = clock.interleaved(
        {name: partial(case.run, inputs) for name, (_, case, inputs) in prepared.items()},
        rounds,
        seconds=seconds,
        reset=lambda name: measure.reset(*prepared[name][1:]),
    )
    rows = []
    for name, (value, case, _) in prepared.items():
        times = quantiles(samples[name])
        facts = {"sweep": sweep.name, "op": case.op, "model": case.model, "axis": sweep.axis, "value": value}
        theory = {"time_theory": sweep.time, "memory_theory": sweep.memory}
        measured = {"ms": times.p50, "p20_ms": times.p20, "p80_ms": times.p80, "memory_bytes": memory[name]}
        rows.append(facts | theory | measured)
    return rows


def peak_bytes(case: Case, inputs: Inputs, device: torch.device) -> int:
    """The most that one call has allocated at a time, its outputs included."""
    measure.reset(case, inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        case.run(inputs)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = case.run(inputs)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    del kept
    held, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def fitted(values: Sequence[int]) -> Sequence[int]:
    """The upper half of a ladder, three values at least: at small sizes the time is that of the launches."""
    return values[-max(3, -(-len(values) // 2)) :]


def slope(values: Sequence[int], measured: Sequence[float]) -> float:
    """Of the least squares line through the :func:`fitted` points on log-log axes."""
    upper = fitted(values)
    x = [math.log(value) for value in upper]
    y = [math.log(max(value, 1e-9)) for value in measured[-len(upper) :]]
    return statistics.linear_regression(x, y).slope


@dataclass(frozen=True)
class Fit:
    """The slopes of one sweep beside theory's."""

    sweep: str
    op: str
    axis: str
    time: float
    time_theory: float
    memory: float
    memory_theory: float | None

    @property
    def as_theory(self) -> bool:
        """Memory has no noise, but small constants count; less growth than theory allows is never wrong for it."""
        memory = self.memory_theory is None or self.memory <= self.memory_theory + TOLERANCE
        return abs(self.time - self.time_theory) <= TOLERANCE and memory


def by_sweep(rows: Sequence[Row]) -> list[list[Row]]:
    return [list(found) for _, found in groupby(rows, key=lambda row: (row["sweep"], row["axis"]))]


def fits(rows: Sequence[Row]) -> list[Fit]:
    fitted = []
    for points in by_sweep(rows):
        first, values = points[0], [row["value"] for row in points]
        time, memory = (slope(values, [row[name] for row in points]) for name in ("ms", "memory_bytes"))
        theory = first["time_theory"], first["memory_theory"]
        fitted.append(Fit(first["sweep"], first["op"], first["axis"], time, theory[0], memory, theory[1]))
    return fitted
