"""The paged caches of one model: one for all layers whose heads have the same number and size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvops.cache import PagedKVCache
from kvops.integrations.transformers.config import HeadGroup
from kvops.policies import Compression


class Pools:
    """A :class:`kvops.PagedKVCache` for each of ``groups``. It is made when the first keys of the group come.

    Args:
        groups: the layers that store keys.
        num_blocks: of all pools together, dealt out by the number of their heads; None makes room for all rows.
        max_tokens, block_size: of every pool.
    """

    def __init__(self, groups: Sequence[HeadGroup], num_blocks: int | None, max_tokens: int, block_size: int) -> None:
        self._groups, self.max_tokens, self.block_size = groups, max_tokens, block_size
        self._num_blocks = [0] * len(groups)  # 0 makes room for all rows
        if num_blocks is not None:
            lists = [group.kv_heads * len(group.layers) for group in groups]
            self._num_blocks = [num_blocks * count // sum(lists) for count in lists]
            if min(self._num_blocks) < 1:
                raise ValueError(f"num_blocks: expected at least one for each of {len(groups)} pools, got {num_blocks}")
        self._made: list[PagedKVCache | None] = [None] * len(groups)
        # For each layer: its group, and its place among the layers of the group.
        self.places = {
            layer: (number, place) for number, group in enumerate(groups) for place, layer in enumerate(group.layers)
        }

    def __iter__(self) -> Iterator[PagedKVCache]:
        return (pool for pool in self._made if pool is not None)

    def __len__(self) -> int:
        return len(self._groups)

    def of(self, layer: int) -> tuple[PagedKVCache, int]:
        """The pool of a layer that has stored keys, and the layer's place in it."""
        number, place = self.places[layer]
        pool = self._made[number]
        assert pool is not None, layer
        return pool, place

    def clear_for(self, keys: Tensor) -> None:
        """Drop empty pools that were made for another batch size, dtype or device than those of ``keys``."""
        if any((len(keys), keys.dtype, keys.device) != (p.max_batch, p.k_cache.dtype, p.device) for p in self):
            self._made = [None] * len(self._made)

    def admit(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Make sure that there is a pool for keys and values ``[B, Hkv, T, ·]`` of ``layer``.

        Raises ValueError where they do not fit into the one that there is.
        """
        number, _ = self.places[layer]
        batch, heads, _, head_dim = keys.shape
        shape = heads, head_dim, values.shape[3]
        pool = self._made[number]
        if pool is not None:
            held = pool.num_kv_heads, pool.k_cache.shape[2], pool.v_cache.shape[2]
            if shape != held:
                raise ValueError(
                    "config: expected KV heads of one number and size in all layers that the config describes alike, "
                    f"got {_heads(*shape)} in layer {layer} and {_heads(*held)} before: generate with the model's own "
                    "cache"
                )
            if batch != pool.max_batch:
                raise ValueError(
                    f"key_states: expected a batch of {pool.max_batch}, as before, got {batch}: call reset() before "
                    "another batch"
                )
            return
        layers = len(self._groups[number].layers)
        self._made[number] = PagedKVCache(
            num_layers=layers,
            num_kv_heads=heads,
            head_dim=head_dim,
            v_head_dim=values.shape[3],
            num_blocks=self._num_blocks[number] or layers * heads * batch * -(-self.max_tokens // self.block_size),
            max_batch=batch,
            max_tokens=self.max_tokens,
            block_size=self.block_size,
            dtype=keys.dtype,
            device=keys.device,
        )

    def with_rows(self, order: Sequence[int]) -> None:
        """Let row i hold what row ``order[i]`` held; there may be more or fewer rows."""
        for number, pool in enumerate(self._made):
            if pool is not None:
                room = self._num_blocks[number] or pool.num_blocks // pool.max_batch * len(order)
                self._made[number] = pool.with_rows(order, num_blocks=max(room, pool.num_blocks))

    def compress(self, compression: Compression, seen: Sequence[int], rows: Sequence[int]) -> None:
        """Compress ``rows``, sequences of ``seen`` tokens, in every pool: limits are dealt out by bytes and blocks."""
        pools = list(self)
        blocks = [pool.blocks_for(1) for pool in pools]
        sizes = [pool.blocks_for(1) * pool.bytes_per_block for pool in pools]
        for pool, count, size in zip(pools, blocks, sizes, strict=True):
            part = compression
            if len(pools) > 1 and compression.blocks is not None:
                part = replace(part, blocks=compression.blocks * count // sum(blocks))
            if len(pools) > 1 and compression.mib is not None:
                part = replace(part, mib=compression.mib * size / sum(sizes))
            part.apply(pool, seen, rows)


def copies(pool: PagedKVCache, place: int, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values of layer ``place`` as transformers' own cache has them, ``[B, Hkv, length, ·]``.

    The column of a token is its entry in ``positions``; columns without a token are 0.
    """
    tables, lens = pool.block_tables[place], pool.seq_lens[place]
    slot = torch.arange(pool.max_blocks * pool.block_size, device=pool.device)
    slots = tables.long().repeat_interleave(pool.block_size, -1) * pool.block_size + slot % pool.block_size
    held = slot < lens[..., None]
    # Slots past the end of a list go to one column more, which is cut off.
    column = torch.where(held, pool.positions.flatten()[torch.where(held, slots, 0)].long(), length)
    source = torch.full((*lens.shape, length + 1), -1, dtype=torch.int64, device=pool.device)
    source = source.scatter_(-1, column, slots)[..., :length]
    k, v = (side.flatten(0, 1)[source.clamp(min=0)] for side in (pool.k_cache, pool.v_cache))
    empty = (source < 0)[..., None]
    return k.masked_fill_(empty, 0), v.masked_fill_(empty, 0)


def _heads(count: int, head_dim: int, v_head_dim: int) -> str:
    sizes = f"size {head_dim}" if head_dim == v_head_dim else f"sizes {head_dim} and {v_head_dim}"
    return f"{count} of {sizes}"
