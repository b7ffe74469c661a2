"""Matrix products of a warp and the loads and stores that feed them: section 9.7.14."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from kvops.autotune.machine.instructions.convert import from_bfloat16
from kvops.autotune.machine.instructions.table import Operation, instruction
from kvops.autotune.machine.ptx import Instruction, Vector
from kvops.autotune.machine.team import Team

Array = Any


def parts(operand: Any) -> tuple[Any, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def widened(kind: str, bits: Array) -> Array:
    """Elements of 16 bits as float32."""
    return bits.view(np.float16).astype(np.float32) if kind == "f16" else from_bfloat16(bits)


@instruction("mma", section="9.7.14")
def matrix_product(found: Instruction) -> Operation:
    """``m16n8k16`` of halves and ``m16n8k8`` of tf32, summed in float32."""
    shape, types = found.parts[3], found.parts[6:]
    known = (shape == "m16n8k16" and types[1] in ("f16", "bf16")) or (shape == "m16n8k8" and types[1] == "tf32")
    if not known or types != ("f32", types[1], types[1], "f32") or found.parts[4:6] != ("row", "col"):
        raise found.unsupported()
    d, a, b, c = (parts(operand) for operand in found.operands)
    sources = tuple((operand, "u32") for operand in a + b) + tuple((operand, "f32") for operand in c)
    results = tuple((operand, "f32") for operand in d)
    return Operation(partial(product, types[1]), sources, results, machine=True)


def product(kind: str, team: Team, mask: Array | None, at: int, *registers: Array) -> list[Array]:
    """D = A B + C. Lane ``4 g + t`` holds rows ``g`` and ``g + 8`` of A and D, and column ``g`` of B."""
    team.select(mask, at)
    registers = tuple(np.ascontiguousarray(team.full(register)) for register in registers)
    warps = team.size // 32
    a, b, c = np.stack(registers[:4], 1), np.stack(registers[4:6], 1), registers[6:]
    if kind == "tf32":
        # Ten bits of fraction are kept; the hardware drops the others.
        a, b = ((x & np.uint32(0xFFFFE000)).view(np.float32) for x in (a, b))
        left = a.reshape(warps, 8, 4, 2, 2).transpose(0, 4, 1, 3, 2).reshape(warps, 16, 8)
        right = b.reshape(warps, 8, 4, 2).transpose(0, 3, 2, 1).reshape(warps, 8, 8)
    else:
        a, b = (widened(kind, x.view(np.uint16)).reshape(warps, 8, 4, -1, 2) for x in (a, b))
        # [warp, g, t, (k half, row half), pair] -> [warp, (row half, g), (k half, t, pair)]
        left = a.reshape(warps, 8, 4, 2, 2, 2).transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, 16)
        right = b.transpose(0, 3, 2, 4, 1).reshape(warps, 16, 8)
    d = np.matmul(left, right).reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, team.size)
    return [d[place] + c[place] for place in range(4)]


@instruction("ldmatrix", section="9.7.14")
def load_matrix(found: Instruction) -> Operation:
    if not found.has("m8n8") or found.type != "b16":
        raise found.unsupported()
    target, address = found.operands
    results = tuple((operand, "u32") for operand in parts(target))
    function = partial(loaded_rows, len(results), found.has("trans"))
    return Operation(function, ((address, "u32"),), results, machine=True)


def loaded_rows(count: int, transposed: bool, team: Team, mask: Array | None, at: int, address: Array) -> Any:
    """``count`` matrices of 8 rows of 16 bytes; lane ``8 i + r`` has the address of row ``r`` of matrix ``i``."""
    shared = team.grid.shared
    lanes = team.select(mask, at)
    lanes = lanes[team.lane[lanes] < 8 * count]
    where = team.full(address)[lanes].astype(np.int64)
    lanes, index, cells = shared.locate(team, lanes, where, 16, at, "a load of matrix rows")
    team.grid.count_access(team, at, shared, lanes, index, 16)
    if shared.shadow is not None and lanes.size:
        shared.shadow.read(team, lanes, cells, at)
    rows = np.zeros((team.size, 8), np.uint16)
    rows[lanes] = shared.views[2][(index >> 1)[:, None] + np.arange(8)]
    matrices = rows.reshape(-1, 4, 8, 8)
    found = []
    for place in range(count):
        matrix = matrices[:, place].transpose(0, 2, 1) if transposed else matrices[:, place]
        found.append(np.ascontiguousarray(matrix).reshape(-1, 32, 2).view(np.uint32).reshape(-1))
    return found if count > 1 else found[0]


@instruction("stmatrix", section="9.7.14")
def store_matrix(found: Instruction) -> Operation:
    if not found.has("m8n8") or found.type != "b16":
        raise found.unsupported()
    address, source = found.operands
    sources = ((address, "u32"), *((operand, "u32") for operand in parts(source)))
    return Operation(partial(stored_rows, found.has("trans")), sources, (), machine=True)


def stored_rows(transposed: bool, team: Team, mask: Array | None, at: int, address: Array, *registers: Array) -> None:
    shared = team.grid.shared
    lanes = team.select(mask, at)
    lanes = lanes[team.lane[lanes] < 8 * len(registers)]
    where = team.full(address)[lanes].astype(np.int64)
    lanes, index, cells = shared.locate(team, lanes, where, 16, at, "a store of matrix rows")
    team.grid.count_access(team, at, shared, lanes, index, 16)
    rows = np.zeros((team.size // 32, 4, 8, 8), np.uint16)
    for place, register in enumerate(registers):
        matrix = np.ascontiguousarray(team.full(register)).view(np.uint16).reshape(-1, 8, 8)
        rows[:, place] = matrix.transpose(0, 2, 1) if transposed else matrix
    values = rows.reshape(team.size, 8)[lanes]
    places = (index >> 1)[:, None] + np.arange(8)

    def same() -> Array:
        return (shared.views[2][places] == values).all(1)

    if shared.shadow is not None and lanes.size:
        shared.shadow.write(team, lanes, cells, at, same)
    shared.views[2][places] = values
    if shared.shadow is not None and team.wide:
        shared.shadow.meet(team, lanes, cells, at, same)
