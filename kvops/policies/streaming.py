"""StreamingLLM: the first and the latest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvops.policies.base import Policy, Seen


@dataclass(frozen=True)
class Streaming(Policy):
    """Attention sinks and a recent window (Xiao et al. 2023, arXiv 2309.17453): later keys are worth more.

    The sinks are the ``protect_first`` tokens of the compression. Scores are negative distances from the text's end.
    """

    accumulate: ClassVar[Literal["sum", "sumsq", "max"] | None] = None

    def score(self, seen: Seen) -> Tensor:
        return (seen.positions - seen.end[:, None, None]).float()
