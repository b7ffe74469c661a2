"""What every policy has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor


@dataclass(frozen=True)
class Policy(ABC):
    """What a cached key is worth to its head. Higher scores survive.

    Attributes:
        scope: ``"sequence"``: the heads of all layers compete for one budget (ragged heads); ``"head"``: every head
            keeps the same number of blocks.
        accumulate: how decoding adds to the scores of the slots it attends to ("sum", "sumsq" or "max" of the
            attention probability over the queries), or None when it does not.
    """

    scope: Literal["head", "sequence"] = "sequence"
    accumulate: ClassVar[Literal["sum", "sumsq", "max"] | None] = "sum"

    @abstractmethod
    def score(self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *, window_left: int = -1) -> Tensor:
        """Score the keys of one layer after the prefill of a prompt.

        q [B, S, Hq, D], k [B, S, Hkv, D], v [B, S, Hkv, Dv] with rotary embedding applied, lse float32 [B, Hq, S] of
        causal attention -> float32 [B, Hkv, S].
        """
