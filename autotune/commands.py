"""What ``python -m kvops.autotune`` does, a function to a command; each returns its exit code."""

from __future__ import annotations

import argparse
import datetime
import importlib
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvops.autotune import feasibility, lookup
from kvops.autotune.devices import KNOWN_DEVICES, DeviceFacts, by_name, matching, slug, this_gpu
from kvops.autotune.feasibility import current_source, judge
from kvops.autotune.ledger import Ledger
from kvops.autotune.records import Record, dump
from kvops.autotune.spec import OpSpec, Problem, config_to_json, words
from kvops.autotune.store import JOURNAL, QUARANTINE, Layer, Store, collect_garbage, default_layers, read_problems
from kvops.cli.console import suggestion, table
from kvops.extras import require


def _chosen_specs(arguments: argparse.Namespace) -> list[OpSpec]:
    """The families that ``--ops`` names, all without it. Raises ValueError for one that does not exist."""
    for module in arguments.imports or []:
        importlib.import_module(module)
    known = lookup.specs()
    if not arguments.ops:
        return list(known.values())
    found = []
    for name in arguments.ops.split(","):
        matching = [spec for spec in known.values() if name == spec.name or name in spec.operators]
        if not matching:
            raise ValueError(f"--ops: expected names among {', '.join(known)}, got {name}{suggestion(name, known)}")
        found += [spec for spec in matching if spec not in found]
    return found


def _store_of(folder: Path | None) -> Store:
    """The store in ``folder`` alone, or everything that this machine reads."""
    return Store() if folder is None else Store([Layer("given", folder, writable=True)])


def _device(name: str | None) -> DeviceFacts:
    """The GPU of ``--device``, this machine's without a name; says so where the name stands for one of several."""
    if not name:
        return this_gpu()
    device, *others = matching(name)
    if others and name != device.arch:
        print(f"{name}: {device.name}; also {', '.join(other.name for other in others)}", file=sys.stderr)
    return device


# --- tune -----------------------------------------------------------------------------------------------------------


def _problems(arguments: argparse.Namespace, chosen: Sequence[OpSpec], store: Store) -> list[tuple[OpSpec, Problem]]:
    """What to tune: the problems of a file, the journal's, or each family's own, the first of every family first."""
    by_op = {spec.name: spec for spec in chosen}
    everything = dict(lookup.specs())
    if arguments.shapes or arguments.from_misses:
        path = arguments.shapes
        if path is None:
            layer = store.writable
            path = (layer.folder if layer else Path()) / JOURNAL
        found = read_problems(path, everything)
        return [(spec, problem) for spec, problem in found if spec.name in by_op]
    rounds = itertools.zip_longest(*([(spec, problem) for problem in spec.problems] for spec in chosen))
    return [entry for turn in rounds for entry in turn if entry is not None]


class _Progress:
    """A bar with the time left by tqdm, or a line to a problem where tqdm is not installed or nobody watches."""

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

    chosen = _chosen_specs(arguments)
    device = this_gpu()
    tuner.refuse_to_tune()
    versions = tuner.environment()
    store = _store_of(arguments.store)
    layer = store.writable
    if layer is None:
        raise ValueError("--store: expected a folder, for there is no cache to write to (set KVOPS_CACHE_DIR)")
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

            def told(what: str, done: int, total: int, name: str = name) -> None:
                progress.step(f"{name}: {what} {done}/{total}")

            try:
                result = tuner.tune(candidates, bench, ledger, deadline=deadline, progress=told)
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
            told_rejected = f", {len(result.rejected)} rejected" if result.rejected else ""
            progress.done(
                f"{name}: {words(config_to_json(result.winner))}, {result.time.p50:.1f} µs, "
                f"{gain:.2f}x of the heuristic{told_rejected}"
            )
            for config, reason in result.rejected:
                print(f"  rejected {words(config_to_json(config))}: {reason}", flush=True)
    progress.close()
    if left:
        print(f"the budget is spent: {left} problems left; the same command goes on where it stopped")
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


# --- prune ----------------------------------------------------------------------------------------------------------


def prune(arguments: argparse.Namespace) -> int:
    require("triton")
    from kvops.autotune import prune as pruner

    chosen = [spec for spec in _chosen_specs(arguments) if spec.workload is not None]
    targets = arguments.targets.split(",") if arguments.targets else pruner.TARGET_ORDER
    started = time.monotonic()
    bar: Any = None

    def told(task: pruner.Task, proof: feasibility.Proof, done: int, total: int) -> None:
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
        progress=told,
    )
    if bar is not None:
        bar.close()
    print(f"{done} candidates compiled, {left} left; tables in {arguments.output}")
    return 0


# --- looking at stores ----------------------------------------------------------------------------------------------


def _all_records(arguments: argparse.Namespace, store: Store) -> list[tuple[str, OpSpec, Record]]:
    found = []
    for spec in _chosen_specs(arguments):
        for number, record in store.records(spec):
            found.append((store.layers[number].name, spec, record))
    found.sort(key=lambda entry: repr(entry[2].identity))
    return found


def show(arguments: argparse.Namespace) -> int:
    rows, values = [], []
    for layer, spec, record in _all_records(arguments, _store_of(arguments.store)):
        if arguments.device and arguments.device.lower() not in record.device.name.lower():
            continue
        gain = record.heuristic_us / record.time.p50 if record.heuristic_us and record.time.p50 else None
        stale = "" if record.source == current_source(spec) else "older sources"
        rows.append(
            (
                record.op,
                record.device.name,
                words(record.problem),
                words(record.config),
                f"{record.time.p50:.1f}",
                f"{gain:.2f}" if gain else "",
                layer,
                stale,
            )
        )
        values.append({**record.as_json(), "layer": layer, "gain": gain and round(gain, 4)})
    print(table(rows, ("op", "device", "problem", "config", "µs", "x heuristic", "layer", "")))
    print(f"{len(rows)} records")
    if arguments.json:
        arguments.json.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
    return 0


def parse_problem(text: str) -> dict[str, int]:
    """``width=128,itemsize=2``. Raises ValueError for anything else."""
    problem = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not value.strip().isdecimal():
            raise ValueError(f"--problem: expected NAME=INTEGER,..., got {part!r}")
        problem[name.strip()] = int(value)
    return problem


def explain(arguments: argparse.Namespace) -> int:
    device = _device(arguments.device)
    problem = parse_problem(arguments.problem) if arguments.problem else None
    chosen = _chosen_specs(arguments)
    names = [arguments.op] if arguments.op else [spec.name for spec in chosen]
    with lookup.using(_store_of(arguments.store)):
        for name in names:
            choices = lookup.explain(name, problem, device)
            if not choices:
                print(f"{name}: {device.name} has no use for it")
            for choice in choices:
                verdict = choice.verdict
                print(f"{choice.spec.name} {words(choice.problem)} on {device.name}")
                print(f"  {words(config_to_json(choice.config))}")
                apart = f", {choice.distance:.2f} doublings away" if choice.distance else ""
                print(f"  {choice.origin}{apart}: {choice.reason}")
                print(f"  {verdict.status}: {verdict.reason}")
                if choice.runs:
                    print(f"  runs {choice.runs}")
                for refusal in choice.refused[:8]:
                    print(f"  refused {refusal}")
    return 0


def diff(arguments: argparse.Namespace) -> int:
    """Exit code 1 where they differ, as diff's."""
    sides = []
    for folder in (arguments.first, arguments.second):
        if not folder.is_dir():
            raise ValueError(f"diff: expected a folder, got {folder}")
        entries = _all_records(arguments, _store_of(folder))
        sides.append({(r.op, r.device.name, words(r.problem), r.triton): r for _, _, r in entries})
    rows = []
    for key in sorted({*sides[0], *sides[1]}):
        a, b = sides[0].get(key), sides[1].get(key)
        if a is not None and b is not None:
            if a.config == b.config and a.source == b.source:
                continue
            change = "config" if a.config != b.config else "sources"
            ratio = f"{a.time.p50 / b.time.p50:.2f}" if b.time.p50 else ""
            rows.append((change, *key[:3], words(a.config), words(b.config), ratio))
        elif a is not None:
            rows.append(("only first", *key[:3], words(a.config), "", ""))
        elif b is not None:
            rows.append(("only second", *key[:3], "", words(b.config), ""))
    if rows:
        print(table(rows, ("", "op", "device", "problem", "first", "second", "speed-up")))
    print(f"{len(rows)} differences")
    return 1 if rows else 0


def merge(arguments: argparse.Namespace) -> int:
    """Records of other stores into one: what is newer of the same problem, device, sources and Triton stays."""
    target = _store_of(arguments.into)
    counts: Counter[str] = Counter()
    specs = _chosen_specs(arguments)
    for folder in arguments.sources:
        if not folder.is_dir():
            raise ValueError(f"merge: expected folders, got {folder}")
        for spec in specs:
            ours = {record.identity: record for _, record in target.records(spec)}
            for _, record in _store_of(folder).records(spec):
                known = ours.get(record.identity)
                if known is not None and known.date >= record.date:
                    counts["kept"] += 1
                elif target.insert(record):
                    counts["replaced" if known else "added"] += 1
                else:
                    counts["failed"] += 1
    print(", ".join(f"{counts[name]} {name}" for name in ("added", "replaced", "kept", "failed")))
    return 1 if counts["failed"] else 0


def export(arguments: argparse.Namespace) -> int:
    """The form in which records are shipped: one sorted file for each operator and device."""
    by_file: dict[str, list[Record]] = {}
    for _, spec, record in _all_records(arguments, _store_of(arguments.store)):
        if record.source != current_source(spec) and not arguments.older:
            continue
        by_file.setdefault(f"{record.op}.{slug(record.device.name)}.json", []).append(record)
    layer = Layer("exported", arguments.output, writable=True)
    if not all(layer.write(name, dump(records)) for name, records in by_file.items()):
        return 1
    print(f"{sum(map(len, by_file.values()))} records in {len(by_file)} files in {arguments.output}")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Do tables and records still say the truth about the sources as they are? Exit code 1 where they do not."""
    require("triton")
    from kvops.autotune import prune as pruner

    problems: list[str] = []
    rows = []
    for spec in _chosen_specs(arguments):
        if spec.workload is None:
            continue
        proofs = feasibility.load_table(spec)
        counts: Counter[str] = Counter()
        for task in pruner.tasks([spec], pruner.TARGET_ORDER):
            device = by_name(task.target)
            verdict = judge(spec, task.config, task.problem, device, proofs)
            counts[verdict.status] += 1
            if task.config == spec.heuristic(task.problem, device) and verdict.status == "impossible":
                problems.append(f"{spec.name} {words(task.problem)} on {task.target}: the default {verdict.reason}")
        rows.append(
            (spec.name, current_source(spec), *(counts[s] for s in ("proven", "spills", "impossible", "unproven")))
        )
        if counts["unproven"]:
            problems.append(
                f"{spec.name}: {counts['unproven']} candidates are not proven for these sources: make prune"
            )
    print(table(rows, ("op", "sources", "proven", "spills", "impossible", "unproven")))
    for layer, spec, record in _all_records(arguments, _store_of(arguments.store)):
        where = f"{layer} {record.op} {words(record.problem)} on {record.device.name}"
        if record.source != current_source(spec):
            problems.append(f"{where}: measured with older sources ({record.source}): tune it again")
        verdict = judge(spec, spec.config(**record.config), record.problem, record.device)
        if verdict.status == "impossible":
            problems.append(f"{where}: {verdict.reason}")
    if arguments.recompile:
        problems += _recompiled(_chosen_specs(arguments), arguments.recompile)
    for problem in problems:
        print(problem)
    print("everything holds" if not problems else f"{len(problems)} problems")
    return 1 if problems else 0


def _recompiled(chosen: Sequence[OpSpec], count: int) -> list[str]:
    """Compile ``count`` proven candidates of every family again: the table must say what comes out."""
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
            wrong.append(f"{where}: the table has {expected[id(task)]}, compiling gave {proof}")
    print(f"{len(picked)} candidates compiled again")
    return wrong


def doctor(arguments: argparse.Namespace) -> int:
    """What this machine reads and writes, and what is in its way."""
    import importlib.metadata

    problems = []
    specs = _chosen_specs(arguments)
    print(f"built-in devices: {len(KNOWN_DEVICES)}")
    try:
        device = this_gpu()
        print(f"this GPU: {device.name} ({device.arch}), " + ("known" if device.bandwidth else "not in the table"))
    except RuntimeError:
        print("this GPU: none")
    for package in ("torch", "triton", "tqdm"):
        try:
            print(f"{package}: {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package}: not installed")
    rows = []
    for layer in default_layers():
        count = sum(len(layer.read(spec)) for spec in specs)
        aside = len(list((layer.folder / QUARANTINE).glob("*")))
        rows.append((layer.name, str(layer.folder), count, aside or "", _writing(layer)))
        if aside:
            problems.append(f"{aside} damaged files were set aside in {layer.folder / QUARANTINE}; gc removes them")
        if layer.writable and rows[-1][-1] not in ("yes", "when first written"):
            problems.append(f"{layer.folder} cannot be written: name another folder with KVOPS_CACHE_DIR")
    print(table(rows, ("layer", "folder", "records", "set aside", "writable")))
    writable = next((layer for layer in default_layers() if layer.writable), None)
    if writable is not None and (writable.folder / JOURNAL).exists():
        misses = read_problems(writable.folder / JOURNAL, dict(lookup.specs()))
        print(f"misses: {len(misses)} problems without a record; tune --from-misses tunes them on this GPU")
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def _writing(layer: Layer) -> str:
    import os

    if not layer.writable:
        return "never"
    existing = layer.folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK):
        return "no"
    return "yes" if existing == layer.folder else "when first written"


def gc(arguments: argparse.Namespace) -> int:
    layer = _store_of(arguments.store).writable
    if layer is None:
        print("there is no folder to clean")
        return 0
    specs = _chosen_specs(arguments)
    current = {spec.name: current_source(spec) for spec in specs}
    doomed = collect_garbage(layer, specs, current, dry_run=arguments.dry_run)
    for path in doomed:
        print(path)
    print(f"{len(doomed)} files {'would be' if arguments.dry_run else 'were'} removed from {layer.folder}")
    return 0
