"""The command ``python -m kvops.autotune check``: compiled candidates run on a CPU before one of them meets a GPU."""

from __future__ import annotations

import argparse
import importlib
import json
from typing import Any

from kvops.autotune import lookup
from kvops.autotune.devices import by_name
from kvops.autotune.options import parse_problem
from kvops.autotune.spec import Config, OpSpec, Problem, config_to_json, words
from kvops.cli.console import suggestion, table
from kvops.extras import require


def add(parsers: Any) -> None:
    """Add the parser of the command to argparse's ``parsers``."""
    text = "run compiled configurations on this CPU, without a GPU: results beside the reference, races, bounds"
    parser: argparse.ArgumentParser = parsers.add_parser(
        "check", help=text, description=text[0].upper() + text[1:] + "."
    )
    parser.add_argument(
        "--import", dest="imports", action="append", metavar="MODULE", help="import MODULE first; it registers kernels"
    )
    parser.set_defaults(run=check)
    parser.add_argument("op", help="a family, or an operator")
    parser.add_argument("--target", default="sm_80", help="sm_80, sm_86, sm_89 or sm_90 (%(default)s)")
    parser.add_argument(
        "--configs",
        default="all",
        metavar="WHICH",
        help="all candidates, the default one alone, or one as JSON (%(default)s)",
    )
    parser.add_argument("--problem", metavar="NAME=N,...", help="(default: the family's first realistic problem)")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which warps run (%(default)s)")
    parser.add_argument("--time-limit", type=float, default=600.0, metavar="SECONDS", help="a candidate (%(default)s)")


def candidates(spec: OpSpec, problem: Problem, target: str, which: str) -> list[Config]:
    """The configurations that ``--configs`` names. Raises ValueError for anything else, or where there are none."""
    device = by_name(target)
    if which == "default":
        return [spec.heuristic(problem, device)]
    if which != "all":
        try:
            return [spec.config_from_json(json.loads(which))]
        except json.JSONDecodeError:
            raise ValueError(f"--configs: expected all, default or a configuration as JSON, got {which!r}") from None
    found = spec.candidates(problem, device)
    if not found:
        raise ValueError(f"--target: {spec.name} has no candidates for {target}")
    return found


def check(arguments: argparse.Namespace) -> int:
    """Exit code 1 where a candidate is wrong, has a fault or does not compile."""
    require("triton")
    from kvops.autotune.machine import MACHINES
    from kvops.autotune.machine.check import Verdict, check_candidate
    from kvops.autotune.worker import CandidateError, Worker

    for module in arguments.imports or []:
        importlib.import_module(module)
    if arguments.target not in MACHINES:
        raise ValueError(f"--target: expected one of {', '.join(MACHINES)}, got {arguments.target!r}")
    known = lookup.specs()
    chosen = [spec for spec in known.values() if arguments.op == spec.name or arguments.op in spec.operators]
    chosen = [spec for spec in chosen if spec.workload is not None and (not spec.twin or arguments.target == "sm_90")]
    if not chosen:
        named = suggestion(arguments.op, known)
        raise ValueError(f"op: expected one of {', '.join(known)} with a workload, got {arguments.op!r}{named}")
    rows, told = [], []
    called = f"{check_candidate.__module__}:{check_candidate.__name__}"
    with Worker(arguments.imports or ()) as worker:
        for spec in chosen:
            problem = _problem(spec, arguments.problem)
            for config in candidates(spec, problem, arguments.target, arguments.configs):
                values = spec.name, dict(problem), config_to_json(config), arguments.target, arguments.seed
                try:
                    verdict: Verdict = worker.call(called, *values, limit=arguments.time_limit)
                except CandidateError as error:
                    state, figures = "failed", ("", "")
                    told.append(f"{spec.name} {words(config_to_json(config))}: {str(error).splitlines()[-1]}")
                else:
                    state = "right" if verdict.right else "faults" if verdict.faults else "wrong"
                    figures = f"{verdict.error:.1e}", f"{verdict.limit:.1e}"
                    told += [f"{spec.name} {words(config_to_json(config))}: {fault}" for fault in verdict.faults]
                rows.append((spec.name, words(problem), words(config_to_json(config)), state, *figures))
    print(table(rows, ("op", "problem", "config", "", "error", "limit")))
    for line in told:
        print(line)
    bad = sum(row[3] != "right" for row in rows)
    print(f"{len(rows)} candidates on {arguments.target}: {len(rows) - bad} right, {bad} not")
    return 1 if bad else 0


def _problem(spec: OpSpec, text: str | None) -> Problem:
    if text is not None:
        return spec.check_problem(parse_problem(text))
    if not spec.problems:
        raise ValueError(f"--problem: expected one, for {spec.name} names none of its own")
    return spec.problems[0]
