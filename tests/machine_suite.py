"""The kernel tests on the machine for PTX: how ``KVOPS_TEST_MACHINE`` runs them, and what is recorded of each.

    KVOPS_TEST_MACHINE=sm_90 KVOPS_TEST_SEED="0 1 2" KVOPS_TEST_RECORD=record.jsonl python -m pytest tests/test_paged.py
    python tests/machine_suite.py record.jsonl      # bench/results/machine/suite.json from records

Every launch of a test runs with the first seed; where anything in it was drawn from the seed, it runs again with the
others, from the same memory, and must leave the same bits. A second call with the same record leaves out the tests that
have passed in the same code: the hours may be spread. ``make test-machine`` does all of this.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
MACHINE = os.environ.get("KVOPS_TEST_MACHINE", "")
SEEDS = tuple(map(int, os.environ.get("KVOPS_TEST_SEED", "0").split()))
RECORD = os.environ.get("KVOPS_TEST_RECORD", "")
_EXECUTIONS = pytest.StashKey[list]()


@contextlib.contextmanager
def on_test_machine(item: pytest.Item) -> Iterator[None]:
    from kvops.autotune.machine import Options, on_machine

    options = Options(seed=SEEDS[0])
    with on_machine(MACHINE, options=options, more_seeds=SEEDS[1:], track_empty=False) as machine:
        item.stash[_EXECUTIONS] = machine.executions
        yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test whose launches had a fault on the machine fails, whatever their results."""
    outcome = yield
    executions = item.stash.get(_EXECUTIONS, [])
    if executions and outcome.excinfo is None:
        from kvops.autotune.machine import MachineFaultError, raise_faults

        try:
            raise_faults(executions)
        except MachineFaultError as error:
            outcome.force_exception(error)


def select(items: list[pytest.Item], config: pytest.Config) -> None:
    """Keep the tests of kernels that have not passed yet; those of the real model, which are long, at the end."""
    kernels = [item for item in items if _parameters(item).get("backend") == "triton"]
    kernels.sort(key=lambda item: item.get_closest_marker("model") is not None)
    chosen = kernels
    if RECORD:
        _write({"target": MACHINE, "collected": Counter(item.nodeid.split("::")[0] for item in kernels)})
        rows = [row for row in _rows(Path(RECORD)) if row.get("outcome") in ("passed", "skipped")]
        done = {(row["test"], row["code"], tuple(row["seeds"])) for row in rows}
        chosen = [item for item in kernels if (item.nodeid, code(item.path), SEEDS) not in done]
    kept = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = chosen


def _parameters(item: pytest.Item) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return callspec.params if callspec is not None else {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    if not RECORD or not MACHINE or not (call.when == "call" or (call.when == "setup" and not report.passed)):
        return
    executions = item.stash.get(_EXECUTIONS, [])
    row = {
        "target": MACHINE,
        "seeds": SEEDS,
        "code": code(item.path),
        "test": item.nodeid,
        "outcome": report.outcome,
        "reason": _reason(report),
        "launches": sum(execution.seed == SEEDS[0] for execution in executions),
        "runs": len(executions),
        "instructions": sum(execution.instructions for execution in executions),
        "kernels": sorted({execution.kernel for execution in executions}),
        "faults": sorted({fault.kind for execution in executions for fault in execution.faults}),
        "seconds": round(call.duration, 2),
        "machine_seconds": round(sum(execution.seconds for execution in executions), 2),
    }
    _write(row)
    executions.clear()  # they hold programs and what they covered


def _reason(report: pytest.TestReport) -> str:
    """The last line of what pytest says, without the place."""
    if report.passed:
        return ""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.strip().splitlines()[-1].removeprefix("E").strip()[:200]


@cache
def code(path: Path) -> str:
    """Changes with the kernels, their launch functions, their default configurations and the file of a test."""
    digest = hashlib.sha256(path.read_bytes())
    for source in (*sorted((ROOT / "kernels").glob("*.py")), ROOT / "autotune/config.py"):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def _write(row: dict[str, Any]) -> None:
    Path(RECORD).parent.mkdir(parents=True, exist_ok=True)
    with open(RECORD, "a") as file:
        file.write(json.dumps(row) + "\n")


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By target: how many tests there are, what came out of those that ran, and what the machine did for them."""
    found: dict[str, Any] = {}
    for target in sorted({row["target"] for row in rows}):
        collected: dict[str, int] = {}
        latest: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row["target"] != target:
                continue
            if "collected" in row:
                for name, count in row["collected"].items():
                    collected[name] = max(count, collected.get(name, 0))
            else:
                latest[row["test"]] = row
        ran = list(latest.values())
        files = {}
        for name, tests in sorted(collected.items()):
            outcomes = Counter(row["outcome"] for row in ran if row["test"].split("::")[0] == name)
            files[name] = {"tests": tests, **dict(sorted(outcomes.items()))}
        found[target] = {
            "tests": sum(collected.values()),
            **{outcome: sum(row["outcome"] == outcome for row in ran) for outcome in ("passed", "skipped", "failed")},
            "seeds": sorted({tuple(row["seeds"]) for row in ran}),
            "kernels": sorted({kernel for row in ran for kernel in row["kernels"]}),
            **{name: sum(row[name] for row in ran) for name in ("launches", "runs", "instructions")},
            "seconds": round(sum(row["seconds"] for row in ran)),
            "faults": sorted({fault for row in ran for fault in row["faults"]}),
            "not passed": {row["test"]: row["reason"] for row in ran if row["outcome"] != "passed"},
            "files": files,
        }
    return found


def table_row(target: str, row: dict[str, Any]) -> str:
    """Of the table in docs/machine.md."""
    told = [row[name] for name in ("tests", "passed", "failed", "skipped")]
    numbers = [*told, row["tests"] - sum(told[1:]), row["launches"], row["runs"], row["instructions"]]
    return f"| {target} | {' | '.join(f'{number:,}' for number in numbers)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/machine/suite.json")
    arguments = parser.parse_args()
    found = summary([row for path in arguments.records for row in _rows(path)])
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    for target, row in found.items():
        outcomes = ", ".join(f"{row[outcome]} {outcome}" for outcome in ("passed", "skipped", "failed"))
        print(f"{target}: of {row['tests']} tests {outcomes}\n{table_row(target, row)}")


if __name__ == "__main__":
    main()
