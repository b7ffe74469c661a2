"""A GPU that is not there: tensors that say they are on ``cuda:0``, lie on the CPU, and refuse what a GPU refuses.

Inside :func:`pretend_gpu`, tensors made on or moved to ``cuda:0`` are wrappers. An operation that mixes them with CPU
tensors raises; operators of kvops run their CPU implementation behind the CUDA one's door. ``torch.cuda``'s streams,
events and memory answer something plausible, and graphs do what CUDA's do: while one is captured, every operation is
noted down and whatever would wait for the device raises; a replay runs the notes again on the very tensors of the
capture, with the numbers that the host had then.

It finds what a typing error or a forgotten ``.to(device)`` would cost on a real machine, not what a kernel gets wrong.
Name devices with their index (``cuda:0``): torch asks the driver which one plain ``cuda`` is.
"""

import contextlib
import ctypes
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._dynamo  # dispatch modes ask for it, and it must not be imported while a GPU is pretended
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
_CUDA, _CPU = 1, 0  # of c10::DeviceType
# A GPU takes CPU tensors here, and indices on the CPU.
_MAY_MIX = {aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten.index_put_.default}
# What waits for the device.
_SYNCHRONISES = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default,
    aten.is_nonzero.default, aten._unique2.default,
}  # fmt: skip


class SynchronisationError(RuntimeError):
    """What CUDA would say of a host that waits."""


class OnGPU(torch.Tensor):
    """A tensor of the pretended GPU; ``held`` has its data."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="cuda:0",
        )
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    def tolist(self):
        _refuse_waiting("tolist")
        return self.held.tolist()

    def __repr__(self):
        return f"OnGPU({self.held!r})"


class _Factories(TorchDispatchMode):
    """Sees what no OnGPU takes part in: tensors made on the GPU, or copied to it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


_state = SimpleNamespace(graph=None, waiting_raises=False)


def _refuse_waiting(what):
    if _state.graph is not None or _state.waiting_raises:
        raise SynchronisationError(f"{what} waits for the device")


def _is_cuda(device):
    return device is not None and torch.device(device).type == "cuda"


def _run(function, args, kwargs):
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    wrappers = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, OnGPU)}
    device = kwargs.get("device")
    if not wrappers and not _is_cuda(device):
        return function(*args, **kwargs)
    foreign = [tensor for tensor in tensors if not isinstance(tensor, OnGPU) and tensor.dim()]
    if wrappers and foreign and function not in _MAY_MIX:
        raise RuntimeError(f"{function}: a CPU tensor of shape {list(foreign[0].shape)} among those on cuda:0")
    leaves = (function is aten.copy_.default and not isinstance(args[0], OnGPU)) or (
        device is not None and not _is_cuda(device)
    )
    if function in _SYNCHRONISES or leaves or (foreign and function in _MAY_MIX) or _index_by_mask(function, args):
        _refuse_waiting(str(function))
    here_args, here_kwargs = tree_map(lambda x: x.held if isinstance(x, OnGPU) else x, (args, kwargs))
    if _is_cuda(device):
        here_kwargs["device"] = torch.device("cpu")
    if _state.graph is None:
        found = function(*here_args, **here_kwargs)
    else:
        found = _state.graph.note(function, here_args, here_kwargs)
    if leaves:
        return found
    return tree_map(lambda x: wrappers.get(id(x), OnGPU(x)) if isinstance(x, torch.Tensor) else x, found)


def _index_by_mask(function, args):
    """x[mask] is as large as the mask has trues."""
    if function not in (aten.index.Tensor, aten.index_put_.default):
        return False
    return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1])


class Graph:
    """torch.cuda.CUDAGraph"""

    def __init__(self):
        self.notes = []
        self.overwritten = []

    def note(self, function, args, kwargs):
        """What it writes to is put back at the end of the capture: nothing runs while CUDA captures."""
        for place, argument in enumerate(function._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and value is not None:
                self.overwritten.append((value, value.clone()))
        found = function(*args, **kwargs)
        self.notes.append((function, args, kwargs, found))
        return found

    def end_capture(self):
        while self.overwritten:
            tensor, before = self.overwritten.pop()
            tensor.copy_(before)

    def replay(self):
        for function, args, kwargs, before in self.notes:
            again = function(*args, **kwargs)
            for old, new in zip(tree_flatten(before)[0], tree_flatten(again)[0], strict=True):
                # Views and outputs written in place are where they were; new tensors land in the capture's memory.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def _capture(graph):
    assert _state.graph is None, "one capture at a time"
    _state.graph = graph
    try:
        yield
    finally:
        _state.graph = None
        graph.end_capture()


class _Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls)


def _set_sync_debug_mode(mode):
    _state.waiting_raises = {"default": False, "warn": False, "error": True}[mode]


@contextlib.contextmanager
def pretend_gpu(monkeypatch):
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    properties = SimpleNamespace(
        total_memory=80 << 30, multi_processor_count=132, uuid="0", name="Pretended GPU", major=9, minor=0
    )
    replaced = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "synchronize": lambda device=None: _refuse_waiting("synchronize"),
        "current_stream": lambda device=None: _Stream(),
        "Stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": _capture,
        "set_sync_debug_mode": _set_sync_debug_mode,
        "is_current_stream_capturing": lambda: _state.graph is not None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (60 << 30, 80 << 30),
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (9, 0),
    }
    before, only_lift = guards[_CUDA], torch._C._only_lift_cpu_tensors()
    with monkeypatch.context() as patch, _Factories():
        for name, value in replaced.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch, "Generator", _Generator)
        # Torch without CUDA cannot switch to a GPU, and torch with CUDA would ask the driver: the
        # CPU's guard, which does nothing, stands in.
        guards[_CUDA] = guards[_CPU]
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            yield
        finally:
            guards[_CUDA] = before
            torch._C._set_only_lift_cpu_tensors(only_lift)
            _state.graph, _state.waiting_raises = None, False
