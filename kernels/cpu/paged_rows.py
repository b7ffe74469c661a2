"""The rows of a tile of keys or values: where the slots of a list are, in float32, and how they come from memory."""

from typing import NamedTuple

from numba import float32, int64

from kvops.kernels.cpu.elements import FLOAT32, widen
from kvops.kernels.cpu.jit import inner, jit
from kvops.kernels.cpu.vector import LINE, Ahead, address_of, touch

TILE = 64  # slots of K and V that are read at once; they stay in the caches of a core


class Rows(NamedTuple):
    """What a thread has of the keys, or of the values, of a tile."""

    places: int64[::1]  # [TILE], the addresses of the rows in the cache
    copies: float32[:, ::1]  # [TILE + 1, padded width], the rows in float32 where the cache has others; the last is 0
    copied: int64[::1]  # [TILE], the addresses of these


@jit
def locate(rows, cache, table, h, first, count):
    """Write down where the slots [first, first + count) of a list are; up to a count by fours stand the row of 0."""
    size = cache.shape[1]
    block, offset, j = first // size, first % size, 0
    while j < count:
        address = address_of(cache) + h * cache.strides[2] + table[block] * cache.strides[0] + offset * cache.strides[1]
        for _ in range(min(size - offset, count - j)):
            rows.places[j] = address
            address += cache.strides[1]
            j += 1
        block, offset = block + 1, 0
    for j in range(count, -(-count // 4) * 4):
        rows.places[j] = address_of(rows.copies) + TILE * rows.copies.strides[0]


@jit
def bring(rows, count, size):
    """Wait until rows of ``size`` bytes are in the cache: in the order in which :class:`Ahead` would ask for them."""
    quarter, last = -(-count // 4), count - 1
    for j in range(quarter):
        second, third, fourth = min(j + quarter, last), min(j + 2 * quarter, last), min(j + 3 * quarter, last)
        for byte in range(0, size, LINE):
            for place in (j, second, third, fourth):
                touch((rows.places[place] + byte) & -LINE)


@inner
def ahead(rows, count, cache):
    return Ahead(address_of(rows.places), count, cache.shape[3])


@jit
def widened(rows, element, width, count):
    """The addresses of the located rows as float32 in whole vectors: in the cache itself, or copied."""
    if element == FLOAT32 and width == rows.copies.shape[1]:
        return rows.places
    for j in range(count):
        target = address_of(rows.copies) + j * rows.copies.strides[0]
        widen(rows.places[j], element, width, target)
        rows.copied[j] = target
    for j in range(count, -(-count // 4) * 4):
        rows.copied[j] = address_of(rows.copies) + TILE * rows.copies.strides[0]
    return rows.copied
