"""Copies that go on by themselves, mbarriers and fences: sections 9.7.9 (cp.async, TMA) and 9.7.13 (mbarrier)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from kvops.autotune.machine.instructions.table import Operation, instruction
from kvops.autotune.machine.ptx import Address, Immediate, Instruction, Operand
from kvops.autotune.machine.team import Team

Array = Any


@dataclass
class Copy:
    """A cp.async under way; ``group`` has, by lane, the number of the commit that it belongs to."""

    lanes: Array
    index: Array
    cells: Array
    data: Array
    group: Array
    at: int


@dataclass
class Store:
    """A TMA store under way."""

    lane: int
    index: Array
    cells: Array
    target: Array
    inside: Array
    size: int
    at: int


@dataclass
class Descriptor:
    """What a tensor copy knows of its tensor: strides in elements, ``swizzle`` as bits of the address (0 to 3)."""

    base: int
    shape: list[int]
    strides: list[int]
    box: list[int]
    size: int
    swizzle: int


@dataclass
class MBarrier:
    """``completed`` counts phases, ``transactions`` bytes that are still to come in this one; ``knowledge`` is what
    those who arrived in this phase knew, ``announced`` what a wait for the last phase tells."""

    number: int
    count: int
    pending: int
    owner: int
    owner_clock: int
    knowledge: Array
    announced: Array
    completed: int = 0
    transactions: int = 0
    copies: list[tuple[Array, Array, Array, int]] = field(default_factory=list)

    def settle(self, num_warps: int) -> None:
        if self.pending == 0 and self.transactions == 0:
            self.completed += 1
            self.pending = self.count
            self.knowledge[num_warps + self.number] = self.completed
            self.announced = self.knowledge.copy()


@instruction("cp", section="9.7.9")
def copy(found: Instruction) -> Operation:
    rest = found.parts[1:]
    if rest[:2] == ("async", "bulk"):
        return _bulk(found)
    if rest[:2] == ("async", "commit_group"):
        return Operation(commit, (), (), machine=True)
    if rest[:2] in (("async", "wait_group"), ("async", "wait_all")):
        return Operation(partial(wait, _count(found)), (), (), machine=True)
    if rest[:2] not in (("async", "ca"), ("async", "cg")):
        raise found.unsupported()
    target, source, size, *held = found.operands
    assert isinstance(size, Immediate)
    sources = ((target, "u32"), (source, "u64"), *((operand, "u32") for operand in held))
    return Operation(partial(begin_copy, int(size.text, 0)), sources, (), machine=True)


def _count(found: Instruction) -> int:
    if not found.operands:
        return 0
    (number,) = found.operands
    assert isinstance(number, Immediate)
    return int(number.text, 0)


def begin_copy(
    size: int, team: Team, mask: Array | None, at: int, target: Array, source: Array, held: Array | None = None
) -> None:
    """``size`` bytes to shared memory; beyond the first ``held`` bytes zeros, which are read from nowhere. The bytes
    arrive at the wait, as late as they may."""
    grid = team.grid
    lanes = team.select(mask, at)
    where = team.full(target)[lanes].astype(np.int64)
    lanes, index, cells = grid.shared.locate(team, lanes, where, size, at, "the target of a copy")
    length = team.full(np.uint32(size) if held is None else held)[lanes]
    if not np.isin(length, (0, size)).all():
        raise NotImplementedError(f"cp.async of {size} bytes, of which some are held")
    reading = length > 0
    where = team.full(source)[lanes[reading]].astype(np.int64)
    readers, origin, read_cells = grid.memory.locate(team, lanes[reading], where, size, at, "the source of a copy")
    grid.count_access(team, at, grid.memory, readers, origin, size)
    grid.count_access(team, at, grid.shared, lanes, index, size)
    data = np.zeros((lanes.size, size), np.uint8)
    if readers.size:
        if grid.memory.shadow is not None:
            grid.memory.shadow.read(team, readers, read_cells, at)
        data[np.searchsorted(lanes, readers)] = grid.memory.views[1][origin[:, None] + np.arange(size)]
    if grid.shared.shadow is not None and lanes.size:
        grid.shared.shadow.write(team, lanes, cells, at)
        grid.shared.shadow.asynchronous = True
        np.add.at(grid.shared.shadow.copies, cells, 1)
    team.copies.append(Copy(lanes, index, cells, data, team.commits[lanes], at))


def commit(team: Team, mask: Array | None, at: int) -> None:
    team.commits[team.select(mask, at)] += 1


def wait(count: int, team: Team, mask: Array | None, at: int) -> None:
    """For all groups of these threads but the last ``count``; ``cp.async.wait_all`` is a wait for 0 after a commit."""
    lanes = team.select(mask, at)
    waiting = np.zeros(team.size, bool)
    waiting[lanes] = True
    left = []
    for under_way in team.copies:
        finished = waiting[under_way.lanes] & (under_way.group < team.commits[under_way.lanes] - count)
        if finished.any():
            _finish(team, under_way, finished)
        if not finished.all():
            keep = ~finished
            left.append(
                Copy(
                    under_way.lanes[keep],
                    under_way.index[keep],
                    under_way.cells[keep],
                    under_way.data[keep],
                    under_way.group[keep],
                    under_way.at,
                )
            )
    team.copies = left


def _finish(team: Team, under_way: Copy, finished: Array) -> None:
    shared = team.grid.shared
    cells, lanes = under_way.cells[finished], under_way.lanes[finished]
    if shared.shadow is not None:
        np.subtract.at(shared.shadow.copies, cells, 1)
        shared.shadow.write(team, lanes, cells, under_way.at)
    size = under_way.data.shape[1]
    shared.views[1][under_way.index[finished][:, None] + np.arange(size)] = under_way.data[finished]


# --- tensor copies ---


def _bulk(found: Instruction) -> Operation:
    rest = found.parts[3:]
    if rest[0] == "commit_group":
        return Operation(commit_stores, (), (), machine=True)
    if rest[0] == "wait_group":
        return Operation(partial(wait_for_stores, _count(found)), (), (), machine=True)
    if rest[0] != "tensor" or not isinstance(found.operands[0], Address):
        raise found.unsupported()
    function: Callable[..., None]
    ends: tuple[Operand, ...]
    if rest[2:4] == ("shared::cta", "global"):
        target, tensor, barrier = found.operands
        function, ends = begin_load, (target, barrier)
    elif rest[2:4] == ("global", "shared::cta"):
        tensor, target = found.operands
        function, ends = begin_store, (target,)
    else:
        raise found.unsupported()
    assert isinstance(tensor, Address)
    sources = (
        (tensor.base, "u64"),
        *((operand, "u32") for operand in ends),
        *((coordinate, "i32") for coordinate in tensor.coordinates),
    )
    return Operation(function, sources, (), machine=True)


def _box(team: Team, lane: int, descriptor: Descriptor, shared: int, coordinates: list[Array]) -> tuple[Array, ...]:
    """(element addresses, whether they are inside of the tensor, byte addresses in shared memory) of a box."""
    start = [int(team.full(coordinate)[lane]) for coordinate in reversed(coordinates)]
    index = np.meshgrid(*(s + np.arange(n) for s, n in zip(start, descriptor.box, strict=True)), indexing="ij")
    inside = np.logical_and.reduce([(i >= 0) & (i < n) for i, n in zip(index, descriptor.shape, strict=True)])
    steps = sum(i * stride for i, stride in zip(index, descriptor.strides, strict=True))
    where = descriptor.base + np.asarray(steps) * descriptor.size
    flat = shared + np.arange(inside.size * descriptor.size)
    if descriptor.swizzle:
        flat = flat ^ ((flat >> 7 & (1 << descriptor.swizzle) - 1) << 4)
    return where.reshape(-1), inside.reshape(-1), flat


def _in_shared_memory(team: Team, lane: int, flat: Array, at: int, what: str) -> tuple[Array, Array] | None:
    """(index, cells, each once) of these bytes, or None with a fault."""
    shared = team.grid.shared
    lanes = np.full(2, lane)
    ends = np.array([flat.min(), flat.max()])
    located, _, _ = shared.locate(team, lanes, ends, 1, at, what)
    if flat[0] % 128:
        team.grid.execution.fault("misaligned access", at, f"{what} at {int(flat[0]) % 128} bytes beyond 128")
    if located.size < 2:
        return None
    index = flat + team.shared_base[lane]
    return index, np.unique(index // shared.granule)


def begin_load(
    team: Team, mask: Array | None, at: int, tensor: Array, target: Array, barrier: Array, *coordinates: Array
) -> None:
    """A box of a tensor to shared memory; what is outside of the tensor becomes zeros. It arrives at once or when
    a warp waits for it, as the seed has it."""
    grid = team.grid
    for lane in team.select(mask, at).tolist():
        descriptor = grid.descriptors[int(team.full(tensor)[lane])]
        shared = int(team.full(target)[lane])
        where, inside, flat = _box(team, lane, descriptor, shared, list(coordinates))
        located = _in_shared_memory(team, lane, flat, at, "the target of a TMA load")
        if located is None:
            continue
        index, cells = located
        data = np.zeros((inside.size, descriptor.size), np.uint8)
        lanes = np.full(int(inside.sum()), lane)
        lanes, origin, read_cells = grid.memory.locate(
            team, lanes, where[inside], descriptor.size, at, "the source of a TMA load"
        )
        grid.count_bytes(at, grid.memory, lanes.size * descriptor.size)
        if lanes.size != inside.sum():
            continue
        if grid.memory.shadow is not None and lanes.size:
            grid.memory.shadow.read(team, lanes, read_cells, at)
        data[inside] = grid.memory.views[1][origin[:, None] + np.arange(descriptor.size)]
        if grid.shared.shadow is not None:
            grid.shared.shadow.copy_asynchronously(team, lane, cells, at)
        found = mbarrier_of(team, lane, int(team.full(barrier)[lane]), at)
        if found is not None:
            found.copies.append((index, cells, data.reshape(-1), at))
            if grid.numbers.random() < 0.5:
                finish_loads(team, found)


def finish_loads(team: Team, barrier: MBarrier) -> None:
    """All that are under way for this mbarrier arrive."""
    shared = team.grid.shared
    copies, barrier.copies = barrier.copies, []
    for index, cells, data, at in copies:
        shared.views[1][index] = data
        if shared.shadow is not None:
            shared.shadow.finish_copy(cells, team.grid.num_warps + barrier.number, barrier.completed + 1, at)
        barrier.transactions -= data.size
    barrier.settle(team.grid.num_warps)


def begin_store(team: Team, mask: Array | None, at: int, tensor: Array, source: Array, *coordinates: Array) -> None:
    grid = team.grid
    for lane in team.select(mask, at).tolist():
        descriptor = grid.descriptors[int(team.full(tensor)[lane])]
        where, inside, flat = _box(team, lane, descriptor, int(team.full(source)[lane]), list(coordinates))
        located = _in_shared_memory(team, lane, flat, at, "the source of a TMA store")
        if located is None:
            continue
        index, cells = located
        if grid.shared.shadow is not None:
            grid.shared.shadow.read_asynchronously(team, np.array([lane]), cells, at, "a TMA store")
        store = Store(lane, index, cells, where, inside, descriptor.size, at)
        team.stores.setdefault(int(team.row[lane]), []).append(store)


def commit_stores(team: Team, mask: Array | None, at: int) -> None:
    for row in np.unique(team.row[team.select(mask, at)]).tolist():
        team.store_groups.setdefault(row, deque()).append(team.stores.pop(row, []))


def wait_for_stores(count: int, team: Team, mask: Array | None, at: int) -> None:
    for row in np.unique(team.row[team.select(mask, at)]).tolist():
        groups = team.store_groups.get(row, deque())
        while len(groups) > count:
            for store in groups.popleft():
                finish_store(team, store)


def finish_store(team: Team, store: Store) -> None:
    """Shared memory is read as late as it may be; what is outside of the tensor is dropped."""
    grid = team.grid
    data = grid.shared.views[1][store.index].reshape(-1, store.size)[store.inside]
    lanes = np.full(len(data), store.lane)
    if grid.shared.shadow is not None:
        grid.shared.shadow.finish_reading(team, lanes[:1] if lanes.size else np.array([store.lane]), store.cells)
    target = store.target[store.inside]
    lanes, index, cells = grid.memory.locate(team, lanes, target, store.size, store.at, "the target of a TMA store")
    grid.count_bytes(store.at, grid.memory, lanes.size * store.size)
    if lanes.size != len(data) or not lanes.size:
        return
    if grid.memory.shadow is not None:
        grid.memory.shadow.write(team, lanes, cells, store.at)
    grid.memory.views[1][index[:, None] + np.arange(store.size)] = data


# --- mbarriers ---


@instruction("mbarrier", section="9.7.13")
def mbarrier(found: Instruction) -> Operation:
    kind = found.parts[1]
    if kind == "init":
        address, count = found.operands
        return Operation(initialise, ((address, "u32"), (count, "u32")), (), machine=True)
    if kind == "inval":
        return Operation(invalidate, ((found.operands[0], "u32"),), (), machine=True)
    if kind == "arrive":
        announced = tuple((operand, "u32") for operand in found.operands[2:])
        if bool(announced) != found.has("expect_tx"):
            raise found.unsupported()
        return Operation(arrive, ((found.operands[1], "u32"), *announced), (), machine=True)
    if kind in ("try_wait", "test_wait") and found.has("parity"):
        target, address, parity = found.operands[:3]
        return Operation(try_wait, ((address, "u32"), (parity, "u32")), ((target, "pred"),), machine=True)
    raise found.unsupported()


def initialise(team: Team, mask: Array | None, at: int, address: Array, count: Array) -> None:
    grid = team.grid
    for lane in team.select(mask, at).tolist():
        slot, where = int(team.slot[lane]), int(team.full(address)[lane])
        if (slot, where) in grid.mbarriers:
            grid.execution.fault("an mbarrier is initialised twice", at)
        arrivals, warp = int(team.full(count)[lane]), int(team.warp[lane])
        nothing = np.zeros(grid.clocks.width, np.int32)
        number = grid.number_of_mbarrier(slot, where)
        barrier = MBarrier(
            number, arrivals, arrivals, warp, int(grid.clocks.row(slot, warp)[warp]), nothing, nothing.copy()
        )
        later = int(grid.clocks.table[:, grid.num_warps + number].max())  # than every phase of an earlier one there
        barrier.completed = (later + 1) // 2 * 2
        grid.mbarriers[slot, where] = barrier
        cells = np.array([(where + int(team.shared_base[lane])) // grid.shared.granule])
        if grid.shared.shadow is not None:
            grid.shared.shadow.initialised[cells] = True


def invalidate(team: Team, mask: Array | None, at: int, address: Array) -> None:
    for lane in team.select(mask, at).tolist():
        team.grid.mbarriers.pop((int(team.slot[lane]), int(team.full(address)[lane])), None)


def mbarrier_of(team: Team, lane: int, address: int, at: int) -> MBarrier | None:
    """The mbarrier at ``address``, if the warp may know that it is there."""
    slot, warp = int(team.slot[lane]), int(team.warp[lane])
    barrier = team.grid.mbarriers.get((slot, address))
    if barrier is None:
        team.grid.execution.fault("an mbarrier is used before it is initialised", at)
        team.grid.stop("an mbarrier is used before it is initialised")
        return None
    if team.grid.clocks.row(slot, warp)[barrier.owner] < barrier.owner_clock:
        team.grid.execution.fault("an mbarrier is used by a warp that cannot know that it is initialised", at)
    return barrier


def arrive(team: Team, mask: Array | None, at: int, address: Array, announced: Array | None = None) -> None:
    clocks = team.grid.clocks
    for lane in team.select(mask, at).tolist():
        barrier = mbarrier_of(team, lane, int(team.full(address)[lane]), at)
        if barrier is None:
            continue
        if announced is not None:
            barrier.transactions += int(team.full(announced)[lane])
        barrier.pending -= 1
        if barrier.pending < 0:
            team.grid.execution.fault("more threads arrive at an mbarrier than it counts", at)
        slot, warp = int(team.slot[lane]), int(team.warp[lane])
        np.maximum(barrier.knowledge, clocks.row(slot, warp), out=barrier.knowledge)
        clocks.tick(slot, warp)
        barrier.settle(team.grid.num_warps)


def try_wait(team: Team, mask: Array | None, at: int, address: Array, parity: Array) -> Array:
    """Whether the phase of this parity is over. Copies that are under way arrive now at the latest."""
    result = np.zeros(team.size, bool)
    lanes = team.select(mask, at)
    for slot, warp, lane in team.warps_of(lanes):
        mine = lanes[(team.row[lanes] == team.row[lane])]
        where, odd = team.full(address)[mine], team.full(parity)[mine] & 1
        if (where != where[0]).any() or (odd != odd[0]).any():
            raise NotImplementedError("threads of a warp wait at different mbarriers")
        barrier = mbarrier_of(team, lane, int(where[0]), at)
        if barrier is None:
            continue
        if barrier.copies and barrier.completed & 1 == int(odd[0]):
            finish_loads(team, barrier)
        if barrier.completed & 1 != int(odd[0]):
            result[mine] = True
            row = team.clocks.row(slot, warp)
            np.maximum(row, barrier.announced, out=row)
    if not result[lanes].all():
        team.failed_wait = True
    return result


@instruction("fence", section="9.7.13")
def fence(found: Instruction) -> Operation:
    """``fence.proxy.async`` counts; the others order what this machine orders anyway."""
    if found.parts[1:3] == ("proxy", "async"):
        return Operation(fence_proxies, (), (), machine=True)
    return Operation(lambda: None, (), ())


def fence_proxies(team: Team, mask: Array | None, at: int) -> None:
    for slot, warp, _ in team.warps_of(team.select(mask, at)):
        team.clocks.fence(slot, warp)
