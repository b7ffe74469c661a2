"""KeyDiff: keys that differ from the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from kvops.policies.base import Policy, Seen


@dataclass(frozen=True)
class KeyDiff(Policy):
    """How far a key points away from the mean direction of all keys (Park et al. 2025, arXiv 2504.15364).

    The score is minus one minus the cosine with that mean, from -2 to 0. No attention is looked at and decoding adds
    nothing: tokens that it appends stand at 0, above every prompt token.
    """

    scope: Literal["head", "layer", "sequence"] = "head"
    accumulate: ClassVar[Literal["sum", "sumsq", "max"] | None] = None

    def score(self, seen: Seen) -> Tensor:
        directions = F.normalize(seen.k.float(), dim=-1)
        anchor = F.normalize(directions.mean(1, keepdim=True), dim=-1)
        return -1 - (directions * anchor).sum(-1).transpose(1, 2)
