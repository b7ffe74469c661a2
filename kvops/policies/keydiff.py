"""KeyDiff: keys that differ from the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvops.policies.base import Policy, Seen


@dataclass(frozen=True)
class KeyDiff(Policy):
    """How far a key points away from the mean direction of all keys (Park et al. 2025, arXiv 2504.15364).

    The score is minus the cosine with that mean. Attention is not used.
    """

    scope: Literal["head", "layer", "sequence"] = "head"
    accumulate: ClassVar[Literal["sum", "sumsq", "max"] | None] = None

    def score(self, seen: Seen) -> Tensor:
        return -seen.alignment()
