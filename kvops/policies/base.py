"""What every policy has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvops.ops.scores import attention_scores


@dataclass(frozen=True)
class Prefill:
    """The causal attention of one layer over a prompt: what a policy has to judge the keys by.

    Attributes:
        q: ``[B, S, Hq, D]``, rotary embedding applied; token i stands at position i.
        k: ``[B, S, Hkv, D]``, rotary embedding applied.
        v: ``[B, S, Hkv, Dv]``.
        lse: float32 ``[B, Hq, S]``, natural logarithm of the softmax's denominators.
        window_left: how many positions before its own a query sees, -1 for all.
        layer, num_layers: which layer of how many.
        rope: angular frequencies of the rotary embedding, float32 ``[D / 2]`` (dimension i is paired with i + D / 2);
            None where the caller does not know them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    window_left: int = -1
    layer: int = 0
    num_layers: int = 1
    rope: Tensor | None = None

    def attention(
        self,
        *,
        last: int | None = None,
        reduce: Literal["sum", "sumsq", "max"] = "sum",
        group: Literal["sum", "mean", "max"] = "sum",
    ) -> Tensor:
        """How much attention each key receives from the ``last`` queries (None: all): float32 ``[B, Hkv, S]``.

        ``reduce`` over the queries and ``group`` over a group's query heads, as in :func:`kvops.attention_scores`.
        """
        start = 0 if last is None else max(0, self.q.shape[1] - last)
        return attention_scores(
            self.q,
            self.k,
            self.lse,
            causal=True,
            window_left=self.window_left,
            query_start=start,
            reduce=reduce,
            group=group,
        )

    def pool(self, scores: Tensor, width: int, *, last: int, kind: Literal["max", "mean"] = "max") -> Tensor:
        """``scores`` [B, Hkv, S] pooled over ``width`` (odd) neighbours, apart from the ``last`` keys.

        The last keys received the observing queries' attention to themselves and to each other: they neither share it
        with the keys before them nor need a neighbour's.
        """
        before = max(0, scores.shape[-1] - last)
        pool = F.max_pool1d if kind == "max" else F.avg_pool1d
        if before == 0:
            return scores
        return torch.cat(
            (pool(scores[..., :before], width, stride=1, padding=width // 2), scores[..., before:]), dim=-1
        )


@dataclass(frozen=True)
class Policy(ABC):
    """What a cached key is worth to its head. Higher scores survive.

    Attributes:
        scope: who competes for the budget. ``"sequence"``: the heads of all layers (KV-Compress); ``"layer"``: the
            heads of a layer, every layer having its share (AdaKV); ``"head"``: nobody, the heads of a layer keep the
            same number of blocks.
        floor: what every head keeps in any case, as a share of an equal part of the budget.
        accumulate: how decoding adds to the scores of the slots it attends to ("sum", "sumsq" or "max" of the
            attention probability over the queries), or None when it does not.
    """

    scope: Literal["head", "layer", "sequence"] = "sequence"
    floor: float = 0.0
    accumulate: ClassVar[Literal["sum", "sumsq", "max"] | None] = "sum"

    @abstractmethod
    def score(self, seen: Prefill) -> Tensor:
        """The worth of every key of one layer after the prefill of a prompt: float32 ``[B, Hkv, S]``."""

    def layer_weights(self, num_layers: int) -> list[float] | None:
        """How the layers share the budget: a weight for each, of mean 1. None: all alike, or as ``scope`` says."""
        return None


def share_out(total: int, weights: Sequence[float], *, least: int, most: int) -> list[int]:
    """``total`` cut into whole parts in proportion to ``weights``, each from ``least`` to ``most``.

    What a part cannot take goes to the others; the first parts get what does not divide. The sum is ``total`` wherever
    the bounds allow it.
    """
    low, high = 0.0, (total + 1) / min(weights)
    for _ in range(64):  # halve until the scale is the largest whose parts do not exceed the total
        middle = (low + high) / 2
        if sum(min(most, max(least, int(weight * middle))) for weight in weights) <= total:
            low = middle
        else:
            high = middle
    parts = [min(most, max(least, int(weight * low))) for weight in weights]
    for place in range(len(parts)):
        if sum(parts) < total and parts[place] < most:
            parts[place] += 1
    return parts
