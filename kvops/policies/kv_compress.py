"""KV-Compress: squared attention, blocks across layers and heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvops.policies.base import Policy, Seen


@dataclass(frozen=True)
class KVCompress(Policy):
    """Squared attention from the last queries, summed over a group's query heads (Rehg 2024, arXiv 2410.00161).

    Squares favour keys with much attention from a few queries over keys with little attention from all queries. Scores
    are summed over the query heads of a group, and blocks compete across all layers and heads.

    Attributes:
        observe: the number of last queries whose attention counts.
    """

    observe: int = 32
    accumulate: ClassVar[Literal["sum", "sumsq", "max"] | None] = "sumsq"

    def score(self, seen: Seen) -> Tensor:
        return seen.attention(last=self.observe, reduce="sumsq")
