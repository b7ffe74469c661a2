"""Standout: needed by some query, worth reading, unlike the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvops import checks
from kvops.policies.base import Policy, Seen


@dataclass(frozen=True)
class Standout(Policy):
    """kvops' own, of what the others teach: attention in the worst case, times the value's norm, times distinctness.

    The most attention that any of the last queries and any query head of the group paid (DefensiveKV: a mean hides the
    one query that depends on a key), max-pooled along the keys (SnapKV: a fact is a few tokens long), times the norm of
    the value (ExpectedAttention: attention to nothing changes nothing), times ``((1 - c) / 2) ** distinctness`` with c
    the cosine between the key and the mean direction of the head's keys (KeyDiff: what resembles all others can be
    spared). Blocks compete across all layers and heads (KV-Compress).
    ``docs/compression-study.md`` has it beside the others; the defaults were chosen on two of its contexts.

    Attributes:
        observe: how many of the last queries are looked at.
        pool: width of the pooling window, odd.
        distinctness: how much standing out counts, 0 for not at all.
    """

    observe: int = 32
    pool: int = 5
    distinctness: float = 4.0
    accumulate: ClassVar[Literal["sum", "sumsq", "max"] | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.expect_odd("pool", self.pool)
        checks.expect_at_least("distinctness", self.distinctness, 0)

    @property
    def recall(self) -> int:
        return self.observe

    def attention(self, seen: Seen) -> Tensor:
        """What any query paid in the worst case: float32 ``[B, Hkv, S]``."""
        paid = seen.attention(last=self.observe, reduce="max", group="max")
        return seen.pool(paid, self.pool, last=self.observe)

    def score(self, seen: Seen) -> Tensor:
        size = torch.linalg.vector_norm(seen.v, dim=-1, dtype=torch.float32)
        apart = (1 - seen.alignment()).clamp_min(0) / 2
        return self.attention(seen) * size.transpose(1, 2) * apart**self.distinctness
