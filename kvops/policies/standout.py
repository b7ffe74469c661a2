"""Standout: the largest attention, times the norm of the value, times the distinctness of the key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvops import checks
from kvops.policies.base import Policy, Seen


@dataclass(frozen=True)
class Standout(Policy):
    """A policy of kvops, from parts of others: the largest attention, times the value's norm, times the key's
    distinctness.

    - The largest attention of any of the last queries and any query head of the group (as in DefensiveKV: a mean hides
      the one query that depends on a key), max-pooled along the keys (as in SnapKV: a fact is a few tokens long).
    - The norm of the value (as in ExpectedAttention: attention to a small value changes little).
    - ``((1 - c) / 2) ** distinctness``, with c the cosine between the key and the mean direction of the head's keys (as
      in KeyDiff: a key that resembles all others is not missed).

    Blocks compete across all layers and heads (KV-Compress). ``docs/compression-study.md`` compares it with other
    policies; the defaults were chosen on two of its contexts.

    Attributes:
        observe: the number of last queries whose attention counts.
        pool: width of the pooling window, odd.
        distinctness: the exponent of the distinctness, 0 to ignore it.
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
        """The largest attention of any query to each key: float32 ``[B, Hkv, S]``."""
        paid = seen.attention(last=self.observe, reduce="max", group="max")
        return seen.pool(paid, self.pool, last=self.observe)

    def score(self, seen: Seen) -> Tensor:
        size = torch.linalg.vector_norm(seen.v, dim=-1, dtype=torch.float32)
        apart = (1 - seen.alignment()).clamp_min(0) / 2
        return self.attention(seen) * size.transpose(1, 2) * apart**self.distinctness
