"""Dropout of attention's probabilities, tile by tile: the same random bits as in the kernels.

Random numbers are numbered by what they decide, so tiles, kernels and devices do not change them:

====== ======================================================================
key    the seed (64 bits)
word 0 the number of the key in its sequence, divided by 4
word 1 the number of the query in its sequence
word 2 batch entry * Hq + query head; packed sequences count as batch entries
word 3 0x44524F50, which draft verification does not use
====== ======================================================================

The four words that come out serve four keys in a row. A probability is kept if its word is at least
``round(dropout_p * 2**32)``, and what is kept is divided by ``1 - dropout_p``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvops.eager.philox import philox
from kvops.eager.window import Tile

_LAST_WORD = 0x44524F50


class Dropout(NamedTuple):
    """``p``, the seed int64 [1], and the number of the first batch entry of the call."""

    p: float
    seed: Tensor
    first_entry: int

    def weights(self, tile: Tile, batch: int, heads: int, dtype: torch.dtype) -> Tensor:
        """[batch, heads, rows, keys]: 1 / (1 - p) where a probability is kept, else 0."""
        first = tile.low // 4
        fours = torch.arange(first, -(-tile.high // 4))
        queries = torch.arange(tile.start, tile.end)[:, None]
        planes = self.first_entry * heads + torch.arange(batch * heads).view(batch, heads, 1, 1)
        words = philox(fours, queries, planes, torch.tensor(_LAST_WORD), self.seed)
        bits = torch.stack(words, -1).flatten(-2)[..., tile.low - 4 * first : tile.high - 4 * first]
        return (bits >= min(round(self.p * 2**32), 2**32 - 1)).to(dtype).div_(1.0 - self.p)
