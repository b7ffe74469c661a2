"""KVzip: keep what the model needs to repeat the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvops.policies.base import Policy, Seen
from kvops.policies.recital import PLAIN, Recital


@dataclass(frozen=True)
class KVzip(Policy):
    """The most attention that any query paid to a key while the prompt was recited (Kim et al. 2025, arXiv 2505.23416).

    When a document is compressed, its questions are not known yet. What the model needs to repeat the whole document
    serves any of them. Heads of all layers compete. The softmax is over everything that the model sees; the paper's
    leaves out other chunks except for the sinks, which is the same if one chunk is the whole prompt. Tokens that have
    not been recited (those of an answer) are scored with the last ``observe`` queries. A key never scores less than
    before.

    Attributes:
        recital: how the prompt is recited.
        observe: the number of last queries that score keys while decoding, where nothing is recited.
    """

    recital: Recital = PLAIN
    observe: int = 32
    accumulate: ClassVar[Literal["sum", "sumsq", "max"] | None] = None

    @property
    def recall(self) -> int:
        return self.observe

    def score(self, seen: Seen) -> Tensor:
        if seen.recited is None:
            return torch.maximum(seen.attention(last=self.observe, reduce="max", group="max"), seen.earlier)
        return torch.maximum(seen.recited.most, seen.earlier)
