"""All private parts of torch that kvops uses.

Each name says why it is needed, what it saves and what the documented way costs: microseconds per call with torch 2.13
on a two-core x86 CPU, the lowest of 60 interleaved rounds. What saved less than 2 µs was dropped.
``tests/test_imports.py`` lets no other file of the package name a private part of torch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "DispatchMode",
    "FakeTensor",
    "below_autograd",
    "call_below_autograd",
    "flash_attention",
    "flash_attention_backward",
    "has_any_global_hook",
    "leads_straight_to_cpu",
    "schema_of",
    "tangents_exist",
    "tensors_in",
    "tensors_like",
    "transforms_are_active",
    "without_autocast",
]

# Sees every operation of torch: the machine for PTX learns from it which tensors nobody has written. Torch documents it
# in its notes on extending torch, under this private name.
DispatchMode = TorchDispatchMode


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in tuples, lists and dictionaries, as the dispatcher returns them."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


# torch's CPU attention: the documented scaled_dot_product_attention returns no lse. The forward by this name takes 3.8
# µs less than the same operator below torch.ops.aten.
flash_attention = torch._scaled_dot_product_flash_attention_for_cpu
flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# Inside this context torch's operations do not track gradients: for eager implementations, which call many of them. The
# context itself takes 1 µs; paged_attention takes 28 µs less than without it, merge_attention 8. torch.no_grad() takes
# 3.2 µs and makes no operation faster.
below_autograd: Callable[[], AbstractContextManager[None]] = torch._C._AutoDispatchBelowAutograd

# Whether torch.func transforms are active, under which an operator's own gradient would be lost without an error. There
# is no documented way to find out.
transforms_are_active: Callable[[], bool] = torch._C._are_functorch_transforms_active

# Whether hooks of all modules exist, which a module that is not called would not run. There is no documented way.
has_any_global_hook: Callable[[], bool] = _has_any_global_hook

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# The key set of plain CPU tensors after autograd: no mode, wrapper or trace comes between autograd and the CPU.
_STRAIGHT_TO_CPU = frozenset(
    (keys | torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)).raw_repr()
    for keys in (_CPU, _CPU | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView))
)


def leads_straight_to_cpu(keyset: Any) -> bool:
    """Whether a call that arrived at autograd with this key set ends at the CPU's implementation and nowhere else.

    The implementation is then called as a Python function, which takes 8.5 µs less than :func:`call_below_autograd`.
    """
    return keyset.raw_repr() in _STRAIGHT_TO_CPU


def call_below_autograd(operator: Any, keyset: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the operator below autograd.

    torch.library.register_autograd does it inside, but accepts no keyword-only tensors, such as sinks.
    """
    with torch._C._AutoDispatchBelowAutograd():
        return operator._handle.redispatch_boxed(keyset & torch._C._after_autograd_keyset, *args, **kwargs)


def tangents_exist() -> bool:
    """Whether forward-mode differentiation is active. Checking three tensors for tangents would take 2.7 µs."""
    return forward_ad._current_level >= 0


def tensors_like(*tensors: Tensor) -> Callable[..., bool]:
    """A function that tells whether as many others have the class, dtype, device, shape, strides and dispatch keys of
    these and, where gradients are on, their ``requires_grad``. It keeps none of them; equal ones do not pass.

    What torch.compile guards its graphs with: 2.4 µs for six tensors. A tuple of their attributes, hashed and compared,
    takes 7.5.
    """
    guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    return guards.check  # type: ignore[no-any-return]


def without_autocast(device_type: str) -> Callable[[], AbstractContextManager[None]]:
    """A context in which operators do not go through autocast again: 1.9 µs, torch.autocast(enabled=False) takes 6.5.

    torch.library.register_autocast, the documented way as a whole, casts every floating point tensor, caches and lse
    included.
    """
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))
    return lambda: torch._C._ExcludeDispatchKeyGuard(keys)


def schema_of(operator: Any) -> Any:
    """The parsed schema of an operator's overload: names, types and defaults."""
    return operator._schema


def written(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors that a call of an operator's overload writes to, by the names of their arguments."""
    arguments = schema_of(operator).arguments
    given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    names = [x.name for x in arguments if x.alias_info is not None and x.alias_info.is_write]
    return {name: given[name] for name in names if isinstance(given.get(name), torch.Tensor)}
