"""Loads whose value goes into one store to the same address and nowhere else: ``x = f(x)`` in global memory.

Where several warps hold the same elements, Triton lets all of them load but one of them store: what the others have
loaded is dropped. Such a load orders nothing. The store is checked in its place, and two warps that both store are a
race even if the values are equal here, since one may have loaded what the other has stored.
"""

from __future__ import annotations

from kvops.autotune.machine.instructions import operation_of
from kvops.autotune.machine.instructions.table import TABLE
from kvops.autotune.machine.ptx import Address, Instruction, Operand, Program, Vector, registers_in


def updates_of(program: Program) -> dict[int, int]:
    """The load's index -> the store's."""
    if program.updates is None:
        program.updates = _found(program)
    return program.updates


def _found(program: Program) -> dict[int, int]:
    found = {}
    for block in program.blocks:
        for place, load in enumerate(block):
            if load.opcode.startswith("ld.global"):
                store = _store_behind(block[place + 1 :], load)
                if store is not None and _used_only_by(program, load, store):
                    found[load.index] = store.index
    return found


def _store_behind(rest: list[Instruction], load: Instruction) -> Instruction | None:
    """The first store to the address of ``load`` while its register stands, if it has the same size."""
    address = load.operands[1]
    assert isinstance(address, Address)
    for entry in rest:
        if entry.opcode.startswith("st.global") and entry.operands[0] == address:
            same = _size(entry, entry.operands[1]) == _size(load, load.operands[0])
            return entry if same else None
        if entry.base in TABLE and address.base in registers_in(operand for operand, _ in operation_of(entry).results):
            return None
    return None


def _size(entry: Instruction, values: Operand) -> int:
    return int(entry.type[1:]) * (len(values.parts) if isinstance(values, Vector) else 1)


def _used_only_by(program: Program, load: Instruction, store: Instruction) -> bool:
    """Whether what is computed from the value reaches nothing but the values of ``store``."""
    tainted = set(registers_in([load.operands[0]]))
    before = 0
    while len(tainted) != before:
        before = len(tainted)
        for entry in program.instructions:
            if entry is load:
                continue
            if entry.guard in tainted:
                return False
            if entry is store:
                if tainted & registers_in([entry.operands[0]]):
                    return False
                continue
            if entry.base not in TABLE:
                if tainted & registers_in(entry.operands):
                    return False
                continue
            operation = operation_of(entry)
            if tainted & registers_in(operand for operand, _ in operation.sources):
                if operation.machine or not operation.results:
                    return False
                tainted |= registers_in(operand for operand, _ in operation.results)
    return True
