"""Compile every candidate for every target, without a GPU, and record the facts of the binaries."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from kvops.autotune.devices import by_name
from kvops.autotune.feasibility import Group, Proof, Table, current_source, dump_table, load_table, parse_table
from kvops.autotune.inspect import TARGETS, CompiledLaunch, compile_only
from kvops.autotune.lookup import override, specs
from kvops.autotune.records import read_text
from kvops.autotune.spec import Config, OpSpec, Problem, Workload, config_to_json
from kvops.autotune.store import Layer
from kvops.autotune.worker import CandidateError, Worker, resolve_function
from kvops.extras import require

# The limit for compiling one candidate. The slowest known one takes 40 s on a busy core.
TIME_LIMIT = 300.0
# The order of compilation: the most common GPUs come first.
TARGET_ORDER = ("sm_90", "sm_80", "sm_100", "sm_89", "sm_120", "gfx942", "gfx950", "sm_86")
_SAVE_EVERY = 30.0


@dataclass(frozen=True)
class Task:
    """One candidate to compile for one target."""

    spec: OpSpec
    target: str
    problem: Problem
    config: Config


def build_workload(spec: OpSpec, problem: Problem, device: str, small: bool) -> Workload:
    """The workload of a problem. Raises ValueError for a spec without one."""
    if spec.workload is None:
        raise ValueError(f"workload: expected {spec.name} to have one, which compiling and tuning need")
    build = resolve_function(spec.workload) if isinstance(spec.workload, str) else spec.workload
    return build(problem, device, small)


def proof_problems(spec: OpSpec) -> list[Problem]:
    """One typical problem for each key of the table, and others whose sizes give other candidates."""
    problems: dict[str, Problem] = {}
    for problem in spec.problems:
        proof = {**problem, **spec.proof_of(problem)}
        candidates = spec.candidates(proof, by_name("sm_90"))
        problems.setdefault(f"{spec.proof_of(problem)} {candidates}", proof)
    return list(problems.values())


def _corners(spec: OpSpec) -> list[Problem]:
    return [{**problem, **spec.proof_of(problem)} for problem in spec.corners]


def tasks(chosen: Iterable[OpSpec], targets: Iterable[str]) -> list[Task]:
    """All tasks: default configurations before others, targets in order."""
    work: list[tuple[tuple[bool, int], Task]] = []
    for spec in chosen:
        for target in targets:
            device = by_name(target)
            seen = set()
            candidates = [(problem, spec.candidates(problem, device)) for problem in proof_problems(spec)]
            candidates += [(problem, spec.candidates(problem, device)[:1]) for problem in _corners(spec)]
            for problem, configs in candidates:
                for place, config in enumerate(configs):
                    mark = (tuple(spec.proof_of(problem).items()), config)
                    if mark not in seen:
                        seen.add(mark)
                        order = TARGET_ORDER.index(target) if target in TARGET_ORDER else len(TARGET_ORDER)
                        work.append(((place > 0, order), Task(spec, target, problem, config)))
    work.sort(key=lambda entry: entry[0])
    return [task for _, task in work]


def missing(work: Sequence[Task], table_of: Callable[[OpSpec], Table], triton: str) -> list[Task]:
    """The tasks without an entry for the current sources and this Triton."""
    left = []
    for task in work:
        group = table_of(task.spec).group(task.target, task.spec.proof_of(task.problem))
        fresh = group is not None and (group.source, group.triton) == (current_source(task.spec), triton)
        if not fresh or group is None or task.config not in group.rows:
            left.append(task)
    return left


@cache
def _workload(op: str, values: tuple[int, ...]) -> Workload:
    spec = specs()[op]
    return build_workload(spec, dict(zip(spec.fields, values, strict=True)), "cpu", True)


def compile_candidate(op: str, problem: dict[str, int], config: dict[str, Any], target: str) -> Proof:
    """Compile the launches with this configuration. A failure to compile is a result as well."""
    spec = specs()[op]
    workload = _workload(op, tuple(problem[name] for name in spec.fields))
    try:
        with override(op, spec.config_from_json(config)), compile_only(target) as launches:
            workload.run()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return Proof(problem=f"does not compile: {type(error).__name__}: {lines[0][:160]}")
    names = {getattr(kernel, "__name__", str(kernel).rpartition(":")[2]) for kernel in spec.kernels}
    return _proof([launch for launch in launches if launch.kernel in names])


def _proof(launches: Sequence[CompiledLaunch]) -> Proof:
    if not launches:
        return Proof(problem="launched none of its kernels")
    bare = [launch.kernel for launch in launches if launch.dots_16bit and not launch.matrix_instructions]
    return Proof(
        registers=max(launch.registers for launch in launches),
        spills=sum(launch.spills for launch in launches),
        shared_memory=max(launch.shared_memory for launch in launches),
        matrix=sum(sum(launch.matrix_instructions.values()) for launch in launches),
        problem=f"no matrix instructions in {', '.join(bare)}" if bare else "",
    )


def run(
    work: Sequence[Task],
    *,
    jobs: int = 1,
    limit_seconds: float | None = None,
    imports: Sequence[str] = (),
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[Task, Proof]]:
    """Compile tasks in ``jobs`` processes, and yield results as they complete, for up to ``limit_seconds``."""
    deadline = None if limit_seconds is None else clock() + limit_seconds
    results: SimpleQueue[tuple[Task, Proof] | None] = SimpleQueue()
    waiting = iter(work)

    def loop() -> None:
        with Worker(imports) as worker:
            for task in waiting_next():
                arguments = task.spec.name, dict(task.problem), config_to_json(task.config), task.target
                try:
                    proof = worker.call("kvops.autotune.prune:compile_candidate", *arguments, limit=TIME_LIMIT)
                except CandidateError as error:
                    proof = Proof(problem=f"does not compile: {str(error).splitlines()[-1][:160]}")
                results.put((task, proof))
        results.put(None)

    def waiting_next() -> Iterator[Task]:
        while deadline is None or clock() < deadline:
            try:
                yield next(waiting)  # list iterators are safe to share between threads
            except StopIteration:
                return

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(loop) for _ in range(jobs)]
        running = jobs
        while running:
            result = results.get()
            if result is None:
                running -= 1
            else:
                yield result
        for future in futures:
            future.result()


def prune(
    chosen: Sequence[OpSpec],
    targets: Sequence[str],
    folder: Path,
    *,
    jobs: int = 1,
    limit_seconds: float | None = None,
    imports: Sequence[str] = (),
    progress: Callable[[Task, Proof, int, int], None] | None = None,
) -> tuple[int, int]:
    """Compile what the tables in ``folder`` lack. The tables are written from time to time, so that no result is lost.

    Returns the number of candidates that were compiled and that are still missing. Raises OSError if ``folder`` cannot
    be written, and ValueError for an unknown target.
    """
    triton = require("triton").__version__
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown:
        raise ValueError(f"targets: expected names among {', '.join(TARGETS)}, got {', '.join(unknown)}")
    tables = {spec.name: _read_table(spec, folder) for spec in chosen}
    work = tasks(chosen, targets)
    touched = {spec for spec in chosen if _drop_leftovers(tables[spec.name], spec, work, targets)}
    todo = missing(work, lambda spec: tables[spec.name], triton)
    done, saved = 0, time.monotonic()
    for task, proof in run(todo, jobs=jobs, limit_seconds=limit_seconds, imports=imports):
        done += 1
        _add(tables[task.spec.name], task, proof, triton)
        touched.add(task.spec)
        if progress:
            progress(task, proof, done, len(todo))
        if time.monotonic() - saved > _SAVE_EVERY:
            _save(folder, tables, touched)
            saved = time.monotonic()
            touched.clear()
    _save(folder, tables, touched)
    return done, len(todo) - done


def _drop_leftovers(table: Table, spec: OpSpec, work: Sequence[Task], targets: Sequence[str]) -> bool:
    """Drop entries for ``targets`` that are no longer in the space. Returns whether there were any."""
    wanted: dict[tuple[str, tuple[tuple[str, int], ...]], set[Config]] = {}
    for task in work:
        if task.spec is spec:
            key = tuple(sorted(spec.proof_of(task.problem).items()))
            wanted.setdefault((task.target, key), set()).add(task.config)
    dropped = False
    for place, group in list(table.groups.items()):
        if place[0] not in targets:
            continue
        for config in set(group.rows) - wanted.get(place, set()):
            del group.rows[config]
            dropped = True
        if not group.rows:
            del table.groups[place]
    return dropped


def _read_table(spec: OpSpec, folder: Path) -> Table:
    try:
        return parse_table(read_text(str(folder / f"{spec.name}.json")), spec)
    except (FileNotFoundError, ValueError):
        return Table()


def _add(table: Table, task: Task, proof: Proof, triton: str) -> None:
    key, source = task.spec.proof_of(task.problem), current_source(task.spec)
    group = table.group(task.target, key)
    if group is None or (group.source, group.triton) != (source, triton):
        group = Group(source, triton, {})
        table.put(task.target, key, group)
    group.rows[task.config] = proof


def _save(folder: Path, tables: dict[str, Table], touched: Iterable[OpSpec]) -> None:
    layer = Layer("feasibility", folder, writable=True)
    for spec in touched:
        if not layer.write(f"{spec.name}.json", dump_table(spec, tables[spec.name])):
            raise OSError(f"{folder} cannot be written")
    load_table.cache_clear()
