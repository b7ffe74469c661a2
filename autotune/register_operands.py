"""Whether ptxas lets a register be overwritten while an asynchronous product of Hopper still reads it.

A wgmma whose left operand lies in registers reads them until the wait that retires it (``WARPGROUP.DEPBAR``). NVIDIA
fixed in CUDA 13.3 that ptxas may give such a register to another value earlier
(https://github.com/triton-lang/triton/pull/11781); Triton 3.7 ships ptxas 12.8 for sm_90. This looks for it in SASS:
along every path of the control flow, no instruction may write a register that a product under way reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?)(U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_REGISTER = re.compile(r"R(\d+)")
_ACCUMULATORS = re.compile(r"HGMMA\.64x(\d+)x")
# These give their result behind a predicate; others that begin with a predicate give nothing else.
_BEHIND_A_PREDICATE = ("SHFL", "LOP3", "VOTE", "MATCH")
_NO_RESULT = ("ST", "RED", "BAR", "WARP", "SYNCS", "UTMA", "BRA", "EXIT", "R2UR", "CCTL", "MEMBAR", "ERRBAR", "DEPBAR")
_MOST_GROUPS = 8
_READS_REGISTERS = re.compile(r"\bHGMMA\S* R\d+, R\d+,")


@dataclass(frozen=True)
class _Line:
    address: int
    opcode: str
    operands: tuple[str, ...]
    guarded: bool


# (register, groups committed since, or -1 while its own is open, address of the product)
_Pending = frozenset[tuple[int, int, int]]


def overwritten_operands(sass: str) -> list[str]:
    """Instructions that write a register which a product under way reads, each as a line of text; none in right code.

    ``sass`` is what ``cuobjdump -sass`` prints of one kernel.
    """
    if not _READS_REGISTERS.search(sass):
        return []
    lines = [
        _Line(int(address, 16), opcode, tuple(part.strip() for part in operands.split(",")), bool(guard))
        for address, _, guard, opcode, operands in _LINE.findall(sass)
    ]
    places = {line.address: place for place, line in enumerate(lines)}
    known: list[set[tuple[int, int, int]]] = [set() for _ in lines]
    found: dict[str, None] = {}
    work, started = [0] if lines else [], set()
    while work:
        place = work.pop()
        started.add(place)
        line, before = lines[place], frozenset(known[place])
        for register in _written(line):
            for held, _, product in before:
                if held == register:
                    text = f"{line.address:#06x} {line.opcode} writes R{register}, which HGMMA at {product:#06x} reads"
                    found[text] = None
        after = _after(line, before)
        for following in _following(line, place, places):
            if following < len(lines) and (following not in started or not after <= known[following]):
                known[following] |= after
                work.append(following)
    return list(found)


def _operands_of(line: _Line) -> range:
    """The registers of the left operand, four for elements of 16 bits; none where it lies in shared memory."""
    if line.opcode.startswith("HGMMA") and len(line.operands) > 1:
        register = _REGISTER.match(line.operands[1])
        if register:
            return range(int(register[1]), int(register[1]) + 4)
    return range(0)


def _after(line: _Line, before: _Pending) -> _Pending:
    if line.opcode.startswith("WARPGROUP.DEPBAR"):
        left = int(line.operands[-1], 16)
        return frozenset(entry for entry in before if entry[1] < left)
    pending = set(before) | {(register, -1, line.address) for register in _operands_of(line)}
    if line.opcode.startswith("HGMMA") and "gsb0" in line.operands:
        pending = {(register, min(age + 1, _MOST_GROUPS), product) for register, age, product in pending}
    return frozenset(pending)


def _following(line: _Line, place: int, places: dict[int, int]) -> Iterator[int]:
    if line.opcode.startswith("BRA") and line.operands[-1].strip("`()").startswith("0x"):
        target = int(line.operands[-1].strip("`()"), 16)
        if target in places:
            yield places[target]
        if not line.guarded and len(line.operands) == 1:
            return
    elif line.opcode.startswith("EXIT") and not line.guarded:
        return
    yield place + 1


def _written(line: _Line) -> range:
    """The registers that an instruction writes."""
    if line.opcode.startswith(_NO_RESULT):
        return range(0)
    operands = list(line.operands)
    if line.opcode.startswith(_BEHIND_A_PREDICATE):
        while operands and re.match(r"U?P", operands[0]):
            operands.pop(0)
    register = _REGISTER.match(operands[0]) if operands else None
    if register is None:
        return range(0)
    width = 1
    accumulators = _ACCUMULATORS.match(line.opcode)
    if accumulators:
        width = int(accumulators[1]) // 2
    elif re.search(r"\.128\b|LDSM.*\.4$", line.opcode):
        width = 4
    elif re.search(r"\.64\b|\.WIDE|LDSM.*\.2$|^D(ADD|MUL|FMA)", line.opcode):
        width = 2
    return range(int(register[1]), int(register[1]) + width)
