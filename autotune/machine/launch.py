"""Sends the launches of Triton's JIT functions to the machine: real launch functions run on CPU tensors."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton import knobs
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kvops.autotune.inspect import TARGETS, CompileOnlyDriver, resolve_grid
from kvops.autotune.machine.grid import Grid, Options, run_with_seeds
from kvops.autotune.machine.instructions.asynchronous import Descriptor
from kvops.autotune.machine.memory import DESCRIPTORS, Allocation
from kvops.autotune.machine.ptx import Program, Unsupported
from kvops.autotune.machine.report import Execution
from kvops.private_torch import DispatchMode, schema_of, tensors_in

# What the machine can run; its instructions are those of Ampere and Hopper.
MACHINES = ("sm_80", "sm_86", "sm_89", "sm_90")
_INTEGERS = {f"{letter}{bits}" for letter in "iu" for bits in (1, 8, 16, 32, 64)}


@dataclass
class Machine:
    """The launches of a context, in their order, and how they are run.

    ``more_seeds``: each launch runs again with these, from the same memory, and must give the same bits. A launch in
    which nothing was drawn is the same with every seed and runs once.
    ``without``: by kernel name, indices of instructions to leave out, as the mutation table does.
    """

    options: Options
    more_seeds: Sequence[int] = ()
    without: Mapping[str, frozenset[int]] = field(default_factory=dict)
    executions: list[Execution] = field(default_factory=list)

    @property
    def faults(self) -> list[Any]:
        return [fault for execution in self.executions for fault in execution.faults]


@contextmanager
def on_machine(
    target: str = "sm_80",
    *,
    options: Options | None = None,
    more_seeds: Sequence[int] = (),
    num_sms: int = 4,
    track_empty: bool = True,
    without: Mapping[str, frozenset[int]] | None = None,
    cache_folder: Path | None = None,
) -> Iterator[Machine]:
    """Inside this context launch functions compile for ``target`` and run on the machine, on CPU tensors.

    ``num_sms`` is what launch functions are told; a small one keeps grids small. ``track_empty`` knows which bytes of
    tensors made by ``torch.empty`` nobody has written, and reports who reads them. Binaries are not made: what Triton
    compiles is kept in ``cache_folder`` (below the user's cache) apart from everything else.

    Not thread-safe: it replaces methods of Triton for the whole process while it is entered. Raises ValueError for a
    target whose instructions it does not have.
    """
    if target not in MACHINES:
        raise ValueError(
            f"target: expected one of {', '.join(MACHINES)}, got {target!r}: the machine has the instructions of "
            "Ampere and Hopper; use `inspect` for other GPUs"
        )
    gpu = replace(TARGETS[target], name=f"{target} machine of {num_sms}", num_sms=num_sms)
    machine = Machine(options or Options(), more_seeds, without or {})
    written = _Written()
    original, previous = JITFunction.run, driver._active
    assemble, folder = CUDABackend.make_cubin, knobs.cache.dir

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            _launch(machine, written, self, kernel, grid, args, kwargs)
        return kernel

    driver.set_active(CompileOnlyDriver.of(gpu))  # type: ignore[arg-type]
    JITFunction.run, CUDABackend.make_cubin = run, lambda *args, **kwargs: b"not assembled"
    knobs.cache.dir = str(cache_folder or _cache_folder())
    try:
        with written if track_empty else nullcontext():
            yield machine
    finally:
        JITFunction.run, CUDABackend.make_cubin, knobs.cache.dir = original, assemble, folder
        driver.set_active(previous)  # type: ignore[arg-type]


@lru_cache(maxsize=256)
def _program(ptx: str, without: frozenset[int]) -> Program:
    return Program(ptx, without)


@cache
def _cache_folder() -> Path:
    return Path(knobs.cache.dir).parent / "kvops-machine"


class _Written(DispatchMode):
    """Flags for the bytes of tensors made by ``torch.empty`` and its like: written or not. They are filled with NaN."""

    _EMPTY = (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty_strided.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.flags: dict[int, np.ndarray] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = schema_of(function)
        for place, argument in enumerate(schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            alias = argument.alias_info
            if alias is not None and alias.is_write and isinstance(value, Tensor):
                self.flags.pop(value.untyped_storage().data_ptr(), None)
        result = function(*args, **kwargs)
        if not any(returned.alias_info is not None for returned in schema.returns):
            for tensor in tensors_in(result):
                if tensor.layout == torch.strided and tensor.device.type == "cpu":
                    self._made(tensor, function in self._EMPTY)
        return result

    def _made(self, tensor: Tensor, empty: bool) -> None:
        storage = tensor.untyped_storage()
        self.flags.pop(storage.data_ptr(), None)
        if empty and storage.nbytes():
            self.flags[storage.data_ptr()] = np.zeros(storage.nbytes(), bool)
            storage.fill_(0xFF)  # type: ignore[attr-defined]


def _flatten(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """The arguments that the compiled kernel takes: constants are gone, tuples are laid out."""
    if isinstance(kind, tuple):
        for part, held in zip(kind, value, strict=True):
            yield from _flatten(part, held)
    elif kind != "constexpr":
        yield kind, value


def _launch(
    machine: Machine, written: _Written, function: Any, kernel: Any, grid: Any, args: Any, kwargs: dict[str, Any]
) -> None:
    shape = resolve_grid(function, grid, args, kwargs)
    if not all(shape):
        return
    name = function.fn.__name__
    without = machine.without.get(name, frozenset())
    program = _program(kernel.asm["ptx"], without)
    binder = function.device_caches[driver.active.get_current_device()][4]
    bound, specialised, _ = binder(*args, **kwargs)
    arguments = _Arguments(program, list(kernel.metadata.tensordesc_meta or []), written)
    for value, (kind, *_) in zip(bound.values(), specialised, strict=True):
        for entry in _flatten(kind, value):
            arguments.add(*entry)
    arguments.finish(int(np.prod(shape)), getattr(kernel.metadata, "global_scratch_size", 0))

    def prepared(seed: int) -> Grid:
        held = Grid(
            program,
            shape,
            arguments.parameters,
            arguments.allocations,
            kernel.metadata.shared,
            kernel.metadata.num_warps,
            arguments.descriptors,
            replace(machine.options, seed=seed),
        )
        held.execution.kernel = name
        machine.executions.append(held.execution)
        return held

    held = run_with_seeds(prepared, (machine.options.seed, *machine.more_seeds))
    if held.memory.shadow is not None:
        for number, allocation in enumerate(held.memory.allocations):
            if allocation.start in written.flags:
                written.flags[allocation.start] = held.memory.written(number)


class _Arguments:
    """Fills a kernel's parameters, in their order, and collects the memory that they point to."""

    def __init__(self, program: Program, tensor_descriptors: list[dict[str, Any]], written: _Written) -> None:
        self.names: Iterator[str] = iter([parameter.name for parameter in program.parameters])
        self.numbers = {parameter.name: number for number, parameter in enumerate(program.parameters)}
        self.tensor_descriptors, self.written = tensor_descriptors, written
        self.parameters: dict[str, bytes] = {}
        self.allocations: list[Allocation] = []
        self.descriptors: dict[int, Descriptor] = {}
        self.kept: list[Any] = []  # memory that must live as long as the launch

    def add(self, kind: str, value: Any) -> None:
        name = next(self.names)
        if kind.startswith("tensordesc"):
            self._descriptor(name, value)
        elif kind.startswith("*"):
            self.parameters[name] = struct.pack("<Q", value.data_ptr())
            self._allocate(value)
        elif kind in _INTEGERS:
            self.parameters[name] = (int(value) & ((1 << 64) - 1)).to_bytes(8, "little")
        elif kind in ("fp32", "fp64"):
            self.parameters[name] = struct.pack("<f" if kind == "fp32" else "<d", value)
        else:
            raise Unsupported(f"a kernel argument of type {kind}")

    def _allocate(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        flags = self.written.flags.get(storage.data_ptr())
        self.allocations.append(Allocation(storage.data_ptr(), storage.nbytes(), flags))

    def _descriptor(self, name: str, value: Any) -> None:
        """128 bytes that only the hardware reads, then the shape and the strides once more."""
        meta = self.tensor_descriptors.pop(0)
        shape, strides = list(map(int, value.shape)), list(map(int, value.strides))
        self.descriptors[DESCRIPTORS + self.numbers[name]] = Descriptor(
            value.base.data_ptr(), shape, strides, list(meta["block_size"]), meta["elem_size"], meta["swizzle"]
        )
        self.parameters[name] = bytes(8)
        for number in (*shape, *strides):
            self.parameters[next(self.names)] = number.to_bytes(8, "little")
        self._allocate(value.base)

    def finish(self, programs: int, scratch_bytes: int) -> None:
        """What is left are Triton's own: scratch memory and the profiler's."""
        left = list(self.names)
        for name in left:
            self.parameters[name] = bytes(8)
        if scratch_bytes and left:
            scratch = np.zeros(programs * scratch_bytes + 128, np.uint8)
            start = scratch.ctypes.data + -scratch.ctypes.data % 128
            self.kept.append(scratch)
            self.parameters[left[0]] = struct.pack("<Q", start)
            size = programs * scratch_bytes
            self.allocations.append(Allocation(start, size, np.zeros(size, bool)))
