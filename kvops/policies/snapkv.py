"""SnapKV: the attention of the prompt's last queries shows what the answer needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kvops import checks
from kvops.policies.base import Policy, Seen


@dataclass(frozen=True)
class SnapKV(Policy):
    """Attention from the last queries, max-pooled along the keys before them (Li et al. 2024, arXiv 2404.14469).

    With ``scope="head"`` this is SnapKV as published. With ``scope="layer"`` the heads of a layer compete, as in
    AdaKV (Feng et al. 2024, arXiv 2407.11550), with ``scope="sequence"`` the heads of all layers.

    Attributes:
        observe: the number of last queries whose attention counts.
        pool: width of the pooling window, odd: neighbours of an important key are kept with it.
        pooling: ``"max"`` or ``"mean"`` over that window; the observed tokens are not pooled.
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
