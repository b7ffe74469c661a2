"""The arguments of the commands of ``python -m kvops.autotune``, except ``inspect``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvops.autotune import checking, commands, feasibility, store_commands


def add(parsers: Any) -> None:
    """Add the parser of every command to argparse's ``parsers``."""
    _add_tune(parsers)
    _add_prune(parsers)
    checking.add(parsers)
    _add_readers(parsers)
    _add_writers(parsers)


def _command(
    parsers: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, *, store: bool = False
) -> argparse.ArgumentParser:
    """The parser of one command; with ``store`` it takes ``--store`` as well."""
    parser: argparse.ArgumentParser = parsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--ops", default="", metavar="A,B", help="kernel families or operators (default: all)")
    parser.add_argument(
        "--import", dest="imports", action="append", metavar="MODULE", help="import MODULE first; it registers kernels"
    )
    if store:
        parser.add_argument("--store", type=Path, metavar="DIR", help="read this store only (default: all layers)")
    parser.set_defaults(run=run)
    return parser


def _add_tune(parsers: Any) -> None:
    parser = _command(
        parsers,
        "tune",
        commands.tune,
        "measure configurations on this GPU and record the fastest correct one; a second call resumes",
    )
    problems = parser.add_mutually_exclusive_group()
    problems.add_argument("--shapes", type=Path, metavar="FILE", help="problems as JSON lines, as in the journal")
    problems.add_argument("--from-misses", action="store_true", help="problems that were launched without a record")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="stop after this time (default: when every problem is tuned)"
    )
    parser.add_argument(
        "--store", type=Path, metavar="DIR", help="folder to write records to (default: the user's store)"
    )
    parser.add_argument(
        "--time-limit", type=float, default=120.0, metavar="SECONDS", help="limit of one trial (%(default)s)"
    )
    parser.add_argument(
        "--again", action="store_true", help="also tune problems that have a record of these sources and versions"
    )


def _add_prune(parsers: Any) -> None:
    parser = _command(
        parsers,
        "prune",
        commands.prune,
        "compile every configuration for every GPU, without one, and write the feasibility tables",
    )
    parser.add_argument("--targets", default="", help="architectures (default: all)")
    parser.add_argument("--output", type=Path, default=feasibility.FOLDER, metavar="DIR", help="(%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (%(default)s)")
    parser.add_argument("--limit-seconds", type=float, help="stop after this time; the next call resumes")


def _add_readers(parsers: Any) -> None:
    parser = _command(parsers, "show", store_commands.show, "list records", store=True)
    parser.add_argument("--device", metavar="TEXT", help="devices whose name contains TEXT")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything as JSON")

    parser = _command(
        parsers,
        "explain",
        store_commands.explain,
        "show the configuration of a problem on a device, where it comes from, and why",
        store=True,
    )
    parser.add_argument("op", nargs="?", help="a kernel family or an operator (default: all)")
    parser.add_argument("--device", metavar="NAME", help="H100, 'NVIDIA H100 PCIe', sm_90 ... (default: this GPU)")
    parser.add_argument("--problem", metavar="NAME=N,...", help="(default: the family's typical problems)")

    parser = _command(parsers, "diff", store_commands.diff, "compare two stores")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)

    parser = _command(
        parsers, "verify", commands.verify, "check tables and records against the current sources", store=True
    )
    parser.add_argument(
        "--recompile", type=int, default=0, metavar="N", help="also compile N configurations of each family again"
    )

    _command(parsers, "doctor", store_commands.doctor, "show the stores of this machine and problems with them")


def _add_writers(parsers: Any) -> None:
    parser = _command(
        parsers, "merge", store_commands.merge, "merge the records of other stores into one; the newest record stays"
    )
    parser.add_argument("--into", type=Path, metavar="DIR", help="(default: the user's store)")
    parser.add_argument("sources", type=Path, nargs="+")

    parser = _command(
        parsers,
        "export",
        store_commands.export,
        "write records in the form in which they ship: one file per operator and device",
        store=True,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--older", action="store_true", help="also records of older sources")

    parser = _command(
        parsers,
        "gc",
        store_commands.gc,
        "remove damaged, incomplete and outdated files from the user's store",
        store=True,
    )
    parser.add_argument("--dry-run", action="store_true", help="only list them")
