"""ByHeart: what it takes to say the prompt again, and to go on from its end."""

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

    The last queries know what comes next, a recital what any question may ask for. All that the recital paid to a key,
    plus ``weight`` times the most that one of the last queries paid, counts; times the norm of the value, times the
    key's distinctness. Where keys compete that were recited at other times, or never, as decoded tokens, none is worth
    less than it was. ``docs/compression-study.md`` has it beside the others; how the two are put together was chosen on
    contexts made for that, with other facts, digits and pages than there.

    Attributes:
        recital: how the prompt is recited.
        weight: of the last queries, at least 0.
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
