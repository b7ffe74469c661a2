"""Whose slots are in which part of a page: how pages that span all heads hold heads of different lengths.

vLLM's page p has a place for every layer and KV head: a *cell* of ``page_size`` slots. A request that owns pages owns
their cells, and any head of any layer may use any of them. As long as a page is filled every head has its own cell in
it. When columns are compacted, the slots that survive move into the cells of the pages that stay, and this class writes
down whose cell each of them now is, and its place in its head's list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import kvops
from kvops import checks
from kvops.integrations.vllm.judge import Judge
from kvops.integrations.vllm.rule import Rule


@dataclass(frozen=True)
class Lists:
    """The lists of a step: ``tables`` int32 ``[L, B, Hkv, W]`` of cells, ``lens`` int32 ``[L, B, Hkv]``, in slots."""

    tables: Tensor
    lens: Tensor


class Cells:
    """The cells of all layers of a group, and to which head each belongs.

    Args:
        caches: each layer's ``[pages, Hkv, page_size, D + Dv]``, one after the other in one allocation.
        head_dim: D.
        rule: which pages stay.
        judge: who decides which slots survive.

    Attributes:
        k, v: the cells of all layers, ``[L * pages * Hkv, page_size, D]`` and ``[..., Dv]``.
        scores, positions: float32 and int32 ``[L * pages * Hkv, page_size]``, what queries paid to a slot and the
            position of its token.
        compactions: how often columns of a request were compacted.
    """

    def __init__(self, caches: Sequence[Tensor], head_dim: int, rule: Rule, judge: Judge) -> None:
        first = caches[0]
        self.rule, self.judge = rule, judge
        self.num_layers, (self.num_pages, self.num_heads, self.page_size, width) = len(caches), first.shape
        step = first.numel() * first.element_size()
        for layer, cache in enumerate(caches):
            if not cache.is_contiguous() or cache.data_ptr() != first.data_ptr() + layer * step:
                raise ValueError(
                    "kv_cache: compression expects the layers of a group one after the other in one allocation, each "
                    f"of shape {list(first.shape)}, got layer {layer} elsewhere. Next step: ratio=1"
                )
        self.num_lists = self.num_layers * self.num_heads  # of a request
        count = self.num_pages * self.num_lists
        cells = first.as_strided((count, self.page_size, width), (self.page_size * width, width, 1))
        self.k, self.v = cells[..., :head_dim], cells[..., head_dim:]
        device = first.device
        self.positions = torch.zeros(count, self.page_size, dtype=torch.int32, device=device)
        self.scores = torch.zeros(count, self.page_size, dtype=torch.float32, device=device)
        self._list = torch.arange(self.num_lists, device=device)
        layer_of, head_of = self._list // self.num_heads, self._list % self.num_heads
        # In page 0; that of the next page is num_heads further.
        self._own_cell = layer_of * self.num_pages * self.num_heads + head_of
        # Of the pages that stay: whose each cell is (num_lists: nobody's), and its place in that head's list.
        self._owner = torch.full((self.num_pages, self.num_lists), self.num_lists, dtype=torch.int32, device=device)
        self._place = torch.zeros(self.num_pages, self.num_lists, dtype=torch.int32, device=device)
        # By the first page of a request, which always stays: the cells of each head in the pages that stay.
        self._kept = torch.zeros(self.num_pages, self.num_lists, dtype=torch.int32, device=device)
        # By the number of a request, on the host: how many of its columns are compacted.
        self._old = torch.zeros(self.num_pages, dtype=torch.int64)
        self._keep = torch.zeros(1, dtype=torch.int64)
        self.compactions = 0

    def _keeps(self, columns: int) -> Tensor:
        """``rule.keep`` of 0 to ``columns`` columns, and perhaps more: int64, known to the host."""
        if len(self._keep) <= columns:
            self._keep = torch.tensor([self.rule.keep(old) for old in range(columns + 1)])
        return self._keep

    def _side(self, side: Tensor, layer: int) -> Tensor:
        """A side array of one layer as vLLM's pages lie: ``[pages, page_size, Hkv]``."""
        return side.view(self.num_layers, self.num_pages, self.num_heads, self.page_size)[layer].transpose(1, 2)

    def scores_of(self, layer: int) -> Tensor:
        return self._side(self.scores, layer)

    def positions_of(self, layer: int) -> Tensor:
        return self._side(self.positions, layer)

    def compact_due(self, numbers: Tensor, table: Tensor, computed: Tensor) -> Tensor:
        """Compact the requests that have old columns enough.

        Args:
            numbers: int64 ``[B]``, known to the host: of each request; 0 for a row without one.
            table: int64 ``[B, columns]``, vLLM's pages.
            computed: int64 ``[B]``, known to the host: tokens in the cache. A request of 0 begins.

        Returns:
            int64 ``[B]``, known to the host: how many columns of each request are compacted now.
        """
        rule, keeps = self.rule, self._keeps(table.shape[1])
        more = int(numbers.max()) + 1 - len(self._old)
        if more > 0:
            self._old = torch.nn.functional.pad(self._old, (0, more))
        self._old[numbers[computed == 0]] = 0
        before = self._old[numbers]
        old = (computed - rule.protect_last).clamp(min=0) // (rule.chunk * self.page_size) * rule.chunk
        old = torch.where((keeps[old] < old) & (numbers > 0), old, 0)
        # Never back: an optimistic count of accepted drafts may have been taken back.
        old = torch.maximum(old, before)
        for row in (old > before).nonzero().flatten().tolist():
            self._compact(table[row], int(computed[row]), int(before[row]), int(old[row]))
        self._old[numbers] = old
        return old

    def lists(self, table: Tensor, tokens: Tensor, old: Tensor) -> Lists:
        """The lists of all heads of requests.

        Args:
            table: int64 ``[B, columns]``, vLLM's pages.
            tokens: int64 ``[B]``, known to the host: tokens of each request, with those of this step.
            old: int64 ``[B]``, known to the host: how many of its columns are compacted.
        """
        B, size, device = len(tokens), self.page_size, table.device
        columns, keeps = (tokens + size - 1) // size, self._keeps(table.shape[1])
        kept, filling = int(keeps[old].max()), int((columns - old).max())
        counts = torch.where(old.to(device)[:, None] > 0, self._kept[table[:, 0]], 0)  # [B, lists]
        # No list is longer than its tokens; how much shorter it is is known to the device.
        width = filling + int(counts.max()) if checks.may_look(counts) else int(columns.max())
        total, first, staying = (each.to(device)[:, None] for each in (tokens, old, keeps[old]))
        row = torch.arange(B, device=device)[:, None, None]
        tables = torch.zeros(self.num_layers * B * self.num_heads * width + 1, dtype=torch.int32, device=device)

        def write(pages: Tensor, owner: Tensor, place: Tensor, inside: Tensor) -> None:
            """Put the cells of ``pages`` [B, C] into the lists of their owners [B, C, lists]."""
            owner = owner.long()
            entry = ((owner // self.num_heads * B + row) * self.num_heads + owner % self.num_heads) * width + place
            cells = pages[..., None] * self.num_heads + self._own_cell
            tables.scatter_(0, torch.where(inside, entry, len(tables) - 1).flatten(), cells.flatten().int())

        real = torch.arange(kept, device=device) < staying
        pages = _gather(table, self._staying(kept).to(device), real)
        owner = self._owner[pages]
        write(pages, owner, self._place[pages], real[..., None] & (owner < self.num_lists))
        number = torch.arange(filling, device=device)  # of the columns behind those that are compacted
        real = (first + number) * size < total
        place = counts[:, None] + number[:, None]
        write(
            _gather(table, first + number, real),
            self._list.expand(B, filling, -1),
            place,
            real[..., None].expand_as(place),
        )
        lens = counts * size + total - first * size
        shape = (B, self.num_layers, self.num_heads)
        return Lists(
            tables[:-1].view(self.num_layers, B, self.num_heads, width),
            lens.view(shape).transpose(0, 1).contiguous().int(),
        )

    def _staying(self, number: int) -> Tensor:
        """The first ``number`` columns that stay: int64, known to the host."""
        return self._keep.diff().nonzero().flatten()[:number]

    def _compact(self, table: Tensor, computed: int, before: int, old: int) -> None:
        """Compact ``old`` columns of a request with ``computed`` tokens, of which ``before`` columns are compacted.

        ``table`` int64 ``[columns]`` has the pages with which it computed so far. The host need not know what the
        device decides: all shapes follow from the rule.
        """
        size = self.page_size
        recent = computed - old * size
        lists = self.lists(table[None], torch.tensor([computed]), torch.tensor([before]))
        tables, lens = (part.flatten(0, 2) for part in (lists.tables, lists.lens))  # [lists, W], [lists]
        staying = table[self._staying(self.rule.keep(old)).to(table.device)]
        keep = self.judge.keep(self, tables, lens, recent=recent, pages=len(staying))
        tables, lens = tables[:, : keep.shape[1] // size].contiguous(), lens - recent
        # Survivors move to the front of their head's list, then out of the pages that go.
        kvops.compact(
            self.k, self.v, tables[None], lens[None], keep[None], positions=self.positions, scores=self.scores
        )
        self._assign(tables, lens // size, staying)
        self._kept.index_copy_(0, table[:1], (lens // size)[None])
        self.compactions += 1

    def _assign(self, tables: Tensor, blocks: Tensor, staying: Tensor) -> None:
        """Move the first ``blocks`` [lists] cells of each list into the pages that stay, and write down whose they are.

        ``tables`` int32 [lists, W], ``staying`` int64 [S]: together they have cells enough.
        """
        device, places = tables.device, len(staying) * self.num_lists
        used = torch.arange(tables.shape[1], device=device) < blocks[:, None]
        order = torch.full((self.num_pages,), -1, dtype=torch.int64, device=device)
        order[staying] = torch.arange(len(staying), device=device)
        cells = torch.where(used, tables, 0).long()
        per_layer = self.num_pages * self.num_heads
        number = order[cells % per_layer // self.num_heads]  # of the page among those that stay, -1 for one that goes
        own = cells // per_layer * self.num_heads + cells % self.num_heads
        stays = used & (number >= 0)
        target = torch.where(stays, number * self.num_lists + own, places)  # `places` stands for none
        free = torch.ones(places + 1, dtype=torch.bool, device=device)
        free[target.flatten()] = False
        free[places] = False
        # The n-th cell that has to move goes to the n-th that is free.
        spare = torch.full((places + 1,), places, dtype=torch.int64, device=device)
        nth = torch.where(free, free.cumsum(0) - 1, places)
        spare.scatter_(0, nth, torch.arange(places + 1, device=device))
        moves = used & ~stays
        nth = (moves.flatten().cumsum(0) - 1).clamp(0, places).view_as(moves)
        target = torch.where(moves, spare[nth], target)
        pages = staying[(target // self.num_lists).clamp(max=len(staying) - 1)]
        cell = pages * self.num_heads + self._own_cell[target % self.num_lists]
        kvops.copy_blocks(
            self.k,
            self.v,
            cells.flatten().int(),
            torch.where(moves, cell, -1).flatten().int(),
            positions=self.positions,
            scores=self.scores,
        )
        owner = torch.full((places + 1,), self.num_lists, dtype=torch.int32, device=device)
        place = torch.zeros(places + 1, dtype=torch.int32, device=device)
        target = target.flatten()
        owner[target] = self._list[:, None].expand_as(moves).flatten().int()
        place[target] = torch.arange(tables.shape[1], device=device, dtype=torch.int32).repeat(self.num_lists)
        self._owner[staying] = owner[:-1].view(len(staying), self.num_lists)
        self._place[staying] = place[:-1].view(len(staying), self.num_lists)


def _gather(table: Tensor, column: Tensor, real: Tensor) -> Tensor:
    """The pages in columns [B, C] or [C] of each row, 0 where ``real`` [B, C] is not."""
    return torch.where(real, table.gather(1, torch.where(real, column, 0)), 0)
