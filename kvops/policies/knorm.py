"""Key norms: small keys receive much attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvops.policies.base import Policy, Seen


@dataclass(frozen=True)
class Knorm(Policy):
    """Minus the Euclidean norm of the key (Devoto et al. 2024, arXiv 2406.11430). Attention is not used.

    Heads have norms of different scale, so they do not compete.
    """

    scope: Literal["head", "layer", "sequence"] = "head"
    accumulate: ClassVar[Literal["sum", "sumsq", "max"] | None] = None

    def score(self, seen: Seen) -> Tensor:
        return -torch.linalg.vector_norm(seen.k, dim=-1, dtype=torch.float32).transpose(1, 2)
