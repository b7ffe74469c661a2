"""Slots of a paged cache as rows of matrices, and products over them that run on every core."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# A matrix product is fast from this many rows on, whatever its length.
MIN_ROWS = 64
# Slots in a gathered tile: 256 KiB of K at head_dim 64 in float32, which stay in the cache of a core.
_TILE = 1024
# Consecutive slots that are worth a product in place.
_MIN_RUN = 256
# Slots from which a thin product is worth splitting over the cores.
_MIN_SPLIT = 1024


def _bytes(cache: Tensor) -> Tensor:
    """Indexing knows no float8: move it as bytes."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def read_slots(cache: Tensor, block: Tensor, offset: Tensor, head: Tensor | None) -> Tensor:
    """cache ``[num_blocks, block_size, (heads,) ...]`` at block, offset (and head) -> a copy, in the cache's dtype.

    ``head`` is None where a slot belongs to one head or is shared by all of them.
    """
    raw = _bytes(cache)
    lead = 2 if head is None else 3
    if not raw.is_contiguous():
        picked = raw[block, offset] if head is None else raw[block, offset, head]
        return picked.view(cache.dtype)
    index = block * cache.shape[1] + offset
    if head is not None:
        index = index * cache.shape[2] + head
    picked = raw.view(-1, *cache.shape[lead:]).index_select(0, index.flatten())
    return picked.view(*index.shape, *cache.shape[lead:]).view(cache.dtype)


def write_slots(cache: Tensor, block: Tensor, offset: Tensor, head: Tensor | None, values: Tensor) -> None:
    """The counterpart of :func:`read_slots`: block and offset are 1-D, values [n, ...] in the cache's dtype."""
    raw, values = _bytes(cache), _bytes(values)
    if not raw.is_contiguous():
        raw.index_put_((block, offset) if head is None else (block, offset, head), values)
        return
    index = block * cache.shape[1] + offset
    if head is not None:
        index = index * cache.shape[2] + head
    raw.view(-1, *values.shape[1:]).index_copy_(0, index, values)


class Piece(NamedTuple):
    """Slots ``start`` to ``stop`` of a list; ``row`` is the first one's row in the pool if they are consecutive
    there, else -1."""

    start: int
    stop: int
    row: int


def cut(table: Tensor, start: int, stop: int, block_size: int, in_place: bool) -> list[Piece]:
    """A list's slots as long runs of consecutive blocks, with tiles of scattered blocks between them."""
    runs: list[tuple[int, int, int]] = []  # first block of the list, last block + 1, the first one's number
    first, last = start // block_size, -(-stop // block_size)
    if in_place and stop - start >= _MIN_RUN:
        jumps = (table[first + 1 : last] - table[first : last - 1] != 1).nonzero().flatten().tolist()
        begin = first
        for end in [*(first + 1 + jump for jump in jumps), last]:
            if (end - begin) * block_size >= _MIN_RUN:
                runs.append((begin, end, int(table[begin])))
            begin = end
    pieces: list[Piece] = []
    tile = max(1, _TILE // block_size)
    reached = start
    for begin, end, number in [*runs, (last, last, 0)]:
        edge = min(stop, max(start, begin * block_size))
        while reached < edge:
            tile_end = min(edge, (reached // block_size + tile) * block_size)
            pieces.append(Piece(reached, tile_end, -1))
            reached = tile_end
        if begin < end:
            run_end = min(stop, end * block_size)
            pieces.append(Piece(reached, run_end, number * block_size + reached - begin * block_size))
            reached = run_end
    return pieces


def clip(pieces: list[Piece], start: int, stop: int) -> Iterator[Piece]:
    """The parts of the pieces between two slots of the list."""
    for piece in pieces:
        first, last = max(piece.start, start), min(piece.stop, stop)
        if first < last:
            yield Piece(first, last, piece.row + first - piece.start if piece.row >= 0 else -1)


class Rows:
    """A cache of keys or of values, handed out as matrices of ``dtype``."""

    def __init__(self, cache: Tensor, dtype: torch.dtype) -> None:
        self.cache, self.dtype = cache, dtype
        self.block_size = cache.shape[1]
        self.by_head = cache.dim() == 4
        # Consecutive blocks are consecutive rows and need no conversion: a product reads them where they lie.
        self.in_place = cache.dtype == dtype and cache.stride(0) == self.block_size * cache.stride(1)
        # Of every head where heads share a block, else of all.
        self._pools = [cache[:, :, head] for head in range(cache.shape[2])] if self.by_head else [cache]

    def matrix(self, head: int, table: Tensor, piece: Piece) -> Tensor:
        """The rows [n, D] of a piece of the list with this table: a view of a run, a copy of scattered blocks."""
        pool = self._pools[head if self.by_head else 0]
        if piece.row >= 0:
            return pool.flatten(0, 1)[piece.row : piece.row + piece.stop - piece.start]
        first = piece.start // self.block_size
        blocks = table[first : -(-piece.stop // self.block_size)]
        picked = _bytes(pool).index_select(0, blocks).view(self.cache.dtype).flatten(0, 1)
        return picked[piece.start - first * self.block_size : piece.stop - first * self.block_size].to(self.dtype)

    def gather(self, block: Tensor, offset: Tensor, head: Tensor) -> Tensor:
        """block, offset [n, W], head [n, 1] -> [n, W, D]."""
        return read_slots(self.cache, block, offset, head if self.by_head else None).to(self.dtype)


def _parts(rows: int, slots: int) -> int:
    """In how many equal products to cut a long one: torch runs a batch, but not one thin matrix, on all cores."""
    return torch.get_num_threads() if rows < MIN_ROWS and slots >= _MIN_SPLIT else 1


def multiply_keys(q: Tensor, k: Tensor, out: Tensor) -> None:
    """out [R, n] = q [R, D] @ k [n, D]^T."""
    parts, even = _parts(q.shape[0], k.shape[0]), 0
    if parts > 1:
        size = k.shape[0] // parts
        even = parts * size
        product = torch.bmm(q.expand(parts, -1, -1), k[:even].unflatten(0, (parts, size)).mT)
        out[:, :even].unflatten(1, (parts, size)).copy_(product.transpose(0, 1))
    if even < k.shape[0]:
        torch.mm(q, k[even:].T, out=out[:, even:])


def multiply_values(p: Tensor, v: Tensor, out: Tensor) -> None:
    """out [R, Dv] += p [R, n] @ v [n, Dv]."""
    parts, even = _parts(p.shape[0], v.shape[0]), 0
    if parts > 1:
        size = v.shape[0] // parts
        even = parts * size
        batch = p[:, :even].unflatten(1, (parts, size)).transpose(0, 1)
        out += torch.bmm(batch, v[:even].unflatten(0, (parts, size))).sum(0)
    if even < v.shape[0]:
        out.addmm_(p[:, even:], v[even:])
