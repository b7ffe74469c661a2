"""The paged cache: one pool of blocks that every (layer, row, head) list draws on, with a length of its own each.

A block holds ``block_size`` slots of one KV head. A sequence (a *row*) owns ``num_layers * num_kv_heads`` lists of
blocks, and each list may be compressed at its own rate: what it gives up is free for any other list at once. Blocks
are handed out and taken back on the device (a stack of free block numbers and prefix sums); the host keeps an upper
bound of what is in use and reads the exact number only where the bound says that a request might not fit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvops import checks
from kvops.cache import file as cache_file
from kvops.cache.eviction import CacheEviction
from kvops.cache.pool import OutOfBlocksError
from kvops.cache.stats import CacheStats
from kvops.cache.storage import Rows
from kvops.ops.eviction import compact
from kvops.ops.paged import REDUCTIONS, check_attention, paged_append, paged_attention

__all__ = ["CacheStats", "OutOfBlocksError", "PagedKVCache"]


class PagedKVCache(CacheEviction):
    """Keys and values of ``max_batch`` sequences in one pool of blocks, each head of each layer with its own length.

    Args:
        num_layers, num_kv_heads, head_dim: of the model; ``v_head_dim`` where values have another size than keys.
        num_blocks: blocks of the pool, for all layers, heads and rows together (:meth:`blocks_for` counts them).
        max_batch: rows, that is sequences that can live in the cache at once.
        max_tokens: slots that one list can have at most.
        block_size: slots in a block.
        dtype, device: of keys and values. A float8_e4m3fn cache takes and gives other dtypes and rounds what it stores.
        k_scale, v_scale: of a float8 cache, a float or float32 ``[num_layers, num_kv_heads]``: ``k / k_scale`` is what
            it stores.

    Attributes:
        k_cache, v_cache: ``[num_blocks, block_size, head_dim]`` and ``[..., v_head_dim]``, not initialised.
        positions: int32 ``[num_blocks, block_size]``, the original position of the token in each slot.
        scores: float32 ``[num_blocks, block_size]``, what :meth:`attend` accumulates and :meth:`evict` ranks by.
        block_tables: int32 ``[num_layers, max_batch, num_kv_heads, max_blocks]``.
        seq_lens: int32 ``[num_layers, max_batch, num_kv_heads]``, slots in use of each list.
        next_positions: int32 ``[max_batch]``, the true length of each sequence, which eviction does not change.
        compressed: for each row, whether :meth:`evict` has run on it since it was empty.

    ``rows`` names the rows that a method works on: a slice, one row, a sequence of row numbers or an int64 tensor
    (which the host has to read). A step of decoding is one :meth:`extend`, then :meth:`append` and :meth:`attend` for
    each layer. A row is empty at first and after :meth:`free`; sequences join and leave between any two steps.

    **Sharing.** :meth:`fork` lets rows share blocks, whole, with their positions and scores. A shared block is never
    written: who would write it, gets a copy first. That is the partly filled last block when tokens are appended, the
    blocks into which :meth:`evict` moves slots, and, as every slot may be scored, all blocks of a row before
    :meth:`set_scores` and before the first :meth:`attend` that accumulates. So a row always holds what it would hold
    if it shared nothing. Copies need free blocks: where there are too few, :class:`OutOfBlocksError` comes before
    anything is changed.

    **Prefixes.** :meth:`remember` keeps the full blocks of a prompt for rows to come, whatever becomes of the row, and
    :meth:`recall` begins a row with the longest prefix of its tokens that is remembered. Remembered blocks are shared
    like those of a fork. Those that no row uses are given back, least recently used first, as soon as room is needed.

    **CUDA graphs.** :meth:`extend`, :meth:`append`, :meth:`attend`, :meth:`rollback`, :meth:`retain` and, with a budget
    that is one number or lies on the device, :meth:`evict` of rows given as a slice can be captured as they are. What
    the host decides (is there room? who shares a block?) is not part of a graph: call :meth:`prepare` before each
    replay, and :meth:`unshare` once after rows came to share blocks if the graph accumulates scores.

    The host reads numbers from the device only where its upper bounds say that a request might not fit. They count
    tokens that were rolled back until the next reading, so leave room for a few hundred of those in ``num_blocks`` and
    ``max_tokens``; with ``num_blocks >= max_batch * blocks_for(max_tokens)`` only the longest list ever has to be read.
    """

    def extend(self, num_tokens: int, *, q_lens: Tensor | None = None, rows: Rows = slice(None)) -> Tensor:
        """Make room for ``num_tokens`` more tokens in every list of ``rows`` and count them in.

        Args:
            num_tokens: T, the tokens that each row gets.
            q_lens: int32 ``[B']``, where rows get different numbers of tokens, each at most T.

        Returns: int32 ``[B', T]``, the original positions of the tokens (those past ``q_lens`` mean nothing).

        Raises :class:`OutOfBlocksError` when the pool is too small and ValueError when a list would grow beyond
        ``max_tokens``, both before anything is changed.
        """
        index, numbers = self._resolve(rows)
        checks.expect_int("num_tokens", num_tokens, 0)
        lens = self.seq_lens[:, index]
        if q_lens is None:
            self._expect_tokens("num_tokens", num_tokens)
            new_lens = lens + num_tokens
        else:
            self._expect_per_row("q_lens", q_lens, len(numbers))
            if self._pool.exact or checks.debug():
                within = (q_lens >= 0) & (q_lens <= num_tokens)
                checks.expect_data("q_lens", f"numbers from 0 to num_tokens = {num_tokens}", within)
            new_lens = lens + q_lens[:, None]
        first = self.next_positions[index]
        token_positions = first[:, None] + torch.arange(num_tokens, dtype=torch.int32, device=self.device)
        self._copy(self._making_room(lambda: self._pool.reserve(index, numbers, new_lens, num_tokens)))
        self._changed()
        self.seq_lens[:, index] = new_lens
        self.next_positions[index] = first + (num_tokens if q_lens is None else q_lens)
        return token_positions

    def prepare(self, num_tokens: int, *, rows: Rows = slice(None), evicts: bool = False) -> None:
        """The host's part of an :meth:`extend` by up to ``num_tokens`` that a CUDA graph is about to replay.

        Counts the tokens in, and copies shared blocks that they would be written to. Where the graph ``evicts`` too,
        the rows get copies of all blocks that they share and count as compressed from now on. Raises as :meth:`extend`
        does, before anything is changed; may read numbers from the device, so it belongs outside the graph.
        """
        self._expect_tokens("num_tokens", num_tokens)
        index, numbers = self._resolve(rows)

        def fits() -> bool:
            held = self._pool.held[:, index]
            first = torch.zeros_like(held)
            return self._pool.fits_without_prefixes(index, first, held, self.max_blocks, num_tokens)

        def prepare() -> tuple[Tensor, Tensor] | None:
            return self._pool.prepare(index, numbers, num_tokens, own=evicts)

        self._copy(self._making_room(prepare, fits if evicts else None))
        self._changed()
        for row in numbers if evicts else ():
            self.compressed[row] = True

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
            k, v: ``[B', T, Hkv, D]`` and ``[B', T, Hkv, Dv]`` of the newest T tokens of ``rows``, in the cache's dtype
                (any for a float8 cache).
            token_positions: int32 ``[B', T]``, what :meth:`extend` returned.
            q_lens: what :meth:`extend` was given: the first ``q_lens[b]`` tokens of a row are written.

        Raises ValueError and TypeError for other shapes, dtypes and devices, before anything is written. There is no
        gradient: call it under ``torch.no_grad()``.
        """
        tables, lens = self._layer(layer, rows)
        self._expect_rows("k", k, len(lens))
        paged_append(
            k,
            v,
            self.k_cache,
            self.v_cache,
            tables,
            lens,
            q_lens=q_lens,
            positions=self.positions,
            token_positions=token_positions,
            scores=self.scores,
            k_scale=None if self.k_scale is None else self.k_scale[layer],
            v_scale=None if self.v_scale is None else self.v_scale[layer],
        )

    def attend(
        self,
        layer: int,
        q: Tensor,
        *,
        q_lens: Tensor | None = None,
        rows: Rows = slice(None),
        query_positions: Tensor | None = None,
        window_left: int = -1,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        scale: float | None = None,
        tree_mask: Tensor | None = None,
        accumulate: str | None = None,
        decay: float = 1.0,
    ) -> Tensor:
        """Attention of the newest T tokens over one layer's lists, which hold their keys: call :meth:`append` first.

        Args:
            layer: from 0.
            q: ``[B', T, Hq, D]``; Hq is a multiple of the cache's heads.
            q_lens: int32 ``[B']``, where not all T tokens of a row are real; the others' output is 0.
            query_positions: int32 ``[B', T]``, by which a window is measured; None for what :meth:`extend` returned.
            window_left: how many original positions before its own a query sees, -1 for all.
            softcap, sinks, scale: as in :func:`kvops.flash_attention`.
            tree_mask: bool ``[B', T, T]``, which of the T tokens each of them sees, in place of causality
                (:func:`kvops.tree_mask`).
            accumulate: "sum", "sumsq" or "max" folds the attention that each slot receives into ``scores``, after
                multiplying them by ``decay``. Rows that share blocks are unshared for that, in all layers at once.

        Returns ``[B', T, Hq, Dv]`` in q's dtype. Raises ValueError and TypeError as :func:`kvops.paged_attention`, and
        :class:`OutOfBlocksError` where unsharing finds too few blocks. There is no gradient.
        """
        tables, lens = self._layer(layer, rows)
        self._expect_rows("q", q, len(lens))
        if accumulate is not None:
            checks.expect_choice("accumulate", accumulate, REDUCTIONS)
            checks.expect_at_least("decay", decay, 0)
        windowed = window_left >= 0
        if windowed and query_positions is None:
            after = self.next_positions[self._resolve(rows)[0]]
            new = q.shape[1] if q_lens is None else q_lens
            query_positions = (after - new)[:, None] + torch.arange(q.shape[1], dtype=torch.int32, device=self.device)
        options: dict[str, Any] = {
            "q_lens": q_lens,
            "window_left": window_left,
            "positions": self.positions if windowed else None,
            "query_positions": query_positions if windowed else None,
            "scale": scale,
            "softcap": softcap,
            "sinks": sinks,
            "tree_mask": tree_mask,
            "k_scale": None if self.k_scale is None else self.k_scale[layer],
            "v_scale": None if self.v_scale is None else self.v_scale[layer],
            "scores": None if accumulate is None else self.scores,
            "score_reduce": accumulate or "sum",
            "score_decay": decay,
        }
        if accumulate is not None and self._pool.bound.sharing and not self._pool.capturing():
            check_attention(q, self.k_cache, self.v_cache, tables, lens, **options)  # before anything is changed
            self.unshare(rows)
            tables, lens = self._layer(layer, rows)
        schedule = self._schedule(layer, rows)
        out, _ = paged_attention(q, self.k_cache, self.v_cache, tables, lens, schedule=schedule, **options)
        return out

    def set_scores(self, layer: int, scores: Tensor, *, rows: Rows = slice(None)) -> None:
        """Store float32 ``[B', Hkv, S]`` in list order as the scores of the first S slots of each list of a layer.

        Entries past a list's length are ignored. Rows that share blocks are unshared, which may raise
        :class:`OutOfBlocksError`. ValueError for another shape, or more slots than ``max_tokens``.
        """
        tables, lens = self._layer(layer, rows)
        capacity = self.max_blocks * self.block_size
        checks.expect_tensor("scores", scores)
        checks.expect_shape("scores", scores, "[B', Hkv, S]", *lens.shape, None)
        self._expect_here("scores", scores)
        if scores.shape[-1] > capacity:
            raise ValueError(f"scores: expected at most {capacity} slots (max_tokens), got {scores.shape[-1]}")
        if self._pool.bound.sharing:
            self.unshare(rows)
            tables, lens = self._layer(layer, rows)
        slot = torch.arange(scores.shape[-1], device=self.device)
        block = tables[..., slot // self.block_size].long()
        flat = torch.where(slot < lens[..., None], block, self.num_blocks) * self.block_size + slot % self.block_size
        self._scores.view(-1).scatter_(0, flat.flatten(), scores.to(torch.float32).flatten())

    def rollback(self, num_tokens: int | Tensor, *, rows: Rows = slice(None)) -> None:
        """Take the last ``num_tokens`` (a number, or int32 ``[B']``) of every list of ``rows`` back.

        Their blocks stay with the lists, for the next :meth:`extend`; what their queries added to the scores of older
        slots stays too. Only tokens that came in after the last :meth:`evict` or :meth:`keep` that took anything can be
        taken back; where a row was forked makes no difference.

        Raises ValueError for more tokens than that, or than a list has (looked at on the CPU and with
        ``KVOPS_DEBUG=1``).
        """
        index, numbers = self._resolve(rows)
        if isinstance(num_tokens, Tensor):
            self._expect_per_row("num_tokens", num_tokens, len(numbers))
            if self._pool.exact or checks.debug():
                checks.expect_data("num_tokens", "numbers of at least 0", num_tokens >= 0)
            new_lens = self.seq_lens[:, index] - num_tokens[:, None]
        else:
            self._expect_tokens("num_tokens", num_tokens)
            new_lens = self.seq_lens[:, index] - num_tokens
        new_positions = self.next_positions[index] - num_tokens
        if (self._pool.exact or checks.debug()) and new_lens.numel():
            if int(new_lens.amin()) < 0:
                raise ValueError(
                    f"num_tokens: expected at most the length of the shortest list, got {-int(new_lens.amin())} more"
                )
            before = int((self._settled[index] - new_positions).amax())
            if before > 0:
                raise ValueError(
                    f"num_tokens: expected at most the tokens that came in after the last eviction, got {before} more: "
                    "free() the row and read it again, or fork() it before it is evicted"
                )
        self._changed()
        self._pool.bound.rewind(numbers)
        self.seq_lens[:, index] = new_lens.clamp_(min=0)
        self.next_positions[index] = new_positions.clamp_(min=0)

    def retain(self, keep: Tensor, *, q_lens: Tensor | None = None, rows: Rows = slice(None)) -> None:
        """Of the last T tokens of every list of ``rows`` keep those that ``keep``, bool ``[B', T]``, marks.

        They move together in their order, with their positions and scores, byte for byte and without synchronising;
        the others are taken back as :meth:`rollback` does. With ``q_lens`` int32 ``[B']`` only the last ``q_lens[b]``
        tokens of a row are meant, and the first ``q_lens[b]`` columns of its ``keep``. This is how the accepted path of
        a tree of drafts stays and its other branches go.

        Raises as :meth:`rollback` does, for tokens that cannot be taken back.
        """
        index, numbers = self._resolve(rows)
        checks.expect_tensor("keep", keep)
        checks.expect_dtype("keep", keep, torch.bool)
        checks.expect_shape("keep", keep, "[rows, tokens]", len(numbers), None)
        self._expect_here("keep", keep)
        num_tokens, size = keep.shape[1], self.block_size
        lens = self.seq_lens[:, index]
        if q_lens is None:
            count = torch.full((len(numbers),), num_tokens, dtype=torch.int32, device=self.device)
        else:
            self._expect_per_row("q_lens", q_lens, len(numbers))
            count = q_lens
        if num_tokens == 0 or lens.numel() == 0:
            return
        start = lens - count[:, None]
        if self._pool.exact or checks.debug():
            checks.expect_data("q_lens", f"numbers from 0 to {num_tokens}", (count >= 0) & (count <= num_tokens))
            checks.expect_data("keep", "at most as many tokens as the shortest list has", start >= 0)
            newer = self.next_positions[index] - count >= self._settled[index]
            checks.expect_data("keep", "at most the tokens that came in after the last eviction", newer)
        # The blocks that the T tokens may lie in are compacted as lists of their own, so that the cost is theirs.
        first = start // size
        width = min((num_tokens + size - 2) // size + 1, self.max_blocks)
        if self._pool.shares(numbers) and not self._pool.capturing():
            self._own(index, numbers, first, self._pool.blocks_of(lens), width)
        self._changed()
        self._pool.bound.rewind(numbers)
        columns = first[..., None] + torch.arange(width, device=self.device)
        tables = self.block_tables[:, index].gather(3, columns.clamp_(max=self.max_blocks - 1))
        token = torch.arange(width * size, dtype=torch.int32, device=self.device) - (start - first * size)[..., None]
        marked = keep[:, None].expand(*lens.shape, num_tokens).gather(3, token.clamp(0, num_tokens - 1).long())
        new_lens = (lens - first * size).flatten(0, 1)
        compact(
            self.k_cache,
            self.v_cache,
            tables.flatten(0, 1),
            new_lens,
            (marked | (token < 0)).flatten(0, 1),
            positions=self.positions,
            scores=self.scores,
        )
        self.seq_lens[:, index] = first * size + new_lens.view_as(lens)
        real = torch.arange(num_tokens, device=self.device) < count[:, None]
        self.next_positions[index] -= (real & ~keep).sum(1, dtype=torch.int32)

    def free(self, rows: Rows = slice(None)) -> None:
        """Empty ``rows``: the blocks that no other row shares go back to the pool, lengths and positions to zero."""
        index, numbers = self._resolve(rows)
        self._changed()
        self._pool.give_back(index, numbers, torch.zeros_like(self.seq_lens[:, index]))
        self.seq_lens[:, index] = 0
        self.next_positions[index] = self._settled[index] = 0
        for row in numbers:
            self._pool.bound.limit(row, 0)
            self.compressed[row] = False

    def fork(self, row: int, into: Rows, *, num_tokens: int | None = None) -> None:
        """Let the rows ``into`` go on from what ``row`` holds: they share its blocks until one of them writes.

        Takes no blocks and copies nothing but tables; what each row then does never shows in another. What ``into``
        held before is freed.

        Args:
            row: the row to go on from.
            into: other rows.
            num_tokens: share only the first so many tokens; of a row that has not been compressed.

        Raises:
            ValueError: ``row`` among ``into`` or out of range; ``num_tokens`` given for a compressed row, or more than
                the row has (looked at on the CPU and with ``KVOPS_DEBUG=1``; otherwise all that it has are shared).
        """
        source = self._one("row", row)
        index, numbers = self._resolve(into)
        if source in numbers:
            raise ValueError(f"into: expected rows other than {source} itself, got {list(numbers)}")
        lens, position = self.seq_lens[:, source], self.next_positions[source].clone()
        if num_tokens is not None:
            self._expect_tokens("num_tokens", num_tokens)
            if self.compressed[source]:
                raise ValueError(f"num_tokens: expected None, as row {source} is compressed, got {num_tokens}")
            if (self._pool.exact or checks.debug()) and num_tokens > int(position):
                raise ValueError(f"num_tokens: expected at most the {int(position)} of row {source}, got {num_tokens}")
            lens, position = lens.clamp(max=num_tokens), position.clamp(max=num_tokens)
        self.free(into)
        self._pool.fork(source, index, numbers, lens)
        self.next_positions[index], self._settled[index] = position, self._settled[source].clone()
        for new in numbers:
            self.compressed[new] = self.compressed[source]

    def remember(self, row: int, tokens: Sequence[int] | Tensor, *, salt: str = "") -> int:
        """Keep the blocks of ``row`` that hold the longest part of its ``tokens`` that fills whole blocks.

        They stay when the row goes on, is compressed or leaves, with the scores they have now, for :meth:`recall`.
        Takes no blocks and copies nothing.

        Args:
            row: a row that has not been compressed.
            tokens: the tokens whose keys and values ``row`` holds, from its first on; more may follow in the row.
            salt: what else the keys and values follow from (an adapter, the tenant): only equal salts meet.

        Returns: how many tokens are remembered, those remembered before included.

        Raises ValueError for a compressed row, or more tokens than the row has (which is read from the device).
        """
        source = self._one("row", row)
        tokens, held = _numbers_of(tokens), int(self.next_positions[source])
        if self.compressed[source]:
            raise ValueError(f"row: expected one that has not been compressed, got {source}, which evict() ran on")
        if len(tokens) > held:
            raise ValueError(f"tokens: expected at most the {held} of row {source}, got {len(tokens)}")
        return self._prefixes.remember(source, tokens, salt)

    def recall(self, row: int, tokens: Sequence[int] | Tensor, *, salt: str = "") -> int:
        """Begin ``row`` with the longest remembered prefix of ``tokens``; what it held before is freed.

        Returns how many tokens it then has: whole blocks, and never the last token, whose logits are still to come. Go
        on with ``tokens`` from there. What the row does then never shows in another. The order of use that decides
        what is given back first is that of calls to this method and to :meth:`remember`.
        """
        target = self._one("row", row)
        found = self._prefixes.find(_numbers_of(tokens)[:-1], salt)
        self.free(target)
        if found is None:
            return 0
        self._changed()
        self._pool.share(found, target)
        self.next_positions[target] = len(found) * self.block_size
        return len(found) * self.block_size

    def forget(self) -> None:
        """Give all remembered prefixes up. Rows that use their blocks keep them."""
        self._prefixes.clear()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all rows and remembered prefixes to a safetensors file, every byte of them and each block once.

        A file of that name is replaced when the new one is whole. Raises FileNotFoundError without its folder, and
        ImportError without safetensors (``pip install "kvops[save]"``).
        """
        cache_file.save(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        num_blocks: int | None = None,
        device: torch.device | str = "cpu",
    ) -> PagedKVCache:
        """The cache that :meth:`save` wrote, on any device.

        Args:
            path: the file.
            num_blocks: of the pool; None for as many as there were.
            device: where the cache goes.

        Raises FileNotFoundError; ValueError for another file, or for a pool smaller than what the file holds;
        ImportError without safetensors.
        """
        arguments, tensors = cache_file.read(path, device)
        if num_blocks is not None:
            arguments["num_blocks"] = num_blocks
        cache = cls(**arguments)
        cache_file.restore(cache, tensors)
        return cache


def _numbers_of(tokens: Sequence[int] | Tensor) -> list[int]:
    if isinstance(tokens, Tensor):
        checks.expect_rank("tokens", tokens, "[tokens]")
    return checks.ints("tokens", tokens)
