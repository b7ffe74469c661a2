"""The phases of the GPU run and their units."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.case import SCALES
from bench.cases import all_cases
from bench.gpu.share import planned
from bench.gpu.units import Unit
from kvops.autotune.devices import this_gpu
from kvops.autotune.inspect import TARGETS

# The longest that one test may take, compiling included, before its process is ended.
_TEST_SECONDS = 120


@dataclass(frozen=True)
class Setup:
    """What all phases share."""

    device: str
    """cuda, or cpu to rehearse: everything tiny, no figures."""
    out: Path
    seconds: float
    """For a phase."""
    cores: int

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"

    def unit(self, phase: str, name: str, *arguments: str, seconds: float, **options: object) -> Unit:
        """``python -m arguments --device D --rows PATH``."""
        rows = self.rows(phase, name)
        command = (sys.executable, "-m", *arguments, "--device", self.device, "--rows", str(rows))
        return Unit(name, command, rows, self.log(phase, name), seconds, **options)  # type: ignore[arg-type]

    def rows(self, phase: str, name: str) -> Path:
        return self.out / "logs" / phase / f"{name}.jsonl"

    def part(self, phase: str, name: str) -> Path:
        """A result file of one unit: the phase's own holds the rows of all."""
        return self.out / "logs" / phase / f"{name}.part"

    def log(self, phase: str, name: str) -> Path:
        return self.out / "logs" / phase / f"{name}.log"


@dataclass(frozen=True)
class Step:
    """Units of a phase that run together, ``workers`` at a time; the next step waits for them.

    ``results`` is what a row of theirs is called, and ``expected`` about how many will come, if that is known.
    """

    units: list[Unit]
    workers: int = 1
    results: str = "results"
    expected: int = 0


def _tests(setup: Setup) -> list[Unit]:
    """The test families that use a device, in shares."""
    shares = 1 if setup.rehearsal else setup.cores
    families = ["tests/test_merge.py"] if setup.rehearsal else ["tests"]
    units = []
    for share in range(shares):
        name = f"tests-{share}"
        rows = setup.rows("check", name)
        # Capture at the level of sys only: a crashing process can still write to the log.
        command = (sys.executable, "-m", "pytest", "-p", "bench.gpu.record", "-p", "no:cacheprovider", "-q")
        command += ("--capture=sys", "--tb=short", "--continue-on-collection-errors", *families)
        environment = {
            "KVOPS_TEST_DEVICE": setup.device,
            "KVOPS_RECORD": str(rows),
            "KVOPS_SHARE": f"{share}/{shares}",
            "KVOPS_TEST_SECONDS": str(_TEST_SECONDS),
        }
        seconds = setup.seconds
        units.append(Unit(name, command, rows, setup.log("check", name), seconds, environment, resumes=True))
    return units


def _compiled_first(setup: Setup) -> Iterator[Step]:
    """Every kernel of the tests, compiled on all cores: a process of the tests then waits for none."""
    target = device_target()
    if target not in TARGETS:
        return
    environment = {"KVOPS_TEST_MACHINE": target, "KVOPS_TEST_DEVICE": "cpu"}
    environment |= {
        "CUDA_VISIBLE_DEVICES": "",
        "HIP_VISIBLE_DEVICES": "",
    }  # it takes no memory of a GPU
    units = [
        setup.unit(
            "check", f"compile-{share}", "bench.gpu.compile_first", "--target", target,
            "--share", f"{share}/{setup.cores}", "--seconds", str(0.6 * setup.seconds), seconds=0.75 * setup.seconds,
            environment=environment,
        )
        for share in range(setup.cores)
    ]  # fmt: skip
    yield Step(units, setup.cores, "kernels", sum(planned()["variants"].values()) if target == "sm_90" else 0)


def check(setup: Setup) -> Iterator[Step]:
    """Tests, real shapes, the Hopper kernels, the model and the sanitizer; the tests, most of the work, start first,
    once their kernels are compiled."""
    if not setup.rehearsal:
        yield from _compiled_first(setup)
    scale = "tiny" if setup.rehearsal else "check"
    shares = 1 if setup.rehearsal else max(1, setup.cores // 4)
    module = "bench.gpu.cases"
    ops = ("--ops", "flash_attention", "paged_attention") if setup.rehearsal else ()
    dtypes = ("--dtypes", "float32") if setup.rehearsal else ()
    shapes = [
        setup.unit(
            "check", f"shapes-{share}", module, "--scale", scale, "--share", f"{share}/{shares}", *dtypes, *ops,
            seconds=300,
        )
        for share in range(shares)
    ]  # fmt: skip
    gluon = setup.unit("check", "gluon", module, "--gluon", "--scale", scale, seconds=240)
    greedy = setup.unit("check", "greedy", "bench.gpu.greedy", seconds=180)
    short = [gluon] if setup.rehearsal else [gluon, greedy, *_sanitized(setup)]
    yield Step([*_tests(setup), *shapes, *short], workers=1 if setup.rehearsal else setup.cores + 4)


def _sanitized(setup: Setup) -> Iterator[Unit]:
    """The small cases under compute-sanitizer, where it is: illegal accesses, and races on shared memory."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        return
    for tool, environment in (("memcheck", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}), ("racecheck", {})):
        for name, extra in ((tool, ()), (f"{tool}-gluon", ("--gluon",))):
            unit = setup.unit(
                "check", name, "bench.gpu.cases", "--scale", "tiny", "--inexact", "--dtypes", "bfloat16", "float32",
                *extra, seconds=240, environment=environment,
            )  # fmt: skip
            prefix = (sanitizer, "--tool", tool, "--error-exitcode", "86", "--print-limit", "20")
            yield Unit(unit.name, prefix + unit.command, unit.rows, unit.log, unit.seconds, unit.environment)


def find_sanitizer() -> str | None:
    """compute-sanitizer, on the path or where the CUDA toolkit installs it."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")
    return program or shutil.which("compute-sanitizer", path=f"{home}/compute-sanitizer")


def tune(setup: Setup) -> Iterator[Step]:
    """Tune into a separate store beside the results, to be checked before it is shipped.

    Every candidate compiles on all cores first, without launching: the tuner, which has the GPU for itself, then finds
    the binaries in Triton's cache.
    """
    store = setup.out / "tuned"
    if setup.rehearsal:
        yield Step([setup.unit("tune", "compile", "bench.gpu.tune", "--store", str(store), seconds=120)])
        return
    tables = setup.part("tune", "feasible")
    words = ("kvops.autotune", "prune", "--targets", device_target(), "--output", str(tables))
    limit = setup.seconds / 3
    command = (sys.executable, "-m", *words, "--jobs", str(setup.cores), "--limit-seconds", str(limit))
    yield Step([Unit("compile", command, setup.rows("tune", "compile"), setup.log("tune", "compile"), limit + 60)])
    budget = str(setup.seconds / 2)
    yield Step(
        [setup.unit("tune", "tune", "bench.gpu.tune", "--store", str(store), "--budget", budget, seconds=setup.seconds)]
    )


def device_target() -> str:
    """``sm_90`` or ``gfx942``: what kernels are compiled for here."""
    return this_gpu().arch


def bench(setup: Setup) -> Iterator[Step]:
    """Kernels compile on all cores first, of shorter shapes: only whether a length can be divided by 16 is compiled in.
    Then one operator after another has the GPU for itself."""
    if not setup.rehearsal:
        yield Step(
            [
                setup.unit(
                    "bench", f"compile-{share}", "bench.gpu.cases", "--scale", "check", "--inexact",
                    "--dtypes", "bfloat16", "--share", f"{share}/{setup.cores}", seconds=150,
                )
                for share in range(setup.cores)
            ],
            workers=setup.cores,
        )  # fmt: skip
    scale = "tiny" if setup.rehearsal else "full"
    operators = list(dict.fromkeys(case.op for case in all_cases(SCALES[scale])))
    yield Step(
        [
            setup.unit(
                "bench", op, "bench.gpu.operators", op, "--scale", scale, "--json", str(setup.part("bench", op)),
                seconds=180,
            )
            for op in (operators[:1] if setup.rehearsal else operators)
        ]
    )  # fmt: skip


def graphs(setup: Setup) -> Iterator[Step]:
    parts = ["step", *([] if setup.rehearsal else ["operators"])]
    few = ("--dtypes", "float32", "--steps", "8") if setup.rehearsal else ()
    yield Step(
        [setup.unit("graphs", part, "bench.gpu.graphs", part, *few, seconds=420) for part in parts], workers=len(parts)
    )


def throughput(setup: Setup) -> Iterator[Step]:
    """A process for each compression: each needs nearly all of the memory, and is kept when another fails."""
    shape = "tiny" if setup.rehearsal else "auto"
    for ratio in (1, 8, 64):
        path = setup.part("throughput", f"{ratio}x")
        yield Step(
            [
                setup.unit(
                    "throughput", f"{ratio}x", "bench.throughput", "--shape", shape, "--compression", str(ratio),
                    "--json", str(path), seconds=300,
                )
            ]
        )  # fmt: skip


PHASES: dict[str, Callable[[Setup], Iterator[Step]]] = {
    "check": check,
    "tune": tune,
    "bench": bench,
    "throughput": throughput,
    "graphs": graphs,
}
