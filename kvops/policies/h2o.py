"""H2O: heavy hitters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvops.ops.scores import attention_scores
from kvops.policies.base import Policy


@dataclass(frozen=True)
class H2O(Policy):
    """The attention that a key received from all queries so far (Zhang et al. 2023, arXiv 2306.14048)."""

    def score(self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *, window_left: int = -1) -> Tensor:
        return attention_scores(q, k, lse, causal=True, window_left=window_left)
