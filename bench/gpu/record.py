"""pytest plugin of the GPU run (``-p bench.gpu.record``): runs one share of the tests that need a device.

Processes share Triton's cache on disk, and none compiles what another is compiling already: it waits.

Each result is a row in ``KVOPS_RECORD`` as soon as it is known; tests that have one are not run again. A test that
takes the process down (a hang, a crash, an error after which CUDA answers nothing) is found by the file that names the
test under way, and the next process continues after it. A file of tests that cannot be imported is a row of share 0:
skipped where a package is missing that nothing but these tests need, failed otherwise; the other files run.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.compile_once import compile_once
from bench.gpu.share import costs_of, shares
from bench.gpu.units import FAILED, PASSED, SKIPPED, read_rows
from bench.gpu.units import report as add

# Kernels compile within seconds; a test that takes longer hangs.
_SECONDS = float(os.environ.get("KVOPS_TEST_SECONDS", "120"))
_POISONED = 70


def _rows() -> Path:
    return Path(os.environ["KVOPS_RECORD"])


def _under_way() -> Path:
    return _rows().with_suffix(".under-way")


def _share() -> tuple[int, int]:
    """(which, of how many)"""
    share, shares = os.environ.get("KVOPS_SHARE", "0/1").split("/")
    return int(share), int(shares)


def needs_device(item: pytest.Item) -> bool:
    fixtures = getattr(item, "fixturenames", ())
    return "device" in fixtures or "backend" in fixtures or item.get_closest_marker("gpu") is not None


def pytest_configure(config: pytest.Config) -> None:
    compile_once()
    _rows().parent.mkdir(parents=True, exist_ok=True)
    if _under_way().exists():
        name = _under_way().read_text()
        add(_rows(), name, FAILED, "took its process down: see the log")
        _under_way().unlink()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share, count = _share()
    known = {row["name"] for row in read_rows(_rows())}
    ours = [item for item in items if needs_device(item)]
    mine = shares(ours, [item.nodeid for item in ours], count, costs_of("test"))[share]
    items[:] = [item for item in mine if item.nodeid not in known]


def pytest_exception_interact(node: pytest.Collector, call: pytest.CallInfo, report: pytest.CollectReport) -> None:
    if not isinstance(node, pytest.Collector) or call.excinfo is None:
        return
    cause = call.excinfo.value.__cause__
    package = (cause.name or "").partition(".")[0] if isinstance(cause, ModuleNotFoundError) else ""
    missing = package if package and find_spec(package) is None else ""  # a module of kvops is never merely absent
    note = f"{missing}: not installed" if missing else f"cannot be imported: {cause or call.excinfo.value}"
    if _share()[0] == 0 and node.nodeid not in {row["name"] for row in read_rows(_rows())}:
        add(_rows(), node.nodeid, SKIPPED if missing else FAILED, note[:300])
    if missing:
        report.outcome, report.longrepr = "skipped", (str(node.path), 0, note)
    else:
        print(f"\n{'=' * 20} {node.nodeid}\n{report.longreprtext}", file=sys.__stderr__, flush=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Any:
    _under_way().write_text(item.nodeid)
    faulthandler.dump_traceback_later(_SECONDS, exit=True, file=sys.__stderr__)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        _under_way().unlink(missing_ok=True)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _failed(report)
    elif report.skipped:
        _report(report, SKIPPED, str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else "")
    elif report.when == "call":
        _report(report, PASSED)


def _failed(result: pytest.TestReport) -> None:
    last = next((line for line in reversed(result.longreprtext.splitlines()) if line.startswith("E ")), "")
    _report(result, FAILED, f"{result.when}: {last[1:].strip()}"[:300])
    print(f"\n{'=' * 20} {result.nodeid}\n{result.longreprtext}", file=sys.__stderr__, flush=True)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:  # every later call of this process would fail with the same
            print(f"CUDA answers nothing any more: {error}", file=sys.__stderr__, flush=True)
            _under_way().unlink(missing_ok=True)
            os._exit(_POISONED)


def _report(result: pytest.TestReport, outcome: str, note: str = "") -> None:
    add(_rows(), result.nodeid, outcome, note, seconds=round(result.duration, 3))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Failed tests are rows. The exit code only says whether every test has run."""
    if exitstatus in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.OK
