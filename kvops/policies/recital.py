"""Reading a prompt once more behind itself: what the model looks at when it has to say it again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvops import checks


class Recited(NamedTuple):
    """What the queries of a recital paid to the keys that they repeat, float32 ``[B, Hkv, S]`` each, 0 for other keys.

    Attributes:
        most: the most that any query and query head of the group paid.
        total: what all of them paid together.
    """

    most: Tensor
    total: Tensor


@dataclass(frozen=True)
class Recital:
    """How a prompt is recited, a chunk of it at a time (KVzip, Kim et al. 2025, arXiv 2505.23416).

    Each pass reads the tokens of ``ask``, then the ``lead`` tokens that stand before the chunk, then the chunk itself,
    with all keys of the prompt in sight. Passes do not see one another.

    Attributes:
        chunk: how many tokens of the prompt a pass recites. Fewer where the model has no positions left for so many.
        lead: how many tokens in front of them it reads again, which tell the place.
        ask: token ids of an instruction, such as ``tokenizer.encode("\\n\\nRepeat the previous context:")``, as in
            the paper. None by default: a text that begins anew asks by itself, and a policy knows no tokenizer.
    """

    chunk: int = 2048
    lead: int = 8
    ask: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checks.expect_int("chunk", self.chunk, 1)
        checks.expect_int("lead", self.lead, 0)

    def passes(self, tokens: Tensor, room: int, start: int = 0) -> Iterator[tuple[Tensor, slice]]:
        """What to read, int64 ``[1, T]`` each, to recite ``tokens`` int64 ``[1, S]`` from ``start`` on, and which of
        ``tokens`` it repeats.

        ``room`` is how many positions the model has behind them. ValueError where that is too few.
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
"""By chunks of 2048 tokens, without instruction."""
