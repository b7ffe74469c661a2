"""TOVA: the attention of the newest token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvops.policies.base import Policy, Seen


@dataclass(frozen=True)
class TOVA(Policy):
    """The attention of the last query, averaged over all heads of the layer (Oren et al. 2024, arXiv 2401.06104).

    All heads of a layer therefore keep the same tokens.
    """

    scope: Literal["head", "layer", "sequence"] = "head"
    accumulate: ClassVar[Literal["sum", "sumsq", "max"] | None] = None

    def score(self, seen: Seen) -> Tensor:
        received = seen.attention(last=1)
        return (received.sum(1, keepdim=True) / seen.q.shape[2]).expand_as(received)
