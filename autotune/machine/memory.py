"""Global and shared memory: where an address lies, whether an access is aligned and within bounds, and its bytes."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvops.autotune.machine.races import GlobalShadow, SharedShadow

if TYPE_CHECKING:
    from kvops.autotune.machine.report import Execution
    from kvops.autotune.machine.team import Team

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# Shared memory begins here in its window, so that address 0 is a fault.
SHARED_WINDOW = 1024
# What a byte of shared memory holds before it is written.
POISON = 0xCB
# Kernel parameters that are tensor descriptors: their addresses name them, no memory lies behind. In 32 bits, as PTX of
# Triton 3.9 has addresses of parameters, and in the first page, where no process has memory.
DESCRIPTORS = 512

# One array over the address space of this process, from the first address that NumPy takes: every access is checked
# against the allocations of the launch before it goes through here.
_FIRST = 4096
_EVERYTHING = (ctypes.c_ubyte * ((1 << 47) - _FIRST)).from_address(_FIRST)


@dataclass(frozen=True)
class Allocation:
    """Memory that a launch may touch; ``written`` has a flag for each byte, or None where all of it holds data."""

    start: int
    size: int
    written: np.ndarray | None = None


class Space:
    """What both memories have in common: ``bytes_of(size)`` is the memory as words of ``size`` bytes."""

    name = ""
    shadow: GlobalShadow | SharedShadow | None

    def __init__(self, execution: Execution, granule: int) -> None:
        self.execution, self.granule, self.shift = execution, granule, granule.bit_length() - 1
        self.views: dict[int, np.ndarray] = {}

    def _aligned(
        self, lanes: np.ndarray, address: np.ndarray, size: int, at: int, what: str
    ) -> tuple[np.ndarray, np.ndarray]:
        if address.size and np.bitwise_or.reduce(address) & (size - 1):
            bad = (address & (size - 1)) != 0
            detail = f"{what} of {size} bytes at an address that ends in {int(address[bad][0]) & 0xFFF:#05x}"
            self.execution.fault("misaligned access", at, detail, lanes=int(bad.sum()))
            return lanes[~bad], address[~bad]
        return lanes, address

    def cells(self, first: np.ndarray, size: int) -> np.ndarray:
        """[accesses, cells] of shadow memory, for accesses of ``size`` bytes that begin in the cells ``first``."""
        count = max(1, size // self.granule)
        return first[:, None] if count == 1 else first[:, None] + np.arange(count)

    def locate(
        self, team: Team, lanes: np.ndarray, address: np.ndarray, size: int, at: int, what: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(lanes that may go on, index of the first byte, shadow cells): a lane that faults goes no further."""
        raise NotImplementedError

    def read(self, index: np.ndarray, size: int) -> np.ndarray:
        """The words of ``size`` bytes at these byte indices."""
        return self.views[size][index >> (size.bit_length() - 1)]

    def write(self, index: np.ndarray, size: int, values: np.ndarray) -> None:
        self.views[size][index >> (size.bit_length() - 1)] = values


class SharedMemory(Space):
    """Shared memory of the programs that run at a time, one behind the other."""

    name = "shared memory"
    shadow: SharedShadow | None

    def __init__(self, execution: Execution, size: int, slots: int, granule: int, num_warps: int, check: bool) -> None:
        super().__init__(execution, granule)
        self.size = size
        self.stride = (size + 1151) // 1024 * 1024
        raw = np.full(slots * self.stride + 128, POISON, np.uint8)
        start = -raw.ctypes.data % 128
        raw = raw[start : start + slots * self.stride]
        self.views = {width: raw.view(kind) for width, kind in UNSIGNED.items()}
        self.shadow = SharedShadow(execution, slots * self.stride // granule, num_warps) if check else None

    def clear(self, slot: int) -> None:
        """Make it what a new program finds."""
        self.views[1][slot * self.stride : (slot + 1) * self.stride] = POISON
        if self.shadow is not None:
            self.shadow.clear(slot, slot * self.stride // self.granule, (slot + 1) * self.stride // self.granule)

    def locate(
        self, team: Team, lanes: np.ndarray, address: np.ndarray, size: int, at: int, what: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lanes, address = self._aligned(lanes, address, size, at, what)
        if address.size and (address.min() < SHARED_WINDOW or address.max() + size > SHARED_WINDOW + self.size):
            bad = (address < SHARED_WINDOW) | (address + size > SHARED_WINDOW + self.size)
            detail = f"{what} at byte {int(address[bad][0]) - SHARED_WINDOW} of {self.size} bytes of shared memory"
            self.execution.fault("out of bounds", at, detail, lanes=int(bad.sum()))
            lanes, address = lanes[~bad], address[~bad]
        index = address + (team.shared_base if lanes is team.everyone else team.shared_base[lanes])
        return lanes, index, self.cells(index >> self.shift, size)


class GlobalMemory(Space):
    """The allocations of a launch."""

    name = "global memory"
    shadow: GlobalShadow | None

    def __init__(
        self, execution: Execution, allocations: Sequence[Allocation], granule: int, num_warps: int, check: bool
    ) -> None:
        super().__init__(execution, granule)
        merged: dict[int, Allocation] = {}
        for allocation in allocations:
            known = merged.get(allocation.start)
            if allocation.size and (known is None or allocation.size > known.size):
                merged[allocation.start] = allocation
        self.allocations = [merged[start] for start in sorted(merged)]
        self.starts = np.array([0, *(a.start for a in self.allocations)], np.int64)
        self.ends = np.array([0, *(a.start + a.size for a in self.allocations)], np.int64)
        counts = [0, *((a.start % granule + a.size + granule - 1) // granule for a in self.allocations)]
        self.first_cell = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
        self._starts, self._ends, self._first_cells = (
            array.tolist() for array in (self.starts, self.ends, self.first_cell)
        )
        whole = memoryview(_EVERYTHING)
        self.views = {width: np.frombuffer(whole, kind) for width, kind in UNSIGNED.items()}
        self.shadow = GlobalShadow(execution, sum(counts), num_warps, self._first_cells) if check else None
        if self.shadow is not None:
            for number, allocation in enumerate(self.allocations, 1):
                if allocation.written is not None and not allocation.start % granule:
                    written = np.resize(allocation.written, -(-allocation.size // granule) * granule)
                    first = self.first_cell[number]
                    self.shadow.all_initialised = False
                    self.shadow.initialised[first : first + len(written) // granule] = written[::granule]

    def contents(self) -> list[np.ndarray]:
        """A copy of each allocation."""
        bytes_ = self.views[1]
        return [bytes_[a.start - _FIRST : a.start - _FIRST + a.size].copy() for a in self.allocations]

    def restore(self, contents: Sequence[np.ndarray]) -> None:
        for allocation, held in zip(self.allocations, contents, strict=True):
            ctypes.memmove(allocation.start, held.ctypes.data, allocation.size)

    def written(self, number: int) -> np.ndarray:
        """A flag for each byte of allocation ``number``: it was written, in this launch or before."""
        assert self.shadow is not None
        size, first = self.allocations[number].size, self.first_cell[number + 1]
        cells = self.shadow.initialised[first : first + -(-size // self.granule)]
        return np.repeat(cells, self.granule)[:size]

    def locate(
        self, team: Team, lanes: np.ndarray, address: np.ndarray, size: int, at: int, what: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lanes, address = self._aligned(lanes, address, size, at, what)
        if address.size:  # most instructions touch one tensor
            low = int(address.min())
            tensor = bisect_right(self._starts, low) - 1
            if int(address.max()) + size <= self._ends[tensor]:
                start = self._starts[tensor] >> self.shift << self.shift
                first = ((address - start) >> self.shift) + self._first_cells[tensor]
                return lanes, address - _FIRST, self.cells(first, size)
        number = np.searchsorted(self.starts, address, side="right") - 1
        bad = address + size > self.ends[number]
        if bad.any():
            where, nearest = int(address[bad][0]), int(number[bad][0])
            beyond = where - int(self.starts[nearest])
            length = int(self.ends[nearest] - self.starts[nearest])
            detail = f"{what} at {where:#x}, before every tensor of the launch"
            if nearest:
                detail = f"{what} of {size} bytes at byte {beyond} of a tensor of {length} bytes"
            self.execution.fault("out of bounds", at, detail, lanes=int(bad.sum()))
            lanes, address, number = lanes[~bad], address[~bad], number[~bad]
        offset = address - self.starts[number] // self.granule * self.granule
        return lanes, address - _FIRST, self.cells(self.first_cell[number] + offset // self.granule, size)
