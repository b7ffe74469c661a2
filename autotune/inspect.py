"""Compile the kernels of a launch for any GPU, on a machine without one.

A stub driver reports the target, and every JIT function compiles instead of launching. The launch functions of kernels
can then be called with CPU tensors::

    with compile_only("sm_90") as launches:
        flash_forward(q, k, v, ...)
    launches[0].registers, launches[0].spills, launches[0].matrix_instructions

Specialisation (dtypes, strides of 1, divisibility by 16), configuration and binary are those of a real launch. NVIDIA
facts are read with the ``cuobjdump`` that Triton bundles, AMD facts from the assembly text.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from types import SimpleNamespace
from typing import Any, ClassVar

from triton import __version__ as triton_version
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

from kvops.autotune.register_operands import overwritten_operands
from kvops.autotune.source_hash import SourceError, source_hash

# Raise it when `_facts` changes: the facts cached beside Triton's binaries carry this number in their name.
_FACTS_VERSION = 3


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    ``shared_memory`` is the most that one program may use, in bytes; ``num_sms`` is what a launch function is told.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int
    num_sms: int

    @property
    def gpu(self) -> GPUTarget:
        return GPUTarget(self.backend, self.arch, self.warp_size)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, shared_memory=166_912, num_sms=108),  # A100
        Target("sm_86", "cuda", 86, 32, shared_memory=101_376, num_sms=84),  # A40, RTX 3090
        Target("sm_89", "cuda", 89, 32, shared_memory=101_376, num_sms=142),  # L40S, RTX 4090
        Target("sm_90", "cuda", 90, 32, shared_memory=232_448, num_sms=132),  # H100, H200
        Target("sm_100", "cuda", 100, 32, shared_memory=232_448, num_sms=148),  # B200
        Target("sm_103", "cuda", 103, 32, shared_memory=232_448, num_sms=148),  # B300
        Target("sm_120", "cuda", 120, 32, shared_memory=101_376, num_sms=188),  # RTX PRO 6000, RTX 5090
        Target("sm_121", "cuda", 121, 32, shared_memory=101_376, num_sms=48),  # GB10
        Target("gfx942", "hip", "gfx942", 64, shared_memory=65_536, num_sms=304),  # MI300X
        Target("gfx950", "hip", "gfx950", 64, shared_memory=163_840, num_sms=256),  # MI355X
    )
}


@dataclass(frozen=True)
class CompiledLaunch:
    """One launch, compiled.

    ``registers`` are per thread (AMD: vector registers, accumulation registers included), ``stack`` bytes per thread,
    ``spill_stores`` and ``spill_loads`` the instructions that move registers to and from that stack, ``shared_memory``
    bytes per program. ``matrix_instructions`` counts by family: HGMMA (Hopper), HMMA (Ampere's), UTCHMMA (Blackwell),
    v_mfma (AMD) ... ``waits`` counts Hopper's waits for them (``WARPGROUP.DEPBAR``; with one wait for each HGMMA the
    products are serialised), ``overlaps`` the exponentials between a wait that leaves a product pending and the next
    wait, ``tma_loads`` and ``tma_stores`` the copies through tensor descriptors; 0 on other GPUs. ``instructions``
    counts all instructions of the binary. ``dots_16bit`` and ``descriptor_loads`` count operations of the source:
    matrix products of float16 or bfloat16 operands, and loads through tensor descriptors. ``identity`` is a hash of
    everything that the binary depends on: ``source_hash``, specialisation, options, target and the version of Triton.
    It is empty, and equal to no other, if the sources cannot be read.
    """

    kernel: str
    target: str
    grid: tuple[int, ...]
    constants: dict[str, int | float | bool | str | None]
    num_warps: int
    num_stages: int
    shared_memory: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    matrix_instructions: dict[str, int]
    waits: int
    overlaps: list[int]
    tma_loads: int
    tma_stores: int
    instructions: int
    dots_16bit: int
    descriptor_loads: int
    compile_seconds: float
    identity: str

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


# Facts that every compilation of the same launch gives: the fields that ``known`` must have.
FACTS = tuple(
    f.name
    for f in fields(CompiledLaunch)
    if f.name not in ("kernel", "target", "grid", "constants", "compile_seconds", "identity")
)


@dataclass(frozen=True)
class CompileCase:
    """A call whose launches are compiled for every target, or for ``targets`` only.

    ``function`` takes no arguments and calls a launch function from ``kvops.kernels`` with CPU tensors. ``matrix``
    names the kernels that must use matrix instructions, ``warpgroup`` those that must use HGMMA (asynchronous) for all
    their products on Hopper, and ``may_spill`` the targets on which spills are accepted.
    """

    name: str
    function: Callable[[], object]
    matrix: tuple[str, ...] = ()
    warpgroup: tuple[str, ...] = ()
    may_spill: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()


class _Utilities:
    """The part of ``driver.active.utils`` that launch functions use."""

    def __init__(self, target: Target) -> None:
        self._properties = {
            "max_shared_mem": target.shared_memory,
            "multiprocessor_count": target.num_sms,
            "warpSize": target.warp_size,
        }

    def get_device_properties(self, device: object) -> dict[str, int]:
        return self._properties


class CompileOnlyDriver:
    """Stands in for Triton's driver: it knows its target and can launch nothing."""

    _instances: ClassVar[dict[str, CompileOnlyDriver]] = {}

    def __init__(self, target: Target) -> None:
        self.target = target
        self.utils = _Utilities(target)

    @classmethod
    def of(cls, target: Target) -> CompileOnlyDriver:
        """One driver for each target and process, so that what is cached by driver stays right."""
        if target.name not in cls._instances:
            cls._instances[target.name] = cls(target)
        return cls._instances[target.name]

    def get_current_target(self) -> GPUTarget:
        return self.target.gpu

    def get_current_device(self) -> str:
        # The key of each JIT function's table of compiled kernels must not be that of a real device.
        return f"compile-only {self.target.name}"

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def launches_compile(stand_in: CompileOnlyDriver, compiling: Callable[..., Any]) -> Iterator[None]:
    """Inside, launches compile for the target of ``stand_in`` and do not run.

    ``compiling(do_compile, kernel, key, *args, **options)`` is called for each variant that is not compiled yet, and
    calls ``do_compile(kernel, key, *args, **options)`` to compile it. Like :func:`compile_only` it is not thread-safe.
    """
    run, do_compile, active = JITFunction.run, JITFunction._do_compile, driver._active

    def compile_alone(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    def compile_new(self: Any, *args: Any, **options: Any) -> Any:
        return compiling(do_compile, self, *args, **options)

    driver.set_active(stand_in)  # type: ignore[arg-type]
    JITFunction.run, JITFunction._do_compile = compile_alone, compile_new
    try:
        yield
    finally:
        JITFunction.run, JITFunction._do_compile = run, do_compile
        driver.set_active(active)  # type: ignore[arg-type]


@contextmanager
def compile_only(
    target: str | Target, known: Mapping[str, Mapping[str, Any]] | None = None
) -> Iterator[list[CompiledLaunch]]:
    """Compile launches for ``target`` inside this context, and record them in the list that it yields. Nothing runs.

    ``known`` has facts (``FACTS``) of launches by their identity, from an earlier compilation. Those launches are not
    compiled again.

    It is not thread-safe: it replaces methods of ``JITFunction`` for the whole process. The kernels must have been
    imported without ``TRITON_INTERPRET=1``. Raises ValueError for an unknown target and RuntimeError for
    kernels that were decorated for the interpreter.
    """
    if isinstance(target, str):
        if target not in TARGETS:
            raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
        target = TARGETS[target]
    gpu = target
    launches: list[CompiledLaunch] = []
    original_run, original_compile = JITFunction.run, JITFunction._do_compile

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = original_run(self, *args, grid=grid, warmup=True, **kwargs)
        where = {"kernel": self.fn.__name__, "target": gpu.name, "grid": resolve_grid(self, grid, args, kwargs)}
        launches.append(CompiledLaunch(**where, **kernel.kvops_launch))
        return kernel

    def do_compile(
        self: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, warmup: bool
    ) -> Any:
        identity = _identity(self, gpu, signature, constants, options, attributes)
        facts = known.get(identity) if known and identity else None
        if facts is not None:
            kernel: Any = SimpleNamespace()  # Triton must not cache it: another context may not have these facts
            facts = {**facts, "compile_seconds": 0.0}
        else:
            start = time.perf_counter()
            kernel = original_compile(self, key, signature, device, constants, options, attributes, warmup)
            facts = _facts(kernel, gpu, time.perf_counter() - start)
        kernel.kvops_launch = {"identity": identity, "constants": _plain(self, constants), **facts}
        return kernel

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"kernel {self.fn.__name__} was imported under TRITON_INTERPRET=1 and cannot be compiled: "
            "inspect kernels in a fresh process without it"
        )

    interpreter = sys.modules.get("triton.runtime.interpreter")
    original_interpreted = interpreter.InterpretedFunction.run if interpreter else None
    previous = driver._active
    driver.set_active(CompileOnlyDriver.of(gpu))  # type: ignore[arg-type]
    JITFunction.run, JITFunction._do_compile = run, do_compile
    if interpreter:
        interpreter.InterpretedFunction.run = refuse
    try:
        yield launches
    finally:
        JITFunction.run, JITFunction._do_compile = original_run, original_compile
        if interpreter:
            interpreter.InterpretedFunction.run = original_interpreted
        driver.set_active(previous)  # type: ignore[arg-type]


def resolve_grid(function: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """The sizes of a launch's grid, which may be a function of the kernel's arguments."""
    if callable(grid):
        arguments = {name: value for name, value in kwargs.items() if name in function.arg_names}
        bound = function.signature.bind(*args, **arguments)
        bound.apply_defaults()
        grid = grid(bound.arguments)
    return tuple(int(size) for size in grid)


def _plain(function: Any, constants: Mapping[tuple[int, ...], Any]) -> dict[str, Any]:
    """The constexprs that are numbers or strings, by name."""
    return {
        function.arg_names[path[0]]: value
        for path, value in constants.items()
        if len(path) == 1
        and function.params[path[0]].is_constexpr
        and (value is None or isinstance(value, (bool, int, float, str)))
    }


def _identity(
    function: Any, target: Target, signature: Mapping[str, Any], constants: Any, options: Any, attributes: Any
) -> str:
    try:
        sources = _source_of(function)
        values = {path: _source_of(v) if isinstance(v, JITFunction) else repr(v) for path, v in constants.items()}
    except (SourceError, OSError, SyntaxError):
        return ""
    # Libraries named by an option are part of Triton; their paths differ between machines.
    chosen = {name: value for name, value in vars(options).items() if name != "extern_libs"}
    everything = (
        triton_version,
        get_cache_invalidating_env_vars(),
        target.gpu,
        function.fn.__name__,
        sources,
        signature,
        sorted(values.items()),
        sorted(chosen.items()),
        sorted(attributes.items()),
    )
    return hashlib.sha256(repr(everything).encode()).hexdigest()[:16]


@cache
def _source_of(function: Any) -> str:
    return source_hash([function])


def _facts(kernel: Any, target: Target, seconds: float) -> dict[str, Any]:
    """The facts of a binary, cached beside it in Triton's cache: disassembling takes 0.1 to 1 s."""
    manager = get_cache_manager(kernel.hash)
    name = f"kvops_facts_{_FACTS_VERSION}.json"
    path = manager.get_file(name)
    if path is not None:
        try:
            with open(path) as file:
                return json.load(file)
        except ValueError:
            pass  # a damaged entry counts as a miss
    facts = _nvidia_facts(kernel.asm["cubin"]) if target.backend == "cuda" else _amd_facts(kernel.asm["amdgcn"])
    source = kernel.asm.get("ttir", "")
    facts["dots_16bit"] = len(_DOT_16BIT.findall(source))
    facts["descriptor_loads"] = source.count("tt.descriptor_load")
    facts |= {
        "num_warps": kernel.metadata.num_warps,
        "num_stages": kernel.metadata.num_stages,
        "shared_memory": kernel.metadata.shared,
        "compile_seconds": round(seconds, 3),
    }
    manager.put(json.dumps(facts), name, binary=False)
    return facts


_DOT_16BIT = re.compile(r"tt\.dot .*:\s*tensor<\d+x\d+xb?f16>")
_WAIT = re.compile(r"\bWARPGROUP\.DEPBAR\b")
_WAIT_OR_EXPONENTIAL = re.compile(r"\bWARPGROUP\.DEPBAR\.LE( [^;]*);|\bMUFU\.EX2\b")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", re.MULTILINE)
_AMD_INSTRUCTION = re.compile(r"^\s+[a-z]+_\w+", re.MULTILINE)


@cache
def _cuobjdump() -> str:
    return knobs.nvidia.cuobjdump.path


def _nvidia_facts(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # -sass needs nvdisasm, which Triton bundles in the same folder.
        usage, sass = (
            subprocess.run([_cuobjdump(), flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    overwritten = overwritten_operands(sass)
    if overwritten:
        raise RuntimeError(
            f"ptxas overwrites registers that a wgmma still reads ({len(overwritten)} places, {overwritten[0]}): the "
            "results would be wrong; assemble with the ptxas of CUDA 13.3 or later (TRITON_PTXAS_PATH)"
        )
    functions = [(int(registers), int(stack)) for registers, stack in _RESOURCES.findall(usage)]
    opcodes = Counter(_OPCODE.findall(sass))
    return {
        "registers": max(registers for registers, _ in functions),
        "stack": max(stack for _, stack in functions),
        "spill_stores": opcodes["STL"],
        "spill_loads": opcodes["LDL"],
        "matrix_instructions": {name: count for name, count in sorted(opcodes.items()) if name.endswith("MMA")},
        "waits": len(_WAIT.findall(sass)),
        "overlaps": _overlaps(sass),
        "tma_loads": opcodes["UTMALDG"],
        "tma_stores": opcodes["UTMASTG"],
        "instructions": opcodes.total(),
    }


def _overlaps(sass: str) -> list[int]:
    counts: list[int] = []
    exponentials: int | None = None  # since a wait that left one product pending
    for operands in _WAIT_OR_EXPONENTIAL.findall(sass):
        if not operands:
            exponentials = None if exponentials is None else exponentials + 1
            continue
        if exponentials is not None:
            counts.append(exponentials)
        exponentials = 0 if "0x1" in operands else None
    return counts


def _amd_facts(assembly: str) -> dict[str, Any]:
    def most(key: str) -> int:
        return max((int(value) for value in re.findall(rf"\.{key}:\s+(\d+)", assembly)), default=0)

    opcodes = Counter(re.findall(r"^\s+((?:v_mfma|v_wmma|scratch_store|scratch_load)\w*)", assembly, re.MULTILINE))

    def count(prefix: str) -> int:
        return sum(number for name, number in opcodes.items() if name.startswith(prefix))

    return {
        "registers": most("vgpr_count"),
        "stack": most("private_segment_fixed_size"),
        "spill_stores": count("scratch_store"),
        "spill_loads": count("scratch_load"),
        "matrix_instructions": {name: count(name) for name in ("v_mfma", "v_wmma") if count(name)},
        "waits": 0,
        "overlaps": [],
        "tma_loads": 0,
        "tma_stores": 0,
        "instructions": len(_AMD_INSTRUCTION.findall(assembly)),
    }
