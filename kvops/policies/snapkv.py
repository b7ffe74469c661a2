"""SnapKV: the last queries of the prompt know what the answer will need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kvops import checks
from kvops.policies.base import Policy, Seen


@dataclass(frozen=True)
class SnapKV(Policy):
    """Attention from the last queries, max-pooled along the keys before them (Li et al. 2024, arXiv 2404.14469).

    With ``scope="head"`` this is SnapKV as published, with ``scope="layer"`` the heads of a layer compete as in AdaKV
    (Feng et al. 2024, arXiv 2407.11550), with ``scope="sequence"`` those of all layers.

    Attributes:
        observe: how many of the last queries are looked at.
        pool: width of the pooling window, odd: neighbours of a key that matters are kept with it.
        pooling: over that window, ``"max"`` or ``"mean"``; the observed tokens themselves are left out of it.
    """

    observe: int = 32
    pool: int = 7
    pooling: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.expect_odd("pool", self.pool)
        checks.expect_choice("pooling", self.pooling, ("max", "mean"))

    def score(self, seen: Seen) -> Tensor:
        return seen.pool(seen.attention(last=self.observe), self.pool, last=self.observe, kind=self.pooling)
