"""How long the tests of the GPU run take, computed without a GPU: ``python -m bench.gpu.plan --compiled FILE``.

The tests run with Triton's launches stubbed for Hopper: each tells which variants of which kernels it launches. FILE
has the seconds of compiling each kernel, as written with an empty ``TRITON_CACHE_DIR`` by

    python -m kvops.autotune inspect --cases tests/compile_cases.py --targets sm_90 --json FILE

From both follow the seconds of each test (``compile_costs.json``, by which ``share.py`` shares out) and, by simulating
16 processes, those of the two steps: everything is compiled, then tested. Results in the tests are garbage, so that a
test may end before its last launch: its later variants are missing.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from bench.gpu.share import COSTS, function_of, rank, shares
from bench.gpu.stubs import StubbedTests, run_stubbed
from kvops.autotune.inspect import FACTS, CompiledLaunch, compile_only

TARGET = "sm_90"
WORKERS = 16
# Of the start of a process (imports, collecting): assumed.
START_SECONDS = 40.0
# Of a test of a Gluon kernel, besides compiling: its references in float64 on one core. The mean CPU time of 42 tests,
# drawn at random, is 0.74 on a shared core.
REFERENCE_SECONDS = 0.8
_ABOUT = (
    "Computed by python -m bench.gpu.plan, not measured on a GPU: variants of kernels that the tests launch, from "
    "stubbed launches for sm_90; seconds of compiling one variant of a kernel on a shared CPU core; a simulation of "
    "the processes of the tests alone, with CPU times of tests besides compiling, a measured mean for the references "
    "of Gluon kernels, and an assumed time for the start of a process."
)

Launched = dict[str, list[tuple[str, str]]]
"""By test: kernel and identity of each variant that it launches."""


class _Known(dict[str, dict[str, Any]]):
    """Facts of every variant, so that nothing is compiled."""

    def __bool__(self) -> bool:
        return True

    def get(self, identity: str, default: Any = None) -> Any:
        return dict.fromkeys(FACTS, 0)


def launched(files: Sequence[str]) -> tuple[Launched, dict[str, float]]:
    """Run the tests with stubbed launches, in a process of their own: their variants, and their seconds of CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "noted")
        path.touch()
        environment = {**os.environ, "KVOPS_PLAN": str(path), "KVOPS_TEST_MACHINE": TARGET}
        command = [sys.executable, "-m", "bench.gpu.plan", "--inside", *files]
        subprocess.run(command, env=environment, check=False)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    variants = {test: [(kernel, identity) for kernel, identity in own] for test, own, _ in rows}
    return variants, {test: seconds for test, _, seconds in rows}


def _inside(files: Sequence[str]) -> int:
    """In the process of :func:`launched`."""

    def stub() -> AbstractContextManager[list[CompiledLaunch]]:
        return compile_only(TARGET, _Known())

    def noted(test: str, launches: list[CompiledLaunch], seconds: float) -> None:
        variants = sorted({(launch.kernel, launch.identity) for launch in launches})
        with Path(os.environ["KVOPS_PLAN"]).open("a") as file:
            file.write(json.dumps([test, variants, seconds]) + "\n")

    return run_stubbed(StubbedTests(stub, noted), files)


def makespan(
    by_worker: Sequence[Sequence[str]], variants: Launched, seconds: Mapping[str, float], besides: Mapping[str, float]
) -> float:
    """The seconds until the last process is done: ``seconds`` for a variant of a kernel, ``besides`` for a test.

    A variant on disk costs nothing; one that another process compiles at the moment is waited for.
    """
    ready: dict[tuple[str, str], float] = {}
    queue = [(START_SECONDS, worker, 0) for worker in range(len(by_worker))]
    heapq.heapify(queue)
    end = 0.0
    while queue:
        now, worker, place = heapq.heappop(queue)
        end = max(end, now)
        if place == len(by_worker[worker]):
            continue
        test = by_worker[worker][place]
        for variant in variants[test]:
            if variant not in ready:
                ready[variant] = now + seconds[variant[0]]
            now = max(now, ready[variant])
        heapq.heappush(queue, (now + besides[test], worker, place + 1))
    return end


def plan(variants: Launched, seconds: Mapping[str, float], stubbed: Mapping[str, float]) -> dict[str, Any]:
    """Seconds per test of each function, compiled first and then run, and of both steps.

    ``seconds`` are those of compiling a variant of a kernel, ``stubbed`` those of a test with stubbed launches. Where
    the references are not stubbed (``rank`` below 2), they are in the latter.
    """
    running = {test: REFERENCE_SECONDS if rank(test) == 2 else stubbed[test] for test in variants}
    first: set[tuple[str, str]] = set()
    compiling: dict[str, list[float]] = defaultdict(list)
    testing: dict[str, list[float]] = defaultdict(list)
    for test, own in variants.items():
        new = set(own) - first
        first |= new
        compiling[function_of(test)].append(stubbed[test] + sum(seconds[kernel] for kernel, _ in new))
        testing[function_of(test)].append(running[test])
    costs = {
        step: {function: round(statistics.mean(times), 2) for function, times in total.items()}
        for step, total in (("compile", compiling), ("test", testing))
    }
    names = list(variants)
    compiled = makespan(shares(names, names, WORKERS, costs["compile"]), variants, seconds, stubbed)
    nothing_left: Launched = {test: [] for test in names}
    tested = makespan(shares(names, names, WORKERS, costs["test"]), nothing_left, {}, running)
    return {
        "seconds_per_test": costs,
        "variants": {kernel: sum(name == kernel for name, _ in first) for kernel in sorted(seconds)},
        "seconds_per_variant": {kernel: seconds[kernel] for kernel in sorted(seconds)},
        "seconds_of_a_reference": REFERENCE_SECONDS,
        "seconds_of_a_start": START_SECONDS,
        "tests": len(names),
        "workers": WORKERS,
        "seconds_compiling": round(compiled),
        "seconds_testing": round(tested),
        "seconds": round(compiled + tested),
    }


def compile_seconds(path: Path) -> dict[str, float]:
    """The mean over the launches of each kernel in a file of ``autotune inspect``."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in json.loads(path.read_text()):
        for launch in row["launches"]:
            if launch["compile_seconds"]:
                found[launch["kernel"]].append(launch["compile_seconds"])
    return {kernel: round(statistics.mean(times), 2) for kernel, times in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.plan", description=__doc__)
    parser.add_argument("--compiled", type=Path, help="what autotune inspect found, as JSON")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", default=["tests"])
    arguments = parser.parse_args()
    if arguments.inside:
        return _inside(arguments.files)
    measured = compile_seconds(arguments.compiled)
    variants, stubbed = launched(arguments.files)
    kernels = {kernel for own in variants.values() for kernel, _ in own}
    typical = statistics.mean(measured.values())
    found = plan(variants, {kernel: measured.get(kernel, round(typical, 2)) for kernel in kernels}, stubbed)
    COSTS.write_text(json.dumps({"about": _ABOUT} | found, indent=1) + "\n")
    steps = f"{found['seconds_compiling']} s of compiling, {found['seconds_testing']} s of testing"
    print(f"{found['tests']} tests take {found['seconds']} s ({steps}): {COSTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
