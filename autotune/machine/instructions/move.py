"""Comparison, selection and movement between registers: sections 9.7.6 and 9.7.9."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from kvops.autotune.machine.instructions.table import Operation, dtype, elementwise, instruction
from kvops.autotune.machine.ptx import Instruction, Pair, Vector

Array = Any

_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def _ordered(name: str) -> Callable[[Array, Array], Array]:
    """Of floats: false where one is NaN; with a ``u`` behind its name true."""
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name in _COMPARE and name != "ne":
        return _COMPARE[name]
    if name == "ne":
        return lambda a, b: (a < b) | (a > b)
    compare = _COMPARE[name[:-1]]
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


@instruction("setp", section="9.7.6")
def set_predicate(found: Instruction) -> Operation:
    comparison = found.parts[1]
    modifiers = [part for part in found.parts[2:-1] if part != "ftz"]
    if isinstance(found.operands[0], Pair) or modifiers not in ([], ["and"], ["or"], ["xor"]):
        raise found.unsupported()
    if found.type == "bf16":
        if comparison not in ("num", "nan"):
            raise found.unsupported()
        function: Callable[[Array, Array], Array] = partial(_bfloat16_is_nan, comparison == "nan")
    elif found.type[0] == "f":
        function = _ordered(comparison)
    else:
        function = _COMPARE[comparison]
    kind = dtype(found.type)
    if not modifiers:
        return elementwise(found, function, kind, "pred")
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[modifiers[0]]
    return elementwise(found, lambda a, b, c: combine(function(a, b), c), (kind, kind, "pred"), "pred")


def _bfloat16_is_nan(wanted: bool, a: Array, b: Array) -> Array:
    magnitude = np.uint16(0x7FFF)
    return ((a & magnitude > 0x7F80) | (b & magnitude > 0x7F80)) == wanted


@instruction("selp", section="9.7.6")
def select(found: Instruction) -> Operation:
    kind = dtype(found.type)
    return elementwise(found, lambda a, b, chosen: np.where(chosen, a, b), (kind, kind, "pred"), kind)


@instruction("mov", section="9.7.9")
def move(found: Instruction) -> Operation:
    target, source = found.operands
    kind = dtype(found.type)
    if isinstance(source, Vector):
        part = f"u{int(kind[1:]) // len(source.parts)}"
        return Operation(partial(pack, kind), tuple((operand, part) for operand in source.parts), ((target, kind),))
    if isinstance(target, Vector):
        part = f"u{int(kind[1:]) // len(target.parts)}"
        results = tuple((operand, part) for operand in target.parts)
        return Operation(partial(unpack, part, len(results)), ((source, kind),), results)
    return elementwise(found, lambda a: a, kind, kind)


def pack(kind: str, *parts: Array) -> Array:
    """The first part is the lowest."""
    wide = np.dtype(f"u{int(kind[1:]) // 8}").type
    bits = int(kind[1:]) // len(parts)
    value = parts[0].astype(wide)
    for place, part in enumerate(parts[1:], 1):
        value = value | part.astype(wide) << wide(bits * place)
    return value


def unpack(part: str, count: int, value: Array) -> list[Array]:
    narrow = np.dtype(f"u{int(part[1:]) // 8}")
    bits = int(part[1:])
    return [(value >> value.dtype.type(bits * place)).astype(narrow) for place in range(count)]


@instruction("cvta", section="9.7.9")
def to_generic_address(found: Instruction) -> Operation:
    """Spaces lie in one address space here; only parameters and global memory are asked for."""
    if not (found.has("param") or found.has("global")):
        raise found.unsupported()
    return elementwise(found, lambda a: a, "u64", "u64")
