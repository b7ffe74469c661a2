"""Expected attention: the attention that future queries will pay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvops import checks
from kvops.policies.base import Policy, Seen
from kvops.rotary import rotate


@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """The attention that future queries are expected to pay, times the value's norm (Devoto et al. 2025,
    arXiv 2510.00636).

    Queries before rotary embedding are taken to be normal with the mean m and covariance C of the prompt's own. Rotated
    by the mean R of the rotations of the next ``horizon`` positions, a query's exponentiated score against key k is
    expected to be ``exp(k.Rm / sqrt(D) + k.RCR'.k / 2D)``; its softmax over the keys is averaged over the group.

    Attributes:
        horizon: the number of future positions to average over.
        sinks: the number of first tokens that are left out of the distribution (their queries are outliers) and always
            score highest.
        observe: the number of last queries that give the distribution while decoding.
    """

    horizon: int = 512
    sinks: int = 4
    observe: int = 128
    accumulate: ClassVar[Literal["sum", "sumsq", "max"] | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.expect_at_least("horizon", self.horizon, 1)
        checks.expect_at_least("sinks", self.sinks, 0)

    @property
    def recall(self) -> int:
        return self.observe

    def score(self, seen: Seen) -> Tensor:
        if seen.rope is None:
            raise ValueError("rope: expected the rotary frequencies of the model [D / 2], got None")
        groups, width = seen.q.shape[2] // seen.k.shape[2], seen.q.shape[3]
        q, k = seen.q.float(), seen.k.float()
        # [B, T] and [B, horizon]
        past = seen.end[:, None] + torch.arange(-q.shape[1], 0, device=q.device)
        future = seen.end[:, None] + torch.arange(self.horizon, device=q.device)
        counted = (past >= self.sinks)[:, :, None, None]
        number = counted.sum(1).clamp_min(1)
        angles = (past[..., None] * seen.rope)[:, :, None]
        q = rotate(q, angles.cos(), -angles.sin())  # before rotary embedding
        mean = (q * counted).sum(1) / number  # [B, Hq, D]
        centred = (q - mean[:, None]) * counted
        covariance = torch.einsum("bthi,bthj->bhij", centred, centred) / number[..., None]
        angles = future[..., None] * seen.rope
        cos, sin = angles.cos().mean(1)[:, None], angles.sin().mean(1)[:, None]
        mean = rotate(mean, cos, sin)
        cos, sin = cos[:, None], sin[:, None]
        covariance = rotate(rotate(covariance, cos, sin).mT, cos, sin)
        mean, covariance = mean.unflatten(1, (-1, groups)), covariance.unflatten(1, (-1, groups))
        logits = torch.einsum("bshd,bhgd->bhgs", k, mean)
        spread = torch.einsum("bshi,bhgij,bshj->bhgs", k, covariance, k)
        left_out = seen.positions < self.sinks
        scale = width**-0.5 if seen.scale is None else seen.scale
        expected = (logits * scale + spread * scale**2 / 2).masked_fill(left_out[:, :, None], float("-inf"))
        # A head that holds sinks alone has no softmax: all its keys get the same score.
        expected = expected.softmax(-1).nan_to_num(0.0).mean(2)
        worth = expected * torch.linalg.vector_norm(seen.v, dim=-1, dtype=torch.float32).transpose(1, 2)
        return torch.where(left_out, worth.amax(-1, keepdim=True), worth)
