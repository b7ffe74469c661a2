"""How long the tests of the GPU run take, computed without a GPU: ``python -m bench.gpu.plan --compiled FILE``.

The tests run with Triton's launches stubbed for Hopper: each tells which variants of which kernels it launches. FILE
has the seconds of compiling each kernel, as written with an empty ``TRITON_CACHE_DIR`` by

    python -m kvops.autotune inspect --cases tests/compile_cases.py --targets sm_90 --json FILE

From both follow the seconds of each test (``compile_costs.json``, by which ``share.py`` shares out) and, by simulating
16 processes, those of the whole. Results in the tests are garbage, so that a test may end before its last launch: its
later variants are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bench.gpu.record import needs_device
from bench.gpu.share import COSTS, function_of, rank, shares
from kvops.autotune.inspect import FACTS, compile_only

TARGET = "sm_90"
WORKERS = 16
# Of the start of a process (imports, collecting): assumed.
START_SECONDS = 40.0
# Of a test of a Gluon kernel, besides compiling: its references in float64 on one core. The mean CPU time of 42 tests,
# every 40th or so, on a shared core. ``compile_costs.json`` was computed with 2.0, assumed.
REFERENCE_SECONDS = 2.7
_PATIENCE = 20
_ABOUT = (
    "Computed by python -m bench.gpu.plan, not measured on a GPU: variants of kernels that the tests launch, from "
    "stubbed launches for sm_90; seconds of compiling one variant of a kernel on a shared CPU core; a simulation of "
    "the processes of the tests alone, with CPU times of tests besides compiling, and assumed times for the start of a "
    "process and for the references of Gluon kernels."
)

Launched = dict[str, list[tuple[str, str]]]
"""By test: kernel and identity of each variant that it launches."""


class _OnCPU(TorchFunctionMode):
    """Tensors that a test wants on the GPU are made on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: self._here(name, value) for name, value in (kwargs or {}).items()}
        return function(*(self._here("", value) for value in args), **kwargs)

    @staticmethod
    def _here(name: str, value: Any) -> Any:
        return "cpu" if isinstance(value, str) and value == "cuda" else value


class _Known(dict[str, dict[str, Any]]):
    """Facts of every variant, so that nothing is compiled."""

    def __bool__(self) -> bool:
        return True

    def get(self, identity: str, default: Any = None) -> Any:
        return dict.fromkeys(FACTS, 0)


def _agree(*args: Any, **kwargs: Any) -> None:
    """For garbage, so that a test goes on to its next launch."""


def _no_attention(q: Any, k: Any, v: Any, *, sinks: Any = None, **options: Any) -> tuple[Any, Any, None]:
    """In the place of references that take seconds; their time is ``REFERENCE_SECONDS``."""
    tie = 0 * sum(x.sum() for x in (q, k, v, sinks) if x is not None)
    batch, rows, heads, _ = q.shape
    return torch.zeros(batch, rows, heads, v.shape[-1]) + tie, torch.zeros(batch, heads, rows) + tie, None


_STAND_INS = {"assert_accurate": _agree}
_REFERENCES = {"attention": _no_attention, "rounded": lambda *args, **kwargs: (None,) * 3}


class Plugin:
    """Stubs the launches of each test, and notes them down in the file of ``KVOPS_PLAN``."""

    @pytest.hookimpl(wrapper=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> Iterator[None]:
        collected = list(items)
        yield  # the suite on the machine for PTX, whose way the tests go here, leaves out what runs there no kernel
        items[:] = [item for item in collected if needs_device(item) and self._runs_kernels(item)]
        for item in items:
            item.own_markers = [mark for mark in item.own_markers if mark.name not in ("skip", "skipif")]
            for name, stand_in in (_STAND_INS | (_REFERENCES if rank(item.nodeid) == 2 else {})).items():
                if hasattr(item.module, name):  # type: ignore[attr-defined]
                    setattr(item.module, name, stand_in)  # type: ignore[attr-defined]
        torch.testing.assert_close = _agree

    @staticmethod
    def _runs_kernels(item: Any) -> bool:
        callspec = getattr(item, "callspec", None)
        return callspec is None or callspec.params.get("backend", "triton") == "triton"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: Any) -> Any:
        os.environ["TRITON_INTERPRET"] = "1"  # CPU tensors go to the kernels, which were imported for GPUs

        def too_long(*_: Any) -> None:
            raise TimeoutError("garbage went in circles")

        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(_PATIENCE)
        launches: list[Any] = []
        started = time.process_time()
        try:
            with _OnCPU(), compile_only(TARGET, _Known()) as launches:
                return (yield)
        finally:
            signal.alarm(0)
            variants = sorted({(launch.kernel, launch.identity) for launch in launches})
            with Path(os.environ["KVOPS_PLAN"]).open("a") as file:
                file.write(json.dumps([item.nodeid, variants, time.process_time() - started]) + "\n")


def launched(files: Sequence[str]) -> tuple[Launched, dict[str, float]]:
    """Run the tests with stubbed launches, in a process of their own: their variants, and their seconds of CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        noted = Path(folder, "noted")
        noted.touch()
        environment = {**os.environ, "KVOPS_PLAN": str(noted), "KVOPS_TEST_MACHINE": TARGET}
        command = [sys.executable, "-m", "bench.gpu.plan", "--inside", *files]
        subprocess.run(command, env=environment, check=False)
        rows = [json.loads(line) for line in noted.read_text().splitlines()]
    variants = {test: [(kernel, identity) for kernel, identity in own] for test, own, _ in rows}
    return variants, {test: REFERENCE_SECONDS if rank(test) == 2 else seconds for test, _, seconds in rows}


@contextlib.contextmanager
def _without_machine() -> Iterator[None]:
    """The tests' fixture would run launches on the machine for PTX."""
    import kvops.autotune.machine as machine

    before = machine.on_machine
    machine.on_machine = lambda *args, **kwargs: contextlib.nullcontext(_NoExecutions())  # type: ignore[assignment]
    try:
        yield
    finally:
        machine.on_machine = before


class _NoExecutions:
    executions: tuple[()] = ()


def makespan(
    by_worker: Sequence[Sequence[str]],
    variants: Launched,
    seconds: Mapping[str, float],
    besides: Mapping[str, float],
    *,
    once: bool,
) -> float:
    """The seconds until the last process is done: ``seconds`` for a variant of a kernel, ``besides`` for a test.

    A variant on disk costs nothing; one that another process compiles at the moment is waited for if ``once``, else
    compiled again.
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
            done = ready.get(variant)
            if done is None:
                now += seconds[variant[0]]
                ready[variant] = now
            elif done > now:
                now = done if once else now + seconds[variant[0]]
        heapq.heappush(queue, (now + besides[test], worker, place + 1))
    return end


def plan(variants: Launched, seconds: Mapping[str, float], besides: Mapping[str, float]) -> dict[str, Any]:
    """Seconds per test of each function, and of the whole as it was shared out and as it is."""
    first: set[tuple[str, str]] = set()
    total: dict[str, list[float]] = defaultdict(list)
    for test, own in variants.items():
        new = set(own) - first
        first |= new
        total[function_of(test)].append(besides[test] + sum(seconds[kernel] for kernel, _ in new))
    per_test = {function: round(statistics.mean(times), 2) for function, times in total.items()}
    names = list(variants)
    before = [names[worker::WORKERS] for worker in range(WORKERS)]
    return {
        "seconds_per_test": per_test,
        "variants": {kernel: sum(name == kernel for name, _ in first) for kernel in sorted(seconds)},
        "seconds_per_variant": {kernel: seconds[kernel] for kernel in sorted(seconds)},
        "tests": len(names),
        "workers": WORKERS,
        "seconds_shared_out_by_turns": round(makespan(before, variants, seconds, besides, once=False)),
        "seconds": round(makespan(shares(names, names, WORKERS, per_test), variants, seconds, besides, once=True)),
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
        with _without_machine():
            return int(pytest.main(["-q", "-p", "no:cacheprovider", *arguments.files], [Plugin()]))
    measured = compile_seconds(arguments.compiled)
    variants, besides = launched(arguments.files)
    kernels = {kernel for own in variants.values() for kernel, _ in own}
    typical = statistics.mean(measured.values())
    found = plan(variants, {kernel: measured.get(kernel, round(typical, 2)) for kernel in kernels}, besides)
    COSTS.write_text(json.dumps({"about": _ABOUT} | found, indent=1) + "\n")
    before = found["seconds_shared_out_by_turns"]
    print(f"{found['tests']} tests take {found['seconds']} s, shared out by turns {before} s: {COSTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
