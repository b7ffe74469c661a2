"""Refuse whatever makes the host wait for the device, and record what a step launches and allocates.

What passes here can be captured in a CUDA graph: the step reads no value of a tensor, copies nothing between host and
device, and takes no shape from data. It needs no GPU: tensors on the CPU, or without data (``FakeTensorMode``), show
the same calls. On a GPU, CUDA's own check is switched on as well.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from kvops.ops import registry
from kvops.ops.registry import forget_launches


class SynchronisationError(AssertionError):
    """A step did what makes the host wait, or what a CUDA graph cannot repeat."""


@dataclass
class Trace:
    """Launches as (kernel, grid, constants), allocations as (operator, shape, dtype): equal for any data, or the step
    depends on it."""

    launches: list[tuple] = field(default_factory=list)
    allocations: list[tuple] = field(default_factory=list)
    in_kernel: bool = False  # Triton's interpreter reads and copies as it likes


class _Functions(TorchFunctionMode):
    """What is called from Python: also what never reaches the dispatcher (``tolist``, ``torch.tensor``)."""

    FORBIDDEN = frozenset(
        {
            *("item", "tolist", "numpy", "cpu", "nonzero", "argwhere", "masked_select", "unique", "equal", "allclose"),
            *("is_nonzero", "__bool__", "__int__", "__float__", "__index__", "tensor", "as_tensor", "pin_memory"),
            *("__contains__", "bincount"),
        }
    )

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.trace.in_kernel:
            name = getattr(function, "__name__", "")
            if name in self.FORBIDDEN:
                raise SynchronisationError(f"calls {name}")
            if name == "to" and any(str(value) == "cpu" for value in (*args[1:], *kwargs.values())):
                raise SynchronisationError("moves a tensor to the host")
        return function(*args, **kwargs)


class _Operators(TorchDispatchMode):
    """What reaches the dispatcher: also what torch calls on its own (``x[mask]`` calls ``nonzero``)."""

    FORBIDDEN = frozenset(
        {
            *("_local_scalar_dense", "item", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim"),
            *("unique_consecutive", "equal", "is_nonzero", "bincount"),
        }
    )

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.trace.in_kernel:
            return function(*args, **kwargs)
        name = function._schema.name.removeprefix("aten::")
        if name in self.FORBIDDEN:
            raise SynchronisationError(f"calls {name}")
        if name in ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"):
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            if masks:
                raise SynchronisationError(f"takes a mask for an index ({name}), whose trues have to be counted")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise SynchronisationError("repeat_interleave by a tensor without output_size")
        results = function(*args, **kwargs)
        for result, returned in zip(
            results if isinstance(results, (tuple, list)) else (results,), function._schema.returns, strict=False
        ):
            if isinstance(result, torch.Tensor) and returned.alias_info is None:
                self.trace.allocations.append((name, tuple(result.shape), result.dtype))
        return results


@contextmanager
def no_synchronisation(*, run_kernels: bool = True) -> Iterator[Trace]:
    """Inside this context everything of the above raises :class:`SynchronisationError`.

    Launch functions of operators are watched as well, where the kernels serve the tensors (``TRITON_INTERPRET=1`` on
    the CPU); the kernels themselves are not, and do not run unless ``run_kernels``.
    """
    trace = Trace()
    launch_of, runs = registry._launch, {kind: kind.run for kind in (InterpretedFunction, JITFunction)}

    def watched_launch(function, args, kwargs):
        if function.__module__.startswith("kvops.eager"):
            return launch_of(function, args, kwargs)
        # Preparing is done once and may look at whatever it likes but data.
        with _Functions(trace), _Operators(trace):
            launch = launch_of(function, args, kwargs)

        def watched(*args, **kwargs):
            with _Functions(trace), _Operators(trace):  # torch leaves its modes outside an operator
                return launch(*args, **kwargs)

        return watched

    def recorder(run):
        def recorded_run(self, *args, grid, **kwargs):
            given = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
            constants = tuple(sorted((name, value) for name, value in given.items() if isinstance(value, (int, str))))
            trace.launches.append((self.fn.__name__, tuple(grid), constants))
            if not run_kernels:
                return None
            trace.in_kernel = True
            try:
                return run(self, *args, grid=grid, **kwargs)
            finally:
                trace.in_kernel = False

        return recorded_run

    registry._launch = watched_launch
    forget_launches()
    for kind, run in runs.items():
        kind.run = recorder(run)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        with _Functions(trace), _Operators(trace):
            yield trace
    finally:
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")
        registry._launch = launch_of
        forget_launches()
        for kind, run in runs.items():
            kind.run = run
