"""How an operator comes into ``torch.ops.kvops``: schema, checks, fake, eager and kernel tied together in one call.

``Library.define`` plus ``impl`` costs less than ``custom_op`` at every call, and survives ``opcheck`` and
``torch.compile(fullgraph=True)`` all the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from operator import attrgetter
from typing import Any

import torch
from torch.autograd import forward_ad

from kvops import checks
from kvops.extras import require

# Kinds of calls that are remembered; a service that never sees the same shape twice starts over now and then.
_MAX_LAUNCHES = 4096

LIBRARY = torch.library.Library("kvops", "DEF")


def backend(device: torch.device | str = "cpu") -> str:
    """What serves a call with tensors on ``device``: ``"triton"``, ``"triton-interpreter"`` or ``"eager"``.

    CPU tensors run the eager implementation, or the Triton kernels in Triton's interpreter when ``TRITON_INTERPRET=1``
    is set. Every other device runs the Triton kernels; there is no fallback from one to another.
    """
    if torch.device(device).type != "cpu":
        return "triton"
    return "triton-interpreter" if checks.interpreting() else "eager"


def _kernel(target: str) -> Callable[..., Any]:
    """A launch function, ``"module:function"``, imported at its first call: Triton stays out of ``import kvops``."""
    require("triton")
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def _launch(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """See :mod:`kvops.prepared`."""
    prepare = getattr(function, "prepare", None)
    return function if prepare is None else prepare(*args, **kwargs)


_launches: list[dict[tuple[Any, ...], Callable[..., Any]]] = []
_on_cpu: dict[str, Callable[..., Any]] = {}
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# Where no mode, wrapper or trace stands between autograd and the implementation on the CPU.
_STRAIGHT_TO_CPU = frozenset(
    (keys | torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)).raw_repr()
    for keys in (_CPU, _CPU | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView))
)
_facts, _strides = attrgetter("shape", "dtype", "device", "requires_grad"), torch.Tensor.stride


def forget_launches() -> None:
    """Check and prepare every call anew."""
    for launches in _launches:
        launches.clear()


def _likeness(tensors: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Everything about a call but data, ``args`` beginning with that many tensors: shapes, dtypes, devices, strides,
    numbers, and what asks for gradients."""
    first = args[:tensors]
    found = [torch.is_grad_enabled(), *map(_facts, first), *map(_strides, first), *kwargs]
    for value in (*args[tensors:], *kwargs.values()):
        if isinstance(value, torch.Tensor):
            found += _facts(value), value.stride()
        else:
            found.append(value)
    return tuple(found)


def register(
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable[..., Any],
    eager: Callable[..., Any],
    kernel: str,
    check_data: Callable[..., None] | None = None,
    differentiable: bool = False,
    autocast: tuple[str, ...] = (),
    autocast_like: str | None = None,
) -> Any:
    """Define ``torch.ops.kvops.<name>`` and return its default overload.

    ``check``, ``fake``, ``eager`` and ``kernel`` take the operator's arguments under the same names with the same
    defaults (the dispatcher drops arguments that equal their default). ``check`` raises ValueError or TypeError and
    runs before everything else, while tracing too; it must not look at what tensors hold, unless under
    ``KVOPS_DEBUG=1``: calls that differ in nothing else share one check. ``check_data`` looks at it, at every call of
    CPU tensors and under ``KVOPS_DEBUG=1`` of any. ``kernel`` is ``"module:function"``, imported at its first launch.
    An operator that is not ``differentiable`` refuses inputs that require a gradient instead of losing it.

    Under ``torch.autocast`` the arguments named in ``autocast`` are cast to its dtype, or to that of the argument
    ``autocast_like`` (a cache, unless it is float8); nothing else is. ``torch.func.vmap`` and forward-mode
    differentiation are refused.
    """
    name = schema.split("(", 1)[0]

    def refuse_gradient(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                raise RuntimeError(
                    f"kvops.{name} has no gradient, but an input requires one: call it under torch.no_grad() "
                    "or detach its inputs"
                )

    def refuse_tangents(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
                raise RuntimeError(
                    f"kvops.{name} has no forward-mode derivative (jvp), and an input carries a tangent: "
                    "differentiate backwards with torch.autograd.grad"
                )

    def refuse_vmap(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"kvops.{name} does not run under torch.func.vmap: put the mapped dimension into the batch dimension, "
            "which every operator has"
        )

    def validate(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for argument, value in zip(leading, args, strict=False):  # the dispatcher takes None for any tensor
            checks.expect_tensor(argument.name, value)
        if not differentiable:
            refuse_gradient(args, kwargs)
        if forward_ad._current_level >= 0:
            refuse_tangents(args, kwargs)
        check(*args, **kwargs)

    served: dict[tuple[Any, ...], Callable[..., Any]] = {}
    interpreted: dict[tuple[Any, ...], Callable[..., Any]] = {}  # on the CPU, while TRITON_INTERPRET=1
    _launches.extend((served, interpreted))

    def prepare(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        """What serves this call, once it is found valid, and all that differ in nothing but data."""
        validate(args, kwargs)
        return _launch(eager if backend(args[0].device) == "eager" else _kernel(kernel), args, kwargs)

    def launch_for(
        launches: dict[tuple[Any, ...], Callable[..., Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any]:
        """Checks and preparation look at everything but data, so calls alike share both; how long a launch takes then,
        ``python -m bench.overhead`` tells."""
        if checks.debug() or forward_ad._current_level >= 0:  # data and tangents are looked at every time
            return prepare(args, kwargs)
        try:
            likeness = _likeness(len(leading), args, kwargs)
        except AttributeError:
            validate(args, kwargs)
            raise
        launch = launches.get(likeness)
        if launch is None:
            launch = prepare(args, kwargs)
            if len(launches) >= _MAX_LAUNCHES:
                launches.clear()
            launches[likeness] = launch
        return launch

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        launch = launch_for(interpreted if checks.interpreting() else served, args, kwargs)
        if check_data is not None:
            check_data(*args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():  # each of its operations would look for a gradient
            return launch(*args, **kwargs)

    def on_gpu(*args: Any, **kwargs: Any) -> Any:
        launch = launch_for(served, args, kwargs)
        if check_data is not None and checks.debug():
            check_data(*args, **kwargs)
        index = args[0].device.index
        if index == torch.cuda.current_device():
            return launch(*args, **kwargs)
        with torch.cuda.device(index):
            return launch(*args, **kwargs)

    def on_fake(*args: Any, **kwargs: Any) -> Any:
        validate(args, kwargs)
        return fake(*args, **kwargs)

    _on_cpu[name] = on_cpu
    LIBRARY.define(schema)
    LIBRARY.impl(name, on_cpu, "CPU")
    LIBRARY.impl(name, on_gpu, "CUDA")
    LIBRARY.impl(name, refuse_vmap, "FuncTorchBatched")
    torch.library.register_fake(f"kvops::{name}", on_fake, lib=LIBRARY)
    operator = getattr(torch.ops.kvops, name).default
    leading = list(takewhile(lambda argument: isinstance(argument.type, torch.TensorType), operator._schema.arguments))
    if autocast:
        for device_type in ("cpu", "cuda"):
            _register_autocast(operator, device_type, autocast, autocast_like)
    return operator


def register_autograd(operator: Any, apply: Callable[..., Any]) -> None:
    """Give ``operator`` a gradient: a call in which some tensor requires one is ``apply(below, *args, **kwargs)``, with
    ``below`` the operator without autograd.

    Written out: ``torch.library.register_autograd`` takes no keyword-only tensors, and its calls take longer.
    """
    name = operator._schema.name.split("::")[1]
    on_cpu, redispatch = _on_cpu[name], operator._handle.redispatch_boxed
    after_autograd = torch._C._after_autograd_keyset

    def below(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if keyset.raw_repr() in _STRAIGHT_TO_CPU:
            return on_cpu(*args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return redispatch(keyset & after_autograd, *args, **kwargs)

    def on_autograd(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"kvops.{name} does not run under torch.func's transforms (grad, vjp, jacrev): use torch.autograd.grad"
            )
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args, **kwargs):
            return apply(partial(below, keyset), *args, **kwargs)
        return below(keyset, *args, **kwargs)

    LIBRARY.impl(name, on_autograd, "Autograd", with_keyset=True)


def _register_autocast(operator: Any, device_type: str, names: tuple[str, ...], like: str | None) -> None:
    """Written out: ``torch.library.register_autocast`` casts every floating point tensor, caches and lse included."""
    order = [argument.name for argument in operator._schema.arguments]
    key = f"Autocast{device_type.upper()}"
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def on_autocast(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(order, args, strict=False)) | kwargs
        dtype = torch.get_autocast_dtype(device_type)
        if like is not None and given[like].dtype in checks.FLOAT_DTYPES:
            dtype = given[like].dtype
        for name in names:
            if isinstance(given[name], torch.Tensor) and given[name].dtype in checks.FLOAT_DTYPES:
                given[name] = given[name].to(dtype, memory_format=torch.contiguous_format)
        with torch._C._ExcludeDispatchKeyGuard(below):
            return operator(*(given[name] for name in order[: len(args)]), **{n: given[n] for n in kwargs})

    LIBRARY.impl(operator._schema.name.split("::")[1], on_autocast, key)
