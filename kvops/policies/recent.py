"""The queries of the last tokens, with which a policy scores keys during decoding."""

from __future__ import annotations

import torch
from torch import Tensor


class RecentQueries:
    """The queries of the last ``size`` tokens of ``max_batch`` rows in every layer, the newest last."""

    def __init__(self, max_batch: int, size: int) -> None:
        self.max_batch, self.size = max_batch, size
        self._queries: dict[int, Tensor] = {}

    def begin(self, layer: int, row: int, q: Tensor) -> None:
        """Store q ``[1, T, Hq, D]`` of a row's newest tokens. With T < ``size``, older queries stay before them."""
        if layer not in self._queries:
            self._queries[layer] = q.new_zeros(self.max_batch, self.size, *q.shape[2:])
        held = self._queries[layer]
        held[row] = torch.cat((held[row], q[0]))[-self.size :]

    def add(self, layer: int, q: Tensor, counts: Tensor) -> None:
        """Append the first ``counts`` int ``[max_batch]`` of the queries q ``[max_batch, T, Hq, D]``."""
        held = self._queries[layer]
        place = counts[:, None].long() + torch.arange(self.size, device=q.device)
        self._queries[layer] = torch.cat((held, q), 1).gather(1, place[..., None, None].expand_as(held))

    def of(self, layer: int, row: int, num_tokens: int) -> Tensor:
        """The queries ``[1, T, Hq, D]`` of a row of ``num_tokens`` tokens; T is ``size``, or ``num_tokens`` if that is
        less."""
        return self._queries[layer][row : row + 1, -min(self.size, num_tokens) :]
