"""The commands of ``python -m kvops.autotune`` that compile or measure kernels, one function each; all return exit
codes. ``store_commands`` has the others."""

from __future__ import annotations

import argparse
import datetime
import itertools
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvops.autotune import feasibility, lookup
from kvops.autotune.devices import DeviceFacts, by_name, this_gpu
from kvops.autotune.feasibility import current_source, judge
from kvops.autotune.ledger import Ledger
from kvops.autotune.options import all_records, chosen_specs, store_of
from kvops.autotune.records import Record
from kvops.autotune.spec import OpSpec, Problem, config_to_json, words
from kvops.autotune.store import JOURNAL, Store, read_problems
from kvops.cli.console import table
from kvops.extras import require


def _problems(arguments: argparse.Namespace, chosen: Sequence[OpSpec], store: Store) -> list[tuple[OpSpec, Problem]]:
    """The problems to tune: those of a file, of the journal, or typical ones, in turn from every family."""
    by_op = {spec.name: spec for spec in chosen}
    everything = dict(lookup.specs())
    if arguments.shapes or arguments.from_misses:
        path = arguments.shapes
        if path is None:
            layer = store.writable
            path = (layer.folder if layer else Path()) / JOURNAL
        return [(spec, problem) for spec, problem in read_problems(path, everything) if spec.name in by_op]
    rounds = itertools.zip_longest(*([(spec, problem) for problem in spec.problems] for spec in chosen))
    return [entry for turn in rounds for entry in turn if entry is not None]


class _Progress:
    """A progress bar with the time left; without tqdm or a terminal, one line per problem."""

    def __init__(self, total: int) -> None:
        self._bar: Any = None
        self._started, self._done, self._total = time.monotonic(), 0, total
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm

                self._bar = tqdm(total=total, desc="tune", unit="problem")
            except ImportError:
                pass

    def step(self, what: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(what)

    def done(self, message: str) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.write(message)
            self._bar.update()
        else:
            left = (time.monotonic() - self._started) / self._done * (self._total - self._done)
            print(f"[{self._done}/{self._total}, about {left:.0f} s left] {message}", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def tune(arguments: argparse.Namespace) -> int:
    require("triton")
    from kvops.autotune import tuner
    from kvops.autotune.worker import Worker

    chosen = chosen_specs(arguments)
    device = this_gpu()
    tuner.refuse_to_tune()
    versions = tuner.environment()
    store = store_of(arguments.store)
    layer = store.writable
    if layer is None:
        raise ValueError("--store: expected a folder, because no cache can be written here (or set KVOPS_CACHE_DIR)")
    work = _problems(arguments, [spec for spec in chosen if spec.workload is not None], store)
    work = [(spec, problem) for spec, problem in work if spec.candidates(problem, device) or not spec.twin]
    if not arguments.again:
        work = [(spec, problem) for spec, problem in work if not _is_tuned(spec, problem, device, versions, store)]
    print(f"{len(work)} problems to tune on {device.name}, results in {layer.folder}", flush=True)
    deadline = None if arguments.budget is None else time.monotonic() + arguments.budget
    progress, unwritten, failed, left = _Progress(len(work)), 0, 0, 0
    with Worker(arguments.imports or ()) as worker:
        for number, (spec, problem) in enumerate(work):
            if deadline is not None and time.monotonic() > deadline:
                left = len(work) - number
                break
            name = f"{spec.name} {words(problem)}"
            candidates = [
                config
                for place, config in enumerate(spec.candidates(problem, device))
                if place == 0 or judge(spec, config, problem, device).status in ("proven", "unproven")
            ]
            mark = current_source(spec), versions["triton"]
            ledger = Ledger(Ledger.path_of(layer.folder, spec, problem, device.name, mark))
            bench = tuner.WorkerBench(worker, spec, problem, arguments.time_limit)

            def show_progress(what: str, done: int, total: int, name: str = name) -> None:
                progress.step(f"{name}: {what} {done}/{total}")

            try:
                result = tuner.tune(candidates, bench, ledger, deadline=deadline, progress=show_progress)
            except tuner.BudgetSpent:
                left = len(work) - number
                break
            except RuntimeError as error:
                failed += 1
                progress.done(f"{name}: {error}")
                continue
            record = _record(spec, problem, device, versions, result)
            if store.insert(record):
                ledger.remove()
            else:
                unwritten += 1
            gain = result.heuristic_us / result.time.p50 if result.heuristic_us else float("nan")
            rejected = f", {len(result.rejected)} rejected" if result.rejected else ""
            progress.done(
                f"{name}: {words(config_to_json(result.winner))}, {result.time.p50:.1f} µs, "
                f"{gain:.2f}x of the heuristic{rejected}"
            )
            for config, reason in result.rejected:
                print(f"  rejected {words(config_to_json(config))}: {reason}", flush=True)
    progress.close()
    if left:
        print(f"the budget is spent: {left} problems left; the same command resumes there")
    return 1 if unwritten or failed else 0


def _is_tuned(spec: OpSpec, problem: Problem, device: DeviceFacts, versions: dict[str, str], store: Store) -> bool:
    return any(
        record.problem == problem
        and record.device.name == device.name
        and record.source == current_source(spec)
        and record.triton == versions["triton"]
        for _, record in store.records(spec)
    )


def _record(spec: OpSpec, problem: Problem, device: DeviceFacts, versions: dict[str, str], result: Any) -> Record:
    runner_up = result.runner_up
    return Record(
        op=spec.name,
        source=current_source(spec),
        key=spec.key_of(problem),
        shape=spec.sizes_of(problem),
        config=config_to_json(result.winner),
        time=result.time,
        device=device,
        environment=versions,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        runner_up=None if runner_up is None else {"config": config_to_json(runner_up[0]), "p50": runner_up[1]},
        heuristic_us=result.heuristic_us,
        static=feasibility.static_facts(judge(spec, result.winner, problem, device)),
        check=result.check,
    )


def prune(arguments: argparse.Namespace) -> int:
    require("triton")
    from kvops.autotune import prune as pruner

    chosen = [spec for spec in chosen_specs(arguments) if spec.workload is not None]
    targets = arguments.targets.split(",") if arguments.targets else pruner.TARGET_ORDER
    started = time.monotonic()
    bar: Any = None

    def show_progress(task: pruner.Task, proof: feasibility.Proof, done: int, total: int) -> None:
        nonlocal bar
        if bar is None and sys.stderr.isatty():
            try:
                from tqdm import tqdm

                bar = tqdm(total=total, desc="prune")
            except ImportError:
                pass
        if bar is not None:
            bar.set_postfix_str(f"{task.target} {task.spec.name}")
            bar.update()
        elif done % 50 == 0:
            left = (time.monotonic() - started) / done * (total - done)
            print(f"[{done}/{total}, about {left:.0f} s left] {task.target} {task.spec.name}", flush=True)

    done, left = pruner.prune(
        chosen,
        targets,
        arguments.output,
        jobs=arguments.jobs,
        limit_seconds=arguments.limit_seconds,
        imports=arguments.imports or (),
        progress=show_progress,
    )
    if bar is not None:
        bar.close()
    print(f"{done} configurations compiled, {left} left; tables in {arguments.output}")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Check tables and records against the current sources. Exit code 1 where they differ."""
    require("triton")
    from kvops.autotune import prune as pruner
    from kvops.autotune.inspect import TARGETS

    problems: list[str] = []
    rows = []
    for spec in chosen_specs(arguments):
        if spec.workload is None:
            continue
        proofs = feasibility.load_table(spec)
        counts: Counter[str] = Counter()
        for task in pruner.tasks([spec], TARGETS):  # members of a family, too, that the tables do not have
            device = by_name(task.target)
            verdict = judge(spec, task.config, task.problem, device, proofs)
            counts[verdict.status] += 1
            if task.config == spec.heuristic(task.problem, device) and verdict.status == "impossible":
                problems.append(
                    f"{spec.name} {words(task.problem)} on {task.target}: the default configuration {verdict.reason}"
                )
        rows.append(
            (spec.name, current_source(spec), *(counts[s] for s in ("proven", "spills", "impossible", "unproven")))
        )
        if counts["unproven"]:
            problems.append(
                f"{spec.name}: {counts['unproven']} configurations were not compiled from these sources; run make prune"
            )
    print(table(rows, ("op", "sources", "proven", "spills", "impossible", "unproven")))
    for layer, spec, record in all_records(arguments, store_of(arguments.store)):
        where = f"{layer} {record.op} {words(record.problem)} on {record.device.name}"
        if record.source != current_source(spec):
            problems.append(f"{where}: measured with older sources ({record.source}); tune it again")
        verdict = judge(spec, spec.config(**record.config), record.problem, record.device)
        if verdict.status == "impossible":
            problems.append(f"{where}: {verdict.reason}")
    if arguments.recompile:
        problems += _recompiled(chosen_specs(arguments), arguments.recompile)
    for problem in problems:
        print(problem)
    print("no problems" if not problems else f"{len(problems)} problems")
    return 1 if problems else 0


def _recompiled(chosen: Sequence[OpSpec], count: int) -> list[str]:
    """Compile ``count`` proven configurations of every family again, and compare the facts with the table."""
    triton = require("triton").__version__

    from kvops.autotune import prune as pruner

    picked = []
    for spec in chosen:
        if spec.workload is None:
            continue
        proofs = feasibility.load_table(spec)
        proven = []
        for task in pruner.tasks([spec], pruner.TARGET_ORDER):
            group = proofs.group(task.target, spec.proof_of(task.problem))
            fresh = group is not None and (group.source, group.triton) == (current_source(spec), triton)
            if fresh and group is not None and task.config in group.rows:
                proven.append((task, group.rows[task.config]))
        # Spread over targets and candidates, the same at every run.
        picked += proven[:: max(1, len(proven) // count)][:count]
    wrong = []
    expected = {id(task): proof for task, proof in picked}
    for task, proof in pruner.run([task for task, _ in picked]):
        if proof != expected[id(task)]:
            where = f"{task.spec.name} {words(config_to_json(task.config))} for {task.target}"
            wrong.append(f"{where}: the table has {expected[id(task)]}, the compiler gives {proof}")
    print(f"{len(picked)} configurations compiled again")
    return wrong
