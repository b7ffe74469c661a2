"""What each instruction does: one table, opcode to a function over arrays with one element to a thread.

A builder looks at the form of an instruction (its types and modifiers) and names the function that computes it, the
sources and the results. Numbers of sections are those of the PTX ISA manual, version 8.7.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvops.autotune.machine.ptx import Instruction, Operand, Unsupported


@dataclass(frozen=True)
class Operation:
    """``function(*sources)`` gives the result, or a tuple of them where there are several.

    A source is an array, or a constant of its dtype. With ``machine`` the function takes ``(team, mask, index of the
    instruction)`` first: it reaches memory, other threads of the warp, or what is under way. ``tensor_product`` marks
    what may go on in the accumulators of a product under way.
    """

    function: Callable[..., Any]
    sources: tuple[tuple[Operand, str], ...]
    results: tuple[tuple[Operand, str], ...]
    machine: bool = False
    tensor_product: bool = False


Builder = Callable[[Instruction], Operation]
TABLE: dict[str, Builder] = {}
SECTIONS: dict[str, str] = {}

# dtype of a register's array by the type of an instruction.
_ARRAYS = {"b": "u", "u": "u", "s": "i", "f": "f"}


def dtype(type_name: str) -> str:
    """``"s32"`` -> ``"i32"``, ``"b16"`` -> ``"u16"``; bfloat16 is handled as its bits."""
    if type_name == "pred":
        return "pred"
    if type_name == "bf16":
        return "u16"
    if type_name[0] not in _ARRAYS or not type_name[1:].isdigit():
        raise Unsupported(f"type .{type_name}")
    return _ARRAYS[type_name[0]] + type_name[1:]


def instruction(*names: str, section: str) -> Callable[[Builder], Builder]:
    """Enter a builder in the table, with the sections of the manual that it follows."""

    def enter(builder: Builder) -> Builder:
        for name in names:
            TABLE[name] = builder
            SECTIONS[name] = section
        return builder

    return enter


def operation_of(found: Instruction) -> Operation:
    if found.base not in TABLE:
        raise Unsupported(f"{found.opcode}: this instruction is not known ({found.place})")
    return TABLE[found.base](found)


def elementwise(
    found: Instruction, function: Callable[..., Any], sources: str | tuple[str, ...], result: str
) -> Operation:
    """The first operand is the result, the others are the sources: all of one dtype, or each of its own."""
    operands = found.operands[1:]
    kinds = (sources,) * len(operands) if isinstance(sources, str) else sources
    return Operation(function, tuple(zip(operands, kinds, strict=True)), ((found.operands[0], result),))
