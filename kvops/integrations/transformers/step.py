"""One pass of a transformers model over a :class:`KVOpsCache`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from kvops.cache import PagedKVCache
from kvops.integrations.transformers.masks import Mask
from kvops.integrations.transformers.placeholders import NotATensorError, Placeholder
from kvops.ops.attention import flash_attention
from kvops.policies import Compression, Prefill

if TYPE_CHECKING:
    from kvops.integrations.transformers.cache import KVOpsCache


class NewTokens(Placeholder):
    """What :meth:`KVOpsCache.update` returns in place of keys and values: the new ones and the layer they belong to.

    Attributes:
        layer: of the model.
        k, v: ``[B, T, Hkv, ·]``.
        kv_length: the number of keys in the mask of this pass, including padding.
        step: the pass that stored them; None until then.
    """

    def __init__(self, cache: KVOpsCache, layer: int, keys: Tensor, values: Tensor, kv_length: int) -> None:
        self._cache = cache
        self.layer, self.kv_length = layer, kv_length
        self.k, self.v = keys.transpose(1, 2), values.transpose(1, 2)
        self.step: Step | None = None

    def attend(self, q: Tensor, mask: Mask, options: dict[str, Any]) -> Tensor:
        """q ``[B, T, Hq, D]`` -> ``[B, T, Hq, Dv]``; the keys and values are in the cache afterwards."""
        return self._cache.attend(self, q, mask, options)

    def refuse(self, use: str) -> NoReturn:
        raise NotATensorError(self._cache.explain_use(use))


class Step:
    """One pass of the model: the positions of its tokens and where its padding is.

    Attributes:
        num_tokens: T, including padding.
        empty: whether the cache was empty before: these tokens are the prompt.
        layers: the indices of layers that have stored their keys.
    """

    def __init__(self, paged: PagedKVCache, mask: Mask, rope: Tensor | None, empty: bool) -> None:
        self._paged, self._rope, self.empty = paged, rope, empty
        self.num_tokens = mask.q_length
        self._rows = _RealTokens(mask, paged.device)
        self._positions = paged.extend(self.num_tokens, q_lens=self._rows.counts)
        self.layers: set[int] = set()

    def undo(self) -> None:
        self._paged.rollback(self.num_tokens if self._rows.counts is None else self._rows.counts)

    def store_and_attend(
        self,
        place: int,
        qkv: tuple[Tensor, Tensor, Tensor],
        window_left: int,
        options: dict[str, Any],
        compression: Compression | None,
    ) -> Tensor:
        """q ``[B, T, Hq, D]`` -> ``[B, T, Hq, Dv]``, with k and v ``[B, T, Hkv, ·]`` stored in layer ``place``."""
        q, k, v = map(self._rows.gather, qkv)
        self._paged.append(place, k, v, self._positions, q_lens=self._rows.counts)
        if self.empty and compression:
            out = self._read_prompt(place, (q, k, v), window_left, options, compression)
        else:
            out = self._paged.attend(
                place,
                q,
                q_lens=self._rows.counts,
                query_positions=self._positions,
                window_left=window_left,
                accumulate=compression.policy.accumulate if compression and compression.every else None,
                **options,
            )
        return self._rows.scatter(out)

    def attend_again(self, place: int, q: Tensor, mask: Mask, options: dict[str, Any]) -> Tensor:
        """Queries ``[B, T', Hq, D]`` of another layer over keys that are stored: all of the pass' tokens or the last
        ones. They do not count in the scores of a compression."""
        rows = _RealTokens(mask, self._paged.device)
        out = self._paged.attend(place, rows.gather(q), q_lens=rows.counts, window_left=mask.window_left, **options)
        return rows.scatter(out)

    def _read_prompt(
        self,
        place: int,
        qkv: tuple[Tensor, Tensor, Tensor],
        window_left: int,
        options: dict[str, Any],
        compression: Compression,
    ) -> Tensor:
        """Attend to the prompt and score its keys, row by row where lengths differ."""
        q, k, v = qkv
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
        counts = self._rows.counts
        parts = [(slice(None), q.shape[1])]
        if counts is not None:
            parts = [(slice(row, row + 1), count) for row, count in enumerate(counts.tolist()) if count]
        rope = None if self._rope is None else self._rope.to(q.device)
        for rows, length in parts:
            own = q[rows, :length], k[rows, :length], v[rows, :length]
            out[rows, :length], lse = flash_attention(*own, causal=True, window_left=window_left, **options)
            layers = place, self._paged.num_layers
            seen = Prefill(*own, lse, window_left, *layers, rope, options["scale"], options["softcap"])
            self._paged.set_scores(place, compression.policy.checked_score(seen), rows=rows)
        return out


class _RealTokens:
    """The places of real tokens in padded rows. The cache needs them first in each row.

    Attributes:
        counts: int32 ``[B]``; None if all tokens are real.
    """

    def __init__(self, mask: Mask, device: torch.device) -> None:
        packing, tokens = mask.packing, mask.q_length
        self.counts: Tensor | None = None
        self._order: Tensor | None = None  # [B, T], the place of the t-th real token of each row
        if packing is None or packing.num_queries is None or packing.first_query is None:
            return
        self.counts = packing.num_queries
        if tokens > 1:  # a single token is first, real or not
            self._order = (packing.first_query[:, None] + torch.arange(tokens, device=device)).clamp(max=tokens - 1)

    def gather(self, x: Tensor) -> Tensor:
        """``[B, T, ...]`` -> the same with the real tokens of each row first."""
        if self._order is None:
            return x
        rows = torch.arange(len(x), device=x.device)[:, None].expand_as(self._order)
        return x[rows, self._order]

    def scatter(self, x: Tensor) -> Tensor:
        """Undo :meth:`gather`; padding becomes 0."""
        if self._order is None or self.counts is None:
            return x
        rows = torch.arange(len(x), device=x.device)[:, None].expand_as(self._order)
        real = torch.arange(x.shape[1], device=x.device) < self.counts[:, None]
        back = torch.zeros_like(x)
        back[rows[real], self._order[real]] = x[real]
        return back
