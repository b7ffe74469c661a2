"""What the commands of ``python -m kvops.autotune`` take; ``commands`` says what they do."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvops.autotune import commands, feasibility


def add(parsers: Any) -> None:
    """The parsers of all commands here, to argparse's sub-parsers."""

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        parser = parsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        parser.add_argument("--ops", default="", metavar="A,B", help="families or operators (default: all)")
        parser.add_argument(
            "--import",
            dest="imports",
            action="append",
            metavar="MODULE",
            help="import this first: it registers kernels",
        )
        parser.set_defaults(run=run)
        return parser

    def stored(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--store", type=Path, metavar="DIR", help="this store alone (default: all layers)")

    parser = command(
        "tune", commands.tune, "measure candidates on this GPU and keep the fastest right one; goes on where it stopped"
    )
    problems = parser.add_mutually_exclusive_group()
    problems.add_argument("--shapes", type=Path, metavar="FILE", help="problems as JSON lines, as the journal has them")
    problems.add_argument("--from-misses", action="store_true", help="the problems that launches met without a record")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="stop after this time (default: when all is tuned)"
    )
    parser.add_argument("--store", type=Path, metavar="DIR", help="where to keep records (default: the user's store)")
    parser.add_argument(
        "--time-limit", type=float, default=120.0, metavar="SECONDS", help="for one trial of a candidate (%(default)s)"
    )
    parser.add_argument("--again", action="store_true", help="also what the store has from these sources and versions")

    parser = command(
        "prune", commands.prune, "compile every candidate for every GPU, without one, and write the feasibility tables"
    )
    parser.add_argument("--targets", default="", help="architectures (default: all)")
    parser.add_argument("--output", type=Path, default=feasibility.FOLDER, metavar="DIR", help="(%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (%(default)s)")
    parser.add_argument("--limit-seconds", type=float, help="stop after this time; the next call goes on")

    parser = command("show", commands.show, "list records")
    stored(parser)
    parser.add_argument("--device", metavar="TEXT", help="devices whose name contains TEXT")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything as JSON")

    parser = command(
        "explain", commands.explain, "say what a problem is launched with on a device, where that comes from, and why"
    )
    parser.add_argument("op", nargs="?", help="a family or an operator (default: all)")
    stored(parser)
    parser.add_argument("--device", metavar="NAME", help="H100, 'NVIDIA H100 PCIe', sm_90 ... (default: this GPU)")
    parser.add_argument("--problem", metavar="NAME=N,...", help="(default: the family's realistic problems)")

    parser = command("diff", commands.diff, "compare two stores")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)

    parser = command("merge", commands.merge, "put the records of other stores into one, the newest of each")
    parser.add_argument("--into", type=Path, metavar="DIR", help="(default: the user's store)")
    parser.add_argument("sources", type=Path, nargs="+")

    parser = command("verify", commands.verify, "check tables and records against the sources as they are")
    stored(parser)
    parser.add_argument(
        "--recompile", type=int, default=0, metavar="N", help="also compile N candidates of each family again"
    )

    parser = command(
        "export", commands.export, "write records as they are shipped: a file for each operator and device"
    )
    stored(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--older", action="store_true", help="also what was measured with older sources")

    command("doctor", commands.doctor, "say what this machine reads and writes, and what is in its way")

    parser = command("gc", commands.gc, "remove damaged, abandoned and outdated files from the user's store")
    stored(parser)
    parser.add_argument("--dry-run", action="store_true", help="only list them")
