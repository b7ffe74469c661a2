"""KVzip: worth keeping is what the model needs to say the prompt again."""

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

    No question is known when a document is compressed; what it takes to repeat all of it serves any of them. Heads of
    all layers compete. The softmax is over all that the model sees; the paper's leaves other chunks out, but for the
    sinks, which is the same where one chunk is the whole prompt. Tokens that have not been recited, those of an answer,
    are judged by the last ``observe`` queries, and a key is never worth less than it was.

    Attributes:
        recital: how the prompt is recited.
        observe: how many of the last queries judge where nothing is recited, that is while decoding.
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
