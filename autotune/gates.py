"""Compile cases for many targets at once, and check every launch against the limits of its target."""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvops.autotune.architectures import has_tma
from kvops.autotune.inspect import TARGETS, CompileCase, CompiledLaunch, compile_only

# Each serialised product has its own wait. Otherwise one wait follows the products of a tile.
_PRODUCTS_PER_WAIT = 2


@dataclass(frozen=True)
class CaseResult:
    """The result of one case on one target; ``problems`` is empty if it may ship."""

    case: str
    target: str
    launches: list[CompiledLaunch] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def load_cases(path: str | Path) -> list[CompileCase]:
    """The list ``CASES`` of a Python file. Raises ValueError for a file without one or with a name used twice."""
    spec = importlib.util.spec_from_file_location("kvops_compile_cases", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"cases: expected a Python file, got {str(path)!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cases = getattr(module, "CASES", None)
    if not isinstance(cases, list):
        raise ValueError(f"cases: expected {path} to define the list CASES")
    names = [case.name for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"cases: names used twice in {path}: {', '.join(twice)}")
    return cases


def check_launches(case: CompileCase, target: str, launches: Sequence[CompiledLaunch]) -> list[str]:
    """The problems of a case's launches on ``target``, as text.

    Shared memory within the limit, no spills unless the case accepts them there, matrix instructions wherever the
    source multiplies 16-bit matrices and in every kernel that the case names, TMA wherever the source loads through
    descriptors (Hopper, Blackwell), and on Hopper HGMMA alone, not serialised, in the kernels that the case names.
    """
    problems = []
    if not launches:
        problems.append("launched nothing")
    for launch in launches:
        where = f"{launch.kernel} ({launch.num_warps} warps, {launch.num_stages} stages)"
        limit = TARGETS[target].shared_memory
        if launch.shared_memory > limit:
            problems.append(f"{where}: {launch.shared_memory} bytes of shared memory, {target} has {limit}")
        if (launch.spills or launch.stack) and target not in case.may_spill:
            spills = f"{launch.spill_stores} spill stores, {launch.spill_loads} spill loads"
            problems.append(f"{where}: {spills}, {launch.stack} bytes of stack")
        if not launch.matrix_instructions and (launch.dots_16bit or launch.kernel in case.matrix):
            problems.append(f"{where}: no matrix instructions")
        if launch.descriptor_loads and has_tma(target) and not launch.tma_loads:
            problems.append(f"{where}: no TMA load for {launch.descriptor_loads} loads through descriptors")
        if target == "sm_90" and launch.kernel in case.warpgroup and launch.matrix_instructions:
            warpgroup, others = launch.matrix_instructions.get("HGMMA", 0), launch.matrix_instructions.get("HMMA", 0)
            if not warpgroup or others:
                problems.append(f"{where}: {warpgroup} HGMMA and {others} HMMA, expected HGMMA only")
            elif launch.waits * _PRODUCTS_PER_WAIT > warpgroup:
                problems.append(f"{where}: {launch.waits} waits for {warpgroup} HGMMA: serialised")
    missing = {*case.matrix, *case.warpgroup} - {launch.kernel for launch in launches}
    problems += [f"{kernel}: never launched" for kernel in sorted(missing)]
    return problems


Known = Mapping[str, Mapping[str, Any]]


def run_case(case: CompileCase, target: str, known: Known | None = None) -> CaseResult:
    """Compile one case for one target in this process, except launches whose facts are ``known``."""
    try:
        with compile_only(target, known) as launches:
            case.function()
    except Exception:
        return CaseResult(case.name, target, problems=[traceback.format_exc(limit=-4)])
    return CaseResult(case.name, target, launches, check_launches(case, target, launches))


def run_cases(
    path: str | Path,
    targets: Sequence[str],
    *,
    only: str = "",
    jobs: int | None = None,
    known: Known | None = None,
) -> Iterator[CaseResult]:
    """Compile the cases of a file whose names contain ``only``, each for every target, in ``jobs`` fresh processes.

    The kernels are imported without ``TRITON_INTERPRET`` whatever this process does. Results come as they are done.
    ``known`` is ``compile_only``'s. With one job it is this process that compiles: starting another takes seconds.
    """
    cases = [case for case in load_cases(path) if only in case.name]
    work = [(case.name, target) for target in targets for case in cases if not case.targets or target in case.targets]
    if jobs == 1:
        _begin(known)
        yield from (_run_named_case(str(path), name, target) for name, target in work)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=context, initializer=_begin, initargs=(known,)) as pool:
        futures = [pool.submit(_run_named_case, str(path), name, target) for name, target in work]
        for future in as_completed(futures):
            yield future.result()


_known: Known | None = None  # of a process of the pool


def _begin(known: Known | None) -> None:
    """Compile for GPUs, even if the parent process uses Triton's interpreter."""
    global _known
    os.environ.pop("TRITON_INTERPRET", None)
    _known = known


_cases_of = functools.cache(load_cases)


def _run_named_case(path: str, name: str, target: str) -> CaseResult:
    return run_case(next(case for case in _cases_of(path) if case.name == name), target, _known)
