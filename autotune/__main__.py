"""The command line: ``python -m kvops.autotune COMMAND``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvops.autotune.arguments import add as add_commands
from kvops.autotune.devices import KNOWN_DEVICES
from kvops.autotune.environments import environment, newest_triton
from kvops.cli import console
from kvops.cli.console import quiet_without_reader
from kvops.extras import require

if TYPE_CHECKING:
    from kvops.autotune.gates import CaseResult

DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def table(results: Sequence[CaseResult]) -> str:
    """The compiled launches as a table, one line for each binary."""
    rows = {}  # by binary, since a case may launch one several times
    for result in results:
        for launch in result.launches:
            instructions = " ".join(f"{name} {count}" for name, count in launch.matrix_instructions.items())
            rows[launch.target, result.case, launch.identity] = (
                launch.target,
                result.case,
                launch.kernel,
                launch.num_warps,
                launch.num_stages,
                launch.registers,
                f"{launch.spill_stores}/{launch.spill_loads}" if launch.spills else "",
                launch.shared_memory,
                instructions,
                launch.waits or "",
                launch.tma_loads or "",
                f"{launch.compile_seconds:.1f}",
            )
    headers = ("target", "case", "kernel", "warps", "stages", "regs", "spills", "shared", "matrix", "waits", "TMA", "s")
    return console.table(rows.values(), headers, align="lllrrrrrlrrr")


def inspect(arguments: argparse.Namespace) -> int:
    triton, tqdm = require("triton"), require("tqdm").tqdm
    from kvops.autotune.gates import load_cases, run_cases
    from kvops.autotune.inspect import TARGETS

    version = newest_triton() if arguments.triton == "newest" else arguments.triton
    if version and version != triton.__version__:
        command = [sys.executable, "-m", "kvops.autotune", "inspect", f"--only={arguments.only}"]
        command += ["--cases", str(arguments.cases), "--targets", arguments.targets]
        command += ["--jobs", str(arguments.jobs)] if arguments.jobs else []
        command += ["--json", str(arguments.json)] if arguments.json else []
        command += ["--known", str(arguments.known)] if arguments.known else []
        return subprocess.run(command, env=environment(version)).returncode
    targets = arguments.targets.split(",")
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        raise ValueError(f"--targets: expected names among {', '.join(TARGETS)}, got {', '.join(unknown)}")
    count = sum(arguments.only in case.name for case in load_cases(arguments.cases)) * len(targets)
    if not count:
        raise ValueError(f"--only: expected part of a case's name in {arguments.cases}, got {arguments.only!r}")
    known = json.loads(arguments.known.read_text()) if arguments.known else None
    results = list(
        tqdm(
            run_cases(arguments.cases, targets, only=arguments.only, jobs=arguments.jobs, known=known),
            total=count,
            desc="compile",
            disable=None,
        )
    )
    results.sort(key=lambda result: (result.target, result.case))
    print(f"Triton {triton.__version__}")
    print(table(results))
    for result in results:
        for problem in result.problems:
            print(f"{result.target} {result.case}: {problem}")
    if arguments.json:
        rows = [
            {
                "case": result.case,
                "target": result.target,
                "triton": triton.__version__,
                "problems": result.problems,
                "launches": [launch.as_json() for launch in result.launches],
            }
            for result in results
        ]
        arguments.json.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    return 1 if any(result.problems for result in results) else 0


@quiet_without_reader
def main(argv: Sequence[str] | None = None) -> int:
    parser = console.Parser(prog="python -m kvops.autotune", description="Kernel configurations of kvops.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    architectures = sorted({device.arch for device in KNOWN_DEVICES.values()})
    command = commands.add_parser(
        "inspect",
        help="compile kernels for GPUs, without one, and show registers, spills, shared memory and instructions",
        description="Compile the cases of a Python file for each target, without a GPU, and show what the binaries "
        "use. Exits with 1 when a launch exceeds a limit of its target.",
    )
    command.add_argument(
        "--cases", type=Path, default=Path("tests/compile_cases.py"), help="file that defines CASES (%(default)s)"
    )
    command.add_argument(
        "--targets", default=",".join(DEFAULT_TARGETS), help=f"among {','.join(architectures)} (%(default)s)"
    )
    command.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    command.add_argument("--jobs", type=int, help="processes (default: one for each core)")
    command.add_argument(
        "--triton",
        metavar="VERSION",
        help="use this version of Triton, or the newest; it is installed once below .cache/triton",
    )
    command.add_argument("--json", type=Path, metavar="PATH", help="also write everything as JSON")
    command.add_argument(
        "--known",
        type=Path,
        metavar="PATH",
        help="facts of launches by identity, as JSON like that of --json; these launches are not compiled",
    )
    command.set_defaults(run=inspect)
    add_commands(commands)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, FileNotFoundError, ImportError, RuntimeError) as error:
        print(f"kvops.autotune: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
