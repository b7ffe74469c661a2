"""ByHeart: keep what the model needs to repeat the prompt and to continue it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvops import checks
from kvops.policies.base import Seen
from kvops.policies.recital import PLAIN, Recital
from kvops.policies.standout import Standout


@dataclass(frozen=True)
class ByHeart(Standout):
    """kvops' own: :class:`Standout` over a recital of the prompt (KVzip, Kim et al. 2025, arXiv 2505.23416).

    The last queries show what comes next; a recital shows what any question may need. The score is the sum of the
    recital's attention to a key, plus ``weight`` times the largest attention of the last queries, times the norm of the
    value, times the key's distinctness. Keys that were recited at other times, or never (decoded tokens), compete with
    each other; a key never scores less than before. ``docs/compression-study.md`` compares it with other policies. The
    combination was chosen on other contexts than those of the study, with other facts, digits and pages.

    Attributes:
        recital: how the prompt is recited.
        weight: the weight of the last queries, at least 0.
    """

    recital: Recital = PLAIN
    weight: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.expect_at_least("weight", self.weight, 0)

    def attention(self, seen: Seen) -> Tensor:
        last = self.weight * super().attention(seen)
        return last if seen.recited is None else last + seen.recited.total

    def score(self, seen: Seen) -> Tensor:
        return torch.maximum(super().score(seen), seen.earlier)
