"""``python -m bench``: measure, compare, plot and report. Each command's ``--help`` says what it needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from bench import results, table
from bench.case import SCALES, Scale, scale_for
from bench.cases import all_cases, select
from bench.measure import KVOPS, measure
from bench.timing import Clock, measure_roofline, setting

Item = TypeVar("Item")


def progress(items: Sequence[Item], unit: str) -> Iterable[Item]:
    """A bar where tqdm is installed and somebody watches."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, unit=unit, disable=None)


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device: expected a device that is here, got cuda; next step: --device cpu")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def _scale(arguments: argparse.Namespace, device: torch.device) -> Scale:
    return SCALES[arguments.scale] if arguments.scale else scale_for(device)


def run(arguments: argparse.Namespace) -> int:
    device = _device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype: torch.dtype = getattr(torch, arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    scale = _scale(arguments, device)
    cases = select(all_cases(scale), arguments.ops, arguments.shapes)
    clock = Clock(device)
    roofline = measure_roofline(clock, dtype)
    facts = setting(device) | {
        "scale": scale.name,
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": f"up to {arguments.rounds}, within {arguments.seconds} s a case, 5 at least",
        **roofline.facts(),
    }
    print(f"{facts['runs']}; {len(cases)} cases in {facts['dtype']}", end="")
    print(", scaled down to a CPU: ratios only" if scale.name == "cpu" else f", scale {scale.name}", flush=True)
    rows: list[dict] = []
    for case in progress(cases, "case"):
        rows += [
            row.facts()
            for row in measure(
                case,
                clock,
                dtype,
                roofline,
                peers=arguments.peers,
                rounds=arguments.rounds,
                seconds=arguments.seconds,
            )
        ]
        if arguments.json:  # after each case: whoever stops the run keeps what there is
            results.save(arguments.json, "operators", facts, rows)
    for op, found in table.by_operator(rows):
        print(f"\n{op}\n{table.operator_table(found, 'simple', times=clock.gpu)}")
    print(f"\n× PEER: how many times as fast kvops is (± half of p20 to p80)\n{table.setting_text(facts)}")
    failed = [row for row in rows if row["contender"] == KVOPS and row["ms"] is None]
    for row in failed:
        print(f"kvops failed {row['case']}: {row['note']}", file=sys.stderr)
    return 1 if failed else 0


def list_cases(arguments: argparse.Namespace) -> int:
    for case in select(all_cases(_scale(arguments, _device(arguments.device))), arguments.ops, arguments.shapes):
        print(case.name)
    return 0


def _selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", nargs="+", metavar="OP", help="operators (default: all)")
    parser.add_argument("--shapes", nargs="+", metavar="TEXT", help="cases whose name contains one of these")
    parser.add_argument("--device", help="default: cuda where there is one, otherwise cpu")
    parser.add_argument("--scale", choices=SCALES, help="default: full on a GPU, cpu on a CPU")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of every operator and its peers.")
    commands = parser.add_subparsers(dest="command", required=True)

    one = commands.add_parser("run", help="check and time operators beside their peers")
    _selection(one)
    one.add_argument("--peers", nargs="*", metavar="TEXT", help="peers whose name contains one of these (default: all)")
    one.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16, float32 on a CPU")
    one.add_argument("--rounds", type=int, default=20)
    one.add_argument("--seconds", type=float, default=2.0, help="for each case (default: %(default)s)")
    one.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: as torch has it)")
    one.add_argument("--json", type=Path, metavar="PATH", help="write the results here, case by case")
    one.set_defaults(function=run)

    names = commands.add_parser("list", help="the names of the cases")
    _selection(names)
    names.set_defaults(function=list_cases)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: something is wrong or slower than allowed; 2: it could not be run as asked."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.function(arguments)
    except ValueError as error:
        print(f"python -m bench {arguments.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
