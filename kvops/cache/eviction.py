"""What a paged cache gives up: slots chosen by scores or by the caller, and the blocks that come free with them."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from kvops import checks
from kvops.cache.storage import CacheStorage, Rows
from kvops.ops.eviction import SCOPES, compact, select_blocks


class CacheEviction(CacheStorage):
    """The part of :class:`kvops.PagedKVCache` that makes its lists shorter."""

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

        What survives is in the order it had; the blocks given up are free at once, unless another row shares them.
        ``budget`` is one number or one for each row (int32 ``[B']``), or one for each layer of each row
        (``[B', num_layers]``): layers then keep to their own budgets, and only the heads of a layer share or compete.
        The other arguments are those of :func:`kvops.select_blocks`, with protection measured in original positions. A
        row that holds less than its budget keeps everything.

        Raises ValueError, before anything is changed, when protection and floor alone take more than the budget. A
        budget that lies on a GPU is read by the host for that, unless a graph is captured; numbers are not. Rows that
        share blocks may need free ones for copies of those that slots are moved into: :class:`OutOfBlocksError`, before
        anything is changed.
        """
        checks.expect_choice("scope", scope, SCOPES)
        index, numbers = self._resolve(rows)
        capturing = self._pool.capturing()
        budgets, known = self._budgets(budget, len(numbers))
        groups = budgets.shape[1]  # that the lists of a row are in: one, or one for each layer
        lists = self.num_layers * self.num_kv_heads // groups
        parts = len(numbers) * groups
        budgets = budgets.flatten()

        def flat_tables() -> Tensor:
            return self.block_tables[:, index].transpose(0, 1).reshape(parts, lists, self.max_blocks)

        tables = flat_tables()
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
        fits = known is not None and all(least <= min(most) for least, most in zip(floors, known, strict=True))
        if not fits and not capturing:
            self._refuse_floor(new_lens, budgets, "row" if groups == 1 else "layer")
        if self._pool.shares(numbers) and not capturing:
            first, stop = map(self._by_layer, self._written_by_compaction(lens, new_lens, keep))
            self._own(index, numbers, first, stop, self.max_blocks)
            tables = flat_tables()
        compact(self.k_cache, self.v_cache, tables, lens, keep, positions=self.positions, scores=self.scores)
        lens = self._by_layer(lens)
        self._changed()
        self._settle(index, lens)
        self.seq_lens[:, index] = lens
        self._pool.give_back(index, numbers, self._pool.blocks_of(lens))
        for i, row in enumerate(numbers):
            if known is not None and not capturing:
                bound.limit(row, sum(known[i]))
            self.compressed[row] = True

    def keep(self, layer: int, kept: Tensor, *, rows: Rows = slice(None)) -> None:
        """Keep of each list of a layer what ``kept``, bool ``[B', Hkv, S]`` in list order, marks of its first S slots.

        Slots behind these stay; marks past a list's end mean nothing. Survivors keep their order, and the blocks given
        up are free at once, unless another row shares them.

        Raises TypeError and ValueError for another dtype or shape, and :class:`OutOfBlocksError` where rows that share
        blocks find too few for copies of their own.
        """
        index, numbers = self._resolve(rows)
        checks.expect_tensor("kept", kept)
        checks.expect_dtype("kept", kept, torch.bool)
        checks.expect_shape("kept", kept, "[B', Hkv, S]", len(numbers), self.num_kv_heads, None)
        self._expect_here("kept", kept)
        self._layer(layer, rows)  # refuses a layer that is not there, before blocks are unshared
        capacity = self.max_blocks * self.block_size
        if kept.shape[-1] > capacity:
            raise ValueError(f"kept: expected at most {capacity} slots (max_tokens), got {kept.shape[-1]}")
        if self._pool.bound.sharing:
            self.unshare(rows)
        tables, lens = self._layer(layer, rows)
        new_lens = lens.clone()
        whole = torch.nn.functional.pad(kept.contiguous(), (0, capacity - kept.shape[-1]), value=True)
        compact(self.k_cache, self.v_cache, tables, new_lens, whole, positions=self.positions, scores=self.scores)
        self._changed()
        self._settle(index, new_lens, layer)
        self.seq_lens[layer, index] = new_lens
        self._pool.give_back(index, numbers, self._pool.blocks_of(self.seq_lens[:, index]))
        for row in numbers:
            self.compressed[row] = True

    def _settle(self, index: slice | Tensor, lens: Tensor, layer: int | slice = slice(None)) -> None:
        """Before lists take these lengths: what rows that lose any slots have now cannot be rolled back any more."""
        shorter = (self.seq_lens[layer, index] != lens).any(-1)
        if shorter.dim() > 1:
            shorter = shorter.any(0)
        self._settled[index] = torch.where(shorter, self.next_positions[index], self._settled[index])

    def _by_layer(self, per_list: Tensor) -> Tensor:
        """Lists row by row, layer by layer, as ``[layers, B', heads]``."""
        rows = per_list.numel() // (self.num_layers * self.num_kv_heads)
        return per_list.view(rows, self.num_layers, self.num_kv_heads).transpose(0, 1)

    def _written_by_compaction(self, lens: Tensor, new_lens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """The first block of each list that kept slots are moved into, and the one behind the last."""
        slot = torch.arange(keep.shape[-1], dtype=torch.int32, device=self.device)
        evicted = ~keep & (slot < lens[..., None])
        first = torch.where(evicted, slot, keep.shape[-1]).amin(-1)  # all slots before it stay where they are
        return first // self.block_size, torch.where(first < new_lens, self._pool.blocks_of(new_lens), 0)

    def _budgets(
        self, budget: int | Sequence[int] | Sequence[Sequence[int]] | Tensor, batch: int
    ) -> tuple[Tensor, list[list[int]] | None]:
        """``budget`` in blocks, int32 ``[B', 1 or num_layers]`` on the device, and as numbers if the host has them."""
        known: list[list[int]] | None = None
        if isinstance(budget, Tensor):
            checks.expect_dtype("budget", budget, torch.int32)
            budgets = budget[:, None] if budget.ndim == 1 else budget
            if budget.device.type == "cpu" and not self._pool.capturing():
                known = budgets.tolist()
        else:
            if not isinstance(budget, Sequence):
                checks.expect_int("budget", budget, 0)
                budget = operator.index(budget)
            rows: list[int | Sequence[int]] = [budget] * batch if isinstance(budget, int) else list(budget)
            if len(rows) != batch:
                raise ValueError(f"budget: expected one number or {batch}, one for each row, got {len(rows)}")
            # No more than there are blocks: what does not fit int32 is no limit either.
            known = [[min(most, self.num_blocks) for most in ([row] if isinstance(row, int) else row)] for row in rows]
            if len({len(row) for row in known}) > 1:
                raise ValueError("budget: expected a number for each row, or one for each layer of every row, got both")
            if isinstance(budget, int):  # filled on the device, so that a graph can be captured
                budgets = torch.full((batch, 1), known[0][0] if batch else 0, dtype=torch.int32, device=self.device)
            else:
                budgets = torch.tensor(known, dtype=torch.int32, device=self.device).view(batch, -1 if batch else 1)
        if budgets.ndim != 2 or budgets.shape[0] != batch or budgets.shape[1] not in (1, self.num_layers):
            raise ValueError(
                f"budget: expected [{batch}], one number for each row, or [{batch}, {self.num_layers}], one for each "
                f"layer of each row, got {list(budgets.shape)}"
            )
        if known:
            checks.expect_at_least("budget", min(map(min, known)), 0)
        return budgets if budgets.device == self.device else budgets.to(self.device), known

    def _refuse_floor(self, new_lens: Tensor, budgets: Tensor, part: str) -> None:
        blocks = self._pool.blocks_of(new_lens).sum(1)
        over = torch.stack([blocks, budgets.long()], 1).tolist()
        for least, most in over:
            if least > most:
                raise ValueError(
                    f"budget: protect_first, protect_last and min_per_head alone take {least} blocks of a {part}, "
                    f"expected a budget of at least that, got {most}"
                )
