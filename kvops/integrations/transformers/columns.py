"""The columns of a batch and the slots of a cache that stores no padding."""

from __future__ import annotations

import torch
from torch import Tensor


class Columns:
    """Which columns of a batch are real tokens: one after another, they are the tokens of a row.

    The parts of the record are joined when it is read, so that a pass costs no copy.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[int, Tensor | None]] = []  # columns, and bool [B, columns] unless all are real
        self._order: Tensor | None = None

    def add(self, count: int, real: Tensor | None) -> None:
        """The columns of a pass; ``real`` is bool ``[B, count]``, None without padding."""
        self._parts.append((count, real))
        self._order = None

    def clear(self) -> None:
        self._parts, self._order = [], None

    def real(self) -> Tensor | None:
        """bool ``[B, columns]``, False for padding; None without padding."""
        like = next((real for _, real in self._parts if real is not None), None)
        if like is None:
            return None
        if len(self._parts) > 1:
            parts = [like.new_ones(len(like), count) if real is None else real for count, real in self._parts]
            joined = torch.cat(parts, 1)
            self._parts = [(joined.shape[1], joined)]
        return self._parts[0][1]

    def order(self) -> Tensor | None:
        """int64 ``[B, columns]``, see :func:`tokens_in_order`; None without padding."""
        real = self.real()
        if self._order is None and real is not None:
            self._order = tokens_in_order(real)
        return self._order

    def of_tokens(self, tokens: Tensor) -> Tensor:
        """The columns of tokens ``[B, N]``, counted in each row without padding."""
        order = self.order()
        return tokens if order is None else order.gather(1, tokens)

    def shows_others(self, mask: Tensor, columns: Tensor, lens: Tensor) -> bool:
        """Whether a mask, bool or float ``[B or 1, H or 1, T, S]``, shows real tokens outside of the first ``lens[b]``
        of ``columns`` ``[B, N]``. Reads the mask."""
        size = mask.shape[-1]
        kept = torch.arange(columns.shape[1], device=columns.device) < lens[:, None]
        others = torch.ones(len(columns), size + 1, dtype=torch.bool, device=columns.device)
        others = others.scatter_(1, columns.where(kept, size), False)[:, :size]
        real = self.real()
        others = others if real is None else others & real
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        return bool((seen & others[:, None, None]).any())

    def take(self, order: list[int]) -> None:
        """Row i becomes row ``order[i]``."""
        real, self._order = self.real(), None
        if real is not None:
            self._parts = [(real.shape[1], real[order])]

    def crop(self, count: int) -> None:
        """Remove the last ``count`` columns."""
        real, self._order = self.real(), None
        total = sum(columns for columns, _ in self._parts) - count
        self._parts = [(total, None if real is None else real[:, :total])]


def tokens_in_order(real: Tensor) -> Tensor:
    """int64 ``[B, columns]``: where the real tokens of each row are, in order, then its padding."""
    return (~real).byte().argsort(dim=1, stable=True)


def take_columns(bias: Tensor, columns: Tensor, dim: int) -> Tensor:
    """A bias ``[B or 1, H or 1, T or 1, S or 1]`` with the ``columns`` ``[B, N]`` of each row in the place of dimension
    ``dim`` (2 or 3), unless it is the same for all."""
    if bias.shape[dim] == 1:
        return bias
    index = columns[:, None, :, None] if dim == 2 else columns[:, None, None, :]
    whole = bias.expand(len(columns), -1, -1, -1)
    sizes = list(whole.shape)
    sizes[dim] = columns.shape[1]
    return whole.gather(dim, index.expand(sizes))
