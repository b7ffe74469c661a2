"""What the areas draw alike: dtypes, sizes, strides, and valid calls made invalid."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import os
import re
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import torch
from oracle import assert_accurate
from paged_lists import QUANTISED
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What a cache may hold beside the dtype of its queries.
SIDES = {str(dtype).removeprefix("torch."): dtype for dtype in QUANTISED}
HEAD_DIMS = (1, 2, 3, 8, 16, 17, 24, 32, 40, 64, 80, 96, 100, 128, 192, 256)
# Names of memory layouts; see laid_out.
LAYOUTS = ("", "padded", "transposed", "reversed", "last first", "expanded 0", "expanded 1", "expanded 2")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """``eager``, ``numba``, or ``triton`` in Triton's interpreter; what nobody writes is NaN."""
    chosen = {"TRITON_INTERPRET": "1" if name == "triton" else "0", "KVOPS_CPU": "eager" if name == "eager" else ""}
    before = {variable: os.environ.get(variable) for variable in chosen}
    os.environ.update(chosen)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        for variable, value in before.items():
            del os.environ[variable]
            if value is not None:
                os.environ[variable] = value


def often(r: Random, likely: Any, *others: Any, p: float = 0.6) -> Any:
    """``likely`` with probability p, else one of the others."""
    return likely if r.random() < p else r.choice(others)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` in other memory, with NaN all around them.

    ``last first`` moves the last dimension to the outside where it has one element, or the tensor none: nothing else
    may be strided. ``expanded n`` repeats the first element of dimension n, and so changes the values.
    """
    if layout.startswith("expanded"):
        place = int(layout.split()[1])
        if place >= x.dim() - 1 or x.shape[place] == 0:
            return x
        return x.narrow(place, 0, 1).expand(x.shape)
    order = list(range(x.dim()))
    if layout == "transposed":
        order[-3:-1] = reversed(order[-3:-1])
    elif layout == "reversed":
        order[:-1] = reversed(order[:-1])
    elif layout == "last first" and (x.shape[-1] == 1 or x.numel() == 0):
        order = [order[-1], *order[:-1]]
    elif layout == "":
        return x.contiguous()
    fill = math.nan if x.dtype.is_floating_point else 0
    memory = torch.full([x.shape[place] + 2 for place in order], fill, dtype=x.dtype)
    view = memory.permute([order.index(place) for place in range(x.dim())])
    view = view[tuple(slice(1, 1 + size) for size in x.shape)]
    view.copy_(x)
    return view


# Arguments that are None or a number.
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
NUMBERS = ("scale", "temperature", "top_k", "top_p", "min_p", *_PENALTIES)
_WRONG_TYPES: dict[str, Any] = {"string": "x", "list": [1.0], "none": None}


def draw_mutation(r: Random, names: dict[str, tuple[str, ...]]) -> str:
    """``"argument:how"`` of one mutation."""
    name = r.choice(sorted(names))
    return f"{name}:{r.choice(names[name])}"


# For a tensor that must be there and has a fixed last size, and for one of which any last size is right.
TENSOR = ("dtype", "integer", "rank", "flat", "last", "meta", "string", "none")
COUNT = ("negative", "string", "fraction", "none")


def mutated(arguments: dict[str, Any], mutation: str) -> dict[str, Any]:
    """The arguments with one of them made wrong."""
    name, how = mutation.split(":")
    value = arguments[name]
    if how in _WRONG_TYPES:
        new = _WRONG_TYPES[how]
    elif how == "negative":
        new = -7
    elif how == "fraction":
        new = 1.5
    elif how in ("nan", "inf"):
        new = float(how)
    elif how == "dtype":
        new = value.double()
    elif how == "integer":
        new = value.to(torch.int16)
    elif how == "rank":
        new = value[None, None]
    elif how == "flat":
        new = value.new_zeros(())
    elif how == "last":
        new = value.new_zeros(*value.shape[:-1], value.shape[-1] + 1)
    elif how == "first":
        new = value.new_zeros(value.shape[0] + 1, *value.shape[1:])
    elif how == "meta":
        new = value.to("meta")
    elif how == "strided":
        new = value.new_zeros(*value.shape, 2)[..., 0]
    else:
        raise KeyError(mutation)
    return {**arguments, name: new}


def expect_refusal(function: Callable[..., Any], arguments: dict[str, Any], mutation: str) -> None:
    """ValueError or TypeError that begins with the name of an argument; or torch's own word on a Python type.

    An optional tensor that is not there, and a last dimension of one element, have nothing to make wrong.
    """
    name, how = mutation.split(":")
    value = arguments[name]
    if how not in _WRONG_TYPES and value is None and name not in NUMBERS:
        return
    if how == "strided" and (value.shape[-1] < 2 or value.numel() == 0):
        return
    names = set(inspect.signature(function).parameters)
    error = raised(lambda: function(**mutated(arguments, mutation)))
    assert error is not None, f"{mutation}: accepted without an error"
    if isinstance(error, RuntimeError):
        assert f"for argument '{name}'" in str(error), f"{mutation}: {type(error).__name__}: {error}"
        return
    first = re.match(r"[A-Za-z_]\w*", str(error))
    assert first is not None, f"{mutation}: the message names no argument: {error}"
    assert first[0] in names, f"{mutation}: the message names no argument: {error}"


def raised(call: Callable[[], Any]) -> Exception | None:
    """The refusal that ``call`` ends with, if it does."""
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        return error
    return None


def close(actual: Tensor, exact: Tensor, rounded: Tensor, name: str) -> None:
    """:func:`oracle.assert_accurate` with twice the room: the worst of a million come close to its bound. Numbers that
    float32 holds with fewer digits may be 0."""
    actual, exact, rounded = (
        x.masked_fill(x.abs() < torch.finfo(torch.float32).tiny, 0.0) for x in (actual, exact, rounded)
    )
    assert_accurate(actual, exact, exact + 2 * (rounded - exact).nan_to_num(0.0), name)


def without_equals(case: Any) -> Any:
    """A case whose gradients, in half precision, do not come of equal keys: they cancel but for a tie in rounding."""
    if not case.gradient or case.dtype == "float32":
        return case
    layouts = tuple("" if layout.startswith("expanded") else layout for layout in case.layouts)
    return dataclasses.replace(case, layouts=layouts)
