"""Lists of blocks over one pool: blocks are taken, shared and released without reading from the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvops.cache.bound import HostBound
from kvops.cache.config import CacheConfig
from kvops.cache.inference import writable


class OutOfBlocksError(RuntimeError):
    """The pool has fewer free blocks than a request needs. Raised before anything is changed.

    Attributes: ``needed`` blocks for this request, ``free`` and ``total`` blocks of the pool.
    """

    def __init__(self, needed: int, free: int, total: int, argument: str = "num_tokens") -> None:
        self.needed, self.free, self.total = needed, free, total
        what = "the request needs" if argument == "num_tokens" else "copies of shared blocks take"
        super().__init__(
            f"{argument}: {what} {needed} more blocks, but {free} of {total} are free: evict() or free() "
            f"rows first, or build the cache with num_blocks >= {total - free + needed}"
        )
        self._argument = argument

    def __reduce__(self) -> tuple[type, tuple[int, int, int, str]]:
        """Pickled as its numbers: by default an exception is made again from its message alone."""
        return type(self), (self.needed, self.free, self.total, self._argument)


class Copies(NamedTuple):
    """Candidates for copies before a write: entries of the tables, their blocks, and which of them are ``due``."""

    entries: Tensor
    blocks: Tensor
    due: Tensor


class BlockPool:
    """The lists of blocks of ``[layers, rows, heads]``, and the free blocks that they draw on.

    Block numbers stay on the device: free blocks are a stack, popped and pushed at places that prefix sums give. The
    host reads exact numbers only when its :class:`~kvops.cache.bound.HostBound` says that a request might not fit,
    and never while a CUDA graph is captured: :meth:`prepare` does the host's part before each replay.

    Several lists may hold one block (:meth:`fork`). A list that is about to write a shared block gets a free block in
    its place. Methods that replace blocks so return what to copy: source and target, int32 ``[N]``, with target -1
    where nothing is to be copied. If every list that holds a block writes it in one call, the first keeps it.

    ``index`` and ``rows`` name rows for tensors and for the host (:class:`~kvops.cache.rows.Selection`).

    Attributes:
        tables: int32 ``[layers, rows, heads, max_blocks]``, the blocks of each list.
        lens: int32 ``[layers, rows, heads]``, slots in use of each list.
        held: int32 ``[layers, rows, heads]``, blocks of each list: more than its length takes after a rollback.
        sharers: int32 ``[num_blocks]``, how many lists and prefixes hold a block beside the first.
        free: int32 ``[num_blocks + 1]``. The first ``free_count`` entries are the free blocks, the last of these the
            next to be taken. The entry past the pool takes writes that must go nowhere.
        free_count: int64, on the device.
        exact: whether the host reads the exact numbers at every request; cheap where the host is the device.
        bound: what the host knows without reading.
        prefixes: the number of the row of ``bound`` that stands for all remembered prefixes.
    """

    def __init__(self, config: CacheConfig) -> None:
        lists, device, num_blocks = config.lists, config.device, config.num_blocks
        self.num_blocks, self.max_tokens, self.block_size = num_blocks, config.max_tokens, config.block_size
        self.max_blocks = max_blocks = config.max_blocks
        self.tables = torch.zeros(*lists, max_blocks, dtype=torch.int32, device=device)
        self.lens = torch.zeros(lists, dtype=torch.int32, device=device)
        self.held = torch.zeros(lists, dtype=torch.int32, device=device)
        self.sharers = torch.zeros(num_blocks, dtype=torch.int32, device=device)
        # In descending order, popped blocks ascend, and the new blocks of one list are neighbours.
        self.free = torch.arange(num_blocks - 1, -2, -1, dtype=torch.int32, device=device)
        self.free_count = torch.full((), num_blocks, dtype=torch.int64, device=device)
        self.in_order = True
        self.exact = device.type == "cpu"
        self.prefixes = config.max_batch
        self.bound = HostBound(config.max_batch + 1, config.lists_per_row, config.block_size)
        self._list_starts = max_blocks * torch.arange(self.lens.numel(), device=device).view(*lists, 1)
        self._columns = torch.arange(max_blocks, device=device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(writable(state))

    def blocks_in_use(self) -> int:
        return self.num_blocks - int(self.free_count)

    def blocks_of(self, lens: Tensor) -> Tensor:
        return (lens + (self.block_size - 1)) // self.block_size

    def may_share(self, rows: Sequence[int]) -> bool:
        """Whether any of ``rows`` may share blocks."""
        return not self.bound.sharing.isdisjoint(rows)

    def capturing(self) -> bool:
        return self.lens.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def reserve(
        self, index: slice | Tensor, rows: Sequence[int], new_lens: Tensor, num_tokens: int
    ) -> tuple[Tensor, Tensor] | None:
        """Give the lists of ``rows`` the blocks that ``new_lens``, at most ``num_tokens`` more than now, take.

        Raises :class:`OutOfBlocksError` or, for a list longer than its table, ValueError; nothing is changed then.
        """
        held = self.held[:, index]
        grow = (self.blocks_of(new_lens) - held).clamp_(min=0)
        needed, copies = self._admit(index, rows, new_lens, num_tokens, grow)
        if needed == 0:
            return None
        self._take(index, held, grow, min(-(-num_tokens // self.block_size), self.max_blocks))
        return self._replace(copies)

    def prepare(
        self, index: slice | Tensor, rows: Sequence[int], num_tokens: int, *, unshare: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        """The host's part of :meth:`reserve`, and its copies: what is left is safe to capture and replay.

        With ``unshare`` every shared block of the rows is copied.
        """
        new_lens = self.lens[:, index] + num_tokens
        grow = (self.blocks_of(new_lens) - self.held[:, index]).clamp_(min=0)
        _, copies = self._admit(index, rows, new_lens, num_tokens, grow, unshare=unshare)
        self.bound.rewind(rows)  # a replay may roll back, which the host does not see
        return self._replace(copies)

    def unshare(
        self, index: slice | Tensor, rows: Sequence[int], first: Tensor, stop: Tensor, width: int
    ) -> tuple[Tensor, Tensor] | None:
        """Replace the shared blocks from ``first`` to before ``stop`` of each list of ``rows``, at most ``width``."""
        copies = self._shared(index, first, stop, width, self.sharers)
        if self.exact or self.bound.total_if_copied(rows, width) > self.num_blocks:
            self._refuse_too_many("rows", copies.due.sum())
        self.bound.copied(rows, width)
        return self._replace(copies)

    def fits_without_prefixes(
        self, index: slice | Tensor, first: Tensor, stop: Tensor, width: int, num_tokens: int = 0
    ) -> bool:
        """Whether :meth:`unshare` and ``num_tokens`` more of each list would fit if no prefix held any block."""
        holders = self.holders()
        copies = self._shared(index, first, stop, width, (holders - 1).clamp_(min=0))
        grow = (self.blocks_of(self.lens[:, index] + num_tokens) - self.held[:, index]).clamp_(min=0)
        return bool(copies.due.sum() + grow.sum() <= (holders == 0).sum())

    def fork(self, row: int, index: slice | Tensor, rows: Sequence[int], lens: Tensor) -> None:
        """Let the empty ``rows`` share the blocks that the first ``lens`` [layers, heads] slots of ``row`` take."""
        # Copies: torch refuses to assign a view of a tensor to rows of that tensor named by number.
        table, lens = self.tables[:, row].clone(), lens.clone()
        held = self.blocks_of(lens)
        taken = (self._columns < held[..., None]).to(torch.int32)
        self.sharers.scatter_add_(0, table.flatten().long(), (taken * len(rows)).flatten())
        self.tables[:, index] = table[:, None]
        self.held[:, index] = held[:, None]
        self.lens[:, index] = lens[:, None]
        self.bound.fork(row, rows)

    def permute(self, index: Tensor, rows: Sequence[int]) -> None:
        """Let row i hold what row ``rows[i]`` held, each of them once; ``index`` is the same on the device."""
        for lists in (self.tables, self.lens, self.held):
            lists.copy_(lists[:, index])  # in place: captured graphs read this memory
        self.bound.permute(rows)

    def release(self, index: slice | Tensor, rows: Sequence[int], keep: Tensor) -> None:
        """Take all blocks but the first ``keep`` from each list of ``rows``. Those that no other holds become free."""
        held = self.held[:, index]
        released = (self._columns >= keep[..., None]) & (self._columns < held[..., None])
        if not released.numel():
            return
        blocks, released = self.tables[:, index].flatten(), released.flatten()
        if self.may_share(rows):
            blocks, released = self._drop_holders(blocks, released)
        self._push(blocks, released)
        self.held[:, index] = keep

    def hold(self, row: int, first: int, stop: int) -> Tensor:
        """Hold the blocks in columns ``first`` to before ``stop`` of every list of ``row`` for a prefix.

        Returns them, int32 ``[columns, layers, heads]``, for :meth:`drop`.
        """
        blocks = self.tables[:, row, :, first:stop].permute(2, 0, 1).clone()  # contiguous() may be a view
        self._add_holders(blocks)
        self.bound.join(row, self.prefixes, blocks.numel())
        return blocks

    def share(self, blocks: Tensor, row: int) -> None:
        """Begin the empty ``row`` with ``blocks`` [columns, layers, heads], all full, which a prefix holds."""
        columns = len(blocks)
        self._add_holders(blocks)
        self.tables[:, row, :, :columns] = blocks.permute(1, 2, 0)
        self.held[:, row] = columns
        self.lens[:, row] = columns * self.block_size
        self.bound.join(self.prefixes, row, blocks.numel())
        self.bound.longest[row] = columns * self.block_size

    def drop(self, blocks: Tensor) -> None:
        """Prefixes hold ``blocks`` no longer. Those that no row has in its lists become free."""
        blocks = blocks.flatten()
        self._push(*self._drop_holders(blocks, torch.ones_like(blocks, dtype=torch.bool)))
        self.bound.limit(self.prefixes, self.bound.blocks[self.prefixes] - blocks.numel())

    def restore(self, tables: Tensor, lens: Tensor, prefixes: Tensor) -> None:
        """Fill an empty pool: lists of ``lens`` slots in the blocks of ``tables``, and blocks that prefixes hold."""
        self.tables.copy_(tables)
        self.lens.copy_(lens)
        self.held.copy_(self.blocks_of(self.lens))
        held = prefixes.flatten().long()
        count = self.holders().scatter_add_(0, held, torch.ones_like(held, dtype=torch.int32))
        self.sharers.copy_((count - 1).clamp(min=0))
        self.free_count.copy_((count == 0).sum())
        numbers = torch.arange(self.num_blocks, dtype=torch.int32, device=count.device)
        self.free[:-1] = torch.where(count == 0, numbers, -1).sort(descending=True).values
        bound = self.bound
        bound.blocks[self.prefixes], bound.sharing = prefixes.numel(), set(range(self.prefixes))
        self._read(torch.zeros_like(self.free_count))
        bound.longest[: self.prefixes] = self.lens.amax((0, 2)).tolist()

    def holders(self) -> Tensor:
        """How many lists hold each block, int32 ``[num_blocks]``."""
        within = self._columns < self.held[..., None]
        count = torch.zeros_like(self.sharers)
        return count.scatter_add_(0, self.tables.flatten().long(), within.flatten().to(torch.int32))

    def _add_holders(self, blocks: Tensor) -> None:
        """Each of ``blocks`` has one holder more."""
        held = blocks.flatten().long()
        self.sharers.scatter_add_(0, held, torch.ones_like(held, dtype=torch.int32))

    def _drop_holders(self, blocks: Tensor, released: Tensor) -> tuple[Tensor, Tensor]:
        """Each of ``blocks`` that is ``released`` has one holder less.

        Returns all blocks of the pool, and which of them have lost their last holder."""
        count = torch.zeros_like(self.sharers).scatter_add_(0, blocks.long(), released.to(torch.int32))
        left = self.sharers - count
        self.sharers.copy_(left.clamp(min=0))
        all_blocks = torch.arange(self.num_blocks, dtype=torch.int32, device=left.device)
        return all_blocks, (count > 0) & (left < 0)

    def _push(self, blocks: Tensor, released: Tensor) -> None:
        """Those of ``blocks`` that are ``released`` become free."""
        pushed = released.cumsum(0)
        # The first block is pushed last, so that the blocks are taken again in the order they had.
        place = torch.where(released, self.free_count + pushed[-1] - pushed, self.num_blocks)
        self.free.scatter_(0, place, blocks)
        self.free_count += pushed[-1]
        self.in_order = False

    def _admit(
        self,
        index: slice | Tensor,
        rows: Sequence[int],
        new_lens: Tensor,
        num_tokens: int,
        grow: Tensor,
        *,
        unshare: bool = False,
    ) -> tuple[int | None, Copies | None]:
        """Refuse a request that does not fit, and count one that does into the bound.

        Returns how many blocks it takes (None where the host does not need to know) and the copies to make: those of
        the blocks that new tokens are written to, or with ``unshare`` those of all shared blocks."""
        if self.capturing():
            return None, None
        self._refuse_too_long(rows, new_lens, num_tokens)
        needed, copies = None, None
        unshare = unshare and self.may_share(rows)
        if unshare:
            held = self.held[:, index]
            copies = self._shared(index, torch.zeros_like(held), held, self.max_blocks, self.sharers)
        elif num_tokens and self.may_share(rows):
            lens = self.lens[:, index]
            # Tokens that begin anywhere in a block reach at most one block further than as many from its start.
            width = min(1 - (-(num_tokens - 1) // self.block_size), self.max_blocks)
            stop = torch.where(new_lens > lens, self.blocks_of(new_lens), 0)
            copies = self._shared(index, lens // self.block_size, stop, width, self.sharers)
        most = self.bound.total(rows, num_tokens) + (self.bound.most_copies(rows, self.max_blocks) if unshare else 0)
        if self.exact or most > self.num_blocks:
            total = grow.sum()
            needed = self._refuse_too_many("num_tokens", total if copies is None else total + copies.due.sum())
        if unshare:
            self.bound.copied(rows, self.max_blocks)
            self.bound.part(rows)
        self.bound.add(rows, num_tokens)
        return needed, copies

    def _refuse_too_long(self, rows: Sequence[int], new_lens: Tensor, num_tokens: int) -> None:
        bound = self.bound
        if not new_lens.numel() or all(bound.longest[row] + num_tokens <= self.max_tokens for row in rows):
            return
        bound.longest[: self.prefixes] = self.lens.amax((0, 2)).tolist()
        longest = int(new_lens.amax())
        if longest > self.max_tokens:
            raise ValueError(
                f"num_tokens: a list would hold {longest} tokens, more than the {self.max_tokens} of max_tokens: "
                "evict() first, or build the cache with a larger max_tokens"
            )

    def _refuse_too_many(self, argument: str, needed: Tensor) -> int:
        if self.exact:
            blocks = int(needed)
            free = int(self.free_count) if blocks else 0
        else:
            blocks, free = self._read(needed)
        if blocks > free:
            raise OutOfBlocksError(blocks, free, self.num_blocks, argument)
        return blocks

    def _read(self, needed: Tensor) -> tuple[int, int]:
        """Read the exact numbers into the bound, in one go; returns ``needed`` and the free blocks."""
        held = self.held.sum((0, 2))
        shares = torch.zeros_like(held)
        if self.bound.sharing:
            within = self._columns < self.held[..., None]
            shares = ((self.sharers[self.tables.long()] > 0) & within).sum((0, 2, 3))
        blocks, free, *rows = torch.cat([torch.stack([needed, self.free_count]), held, shares]).tolist()
        batch, remembered = self.prefixes, self.bound.blocks[self.prefixes]
        self.bound.read([*rows[:batch], remembered], self.num_blocks - free, [*rows[batch:], remembered])
        return blocks, free

    def _take(self, index: slice | Tensor, held: Tensor, grow: Tensor, width: int) -> None:
        """Append ``grow`` blocks (at most ``width``) from the stack to each list of the rows."""
        if not grow.numel() or not width:
            return
        if width > 1 and not self.in_order and not self.capturing():
            self._sort_free()
        last = grow.flatten().cumsum(0)
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

    def _shared(self, index: slice | Tensor, first: Tensor, stop: Tensor, width: int, sharers: Tensor) -> Copies:
        """Blocks to copy before columns ``first`` to before ``stop`` [layers, rows, heads], at most ``width``, are
        written, where ``sharers`` holders beside the first share each block."""
        columns = first.long().clamp(0, self.max_blocks - width)[..., None] + self._columns[:width]
        entries = (self._list_starts[:, index] + columns).flatten()
        blocks = self.tables.view(-1)[entries].long()
        within = (columns >= first[..., None]) & (columns < torch.minimum(stop, self.held[:, index])[..., None])
        due = within.flatten() & (sharers[blocks] > 0)
        writers = torch.zeros_like(sharers).scatter_add_(0, blocks, due.to(torch.int32))
        order = torch.arange(len(entries), device=entries.device)
        first_writer = torch.full_like(sharers, len(entries), dtype=torch.int64)
        first_writer.scatter_reduce_(0, blocks, torch.where(due, order, len(entries)), "amin")
        keeps = (writers > sharers)[blocks] & (first_writer[blocks] == order)
        return Copies(entries, blocks, due & ~keeps)

    def _replace(self, copies: Copies | None) -> tuple[Tensor, Tensor] | None:
        """Put free blocks in the place of those that are due. Returns source and target."""
        if copies is None or not len(copies.entries):
            return None
        entries, blocks, due = copies
        number = due.cumsum(0)
        fresh = self.free[(self.free_count - number).clamp_(0, self.num_blocks)]
        tables = self.tables.view(-1)
        tables[entries] = torch.where(due, fresh, tables[entries])
        self.sharers.scatter_add_(0, blocks, -due.to(torch.int32))
        self.free_count -= number[-1]
        return blocks.to(torch.int32), torch.where(due, fresh, -1)

    def _sort_free(self) -> None:
        place = torch.arange(self.num_blocks + 1, device=self.free.device)
        # In place: captured graphs read this memory.
        self.free.copy_(torch.where(place < self.free_count, self.free, -1).sort(descending=True).values)
        self.in_order = True
