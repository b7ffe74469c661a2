"""ByHeart: what it takes to say the prompt again, and to go on from its end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvops.policies.base import Seen
from kvops.policies.recital import PLAIN, Recital
from kvops.policies.standout import Standout


@dataclass(frozen=True)
class ByHeart(Standout):
    """kvops' own: :class:`Standout` whose worst case is over a recital of the prompt, too (KVzip, Kim et al. 2025,
    arXiv 2505.23416).

    The last queries know what comes next, a recital knows what any question may ask for: the larger of the two
    attentions counts, times the norm of the value, times the key's distinctness. A key is never worth less than it was,
    so that chunks of a prompt and decoded tokens compare with what was recited before them. ``docs/compression.md`` has
    it beside the others; it was chosen on contexts of its own (other facts, digits and pages), not on those.

    Attributes:
        recital: how the prompt is recited.
    """

    recital: Recital = PLAIN

    def score(self, seen: Seen) -> Tensor:
        return torch.maximum(super().score(seen), seen.earlier)

    def attention(self, seen: Seen) -> Tensor:
        last = super().attention(seen)
        return last if seen.recited is None else torch.maximum(last, seen.recited.total)
