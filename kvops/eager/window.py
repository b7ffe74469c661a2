"""Which keys a query of dense attention sees, and the tiles of a call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Tiles of plain PyTorch: scores of this many elements stay in cache between the passes over them.
_TILE_ELEMENTS = 1 << 20
_TILE_ROWS = 128


class Tile(NamedTuple):
    """The queries start..end-1 beside the keys low..high-1."""

    start: int
    end: int
    low: int
    high: int
    causal: bool = False  # row i sees the first i + 1 of the keys: torch's kernel aligns its mask to the top left

    @property
    def rows(self) -> slice:
        return slice(self.start, self.end)

    @property
    def keys(self) -> slice:
        return slice(self.low, self.high)


class Window(NamedTuple):
    """Which keys a query sees: query i stands at i + offset and sees ``left`` keys before and ``right`` after it.

    None is no limit. ``right`` may be negative: the nearest keys do not count then.
    """

    num_queries: int
    num_keys: int
    left: int | None
    right: int | None

    @classmethod
    def of(
        cls, num_queries: int, num_keys: int, causal: bool = False, window_left: int = -1, window_right: int = -1
    ) -> Window:
        """Causal is a window without keys to the right; limits beyond every distance are none."""
        right = 0 if causal else window_right
        return cls(
            num_queries,
            num_keys,
            window_left if 0 <= window_left < num_keys - 1 else None,
            right if 0 <= right < num_queries - 1 else None,
        )

    @property
    def offset(self) -> int:
        return self.num_keys - self.num_queries

    @property
    def first_row(self) -> int:
        """The rows before it see no key."""
        if self.num_keys == 0:
            return self.num_queries
        return 0 if self.right is None else min(self.num_queries, max(0, -self.right - self.offset))

    def keys(self, start: int, end: int) -> tuple[int, int]:
        """The range of keys that some row of start..end-1 sees."""
        low = 0 if self.left is None else max(0, start + self.offset - self.left)
        high = self.num_keys
        if self.right is not None:
            high = max(low, min(high, end + self.offset + self.right))
        return low, high

    def sees_all(self, tile: Tile) -> bool:
        """Whether every row of the tile sees all of its keys."""
        return (self.left is None or tile.end - 1 + self.offset - self.left <= tile.low) and (
            self.right is None or tile.high - 1 <= tile.start + self.offset + self.right
        )

    def distance(self, tile: Tile) -> Tensor:
        """int64 [rows, keys]: how far each key is behind each query."""
        return torch.arange(tile.start, tile.end)[:, None] + self.offset - torch.arange(tile.low, tile.high)

    def hidden(self, distance: Tensor) -> Tensor:
        """bool: where a key is not seen."""
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if self.left is not None:
            hidden |= distance > self.left
        if self.right is not None:
            hidden |= distance < -self.right
        return hidden

    def tiles(self, first_row: int, heads: int) -> Iterator[Tile]:
        """Small tiles of all that the rows from ``first_row`` on see, for plain PyTorch on so many heads at once."""
        rows = max(1, min(_TILE_ROWS, self.num_queries - first_row))
        columns = min(8192, max(64, _TILE_ELEMENTS // max(1, heads * rows)))
        for start in range(first_row, self.num_queries, rows):
            end = min(self.num_queries, start + rows)
            first, last = self.keys(start, end)
            for low in range(first, last, columns):
                yield Tile(start, end, low, min(last, low + columns))
