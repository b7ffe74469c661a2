"""R-KV: keep keys that receive attention and do not repeat others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvops import checks
from kvops.policies.base import Policy, Seen

_MAX_COSINES = 1 << 22
"""The most cosines in memory at once."""


@dataclass(frozen=True)
class RKV(Policy):
    """Attention from the last queries, less the key's redundancy (Cai et al. 2025, arXiv 2505.24133).

    For reasoning models: with ``Compression(every=N)`` the repetitions of a long answer are evicted first. The
    redundancy of a key is its mean cosine with the head's other keys. The latest of the keys that resemble a key does
    not count, so that the last of several repetitions is kept. The softmax of the redundancy over the keys is
    subtracted from the attention of the last ``observe`` queries: the mean over these queries and the group (the paper
    takes the group's largest logit), max-pooled along the keys.

    Attributes:
        observe: the number of last queries whose attention counts.
        pool: width of the pooling window, odd.
        threshold: keys with a cosine above it resemble one another.
        importance: the weight of attention, from 0 to 1; redundancy has the weight ``1 - importance``.
    """

    scope: Literal["head", "layer", "sequence"] = "head"
    observe: int = 8
    pool: int = 7
    threshold: float = 0.5
    importance: float = 0.1
    accumulate: ClassVar[Literal["sum", "sumsq", "max"] | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.expect_odd("pool", self.pool)
        checks.expect_between("importance", self.importance, 0, 1)

    @property
    def recall(self) -> int:
        return self.observe

    def score(self, seen: Seen) -> Tensor:
        attention = seen.attention(last=self.observe, group="mean") / min(self.observe, seen.q.shape[1])
        attention = seen.pool(attention, self.pool, last=self.observe)
        redundancy = self._mean_cosine(seen).masked_fill(~seen.real, float("-inf")).softmax(-1)
        return self.importance * attention - (1 - self.importance) * redundancy

    def _mean_cosine(self, seen: Seen) -> Tensor:
        """The mean cosine with the other keys of the head, without the latest key that resembles each: ``[B, Hkv,
        S]``."""
        k = F.normalize(seen.k.transpose(1, 2).float(), dim=-1)  # padding is 0 and resembles nothing
        total = (k @ k.sum(2)[..., None])[..., 0] - k.square().sum(-1)
        batch, heads, length, _ = k.shape
        number = torch.arange(length, device=k.device)
        tile = max(1, _MAX_COSINES // (batch * heads * length))
        for start in range(0, length, tile):
            cosine = k[:, :, start : start + tile] @ k.mT
            itself = number == number[start : start + tile, None]
            similar = (cosine > self.threshold) & ~itself
            latest = torch.where(similar, number, -1).amax(-1, keepdim=True)
            total -= (cosine * (number == latest)).sum(2)
        return total / seen.real.sum(-1, keepdim=True).clamp_min(1)
