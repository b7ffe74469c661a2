"""Loads, stores and atomic operations: sections 9.7.9 and 9.7.13."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from kvops.autotune.machine.instructions.matrix import parts
from kvops.autotune.machine.instructions.table import Operation, dtype, instruction
from kvops.autotune.machine.memory import UNSIGNED
from kvops.autotune.machine.ptx import Address, Instruction, Symbol
from kvops.autotune.machine.races import GlobalShadow
from kvops.autotune.machine.team import Team

Array = Any


def space_of(found: Instruction) -> str:
    for part in found.parts:
        if part in ("global", "shared", "shared::cta"):
            return part.split("::")[0]
    raise found.unsupported()


def _address_kind(space: str) -> str:
    return "u32" if space == "shared" else "u64"


@instruction("ld", section="9.7.9")
def load(found: Instruction) -> Operation:
    targets, address = parts(found.operands[0]), found.operands[1]
    size, kind = int(found.type[1:]) // 8, dtype(found.type)
    results = tuple((operand, kind) for operand in targets)
    if found.has("param"):
        if not (isinstance(address, Address) and isinstance(address.base, Symbol)) or address.offset:
            raise found.unsupported()
        return Operation(partial(parameter, address.base.name, size, kind), (), results, machine=True)
    space = space_of(found)
    function = partial(loaded, space, size, len(results), kind)
    return Operation(function, ((address, _address_kind(space)),), results, machine=True)


def parameter(name: str, size: int, kind: str, team: Team, mask: Array | None, at: int) -> Any:
    team.select(mask, at)
    raw = team.grid.parameters[name][:size].ljust(size, b"\0")
    return np.frombuffer(raw, f"{kind[0]}{size}")[0]


def loaded(
    space: str, size: int, count: int, kind: str, team: Team, mask: Array | None, at: int, address: Array
) -> Any:
    """``count`` values of ``size`` bytes, one behind the other; an inactive thread gets zeros, which are not stored."""
    memory = team.grid.space(space)
    lanes = team.select(mask, at)
    where = team.full(address) if mask is None else team.full(address)[lanes]
    where = where.astype(np.int64)
    lanes, index, cells = memory.locate(team, lanes, where, size * count, at, "a load")
    team.grid.count_access(team, at, memory, lanes, index, size * count)
    if memory.shadow is not None and lanes.size:
        memory.shadow.read(team, lanes, cells, at)
    values = []
    for place in range(count):
        value = memory.read(index + place * size, size)
        if lanes.size != team.size:
            full = np.zeros(team.size, UNSIGNED[size])
            full[lanes] = value
            value = full
        values.append(value.view(f"{kind[0]}{size}"))
    return values[0] if count == 1 else values


@instruction("st", section="9.7.9")
def store(found: Instruction) -> Operation:
    space, size = space_of(found), int(found.type[1:]) // 8
    address, values = found.operands[0], parts(found.operands[1])
    sources = ((address, _address_kind(space)), *((operand, f"u{8 * size}") for operand in values))
    return Operation(partial(stored, space, size), sources, (), machine=True)


def stored(space: str, size: int, team: Team, mask: Array | None, at: int, address: Array, *values: Array) -> None:
    memory = team.grid.space(space)
    lanes = team.select(mask, at)
    where = team.full(address) if mask is None else team.full(address)[lanes]
    where = where.astype(np.int64)
    lanes, index, cells = memory.locate(team, lanes, where, size * len(values), at, "a store")
    if isinstance(memory.shadow, GlobalShadow):
        memory.shadow.settle(team, lanes, cells, at)
    if not lanes.size:
        return
    team.grid.count_access(team, at, memory, lanes, index, size * len(values))
    held = [team.full(value)[lanes] for value in values]

    def same() -> Array:
        there = [memory.read(index + place * size, size) == value for place, value in enumerate(held)]
        return np.logical_and.reduce(there)

    if memory.shadow is not None:
        memory.shadow.write(team, lanes, cells, at, same)
    for place, value in enumerate(held):
        memory.write(index + place * size, size, value)
    if memory.shadow is not None:
        lost = ~same()
        if lost.any():
            team.grid.execution.fault("threads store different values in one place", at, lanes=int(lost.sum()))
        if team.wide:
            memory.shadow.meet(team, lanes, cells, at, same)


_ATOMIC: dict[str, Any] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
}


@instruction("atom", "red", section="9.7.13")
def atomic(found: Instruction) -> Operation:
    space, kind = space_of(found), dtype(found.type)
    operation = next((part for part in found.parts if part in (*_ATOMIC, "cas")), None)
    operands = found.operands if found.base == "red" else found.operands[1:]
    results = () if found.base == "red" else ((found.operands[0], kind),)
    if operation is None or len(operands) != (3 if operation == "cas" else 2):
        raise found.unsupported()
    sources = ((operands[0], _address_kind(space)), *((operand, kind) for operand in operands[1:]))
    return Operation(partial(atomically, space, operation, kind), sources, results, machine=True)


def atomically(
    space: str, operation: str, kind: str, team: Team, mask: Array | None, at: int, address: Array, *values: Array
) -> Array:
    """Thread by thread, in an order drawn from the seed."""
    memory = team.grid.space(space)
    lanes = team.select(mask, at)
    size = int(kind[1:]) // 8
    where = team.full(address)[lanes].astype(np.int64)
    lanes, index, cells = memory.locate(team, lanes, where, size, at, "an atomic operation")
    team.grid.count_access(team, at, memory, lanes, index, size)
    if memory.shadow is not None and lanes.size:
        if not memory.shadow.initialised[cells].all():
            team.grid.execution.fault(f"{memory.name} is read before it is written", at)
        memory.shadow.write(team, lanes, cells, at, atomic=True)
    held = [team.full(value)[lanes] for value in values]
    result = np.zeros(team.size, f"{kind[0]}{size}")
    words = memory.views[size].view(result.dtype)
    places = index >> (size.bit_length() - 1)
    for turn in team.grid.numbers.permutation(lanes.size):
        old = words[places[turn]]
        result[lanes[turn]] = old
        if operation != "cas":
            words[places[turn]] = _ATOMIC[operation](old, held[0][turn])
        elif old == held[0][turn]:
            words[places[turn]] = held[1][turn]
    return result
