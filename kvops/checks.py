"""Argument checks: ValueError for a wrong shape or value, TypeError for a wrong type or dtype.

Every message names the argument, what was expected and what was given. All checks run on the host before a launch and
read no device data. Data on the device is checked with ``KVOPS_DEBUG=1`` (see :func:`debug`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import operator
import os
import reprlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvops.private_torch import FakeTensor, transforms_are_active

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# What a cache may hold beside the dtype of its queries, with a scale.
QUANTISED_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


# The dict inside ``os.environ``, which every call of an operator reads: 0.1 µs. ``os.environ.get`` takes 0.8 µs for a
# variable that is not set.
_variables: dict[object, object] = getattr(os.environ, "_data")  # noqa: B009 - private, and so not known to typeshed
_DEBUG, _INTERPRET, _CPU = map(os.environ.encodekey, ("KVOPS_DEBUG", "TRITON_INTERPRET", "KVOPS_CPU"))
_YES, _EAGER, _NUMBA = map(os.environ.encodevalue, ("1", "eager", "numba"))


class DataError(ValueError):
    """A kernel for the CPU was given lengths or blocks out of range, and did nothing."""


class _Naming(threading.local):
    """Whether this thread's check of an operator says what a DataError is about."""

    is_active = False


_naming = _Naming()


def debug() -> bool:
    """Whether ``KVOPS_DEBUG=1`` is set: device data is checked, which synchronises."""
    return _variables.get(_DEBUG) == _YES or _naming.is_active


@contextlib.contextmanager
def naming() -> Iterator[None]:
    """Check data as with ``KVOPS_DEBUG=1``, in this thread alone: that refuses some numbers that no kernel reads."""
    _naming.is_active = True
    try:
        yield
    finally:
        _naming.is_active = False


def interpreting() -> bool:
    """Whether ``TRITON_INTERPRET=1`` sends CPU tensors to the kernels, in Triton's interpreter."""
    return _variables.get(_INTERPRET) == _YES


def shown(value: object) -> str:
    """``value`` for a message: shortened; arrays and tensors by their shape."""
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__} of shape {list(shape)}" if shape else reprlib.repr(value)


@functools.cache
def has_numba() -> bool:
    """Whether numba, which compiles the CPU kernels, is installed (the extra ``kvops[cpu]``) and may compile:
    ``NUMBA_DISABLE_JIT=1`` turns that off."""
    return importlib.util.find_spec("numba") is not None and os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")


def eager_on_cpu() -> bool:
    """Whether CPU tensors run the eager implementation: as ``KVOPS_CPU`` says, else where there is no numba.

    Raises:
        ValueError: ``KVOPS_CPU`` is neither ``eager`` nor ``numba``.
    """
    chosen = _variables.get(_CPU)
    if not chosen:
        return not has_numba()
    if chosen not in (_EAGER, _NUMBA):
        raise ValueError(f"KVOPS_CPU: expected 'eager' or 'numba', got {os.environ['KVOPS_CPU']!r}")
    return chosen == _EAGER


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def expect_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def expect_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    expect_tensor(name, tensor)
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {_names(dtypes)}, got {_names([tensor.dtype])}")


def expect_tokens(name: str, tensor: Tensor) -> Tensor:
    """Token numbers, int64 or int32, as int64."""
    expect_dtype(name, tensor, torch.int64, torch.int32)
    return tensor.long()


def expect_same_dtype(name: str, tensor: Tensor, reference_name: str, reference: Tensor) -> None:
    if tensor.dtype != reference.dtype:
        raise TypeError(
            f"{name}: expected the dtype of {reference_name}, {_names([reference.dtype])}, got {_names([tensor.dtype])}"
        )


def expect_same_device(name: str, tensor: Tensor, reference_name: str, reference: Tensor) -> None:
    if tensor.device != reference.device:
        raise ValueError(f"{name}: expected the device of {reference_name}, {reference.device}, got {tensor.device}")


def expect_rank(name: str, tensor: Tensor, layout: str) -> None:
    """``layout`` is the shape in words, such as ``"[batch, seqlen, heads, head_dim]"``; its commas count the rank."""
    rank = layout.count(",") + 1
    if tensor.dim() != rank:
        raise ValueError(f"{name}: expected {rank} dimensions {layout}, got shape {list(tensor.shape)}")


def expect_shape(name: str, tensor: Tensor, layout: str, *sizes: int | None) -> None:
    """Expect the exact ``sizes`` (None: any), named by ``layout``."""
    shape = tensor.shape
    if len(shape) != len(sizes) or any(
        want is not None and have != want for have, want in zip(shape, sizes, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(f"{name}: expected shape {layout} = [{wanted}], got {list(shape)}")


def expect_last_contiguous(name: str, tensor: Tensor) -> None:
    """An empty tensor and a last dimension of size 1 may have any stride."""
    if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1 and tensor.numel() > 0:
        raise ValueError(
            f"{name}: expected the last dimension contiguous (stride 1), got strides {list(tensor.stride())}; "
            f"call {name}.contiguous()"
        )


def expect_own_memory(name: str, tensor: Tensor) -> None:
    """For what is written: elements of an expanded tensor lie in one place, and the last one written would stay."""
    if has_data(tensor) and tensor.numel() > 0:
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            if stride == 0 and size > 1:
                raise ValueError(
                    f"{name}: expected a place in memory for each element, as it is written, got strides "
                    f"{list(tensor.stride())} for shape {list(tensor.shape)}; call {name}.contiguous()"
                )


def expect_head_ratio(name: str, query_heads: int, kv_name: str, kv_heads: int) -> None:
    if kv_heads == 0 or query_heads % kv_heads != 0:
        raise ValueError(
            f"{name}: expected a number of query heads divisible by the {kv_heads} heads of {kv_name}, "
            f"got {query_heads} query heads"
        )


def holds(name: str, value: Any, condition: Callable[[Any], Any]) -> bool:
    """Whether ``condition`` holds for a number. Raises TypeError for anything else."""
    try:
        return bool(condition(value))
    except (TypeError, ValueError, RuntimeError):  # the last two are raised for arrays and tensors of several numbers
        raise TypeError(f"{name}: expected a number, got {shown(value)}") from None


def expect_at_least(name: str, value: float, minimum: float) -> None:
    if not holds(name, value, lambda number: number >= minimum):
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")


def expect_int(name: str, value: Any, minimum: int) -> None:
    """Expect a whole number, of Python's, NumPy's or torch's, of at least ``minimum``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {shown(value)}") from None
    expect_at_least(name, number, minimum)


def ints(name: str, values: Any) -> list[int]:
    """``values``, a sequence, array or tensor of whole numbers, as a list."""
    given = values.tolist() if hasattr(values, "tolist") else values
    try:
        if isinstance(given, str):
            raise TypeError
        return list(map(operator.index, given))
    except TypeError:
        raise TypeError(f"{name}: expected whole numbers, got {shown(values)}") from None


def expect_between(name: str, value: float, lowest: float, highest: float) -> None:
    if not holds(name, value, lambda number: lowest <= number <= highest):
        raise ValueError(f"{name}: expected a number from {lowest} to {highest}, got {value}")


def expect_finite(name: str, value: float) -> None:
    if not holds(name, value, lambda number: -math.inf < number < math.inf):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def expect_odd(name: str, value: int) -> None:
    expect_int(name, value, 1)
    if value % 2 == 0:
        raise ValueError(f"{name}: expected an odd positive number, got {value}")


def expect_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {shown(value)}")


def has_data(tensor: Tensor) -> bool:
    """Whether the tensor has data to look at; not while torch.compile or make_fx trace it, nor under ``torch.func``."""
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor) and not transforms_are_active()


def may_look(tensor: Tensor) -> bool:
    """Whether to read data: on the CPU, or with ``KVOPS_DEBUG=1``; never while tracing."""
    return (tensor.device.type == "cpu" or debug()) and has_data(tensor) and not torch.compiler.is_compiling()


def expect_data(name: str, expected: str, correct: Tensor) -> None:
    """``correct`` is a bool tensor over the items checked; synchronises, so on a GPU only under :func:`debug`."""
    wrong = (~correct).nonzero()
    if len(wrong):
        raise ValueError(
            f"{name}: expected {expected}, got {len(wrong)} that are not, the first at {wrong[0].tolist()}"
        )


def expect_counts(name: str, counts: Tensor, most: int, of: str) -> None:
    """Check how many tokens each sequence has. Synchronises, so on a GPU only under :func:`debug`."""
    expect_data(name, f"lengths from 0 to the {most} tokens of {of}", (counts >= 0) & (counts <= most))


def expect_inside(
    block_tables: Tensor, seq_lens: Tensor, num_blocks: int, block_size: int, first: Tensor | None = None
) -> None:
    """Check that lists fit in their tables and that their blocks, from that of slot ``first`` on, are in the cache.
    Synchronises, so on a GPU only under :func:`debug`."""
    capacity = block_tables.shape[-1] * block_size
    expect_data("seq_lens", "lengths of at least 0", seq_lens >= 0)
    expect_data("seq_lens", f"lengths up to the {capacity} slots of a table", seq_lens <= capacity)
    begin = torch.arange(block_tables.shape[-1], device=block_tables.device) * block_size
    used = begin < seq_lens[..., None]
    if first is not None:
        used &= begin + block_size > first[..., None]
    inside = (block_tables >= 0) & (block_tables < num_blocks)
    expect_data("block_tables", f"blocks from 0 to {num_blocks - 1} before each length", inside | ~used)
