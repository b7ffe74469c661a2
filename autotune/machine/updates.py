"""Loads whose value goes into one store of the same block and nowhere else: ``x = f(x)`` in global memory.

Where several warps hold the same elements, Triton lets all of them load but one of them store: what the others have
loaded is dropped. Such a load orders nothing. A thread that stores what it has loaded from the same place needs no
check of the load either, for its store is checked: two warps that both store are a race even if the values are equal
here, since one may have loaded what the other has stored. Where values move between the threads of a warp in between
(shfl), the same holds for warps in place of threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvops.autotune.machine.instructions import operation_of
from kvops.autotune.machine.instructions.table import TABLE
from kvops.autotune.machine.ptx import Instruction, Program, Register, registers_in


@dataclass(frozen=True)
class Update:
    """``store``: the index of the one instruction that uses the value; ``by_warp``: threads of a warp exchange it."""

    store: int
    by_warp: bool


def updates_of(program: Program) -> dict[int, Update]:
    """By the index of the load."""
    if program.updates is None:
        program.updates = {}
        for block in program.blocks:
            for place, load in enumerate(block):
                if load.opcode.startswith("ld.global"):
                    update = _update(program, load, block[place + 1 :])
                    if update is not None:
                        program.updates[load.index] = update
    return program.updates


def _update(program: Program, load: Instruction, rest: list[Instruction]) -> Update | None:
    if not any(entry.opcode.startswith("st.global") for entry in rest):
        return None
    tainted = registers_in([load.operands[0]])
    stores: set[int] = set()
    by_warp, before = False, 0
    while len(tainted) != before:
        before = len(tainted)
        for entry in program.instructions:
            if entry is load or not tainted & _read(entry):
                continue
            if entry.opcode.startswith("st.global") and _untouched(entry, tainted, (0,)):
                stores.add(entry.index)
            elif entry.base in TABLE and _passes_on(entry, tainted):
                by_warp |= entry.base == "shfl"
                tainted |= registers_in(operand for operand, _ in operation_of(entry).results)
            else:
                return None
    if len(stores) != 1 or not any(entry.index in stores for entry in rest):
        return None
    return Update(stores.pop(), by_warp)


def _read(entry: Instruction) -> set[Register]:
    """The registers that an instruction reads; all of those that it names if it is not in the table."""
    guard = {entry.guard} if entry.guard is not None else set()
    if entry.base not in TABLE:
        return guard | registers_in(entry.operands)
    return guard | registers_in(operand for operand, _ in operation_of(entry).sources)


def _untouched(entry: Instruction, tainted: set[Register], operands: Iterable[int]) -> bool:
    """Whether neither the guard nor these operands of ``entry`` hang on the value."""
    return entry.guard not in tainted and not tainted & registers_in(entry.operands[place] for place in operands)


def _passes_on(entry: Instruction, tainted: set[Register]) -> bool:
    """Whether the value only goes into the results of ``entry``, or of other threads of the warp."""
    if entry.base == "shfl":
        return _untouched(entry, tainted, range(2, len(entry.operands)))
    operation = operation_of(entry)
    return entry.guard not in tainted and bool(operation.results) and not operation.machine
