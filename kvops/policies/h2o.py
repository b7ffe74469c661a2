"""H2O: heavy hitters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvops.policies.base import Policy, Seen


@dataclass(frozen=True)
class H2O(Policy):
    """The attention that a key received from all queries so far (Zhang et al. 2023, arXiv 2306.14048)."""

    def score(self, seen: Seen) -> Tensor:
        return seen.earlier + seen.attention()
