"""What a call costs the host before its first launch, part by part: ``python -m bench.overhead``. No GPU is needed.

The kernels are those of a GPU, chosen for an H100 by a stand-in driver, and ``JITFunction.run`` does nothing but look
at the clock: what is timed is everything from ``torch.ops.kvops.X.default`` to the launch, and nothing of Triton's own
launcher. Contenders take turns of 32 calls, as the layers of a model do; medians and minima are over all calls but the
first of each turn. On a busy machine put ``chrt -f 50`` in front.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench import results, table
from bench.timing import setting
from kvops.autotune.inspect import TARGETS, CompileOnlyDriver
from kvops.autotune.lookup import choose
from kvops.cli.console import positive, quiet_without_reader
from kvops.kernels.device import current_device
from kvops.kernels.paged_append import paged_append as launch_append
from kvops.kernels.paged_attention import paged_attention as launch_attention
from kvops.kernels.paged_schedule import paged_schedule
from kvops.ops import paged_checks

_TARGET = "sm_90"
_LAYERS = 32
# A sample is this many calls of what takes less than a microsecond: the clock itself takes 0.05.
_CALLS = 20

Contender = Callable[[], float]
"""Runs once and returns microseconds."""


@contextmanager
def launches_stubbed() -> Iterator[list[int]]:
    """Inside, operators on CPU tensors go the way of a GPU and every launch only appends the time to the list."""
    times: list[int] = []
    run, active, interpret = JITFunction.run, driver._active, os.environ.get("TRITON_INTERPRET")

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        times.append(perf_counter_ns())

    JITFunction.run = launch
    driver.set_active(CompileOnlyDriver.of(TARGETS[_TARGET]))  # type: ignore[arg-type]
    # The kernels were decorated without it; the registry now sends CPU tensors to them.
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield times
    finally:
        JITFunction.run = run
        driver.set_active(active)  # type: ignore[arg-type]
        os.environ.pop("TRITON_INTERPRET")
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def whole(call: Callable[[], object]) -> Contender:
    def once() -> float:
        started = perf_counter_ns()
        call()
        return (perf_counter_ns() - started) / 1e3

    return once


def repeated(call: Callable[[], object]) -> Contender:
    """For what takes less than a microsecond; the loop's own 0.03 µs are in it."""

    def once() -> float:
        started = perf_counter_ns()
        for _ in range(_CALLS):
            call()
        return (perf_counter_ns() - started) / 1e3 / _CALLS

    return once


def to_launch(call: Callable[[], object], launches: list[int]) -> Contender:
    def once() -> float:
        launches.clear()
        started = perf_counter_ns()
        call()
        return (launches[0] - started) / 1e3

    return once


def contenders(launches: list[int]) -> dict[str, Contender]:
    """Decoding of 8 sequences with 8 KV heads of 128 and 32 query heads over a ragged bfloat16 cache of 8192 slots."""
    batch, heads, group, width, blocks, size = 8, 8, 4, 128, 512, 16
    q = torch.empty(batch, 1, heads * group, width, dtype=torch.bfloat16)
    k, v = torch.empty(2, batch, 1, heads, width, dtype=torch.bfloat16)
    k_cache, v_cache = torch.empty(2, 64, size, width, dtype=torch.bfloat16)
    tables = torch.zeros(batch, heads, blocks, dtype=torch.int32)
    lens = torch.zeros(batch, heads, dtype=torch.int32)
    schedule = paged_schedule(lens, size)
    a = torch.empty(8)
    out = torch.empty(8)
    key = "paged_attention", current_device(), width, 2, 2, size, group, batch * heads, blocks * size
    attention, append, add = torch.ops.kvops.paged_attention.default, torch.ops.kvops.paged_append.default, torch.add
    operands = q, k_cache, v_cache, tables, lens
    launch = launch_attention.prepare(*operands, schedule=schedule)
    new_tokens = k, v, k_cache, v_cache, tables, lens
    append_launch = launch_append.prepare(*new_tokens)

    def decode() -> object:
        return attention(*operands, schedule=schedule)

    return {
        "torch.add(a, b, out=c)": whole(lambda: add(a, a, out=out)),
        "decode: to the launch": to_launch(decode, launches),
        "decode: whole call, two launches": whole(decode),
        "decode: checks": whole(lambda: paged_checks.check_attention(*operands, schedule=schedule)),
        "decode: launch function": to_launch(lambda: launch(*operands, schedule=schedule), launches),
        "append: to the launch": to_launch(lambda: append(*new_tokens), launches),
        "append: checks": whole(lambda: paged_checks.check_append(*new_tokens)),
        "append: launch function": to_launch(lambda: append_launch(*new_tokens), launches),
        "lookup: choose, warm": repeated(lambda: choose(*key)),
        "lookup: current_device": repeated(current_device),
    }


def measure(rounds: int) -> list[dict[str, Any]]:
    with launches_stubbed() as launches, torch.no_grad():
        by_name = contenders(launches)
        samples: dict[str, list[float]] = {name: [] for name in by_name}
        for _ in range(rounds):
            for name, once in by_name.items():
                samples[name] += [once() for _ in range(_LAYERS)][1:]
    rows = [
        {
            "part": name,
            "us_p50": round(statistics.median(times), 3),
            "us_min": round(min(times), 3),
            "calls": len(times),
        }
        for name, times in samples.items()
    ]
    dispatch = {row["part"]: row["us_p50"] for row in rows}
    for row in rows:
        row["x_torch_add"] = round(row["us_p50"] / dispatch["torch.add(a, b, out=c)"], 2)
    return rows


@quiet_without_reader
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=positive, default=100)
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.rounds)
    facts = setting(torch.device("cpu")) | {"target": _TARGET, "threads": 1}
    if arguments.json:
        results.save(arguments.json, "overhead", facts, rows)
    width = max(len(row["part"]) for row in rows)
    print(f"{'':{width}}   median      min   x torch.add")
    for row in rows:
        print(f"{row['part']:{width}} {row['us_p50']:8.2f} {row['us_min']:8.2f} {row['x_torch_add']:10.1f}   µs")
    print(table.setting_text(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
