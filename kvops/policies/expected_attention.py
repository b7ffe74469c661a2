"""Expected attention: what queries yet to come will look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvops.policies.base import Policy, Prefill
from kvops.rotary import rotate


@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """The attention that future queries are expected to pay, times the value's norm (Devoto et al. 2025,
    arXiv 2510.00636).

    Queries before rotary embedding are taken to be normal with the mean m and covariance C of the prompt's own. Rotated
    by the mean R of the rotations of the next ``horizon`` positions, a query's exponentiated score against key k is
    expected to be ``exp(k.Rm / sqrt(D) + k.RCR'.k / 2D)``; its softmax over the keys is averaged over the group.

    Attributes:
        horizon: how many positions ahead are averaged over.
        sinks: so many first tokens, whose queries are outliers, are left out of it all and always worth most.
    """

    horizon: int = 512
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise ValueError(f"horizon: expected at least 1, got {self.horizon}")
        if self.sinks < 0:
            raise ValueError(f"sinks: expected at least 0, got {self.sinks}")

    def score(self, seen: Prefill) -> Tensor:
        if seen.rope is None:
            raise ValueError("rope: expected the rotary frequencies of the model [D / 2], got None")
        batch, length, heads, width = seen.q.shape
        if length <= self.sinks:
            return torch.ones(batch, seen.k.shape[2], length, device=seen.k.device)
        q = seen.q[:, self.sinks :].float()
        k = seen.k[:, self.sinks :].float()
        groups = heads // k.shape[2]
        angles = torch.outer(torch.arange(self.sinks, length + self.horizon, device=q.device).float(), seen.rope)
        past, future = angles[: length - self.sinks, None], angles[length - self.sinks :]
        q = rotate(q, past.cos(), -past.sin())  # before rotary embedding
        mean = q.mean(1)  # [B, Hq, D]
        centred = q - mean[:, None]
        covariance = torch.einsum("bshi,bshj->bhij", centred, centred) / q.shape[1]
        cos, sin = future.cos().mean(0), future.sin().mean(0)
        mean = rotate(mean, cos, sin)
        covariance = rotate(rotate(covariance, cos, sin).mT, cos, sin)
        mean, covariance = mean.unflatten(1, (-1, groups)), covariance.unflatten(1, (-1, groups))
        logits = torch.einsum("bshd,bhgd->bhgs", k, mean)
        spread = torch.einsum("bshi,bhgij,bshj->bhgs", k, covariance, k)
        expected = (logits / width**0.5 + spread / (2 * width)).softmax(-1).mean(2)
        weight = torch.linalg.vector_norm(seen.v[:, self.sinks :], dim=-1, dtype=torch.float32).transpose(1, 2)
        worth = expected * weight
        return torch.cat((worth.amax(-1, keepdim=True).expand(-1, -1, self.sinks), worth), dim=-1)
