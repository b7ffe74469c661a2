"""What the threads of a warp do together: sections 9.7.9 and 9.7.13."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from kvops.autotune.machine.instructions.table import Operation, dtype, instruction
from kvops.autotune.machine.ptx import Immediate, Instruction, Operand, Pair, Symbol
from kvops.autotune.machine.team import Team

Array = Any
_LANE = np.arange(32)


def _two_results(operand: Operand, kind: str) -> tuple[tuple[Operand, str], tuple[Operand, str]]:
    pair = operand if isinstance(operand, Pair) else Pair(operand, Symbol("_"))
    return (pair.first, kind), (pair.second, "pred")


@instruction("shfl", section="9.7.9")
def shuffle(found: Instruction) -> Operation:
    if not found.has("sync"):
        raise found.unsupported()
    target, value, other, clamp = found.operands[:4]
    return Operation(
        partial(shuffled, found.parts[2]),
        ((value, "u32"), (other, "u32"), (clamp, "u32")),
        _two_results(target, "u32"),
        machine=True,
    )


def shuffled(
    mode: str, team: Team, mask: Array | None, at: int, value: Array, other: Array, clamp: Array
) -> tuple[Array, Array]:
    """The value of another lane, and whether there was one within the segment; else the lane's own."""
    team.select(mask, at)
    values = team.full(value).reshape(-1, 32)
    other, clamp = (team.full(x).reshape(-1, 32).astype(np.int64) for x in (other, clamp))
    segment, bound = clamp >> 8 & 31, clamp & 31
    last = (_LANE & segment) | (bound & ~segment)
    if mode == "up":
        source = _LANE - (other & 31)
        inside = source >= last
    elif mode == "down":
        source = _LANE + (other & 31)
        inside = source <= last
    elif mode == "bfly":
        source = _LANE ^ (other & 31)
        inside = source <= last
    else:
        source = (_LANE & segment) | (other & ~segment & 31)
        inside = source <= last
    source = np.where(inside, source, _LANE)
    return np.take_along_axis(values, source, 1).reshape(-1), inside.reshape(-1)


@instruction("vote", section="9.7.13")
def vote(found: Instruction) -> Operation:
    mode = found.parts[2]
    result = "u32" if mode == "ballot" else "pred"
    if mode not in ("ballot", "any", "all") or not found.has("sync"):
        raise found.unsupported()
    return Operation(partial(voted, mode), ((found.operands[1], "pred"),), ((found.operands[0], result),), machine=True)


def voted(mode: str, team: Team, mask: Array | None, at: int, value: Array) -> Array:
    """Threads that do not take part count as false; for ``all`` they do not count."""
    team.select(mask, at)
    value = team.full(value)
    if mode == "all":
        votes = (value if mask is None else value | ~mask).reshape(-1, 32).all(1)
    else:
        votes = (value if mask is None else value & mask).reshape(-1, 32)
        if mode == "ballot":
            return np.repeat(np.packbits(votes, axis=1, bitorder="little").view(np.uint32)[:, 0], 32)
        votes = votes.any(1)
    return np.repeat(votes, 32)


@instruction("activemask", section="9.7.13")
def active_mask(found: Instruction) -> Operation:
    def active(team: Team, mask: Array | None, at: int) -> Array:
        return voted("ballot", team, mask, at, np.bool_(True))

    return Operation(active, (), ((found.operands[0], "u32"),), machine=True)


@instruction("redux", section="9.7.13")
def reduce(found: Instruction) -> Operation:
    kind = dtype(found.type)
    sources = (found.operands[1], kind), (found.operands[2], "u32")
    return Operation(partial(reduced, found.parts[2]), sources, ((found.operands[0], kind),), machine=True)


def reduced(operation: str, team: Team, mask: Array | None, at: int, value: Array, members: Array) -> Array:
    """Over the lanes that ``members`` names, the same for all of them."""
    team.select(mask, at)
    values = team.full(value).reshape(-1, 32)
    named = team.full(members).reshape(-1, 32)
    leader = (np.ones(team.size, bool) if mask is None else mask).reshape(-1, 32).argmax(1)
    inside = (named[np.arange(len(named)), leader][:, None] >> _LANE.astype(np.uint32) & np.uint32(1)).astype(bool)
    limits = np.iinfo(values.dtype)
    identity, function = {
        "add": (0, np.add),
        "min": (limits.max, np.minimum),
        "max": (limits.min, np.maximum),
        "and": (np.bitwise_not(values.dtype.type(0)), np.bitwise_and),
        "or": (0, np.bitwise_or),
        "xor": (0, np.bitwise_xor),
    }[operation]
    result = function.reduce(np.where(inside, values, values.dtype.type(identity)), axis=1)
    return np.repeat(result.astype(values.dtype), 32)


@instruction("match", section="9.7.13")
def match(found: Instruction) -> Operation:
    if found.parts[1:3] != ("any", "sync"):
        raise found.unsupported()

    def equal(team: Team, mask: Array | None, at: int, value: Array) -> Array:
        team.select(mask, at)
        values = team.full(value).reshape(-1, 32)
        same = values[:, :, None] == values[:, None, :]
        if mask is not None:
            same = same & mask.reshape(-1, 1, 32)
        return np.packbits(same, axis=2, bitorder="little").view(np.uint32).reshape(-1)

    kind = dtype(found.type)
    return Operation(equal, ((found.operands[1], kind),), ((found.operands[0], "u32"),), machine=True)


@instruction("elect", section="9.7.13")
def elect(found: Instruction) -> Operation:
    """One thread of each warp: the first. Which one it is the manual leaves open."""
    if found.operands[1] != Immediate("-1"):
        raise found.unsupported()
    return Operation(elected, (), _two_results(found.operands[0], "u32"), machine=True)


def elected(team: Team, mask: Array | None, at: int) -> tuple[Array, Array]:
    team.select(mask, at)
    active = (np.ones(team.size, bool) if mask is None else mask).reshape(-1, 32)
    leader = active.argmax(1)
    first = np.zeros_like(active)
    rows = active.any(1)
    first[rows, leader[rows]] = True
    return np.repeat(leader.astype(np.uint32), 32), first.reshape(-1)
