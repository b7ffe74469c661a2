"""The paged cache: one pool of blocks for all lists, each of which has its own length.

A block holds ``block_size`` slots of one KV head. A sequence (a *row*) owns ``num_layers * num_kv_heads`` lists of
blocks. Each list may be compressed at its own rate, and the blocks that it gives up are free for any other list.

Its parts are files of this package: storage (keys, values, positions, scores), pool (the blocks of each list), bound
(upper bounds on the host), prefix, rows, fork, allocator (room for tokens, copy-on-write), eviction and file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kvops import checks
from kvops.cache import file as cache_file
from kvops.cache import fork as cache_fork
from kvops.cache.allocator import Allocator
from kvops.cache.config import CacheConfig
from kvops.cache.eviction import Budget, Evictor
from kvops.cache.pool import BlockPool
from kvops.cache.prefix import PrefixStore, tokens_of
from kvops.cache.rows import Rows, RowSelector, RowStates, expect_rows
from kvops.cache.stats import CacheStats, collect
from kvops.cache.storage import BlockStorage
from kvops.ops.paged import paged_attention
from kvops.ops.paged_checks import REDUCTIONS, check_attention


class PagedKVCache:
    """Keys and values of ``max_batch`` sequences in one pool of blocks. Each head of each layer has its own length.

    Args:
        num_layers, num_kv_heads, head_dim: as in the model; ``v_head_dim`` if values have another size than keys.
        num_blocks: blocks of the pool, for all layers, heads and rows together (:meth:`blocks_for` counts them).
        max_batch: the number of rows, which is the most sequences in the cache at once.
        max_tokens: the most slots of one list.
        block_size: slots in a block.
        dtype, device: the dtype and device of keys and values; ``v_dtype`` if values have another dtype than keys. A
            side of float8_e4m3fn, float8_e5m2 or int8 takes tokens of any floating-point dtype and rounds what it
            stores; if neither side is one of these, both have the same dtype.
        k_scale, v_scale: the scale of a float8 or int8 side, a float or float32 ``[num_layers, num_kv_heads]``.
            ``k / k_scale`` is stored: an int8 cache needs it, as it holds whole numbers from -127 to 127.
        slot_scales: gives each token and head of a float8 or int8 side a scale of its own instead, computed by
            :meth:`append`: no calibration, and large tokens cost the others no precision. It takes 4 bytes a slot.

    Attributes:
        k_cache, v_cache: ``[num_blocks, block_size, head_dim]`` and ``[..., v_head_dim]``, not initialised.
        positions: int32 ``[num_blocks, block_size]``, the original position of the token in each slot.
        scores: float32 ``[num_blocks, block_size]``, what :meth:`attend` accumulates and :meth:`evict` ranks by.
        k_scale, v_scale: float32 ``[num_layers, num_kv_heads]``, or None.
        k_slot_scale, v_slot_scale: float32 ``[num_blocks, block_size]``, the scale of each slot, or None.
        block_tables: int32 ``[num_layers, max_batch, num_kv_heads, max_blocks]``.
        seq_lens: int32 ``[num_layers, max_batch, num_kv_heads]``, slots in use of each list.
        next_positions: int32 ``[max_batch]``, the length of each sequence before any eviction.
        compressed: for each row, whether :meth:`evict` or :meth:`keep` has run on it since it was empty.

    ``rows`` names the rows that a method works on: a slice, one row, a sequence of row numbers or an int64 tensor
    (which the host has to read). A decoding step is one :meth:`extend`, then :meth:`append` and :meth:`attend` for
    each layer. A row is empty at first and after :meth:`free`. Sequences join and leave between any two steps.

    **Sharing.** Rows share whole blocks after :meth:`fork` and :meth:`recall`. A row that writes to a shared block gets
    its own copy first: the partly filled last block when tokens are appended, the blocks into which :meth:`evict` moves
    slots, and all blocks of a row before its scores change. So a row always holds what it would hold if it shared
    nothing. If there are too few free blocks for copies, :class:`OutOfBlocksError` is raised before anything changes.

    **CUDA graphs.** :meth:`extend`, :meth:`append`, :meth:`attend`, :meth:`rollback`, :meth:`retain` and, with a budget
    that is one number or lies on the device, :meth:`evict` of rows given as a slice can be captured as they are. What
    the host decides (is there room? which rows share blocks?) is not part of a graph: call :meth:`prepare` before each
    replay, and :meth:`unshare` once after rows came to share blocks if the graph accumulates scores.

    **Synchronisation.** The host reads numbers from the device only when its upper bounds say that a request might not
    fit. Until the next reading these count tokens that were rolled back, so leave room for a few hundred of those in
    ``num_blocks`` and ``max_tokens``. With ``num_blocks >= max_batch * blocks_for(max_tokens)`` only the length of the
    longest list ever has to be read.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_blocks: int,
        max_batch: int,
        max_tokens: int,
        block_size: int = 16,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        v_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        slot_scales: bool = False,
    ) -> None:
        self._config = config = CacheConfig(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            v_head_dim=head_dim if v_head_dim is None else v_head_dim,
            num_blocks=num_blocks,
            max_batch=max_batch,
            max_tokens=max_tokens,
            block_size=block_size,
            dtype=dtype,
            v_dtype=dtype if v_dtype is None else v_dtype,
            device=torch.device(device),
        )
        with torch.inference_mode(False):  # tensors made in inference mode cannot be written outside of it
            self._storage = BlockStorage(config, k_scale, v_scale, slot_scales)
            self._pool = BlockPool(config)
            self._states = RowStates(config.max_batch, config.device)
        self._prefixes = PrefixStore(self._pool)
        self._selector = RowSelector(self._pool)
        self._allocator = Allocator(self._pool, self._storage, self._prefixes, self._selector)
        self._evictor = Evictor(config, self._allocator, self._states)
        self._name_parts()

    def _name_parts(self) -> None:
        """The public attributes: sizes, and tensors of the parts."""
        config, storage, states = self._config, self._storage, self._states
        self.num_layers, self.num_kv_heads = config.num_layers, config.num_kv_heads
        self.num_blocks, self.block_size, self.max_blocks = config.num_blocks, config.block_size, config.max_blocks
        self.max_batch, self.max_tokens, self.device = config.max_batch, config.max_tokens, config.device
        self.k_cache, self.v_cache = storage.k_cache, storage.v_cache
        self.positions, self.scores = storage.positions, storage.scores
        self.k_scale, self.v_scale = storage.k_scale, storage.v_scale
        self.k_slot_scale, self.v_slot_scale = storage.k_slot_scale, storage.v_slot_scale
        self.block_tables, self.seq_lens = self._pool.tables, self._pool.lens
        self.next_positions, self.compressed = states.next_positions, states.compressed

    def __getstate__(self) -> dict[str, Any]:
        """The state without views, which are made again. Tensors that parts share stay shared."""
        return {name: value for name, value in self.__dict__.items() if name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._name_parts()

    def __repr__(self) -> str:
        lists = f"{self.num_layers} layers, {self.num_kv_heads} KV heads of {self._config.head_dim}"
        rows = f"{self.max_batch} rows of up to {self.max_tokens} tokens"
        blocks = f"{self.num_blocks} blocks of {self.block_size}"
        dtypes = dict.fromkeys(str(side.dtype) for side in (self.k_cache, self.v_cache))
        return f"PagedKVCache({lists}, {rows}, {blocks}, {' and '.join(dtypes)}, {self.device})"

    @property
    def bytes_per_block(self) -> int:
        """Bytes of keys and values in a block, with the scales of their slots."""
        return self._storage.bytes_per_block

    def blocks_for(self, tokens: int) -> int:
        """Blocks that one row of ``tokens`` tokens takes with nothing evicted, over all layers and heads."""
        return self._config.lists_per_row * -(-tokens // self.block_size)

    def extend(self, num_tokens: int, *, q_lens: Tensor | None = None, rows: Rows = slice(None)) -> Tensor:
        """Make room for ``num_tokens`` more tokens in every list of ``rows``, and count them.

        Args:
            num_tokens: T, the tokens that each row gets.
            q_lens: int32 ``[B']``, the number of tokens of each row if it is not T.

        Returns: int32 ``[B', T]``, the original positions of the tokens. Those past ``q_lens`` have no meaning.

        Raises :class:`OutOfBlocksError` when the pool is too small, and ValueError when a list would grow beyond
        ``max_tokens``, both before anything is changed.
        """
        selection = self._selector.select(rows)
        checks.expect_int("num_tokens", num_tokens, 0)
        index = selection.index
        if q_lens is None:
            self._selector.expect_tokens(num_tokens)
            new_lens = self.seq_lens[:, index] + num_tokens
        else:
            self._selector.expect_per_row("q_lens", q_lens, selection)
            if self._selector.checks_data():
                within = (q_lens >= 0) & (q_lens <= num_tokens)
                checks.expect_data("q_lens", f"numbers from 0 to num_tokens = {num_tokens}", within)
            new_lens = self.seq_lens[:, index] + q_lens[:, None]
        first = self.next_positions[index]
        token_positions = first[:, None] + torch.arange(num_tokens, dtype=torch.int32, device=self.device)
        self._allocator.reserve(selection, new_lens, num_tokens)
        self._selector.changed()
        self.seq_lens[:, index] = new_lens
        self.next_positions[index] = first + (num_tokens if q_lens is None else q_lens)
        return token_positions

    def prepare(self, num_tokens: int, *, rows: Rows = slice(None), evicts: bool = False) -> None:
        """The host's part of an :meth:`extend` by up to ``num_tokens``, before a CUDA graph replays it.

        Counts the tokens and copies the shared blocks that they are written to. If the graph ``evicts`` too, the rows
        get copies of all blocks that they share, and count as compressed from now on. Raises as :meth:`extend` does,
        before anything is changed. It may read numbers from the device: call it outside the graph.
        """
        self._selector.expect_tokens(num_tokens)
        selection = self._selector.select(rows)
        self._allocator.prepare(selection, num_tokens, unshare=evicts)
        self._selector.changed()
        if evicts:
            self._states.mark_compressed(selection)

    def append(
        self,
        layer: int,
        k: Tensor,
        v: Tensor,
        token_positions: Tensor,
        *,
        q_lens: Tensor | None = None,
        rows: Rows = slice(None),
    ) -> None:
        """Write the keys and values of one layer into the room that :meth:`extend` made.

        Args:
            layer: from 0.
            k, v: ``[B', T, Hkv, D]`` and ``[B', T, Hkv, Dv]`` of the newest T tokens, in the cache's dtype (any where
                both sides are float8 or int8).
            token_positions: int32 ``[B', T]``, what :meth:`extend` returned.
            q_lens: what :meth:`extend` was given: the first ``q_lens[b]`` tokens of a row are written.

        Raises ValueError and TypeError for other shapes, dtypes and devices, before anything is written. No gradient.
        """
        lists = self._selector.layer(layer, self._selector.select(rows))
        expect_rows("k", k, len(lists[1]))
        self._storage.append(layer, k, v, lists, token_positions, q_lens)

    def attend(
        self,
        layer: int,
        q: Tensor,
        *,
        q_lens: Tensor | None = None,
        rows: Rows = slice(None),
        query_positions: Tensor | None = None,
        window_left: int = -1,
        chunk: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        scale: float | None = None,
        tree_mask: Tensor | None = None,
        causal: bool = True,
        bias: Tensor | None = None,
        accumulate: Literal["sum", "sumsq", "max"] | None = None,
        decay: float = 1.0,
    ) -> Tensor:
        """Attention of the newest T tokens over one layer's lists, which hold their keys: call :meth:`append` first.

        Args:
            layer: from 0.
            q: ``[B', T, Hq, D]``; Hq is a multiple of the cache's heads.
            q_lens: int32 ``[B']``, the number of real tokens of each row if it is not T; the output of padding is 0.
            query_positions: int32 ``[B', T]``, for windows; None for the positions that :meth:`extend` returned.
            window_left: the number of original positions before its own that a query sees, -1 for all.
            chunk: queries see only their own chunk of so many original positions instead; 0 for no chunks.
            softcap, sinks, scale, causal, bias: as in :func:`kvops.paged_attention`; a bias is for slots of lists.
            tree_mask: bool ``[B', T, T]``, in place of causality: which tokens each one sees (:func:`kvops.tree_mask`).
            accumulate: "sum", "sumsq" or "max" adds the attention that each slot receives to ``scores``, after
                multiplying these by ``decay``. Rows that share blocks get their own copies first, in all layers.

        Returns ``[B', T, Hq, Dv]`` in q's dtype. Raises ValueError and TypeError as :func:`kvops.paged_attention`, and
        :class:`OutOfBlocksError` where there are too few blocks for copies. There is no gradient.
        """
        selection = self._selector.select(rows)
        lists = self._selector.layer(layer, selection)
        expect_rows("q", q, len(lists[1]))
        options: dict[str, Any] = {"q_lens": q_lens, "scale": scale, "softcap": softcap, "sinks": sinks}
        options |= {"tree_mask": tree_mask, "causal": causal, "bias": bias, **self._storage.scales(layer)}
        if window_left >= 0 or chunk:
            if query_positions is None:
                first = self.next_positions[selection.index] - (q.shape[1] if q_lens is None else q_lens)
                query_positions = first[:, None] + torch.arange(q.shape[1], dtype=torch.int32, device=self.device)
            options |= self._storage.reach(query_positions, window_left, chunk)
        if accumulate is not None:
            checks.expect_choice("accumulate", accumulate, REDUCTIONS)
            checks.expect_at_least("decay", decay, 0)
            options |= {"scores": self.scores, "score_reduce": accumulate, "score_decay": decay}
            if self._pool.may_share(selection.numbers) and not self._pool.capturing():
                check_attention(q, self.k_cache, self.v_cache, *lists, **options)  # before blocks are copied
                self._allocator.unshare(selection)
                lists = self._selector.layer(layer, selection)
        schedule = self._selector.schedule(layer, selection)
        return paged_attention(q, self.k_cache, self.v_cache, *lists, schedule=schedule, **options)[0]

    def set_scores(self, layer: int, scores: Tensor, *, rows: Rows = slice(None)) -> None:
        """Store float32 ``[B', Hkv, S]`` in list order as the scores of the first S slots of each list of a layer.

        Entries past a list's length are ignored. Rows that share blocks get their own copies first, which may raise
        :class:`OutOfBlocksError`. ValueError for another shape, or more slots than the blocks of a list have.
        """
        selection = self._selector.select(rows)
        _, lens = self._selector.layer(layer, selection)
        capacity = self.max_blocks * self.block_size
        checks.expect_tensor("scores", scores)
        checks.expect_shape("scores", scores, "[B', Hkv, S]", *lens.shape, None)
        checks.expect_same_device("scores", scores, "the cache", lens)
        if scores.shape[-1] > capacity:
            raise ValueError(f"scores: expected at most {capacity} slots (max_tokens), got {scores.shape[-1]}")
        self._allocator.unshare(selection)
        self._storage.set_scores(*self._selector.layer(layer, selection), scores)

    def evict(
        self,
        budget: Budget,
        *,
        rows: Rows = slice(None),
        protect_first: int = 0,
        protect_last: int = 0,
        min_per_head: int = 0,
        scope: Literal["head", "sequence"] = "sequence",
    ) -> None:
        """Reduce each of ``rows`` to ``budget`` blocks over all its layers and heads, keeping the best by ``scores``.

        Kept slots stay in their order. The blocks given up are free at once, unless another row shares them. A row that
        holds less than its budget keeps everything.

        Args:
            budget: one number, or one for each row (int32 ``[B']``), or one for each layer of each row
                (``[B', num_layers]``). In the last case only the heads of a layer share or compete for its budget.
            protect_first, protect_last, min_per_head, scope: as in :func:`kvops.select_blocks`, with protection
                measured in original positions.

        Raises ValueError, before anything is changed, when protection and floor alone take more than the budget. The
        host reads a budget that lies on a GPU for that, unless a graph is captured; it does not read back numbers. Rows
        that share blocks may need free ones for copies of those that slots are moved into: :class:`OutOfBlocksError`,
        before anything is changed.
        """
        self._evictor.evict(
            budget,
            self._selector.select(rows),
            protect_first=protect_first,
            protect_last=protect_last,
            min_per_head=min_per_head,
            scope=scope,
        )

    def keep(self, layer: int, kept: Tensor, *, rows: Rows = slice(None)) -> None:
        """Keep the slots of a layer that ``kept``, bool ``[B', Hkv, S]`` in list order, marks among the first S.

        Slots behind these stay, and marks past a list's end have no meaning. Kept slots stay in their order, and the
        blocks given up are free at once, unless another row shares them.

        Raises TypeError and ValueError for another dtype or shape, and :class:`OutOfBlocksError` where rows that share
        blocks find too few for copies of their own.
        """
        self._evictor.keep(layer, kept, self._selector.select(rows))

    def rollback(self, num_tokens: int | Tensor, *, rows: Rows = slice(None)) -> None:
        """Remove the last ``num_tokens`` (a number, or int32 ``[B']``) tokens from every list of ``rows``.

        Their blocks stay with the lists, for the next :meth:`extend`. What their queries added to the scores of older
        slots stays too. Only tokens that came in after the last :meth:`evict` or :meth:`keep` that removed anything can
        be rolled back. A fork can be rolled back past the point where it was forked.

        Raises ValueError for more tokens than that, or than a list has (on the CPU and with ``KVOPS_DEBUG=1``).
        """
        self._evictor.rollback(num_tokens, self._selector.select(rows))

    def retain(self, keep: Tensor, *, q_lens: Tensor | None = None, rows: Rows = slice(None)) -> None:
        """Of the last T tokens of every list of ``rows``, keep those that ``keep``, bool ``[B', T]``, marks.

        Kept tokens move together in their order, with their positions and scores, byte for byte and without
        synchronising. The others are removed as by :meth:`rollback`. With ``q_lens`` int32 ``[B']`` only the last
        ``q_lens[b]`` tokens of a row are meant, and the first ``q_lens[b]`` columns of its ``keep``. This keeps the
        accepted path of a tree of drafts and removes its other branches.

        Raises as :meth:`rollback` does for tokens that cannot be removed.
        """
        self._evictor.retain(keep, q_lens, self._selector.select(rows))

    def free(self, rows: Rows = slice(None)) -> None:
        """Empty ``rows``. The blocks that no other row shares go back to the pool; lengths and positions become 0."""
        selection = self._selector.select(rows)
        index, numbers = selection.index, selection.numbers
        self._selector.changed()
        self._pool.release(index, numbers, torch.zeros_like(self.seq_lens[:, index]))
        self.seq_lens[:, index] = 0
        self._states.clear(selection)
        for row in numbers:
            self._pool.bound.limit(row, 0)

    def fork(self, row: int, into: Rows, *, num_tokens: int | None = None) -> None:
        """Let the rows ``into`` continue from what ``row`` holds. They share its blocks until one of them writes.

        Copies nothing but tables. What a row does afterwards never shows in another. What ``into`` held is freed.

        Args:
            row: the row to continue from.
            into: other rows.
            num_tokens: share only the first so many tokens; of a row that has not been compressed.

        Raises:
            ValueError: ``row`` among ``into`` or out of range; ``num_tokens`` given for a compressed row, or more than
                the row has (checked on the CPU and with ``KVOPS_DEBUG=1``; otherwise all that it has are shared).
        """
        cache_fork.fork(self, row, into, num_tokens)

    def reorder(self, order: Sequence[int] | Tensor) -> None:
        """Let every row i continue from what row ``order[i]`` holds, as the beams of a search do.

        Rows may repeat and share blocks as after :meth:`fork`; rows that are left out are freed. The host reads
        ``order``. Raises ValueError for another length than ``max_batch``, or a row out of range.
        """
        cache_fork.reorder(self, order)

    def with_rows(self, order: Sequence[int] | Tensor, *, num_blocks: int | None = None) -> PagedKVCache:
        """A new cache of ``len(order)`` rows, where row i holds what row ``order[i]`` of this one holds.

        Its pool is a copy, of ``num_blocks`` (None: as many as here). Rows that repeat share blocks in it. It remembers
        no prefixes. Raises ValueError for fewer blocks than here, no rows, or a row out of range.
        """
        return cache_fork.with_rows(self, order, num_blocks)

    def unshare(self, rows: Rows = slice(None)) -> None:
        """Give ``rows`` copies of their own of all blocks that they share.

        Raises :class:`OutOfBlocksError`, before anything is changed, when the pool is too small for that.
        """
        self._allocator.unshare(self._selector.select(rows))

    def remember(self, row: int, tokens: Sequence[int] | Tensor, *, salt: str = "") -> int:
        """Keep the full blocks of ``row`` that hold the first of its ``tokens``.

        They stay for :meth:`recall` when the row goes on, is compressed or leaves, with the scores they have now.

        Args:
            row: a row that has not been compressed.
            tokens: the tokens whose keys and values ``row`` holds, from its first on; more may follow in the row.
            salt: what else the keys and values depend on (an adapter, the tenant). Only equal salts match.

        Returns: how many tokens are remembered, including those remembered before.

        Raises ValueError for a compressed row, or more tokens than the row has. Synchronises.
        """
        source = self._selector.one("row", row)
        tokens, held = tokens_of(tokens), int(self.next_positions[source])
        if self.compressed[source]:
            raise ValueError(f"row: expected one that has not been compressed, got {source}, which evict() ran on")
        if len(tokens) > held:
            raise ValueError(f"tokens: expected at most the {held} of row {source}, got {len(tokens)}")
        return self._prefixes.remember(source, tokens, salt)

    def recall(self, row: int, tokens: Sequence[int] | Tensor, *, salt: str = "") -> int:
        """Begin ``row`` with the longest remembered prefix of ``tokens``. What it held before is freed.

        Returns how many tokens it then has: full blocks, and never the last token, whose logits are still to come.
        Continue with ``tokens`` from there. What the row does afterwards never shows in another. Calls of this method
        and of :meth:`remember` count as uses of a prefix; the least recently used is dropped first.
        """
        target = self._selector.one("row", row)
        found = self._prefixes.find(tokens_of(tokens)[:-1], salt)
        self.free(target)
        if found is None:
            return 0
        self._pool.share(found, target)
        self.next_positions[target] = len(found) * self.block_size
        return len(found) * self.block_size

    def forget(self) -> None:
        """Drop all remembered prefixes. Rows that use their blocks keep them."""
        self._prefixes.clear()

    def gather(self, layer: int, row: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of one list in order: k ``[len, D]``, v ``[len, Dv]``, positions int32 ``[len]``. Synchronises.

        IndexError for a layer, row or head that is out of range.
        """
        length = int(self.seq_lens[layer, row, head])
        return self._storage.read(self.block_tables[layer, row, head, : -(-length // self.block_size)], length)

    def stats(self) -> CacheStats:
        """Blocks, bytes and lengths at this moment. Synchronises."""
        return collect(self._storage, self._pool, self._prefixes, self._states)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all rows and remembered prefixes to a safetensors file, every byte of them and each block once.

        A file of that name is replaced once the new one is complete. Raises FileNotFoundError if its folder does not
        exist, and ImportError without safetensors (``pip install "kvops[save]"``).
        """
        cache_file.save(self, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, num_blocks: int | None = None, device: torch.device | str = "cpu"
    ) -> PagedKVCache:
        """The cache that :meth:`save` wrote, on any device.

        ``num_blocks`` is the size of its pool, None for as many as there were. Raises FileNotFoundError; ValueError
        for another file, or for a pool smaller than what the file holds; ImportError without safetensors.
        """
        arguments, tensors = cache_file.read(path, device)
        if num_blocks is not None:
            arguments["num_blocks"] = num_blocks
        cache = cls(**arguments)
        cache_file.restore(cache, tensors)
        return cache
