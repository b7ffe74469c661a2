"""Lists of blocks over one pool: who holds which, handed out and taken back without asking the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class OutOfBlocksError(RuntimeError):
    """The pool has fewer free blocks than a request needs. Raised before anything is changed.

    Attributes: ``needed`` blocks for this request, ``free`` and ``total`` blocks of the pool.
    """

    def __init__(self, needed: int, free: int, total: int) -> None:
        self.needed, self.free, self.total = needed, free, total
        super().__init__(
            f"num_tokens: the request needs {needed} more blocks, but {free} of {total} are free: evict() or free() "
            f"rows first, or build the cache with num_blocks >= {total - free + needed}"
        )


class HostBound:
    """Upper bounds, kept on the host, of what the device knows exactly: blocks held and the longest list of each row.

    A list that gains t tokens, in however many steps, gains at most ceil(t / block_size) blocks beyond those it held.
    """

    def __init__(self, rows: int, lists: int, block_size: int) -> None:
        self.lists = lists
        self.block_size = block_size
        self.blocks = [0] * rows  # held at the last exact reading, or bounded by a budget
        self.tokens = [0] * rows  # that came in since
        self.longest = [0] * rows

    def _gain(self, tokens: int) -> int:
        return self.lists * -(-tokens // self.block_size)

    def row_blocks(self, row: int) -> int:
        return self.blocks[row] + self._gain(self.tokens[row])

    def total(self, rows: Sequence[int] = (), more: int = 0) -> int:
        """Blocks held by all rows, if ``rows`` gained ``more`` tokens each."""
        held = sum(map(self.row_blocks, range(len(self.blocks))))
        return held + sum(self._gain(self.tokens[row] + more) - self._gain(self.tokens[row]) for row in rows)

    def add(self, rows: Sequence[int], tokens: int) -> None:
        for row in rows:
            self.tokens[row] += tokens
            self.longest[row] += tokens

    def limit(self, row: int, blocks: int) -> None:
        """A row is known to hold at most ``blocks``."""
        self.blocks[row] = min(self.row_blocks(row), blocks)
        self.tokens[row] = 0
        self.longest[row] = min(self.longest[row], self.blocks[row] * self.block_size)


class BlockPool:
    """Tables, lengths and blocks held of ``[layers, rows, heads]`` lists, and the stack of the blocks that are free.

    Everything about blocks stays on the device: numbers are popped and pushed at places found by prefix sums. Only when
    :class:`HostBound` says that a request might not fit are the exact numbers read.

    ``index`` is a row index that tensors take (a slice, or int64 numbers on the device), ``rows`` the same rows as
    numbers on the host.
    """

    def __init__(
        self, lists: tuple[int, int, int], num_blocks: int, max_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self.num_blocks, self.max_blocks, self.block_size = num_blocks, max_blocks, block_size
        self.tables = torch.zeros(*lists, max_blocks, dtype=torch.int32, device=device)
        self.lens = torch.zeros(lists, dtype=torch.int32, device=device)
        # At least the blocks that a list's length takes: tokens that are rolled back leave theirs behind.
        self.held = torch.zeros(lists, dtype=torch.int32, device=device)
        # The first free_count entries are the free blocks, the last of them the next to go out. They descend, so that
        # what is popped ascends and one list's new blocks are neighbours. The entry past the pool is a dustbin.
        self.free = torch.arange(num_blocks - 1, -2, -1, dtype=torch.int32, device=device)
        self.free_count = torch.full((), num_blocks, dtype=torch.int64, device=device)
        self.in_order = True
        # Numbers are cheap to read where the host is the device.
        self.exact = device.type == "cpu"
        self.bound = HostBound(lists[1], lists[0] * lists[2], block_size)
        self._list_starts = max_blocks * torch.arange(self.lens.numel(), device=device).view(*lists, 1)
        self._columns = torch.arange(max_blocks, device=device)

    def blocks_in_use(self) -> int:
        return self.num_blocks - int(self.free_count)

    def blocks_of(self, lens: Tensor) -> Tensor:
        return (lens + (self.block_size - 1)) // self.block_size

    def reserve(self, index: slice | Tensor, rows: Sequence[int], new_lens: Tensor, num_tokens: int) -> None:
        """Give the lists of ``rows`` the blocks that ``new_lens``, at most ``num_tokens`` more than now, take.

        Raises :class:`OutOfBlocksError` or, for a list longer than its table, ValueError; nothing is changed then.
        """
        held = self.held[:, index]
        grow = (self.blocks_of(new_lens) - held).clamp_(min=0)
        self._refuse_too_long(rows, new_lens, num_tokens)
        needed = self._refuse_too_many(rows, grow, num_tokens)
        if needed != 0:
            self._take(index, held, grow, min(-(-num_tokens // self.block_size), self.max_blocks))
        self.bound.add(rows, num_tokens)

    def give_back(self, index: slice | Tensor, keep: Tensor) -> None:
        """Push the blocks past the first ``keep`` of each list of the rows onto the stack."""
        held = self.held[:, index]
        given = (self._columns >= keep[..., None]) & (self._columns < held[..., None])
        count = given.flatten().cumsum(0)
        if not count.numel():
            return
        # The first block is pushed last: whoever comes next gets them in the order they had.
        place = torch.where(given.flatten(), self.free_count + count[-1] - count, self.num_blocks)
        self.free.scatter_(0, place, self.tables[:, index].flatten())
        self.free_count += count[-1]
        self.held[:, index] = keep
        self.in_order = False

    def _refuse_too_long(self, rows: Sequence[int], new_lens: Tensor, num_tokens: int) -> None:
        capacity = self.max_blocks * self.block_size
        bound = self.bound
        if not new_lens.numel() or all(bound.longest[row] + num_tokens <= capacity for row in rows):
            return
        bound.longest[:] = self.lens.amax((0, 2)).tolist()
        longest = int(new_lens.amax())
        if longest > capacity:
            raise ValueError(
                f"num_tokens: a list would hold {longest} tokens, more than the {capacity} of max_tokens: evict() "
                "first, or build the cache with a larger max_tokens"
            )

    def _refuse_too_many(self, rows: Sequence[int], grow: Tensor, num_tokens: int) -> int | None:
        """Returns the blocks needed, None where the host has no need to know."""
        if self.exact:
            needed = int(grow.sum())
            free = int(self.free_count) if needed else 0
        elif self.bound.total(rows, num_tokens) <= self.num_blocks:
            return None
        else:
            needed, free = torch.stack([grow.sum(), self.free_count]).tolist()
            for row, blocks in enumerate(self.held.sum((0, 2)).tolist()):
                self.bound.blocks[row], self.bound.tokens[row] = blocks, 0
        if needed > free:
            raise OutOfBlocksError(needed, free, self.num_blocks)
        return needed

    def _take(self, index: slice | Tensor, held: Tensor, grow: Tensor, width: int) -> None:
        """Append ``grow`` blocks (at most ``width``) from the stack to each list of the rows."""
        if width > 1 and not self.in_order:
            self._sort_free()
        last = grow.flatten().cumsum(0)
        if not last.numel():
            return
        first = (last.view(grow.shape) - grow)[..., None]
        # A window of columns inside the table that has room for `width` new blocks, wherever the list ends.
        columns = held.long().clamp(max=self.max_blocks - width)[..., None] + self._columns[:width]
        ordinal = columns - held[..., None]
        new = (ordinal >= 0) & (ordinal < grow[..., None])
        place = (self.free_count - 1 - first - ordinal).clamp_(0, self.num_blocks)
        entries = self._list_starts[:, index] + columns
        tables = self.tables.view(-1)
        tables[entries] = torch.where(new, self.free[place], tables[entries])
        self.held[:, index] = held + grow
        self.free_count -= last[-1]

    def _sort_free(self) -> None:
        place = torch.arange(self.num_blocks + 1, device=self.free.device)
        self.free = torch.where(place < self.free_count, self.free, -1).sort(descending=True).values
        self.in_order = True
