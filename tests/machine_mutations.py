"""The mutation table of the machine: each barrier, wait, arrival and fence of every kernel is left out in turn.

    python tests/machine_mutations.py --target sm_90      # make it again where code has changed: up to half an hour
    python tests/machine_mutations.py --target sm_90 --replay 5     # are rows of the table still true

bench/results/machine/mutations-TARGET.json says what noticed: a race or another fault, a wrong result, or nothing. What
no thread executed in any case is "not run": leaving it out shows nothing. A row of "nothing" is a barrier that the
compiler put in and that these shapes do not need, or a gap of the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import machine_cases
from machine_call import identity, sites

from kvops.autotune.machine import Execution, Machine, Options

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "bench/results/machine"
NOTHING, NOT_RUN, WRONG = "nothing", "not run", "wrong result"
# Cases for which kernels that stand in the table already are compiled to other code, worth rows of its own.
MORE = ("paged_packed",)
# Kernels of these cases have no matrix products or asynchronous copies: the same instructions on sm_80 and sm_90.
ALIKE = ("paged_append", "paged_schedule", "select", "compact", "copy", "verify", "prompt", "merge")


def mutate(case: str, target: str, kernel: str, index: int, limit: int, seed: int = 0) -> str:
    """What notices that instruction ``index`` of ``kernel`` is left out in this case."""
    options = Options(seed=seed, limit=limit, first_fault_ends=True)
    machine, error = machine_cases.run(case, target, options, without={kernel: frozenset({index})})
    faults = [fault for execution in machine.executions if execution.kernel == kernel for fault in execution.faults]
    if faults:
        return faults[0].kind
    return WRONG if error else NOTHING


def kept_rows(target: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The table as it stands, by case and kernel."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    path = FOLDER / f"mutations-{target}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    for row in rows:
        found.setdefault((row["case"], row["kernel"]), []).append(row)
    return found


def table_row(target: str) -> str:
    """Of the table in docs/machine.md."""
    rows = [row for rows in kept_rows(target).values() for row in rows]
    ran = [row for row in rows if row["caught"] != NOT_RUN]
    noticed = sum(row["caught"] != NOTHING for row in ran)
    return f"| {target} | {len({row['kernel'] for row in rows})} | {len(rows)} | {len(ran)} | {noticed} |"


def table(target: str, only: str = "", kernels: str = "", again: bool = False) -> Iterator[list[dict[str, Any]]]:
    """The rows of each kernel; those of code that has not changed stand as they are, unless ``again``."""
    kept = {} if again else kept_rows(target)
    done: set[str] = set()
    for case in machine_cases.names_for(target, only, ALIKE if target != "sm_80" else ()):
        machine, error = machine_cases.run(case, target, Options())
        if error or machine.faults:
            raise RuntimeError(f"{case} on {target} is not right to begin with: {error or machine.faults[0]}")
        first = {execution.kernel: execution for execution in reversed(machine.executions)}
        for kernel, execution in sorted(first.items()):
            if kernels not in kernel or (kernel in done and case not in MORE):
                continue
            where = {"target": target, "kernel": kernel, "code": identity(execution), "case": case}
            rows = kept.get((case, kernel), [])
            if not rows or rows[0]["code"] != where["code"]:
                rows = [{**where, **row} for row in _rows(execution, case, target, machine)]
            if rows:  # else the kernel may have something to leave out in another case
                done.add(kernel)
            print(kernel, dict(Counter(row["caught"] for row in rows)), flush=True)
            yield rows


def _rows(execution: Execution, case: str, target: str, machine: Machine) -> list[dict[str, Any]]:
    limit = 20 * max(e.instructions for e in machine.executions) + 100_000
    rows = []
    for site in sites(execution):
        index, covered = site.pop("index"), site.pop("covered")
        caught = mutate(case, target, execution.kernel, index, limit) if covered else NOT_RUN
        rows.append({**site, "caught": caught})
    return rows


def changed(target: str, cases: Mapping[str, dict[str, Any]]) -> list[str]:
    """What of the table no longer stands, by the rows of :func:`machine_cases.row` of each case."""
    found = []
    for (case, kernel), rows in kept_rows(target).items():
        told = cases.get(case, {"code": {}, "synchronisation": {}})
        if told["code"].get(kernel) == rows[0]["code"]:
            continue
        now = Counter(told["synchronisation"].get(kernel, []))
        for row in rows:
            place = f"{row['line']} {row['instruction']}"
            now[place] -= 1
            if now[place] < 0:
                found.append(f"{kernel} on {target}: {place} is gone; leaving it out was noticed by: {row['caught']}")
        found.append(f"{kernel} on {target}: its code has changed since the table was made")
    return found


def replay(target: str, count: int) -> tuple[int, list[str]]:
    """Leave out ``count`` instructions again that the table calls necessary, each of another kernel.

    Returns how many still stand in the same code, and those of them that nothing noticed.
    """
    necessary: dict[str, dict[str, Any]] = {}
    for rows in kept_rows(target).values():
        for place, row in enumerate(rows):
            if row["caught"] not in (NOTHING, NOT_RUN):
                necessary.setdefault(row["kernel"], {**row, "place": place})
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
    parser.add_argument("--again", action="store_true", help="rows of code that has not changed, too")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--replay", type=int, metavar="N", help="try N rows of the table again")
    arguments = parser.parse_args()
    if arguments.replay:
        played, missed = replay(arguments.target, arguments.replay)
        print(f"{played} rows tried again, {len(missed)} not noticed", *missed, sep="\n")
        sys.exit(bool(missed))
    path = arguments.output or FOLDER / f"mutations-{arguments.target}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for found in table(arguments.target, arguments.only, arguments.kernel, arguments.again):
        rows += found
        path.with_suffix(".part").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    path.with_suffix(".part").replace(path)
    print(len(rows), dict(Counter(row["caught"] for row in rows)))


if __name__ == "__main__":
    main()
