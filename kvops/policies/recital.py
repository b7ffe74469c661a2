"""Recitals: the model reads a prompt a second time, after itself, and shows what it needs to repeat it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvops import checks


class Recited(NamedTuple):
    """The attention of a recital's queries to the keys that they repeat: float32 ``[B, Hkv, S]``, 0 for other keys.

    Attributes:
        most: the largest attention of any query and query head of the group.
        total: the sum over all of them.
    """

    most: Tensor
    total: Tensor


@dataclass(frozen=True)
class Recital:
    """How a prompt is recited, chunk by chunk (KVzip, Kim et al. 2025, arXiv 2505.23416).

    Each pass reads the tokens of ``ask``, then the ``lead`` tokens before the chunk, then the chunk itself. It sees all
    keys of the prompt, and no other pass.

    Attributes:
        chunk: the number of tokens that a pass recites; fewer if the model has not enough positions.
        lead: the number of tokens before the chunk that are read again, to show where it begins.
        ask: token ids of an instruction, such as ``tokenizer.encode("\\n\\nRepeat the previous context:")``, as in
            the paper. Empty by default: a text that begins again needs no instruction, and a policy has no tokenizer.
    """

    chunk: int = 2048
    lead: int = 8
    ask: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checks.expect_int("chunk", self.chunk, 1)
        checks.expect_int("lead", self.lead, 0)

    def passes(self, tokens: Tensor, room: int, start: int = 0) -> Iterator[tuple[Tensor, slice]]:
        """The passes that recite ``tokens`` int64 ``[1, S]`` from ``start`` on: what each reads, int64 ``[1, T]``, and
        which of ``tokens`` it repeats.

        ``room`` is the number of positions that the model has after them. Raises ValueError if it is too small.
        """
        size = min(self.chunk, room - len(self.ask) - self.lead)
        if size < 1:
            raise ValueError(
                f"tokens: expected {len(self.ask) + self.lead + 1} positions behind them to recite them at, got a "
                f"prompt of {tokens.shape[1]} tokens and a model with {room} more; next step: a policy without recital"
            )
        ask = torch.tensor([self.ask], dtype=tokens.dtype, device=tokens.device).view(1, -1)
        for first in range(start, tokens.shape[1], size):
            chunk = slice(first, min(first + size, tokens.shape[1]))
            yield torch.cat((ask, tokens[:, max(0, first - self.lead) : chunk.stop]), 1), chunk


PLAIN = Recital()
"""Chunks of 2048 tokens, without an instruction."""
