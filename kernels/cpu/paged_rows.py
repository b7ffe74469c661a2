"""The rows of a tile of keys or values: where the slots of a list are, in float32, and how they come from memory."""

from kvops.kernels.cpu.elements import FLOAT32, widen
from kvops.kernels.cpu.jit import jit
from kvops.kernels.cpu.vector import touch

TILE = 64  # slots of K and V that are widened to float32 at once; they stay in the first level of the cache
LINE = 64  # bytes that come from memory at once


@jit
def _touch(rows, count, size):
    """Bring rows of ``size`` bytes into the cache, in their order but a line of each quarter of them in turn.

    The products read four neighbouring rows at a time, an order in which memory is slow. Quarters of a tile lie in
    different blocks, and a core reads four blocks at a time faster than one by one.
    """
    quarter, last = -(-count // 4), count - 1
    for j in range(quarter):
        second, third, fourth = min(j + quarter, last), min(j + 2 * quarter, last), min(j + 3 * quarter, last)
        for byte in range(0, size, LINE):
            for row in (rows[j], rows[second], rows[third], rows[fourth]):
                touch((row + byte) & -LINE)


@jit
def locate(cache, element, width, far, table, h, first, count, tile, rows):
    """Where the slots [first, first + count) of a list stand as float32 rows of whole vectors: in the cache itself, or
    in ``tile`` [TILE + 1, padded width], to which they are copied. Writes the addresses of the rows; the number of rows
    is rounded up by fours with the last of the tile, which is 0. ``far``: the rows are likely in no cache.
    """
    size = cache.shape[1]
    block, offset, j = first // size, first % size, 0
    while j < count:
        address = cache.ctypes.data + h * cache.strides[2] + table[block] * cache.strides[0] + offset * cache.strides[1]
        for _ in range(min(size - offset, count - j)):
            rows[j] = address
            address += cache.strides[1]
            j += 1
        block, offset = block + 1, 0
    if far:
        _touch(rows, count, cache.shape[3])
    if element != FLOAT32 or width != tile.shape[1]:
        for j in range(count):
            target = tile.ctypes.data + j * tile.strides[0]
            widen(rows[j], element, width, target)
            rows[j] = target
    for j in range(count, -(-count // 4) * 4):
        rows[j] = tile.ctypes.data + TILE * tile.strides[0]
