"""Slots of a paged cache as rows of matrices, and products over them that run on every core."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
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


def by_block(
    cache: Tensor, blocks: Tensor, lists: Tensor | None, *, by_head: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The cache as whole blocks of one head, and the index that picks ``blocks`` [n, m] of ``lists`` [n], or of all."""
    if not by_head:
        return cache, (blocks,)
    if lists is None:
        lists = torch.arange(blocks.shape[0])
    return cache.movedim(2, 0), ((lists % cache.shape[2])[:, None], blocks.long())


def read_blocks(pool: Tensor, index: tuple[Tensor, ...], room: Tensor | None = None) -> Tensor:
    """[n, m, block_size, ...], a copy in the cache's dtype; in ``room`` [at least n * m, block_size, ...] if given."""
    raw = _bytes(pool)
    if len(index) == 1:
        numbers = index[0].flatten()
        if room is None:
            picked = raw.index_select(0, numbers)
        else:
            picked = torch.index_select(raw, 0, numbers, out=_bytes(room)[: numbers.shape[0]])
        picked = picked.view(*index[0].shape, *raw.shape[1:])
    else:
        picked = raw[index]
    return picked if raw is pool else picked.view(pool.dtype)


def fold_scores(
    scores: Tensor, decay: float, blocks: Tensor, own: Tensor | None, lists: Tensor, reduced: Tensor, seen: Tensor
) -> None:
    """scores = decay * scores + reduced in the slots of ``blocks`` [n, m] that are ``seen`` [n, m * block_size].

    ``own`` bool [n, m] leaves out blocks that stand there a second time (None: none does).
    """
    pool, index = by_block(scores, blocks, lists, by_head=scores.dim() == 3)
    old = read_blocks(pool, index)  # [n, m, block_size]
    new = reduced.view_as(old).to(old.dtype).add_(old, alpha=decay)
    new = torch.where(seen.view_as(old), new, old)
    if own is not None:
        index = tuple(part.expand_as(blocks)[own] for part in index)
        new = new[own]
    pool.index_put_(index, new)


def write_slots(cache: Tensor, slot: Tensor, values: Tensor, head: Tensor | None) -> None:
    """Write ``values`` [n, ...], in the cache's dtype, to the slots ``slot`` int64 [n], counted through the pool, of
    ``head`` [n] where a block holds every head."""
    raw, values = _bytes(cache), _bytes(values)
    if head is None and raw.is_contiguous():
        raw.flatten(0, 1).index_copy_(0, slot, values)
        return
    index = slot // cache.shape[1], slot % cache.shape[1]
    raw.index_put_(index if head is None else (*index, head), values)


class Piece(NamedTuple):
    """Slots ``start`` to ``stop`` of a list, counted from the first block that is looked at; ``row`` is the first one's
    row in the pool if they are consecutive there, else -1."""

    start: int
    stop: int
    row: int


def cut(blocks: Tensor, starts: list[int], stops: list[int], block_size: int, in_place: bool) -> list[list[Piece]]:
    """Each list's slots as long runs of consecutive blocks, with tiles of scattered blocks between them.

    blocks [n, m] are the lists' blocks from slot ``starts`` on, the first of its block.
    """
    lengths = [stop - start for start, stop in zip(starts, stops, strict=True)]
    jumps: list[list[int]] = [[] for _ in lengths]
    if in_place:
        for i, jump in (blocks[:, 1:] - blocks[:, :-1] != 1).nonzero().tolist():
            jumps[i].append(jump + 1)
    tile = max(1, _TILE // block_size) * block_size
    numbers = blocks[:, 0].tolist()
    result = []
    for i, length in enumerate(lengths):
        last = -(-length // block_size)
        begin, reached, pieces = 0, 0, []
        ends = [jump for jump in jumps[i] if jump < last] if in_place and length >= _MIN_RUN else []
        for end in [*ends, last]:
            run = in_place and (end - begin) * block_size >= _MIN_RUN
            if run or end == last:
                edge = begin * block_size if run else length
                pieces += [Piece(start, min(start + tile, edge), -1) for start in range(reached, edge, tile)]
                reached = edge
            if run:
                reached = min(length, end * block_size)
                number = int(blocks[i, begin]) if begin else numbers[i]
                pieces.append(Piece(begin * block_size, reached, number * block_size))
            begin = end
        result.append(pieces)
    return result


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

    @cached_property
    def _pools(self) -> tuple[Tensor, ...]:
        """One for every head where heads share a block, else one for all."""
        return self.cache.unbind(2) if self.by_head else (self.cache,)

    @cached_property
    def _rows(self) -> list[Tensor]:
        """The pools where they are read in place."""
        return [pool.flatten(0, 1) for pool in self._pools]

    def matrix(self, head: int, blocks: Tensor, piece: Piece) -> Tensor:
        """The rows [n, D] of a piece of the list of these blocks: a view of a run, a copy of scattered blocks."""
        index = head if self.by_head else 0
        if piece.row >= 0:
            return self._rows[index][piece.row : piece.row + piece.stop - piece.start]
        pool = self._pools[index]
        first = piece.start // self.block_size
        picked = (
            _bytes(pool)
            .index_select(0, blocks[first : -(-piece.stop // self.block_size)])
            .view(self.cache.dtype)
            .flatten(0, 1)
        )
        return picked[piece.start - first * self.block_size : piece.stop - first * self.block_size].to(self.dtype)

    def alike(self, first: int, step: int, lists: int, slots: int) -> Tensor:
        """[lists, slots, D], a view of slots that are consecutive from block ``first`` on, the next list's ``step``
        blocks behind. For caches in which heads have blocks of their own."""
        block, slot, column = self.cache.stride()
        size = (lists, slots, self.cache.shape[2])
        return self.cache.as_strided(size, (step * block, slot, column), self.cache.storage_offset() + first * block)

    def room(self, slots: int) -> Tensor:
        """Memory for so many slots, to be gathered into by :meth:`blocks`."""
        return self.cache.new_empty(-(-slots // self.block_size), self.block_size, self.cache.shape[-1])

    def blocks(self, blocks: Tensor, lists: Tensor | None, room: Tensor | None = None) -> Tensor:
        """Whole blocks [n, m] of ``lists`` [n] -> [n, m * block_size, D], a copy; see :func:`read_blocks`."""
        if room is None and not self.by_head and self.cache.dtype == self.dtype:  # most calls, without a detour
            return self.cache.index_select(0, blocks.flatten()).view(blocks.shape[0], -1, self.cache.shape[-1])
        picked = read_blocks(*by_block(self.cache, blocks, lists, by_head=self.by_head), room)
        return picked.flatten(1, 2).to(self.dtype)


def _parts(rows: int, slots: int) -> int:
    """In how many equal products to cut a long one: torch runs a batch, but not one thin matrix, on all cores."""
    return torch.get_num_threads() if rows < MIN_ROWS and slots >= _MIN_SPLIT else 1


def multiply_keys(q: Tensor, k: Tensor, out: Tensor) -> None:
    """out [R, n] = q [R, D] @ k [n, D]^T."""
    parts = _parts(q.shape[0], k.shape[0])
    if parts > 1:
        size = k.shape[0] // parts
        even = parts * size
        product = torch.bmm(q.expand(parts, -1, -1), k[:even].unflatten(0, (parts, size)).mT)
        out[:, :even].unflatten(1, (parts, size)).copy_(product.transpose(0, 1))
        if even == k.shape[0]:
            return
        k, out = k[even:], out[:, even:]
    torch.mm(q, k.t(), out=out)


def multiply_values(p: Tensor, v: Tensor, out: Tensor) -> None:
    """out [R, Dv] += p [R, n] @ v [n, Dv]."""
    parts = _parts(p.shape[0], v.shape[0])
    if parts > 1:
        size = v.shape[0] // parts
        even = parts * size
        batch = p[:, :even].unflatten(1, (parts, size)).transpose(0, 1)
        out += torch.bmm(batch, v[:even].unflatten(0, (parts, size))).sum(0)
        if even == v.shape[0]:
            return
        p, v = p[:, even:], v[even:]
    out.addmm_(p, v)
