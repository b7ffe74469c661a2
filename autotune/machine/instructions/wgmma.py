"""Products of a warp group, which go on by themselves: section 9.7.15 (wgmma)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from kvops.autotune.machine.instructions.asynchronous import _count
from kvops.autotune.machine.instructions.matrix import parts, widened
from kvops.autotune.machine.instructions.table import Operation, instruction
from kvops.autotune.machine.memory import SHARED_WINDOW
from kvops.autotune.machine.ptx import Immediate, Instruction, Register, Vector
from kvops.autotune.machine.team import Team

Array = Any
_GROUP = 128  # threads of a warp group


@dataclass
class Product:
    """One wgmma under way: what it reads in shared memory, and its registers."""

    at: int
    accumulators: frozenset[tuple[str, int]]
    held: frozenset[tuple[str, int]]
    reads: list[tuple[Array, Array]]


@instruction("wgmma", section="9.7.15")
def warp_group(found: Instruction) -> Operation:
    kind = found.parts[1]
    if kind == "fence":
        return Operation(lambda: None, (), ())
    if kind == "commit_group":
        return Operation(commit, (), (), machine=True)
    if kind == "wait_group":
        return Operation(partial(wait, _count(found)), (), (), machine=True)
    shape = re.match(r"m64n(\d+)k16$", found.parts[4])
    types = found.parts[5:]
    if kind != "mma_async" or shape is None or types not in (("f32", "f16", "f16"), ("f32", "bf16", "bf16")):
        raise found.unsupported()
    return _product(found, int(shape[1]), types[1])


def _registers(operand: Any) -> frozenset[tuple[str, int]]:
    return frozenset((part.kind, part.index) for part in parts(operand) if isinstance(part, Register))


def _product(found: Instruction, columns: int, kind: str) -> Operation:
    d, a, b, keep, *flags = found.operands
    numbers = []
    for flag in flags:
        assert isinstance(flag, Immediate)
        numbers.append(int(flag.text, 0))
    sign = numbers[0] * numbers[1]
    in_registers = isinstance(a, Vector)
    transposed = (0, numbers[2]) if in_registers else (numbers[2], numbers[3])
    left = tuple((operand, "u32") for operand in parts(a)) if in_registers else ((a, "u64"),)
    targets = tuple((operand, "f32") for operand in parts(d))
    held = _registers(a) if in_registers else frozenset()
    function = partial(multiply, columns, kind, sign, transposed, len(left), _registers(d), held)
    return Operation(
        function, ((b, "u64"), (keep, "pred"), *left, *targets), targets, machine=True, tensor_product=True
    )


def multiply(
    columns: int,
    kind: str,
    sign: int,
    transposed: tuple[int, int],
    left_count: int,
    accumulators: frozenset[tuple[str, int]],
    held: frozenset[tuple[str, int]],
    team: Team,
    mask: Array | None,
    at: int,
    right: Array,
    keep: Array,
    *operands: Array,
) -> list[Array]:
    """D = A B + D, or A B where ``keep`` is false, of 64 rows to a warp group. Until ``wait_group`` says that it is
    over, nobody may touch D, write to the registers of A, or write to the operands in shared memory."""
    team.select(mask, at)
    if (mask is not None and not mask.all()) or team.size % _GROUP:
        raise NotImplementedError("wgmma by a part of a warp group: run whole warp groups in step")
    groups = team.size // _GROUP
    product = Product(at, accumulators, held, [])
    team.products.append(product)
    touched = held & team.accumulators.keys()
    if touched:
        first = team.accumulators[next(iter(touched))]
        team.grid.execution.fault("an accumulator is touched before wgmma.wait_group", at, other=first)
    team.accumulators.update(dict.fromkeys(accumulators, at))
    team.held.update(dict.fromkeys(held, at))
    left, d = operands[:left_count], operands[left_count:]
    if left_count > 1:
        bits = np.stack([team.full(x) for x in left], 1).view(np.uint16)
        # [group, warp, g, t, (k half, row half), pair] -> [group, (warp, row half, g), (k half, t, pair)]
        a = widened(kind, bits).reshape(groups, 4, 8, 4, 2, 2, 2).transpose(0, 1, 5, 2, 4, 3, 6).reshape(groups, 64, 16)
    else:
        a = widened(kind, _operand(team, product, left[0], 64, bool(transposed[0]), at))
    b = widened(kind, _operand(team, product, right, columns, bool(transposed[1]), at))
    result = np.matmul(a, b.transpose(0, 2, 1)) * np.float32(sign)
    # [group, (warp, half, g), (tile, t, pair)] -> [(tile, half, pair), (group, warp, g, t)]
    result = result.reshape(groups, 4, 2, 8, columns // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
    result = result.reshape(columns // 2, team.size)
    keep = team.full(keep)
    return [result[place] + np.where(keep, value, np.float32(0)) for place, value in enumerate(d)]


@lru_cache(maxsize=512)
def _pattern(
    rows: int, transposed: bool, leading: int, stride: int, swizzle: int, offset: int, granule: int
) -> tuple[Array, Array]:
    """Byte addresses of [rows, 16] elements of 2 bytes, and their cells, relative to the last multiple of 1024."""
    bits = {0: 0, 1: 3, 2: 2, 3: 1}[swizzle]
    width = 16 << bits
    row, column = np.arange(rows)[:, None], np.arange(16)[None, :]
    if transposed:
        # Rows lie side by side, width / 2 of them, then ``leading`` bytes further.
        held = width // 2
        place = row // held * leading + column // 8 * stride + column % 8 * width + row % held * 2
    elif bits == 0:
        place = row // 8 * stride + column // 8 * leading + row % 8 * 16 + column % 8 * 2
    else:
        place = row // 8 * stride + row % 8 * width + column * 2
    address = offset + place
    address = address ^ ((address >> 7 & (1 << bits) - 1) << 4)
    return address, np.unique(address // granule)


def _operand(team: Team, product: Product, descriptor: Array, rows: int, transposed: bool, at: int) -> Array:
    """[groups, rows, 16] elements, as their bits, that a matrix descriptor names for each warp group."""
    shared = team.grid.shared
    found = []
    for group, value in enumerate(team.full(descriptor)[::_GROUP].tolist()):
        start, leading, stride = ((value >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        # Addresses here begin at SHARED_WINDOW, a multiple of 1024: the pattern of the swizzle is the same.
        address, cells = _pattern(rows, transposed, leading, stride, value >> 62 & 3, start % 1024, shared.granule)
        base = start - start % 1024
        low, high = base + int(address.min()), base + int(address.max()) + 2
        if low < SHARED_WINDOW or high > SHARED_WINDOW + shared.size:
            detail = f"an operand of a wgmma at bytes {low - SHARED_WINDOW} to {high - SHARED_WINDOW} of {shared.size}"
            team.grid.execution.fault("out of bounds", at, detail)
            found.append(np.zeros((rows, 16), np.uint16))
            continue
        first = group * _GROUP
        offset = base + int(team.shared_base[first])
        if shared.shadow is not None:
            lanes = np.arange(first, first + _GROUP, 32)
            cells = cells + offset // shared.granule
            shared.shadow.read_asynchronously(team, lanes, cells, at, "a wgmma")
            product.reads.append((lanes, cells))
        found.append(shared.views[2][(address + offset) >> 1])
    return np.stack(found)


def commit(team: Team, mask: Array | None, at: int) -> None:
    team.select(mask, at)
    team.product_groups.append(team.products)
    team.products = []


def wait(count: int, team: Team, mask: Array | None, at: int) -> None:
    team.select(mask, at)
    shadow = team.grid.shared.shadow
    while len(team.product_groups) > count:
        for product in team.product_groups.popleft():
            for lanes, cells in product.reads:
                assert shadow is not None
                shadow.finish_reading(team, lanes, cells)
    left = [product for group in (*team.product_groups, team.products) for product in group]
    team.accumulators = {register: product.at for product in left for register in product.accumulators}
    team.held = {register: product.at for product in left for register in product.held}
