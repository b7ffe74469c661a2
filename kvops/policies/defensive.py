"""DefensiveKV: score each key by the query that needs it most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvops import checks
from kvops.policies.base import Policy, Seen


@dataclass(frozen=True)
class DefensiveKV(Policy):
    """The most attention that any of the last queries paid, never below the head's mean, times the value's weight
    (Feng et al. 2025, arXiv 2510.13334).

    A mean hides the one query that depends on a key. This policy takes the maximum over queries and query heads, pooled
    along the keys as in SnapKV, and at least the head's mean (the paper's prior risk). The paper weighs by the norm of
    the projected value. A cache does not know the output projection, so the L1 norm of the value is used instead,
    relative to the head's mean.

    Attributes:
        observe: the number of last queries whose attention counts.
        pool: width of the pooling window, odd.
    """

    scope: Literal["head", "layer", "sequence"] = "layer"
    observe: int = 32
    pool: int = 5
    accumulate: ClassVar[Literal["sum", "sumsq", "max"] | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.expect_odd("pool", self.pool)

    @property
    def recall(self) -> int:
        return self.observe

    def score(self, seen: Seen) -> Tensor:
        risk = seen.attention(last=self.observe, reduce="max", group="max")
        risk = seen.pool(risk, self.pool, last=self.observe)
        mean = risk.sum(-1, keepdim=True) / seen.real.sum(-1, keepdim=True).clamp_min(1)
        risk = torch.maximum(risk, mean)
        weight = torch.linalg.vector_norm(seen.v, 1, dim=-1, dtype=torch.float32).transpose(1, 2)
        return risk * weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
