"""Statistics of a paged cache, as numbers and as a report."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvops.cache.pool import BlockPool
from kvops.cache.prefix import PrefixStore
from kvops.cache.rows import RowStates
from kvops.cache.storage import BlockStorage


@dataclass(frozen=True)
class CacheStats:
    """Statistics of a :class:`~kvops.PagedKVCache` at one moment. ``str()`` gives a report.

    Attributes:
        blocks_total, blocks_in_use, block_size: the pool. A block that several rows share counts once.
        bytes_per_block, side_bytes_per_block: the bytes of keys and values with the scales of their slots, and
            of positions and scores.
        blocks_shared, blocks_saved: blocks in the lists of several rows (:meth:`~kvops.PagedKVCache.fork`,
            :meth:`~kvops.PagedKVCache.recall`), and how many more would be in use if every row had its own.
        tokens_remembered, blocks_unused: tokens of remembered prefixes, and blocks that no row uses: these are freed
            when room is needed.
        tokens_seen: int32 ``[max_batch]`` on the CPU, the tokens that each row has taken in, including evicted ones.
        lengths: int32 ``[num_layers, max_batch, num_kv_heads]`` on the CPU, slots in use of each list.
    """

    blocks_total: int
    blocks_in_use: int
    block_size: int
    bytes_per_block: int
    side_bytes_per_block: int
    blocks_shared: int
    blocks_saved: int
    tokens_remembered: int
    blocks_unused: int
    tokens_seen: Tensor
    lengths: Tensor

    @property
    def blocks_free(self) -> int:
        return self.blocks_total - self.blocks_in_use

    @property
    def bytes_in_use(self) -> int:
        """K and V of the blocks in use."""
        return self.blocks_in_use * self.bytes_per_block

    @property
    def bytes_reserved(self) -> int:
        """K and V of the whole pool."""
        return self.blocks_total * self.bytes_per_block

    @property
    def bytes_saved(self) -> int:
        """K and V of ``blocks_saved``."""
        return self.blocks_saved * self.bytes_per_block

    @property
    def slots_in_use(self) -> int:
        """Slots in use over all lists; a slot in a shared block counts once for each row."""
        return int(self.lengths.sum())

    def __str__(self) -> str:
        room = (self.blocks_in_use - self.blocks_unused + self.blocks_saved) * self.block_size
        lines = [
            f"{self.blocks_in_use:,} of {self.blocks_total:,} blocks in use "
            f"({_percent(self.blocks_in_use, self.blocks_total)}), {self.blocks_free:,} free",
            f"{_mib(self.bytes_in_use)} of {_mib(self.bytes_reserved)} MiB of keys and values in use, "
            f"{self.bytes_per_block:,} bytes a block (and {self.side_bytes_per_block:,} of positions and scores)",
            f"{self.slots_in_use:,} tokens in {room:,} slots of {self.block_size} a block "
            f"({_percent(self.slots_in_use, room)} filled)",
        ]
        if self.blocks_shared:
            lines.append(
                f"{self.blocks_shared:,} blocks are shared: {self.blocks_saved:,} more, "
                f"{_mib(self.bytes_saved)} MiB, would be in use if every row had its own"
            )
        if self.tokens_remembered:
            lines.append(
                f"{self.tokens_remembered:,} tokens of prefixes are remembered; no row uses {self.blocks_unused:,} of "
                f"their blocks, {_mib(self.blocks_unused * self.bytes_per_block)} MiB"
            )
        for row, seen in enumerate(self.tokens_seen.tolist()):
            lists = self.lengths[:, row].flatten()
            kept = int(lists.sum())
            if seen or kept:
                lines.append(
                    f"row {row}: {kept:,} tokens in {lists.numel():,} lists, shortest {int(lists.min()):,}, "
                    f"longest {int(lists.max()):,}: {_percent(kept, seen * lists.numel())} of the {seen:,} taken in"
                )
        return "\n".join(lines)


def collect(storage: BlockStorage, pool: BlockPool, prefixes: PrefixStore, states: RowStates) -> CacheStats:
    """The statistics of a cache's parts. Synchronises."""
    holders, in_use = pool.holders(), pool.blocks_in_use()
    return CacheStats(
        blocks_total=pool.num_blocks,
        blocks_in_use=in_use,
        block_size=pool.block_size,
        bytes_per_block=storage.bytes_per_block,
        side_bytes_per_block=storage.side_bytes_per_block,
        blocks_shared=int((holders > 1).sum()),
        blocks_saved=int((holders - 1).clamp(min=0).sum()),
        blocks_unused=in_use - int((holders > 0).sum()),
        tokens_remembered=len(prefixes) * pool.block_size,
        tokens_seen=states.next_positions.cpu().clone(),
        lengths=pool.lens.cpu().clone(),
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f}%"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.2f}"
