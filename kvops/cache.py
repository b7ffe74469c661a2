"""The paged cache: one pool of blocks that every (layer, row, head) list draws on, with a length of its own each.

A block holds ``block_size`` slots of one KV head. A sequence (a *row*) owns ``num_layers * num_kv_heads`` lists of
blocks, and each list may be compressed at its own rate: what it gives up is free for any other list at once. Blocks
are handed out and taken back on the device (a stack of free block numbers and prefix sums); the host keeps an upper
bound of what is in use and reads the exact number only where the bound says that a request might not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvops import checks
from kvops.ops.eviction import compact, select_blocks
from kvops.ops.paged import paged_append, paged_attention
from kvops.pool import BlockPool, OutOfBlocksError

__all__ = ["CacheStats", "OutOfBlocksError", "PagedKVCache"]

Rows = slice | int | Sequence[int] | Tensor


@dataclass(frozen=True)
class CacheStats:
    """What a :class:`PagedKVCache` holds at one moment; ``str()`` reads like a report.

    ``bytes_per_block`` counts K and V; ``side_bytes_per_block`` counts what is kept beside them for each slot
    (original positions and scores). ``bytes_in_use`` and ``bytes_reserved`` count K and V of the blocks in use and of
    the whole pool. ``lengths`` is int32 ``[num_layers, max_batch, num_kv_heads]`` on the CPU, in slots.
    """

    blocks_total: int
    blocks_in_use: int
    block_size: int
    bytes_per_block: int
    side_bytes_per_block: int
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
    def slots_in_use(self) -> int:
        return int(self.lengths.sum())

    def __str__(self) -> str:
        mib = 1 / 2**20
        share = 100 * self.blocks_in_use / max(self.blocks_total, 1)
        room = self.blocks_in_use * self.block_size
        filled = 100 * self.slots_in_use / max(room, 1)
        lines = [
            f"{self.blocks_in_use} of {self.blocks_total} blocks in use ({share:.1f}%), {self.blocks_free} free",
            f"{self.bytes_in_use * mib:.2f} of {self.bytes_reserved * mib:.2f} MiB of keys and values in use, "
            f"{self.bytes_per_block} bytes a block (and {self.side_bytes_per_block} of positions and scores)",
            f"{self.slots_in_use} tokens in {room} slots of {self.block_size} a block ({filled:.1f}% filled)",
        ]
        for row in range(self.lengths.shape[1]):
            lists = self.lengths[:, row].flatten()
            if int(lists.sum()):
                lines.append(
                    f"row {row}: {int(lists.sum())} tokens in {lists.numel()} lists, "
                    f"shortest {int(lists.min())}, longest {int(lists.max())}"
                )
        return "\n".join(lines)


class PagedKVCache:
    """Keys and values of ``max_batch`` sequences in one pool of blocks, each head of each layer with its own length.

    Args:
        num_layers, num_kv_heads, head_dim: of the model; ``v_head_dim`` where values have another size than keys.
        num_blocks: blocks of the pool, for all layers, heads and rows together (:meth:`blocks_for` counts them).
        max_batch: rows, that is sequences that can live in the cache at once.
        max_tokens: slots that one list can have at most (rounded up to whole blocks).
        block_size: slots in a block.
        dtype, device: of keys and values.

    Attributes:
        k_cache, v_cache: ``[num_blocks, block_size, head_dim]`` and ``[..., v_head_dim]``, not initialised.
        positions: int32 ``[num_blocks, block_size]``, the original position of the token in each slot.
        scores: float32 ``[num_blocks, block_size]``, what :meth:`attend` accumulates and :meth:`evict` ranks by.
        block_tables: int32 ``[num_layers, max_batch, num_kv_heads, max_blocks]``.
        seq_lens: int32 ``[num_layers, max_batch, num_kv_heads]``, slots in use of each list.
        next_positions: int32 ``[max_batch]``, the true length of each sequence, which eviction does not change.

    ``rows`` names the rows that a method works on: a slice, one row, a sequence of row numbers or an int64 tensor
    (which the host has to read). A step of decoding is one :meth:`extend`, then :meth:`append` and :meth:`attend` for
    each layer. A row is empty at first and after :meth:`free`.
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
        device: torch.device | str = "cpu",
    ) -> None:
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        sizes = {
            "num_layers": num_layers,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "v_head_dim": v_head_dim,
            "num_blocks": num_blocks,
            "max_batch": max_batch,
            "max_tokens": max_tokens,
            "block_size": block_size,
        }
        for name, value in sizes.items():
            checks.expect_at_least(name, value, 1)
        if num_blocks >= 2**31:
            raise ValueError(f"num_blocks: expected less than 2**31 (tables are int32), got {num_blocks}")
        self.num_layers, self.num_kv_heads, self.num_blocks = num_layers, num_kv_heads, num_blocks
        self.max_batch, self.block_size = max_batch, block_size
        self.max_blocks = -(-max_tokens // block_size)
        self.device = device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            self.device = device = torch.device("cuda", torch.cuda.current_device())

        self.k_cache = torch.empty(num_blocks, block_size, head_dim, dtype=dtype, device=device)
        self.v_cache = torch.empty(num_blocks, block_size, v_head_dim, dtype=dtype, device=device)
        self.positions = torch.zeros(num_blocks, block_size, dtype=torch.int32, device=device)
        # One block more than the pool has takes what set_scores must not write anywhere.
        self._scores = torch.zeros(num_blocks + 1, block_size, dtype=torch.float32, device=device)
        self.scores = self._scores[:num_blocks]
        lists = (num_layers, max_batch, num_kv_heads)
        self._pool = BlockPool(lists, num_blocks, self.max_blocks, block_size, device)
        self.block_tables, self.seq_lens = self._pool.tables, self._pool.lens
        self.next_positions = torch.zeros(max_batch, dtype=torch.int32, device=device)
        # Views of every layer, made once: a step asks for each of them twice.
        self._layer_tables = tuple(self.block_tables)
        self._layer_lens = tuple(self.seq_lens)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that one row of ``tokens`` tokens takes with nothing evicted, over all layers and heads."""
        return self.num_layers * self.num_kv_heads * -(-tokens // self.block_size)

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
        checks.expect_at_least("num_tokens", num_tokens, 0)
        lens = self.seq_lens[:, index]
        if q_lens is None:
            new_lens = lens + num_tokens
        else:
            self._expect_per_row("q_lens", q_lens, len(numbers))
            if self._pool.exact or checks.debug():
                within = (q_lens >= 0) & (q_lens <= num_tokens)
                checks.expect_data("q_lens", f"numbers from 0 to num_tokens = {num_tokens}", within)
            new_lens = lens + q_lens[:, None]
        self._pool.reserve(index, numbers, new_lens, num_tokens)
        self.seq_lens[:, index] = new_lens
        first = self.next_positions[index]
        token_positions = first[:, None] + torch.arange(num_tokens, dtype=torch.int32, device=self.device)
        self.next_positions[index] = first + (num_tokens if q_lens is None else q_lens)
        return token_positions

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
        """Write k ``[B', T, Hkv, D]`` and v ``[B', T, Hkv, Dv]`` of one layer into the room made by :meth:`extend`."""
        tables, lens = self._layer(layer, rows)
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
        """Attention of q ``[B', T, Hq, D]``, the newest T tokens, over one layer's lists: out ``[B', T, Hq, Dv]``.

        ``accumulate`` ("sum", "sumsq" or "max") folds the attention that each slot receives into ``scores``, after
        multiplying them by ``decay``. A window is measured in original positions; ``query_positions`` int32
        ``[B', T]`` are those that :meth:`extend` returned unless given. ``tree_mask`` bool ``[B', T, T]`` tells which
        of the T tokens each of them sees, in place of causality (:func:`kvops.tree_mask`).
        """
        tables, lens = self._layer(layer, rows)
        windowed = window_left >= 0
        if windowed and query_positions is None:
            after = self.next_positions[self._resolve(rows)[0]]
            new = q.shape[1] if q_lens is None else q_lens
            query_positions = (after - new)[:, None] + torch.arange(q.shape[1], dtype=torch.int32, device=self.device)
        out, _ = paged_attention(
            q,
            self.k_cache,
            self.v_cache,
            tables,
            lens,
            q_lens=q_lens,
            window_left=window_left,
            positions=self.positions if windowed else None,
            query_positions=query_positions if windowed else None,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            tree_mask=tree_mask,
            scores=None if accumulate is None else self.scores,
            score_reduce=accumulate or "sum",
            score_decay=decay,
        )
        return out

    def set_scores(self, layer: int, scores: Tensor, *, rows: Rows = slice(None)) -> None:
        """Store float32 ``[B', Hkv, S]`` in list order as the scores of the first S slots of each list of a layer.

        Entries past a list's length are ignored.
        """
        tables, lens = self._layer(layer, rows)
        capacity = self.max_blocks * self.block_size
        checks.expect_tensor("scores", scores)
        checks.expect_shape("scores", scores, "[B', Hkv, S]", *lens.shape, None)
        if scores.shape[-1] > capacity:
            raise ValueError(f"scores: expected at most {capacity} slots (max_tokens), got {scores.shape[-1]}")
        slot = torch.arange(scores.shape[-1], device=self.device)
        block = tables[..., slot // self.block_size].long()
        flat = torch.where(slot < lens[..., None], block, self.num_blocks) * self.block_size + slot % self.block_size
        self._scores.view(-1).scatter_(0, flat.flatten(), scores.to(torch.float32).flatten())

    def evict(
        self,
        budget: int | Sequence[int] | Sequence[Sequence[int]] | Tensor,
        *,
        rows: Rows = slice(None),
        protect_first: int = 0,
        protect_last: int = 0,
        min_per_head: int = 0,
        scope: str = "sequence",
    ) -> None:
        """Reduce each of ``rows`` to ``budget`` blocks over all its layers and heads, keeping the best by ``scores``.

        What survives is in the order it had; the blocks given up are free at once. ``budget`` is one number or one for
        each row (int32 ``[B']``), or one for each layer of each row (``[B', num_layers]``): layers then keep to their
        own budgets, and only the heads of a layer share or compete. The other arguments are those of
        :func:`kvops.select_blocks`, with protection measured in original positions. A row that holds less than its
        budget keeps everything.

        Raises ValueError, before anything is changed, when protection and floor alone take more than the budget. A
        budget that lies on a GPU is read by the host for that; numbers are not.
        """
        index, numbers = self._resolve(rows)
        budgets = self._budgets(budget, len(numbers))
        known = budgets.tolist() if budgets.device.type == "cpu" else None
        groups = budgets.shape[1]  # that the lists of a row are in: one, or one for each layer
        lists = self.num_layers * self.num_kv_heads // groups
        parts = len(numbers) * groups
        budgets = budgets.flatten().to(self.device)
        tables = self.block_tables[:, index].transpose(0, 1).reshape(parts, lists, self.max_blocks)
        # A copy, as compact() writes into it: of one row, reshape would be a view of what is assigned below.
        lens = self.seq_lens[:, index].transpose(0, 1).reshape(parts, lists).clone()
        new_lens, keep = select_blocks(
            self.scores,
            tables,
            lens,
            budgets,
            positions=self.positions,
            protect_first=protect_first,
            protect_last=protect_last,
            min_per_head=min_per_head,
            scope=scope,
        )
        bound = self._pool.bound
        floor = max(protect_first + protect_last, min_per_head)
        floors = [lists * -(-min(bound.longest[row], floor) // self.block_size) for row in numbers]
        if known is None or any(least > min(most) for least, most in zip(floors, known, strict=True)):
            self._refuse_floor(new_lens, budgets, "row" if groups == 1 else "layer")
        compact(self.k_cache, self.v_cache, tables, lens, keep, positions=self.positions, scores=self.scores)
        lens = lens.view(len(numbers), self.num_layers, self.num_kv_heads).transpose(0, 1)
        self.seq_lens[:, index] = lens
        self._pool.give_back(index, self._pool.blocks_of(lens))
        for row, most in zip(numbers, known or (), strict=known is not None):
            bound.limit(row, sum(most))

    def rollback(self, num_tokens: int | Tensor, *, rows: Rows = slice(None)) -> None:
        """Take the last ``num_tokens`` (a number, or int32 ``[B']``) of every list of ``rows`` back.

        Their blocks stay with the lists, for the next :meth:`extend`; what their queries added to the scores of older
        slots stays too. Only tokens that came in after the last :meth:`evict` can be taken back.
        """
        index, numbers = self._resolve(rows)
        if isinstance(num_tokens, Tensor):
            self._expect_per_row("num_tokens", num_tokens, len(numbers))
            new_lens = self.seq_lens[:, index] - num_tokens[:, None]
        else:
            checks.expect_at_least("num_tokens", num_tokens, 0)
            new_lens = self.seq_lens[:, index] - num_tokens
        if (self._pool.exact or checks.debug()) and new_lens.numel() and int(new_lens.amin()) < 0:
            raise ValueError(
                f"num_tokens: expected at most the length of the shortest list, got {-int(new_lens.amin())} more"
            )
        self.seq_lens[:, index] = new_lens.clamp_(min=0)
        self.next_positions[index] = (self.next_positions[index] - num_tokens).clamp_(min=0)

    def retain(self, keep: Tensor, *, q_lens: Tensor | None = None, rows: Rows = slice(None)) -> None:
        """Of the last T tokens of every list of ``rows`` keep those that ``keep``, bool ``[B', T]``, marks.

        They move together in their order, with their positions and scores, byte for byte and without synchronising;
        the others are taken back as :meth:`rollback` does. With ``q_lens`` int32 ``[B']`` only the last ``q_lens[b]``
        tokens of a row are meant, and the first ``q_lens[b]`` columns of its ``keep``. This is how the accepted path of
        a tree of drafts stays and its other branches go.
        """
        index, numbers = self._resolve(rows)
        checks.expect_tensor("keep", keep)
        checks.expect_dtype("keep", keep, torch.bool)
        checks.expect_shape("keep", keep, "[rows, tokens]", len(numbers), None)
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
        # The blocks that the T tokens may lie in are compacted as lists of their own, so that the cost is theirs.
        first = start // size
        width = min((num_tokens + size - 2) // size + 1, self.max_blocks)
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
        """Empty ``rows``: all their blocks go back to the pool, their lengths and positions to zero."""
        index, numbers = self._resolve(rows)
        self._pool.give_back(index, torch.zeros_like(self.seq_lens[:, index]))
        self.seq_lens[:, index] = 0
        self.next_positions[index] = 0
        for row in numbers:
            self._pool.bound.limit(row, 0)

    def gather(self, layer: int, row: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of one list in order: k ``[len, D]``, v ``[len, Dv]``, positions int32 ``[len]``. Synchronises."""
        length = int(self.seq_lens[layer, row, head])
        blocks = self.block_tables[layer, row, head, : -(-length // self.block_size)].long()
        k, v, positions = (side[blocks].flatten(0, 1)[:length] for side in (self.k_cache, self.v_cache, self.positions))
        return k, v, positions

    def stats(self) -> CacheStats:
        """Blocks, bytes and lengths at this moment. Synchronises."""
        slot = (self.k_cache.shape[-1] + self.v_cache.shape[-1]) * self.k_cache.element_size()
        side = self.positions.element_size() + self.scores.element_size()
        return CacheStats(
            blocks_total=self.num_blocks,
            blocks_in_use=self._pool.blocks_in_use(),
            block_size=self.block_size,
            bytes_per_block=self.block_size * slot,
            side_bytes_per_block=self.block_size * side,
            lengths=self.seq_lens.cpu().clone(),
        )

    def _resolve(self, rows: Rows) -> tuple[slice | Tensor, Sequence[int]]:
        """``rows`` as an index for tensors (a slice where possible, which copies nothing) and as numbers."""
        if isinstance(rows, slice):
            covered = range(*rows.indices(self.max_batch))
            if covered.step > 0:
                return rows, covered
            rows = covered
        if isinstance(rows, Tensor):
            rows = rows.tolist()
        numbers = [rows] if isinstance(rows, int) else list(rows)
        if len(set(numbers)) != len(numbers) or any(not 0 <= row < self.max_batch for row in numbers):
            raise ValueError(f"rows: expected different row numbers in 0..{self.max_batch - 1}, got {numbers}")
        if numbers and numbers == list(range(numbers[0], numbers[-1] + 1)):
            return slice(numbers[0], numbers[-1] + 1), numbers
        return torch.tensor(numbers, dtype=torch.int64, device=self.device), numbers

    def _layer(self, layer: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """Block tables ``[B', Hkv, max_blocks]`` and lengths ``[B', Hkv]`` of one layer."""
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer: expected a number in 0..{self.num_layers - 1}, got {layer}")
        if isinstance(rows, slice) and rows == slice(None):
            return self._layer_tables[layer], self._layer_lens[layer]
        index, _ = self._resolve(rows)
        return self.block_tables[layer, index], self.seq_lens[layer, index]

    def _expect_per_row(self, name: str, value: Tensor, batch: int) -> None:
        checks.expect_tensor(name, value)
        checks.expect_dtype(name, value, torch.int32)
        checks.expect_shape(name, value, "[rows]", batch)

    def _budgets(self, budget: int | Sequence[int] | Sequence[Sequence[int]] | Tensor, batch: int) -> Tensor:
        """``budget`` in blocks as int32 ``[B', 1 or num_layers]``; numbers come out on the CPU."""
        if isinstance(budget, Tensor):
            checks.expect_dtype("budget", budget, torch.int32)
            if budget.ndim == 1:
                budget = budget[:, None]
        else:
            rows: list[int | Sequence[int]] = [budget] * batch if isinstance(budget, int) else list(budget)
            if len(rows) != batch:
                raise ValueError(f"budget: expected one number or {batch}, one for each row, got {len(rows)}")
            layers = [[row] if isinstance(row, int) else list(row) for row in rows]
            if len({len(row) for row in layers}) > 1:
                raise ValueError("budget: expected a number for each row, or one for each layer of every row, got both")
            # No more than there are blocks: what does not fit int32 is no limit either.
            layers = [[min(most, self.num_blocks) for most in row] for row in layers]
            budget = torch.tensor(layers, dtype=torch.int32).view(batch, -1 if batch else 1)
        if budget.ndim != 2 or budget.shape[0] != batch or budget.shape[1] not in (1, self.num_layers):
            raise ValueError(
                f"budget: expected [{batch}], one number for each row, or [{batch}, {self.num_layers}], one for each "
                f"layer of each row, got {list(budget.shape)}"
            )
        if budget.device.type == "cpu" and budget.numel():
            checks.expect_at_least("budget", int(budget.min()), 0)
        return budget

    def _refuse_floor(self, new_lens: Tensor, budgets: Tensor, part: str) -> None:
        blocks = self._pool.blocks_of(new_lens).sum(1)
        over = torch.stack([blocks, budgets.long()], 1).tolist()
        for least, most in over:
            if least > most:
                raise ValueError(
                    f"budget: protect_first, protect_last and min_per_head alone take {least} blocks of a {part}, "
                    f"expected a budget of at least that, got {most}"
                )
