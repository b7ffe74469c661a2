"""Eviction and rollback: slots are evicted by scores or marks; the newest tokens are rolled back or kept in part."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kvops import checks
from kvops.cache.allocator import Allocator
from kvops.cache.config import CacheConfig
from kvops.cache.rows import RowStates, Selection
from kvops.ops.eviction import SCOPES, select_blocks

Budget = int | Sequence[int] | Sequence[Sequence[int]] | Tensor


class Evictor:
    """Shortens the lists of a cache. The methods of :class:`kvops.PagedKVCache` describe the arguments."""

    def __init__(self, config: CacheConfig, allocator: Allocator, states: RowStates) -> None:
        self.config, self.allocator, self.states = config, allocator, states
        self.pool, self.storage, self.selector = allocator.pool, allocator.storage, allocator.selector

    def evict(
        self,
        budget: Budget,
        rows: Selection,
        *,
        protect_first: int,
        protect_last: int,
        min_per_head: int,
        scope: Literal["head", "sequence"],
    ) -> None:
        """See :meth:`kvops.PagedKVCache.evict`."""
        checks.expect_choice("scope", scope, SCOPES)
        pool, index, numbers = self.pool, rows.index, rows.numbers
        capturing = pool.capturing()
        budgets, known = self._budgets(budget, len(numbers))
        groups = budgets.shape[1]  # of the lists of a row: one, or one for each layer
        budgets = budgets.flatten()
        tables, lens = self._grouped(pool.tables[:, index], groups), self._grouped(pool.lens[:, index], groups)
        lens = lens.clone()  # compact() writes into it, and for one row it is a view
        new_lens, keep = select_blocks(
            self.storage.scores,
            tables,
            lens,
            budgets,
            positions=self.storage.positions,
            protect_first=protect_first,
            protect_last=protect_last,
            min_per_head=min_per_head,
            scope=scope,
        )
        floor = max(protect_first + protect_last, min_per_head)
        if not capturing and not self._surely_fits(rows, floor, known, groups):
            self._refuse_floor(new_lens, budgets, "row" if groups == 1 else "layer")
        if pool.may_share(numbers) and not capturing:
            first, stop = map(self._by_layer, self._written_by_compaction(lens, new_lens, keep))
            self.allocator.unshare_blocks(rows, first, stop, pool.max_blocks)
            tables = self._grouped(pool.tables[:, index], groups)
        self.storage.compact(tables, lens, keep)
        lens = self._by_layer(lens)
        self._shorten(rows, lens)
        for i, row in enumerate(numbers):
            if known is not None and not capturing:
                pool.bound.limit(row, sum(known[i]))

    def keep(self, layer: int, kept: Tensor, rows: Selection) -> None:
        """See :meth:`kvops.PagedKVCache.keep`."""
        pool, index, numbers = self.pool, rows.index, rows.numbers
        self.selector.layer(layer, rows)  # refuses a layer out of range before anything changes
        checks.expect_tensor("kept", kept)
        checks.expect_dtype("kept", kept, torch.bool)
        checks.expect_shape("kept", kept, "[B', Hkv, S]", len(numbers), self.config.num_kv_heads, None)
        checks.expect_same_device("kept", kept, "the cache", pool.lens)
        capacity = pool.max_blocks * pool.block_size
        if kept.shape[-1] > capacity:
            raise ValueError(f"kept: expected at most {capacity} slots (max_tokens), got {kept.shape[-1]}")
        self.allocator.unshare(rows)
        tables, lens = self.selector.layer(layer, rows)
        lens = lens.clone()
        whole = torch.nn.functional.pad(kept.contiguous(), (0, capacity - kept.shape[-1]), value=True)
        self.storage.compact(tables, lens, whole)
        all_lens = pool.lens[:, index].clone()
        all_lens[layer] = lens
        self._shorten(rows, all_lens)

    def rollback(self, num_tokens: int | Tensor, rows: Selection) -> None:
        """See :meth:`kvops.PagedKVCache.rollback`."""
        pool, states, index = self.pool, self.states, rows.index
        looks = self.selector.checks_data()
        per_list: int | Tensor = num_tokens
        if isinstance(num_tokens, Tensor):
            self.selector.expect_per_row("num_tokens", num_tokens, rows)
            if looks:
                checks.expect_data("num_tokens", "numbers of at least 0", num_tokens >= 0)
            per_list = num_tokens[:, None]
        else:
            self.selector.expect_tokens(num_tokens)
        new_lens = pool.lens[:, index] - per_list
        new_positions = states.next_positions[index] - num_tokens
        if looks and new_lens.numel():
            shortest, before = int(new_lens.amin()), int((states.settled[index] - new_positions).amax())
            if shortest < 0:
                raise ValueError(f"num_tokens: expected at most the length of the shortest list, got {-shortest} more")
            if before > 0:
                raise ValueError(
                    f"num_tokens: expected at most the tokens that came in after the last eviction, got {before} more: "
                    "free() the row and read it again, or fork() it before it is evicted"
                )
        self.selector.changed()
        pool.bound.rewind(rows.numbers)
        pool.lens[:, index] = new_lens.clamp_(min=0)
        states.next_positions[index] = new_positions.clamp_(min=0)

    def retain(self, keep: Tensor, q_lens: Tensor | None, rows: Selection) -> None:
        """See :meth:`kvops.PagedKVCache.retain`."""
        pool, states, index, numbers = self.pool, self.states, rows.index, rows.numbers
        checks.expect_tensor("keep", keep)
        checks.expect_dtype("keep", keep, torch.bool)
        checks.expect_shape("keep", keep, "[rows, tokens]", len(numbers), None)
        checks.expect_same_device("keep", keep, "the cache", pool.lens)
        num_tokens, size = keep.shape[1], pool.block_size
        lens = pool.lens[:, index]
        count = q_lens
        if count is None:
            count = torch.full((len(numbers),), num_tokens, dtype=torch.int32, device=lens.device)
        else:
            self.selector.expect_per_row("q_lens", count, rows)
        if num_tokens == 0 or lens.numel() == 0:
            return
        start = lens - count[:, None]
        if self.selector.checks_data():
            checks.expect_data("q_lens", f"numbers from 0 to {num_tokens}", (count >= 0) & (count <= num_tokens))
            checks.expect_data("keep", "at most as many tokens as the shortest list has", start >= 0)
            newer = states.next_positions[index] - count >= states.settled[index]
            checks.expect_data("keep", "at most the tokens that came in after the last eviction", newer)
        # Only the blocks that may hold the T tokens are compacted, as short lists of their own.
        first = start // size
        width = min((num_tokens + size - 2) // size + 1, pool.max_blocks)
        if pool.may_share(numbers) and not pool.capturing():
            self.allocator.unshare_blocks(rows, first, pool.blocks_of(lens), width)
        self.selector.changed()
        pool.bound.rewind(numbers)
        columns = first[..., None] + torch.arange(width, device=lens.device)
        tables = pool.tables[:, index].gather(3, columns.clamp_(max=pool.max_blocks - 1))
        token = torch.arange(width * size, dtype=torch.int32, device=lens.device) - (start - first * size)[..., None]
        marked = keep[:, None].expand(*lens.shape, num_tokens).gather(3, token.clamp(0, num_tokens - 1).long())
        new_lens = (lens - first * size).flatten(0, 1)
        self.storage.compact(tables.flatten(0, 1), new_lens, (marked | (token < 0)).flatten(0, 1))
        pool.lens[:, index] = first * size + new_lens.view_as(lens)
        real = torch.arange(num_tokens, device=lens.device) < count[:, None]
        states.next_positions[index] -= (real & ~keep).sum(1, dtype=torch.int32)

    def _shorten(self, rows: Selection, lens: Tensor) -> None:
        """Set the new lengths ``[layers, B', heads]`` of lists and free the blocks after them."""
        pool, index, numbers = self.pool, rows.index, rows.numbers
        self.selector.changed()
        self.states.settle(rows, (pool.lens[:, index] != lens).any(-1).any(0))
        pool.lens[:, index] = lens
        pool.release(index, numbers, pool.blocks_of(lens))
        self.states.mark_compressed(rows)

    def _grouped(self, per_list: Tensor, groups: int) -> Tensor:
        """``[layers, B', heads, ...]`` as ``[B' * groups, lists of a group, ...]``, lists layer by layer."""
        layers, batch, heads, *trailing = per_list.shape
        return per_list.transpose(0, 1).reshape(batch * groups, layers * heads // groups, *trailing)

    def _by_layer(self, per_list: Tensor) -> Tensor:
        """The inverse of :meth:`_grouped`: ``[layers, B', heads]``."""
        layers, heads = self.config.num_layers, self.config.num_kv_heads
        return per_list.view(per_list.numel() // (layers * heads), layers, heads).transpose(0, 1)

    def _written_by_compaction(self, lens: Tensor, new_lens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """The first block of each list that kept slots move into, and the block after the last one."""
        slot = torch.arange(keep.shape[-1], dtype=torch.int32, device=keep.device)
        evicted = ~keep & (slot < lens[..., None])
        first = torch.where(evicted, slot, keep.shape[-1]).amin(-1)  # all slots before it stay in place
        return first // self.pool.block_size, torch.where(first < new_lens, self.pool.blocks_of(new_lens), 0)

    def _budgets(self, budget: Budget, batch: int) -> tuple[Tensor, list[list[int]] | None]:
        """``budget`` in blocks, int32 ``[B', 1 or num_layers]`` on the device, and as numbers if the host has them."""
        known: list[list[int]] | None = None
        device, num_layers = self.config.device, self.config.num_layers
        if isinstance(budget, Tensor):
            checks.expect_dtype("budget", budget, torch.int32)
            budgets = budget[:, None] if budget.ndim == 1 else budget
            if budget.device.type == "cpu" and not self.pool.capturing():
                known = budgets.tolist()
        else:
            if not isinstance(budget, Sequence):
                checks.expect_int("budget", budget, 0)
                budget = operator.index(budget)
            per_row: list[int | Sequence[int]] = [budget] * batch if isinstance(budget, int) else list(budget)
            if len(per_row) != batch:
                raise ValueError(f"budget: expected one number or {batch}, one for each row, got {len(per_row)}")
            # Larger budgets than the pool may not fit into int32. They mean no limit.
            most = self.config.num_blocks
            known = [[min(number, most) for number in ([row] if isinstance(row, int) else row)] for row in per_row]
            if len({len(row) for row in known}) > 1:
                raise ValueError("budget: expected a number for each row, or one for each layer of every row, got both")
            if isinstance(budget, int):  # filled on the device, so that a graph can be captured
                budgets = torch.full((batch, 1), known[0][0] if batch else 0, dtype=torch.int32, device=device)
            else:
                budgets = torch.tensor(known, dtype=torch.int32, device=device).view(batch, -1 if batch else 1)
        if budgets.ndim != 2 or budgets.shape[0] != batch or budgets.shape[1] not in (1, num_layers):
            raise ValueError(
                f"budget: expected [{batch}], one number for each row, or [{batch}, {num_layers}], one for each "
                f"layer of each row, got {list(budgets.shape)}"
            )
        if known:
            checks.expect_at_least("budget", min(map(min, known)), 0)
        return budgets if budgets.device == device else budgets.to(device), known

    def _surely_fits(self, rows: Selection, floor: int, known: list[list[int]] | None, groups: int) -> bool:
        """Whether the host can tell, without reading, that ``floor`` tokens of each list fit into every budget."""
        if known is None:
            return False
        lists, longest, size = self.config.lists_per_row // groups, self.pool.bound.longest, self.pool.block_size
        least = [lists * -(-min(longest[row], floor) // size) for row in rows.numbers]
        return all(blocks <= min(budgets) for blocks, budgets in zip(least, known, strict=True))

    def _refuse_floor(self, new_lens: Tensor, budgets: Tensor, part: str) -> None:
        blocks = self.pool.blocks_of(new_lens).sum(1)
        for least, most in torch.stack([blocks, budgets.long()], 1).tolist():
            if least > most:
                raise ValueError(
                    f"budget: protect_first, protect_last and min_per_head alone take {least} blocks of a {part}, "
                    f"expected a budget of at least that, got {most}"
                )
