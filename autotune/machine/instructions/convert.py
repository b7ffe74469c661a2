"""Conversion between types: section 9.7.9."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from kvops.autotune.machine.instructions.floating import flush, saturate
from kvops.autotune.machine.instructions.table import Operation, dtype, elementwise, instruction
from kvops.autotune.machine.ptx import Instruction

Array = Any

_TO_INTEGRAL: dict[str, Callable[[Array], Array]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction("cvt", section="9.7.9")
def convert(found: Instruction) -> Operation:
    to, source = found.parts[-2:]
    rounding = next((part for part in found.parts[1:-2] if part in _TO_INTEGRAL), None)
    if to in ("bf16x2", "f16x2") and source == "f32":
        narrow = to_bfloat16 if to == "bf16x2" else to_float16
        return elementwise(found, partial(_pair, narrow), "f32", "u32")
    if "bf16" in (to, source):
        if (to, source) == ("f32", "bf16"):
            return elementwise(found, from_bfloat16, "u16", "f32")
        if (to, source) == ("bf16", "f32"):
            return elementwise(found, to_bfloat16, "f32", "u16")
        raise found.unsupported()
    kinds = dtype(to), dtype(source)
    target = np.dtype(f"{kinds[0][0]}{int(kinds[0][1:]) // 8}")
    if source[0] == "f" and to[0] == "f":
        return _between_floats(found, target, kinds, rounding)
    if source[0] == "f":
        if rounding is None:
            raise found.unsupported()
        return elementwise(found, partial(to_integer, _TO_INTEGRAL[rounding], target), kinds[1], kinds[0])
    if to[0] == "f":
        return elementwise(found, lambda a: a.astype(target), kinds[1], kinds[0])
    if found.has("sat"):
        limits = np.iinfo(target.type)
        return elementwise(found, lambda a: np.clip(a, limits.min, limits.max).astype(target), kinds[1], kinds[0])
    return elementwise(found, lambda a: a.astype(target), kinds[1], kinds[0])


def _between_floats(
    found: Instruction, target: np.dtype[Any], kinds: tuple[str, str], rounding: str | None
) -> Operation:
    ftz, sat = found.has("ftz"), found.has("sat")

    def change(a: Array) -> Array:
        value = _TO_INTEGRAL[rounding](a) if rounding else a
        value = (flush(value) if ftz else value).astype(target)
        return saturate(value) if sat else value

    return elementwise(found, change, kinds[1], kinds[0])


def from_bfloat16(a: Array) -> Array:
    return (a.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(a: Array) -> Array:
    """To the nearest, ties to even; NaN becomes 0x7FFF."""
    bits = a.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(a), np.uint16(0x7FFF), rounded.astype(np.uint16))


def to_float16(a: Array) -> Array:
    """To the nearest, ties to even; NaN becomes 0x7FFF."""
    return np.where(np.isnan(a), np.uint16(0x7FFF), a.astype(np.float16).view(np.uint16))


def _pair(narrow: Callable[[Array], Array], high: Array, low: Array) -> Array:
    return narrow(high).astype(np.uint32) << np.uint32(16) | narrow(low).astype(np.uint32)


def to_integer(integral: Callable[[Array], Array], target: np.dtype[Any], a: Array) -> Array:
    """Out of range to the nearest number of the type; NaN to 0, and of 64 bits to 2^63."""
    limits = np.iinfo(target.type)
    value = integral(a.astype(np.float64))
    inside = np.clip(value, float(limits.min), float(limits.max))
    result = np.where(value >= float(limits.max), target.type(limits.max), inside.astype(target))
    nan = target.type(0) if target.itemsize < 8 else target.type(limits.max // 2 + 1 if limits.min == 0 else limits.min)
    return np.where(np.isnan(a), nan, result)
