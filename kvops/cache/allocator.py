"""The allocation of blocks: room for new tokens, private copies of shared blocks, prefixes dropped to make room."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from kvops.cache.pool import BlockPool, OutOfBlocksError
from kvops.cache.prefix import PrefixStore
from kvops.cache.rows import RowSelector, Selection
from kvops.cache.storage import BlockStorage

_T = TypeVar("_T")


class Allocator:
    """Copy-on-write over a pool: the pool chooses the blocks to copy, the storage copies them, prefixes make room.

    Every method raises :class:`~kvops.OutOfBlocksError` before it changes anything.
    """

    def __init__(self, pool: BlockPool, storage: BlockStorage, prefixes: PrefixStore, selector: RowSelector) -> None:
        self.pool, self.storage, self.prefixes, self.selector = pool, storage, prefixes, selector

    def reserve(self, rows: Selection, new_lens: Tensor, num_tokens: int) -> None:
        """Take blocks for lists that grow to ``new_lens``, by at most ``num_tokens``, and copy shared blocks that are
        written."""
        self._copy(self._with_room(lambda: self.pool.reserve(rows.index, rows.numbers, new_lens, num_tokens)))

    def prepare(self, rows: Selection, num_tokens: int, *, unshare: bool) -> None:
        """The host's part of :meth:`reserve`, before a CUDA graph replays the device's part. ``unshare`` copies every
        shared block of the rows."""
        index, numbers = rows.index, rows.numbers
        pool = self.pool

        def fits() -> bool:
            held = pool.held[:, index]
            return pool.fits_without_prefixes(index, torch.zeros_like(held), held, pool.max_blocks, num_tokens)

        def request() -> tuple[Tensor, Tensor] | None:
            return pool.prepare(index, numbers, num_tokens, unshare=unshare)

        self._copy(self._with_room(request, fits if unshare else None))

    def unshare(self, rows: Selection) -> None:
        """Make private copies of all shared blocks of ``rows``."""
        if self.pool.may_share(rows.numbers):
            held = self.pool.held[:, rows.index]
            self.unshare_blocks(rows, torch.zeros_like(held), held, self.pool.max_blocks)
            self.pool.bound.part(rows.numbers)

    def unshare_blocks(self, rows: Selection, first: Tensor, stop: Tensor, width: int) -> None:
        """Make private copies of the shared blocks ``first`` to ``stop`` - 1 of each list, at most ``width``."""
        index, numbers = rows.index, rows.numbers
        copies = self._with_room(
            lambda: self.pool.unshare(index, numbers, first, stop, width),
            lambda: self.pool.fits_without_prefixes(index, first, stop, width),
        )
        self._copy(copies)

    def _with_room(self, request: Callable[[], _T], fits: Callable[[], bool] | None = None) -> _T:
        """Run ``request``. While it finds too few blocks, drop remembered prefixes and run it again.

        Prefixes that rows use are dropped only for copies of shared blocks, and only if the request then ``fits``.
        """
        while True:
            try:
                return request()
            except OutOfBlocksError as error:
                shortage = error.needed - error.free
                if self.prefixes.make_room(shortage, in_use=False):
                    continue
                if fits is None or not fits() or not self.prefixes.make_room(shortage, in_use=True):
                    raise

    def _copy(self, blocks: tuple[Tensor, Tensor] | None) -> None:
        if blocks is not None:
            self.selector.changed()
            self.storage.copy(*blocks)
