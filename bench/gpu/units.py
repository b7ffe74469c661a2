"""Pieces of the GPU run: each a process of its own with a time limit, so that none can hide what another found."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
PROGRESS_SECONDS = 15.0

Row = dict[str, Any]
"""What a unit found: at least ``name``, ``outcome`` (passed, failed or skipped) and ``note``."""


@dataclass(frozen=True)
class Unit:
    """One process.

    It appends what it finds to ``rows``, a JSON line each (:func:`report`), as it goes: what a process found before it
    died is kept. A unit that ``resumes`` reads that file when it starts and goes on behind it; it is started again
    after it died, as long as each start finds something.
    """

    name: str
    command: tuple[str, ...]
    rows: Path
    log: Path
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    resumes: bool = False


@dataclass
class Outcome:
    """How a unit ended, and what it found."""

    unit: str
    status: str
    """finished, failed (exit code), died (signal), timed out, not reached or kept (from an earlier run)."""
    seconds: float
    rows: list[Row]
    log: str

    @property
    def complete(self) -> bool:
        return self.status in ("finished", "kept")

    def counts(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for row in self.rows:
            counts[row["outcome"]] += row.get("count", 1)
        return counts

    @property
    def good(self) -> bool:
        """A process that ended well and found nothing tested nothing."""
        return self.complete and bool(self.rows) and not self.counts()[FAILED]


def report(path: Path, name: str, outcome: str, note: str = "", **facts: Any) -> None:
    """Append a row; whole lines, on disk at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({"name": name, "outcome": outcome, "note": note, **facts}) + "\n")


def read_rows(path: Path) -> list[Row]:
    """The rows that were reported; a line that a dying process left unfinished is passed over."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def keep_rows(path: Path, wanted: Callable[[Row], bool]) -> None:
    """Forget the other rows."""
    rows = [row for row in read_rows(path) if wanted(row)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_unit(unit: Unit, deadline: float = float("inf")) -> Outcome:
    """Run it (again, while it resumes), within its own limit and before ``deadline`` (``time.monotonic``)."""
    started = time.monotonic()
    deadline = min(deadline, started + unit.seconds)
    unit.log.parent.mkdir(parents=True, exist_ok=True)
    unit.log.write_bytes(b"")
    if unit.resumes:
        keep_rows(unit.rows, lambda row: row["outcome"] in (PASSED, SKIPPED))
    else:
        keep_rows(unit.rows, lambda row: False)
    while True:
        before = len(read_rows(unit.rows))
        status = _run_once(unit, deadline)
        ended = status == "finished" or (status == "timed out" and time.monotonic() >= deadline)
        if ended or not unit.resumes or len(read_rows(unit.rows)) == before:
            break
    return Outcome(unit.name, status, time.monotonic() - started, read_rows(unit.rows), str(unit.log))


def _run_once(unit: Unit, deadline: float) -> str:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **unit.environment}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    with unit.log.open("ab") as log:
        log.write(f"$ {' '.join(unit.command)}\n".encode())
        log.flush()
        try:
            process = subprocess.Popen(
                unit.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            log.write(f"{error}\n".encode())
            return "failed (did not start)"
        try:
            code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _end(process)
            return "timed out"
        finally:
            _end(process)  # whatever it started and left behind, too
    if code == 0:
        return "finished"
    return f"died ({signal.Signals(-code).name})" if code < 0 else f"failed (exit {code})"


def _end(process: subprocess.Popen) -> None:
    """End the process and all it started: politely, then not."""
    for sign, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def run_units(
    units: Sequence[Unit],
    workers: int,
    deadline: float,
    done: Callable[[Outcome], None] = lambda outcome: None,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Outcome]:
    """Several at a time, in order; none is started behind the deadline. ``done`` hears of each as it ends, ``progress``
    every :data:`PROGRESS_SECONDS` of the number of rows so far."""

    def one(unit: Unit) -> Outcome:
        if time.monotonic() >= deadline:
            outcome = Outcome(unit.name, "not reached", 0.0, [], str(unit.log))
        else:
            outcome = run_unit(unit, deadline)
        done(outcome)
        return outcome

    with ThreadPoolExecutor(max(1, workers)) as pool:
        running = [pool.submit(one, unit) for unit in units]
        while wait(running, PROGRESS_SECONDS).not_done:
            progress(sum(len(read_rows(unit.rows)) for unit in units))
        return [future.result() for future in running]
