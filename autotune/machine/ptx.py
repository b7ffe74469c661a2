"""Reads PTX: the text that Triton's compiler hands to ptxas, as instructions in basic blocks.

It covers what LLVM and Triton's inline assembly write for one kernel: an ``.entry`` without calls. Anything else raises
:class:`Unsupported` with the line that it could not read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

# Names of registers' arrays by what a declaration says.
_KINDS = {"pred": "pred", **{f"{letter}{bits}": f"u{bits}" for letter in "bsuf" for bits in (16, 32, 64)}, "b8": "u16"}
# What a kernel may leave out and still compile: the mutation table removes these one by one.
_SYNCHRONISATION = (
    "bar.sync",
    "barrier.sync",
    "mbarrier.try_wait",
    "mbarrier.arrive",
    "wgmma.wait_group",
    "cp.async.wait_group",
    "cp.async.bulk.wait_group",
    "fence.proxy",
)


class Unsupported(RuntimeError):  # noqa: N818 - an answer, not a mistake of the machine
    """The machine does not know this piece of PTX."""


@dataclass(frozen=True)
class Register:
    """``kind`` is "pred", "u16", "u32" or "u64"; ``index`` its row among the registers of that kind."""

    kind: str
    index: int


@dataclass(frozen=True)
class Immediate:
    text: str


@dataclass(frozen=True)
class Symbol:
    """A special register, a parameter, a label or ``global_smem``; ``_`` is a result that nobody wants."""

    name: str


@dataclass(frozen=True)
class Vector:
    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """``[base + offset]``, or ``[descriptor, {coordinates}]`` of a tensor copy."""

    base: Register | Symbol | Immediate
    offset: int = 0
    coordinates: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Pair:
    """``value|predicate``: two results."""

    first: Operand
    second: Operand


Operand = Register | Immediate | Symbol | Vector | Address | Pair


@dataclass(frozen=True)
class Place:
    """Where an instruction comes from."""

    file: str
    line: int
    text: str
    kernel_line: str = ""  # "kernel.py:12": where the kernel calls what this is part of, if it is no line of its own

    def __str__(self) -> str:
        inside = f" in {self.kernel_line}" if self.kernel_line else ""
        return f"{self.file.rsplit('/', 1)[-1]}:{self.line}{inside}  {self.text[:100]}"


@dataclass(frozen=True)
class Instruction:
    """One instruction; ``index`` counts those of the source, removed ones included."""

    index: int
    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    place: Place

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """``("setp", "lt", "s32")``; what stands behind ``::`` belongs to its part."""
        return tuple(self.opcode.split("."))

    @property
    def base(self) -> str:
        return self.parts[0]

    @property
    def type(self) -> str:
        return self.parts[-1]

    def has(self, part: str) -> bool:
        return part in self.parts

    def unsupported(self) -> Unsupported:
        return Unsupported(f"{self.opcode}: this form is not known ({self.place})")


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter; ``type`` is "u64", "f32" ... and "b8" for a tensor descriptor of 128 bytes."""

    type: str
    name: str


_STATEMENT = re.compile(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+\.global\s+\.align\s+\d+\s+)?(\w+)")
_ENDS_A_BLOCK = ("bra", "brx", "ret", "exit")


class Program:
    """One kernel: parameters, registers and basic blocks.

    ``without`` names instructions (by index) to leave out; a wait that is left out succeeds at once.
    """

    def __init__(self, ptx: str, without: Collection[int] = ()) -> None:
        header = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)", ptx, re.DOTALL)
        if header is None:
            raise Unsupported("no .entry in this PTX")
        self.name = header[1]
        self.parameters = [Parameter(*found) for found in _PARAMETER.findall(header[2])]
        self.files = {int(number): path for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', ptx)}
        self.register_counts = {"pred": 0, "u16": 0, "u32": 0, "u64": 0}
        self.labels: dict[str, int] = {}
        self.tables: dict[str, list[str]] = {}
        self.instructions: list[Instruction] = []
        self.blocks: list[list[Instruction]] = [[]]
        self.functions: dict[tuple[int, bool], Callable[..., Any]] = {}  # what was made of the blocks, see translate
        self.updates: dict[int, Any] | None = None  # see updates
        self._registers: dict[str, Register] = {}
        for entry in _Body(ptx[header.end() :], self):
            if isinstance(entry, str):
                self._start_block()
                self.labels[entry] = len(self.blocks) - 1
                continue
            self.instructions.append(entry)
            if entry.index in without:
                if entry.opcode.startswith("mbarrier.try_wait"):
                    self.blocks[-1].append(_always_true(entry))
                continue
            self.blocks[-1].append(entry)
            if entry.base in _ENDS_A_BLOCK or is_barrier(entry):
                self._start_block()
        if not self.blocks[-1]:
            self.blocks.pop()

    def _start_block(self) -> None:
        if self.blocks[-1]:
            self.blocks.append([])

    def declare(self, name: str, kind: str) -> None:
        if kind not in _KINDS:
            raise Unsupported(f"a register of type .{kind}")
        kind = _KINDS[kind]
        self._registers[name] = Register(kind, self.register_counts[kind])
        self.register_counts[kind] += 1

    def register(self, name: str) -> Register | None:
        return self._registers.get(name)

    @cached_property
    def synchronisation(self) -> list[Instruction]:
        """Barriers, waits, arrivals and fences: what the mutation table removes."""
        return [entry for entry in self.instructions if entry.opcode.startswith(_SYNCHRONISATION)]

    @cached_property
    def in_loops(self) -> frozenset[int]:
        """Instructions between a label and a later branch back to it."""
        found: set[int] = set()
        for number, block in enumerate(self.blocks):
            for entry in block:
                target = entry.operands[0] if entry.base == "bra" else None
                first = self.labels.get(target.name, number + 1) if isinstance(target, Symbol) else number + 1
                for passed in self.blocks[first : number + 1]:
                    found.update(each.index for each in passed)
        return frozenset(found)

    @cached_property
    def granules(self) -> dict[str, int]:
        """By space: the size in bytes of the smallest access, so that shadow memory needs no finer cells."""
        found = {"shared": 16, "global": 16}
        for entry in self.instructions:
            size = 4
            if entry.base in ("ld", "st", "atom", "red"):
                size = int(re.sub(r"\D", "", entry.type)) // 8
            elif entry.opcode.startswith(("cp.async.ca", "cp.async.cg")):
                assert isinstance(entry.operands[2], Immediate)
                size = int(entry.operands[2].text, 0)
            elif entry.opcode.startswith(("cp.async.bulk.tensor", "wgmma.mma_async")):
                size = 2
            elif entry.base not in ("ldmatrix", "stmatrix"):
                continue
            for space in found:
                if any(part.startswith(space) for part in entry.parts) or entry.base in ("wgmma",):
                    found[space] = min(found[space], size)
        return found


def registers_in(operands: Iterable[Operand]) -> set[Register]:
    """Every register that these operands name, in vectors and addresses, too."""
    found: set[Register] = set()
    for operand in operands:
        if isinstance(operand, Register):
            found.add(operand)
        elif isinstance(operand, Vector):
            found |= registers_in(operand.parts)
        elif isinstance(operand, Pair):
            found |= registers_in((operand.first, operand.second))
        elif isinstance(operand, Address):
            found |= registers_in((operand.base, *operand.coordinates))
    return found


def is_barrier(instruction: Instruction) -> bool:
    return instruction.opcode in ("bar.sync", "barrier.sync", "barrier.sync.aligned")


def _always_true(wait: Instruction) -> Instruction:
    operands = wait.operands[0], Immediate("1")
    return Instruction(wait.index, "mov.pred", operands, None, False, wait.place)


class _Body:
    """Yields the labels and instructions of a kernel's body and declares its registers."""

    def __init__(self, text: str, program: Program) -> None:
        self.text, self.program = text, program
        self.location = (0, 0, "")
        self.count = 0
        self.scope = self.scopes = 0
        self.label = ""
        self.table: list[str] | None = None
        self.operands: dict[tuple[int, str], Operand] = {}

    def __iter__(self) -> Iterator[str | Instruction]:
        inside = False
        for raw in self.text.splitlines():
            line, _, comment = (part.strip() for part in raw.partition("//"))
            if not inside:
                inside = line == "{"
                continue
            if line == "}" and not self.scope:
                return
            if line:
                yield from self._line(line, comment)

    def _line(self, line: str, comment: str) -> Iterator[str | Instruction]:
        program = self.program
        if self.table is not None or ".branchtargets" in line:
            self._targets(line)
        elif line[0] not in ".{}" and line[-1] != ":":
            for statement in filter(None, map(str.strip, line.split(";"))):
                yield self._instruction(statement)
        elif line == "{":
            self.scopes += 1
            self.scope = self.scopes
        elif line == "}":
            self.scope = 0
        elif found := re.match(r"\.loc\s+(\d+)\s+(\d+)", line):
            # Of a line that is inlined, LLVM says in the comment where: the last place is the kernel's own.
            inlined = re.findall(r"@\[ ([\w.]+:\d+)", comment)
            self.location = int(found[1]), int(found[2]), inlined[-1] if inlined else ""
        elif found := re.match(r"\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>", line):
            for number in range(int(found[3])):
                program.declare(f"{found[2]}{number}", found[1])
        elif found := re.match(r"\.reg\s+\.(\w+)\s+([%\w]+);", line):
            program.declare(self._scoped(found[2]), found[1])
        elif found := re.match(r"(\$?\w+):$", line):
            self.label = found[1]
            if not found[1].startswith(("$L__tmp", "$L__func")):
                yield self._scoped(found[1])
        elif not line.startswith(".pragma"):
            raise Unsupported(line)

    def _targets(self, line: str) -> None:
        if self.table is None:
            name, _, line = line.partition(".branchtargets")  # the name stands before it, or on the line before
            self.table = self.program.tables[name.strip(" :") or self.label] = []
        self.table += re.findall(r"\$\w+", line)
        if line.endswith(";"):
            self.table = None

    def _scoped(self, name: str) -> str:
        return f"{name}@{self.scope}" if self.scope and not name.startswith(("%", "$")) else name

    def _instruction(self, statement: str) -> Instruction:
        found = _STATEMENT.match(statement)
        if not found:
            raise Unsupported(statement)
        file, line, kernel_line = self.location
        place = Place(self.program.files.get(file, "?"), line, " ".join(statement.split()), kernel_line)
        guard = self._register(found[2]) if found[2] else None
        operands = tuple(self._known_operand(text) for text in _split(found[4]))
        instruction = Instruction(self.count, found[3], operands, guard, bool(found[1]), place)
        self.count += 1
        return instruction

    def _register(self, name: str) -> Register | None:
        return self.program.register(self._scoped(name))

    def _known_operand(self, text: str) -> Operand:
        """Most registers are named many times."""
        key = self.scope, text
        operand = self.operands.get(key)
        if operand is None:
            operand = self.operands[key] = self._operand(text)
        return operand

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1].strip())
        if "|" in text:
            first, second = (self._operand(part.strip()) for part in text.split("|"))
            return Pair(first, second)
        register = self._register(text)
        if register is not None:
            return register
        if re.match(r"-?\d", text):
            return Immediate(text)
        return Symbol(self._scoped(text))

    def _address(self, text: str) -> Address:
        first, *rest = _split(text)
        if rest:
            base, coordinates = self._operand(first), self._operand(rest[0])
            assert isinstance(base, Register)
            assert isinstance(coordinates, Vector)
            return Address(base, 0, coordinates.parts)
        found = re.match(r"([%\w]+)\s*(?:\+\s*(-?\w+))?$", first)
        if not found:
            raise Unsupported(f"[{text}]")
        base = self._operand(found[1])
        assert isinstance(base, (Register, Symbol, Immediate))
        return Address(base, int(found[2] or "0", 0))


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    if "{" not in text and "[" not in text:
        return [part.strip() for part in text.split(",")] if text else []
    found, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and not depth:
            found.append(current.strip())
            current = ""
        else:
            current += character
    return [*found, current.strip()] if current.strip() else found
