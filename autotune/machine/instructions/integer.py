"""Integers and bits: sections 9.7.1 (integer arithmetic) and 9.7.8 (logic and shifts)."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from kvops.autotune.machine.instructions.floating import float_operation
from kvops.autotune.machine.instructions.table import Operation, dtype, elementwise, instruction
from kvops.autotune.machine.ptx import Immediate, Instruction

Array = Any


def _signless(found: Instruction) -> str:
    """Addition and the low half of a product have the same bits whether signed or not, and wrap around."""
    return f"u{found.type[1:]}"


def _wide(found: Instruction) -> str:
    return f"{'i' if found.type[0] == 's' else 'u'}{2 * int(found.type[1:])}"


@instruction("add", "sub", section="9.7.1 and 9.7.3")
def add_or_subtract(found: Instruction) -> Operation:
    if found.has("cc") or (found.has("sat") and found.type[0] != "f"):
        raise found.unsupported()
    function = np.add if found.base == "add" else np.subtract
    if found.type[0] == "f":
        return float_operation(found, function)
    return elementwise(found, function, _signless(found), _signless(found))


@instruction("mul", section="9.7.1 and 9.7.3")
def multiply(found: Instruction) -> Operation:
    if found.type[0] == "f":
        return float_operation(found, np.multiply)
    kind = dtype(found.type)
    if found.has("lo"):
        return elementwise(found, np.multiply, _signless(found), _signless(found))
    if found.has("wide"):
        return elementwise(found, partial(wide_product, np.dtype(_numpy(_wide(found)))), kind, _wide(found))
    if found.has("hi"):
        return elementwise(found, high_product, kind, kind)
    raise found.unsupported()


@instruction("mad", section="9.7.1")
def multiply_add(found: Instruction) -> Operation:
    kind, wide = dtype(found.type), _wide(found)
    if found.has("lo"):
        return elementwise(found, lambda a, b, c: a * b + c, _signless(found), _signless(found))
    if found.has("wide"):
        product = partial(wide_product, np.dtype(_numpy(wide)))
        return elementwise(found, lambda a, b, c: product(a, b) + c, (kind, kind, wide), wide)
    if found.has("hi"):
        return elementwise(found, lambda a, b, c: high_product(a, b) + c, kind, kind)
    raise found.unsupported()


def _numpy(kind: str) -> str:
    return f"{kind[0]}{int(kind[1:]) // 8}"


def wide_product(wide: np.dtype[Any], a: Array, b: Array) -> Array:
    return a.astype(wide) * b.astype(wide)


def high_product(a: Array, b: Array) -> Array:
    """The upper half of the whole product."""
    kind = np.result_type(a, b)
    if kind.itemsize < 8:
        wide = np.dtype(f"{kind.kind}{2 * kind.itemsize}")
        return (wide_product(wide, a, b) >> wide.type(8 * kind.itemsize)).astype(kind)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    first = (x & low) * (y & low)
    second = (x >> half) * (y & low) + (first >> half)
    third = (x & low) * (y >> half) + (second & low)
    high = (x >> half) * (y >> half) + (second >> half) + (third >> half)
    if kind.kind == "i":  # a negative factor was taken for one that is larger by 2^64
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.astype(kind)


@instruction("div", section="9.7.1 and 9.7.3")
def divide(found: Instruction) -> Operation:
    if found.type[0] == "f":
        return float_operation(found, np.divide)
    return elementwise(found, quotient, dtype(found.type), dtype(found.type))


@instruction("rem", section="9.7.1")
def remainder(found: Instruction) -> Operation:
    def rest(a: Array, b: Array) -> Array:
        return a - quotient(a, b) * b

    return elementwise(found, rest, dtype(found.type), dtype(found.type))


def quotient(a: Array, b: Array) -> Array:
    """Towards zero. By zero the manual leaves it open: GPUs give all ones, as here."""
    kind = np.result_type(a, b).type
    zero = b == 0
    b = np.where(zero, kind(1), b)
    result = a // b
    if np.dtype(kind).kind == "i":
        result = result + ((a % b != 0) & ((a < 0) != (b < 0)))
    return np.where(zero, ~kind(0), result).astype(kind)


@instruction("abs", "neg", section="9.7.1 and 9.7.3")
def absolute_or_negated(found: Instruction) -> Operation:
    function = np.abs if found.base == "abs" else np.negative
    if found.type[0] == "f":
        return float_operation(found, function)
    return elementwise(found, function, dtype(found.type), dtype(found.type))


@instruction("min", "max", section="9.7.1 and 9.7.3")
def smaller_or_larger(found: Instruction) -> Operation:
    kind = dtype(found.type)
    if found.type[0] == "f":
        smaller = found.base == "min"
        if found.has("NaN"):
            return float_operation(found, np.minimum if smaller else np.maximum)
        return float_operation(found, partial(float_extreme, smaller))
    if found.type[0] not in "su":
        raise found.unsupported()
    function = np.minimum if found.base == "min" else np.maximum
    if found.has("relu"):
        return elementwise(found, lambda a, b: np.maximum(function(a, b), 0), kind, kind)
    return elementwise(found, function, kind, kind)


def float_extreme(smaller: bool, a: Array, b: Array) -> Array:
    """A number before a NaN, and -0 below +0."""
    found = np.fmin(a, b) if smaller else np.fmax(a, b)
    zero = (found == 0) & (a == b)
    if zero.any():
        negative = np.signbit(a) | np.signbit(b) if smaller else np.signbit(a) & np.signbit(b)
        found = np.where(zero, np.where(negative, found.dtype.type(-0.0), found.dtype.type(0.0)), found)
    return found


@instruction("and", "or", "xor", section="9.7.8")
def logic(found: Instruction) -> Operation:
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[found.base]
    return elementwise(found, function, dtype(found.type), dtype(found.type))


@instruction("not", section="9.7.8")
def invert(found: Instruction) -> Operation:
    return elementwise(found, np.invert, dtype(found.type), dtype(found.type))


@instruction("cnot", section="9.7.8")
def is_zero(found: Instruction) -> Operation:
    kind = dtype(found.type)
    return elementwise(found, lambda a: (a == 0).astype(a.dtype), kind, kind)


@instruction("lop3", section="9.7.8")
def any_logic(found: Instruction) -> Operation:
    table = found.operands[4]
    assert isinstance(table, Immediate)
    sources = tuple((operand, "u32") for operand in found.operands[1:4])
    return Operation(partial(by_truth_table, int(table.text, 0)), sources, ((found.operands[0], "u32"),))


def by_truth_table(table: int, a: Array, b: Array, c: Array) -> Array:
    result = np.zeros_like(a | b | c)
    for row in range(8):
        if table >> row & 1:
            result = result | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


@instruction("shl", "shr", section="9.7.8")
def shift(found: Instruction) -> Operation:
    kind = dtype(found.type)
    return elementwise(found, shift_left if found.base == "shl" else shift_right, (kind, "u32"), kind)


def shift_left(a: Array, count: Array) -> Array:
    """Counts beyond the width give 0."""
    width = a.dtype.itemsize * 8
    kept = np.minimum(count, np.uint32(width - 1)).astype(a.dtype)
    return np.where(count >= width, a.dtype.type(0), a << kept)


def shift_right(a: Array, count: Array) -> Array:
    """Counts beyond the width give 0, or the sign where the type is signed."""
    width = a.dtype.itemsize * 8
    kept = np.minimum(count, np.uint32(width - 1)).astype(a.dtype)
    if a.dtype.kind == "i":
        return a >> kept
    return np.where(count >= width, a.dtype.type(0), a >> kept)


@instruction("shf", section="9.7.8")
def funnel_shift(found: Instruction) -> Operation:
    return elementwise(found, partial(funnel, found.has("l"), found.has("wrap")), "u32", "u32")


def funnel(left: bool, wrap: bool, low: Array, high: Array, count: Array) -> Array:
    count = (count & np.uint32(31) if wrap else np.minimum(count, np.uint32(32))).astype(np.uint64)
    both = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
    return ((both << count) >> np.uint64(32) if left else both >> count).astype(np.uint32)


@instruction("bfe", section="9.7.1")
def extract_bits(found: Instruction) -> Operation:
    kind = dtype(found.type)
    return elementwise(found, bit_field, (kind, "u32", "u32"), kind)


def bit_field(a: Array, start: Array, length: Array) -> Array:
    """``length`` bits from ``start``; a signed field repeats its highest bit, or the highest of ``a`` where it ends
    beyond the width."""
    width = a.dtype.itemsize * 8
    start = np.minimum(start & np.uint32(255), np.uint32(width)).astype(np.int64)
    length = np.minimum(length & np.uint32(255), np.uint32(width)).astype(np.int64)
    end = np.minimum(start + length, width)
    wide = a.astype(np.int64 if a.dtype.kind == "i" else np.uint64).view(np.uint64)
    ones = np.uint64(0xFFFFFFFFFFFFFFFF)
    kept = np.maximum(end - start, 0)
    mask = np.where(kept >= 64, ones, (np.uint64(1) << np.minimum(kept, 63).astype(np.uint64)) - np.uint64(1))
    field = (wide >> np.minimum(start, 63).astype(np.uint64)) & mask
    if a.dtype.kind == "i":
        last = np.minimum(np.maximum(end - 1, 0), width - 1).astype(np.uint64)
        last = np.where(start + length > width, np.uint64(width - 1), last)
        negative = ((wide >> last) & np.uint64(1)) == 1
        field = np.where(negative & (length > 0), field | ~mask, field)
    return field.astype(np.uint64).astype(f"u{a.dtype.itemsize}").view(a.dtype)


@instruction("bfi", section="9.7.1")
def insert_bits(found: Instruction) -> Operation:
    def insert(a: Array, b: Array, start: Array, length: Array) -> Array:
        kind, width = b.dtype.type, b.dtype.itemsize * 8
        start, length = start & np.uint32(255), length & np.uint32(255)
        ones = shift_left(np.broadcast_to(kind(1), b.shape), length) - kind(1)
        ones = np.where(length >= width, ~kind(0), ones)
        mask = shift_left(ones, start)
        return (b & ~mask) | (shift_left(a, start) & mask)

    kind = dtype(found.type)
    return elementwise(found, insert, (kind, kind, "u32", "u32"), kind)


@instruction("popc", section="9.7.1")
def count_ones(found: Instruction) -> Operation:
    return elementwise(found, ones_in, dtype(found.type), "u32")


def ones_in(a: Array) -> Array:
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(a).astype(np.uint32)
    octets = np.ascontiguousarray(a).view(np.uint8).reshape(*a.shape, a.dtype.itemsize)
    return np.unpackbits(octets, axis=-1).sum(-1, dtype=np.uint32)


@instruction("clz", section="9.7.1")
def leading_zeros(found: Instruction) -> Operation:
    return elementwise(found, zeros_before, dtype(found.type), "u32")


def zeros_before(a: Array) -> Array:
    width = a.dtype.itemsize * 8
    for step in (1, 2, 4, 8, 16, 32):
        if step < width:
            a = a | a >> a.dtype.type(step)
    return np.uint32(width) - ones_in(a)


@instruction("brev", section="9.7.1")
def reverse_bits(found: Instruction) -> Operation:
    def reversed_bits(a: Array) -> Array:
        width = a.dtype.itemsize * 8
        result = a & a.dtype.type(0)
        for place in range(width):
            result = result << a.dtype.type(1) | (a >> a.dtype.type(place)) & a.dtype.type(1)
        return result

    return elementwise(found, reversed_bits, dtype(found.type), dtype(found.type))


@instruction("prmt", section="9.7.9")
def permute_bytes(found: Instruction) -> Operation:
    if found.type != "b32":
        raise found.unsupported()
    return elementwise(found, chosen_bytes, "u32", "u32")


def chosen_bytes(a: Array, b: Array, selector: Array) -> Array:
    """Byte ``n`` of the result is the byte of ``b:a`` that nibble ``n`` names; its fourth bit asks for the sign."""
    both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for place in range(4):
        nibble = (selector >> np.uint32(4 * place)).astype(np.uint64) & np.uint64(15)
        byte = (both >> (np.uint64(8) * (nibble & np.uint64(7)))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(nibble & np.uint64(8), sign, byte)
        result = result | byte.astype(np.uint32) << np.uint32(8 * place)
    return result
