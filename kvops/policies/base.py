"""The base class of policies, and the inputs that they score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvops import checks
from kvops.cache import PagedKVCache
from kvops.ops.scores import attention_scores
from kvops.policies.recital import Recital, Recited


class Seen(ABC):
    """The input of a policy for one layer: the newest T queries and all S keys of each head.

    A head's keys are in the order of its list; the last T belong to the newest tokens. After an eviction heads may hold
    fewer than S keys. They are padded in front, and ``real`` is False there.

    Attributes:
        q: ``[B, T, Hq, D]``, rotary embedding applied.
        k: ``[B, S, Hkv, D]``, rotary embedding applied, zero where padded.
        v: ``[B, S, Hkv, Dv]``, zero where padded.
        window_left: the number of positions before its own that a query sees, -1 for all.
        layer, num_layers: the index of the layer and the number of layers.
        scale, softcap: as in :func:`kvops.flash_attention`.
        rope: angular frequencies of the rotary embedding, float32 ``[D / 2]`` (dimension i is paired with i + D / 2);
            None if the caller does not know them.
        positions: int ``[B, Hkv, S]``, the original position of each key; -1 where padded.
        end: int ``[B]``, the length of the text, which is the position of the next token.
        earlier: float32 ``[B, Hkv, S]``, the scores so far, 0 for keys that were never scored.
        recited: the attention that a recital paid to each key; None without a recital.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    window_left: int
    layer: int
    num_layers: int
    rope: Tensor | None
    scale: float | None
    softcap: float
    positions: Tensor
    end: Tensor
    earlier: Tensor
    recited: Recited | None

    @property
    def real(self) -> Tensor:
        """bool ``[B, Hkv, S]``, False where the keys are padding."""
        return self.positions >= 0

    @abstractmethod
    def attention(
        self,
        *,
        last: int | None = None,
        reduce: Literal["sum", "sumsq", "max"] = "sum",
        group: Literal["sum", "mean", "max"] = "sum",
    ) -> Tensor:
        """The attention that each key receives from the ``last`` queries (None for all): float32 ``[B, Hkv, S]``.

        It is reduced over the queries by ``reduce`` and over the query heads of a group by ``group``, as in
        :func:`kvops.attention_scores`.
        """

    def alignment(self) -> Tensor:
        """The cosine of each key with the mean direction of its head's keys: float32 ``[B, Hkv, S]``."""
        directions = F.normalize(self.k.float(), dim=-1)
        anchor = F.normalize(directions.mean(1, keepdim=True), dim=-1)
        return (directions * anchor).sum(-1).transpose(1, 2)

    def pool(self, scores: Tensor, width: int, *, last: int, kind: Literal["max", "mean"] = "max") -> Tensor:
        """``scores`` [B, Hkv, S] pooled over ``width`` (odd) neighbours, except for the ``last`` keys.

        The last keys belong to the queries that are observed, which attend to themselves and to each other. Their
        scores are not pooled with those of earlier keys.
        """
        before = max(0, scores.shape[-1] - last)
        pool = F.max_pool1d if kind == "max" else F.avg_pool1d
        if before == 0:
            return scores
        pooled = pool(scores[..., :before], width, stride=1, padding=width // 2)
        return torch.cat((pooled.masked_fill(~self.real[..., :before], 0), scores[..., before:]), dim=-1)


@dataclass(frozen=True)
class Prefill(Seen):
    """The causal attention of one layer over a whole prompt: T = S, without padding. Attributes as in :class:`Seen`.

    ``lse`` is float32 ``[B, Hq, S]``, the natural logarithm of the softmax's denominator.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    window_left: int = -1
    layer: int = 0
    num_layers: int = 1
    rope: Tensor | None = None
    scale: float | None = None
    softcap: float = 0.0
    recited: Recited | None = None

    @property
    def positions(self) -> Tensor:  # type: ignore[override]
        batch, length, heads = self.k.shape[:3]
        return torch.arange(length, device=self.k.device).expand(batch, heads, length)

    @property
    def end(self) -> Tensor:  # type: ignore[override]
        return torch.full(self.k.shape[:1], self.k.shape[1], device=self.k.device)

    @property
    def earlier(self) -> Tensor:  # type: ignore[override]
        batch, length, heads = self.k.shape[:3]
        return torch.zeros(batch, heads, length, dtype=torch.float32, device=self.k.device)

    def attention(
        self,
        *,
        last: int | None = None,
        reduce: Literal["sum", "sumsq", "max"] = "sum",
        group: Literal["sum", "mean", "max"] = "sum",
    ) -> Tensor:
        start = 0 if last is None else max(0, self.q.shape[1] - last)
        return attention_scores(
            self.q,
            self.k,
            self.lse,
            causal=True,
            window_left=self.window_left,
            scale=self.scale,
            softcap=self.softcap,
            query_start=start,
            reduce=reduce,
            group=group,
        )


class Cached(Seen):
    """One layer of a cache, whose heads may have any lengths, and the newest queries.

    Args:
        cache: a cache to which the newest tokens have been appended.
        layer, window_left, rope, scale, softcap: as in :class:`Seen`.
        q: ``[B', T, Hq, D]``, the queries of the newest T tokens of ``rows``.
        rows: a slice of the cache's rows.
        width: S, at least the longest list of these rows in any layer.
        sinks: ``[Hq]``, the sinks of the layer.
        recited: as in :class:`Seen`.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        layer: int,
        q: Tensor,
        *,
        rows: slice,
        width: int,
        window_left: int = -1,
        rope: Tensor | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        recited: Recited | None = None,
    ) -> None:
        self.cache, self.rows, self.q, self.recited = cache, rows, q, recited
        self.layer, self.num_layers, self.window_left, self.rope = layer, cache.num_layers, window_left, rope
        self.scale, self.softcap, self._sinks = scale, softcap, sinks
        self.end = cache.next_positions[rows]
        cache.unshare(rows)  # the scores of other rows must not change
        self._lens = cache.seq_lens[layer, rows, :, None]
        slot = torch.arange(width, device=q.device) - (width - self._lens)
        inside = slot.clamp_min(0)
        blocks = cache.block_tables[layer, rows].gather(-1, inside // cache.block_size)
        self._slots = blocks.long() * cache.block_size + inside % cache.block_size
        self._padded = slot < 0
        self.positions = self._of(cache.positions).masked_fill_(self._padded, -1)
        self.earlier = self._of(cache.scores).masked_fill_(self._padded, 0)

    def _of(self, side: Tensor) -> Tensor:
        """The entries of one of the cache's tensors for each key: a copy ``[B', Hkv, S, ...]``."""
        return side.flatten(0, 1)[self._slots]

    def _vectors(self, side: Tensor, scale: Tensor | None, slot_scale: Tensor | None) -> Tensor:
        """``[B', S, Hkv, D]``, in float32 if the cache is float8 or int8."""
        vectors = self._of(side.view(torch.uint8)).view(side.dtype)  # as bytes: torch cannot index float8
        if side.dtype in checks.QUANTISED_DTYPES:
            vectors = vectors.float() * (1 if scale is None else scale[self.layer, :, None, None])
            if slot_scale is not None:
                vectors *= self._of(slot_scale)[..., None]
        return vectors.masked_fill_(self._padded[..., None], 0).transpose(1, 2)

    @cached_property
    def k(self) -> Tensor:  # type: ignore[override]
        return self._vectors(self.cache.k_cache, self.cache.k_scale, self.cache.k_slot_scale)

    @cached_property
    def v(self) -> Tensor:  # type: ignore[override]
        return self._vectors(self.cache.v_cache, self.cache.v_scale, self.cache.v_slot_scale)

    def attention(
        self,
        *,
        last: int | None = None,
        reduce: Literal["sum", "sumsq", "max"] = "sum",
        group: Literal["sum", "mean", "max"] = "sum",
    ) -> Tensor:
        if (reduce == "max") != (group == "max"):
            raise ValueError(
                f"group: over a cache expected 'max' with reduce='max' and 'sum' or 'mean' with the others, "
                f"got {group!r} with {reduce!r}"
            )
        # The scores of the decoding kernel, from 0 on. They stay in the cache until judge() writes the policy's scores.
        q = self.q if last is None else self.q[:, -last:]
        self.cache.attend(
            self.layer,
            q,
            rows=self.rows,
            window_left=self.window_left,
            scale=self.scale,
            softcap=self.softcap,
            sinks=self._sinks,
            accumulate=reduce,
            decay=0.0,
        )
        received = self._of(self.cache.scores).masked_fill_(self._padded, 0)
        if self.window_left >= 0:  # keys that no query sees keep their score
            first = self.end - q.shape[1] - self.window_left
            received.masked_fill_(self.positions < first[:, None, None], 0)
        return received / (q.shape[2] // self.cache.num_kv_heads) if group == "mean" else received

    def judge(self, policy: Policy) -> None:
        """Score the keys with ``policy`` and write the scores into the cache."""
        scores = policy.checked_score(self)
        width = scores.shape[-1]
        place = torch.arange(width, device=scores.device) + (width - self._lens)
        self.cache.set_scores(self.layer, scores.gather(-1, place.clamp_max(width - 1)), rows=self.rows)


@dataclass(frozen=True)
class Policy(ABC):
    """Scores how important each cached key is to its head. Keys with higher scores survive.

    Attributes:
        scope: which heads compete for the budget. ``"sequence"``: the heads of all layers (KV-Compress). ``"layer"``:
            the heads of a layer, with a fixed share for each layer (AdaKV). ``"head"``: none; the heads of a layer keep
            the same number of blocks.
        floor: what every head keeps in any case, as a share of its part under an equal division of the budget.
        accumulate: how decoding adds to the scores of the slots that it attends to ("sum", "sumsq" or "max" of the
            attention probability over the queries). None: it does not; before an eviction during decoding the policy
            scores all keys again with the last ``recall`` queries.
    """

    scope: Literal["head", "layer", "sequence"] = "sequence"
    floor: float = 0.0
    accumulate: ClassVar[Literal["sum", "sumsq", "max"] | None] = "sum"

    def __post_init__(self) -> None:
        checks.expect_choice("scope", self.scope, ("head", "layer", "sequence"))
        checks.expect_between("floor", self.floor, 0, 1)
        checks.expect_int(
            "observe", getattr(self, "observe", 1), 1
        )  # most policies have a window; a slice from -0 would be the whole

    @property
    def recall(self) -> int:
        """How many of the last queries ``score`` reads, while decoding and after a recital. The default is 1."""
        return 1

    @property
    def recital(self) -> Recital | None:
        """How a prompt is recited before ``score`` runs with ``seen.recited``; None if the policy needs no recital."""
        return None

    @abstractmethod
    def score(self, seen: Seen) -> Tensor:
        """The scores of one layer's keys, float32 ``[B, Hkv, S]``. Entries where ``seen`` is padded are ignored."""

    def checked_score(self, seen: Seen) -> Tensor:
        """The result of ``score``, checked. Raises ValueError or TypeError for a wrong shape or dtype."""
        scores, name = self.score(seen), f"{type(self).__name__}.score"
        checks.expect_tensor(name, scores)
        checks.expect_shape(name, scores, "[B, Hkv, S]", *seen.positions.shape)
        return scores

    def layer_weights(self, num_layers: int) -> list[float] | None:
        """How the layers share the budget: a weight for each layer, with mean 1. None: as ``scope`` says."""
        return None


def share_out(total: int, weights: Sequence[float], *, least: int, most: int) -> list[int]:
    """Divide ``total`` into whole parts in proportion to ``weights``, each from ``least`` to ``most``.

    What a part cannot take goes to the others, and the first parts get the remainder. The sum is ``total`` if the
    bounds allow it. Raises ValueError for a weight that is not above 0.
    """
    if not 0 < min(weights) <= max(weights) < float("inf"):
        raise ValueError(f"weights: expected finite numbers above 0, got {list(weights)}")
    low, high = 0.0, (total + 1) / min(weights)
    for _ in range(64):  # bisect for the largest scale whose parts do not exceed the total
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
