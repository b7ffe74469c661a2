"""The GPU run: ``python -m bench.gpu``, or ``make gpu``. Needs torch, triton, pytest, numpy and tabulate; no network.

    check       every kernel in every dtype against float64: the tests, real shapes, the Hopper kernels, bits that
                repeat, the real model's tokens, and compute-sanitizer where it is installed
    tune        the configurations of every kernel family, into the store of the results
    bench       every operator beside its peers
    throughput  serving in Llama-3.1-8B's shape, compressed 1x, 8x and 64x, drafts off and on
    graphs      every operator and a whole step of decoding as CUDA graphs

A phase is a set of processes, each with a time limit. A process that hangs or crashes becomes a row of the result and
does not stop the others. A second call keeps good results and repeats what failed or was not reached; --fresh starts
over.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.gpu.phases import PHASES, Setup, Step
from bench.gpu.summary import phase_summary
from bench.gpu.units import PASSED, Outcome, Unit, read_rows, run_units
from bench.timing import setting
from kvops.cli.console import quiet_without_reader

# Facts that a phase may write to the result file besides its rows.
MERGED = {"bench": ("operators.json", "operators"), "throughput": ("throughput.json", "throughput")}


def device_folder() -> str:
    """``nvidia-h100-80gb-hbm3``"""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--phases", default=",".join(PHASES), help="of %(default)s")
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>, .cache/gpu-rehearsal to rehearse")
    parser.add_argument("--rehearse", action="store_true", help="no GPU: a little of every phase on the CPU")
    parser.add_argument("--fresh", action="store_true", help="redo what is done")
    parser.add_argument("--minutes", type=float, default=8.0, help="for each phase (default: %(default)s)")
    parser.add_argument("--commit", help="what is measured, where there is no git to ask (or KVOPS_COMMIT)")
    arguments = parser.parse_args(argv)
    arguments.phases = [name for name in arguments.phases.split(",") if name]
    unknown = [name for name in arguments.phases if name not in PHASES]
    if unknown or not arguments.phases:
        parser.error(f"--phases: expected some of {', '.join(PHASES)}, got {', '.join(unknown) or 'none'}")
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no GPU here. Next step: run it on a machine with one, or rehearse: --rehearse")
    if arguments.out is None:
        rehearsal = Path(".cache") / "gpu-rehearsal"
        arguments.out = rehearsal if arguments.rehearse else results.RESULTS / device_folder()
    return arguments


def run_phase(phase: str, setup: Setup, facts: dict[str, Any], fresh: bool) -> list[Outcome]:
    """Run the units without a good result, then write the phase's results."""
    path = setup.part(phase, "units")
    kept = {} if fresh else _kept(path, facts)
    if fresh:
        shutil.rmtree(setup.out / "logs" / phase, ignore_errors=True)
    deadline = time.monotonic() + setup.seconds
    outcomes: dict[str, Outcome] = {}

    def save() -> None:
        rows = [
            {
                **{"phase": phase, "unit": outcome.unit, "status": outcome.status},
                **{"seconds": round(outcome.seconds, 1), "log": outcome.log},
                **{name: outcome.counts()[name] for name in ("passed", "failed", "skipped")},
            }
            for outcome in outcomes.values()
        ]
        results.save(path, "gpu-units", facts, rows)

    def done(outcome: Outcome) -> None:
        outcomes[outcome.unit] = outcome
        counts = ", ".join(f"{number} {name}" for name, number in sorted(outcome.counts().items()))
        print(f"{phase:<11} {outcome.unit:<28} {outcome.status:<14} {outcome.seconds:6.1f} s  {counts}", flush=True)
        save()

    for step in PHASES[phase](setup):
        todo: list[Unit] = []
        for unit in step.units:
            if unit.name in kept:
                done(Outcome(unit.name, "kept", 0.0, read_rows(unit.rows), str(unit.log)))
            else:
                todo.append(unit)
        run_units(todo, step.workers, deadline, done, _told(phase, step))
    _write(phase, setup, facts, list(outcomes.values()))
    return list(outcomes.values())


def _told(phase: str, step: Step) -> Callable[[int], None]:
    """Prints how far a step has come."""
    begun, expected = time.monotonic(), f" of about {step.expected}" if step.expected else ""

    def tell(rows: int) -> None:
        print(f"{phase:<11} {rows}{expected} {step.results} in {time.monotonic() - begun:.0f} s", flush=True)

    return tell


def _kept(path: Path, facts: dict[str, Any]) -> set[str]:
    """Units with a good result from an earlier run of the same sources on the same device."""
    if not path.exists():
        return set()
    before = results.load(path)
    if any(before["setting"].get(name) != facts[name] for name in ("commit", "device", "torch", "triton")):
        return set()
    return {row["unit"] for row in before["rows"] if row["status"] in ("finished", "kept") and not row["failed"]}


def _write(phase: str, setup: Setup, facts: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """``<phase>.json``: rows of what failed or was skipped, counts of what passed; and what all units measured."""
    rows: list[dict[str, Any]] = []
    for outcome in outcomes:
        counts = outcome.counts()
        own = {"unit": outcome.unit, "status": outcome.status, "seconds": round(outcome.seconds, 1)}
        rows.append(own | {name: counts[name] for name in ("passed", "failed", "skipped")})
        rows += [{"unit": outcome.unit, **row} for row in outcome.rows if row["outcome"] != PASSED or "error" in row]
    results.save(setup.out / f"{phase}.json", f"gpu-{phase}", facts, rows)
    if phase in MERGED:
        name, kind = MERGED[phase]
        parts = [
            results.load(setup.part(phase, unit.unit)) for unit in outcomes if setup.part(phase, unit.unit).exists()
        ]
        if parts:
            merged = [row for part in parts for row in part["rows"]]
            results.save(setup.out / name, kind, parts[0]["setting"] | {"commit": facts["commit"]}, merged)


@quiet_without_reader
def main(argv: Sequence[str] | None = None) -> int:
    """0: all is good; 1: something failed or was not reached."""
    arguments = parse(argv)
    if arguments.commit:
        os.environ["KVOPS_COMMIT"] = arguments.commit
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    facts = setting(device)
    setup = Setup(device.type, arguments.out.absolute(), 60 * arguments.minutes, os.cpu_count() or 1)
    print(", ".join(f"{name}: {value}" for name, value in facts.items() if value is not None), flush=True)
    by_phase = {phase: run_phase(phase, setup, facts, arguments.fresh) for phase in arguments.phases}
    for phase, outcomes in by_phase.items():
        print(phase_summary(phase, outcomes, setup.out))
    bad = [outcome for outcomes in by_phase.values() for outcome in outcomes if not outcome.good]
    print(f"\n{'rehearsed on a CPU, no figure counts; ' if arguments.rehearse else ''}results: {arguments.out}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
