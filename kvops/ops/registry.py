"""Registers operators in ``torch.ops.kvops``: one call for schema, checks, fake, eager implementation and kernel.

``Library.define`` plus ``impl`` costs less than ``custom_op`` at every call, and survives ``opcheck`` and
``torch.compile(fullgraph=True)`` all the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from kvops import checks, private_torch
from kvops.extras import require
from kvops.ops.launches import Launch, Launches

LIBRARY = torch.library.Library("kvops", "DEF")


def backend(device: torch.device | str = "cpu") -> str:
    """The backend for tensors on ``device``: ``"triton"``, ``"triton-interpreter"``, ``"numba"`` or ``"eager"``.

    CPU tensors run the CPU kernels, which numba compiles at their first call. Without numba (the extra ``kvops[cpu]``),
    with ``KVOPS_CPU=eager``, and for operators that PyTorch itself serves at full speed, they run the eager
    implementation. With ``TRITON_INTERPRET=1`` they run the Triton kernels in Triton's interpreter. Every other device
    runs the Triton kernels; no backend falls back to another.
    """
    if device != "cpu" and torch.device(device).type != "cpu":
        return "triton"
    if checks.interpreting():
        return "triton-interpreter"
    return "eager" if checks.eager_on_cpu() else "numba"


def _kernel(target: str) -> Callable[..., Any]:
    """A launch function, ``"module:function"``, imported at its first call, with Triton or numba behind it."""
    module, name = target.split(":")
    require("numba" if module.startswith("kvops.kernels.cpu.") else "triton")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def _launch(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """See :mod:`kvops.prepared`."""
    prepare = getattr(function, "prepare", None)
    return function if prepare is None else prepare(*args, **kwargs)


_operators: dict[str, _Operator] = {}


def forget_launches() -> None:
    """Drop all cached launches."""
    for operator in _operators.values():
        operator.served.clear()
        operator.interpreted.clear()
        operator.compiled.clear()


def _below_autograd(launch: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with private_torch.below_autograd():
        return launch(*args, **kwargs)


def _checked(check_data: Callable[..., None], launch: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    check_data(*args, **kwargs)
    return launch(*args, **kwargs)


class _Operator:
    """The functions that the dispatcher calls for one operator: checks, then an implementation. See
    :func:`register`."""

    def __init__(
        self,
        schema: str,
        *,
        check: Callable[..., None],
        check_data: Callable[..., None] | None,
        data: str | None,
        fake: Callable[..., Any],
        eager: Callable[..., Any],
        kernel: str,
        cpu: str | None,
        differentiable: bool,
    ) -> None:
        self.name = schema.split("(", 1)[0]
        self.check, self.check_data, self.data, self.fake = check, check_data, data, fake
        self.eager, self.kernel, self.cpu, self.differentiable = eager, kernel, cpu, differentiable
        self.overload = self._define(schema)
        arguments = private_torch.schema_of(self.overload).arguments
        self.tensors = [x.name for x in takewhile(lambda x: isinstance(x.type, torch.TensorType), arguments)]
        # Separate ones for the interpreter (TRITON_INTERPRET=1) and for numba.
        self.served, self.interpreted, self.compiled = (Launches(len(self.tensors)) for _ in range(3))

    def _define(self, schema: str) -> Any:
        LIBRARY.define(schema)
        LIBRARY.impl(self.name, self.on_cpu, "CPU")
        LIBRARY.impl(self.name, self.on_gpu, "CUDA")
        LIBRARY.impl(self.name, self.on_vmap, "FuncTorchBatched")
        torch.library.register_fake(f"kvops::{self.name}", self.on_fake, lib=LIBRARY)
        return getattr(torch.ops.kvops, self.name).default

    def on_cpu(self, *args: Any, **kwargs: Any) -> Any:
        launches = self.interpreted
        if not checks.interpreting():
            launches = self.served if checks.eager_on_cpu() else self.compiled
        try:
            return self._launch_for(launches, args, kwargs)(*args, **kwargs)
        except checks.DataError:
            with checks.naming():
                self._validate(args, kwargs)  # says which argument it is, and where
            raise

    def on_gpu(self, *args: Any, **kwargs: Any) -> Any:
        launch = self._launch_for(self.served, args, kwargs)
        index = args[0].device.index
        try:
            if index == torch.cuda.current_device():
                return launch(*args, **kwargs)
            with torch.cuda.device(index):
                return launch(*args, **kwargs)
        except Exception as error:
            if type(error).__name__ != "OutOfResources":  # of Triton, which is there if it raised this
                raise
            from kvops.autotune.relaunch import relaunched

            with torch.cuda.device(index):
                return relaunched(partial(launch, *args, **kwargs), error)

    def on_fake(self, *args: Any, **kwargs: Any) -> Any:
        self._validate(args, kwargs)
        return self.fake(*args, **kwargs)

    def on_vmap(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"kvops.{self.name} does not run under torch.func.vmap: put the mapped dimension into the batch dimension, "
            "which every operator has"
        )

    def _launch_for(self, launches: Launches, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
        """The implementation for this call. Checks and preparation do not read data, so equal calls share them.
        ``python -m bench.overhead`` measures the time of a launch."""
        if checks.debug() or private_torch.tangents_exist():  # data and tangents are checked in every call
            return self._prepare(args, kwargs)
        try:
            return launches.find(args, kwargs, self._prepare)
        except AttributeError:
            self._validate(args, kwargs)
            raise

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
        """The implementation for this call, after its checks, and for all calls that differ in data alone."""
        self._validate(args, kwargs)
        on_cpu, function = args[0].device.type == "cpu", self._implementation(args[0].device)
        launch = _launch(function, args, kwargs)
        if function is self.eager:
            launch = partial(_below_autograd, launch)
        read = self.data is None or kwargs.get(self.data) is not None
        if self.check_data is not None and read and (on_cpu or checks.debug()):
            launch = partial(_checked, self.check_data, launch)
        return launch

    def _implementation(self, device: torch.device) -> Callable[..., Any]:
        serving = backend(device)
        if serving == "eager" or (serving == "numba" and self.cpu is None):
            return self.eager
        return _kernel(self.cpu if serving == "numba" and self.cpu is not None else self.kernel)

    def _validate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, value in zip(self.tensors, args, strict=False):  # the dispatcher accepts None for any tensor
            checks.expect_tensor(name, value)
        if not self.differentiable and torch.is_grad_enabled():
            self._refuse_gradient(args, kwargs)
        if private_torch.tangents_exist():
            self._refuse_tangents(args, kwargs)
        for name, value in private_torch.written(self.overload, args, kwargs).items():
            checks.expect_own_memory(name, value)
        self.check(*args, **kwargs)

    def _refuse_gradient(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _some_requires_grad(args, kwargs):
            raise RuntimeError(
                f"kvops.{self.name} has no gradient, but an input requires one: call it under torch.no_grad() "
                "or detach its inputs"
            )

    def _refuse_tangents(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and unpack_dual(value).tangent is not None:
                raise RuntimeError(
                    f"kvops.{self.name} has no forward-mode derivative (jvp), and an input carries a tangent: "
                    "differentiate backwards with torch.autograd.grad"
                )


def _some_requires_grad(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    for value in (*args, *kwargs.values()):  # noqa: SIM110 - any() over a generator takes 1 µs longer
        if isinstance(value, Tensor) and value.requires_grad:
            return True
    return False


def register(
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable[..., Any],
    eager: Callable[..., Any],
    kernel: str,
    check_data: Callable[..., None] | None = None,
    data: str | None = None,
    cpu: str | None = None,
    differentiable: bool = False,
    autocast: tuple[str, ...] = (),
    autocast_like: tuple[str, ...] = (),
) -> Any:
    """Define ``torch.ops.kvops.<name>`` and return its default overload.

    ``check``, ``fake``, ``eager`` and ``kernel`` take the operator's arguments under the same names with the same
    defaults (the dispatcher drops arguments that equal their default). ``check`` raises ValueError or TypeError and
    runs before everything else, while tracing too. It must not read the data of tensors, except with ``KVOPS_DEBUG=1``,
    because calls that differ in data alone share one check. A CPU kernel that raises DataError has it run once more, as
    with ``KVOPS_DEBUG=1``. ``check_data`` reads data, in every call with CPU tensors,
    and with ``KVOPS_DEBUG=1`` in every call; where it reads that of one optional argument, ``data`` names it, and calls
    without it have nothing to check. ``kernel`` is ``"module:function"``, imported at its first launch.
    ``cpu`` is the same for the numba kernel, where there is one.
    An operator that is not ``differentiable`` refuses inputs that require a gradient instead of losing it.

    Under ``torch.autocast`` the arguments named in ``autocast`` are cast to its dtype, or to that of the first of
    the arguments ``autocast_like`` (caches) that is neither float8 nor int8; nothing else is, and an implementation
    that uses torch's operators computes as outside: a backward pass may run under autocast too. Forward-mode
    differentiation is refused, and so is ``torch.func.vmap`` of operators without :func:`register_transforms`.
    """
    operator = _Operator(
        schema,
        check=check,
        check_data=check_data,
        data=data,
        fake=fake,
        eager=eager,
        kernel=kernel,
        cpu=cpu,
        differentiable=differentiable,
    )
    _operators[operator.name] = operator
    for device_type in ("cpu", "cuda"):
        _register_autocast(operator, device_type, autocast, autocast_like)
    return operator.overload


def caller(overload: Any) -> Callable[..., Any]:
    """``overload`` for public functions, which name every option: hands on those that differ from their defaults.

    The dispatcher takes 0.5 µs for a keyword, the comparison 0.1.
    """
    options = [x for x in private_torch.schema_of(overload).arguments if x.kwarg_only]
    defaults = {x.name: x.default_value if x.has_default_value() else ... for x in options}

    def call(*args: Any, **given: Any) -> Any:
        changed = {}
        for name, value in given.items():
            default = defaults[name]
            if value is not default and (type(value) is not type(default) or value != default):
                changed[name] = value
        return overload(*args, **changed)

    return call


def register_autograd(overload: Any, apply: Callable[..., Any]) -> None:
    """Give the operator of ``overload`` a gradient: a call in which some tensor requires one is
    ``apply(below, *args, **kwargs)``, with ``below`` the operator without autograd."""
    name = private_torch.schema_of(overload).name.removeprefix("kvops::")
    on_cpu = _operators[name].on_cpu

    def below(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if private_torch.leads_straight_to_cpu(keyset):
            return on_cpu(*args, **kwargs)
        return private_torch.call_below_autograd(overload, keyset, args, kwargs)

    def on_autograd(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if private_torch.transforms_are_active():
            raise RuntimeError(
                f"kvops.{name} does not run under torch.func's transforms (grad, vjp, jacrev): use torch.autograd.grad"
            )
        if torch.is_grad_enabled() and _some_requires_grad(args, kwargs):
            return apply(partial(below, keyset), *args, **kwargs)
        return below(keyset, *args, **kwargs)

    LIBRARY.impl(name, on_autograd, "Autograd", with_keyset=True)


def register_transforms(overload: Any, apply: Callable[..., Any]) -> None:
    """Let ``apply(*args, **kwargs)`` serve all calls of the operator under ``torch.func``'s transforms."""
    name = private_torch.schema_of(overload).name.removeprefix("kvops::")
    LIBRARY.impl(name, apply, "FuncTorchDynamicLayerFrontMode")


def _register_autocast(operator: _Operator, device_type: str, names: tuple[str, ...], like: tuple[str, ...]) -> None:
    order = [argument.name for argument in private_torch.schema_of(operator.overload).arguments]
    outside = private_torch.without_autocast(device_type)

    def on_autocast(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(order, args, strict=False)) | kwargs
        dtype = torch.get_autocast_dtype(device_type)
        for name in reversed(like):
            if given[name].dtype in checks.FLOAT_DTYPES:
                dtype = given[name].dtype
        for name in names:
            if isinstance(given[name], Tensor) and given[name].dtype in checks.FLOAT_DTYPES:
                given[name] = given[name].to(dtype, memory_format=torch.contiguous_format)
        with outside():
            return operator.overload(*(given[name] for name in order[: len(args)]), **{n: given[n] for n in kwargs})

    LIBRARY.impl(operator.name, on_autocast, f"Autocast{device_type.upper()}")
