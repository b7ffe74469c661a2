"""Floating point: sections 9.7.3 (float32, float64) and 9.7.4 (halves)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from kvops.autotune.machine.instructions.table import Operation, dtype, elementwise, instruction
from kvops.autotune.machine.ptx import Instruction

Array = Any

_SMALLEST = np.float32(1.1754944e-38)


def flush(x: Array) -> Array:
    """Subnormal numbers to zeros of their sign: what ``.ftz`` does to operands and to the result."""
    return np.where(np.abs(x) < _SMALLEST, np.copysign(np.float32(0), x), x)


def saturate(x: Array) -> Array:
    """To [0, 1]; NaN becomes 0."""
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1)).astype(x.dtype)


def float_operation(found: Instruction, function: Callable[..., Array]) -> Operation:
    """``function`` with the modifiers of the instruction around it."""
    if found.type not in ("f16", "f32", "f64"):
        raise found.unsupported()
    if any(found.has(rounding) for rounding in ("rz", "rm", "rp")):
        raise found.unsupported()
    if found.base == "div" and not found.has("rn"):
        function = partial(approximate, np.divide, 1)
    ftz, sat = found.has("ftz"), found.has("sat")

    def modified(*operands: Array) -> Array:
        value = flush(function(*map(flush, operands))) if ftz else function(*operands)
        return saturate(value) if sat else value

    kind = dtype(found.type)
    return elementwise(found, modified if ftz or sat else function, kind, kind)


@instruction("fma", section="9.7.3")
def fused_multiply_add(found: Instruction) -> Operation:
    return float_operation(found, fma64 if found.type == "f64" else fma)


def fma(a: Array, b: Array, c: Array) -> Array:
    """Rounded once. A product of floats is exact in float64, their sum is not: where the 29 bits that float32 drops
    lie just on the middle, the error of the sum decides."""
    if a.dtype == np.float16:
        return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float16)
    product = a.astype(np.float64) * b
    total = np.asarray(product + c)
    middle = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    if np.count_nonzero(middle):
        wide = np.broadcast_to(np.asarray(c, np.float64), total.shape)
        back = total - product
        error = (product - (total - back)) + (wide - back)
        away = np.where(error > 0, np.inf, -np.inf)
        total = np.where(middle & (error != 0), np.nextafter(total, away), total)
    return total.astype(np.float32)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """Rounded twice: no kernel of ours computes in float64."""
    return a * b + c


def scatter(*operands: Array) -> Array:
    """A number from -1 to 1 for each element, the same for the same bits: what makes an approximation off by."""
    mixed: Array = np.uint32(0x9E3779B9)
    for operand in operands:
        mixed = (mixed ^ operand.view(np.uint32)) * np.uint32(0x85EBCA6B)
        mixed = mixed ^ mixed >> np.uint32(13)
    return (mixed * np.uint32(0xC2B2AE35)).view(np.int32).astype(np.float64) / 2**31


def approximate(exact: Callable[..., Array], ulps: float, *operands: Array) -> Array:
    """What the hardware's approximation may give: up to ``ulps`` units in the last place from the exact value, the
    same for the same operands. Values that float32 holds exactly stay."""
    value = exact(*(operand.astype(np.float64) for operand in operands))
    nearest = np.asarray(value).astype(np.float32)
    off = value + scatter(*operands) * ulps * np.spacing(np.abs(nearest)).astype(np.float64)
    keep = (nearest == value) | ~np.isfinite(nearest) | (np.abs(nearest) < _SMALLEST)
    return np.where(keep, nearest, off.astype(np.float32))


def _approximation(found: Instruction, exact: Callable[[Array], Array], ulps: float) -> Operation:
    if found.type != "f32":
        raise found.unsupported()
    return float_operation(found, partial(approximate, exact, ulps))


@instruction("ex2", section="9.7.3")
def power_of_two(found: Instruction) -> Operation:
    return _approximation(found, np.exp2, 1.5)


@instruction("lg2", section="9.7.3")
def logarithm(found: Instruction) -> Operation:
    return _approximation(found, np.log2, 1)


@instruction("rcp", section="9.7.3")
def reciprocal(found: Instruction) -> Operation:
    if found.has("rn"):
        return float_operation(found, lambda a: a.dtype.type(1) / a)
    return _approximation(found, lambda a: 1 / a, 0.5)


@instruction("sqrt", section="9.7.3")
def square_root(found: Instruction) -> Operation:
    return float_operation(found, np.sqrt) if found.has("rn") else _approximation(found, np.sqrt, 0.5)


@instruction("rsqrt", section="9.7.3")
def reciprocal_root(found: Instruction) -> Operation:
    return _approximation(found, lambda a: 1 / np.sqrt(a), 1)


@instruction("sin", "cos", "tanh", section="9.7.3")
def transcendental(found: Instruction) -> Operation:
    return _approximation(found, {"sin": np.sin, "cos": np.cos, "tanh": np.tanh}[found.base], 4)


@instruction("copysign", section="9.7.3")
def copy_sign(found: Instruction) -> Operation:
    # The sign is the first operand's.
    return elementwise(found, lambda sign, value: np.copysign(value, sign), dtype(found.type), dtype(found.type))


@instruction("testp", section="9.7.3")
def test_property(found: Instruction) -> Operation:
    tests: dict[str, Callable[[Array], Array]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
    }
    if found.parts[1] not in tests:
        raise found.unsupported()
    return elementwise(found, tests[found.parts[1]], dtype(found.type), "pred")
