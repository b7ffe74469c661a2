"""Tuning in the GPU run: each record that ``python -m kvops.autotune tune`` writes is a row.

Without a GPU nothing can be tuned: one family's candidates are compiled for Hopper instead.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.units import FAILED, PASSED, report

_LEFT = "the budget is spent"


def arguments_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tune", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=360.0, help="seconds (default: %(default)s)")
    parser.add_argument("--rows", type=Path, required=True)
    return parser.parse_args(words)


def main() -> int:
    """1 also if problems are left: the next run continues with them."""
    arguments = arguments_of()
    words = ["tune", "--store", str(arguments.store), "--budget", str(arguments.budget)]
    if arguments.device == "cpu":
        words = ["prune", "--ops", "prompt_lookup", "--targets", "sm_90", "--output", str(arguments.store)]
    known = set(arguments.store.glob("*.json"))
    command = [sys.executable, "-m", "kvops.autotune", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        lines = []
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    for path in sorted(set(arguments.store.glob("*.json")) - known):
        report(arguments.rows, path.name, PASSED)
    if process.returncode:
        report(arguments.rows, "tune", FAILED, lines[-1] if lines else f"exit {process.returncode}")
    return process.returncode or int(any(line.startswith(_LEFT) for line in lines))


if __name__ == "__main__":
    sys.exit(main())
