"""Rows of a paged cache: selections of rows for methods, and the state of each row apart from its lists."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvops import checks
from kvops.cache.inference import writable
from kvops.cache.pool import BlockPool
from kvops.ops.paged import paged_schedule
from kvops.ops.registry import backend

Rows = slice | int | Sequence[int] | Tensor

# Tables and lengths of every layer.
_Views = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
# The number of selections that are cached, with their indices, views and schedules.
_MAX_SELECTIONS = 64


@dataclass(frozen=True)
class Selection:
    """A selection of rows, as an index for tensors and as numbers for the host.

    Attributes:
        index: the index for tensors: a slice where possible, which makes views, or int64 row numbers.
        numbers: the same rows as numbers; a range if ``index`` is a slice.
    """

    index: slice | Tensor
    numbers: range | tuple[int, ...]


class RowSelector:
    """Resolves ``rows`` arguments, and caches the tables, lengths and schedules that every layer of a step needs."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._views: dict[range, _Views] = {}  # views, for a slice of rows: they follow every change
        self._gathered: dict[tuple[int, ...], _Views] = {}  # copies, for row numbers: valid until a change
        self._schedules: dict[tuple[range | tuple[int, ...], bool], tuple[Tensor, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """The state without views, which pickle would store as separate tensors."""
        return {"pool": self.pool, "_indices": {}, "_views": {}, "_gathered": {}, "_schedules": {}}

    @property
    def max_batch(self) -> int:
        return self.pool.lens.shape[1]

    def one(self, name: str, row: int) -> int:
        """``row`` as an int, in range."""
        checks.expect_int(name, row, 0)
        if row >= self.max_batch:
            raise ValueError(f"{name}: expected a row number in 0..{self.max_batch - 1}, got {row}")
        return operator.index(row)

    def select(self, rows: Rows) -> Selection:
        """The rows that an argument names. Raises TypeError and ValueError for anything else."""
        if isinstance(rows, slice):
            covered = range(*rows.indices(self.max_batch))
            if covered.step > 0:
                return Selection(rows, covered)
            rows = covered
        if isinstance(rows, Tensor):
            rows = rows.tolist()
        named = tuple(rows) if isinstance(rows, Iterable) else (rows,)
        if any(isinstance(row, bool) for row in named):  # a mask would select rows 1 and 0
            raise TypeError(f"rows: expected row numbers, got {checks.shown(named)}; of a mask: mask.nonzero()[:, 0]")
        try:
            numbers = tuple(map(operator.index, named))
        except TypeError:
            raise TypeError(f"rows: expected a slice, a row number or several, got {checks.shown(rows)}") from None
        if len(set(numbers)) != len(numbers) or any(not 0 <= row < self.max_batch for row in numbers):
            raise ValueError(
                f"rows: expected different row numbers in 0..{self.max_batch - 1}, got {checks.shown(list(numbers))}"
            )
        if numbers and numbers == tuple(range(numbers[0], numbers[-1] + 1)):
            return Selection(slice(numbers[0], numbers[-1] + 1), range(numbers[0], numbers[-1] + 1))
        if numbers not in self._indices:
            _limit(self._indices)
            self._indices[numbers] = torch.tensor(numbers, dtype=torch.int64, device=self.pool.lens.device)
        return Selection(self._indices[numbers], numbers)

    def layer(self, layer: int, rows: Selection) -> tuple[Tensor, Tensor]:
        """Block tables ``[B', Hkv, max_blocks]`` and lengths ``[B', Hkv]`` of one layer."""
        num_layers = len(self.pool.lens)
        if not 0 <= layer < num_layers:
            raise ValueError(f"layer: expected a number in 0..{num_layers - 1}, got {layer}")
        index, numbers = rows.index, rows.numbers
        kept: dict = self._views if isinstance(numbers, range) else self._gathered
        if numbers not in kept:
            _limit(kept)
            kept[numbers] = tuple(self.pool.tables[:, index]), tuple(self.pool.lens[:, index])
        tables, lens = kept[numbers]
        return tables[layer], lens[layer]

    def schedule(self, layer: int, rows: Selection) -> Tensor | None:
        """The layer's part of this step's schedule. It is made once for all layers. The CPU needs none."""
        pool = self.pool
        if backend(pool.lens.device) in ("eager", "numba"):
            return None
        key = rows.numbers, pool.capturing()  # results of a captured graph do not exist before its replay
        if key not in self._schedules:
            self._schedules[key] = tuple(paged_schedule(pool.lens[:, rows.index], pool.block_size))
        return self._schedules[key][layer]

    def checks_data(self) -> bool:
        """Whether numbers on the device are checked: on the CPU, or on request."""
        return self.pool.exact or checks.debug()

    def expect_tokens(self, num_tokens: int) -> None:
        """A number of tokens that a list can have. Much larger ones would wrap around in int32."""
        checks.expect_int("num_tokens", num_tokens, 0)
        if num_tokens > self.pool.max_tokens:
            raise ValueError(f"num_tokens: expected at most max_tokens = {self.pool.max_tokens}, got {num_tokens}")

    def expect_per_row(self, name: str, value: Tensor, rows: Selection) -> None:
        """int32, one number for each of ``rows``."""
        checks.expect_tensor(name, value)
        checks.expect_dtype(name, value, torch.int32)
        checks.expect_shape(name, value, "[rows]", len(rows.numbers))
        checks.expect_same_device(name, value, "the cache", self.pool.lens)

    def changed(self) -> None:
        """Drop everything that was derived from lengths and tables."""
        self._schedules.clear()
        self._gathered.clear()


class RowStates:
    """The state of each row apart from its lists.

    Attributes:
        next_positions: int32 ``[max_batch]``, the position of the next token: the length before any eviction.
        settled: int32 ``[max_batch]``, the position at which rollback stops: an eviction has removed tokens before it.
        compressed: whether an eviction has run on the row since it was empty.
    """

    def __init__(self, max_batch: int, device: torch.device) -> None:
        self.next_positions = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self.settled = torch.zeros_like(self.next_positions)
        self.compressed = [False] * max_batch

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(writable(state))

    def clear(self, rows: Selection) -> None:
        self.next_positions[rows.index] = self.settled[rows.index] = 0
        self.mark_compressed(rows, False)

    def fork(self, row: int, into: Selection, next_position: Tensor) -> None:
        self.next_positions[into.index], self.settled[into.index] = next_position, self.settled[row].clone()
        self.mark_compressed(into, self.compressed[row])

    def take(self, other: RowStates, index: Tensor, rows: Sequence[int]) -> None:
        """Row i gets the state of row ``rows[i]`` of ``other``; ``index`` is the same on the device."""
        self.next_positions.copy_(other.next_positions[index])
        self.settled.copy_(other.settled[index])
        self.compressed[:] = [other.compressed[row] for row in rows]

    def settle(self, rows: Selection, evicted: Tensor) -> None:
        """Mark rows, where ``evicted`` bool ``[B']`` is True: they cannot be rolled back past their current tokens."""
        index = rows.index
        self.settled[index] = torch.where(evicted, self.next_positions[index], self.settled[index])

    def mark_compressed(self, rows: Selection, compressed: bool = True) -> None:
        for row in rows.numbers:
            self.compressed[row] = compressed


def expect_rows(name: str, value: Tensor, batch: int) -> None:
    """``[batch, tokens, heads, head_dim]``."""
    checks.expect_tensor(name, value)
    checks.expect_rank(name, value, "[rows, tokens, heads, head_dim]")
    if value.shape[0] != batch:
        raise ValueError(f"{name}: expected {batch} rows, as many as `rows` names, got {value.shape[0]}")


def _limit(kept: dict) -> None:
    if len(kept) >= _MAX_SELECTIONS:
        kept.clear()
