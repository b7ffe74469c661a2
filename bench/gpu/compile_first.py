"""Compile what the tests of the GPU run launch, before they run: ``python -m bench.gpu.compile_first --help``.

The tests run with stubbed launches for the GPU's architecture: every kernel compiles, into Triton's cache on disk, and
none is launched, so that no process waits for the GPU. Each kernel is a row.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.compile_once import compile_once
from bench.gpu.share import costs_of, rank, shares
from bench.gpu.stubs import StubbedTests, run_stubbed
from bench.gpu.units import PASSED, SKIPPED, report
from kvops.autotune.inspect import TARGETS, CompileOnlyDriver, launches_compile

# A test may compile several kernels, and wait for others that do.
_PATIENCE = 120


def arguments_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.compile_first", description=__doc__)
    parser.add_argument("--device", default="cuda", help="whose tests they are; this process leaves it alone")
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further test after them")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="the I-th of N shares of the tests")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("files", nargs="*", default=["tests"])
    return parser.parse_args(words)


@contextmanager
def compiling(target: str, rows: Path) -> Iterator[list[str]]:
    """Launches compile for ``target`` and do not run. Yields the names of the kernels that this process compiled or
    found on disk, each of which is a row."""
    compiled: list[str] = []

    def reported(do_compile: Callable[..., Any], kernel: Any, *arguments: Any, **options: Any) -> Any:
        name, started = kernel.fn.__name__, time.perf_counter()
        try:
            binary = do_compile(kernel, *arguments, **options)
        except Exception as error:  # the tests of this kernel will fail with it
            report(rows, name, SKIPPED, f"did not compile: {error}"[:300])
            raise
        report(rows, name, PASSED, seconds=round(time.perf_counter() - started, 2))
        compiled.append(name)
        return binary

    with launches_compile(CompileOnlyDriver.of(TARGETS[target]), reported):
        yield compiled


def main() -> int:
    arguments = arguments_of()
    compile_once()
    share, count = map(int, arguments.share.split("/"))
    hopper = arguments.target == "sm_90"

    own: list[pytest.Item] = []

    def chosen(items: list[pytest.Item]) -> list[pytest.Item]:
        items = [item for item in items if hopper or rank(item.nodeid) < 2]  # the last kernels are for Hopper alone
        own[:] = shares(items, [item.nodeid for item in items], count, costs_of("compile"))[share]
        return own

    seen: list[str] = []

    def noted(test: str, compiled: list[str], seconds: float) -> None:
        seen.append(test)
        print(f"{test}: {', '.join(compiled) or 'nothing new'}", flush=True)

    stub = partial(compiling, arguments.target, arguments.rows)
    run_stubbed(StubbedTests(stub, noted, chosen, _PATIENCE, arguments.seconds), arguments.files)  # they fail
    outcome = PASSED if len(seen) == len(own) else SKIPPED  # the tests compile what is left
    report(arguments.rows, f"share {arguments.share}", outcome, f"{len(seen)} of {len(own)} tests")
    return 0


if __name__ == "__main__":
    sys.exit(main())
