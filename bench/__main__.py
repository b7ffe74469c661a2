"""``python -m bench``: measure, compare, plot and report. Each command's ``--help`` says what it needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench import compare, growth, results, table
from bench.case import SCALES, Scale, scale_for
from bench.cases import all_cases, select
from bench.measure import KVOPS, measure
from bench.timing import Clock, measure_roofline, setting
from kvops.cli.console import positive, quiet_without_reader
from kvops.cli.environment import chosen_device

Item = TypeVar("Item")


def progress(items: Sequence[Item], unit: str) -> Iterable[Item]:
    """A progress bar if tqdm is installed, on a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, unit=unit, disable=None)


def _device(name: str | None) -> torch.device:
    device = chosen_device(name)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def _scale(arguments: argparse.Namespace, device: torch.device) -> Scale:
    return SCALES[arguments.scale] if arguments.scale else scale_for(device)


def _prepare(arguments: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    device = _device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return device, getattr(torch, arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16"))


def run(arguments: argparse.Namespace) -> int:
    device, dtype = _prepare(arguments)
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
                roofline if clock.gpu else None,
                peers=arguments.peers,
                rounds=arguments.rounds,
                seconds=arguments.seconds,
            )
        ]
        if arguments.json:  # after each case, so that an interrupted run keeps its results
            results.save(arguments.json, "operators", facts, rows)
    for op, own_rows in table.by_operator(rows):
        print(f"\n{op}\n{table.operator_table(own_rows, 'simple', times=clock.gpu)}")
    print(f"\n× PEER: how many times as fast kvops is (± half of p20 to p80)\n{table.setting_text(facts)}")
    failed = [row for row in rows if row["contender"] == KVOPS and row["ms"] is None]
    for row in failed:
        print(f"kvops failed {row['case']}: {row['note']}", file=sys.stderr)
    return 1 if failed else 0


def grow(arguments: argparse.Namespace) -> int:
    from bench.report import growth_table

    device, dtype = _prepare(arguments)
    sweeps = growth.sweeps(device.type == "cuda")
    wanted = [sweep for sweep in sweeps if arguments.sweeps is None or any(w in sweep.name for w in arguments.sweeps)]
    if not wanted:
        names = ", ".join(sorted({sweep.name for sweep in sweeps}))
        raise ValueError(f"--sweeps: expected part of one of {names}; got {', '.join(arguments.sweeps)}")
    clock = Clock(device)
    measure_roofline(clock, dtype)  # warms the clocks
    facts = setting(device) | {"dtype": str(dtype).removeprefix("torch."), "rounds": arguments.rounds}
    rows: list[dict] = []
    for sweep in progress(wanted, "sweep"):
        rows += growth.run(sweep, clock, dtype, rounds=arguments.rounds, seconds=arguments.seconds)
        if arguments.json:
            results.save(arguments.json, "growth", facts, rows)
    print(f"{growth_table(rows, 'simple')}\n\n{table.setting_text(facts)}")
    return 0 if all(fit.as_theory for fit in growth.fits(rows)) else 1


def quality(arguments: argparse.Namespace) -> int:
    from bench.quality import run as policies
    from bench.quality.kept import kept
    from bench.quality.study import overall_table, summary
    from bench.quality.tasks import FULL, QUICK

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    run = policies.Run(
        QUICK if arguments.quick else FULL,
        arguments.ratios or (policies.QUICK_RATIOS if arguments.quick else policies.RATIOS),
        arguments.policies,
        arguments.json,
        arguments.model,
        _device(arguments.device),
    )
    if arguments.times:
        run.times()
    else:
        run.quality(arguments.seconds)
    found = kept(run.result)
    print(f"{overall_table(found)}\n")
    print("\n".join(summary(found)))
    if found.left_out:
        print(f"Not measured to the end yet: {', '.join(found.left_out)}")
    print(f"\n{table.setting_text(run.facts)}")
    return 0


def compare_results(arguments: argparse.Namespace) -> int:
    before, after = results.load(arguments.before), results.load(arguments.after)
    text, worse = compare.report(before, after, arguments.margin)
    print(text)
    return 1 if worse else 0


def plot(arguments: argparse.Namespace) -> int:
    from bench import plots

    for path in arguments.results:
        written = plots.draw(results.load(path), (arguments.out or path.parent) / path.stem)
        print("\n".join(map(str, written)) or f"{path}: nothing to draw")
    return 0


def report(arguments: argparse.Namespace) -> int:
    from bench.report import render

    for path in render(arguments.results, arguments.page):
        print(path)
    return 0


def list_cases(arguments: argparse.Namespace) -> int:
    for case in select(all_cases(_scale(arguments, _device(arguments.device))), arguments.ops, arguments.shapes):
        print(case.name)
    return 0


def _selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", nargs="+", metavar="OP", help="operators (default: all)")
    parser.add_argument("--shapes", nargs="+", metavar="TEXT", help="cases whose name contains one of these")
    parser.add_argument("--device", help="default: cuda where there is one, otherwise cpu")
    parser.add_argument("--scale", choices=SCALES, help="default: full on a GPU, cpu on a CPU")


def _measuring(parser: argparse.ArgumentParser, *, rounds: int, seconds: float, each: str) -> None:
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16, float32 on a CPU"
    )
    parser.add_argument("--rounds", type=positive, default=rounds, help="at most (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"for each {each} (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: as torch has it)")
    parser.add_argument("--json", type=Path, metavar="PATH", help=f"write the results here, {each} by {each}")


def _model_folder(path: Path) -> Path:
    """``path``, into which SmolLM2 is written as transformers writes it if there is no such folder."""
    if not path.exists():
        from kvops.integrations.transformers import write_folder
        from kvops.models.loading import load

        write_folder(load(progress=False), path)
    return path


def soak(arguments: argparse.Namespace) -> int:
    from bench.serving import soak as soaking

    return soaking.run(
        arguments.json, requests=arguments.requests, per_round=arguments.per_round, seconds=arguments.seconds
    )


def answers(arguments: argparse.Namespace) -> int:
    from bench.serving import answers as asking

    return asking.run(
        _model_folder(arguments.folder),
        arguments.json,
        ratios=arguments.ratios,
        slack=arguments.slack,
        policy=arguments.policy,
        contexts=arguments.contexts,
        chunks=[int(size) if size.isdigit() else size for size in arguments.chunks],
    )


def serving(arguments: argparse.Namespace) -> int:
    from bench.serving import arrivals

    return arrivals.run(
        _model_folder(arguments.folder),
        arguments.ratios,
        number=arguments.requests,
        pages=arguments.pages,
        gap=arguments.gap,
        policy=arguments.policy,
        json_path=arguments.json,
    )


def counted(arguments: argparse.Namespace) -> int:
    from bench import counted as counting

    counting.run(arguments.target, arguments.json, arguments.only, arguments.vllm)
    return 0


def _in_vllm(commands: Any) -> None:
    """What runs in the environment of ``make test-vllm``."""
    soaked = commands.add_parser("soak", help="random requests in the real vLLM lose no page and no token (make soak)")
    soaked.add_argument("--requests", type=positive, default=500, metavar="N", help="default: %(default)s")
    soaked.add_argument("--per-round", type=positive, default=20, metavar="N", help="of an engine (%(default)s)")
    soaked.add_argument("--seconds", type=float, default=float("inf"), help="begin no round after these")
    soaked.add_argument(
        "--json", type=Path, metavar="PATH", help="write the results here, round by round, or go on with them"
    )
    soaked.set_defaults(function=soak)

    asked = commands.add_parser("answers", help="the same questions to vLLM and to our own loop (make bench-answers)")
    asked.add_argument("--ratios", nargs="+", type=float, default=[4, 8], metavar="N", help="default: 4 8")
    asked.add_argument("--slack", type=int, default=0, metavar="N", help="pages (default: 0)")
    asked.add_argument(
        "--chunks",
        nargs="+",
        default=["context", "256"],
        metavar="N",
        help="tokens that are read at a time, or `context` for the context and then the question (default: both)",
    )
    asked.add_argument("--contexts", type=int, default=1, metavar="N", help="of the study (default: %(default)s)")
    asked.set_defaults(function=answers)

    served = commands.add_parser("serving", help="requests that arrive at random in the real vLLM (make bench-serving)")
    served.add_argument("--ratios", nargs="+", type=float, default=[4, 8, 16], metavar="N", help="default: 4 8 16")
    served.add_argument("--requests", type=positive, default=24, metavar="N", help="default: %(default)s")
    served.add_argument("--pages", type=positive, default=48, metavar="N", help="of the pool (default: %(default)s)")
    served.add_argument("--gap", type=float, default=0.5, metavar="S", help="between requests (default: %(default)s s)")
    served.set_defaults(function=serving)

    for command in (asked, served):
        command.add_argument("--policy", default="standout", help="default: %(default)s")
        command.add_argument(
            "--folder",
            type=Path,
            default=Path(".cache/vllm/smollm2"),
            help="the model as transformers writes it; SmolLM2-135M is written there if it does not exist "
            "(default: %(default)s)",
        )
        command.add_argument("--json", type=Path, metavar="PATH", help="write the results here")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of every operator and its peers.")
    commands = parser.add_subparsers(dest="command", required=True)

    one = commands.add_parser("run", help="check and time operators beside their peers")
    _selection(one)
    one.add_argument("--peers", nargs="*", metavar="TEXT", help="peers whose name contains one of these (default: all)")
    _measuring(one, rounds=20, seconds=2.0, each="case")
    one.set_defaults(function=run)

    more = commands.add_parser(
        "growth", help="how time and memory grow with context, batch and heads", description=growth.__doc__
    )
    more.add_argument("--sweeps", nargs="+", metavar="TEXT", help="sweeps whose name contains one of these")
    more.add_argument("--device", help="default: cuda where there is one, otherwise cpu")
    _measuring(more, rounds=11, seconds=6.0, each="sweep")
    more.set_defaults(function=grow)

    kept = commands.add_parser("quality", help="the quality that each policy keeps on a real model")
    kept.add_argument("--quick", action="store_true", help="short contexts, 8x only, about a minute")
    kept.add_argument("--policies", nargs="+", metavar="NAME", help="default: all")
    kept.add_argument(
        "--ratios", nargs="+", type=positive, metavar="N", help="default: 2 4 8 16 64, or 8 where --quick"
    )
    kept.add_argument("--times", action="store_true", help="instead: time a step of each, into the rows of --json")
    kept.add_argument("--model", type=Path, metavar="PATH", help="GGUF file or folder (default: SmolLM2-135M-Instruct)")
    kept.add_argument("--device", help="default: cuda where there is one, otherwise cpu")
    kept.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: as torch has it)")
    kept.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after; a call with the same --json goes on"
    )
    kept.add_argument(
        "--json", type=Path, metavar="PATH", help="write the results here, row by row, or go on with them"
    )
    kept.set_defaults(function=quality)

    two = commands.add_parser("compare", help="where a run is worse than another by more than a margin")
    two.add_argument("before", type=Path, help="the result file to compare with, such as a committed one")
    two.add_argument("after", type=Path)
    two.add_argument("--margin", type=float, default=0.1, help="how much worse is allowed (default: %(default)s)")
    two.set_defaults(function=compare_results)

    drawn = commands.add_parser("plot", help="pictures of result files, as PNG")
    drawn.add_argument("results", type=Path, nargs="+")
    drawn.add_argument("--out", type=Path, metavar="FOLDER", help="default: beside each file")
    drawn.set_defaults(function=plot)

    page = commands.add_parser("report", help="BENCHMARKS.md, docs/compression-study.md and pictures, from the results")
    page.add_argument("--results", type=Path, default=results.RESULTS, metavar="FOLDER")
    page.add_argument("--page", type=Path, default=results.RESULTS.parent.parent / "BENCHMARKS.md", metavar="PATH")
    page.set_defaults(function=report)

    counts = commands.add_parser(
        "counted", help="what compiled kernels do, counted on this CPU for a GPU: bytes, conflicts, instructions"
    )
    counts.add_argument("--target", default="sm_80", help="sm_80 or sm_90 (default: %(default)s)")
    counts.add_argument("--json", type=Path, metavar="PATH", help="write the counts here")
    counts.add_argument("--only", default="", metavar="WORD", help="part of a case's name")
    counts.add_argument("--vllm", type=Path, metavar="FOLDER", help="site-packages with vLLM, for its kernel as a peer")
    counts.set_defaults(function=counted)

    _in_vllm(commands)

    names = commands.add_parser("list", help="the names of the cases")
    _selection(names)
    names.set_defaults(function=list_cases)
    return parser


@quiet_without_reader
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
