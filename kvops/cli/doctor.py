"""``python -m kvops doctor``: what this machine can do with kvops, what is missing, and the commands that install
it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from typing import NamedTuple

import torch

import kvops
from kvops import checks
from kvops.cli.console import table
from kvops.cli.environment import assemblers, processor, usable_cpus

_MIN_TORCH, _MIN_TRITON = "2.11", "3.6"
_MIN_CAPABILITY = (8, 0)
_CHECK_SECONDS = 300
_EXTRAS = {
    "cpu": "kernels for CPU tensors, compiled by numba",
    "models": "the reference model, generation, the demo",
    "plot": "plots",
    "dev": "tests and benchmarks",
}

Row = tuple[str, ...]


class Problem(NamedTuple):
    """Something missing, and the next step: a command, or what else to do."""

    what: str
    next_step: str


class Route(NamedTuple):
    """One way to run operators: a name, torch's device, and whether Triton's interpreter is used."""

    name: str
    device: str
    interpret: bool


def report() -> str:
    """The whole report. Takes some seconds: it runs a small attention on every device, each in a fresh process."""
    problems: list[Problem] = []
    routes: list[Route] = []
    sections = [
        ("Software", _software(problems)),
        ("Devices", _devices(problems, routes)),
        ("Extras", _extras(problems)),
        ("Model", _model(problems)),
        ("Self-check: flash_attention and paged_attention against float64", _self_checks(problems, routes)),
    ]
    lines = [f"kvops {kvops.__version__} on {platform.platform()}"]
    for title, rows in sections:
        lines += ["", title, *(f"  {line}" for line in table(rows).splitlines())]
    lines += ["", "Next steps" if problems else "Nothing is missing."]
    for number, problem in enumerate(problems, 1):
        lines += [f"  {number}. {problem.what}", f"     {problem.next_step}"]
    return "\n".join(lines)


def self_check(device: str) -> float:
    """Run ``flash_attention`` and ``paged_attention`` on a small input on ``device`` and compare with float64.

    Returns:
        The largest error in float32.

    Raises:
        ArithmeticError: in float32 or float16, an error above twice that of the same formula in torch plus a rounding.
    """
    generator = torch.Generator().manual_seed(0)
    exact_q, exact_k, exact_v = (
        torch.randn(1, tokens, heads, 40, generator=generator).half().double()
        for tokens, heads in ((33, 4), (49, 2), (49, 2))
    )
    exact = _attention(exact_q, exact_k, exact_v)
    for dtype in (torch.float16, torch.float32):
        q, k, v = (x.to(device, dtype) for x in (exact_q, exact_k, exact_v))
        rounding = torch.finfo(dtype).eps * exact.abs().max().item()
        limit = 2 * _largest_error(_attention(q, k, v), exact) + rounding
        results = {
            "flash_attention": kvops.flash_attention(q, k, v, causal=True)[0],
            "paged_attention": _paged(q, k, v),
        }
        errors = {operator: _largest_error(out, exact) for operator, out in results.items()}
        for operator, error in errors.items():
            if not error <= limit:
                raise ArithmeticError(f"{operator}, {dtype}: expected an error of at most {limit:.1e}, got {error:.1e}")
    return max(errors.values())


def _paged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention over k and v [1, Sk, Hkv, D] in blocks of 16 slots."""
    slots, heads, head_dim = k.shape[1:]
    k_cache, v_cache = (
        torch.nn.functional.pad(x[0].transpose(0, 1), (0, 0, 0, -slots % 16)).reshape(-1, 16, head_dim) for x in (k, v)
    )
    blocks = torch.arange(heads * -(-slots // 16), dtype=torch.int32, device=k.device)
    lens = torch.full((1, heads), slots, dtype=torch.int32, device=k.device)
    return kvops.paged_attention(q, k_cache, v_cache, blocks.view(1, heads, -1), lens)[0]


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention by its definition, in the dtype of q: q [B, Sq, Hq, D], k and v [B, Sk, Hkv, D]."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(k.shape[1] - q.shape[1] + 1)
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def _largest_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return (out.cpu().double() - exact).abs().max().item()


def _at_least(version: str, minimum: str) -> bool:
    have, want = ([int(part) for part in re.findall(r"\d+", text)] for text in (version, minimum))
    return have[: len(want)] >= want


def _software(problems: list[Problem]) -> list[Row]:
    # pip installs this package for a supported Python only.
    rows: list[Row] = [("Python", platform.python_version(), "supported")]
    for name, version, minimum in (("torch", torch.__version__, _MIN_TORCH), ("triton", _triton(), _MIN_TRITON)):
        if version is None:
            rows.append((name, "-", "missing: needed for GPUs and for Triton's interpreter, not for CPU tensors"))
            if platform.system() == "Linux":
                problems.append(Problem("triton is not installed", f'pip install "triton>={_MIN_TRITON}"'))
        elif _at_least(version, minimum):
            rows.append((name, version, f"supported ({minimum} or later)"))
        else:
            rows.append((name, version, f"too old: {minimum} or later is supported"))
            problems.append(Problem(f"{name} {version} is too old", f'pip install --upgrade "{name}>={minimum}"'))
    rows += [(name, *tool) for name, tool in assemblers().items()]
    return rows


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _devices(problems: list[Problem], routes: list[Route]) -> list[Row]:
    has_triton = _triton() is not None
    cpus, threads = usable_cpus(), torch.get_num_threads()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0.0
    serves = "eager" if checks.eager_on_cpu() else "numba"  # where TRITON_INTERPRET=1 does not say otherwise
    runs = "eager PyTorch"
    if serves == "numba":
        runs = f"kernels compiled by numba{_numba_remark()}, other operators in eager PyTorch"
    if has_triton:
        runs += "; with TRITON_INTERPRET=1 the kernels in Triton's interpreter (slow)"
    what = f"{processor()}, {cpus:g} cores, {threads} threads, {memory:.1f} GiB"
    if threads > (most := math.ceil(cpus)):
        problem = f"torch uses {threads} threads, this process may use {cpus:g} cores: threads wait for each other"
        problems.append(Problem(problem, f"export OMP_NUM_THREADS={most}"))
    rows: list[Row] = [("cpu", what, runs)]
    routes.append(Route(f"cpu, {serves}", "cpu", False))
    if has_triton:
        routes.append(Route("cpu, Triton's interpreter", "cpu", True))
    if not torch.cuda.is_available():
        _why_no_gpu(problems)
        return [*rows, ("cuda", "no GPU that torch can use", "nothing")]

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        arch = f"sm_{properties.major}{properties.minor}"
        if torch.version.hip is not None:
            arch = properties.gcnArchName.split(":")[0]
        too_old = torch.version.hip is None and capability < _MIN_CAPABILITY
        runs = "nothing: Triton is missing" if not has_triton else "the Triton kernels"
        if too_old:
            runs = "not supported: compute capability 8.0 (Ampere) or later is"
            problems.append(Problem(f"cuda:{index} is too old for the kernels", "keep the tensors on the CPU"))
        elif has_triton:
            routes.append(Route(f"cuda:{index}, Triton kernels", f"cuda:{index}", False))
        rows.append((f"cuda:{index}", f"{properties.name}, {arch}, {properties.total_memory / 2**30:.1f} GiB", runs))
    if has_triton:
        _expect_compiler(problems)
    return rows


def _numba_remark() -> str:
    try:
        from kvops.kernels.cpu.threads import has_pool
    except ImportError:  # the self-check says why
        return " (importing it fails)"
    return "" if has_pool() else " on one thread (torch's OpenMP library was not found)"


def _why_no_gpu(problems: list[Problem]) -> None:
    nvidia, amd = shutil.which("nvidia-smi") is not None, shutil.which("rocm-smi") is not None
    if torch.version.cuda is None and torch.version.hip is None:
        if nvidia or amd:
            kind = "an NVIDIA" if nvidia else "an AMD"
            step = "pip install --force-reinstall torch, in the build that pytorch.org names for this GPU"
            problems.append(Problem(f"there is {kind} driver, but torch {torch.__version__} is a build for CPUs", step))
    elif nvidia or amd:
        step = f"{'nvidia-smi' if nvidia else 'rocm-smi'}   (is there a GPU, is its driver new enough for this torch?)"
        problems.append(Problem(f"torch {torch.__version__} finds no GPU, although a driver is installed", step))


def _expect_compiler(problems: list[Problem]) -> None:
    """Triton compiles a small C file for every kernel that it launches on a GPU."""
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        problems.append(Problem("Triton needs a C compiler, and there is none", "apt-get install gcc"))
    if not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")):
        step = "apt-get install python3-dev, or the package of headers for your Python"
        problems.append(Problem("Triton needs Python's C headers, and there are none", step))


def _extras(problems: list[Problem]) -> list[Row]:
    try:
        requirements = importlib.metadata.requires("kvops") or []
    except importlib.metadata.PackageNotFoundError:
        problems.append(Problem("kvops runs from a source tree and is not installed", 'pip install -e ".[models]"'))
        return [("all", "unknown: kvops is not installed")]
    rows: list[Row] = []
    for extra, purpose in _EXTRAS.items():
        lacking = []
        for requirement in requirements:
            match = re.fullmatch(r"([\w.-]+)\s*(?:>=\s*([\d.]+))?.*extra\s*==\s*['\"](\w+)['\"].*", requirement)
            if match is not None and match[3] == extra and (reason := _lacks(match[1], match[2])):
                lacking.append(reason)
        rows.append((extra, purpose, f"missing: {', '.join(lacking)}" if lacking else "complete"))
        if lacking:
            problems.append(Problem(f"packages for {purpose} are missing", f'pip install "kvops[{extra}]"'))
    return rows


def _lacks(package: str, minimum: str | None) -> str | None:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return package
    return None if minimum is None or _at_least(version, minimum) else f"{package} >= {minimum} (there is {version})"


def _model(problems: list[Problem]) -> list[Row]:
    from kvops.models.loading import INSTALL_DEFAULT, find_default_model

    try:
        path = find_default_model()
    except FileNotFoundError:
        problems.append(Problem("the model for the demo is not installed", INSTALL_DEFAULT))
        return [("SmolLM2-135M-Instruct", "missing")]
    return [(path.name.removesuffix(".gguf"), f"{path.stat().st_size / 2**20:.0f} MiB", str(path))]


def _self_checks(problems: list[Problem], routes: Sequence[Route]) -> list[Row]:
    # In separate processes: the interpreter is chosen when kernels are imported, and a crash does not end the report.
    # All at once, because most of their time is the import of torch.
    running = [_start(route) for route in routes]
    if sys.stderr.isatty():
        print(f"Checking {', '.join(route.name for route in routes)} ...", file=sys.stderr)
    rows: list[Row] = []
    for route, process in zip(routes, running, strict=True):
        try:
            out, errors = process.communicate(timeout=_CHECK_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            out, errors = process.communicate()
            errors += f"\nno answer within {_CHECK_SECONDS} s"
        if process.returncode == 0:
            rows.append((route.name, f"agrees: largest error {float(out):.1e}"))
        else:
            said = (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
            rows.append((route.name, f"FAILED: {said}"))
            variables = "TRITON_INTERPRET=1 " if route.interpret else ""
            command = f"{variables}python -c \"from kvops.cli.doctor import self_check; self_check('{route.device}')\""
            problems.append(Problem(f"the self-check fails on {route.name}; its whole message comes with", command))
    return rows


def _start(route: Route) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", f"from kvops.cli.doctor import self_check; print(self_check({route.device!r}))"],
        env={**os.environ, "TRITON_INTERPRET": "1" if route.interpret else "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
