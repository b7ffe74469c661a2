"""What a paged cache holds at one moment, as numbers and as a report."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CacheStats:
    """What a :class:`~kvops.PagedKVCache` holds at one moment; ``str()`` reads like a report.

    ``bytes_per_block`` counts K and V; ``side_bytes_per_block`` counts what is kept beside them for each slot
    (original positions and scores). ``bytes_in_use`` and ``bytes_reserved`` count K and V of the blocks in use and of
    the whole pool. A block that several rows share (:meth:`~kvops.PagedKVCache.fork`) is in use once: ``blocks_shared``
    blocks are, and ``blocks_saved`` more would be in use if every row had its own. ``lengths`` is int32
    ``[num_layers, max_batch, num_kv_heads]`` on the CPU, in slots, those in shared blocks counted for each row.
    """

    blocks_total: int
    blocks_in_use: int
    block_size: int
    bytes_per_block: int
    side_bytes_per_block: int
    blocks_shared: int
    blocks_saved: int
    lengths: Tensor

    @property
    def blocks_free(self) -> int:
        return self.blocks_total - self.blocks_in_use

    @property
    def bytes_in_use(self) -> int:
        return self.blocks_in_use * self.bytes_per_block

    @property
    def bytes_reserved(self) -> int:
        return self.blocks_total * self.bytes_per_block

    @property
    def bytes_saved(self) -> int:
        return self.blocks_saved * self.bytes_per_block

    @property
    def slots_in_use(self) -> int:
        return int(self.lengths.sum())

    def __str__(self) -> str:
        mib = 1 / 2**20
        share = 100 * self.blocks_in_use / max(self.blocks_total, 1)
        room = (self.blocks_in_use + self.blocks_saved) * self.block_size  # a shared block stands in several lists
        filled = 100 * self.slots_in_use / max(room, 1)
        lines = [
            f"{self.blocks_in_use} of {self.blocks_total} blocks in use ({share:.1f}%), {self.blocks_free} free",
            f"{self.bytes_in_use * mib:.2f} of {self.bytes_reserved * mib:.2f} MiB of keys and values in use, "
            f"{self.bytes_per_block} bytes a block (and {self.side_bytes_per_block} of positions and scores)",
            f"{self.slots_in_use} tokens in {room} slots of {self.block_size} a block ({filled:.1f}% filled)",
        ]
        if self.blocks_shared:
            lines.append(
                f"{self.blocks_shared} blocks are shared, counted once: {self.blocks_saved} more, "
                f"{self.bytes_saved * mib:.2f} MiB, if every row had its own"
            )
        for row in range(self.lengths.shape[1]):
            lists = self.lengths[:, row].flatten()
            if int(lists.sum()):
                lines.append(
                    f"row {row}: {int(lists.sum())} tokens in {lists.numel()} lists, "
                    f"shortest {int(lists.min())}, longest {int(lists.max())}"
                )
        return "\n".join(lines)
