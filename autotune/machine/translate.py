"""Makes a Python function of a basic block: one line for each instruction, over the arrays of a team's registers.

What an instruction does stands in ``instructions/``; here its operands are read and its results written, under the
mask of the threads that execute it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kvops.autotune.machine.instructions import Operation, operation_of
from kvops.autotune.machine.memory import DESCRIPTORS, SHARED_WINDOW
from kvops.autotune.machine.ptx import (
    Address,
    Immediate,
    Instruction,
    Operand,
    Program,
    Register,
    Symbol,
    Unsupported,
    Vector,
    is_barrier,
    registers_in,
)
from kvops.autotune.machine.team import dtype_of

# What a block ends with: (FALL,), (GOTO, block), (BRANCH, condition, block), (SWITCH, index, blocks),
# (BARRIER, instruction, number, count), (EXIT, threads or None).
FALL, GOTO, BRANCH, SWITCH, BARRIER, EXIT = range(6)
Outcome = tuple[Any, ...]
_NOTHING = ("setmaxnreg", "membar", "nanosleep", "griddepcontrol", "prefetch", "prefetchu", "applypriority", "discard")


def bits_of(dtype: str) -> int:
    return 1 if dtype == "pred" else int(dtype[1:])


class BlockWriter:
    """Writes the function of one block; ``masked`` where only some of the team's threads are in it."""

    def __init__(self, program: Program, block: int, masked: bool, watched: frozenset[tuple[str, int]]) -> None:
        self.program, self.block, self.masked, self.watched = program, block, masked, watched
        self.lines: list[str] = []
        self.names: dict[str, Any] = {"np": np}
        self.rows: set[str] = set()

    def function(self) -> Callable[..., Outcome]:
        end = f"return ({FALL},)"
        for instruction in self.program.blocks[self.block]:
            guard = None
            if instruction.guard is not None:
                guard = self._row(instruction.guard, "pred")
                guard = f"~{guard}" if instruction.negated else guard
            found = self._control(instruction, guard)
            if found is not None:
                end = found
            elif instruction.base not in _NOTHING and instruction.opcode != "bar.warp.sync":
                self._instruction(instruction, guard)
        head = [f"{name} = t.rows[{name!r}]" for name in sorted(self.rows)]
        source = "def block(t, m):\n  " + "\n  ".join([*head, *self.lines, end]) + "\n"
        exec(compile(source, f"<{self.program.name}, block {self.block}>", "exec"), self.names)
        return self.names["block"]

    def _control(self, instruction: Instruction, guard: str | None) -> str | None:
        """The block's end, where this instruction is one."""
        base = instruction.base
        if base in ("bra", "brx"):
            target = instruction.operands[0]
            if base == "brx":
                index, table = instruction.operands
                assert isinstance(table, Symbol)
                blocks = tuple(self.program.labels[name] for name in self.program.tables[table.name])
                return f"return ({SWITCH}, {self.source(index, 'u32')}, {blocks})"
            assert isinstance(target, Symbol)
            block = self.program.labels[target.name]
            return f"return ({GOTO}, {block})" if guard is None else f"return ({BRANCH}, {guard}, {block})"
        if base in ("ret", "exit"):
            return f"return ({EXIT}, {guard})"
        if is_barrier(instruction):
            if guard is not None:
                raise instruction.unsupported()
            numbers = [self.source(operand, "u32") for operand in instruction.operands]
            return f"return ({BARRIER}, {instruction.index}, {', '.join([*numbers, '0'][:2])})"
        return None

    def _instruction(self, instruction: Instruction, guard: str | None) -> None:
        operation = operation_of(instruction)
        mask = "m" if self.masked else None
        if guard is not None:
            mask = f"({guard}) & m" if self.masked else guard
            if not mask.isidentifier():
                self.lines.append(f"q = {mask}")
                mask = "q"
        if self.watched:
            self._watch(instruction, operation)
        arguments = [self.source(operand, dtype) for operand, dtype in operation.sources]
        if operation.machine:
            arguments = ["t", str(mask), str(instruction.index), *arguments]
        call = f"{self._name(operation.function)}({', '.join(arguments)})"
        if len(operation.results) == 1:
            self._assign(*operation.results[0], call, mask)
            return
        self.lines.append(f"w = {call}" if operation.results else call)
        for place, (operand, dtype) in enumerate(operation.results):
            self._assign(operand, dtype, f"w[{place}]", mask)

    def _watch(self, instruction: Instruction, operation: Operation) -> None:
        """Whether it touches the registers of a product under way; a product may go on in another's accumulators."""
        if operation.tensor_product:
            return
        reads, writes = (
            frozenset((r.kind, r.index) for r in registers_in(operand for operand, _ in operands)) & self.watched
            for operands in (operation.sources, operation.results)
        )
        if reads or writes:
            names = f"{self._name(reads)}, {self._name(writes)}"
            self.lines.append(f"if t.product_groups or t.products: t.touch({instruction.index}, {names})")

    # --- operands ---

    def _name(self, value: Any) -> str:
        name = f"k{len(self.names)}"
        self.names[name] = value
        return name

    def _row(self, register: Register, dtype: str) -> str:
        self.rows.add(dtype)
        return f"{dtype}[{register.index}]"

    def source(self, operand: Operand, dtype: str) -> str:
        """An expression for the operand as ``dtype``: an array over the threads, or a constant."""
        if isinstance(operand, Register):
            if operand.kind == "pred" or dtype == "pred":
                if operand.kind != dtype:
                    raise Unsupported(f"a predicate as {dtype}")
                return self._row(operand, "pred")
            have, want = bits_of(operand.kind), bits_of(dtype)
            if have == want:
                return self._row(operand, dtype)
            if have > want:
                cast = self._name(dtype_of(f"u{want}"))
                return f"{self._row(operand, operand.kind)}.astype({cast}).view({self._name(dtype_of(dtype))})"
            raise Unsupported(f"a register of {have} bits as {dtype}")
        if isinstance(operand, Immediate):
            return self._name(constant(operand.text, dtype))
        if isinstance(operand, Symbol):
            return self._symbol(operand.name, dtype)
        if isinstance(operand, Address):
            return self._address(operand, dtype)
        raise Unsupported(f"operand {operand}")

    def _symbol(self, name: str, dtype: str) -> str:
        if name.startswith("%"):
            return f"t.special[{name!r}].astype({self._name(dtype_of(dtype))}, copy=False)"
        if name.startswith("global_smem"):
            return self._name(dtype_of(dtype)(SHARED_WINDOW))
        for number, parameter in enumerate(self.program.parameters):
            if parameter.name == name:
                return self._name(dtype_of(dtype)(DESCRIPTORS + number))
        raise Unsupported(f"symbol {name}")

    def _address(self, address: Address, dtype: str) -> str:
        base = self.source(address.base, dtype)
        return f"({base} + {self._name(constant(str(address.offset), dtype))})" if address.offset else base

    def _assign(self, operand: Operand, dtype: str, value: str, mask: str | None) -> None:
        if isinstance(operand, Symbol) and operand.name == "_":
            self.lines.append(value)
            return
        if not isinstance(operand, Register):
            raise Unsupported(f"a result in {operand}")
        if operand.kind != "pred" and bits_of(dtype) != bits_of(operand.kind):
            # A wider register takes the value with its sign.
            letter = "i" if dtype[0] == "i" else "u"
            dtype = f"{letter}{bits_of(operand.kind)}"
        row = self._row(operand, dtype)
        if mask is None:
            self.lines.append(f"{row}[:] = {value}")
        else:
            self.lines.append(f"np.copyto({row}, {value}, where={mask})")


def constant(text: str, dtype: str) -> Any:
    """The NumPy scalar of a literal: ``-1``, ``0x10U``, ``0f3F800000`` (bits of a float), ``0d...`` (of a double)."""
    if dtype == "pred":
        return np.bool_(int(text.rstrip("U"), 0) != 0)
    kind = dtype_of(dtype)
    if text.startswith(("0f", "0d")):
        bits = int(text[2:], 16)
        width = 4 if text[1] == "f" else 8
        if np.dtype(kind).itemsize != width:
            raise Unsupported(f"literal {text} as {dtype}")
    else:
        bits = int(text.rstrip("U"), 0)
    width = np.dtype(kind).itemsize
    return np.frombuffer((bits & ((1 << 8 * width) - 1)).to_bytes(width, "little"), kind)[0]


def watched_registers(program: Program) -> frozenset[tuple[str, int]]:
    """Accumulators and register operands of all wgmma."""
    found: set[tuple[str, int]] = set()
    for instruction in program.instructions:
        if instruction.opcode.startswith("wgmma.mma_async"):
            operands = (operand for operand in instruction.operands[:2] if isinstance(operand, Vector))
            found.update((register.kind, register.index) for register in registers_in(operands))
    return frozenset(found)
