"""The mutation table of the machine: each barrier, wait, arrival and fence of every kernel is left out in turn.

    python tests/machine_mutations.py --target sm_90      # make it again: a quarter of an hour for each target
    python tests/machine_mutations.py --target sm_90 --replay 5     # are rows of the table still true

bench/results/machine/mutations-TARGET.json says what noticed: a race or another fault, a wrong result, or nothing. What
no thread executed in any case is "not run": leaving it out shows nothing. A row of "nothing" is a barrier that the
compiler put in and that these shapes do not need, or a gap of the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import machine_cases

from kvops.autotune.machine import Execution, Options

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "bench/results/machine"
NOTHING, NOT_RUN, WRONG = "nothing", "not run", "wrong result"


def sites(execution: Execution) -> list[dict[str, Any]]:
    """What can be left out of a kernel, each with its place: source line, instruction and number among its equals."""
    found, seen = [], Counter()
    for entry in execution.program.synchronisation:
        place = f"{entry.place.file.rsplit('/', 1)[-1]}:{entry.place.line}", entry.opcode
        seen[place] += 1
        covered = bool(execution.covered[entry.index])
        found.append(
            {"line": place[0], "instruction": place[1], "number": seen[place], "index": entry.index, "covered": covered}
        )
    return found


def identity(execution: Execution) -> str:
    """Changes with the instructions of a kernel: a row of the table holds for this very code."""
    opcodes = " ".join(entry.opcode for entry in execution.program.instructions)
    return hashlib.sha256(opcodes.encode()).hexdigest()[:12]


def mutate(case: str, target: str, kernel: str, index: int, limit: int, seed: int = 0) -> str:
    """What notices that instruction ``index`` of ``kernel`` is left out in this case."""
    options = Options(seed=seed, limit=limit, first_fault_ends=True)
    machine, error = machine_cases.run(case, target, options, without={kernel: frozenset({index})})
    faults = [fault for execution in machine.executions if execution.kernel == kernel for fault in execution.faults]
    if faults:
        return faults[0].kind
    return WRONG if error else NOTHING


def table(target: str, only: str = "", kernels: str = "", stop: float = float("inf")) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    done: set[str] = set()
    for case in machine_cases.names_for(target, only):
        machine, error = machine_cases.run(case, target, Options())
        if error or machine.faults:
            raise RuntimeError(f"{case} on {target} is not right to begin with: {error or machine.faults[0]}")
        first = {execution.kernel: execution for execution in reversed(machine.executions)}
        for kernel, execution in sorted(first.items()):
            if kernel in done or kernels not in kernel:
                continue
            done.add(kernel)
            limit = 20 * max(e.instructions for e in machine.executions) + 100_000
            for site in sites(execution):
                if time.monotonic() > stop:
                    return rows
                index, covered = site.pop("index"), site.pop("covered")
                caught = mutate(case, target, kernel, index, limit) if covered else NOT_RUN
                where = {"target": target, "kernel": kernel, "code": identity(execution), "case": case}
                rows.append({**where, **site, "caught": caught})
            print(kernel, dict(Counter(row["caught"] for row in rows if row["kernel"] == kernel)), flush=True)
    return rows


def replay(target: str, count: int) -> tuple[int, list[str]]:
    """Leave out ``count`` instructions again that the table calls necessary, each of another kernel.

    Returns how many still stand in the same code, and those of them that nothing noticed.
    """
    necessary: dict[str, dict[str, Any]] = {}
    place: Counter[str] = Counter()
    path = FOLDER / f"mutations-{target}.json"
    for row in json.loads(path.read_text()) if path.exists() else ():
        if row["caught"] not in (NOTHING, NOT_RUN):
            necessary.setdefault(row["kernel"], {**row, "place": place[row["kernel"]]})
        place[row["kernel"]] += 1
    chosen = list(necessary.values())
    played, missed = 0, []
    for row in chosen[:: max(1, len(chosen) // count)][:count]:
        machine, _ = machine_cases.run(row["case"], target, Options())
        execution = next(e for e in machine.executions if e.kernel == row["kernel"])
        if identity(execution) != row["code"]:
            continue
        # Lines move with the source; the rows of a kernel stand in the order of its code.
        site = sites(execution)[row["place"]]
        played += 1
        limit = 20 * max(e.instructions for e in machine.executions) + 100_000
        if mutate(row["case"], target, row["kernel"], site["index"], limit) == NOTHING:
            missed.append(f"{row['kernel']} {row['line']} {row['instruction']}: {row['caught']} before, nothing now")
    return played, missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="sm_80")
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--kernel", default="", help="part of a kernel's name")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--replay", type=int, metavar="N", help="try N rows of the table again")
    arguments = parser.parse_args()
    if arguments.replay:
        played, missed = replay(arguments.target, arguments.replay)
        print(f"{played} rows tried again, {len(missed)} not noticed", *missed, sep="\n")
        sys.exit(bool(missed))
    rows = table(arguments.target, arguments.only, arguments.kernel, time.monotonic() + arguments.seconds)
    path = arguments.output or FOLDER / f"mutations-{arguments.target}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(len(rows), dict(Counter(row["caught"] for row in rows)))


if __name__ == "__main__":
    main()
