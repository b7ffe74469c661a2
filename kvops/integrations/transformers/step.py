"""One pass of a transformers model over a :class:`KVOpsCache`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvops.cache import PagedKVCache
from kvops.integrations.transformers.columns import take_columns, tokens_in_order
from kvops.integrations.transformers.masks import Mask
from kvops.integrations.transformers.placeholders import Deferred
from kvops.ops.attention import flash_attention
from kvops.policies import Compression, Prefill

if TYPE_CHECKING:
    from kvops.integrations.transformers.cache import KVOpsCache


class NewTokens(Deferred):
    """What :meth:`KVOpsCache.update` returns in place of keys: the new keys and values and the layer they belong to.

    Attention hands it back to the cache, which stores the tokens and attends in place. For a model that computes with
    it, it becomes a tensor: the keys of all tokens, copied out of the cache.

    Attributes:
        layer: of the model.
        k, v: ``[B, T, Hkv, ·]``.
        values: what :meth:`KVOpsCache.update` returns in place of values.
        kv_length: the number of keys in the mask of this pass, including padding.
        step: the pass that stored them; None until then.
    """

    def __init__(self, cache: KVOpsCache, layer: int, keys: Tensor, values: Tensor, kv_length: int) -> None:
        self._cache = cache
        self.layer, self.kv_length = layer, kv_length
        self.k, self.v = keys.transpose(1, 2), values.transpose(1, 2)
        self.values = _NewValues(self)
        self.step: Step | None = None
        self._copies: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the tensor that it stands for: T5 counts keys by it."""
        batch, _, heads, width = self.k.shape
        return torch.Size((batch, heads, self.kv_length, width))

    @property
    def device(self) -> torch.device:
        return self.k.device

    def attend(self, q: Tensor, mask: Mask, options: dict[str, Any]) -> Tensor:
        """q ``[B, T, Hq, D]`` -> ``[B, T, Hq, Dv]``; the keys and values are in the cache afterwards."""
        return self._cache.attend(self, q, mask, options)

    def attends_with(self, values: Any) -> bool:
        return values is self.values and self._copies is None

    def copies(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, ``[B, Hkv, S, ·]``, with zeros for padding."""
        if self._copies is None:
            self._copies = self._cache.copies(self)
        return self._copies

    def tensor(self) -> Tensor:
        return self.copies()[0]


class _NewValues(Deferred):
    def __init__(self, new: NewTokens) -> None:
        self._new = new

    @property
    def device(self) -> torch.device:
        return self._new.device

    def tensor(self) -> Tensor:
        return self._new.copies()[1]


class Step:
    """One pass of the model: the positions of its tokens and where its padding is.

    Attributes:
        num_tokens: T, including padding.
        real: bool ``[B, T]``, False for padding; None without padding.
        empty: whether the cache was empty before: these tokens are the prompt.
        layers: the indices of layers that have stored their keys.
    """

    def __init__(self, num_tokens: int, real: Tensor | None, rope: Tensor | None, empty: bool) -> None:
        self._rope, self.empty, self.num_tokens = rope, empty, num_tokens
        self.real = real
        self._rows = _RealTokens(real)
        self._extended: dict[int, tuple[PagedKVCache, Tensor]] = {}  # the pools that have room, and the positions
        self.layers: set[int] = set()

    def _positions(self, paged: PagedKVCache) -> Tensor:
        """int32 ``[B, T]``, with room for the tokens in ``paged``."""
        if id(paged) not in self._extended:
            self._extended[id(paged)] = paged, paged.extend(self.num_tokens, q_lens=self._rows.counts)
        return self._extended[id(paged)][1]

    def undo(self) -> None:
        for paged, _ in self._extended.values():
            paged.rollback(self.num_tokens if self._rows.counts is None else self._rows.counts)

    def store(self, paged: PagedKVCache, place: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v ``[B, T, Hkv, ·]`` in layer ``place``; returns them with the real tokens of each row first."""
        k, v = self._rows.gather(k), self._rows.gather(v)
        paged.append(place, k, v, self._positions(paged), q_lens=self._rows.counts)
        return k, v

    def store_by_column(self, paged: PagedKVCache, place: int, k: Tensor, v: Tensor, first: int) -> None:
        """Store k and v with the columns of the batch, from ``first`` on, as their positions."""
        columns = torch.arange(first, first + self.num_tokens, dtype=torch.int32, device=k.device)
        columns = self._rows.gather(columns.repeat(len(k), 1))
        self._positions(paged)
        paged.append(place, self._rows.gather(k), self._rows.gather(v), columns, q_lens=self._rows.counts)

    def store_and_attend(
        self,
        paged: PagedKVCache,
        place: int,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Mask,
        options: dict[str, Any],
        compression: Compression | None,
    ) -> Tensor:
        """q ``[B, T, Hq, D]`` -> ``[B, T, Hq, Dv]``, with k and v ``[B, T, Hkv, ·]`` stored in layer ``place``."""
        q = self._rows.gather(qkv[0])
        k, v = self.store(paged, place, *qkv[1:])
        if self.empty and compression:
            out = self._read_prompt(paged, place, (q, k, v), mask.window_left, options, compression)
        else:
            out = paged.attend(
                place,
                q,
                q_lens=self._rows.counts,
                query_positions=self._positions(paged),
                window_left=mask.window_left,
                chunk=mask.chunk or 0,
                accumulate=compression.policy.accumulate if compression and compression.every else None,
                **options,
            )
        return self._rows.scatter(out)

    def attend_again(self, paged: PagedKVCache, place: int, q: Tensor, mask: Mask, options: dict[str, Any]) -> Tensor:
        """Queries ``[B, T', Hq, D]`` of another layer over keys that are stored: all of the pass' tokens or the last
        ones. They do not count in the scores of a compression."""
        rows = _RealTokens(mask.real_queries())
        window, chunk = mask.window_left, mask.chunk or 0
        out = paged.attend(place, rows.gather(q), q_lens=rows.counts, window_left=window, chunk=chunk, **options)
        return rows.scatter(out)

    def attend_with_bias(
        self,
        paged: PagedKVCache,
        place: int,
        q: Tensor,
        mask: Mask,
        bias: Tensor,
        columns: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Queries ``[B, T', Hq, D]``, of all of the pass' tokens or the last ones, over keys that are stored.

        Args:
            bias: ``[B or 1, Hq or 1, T', S]``, as in :func:`kvops.paged_attention`, but of the columns of the batch.
            columns: int64 ``[B, S]``, the column of each slot; None where slot j is column j.
        """
        rows = _RealTokens(None if self.real is None else self.real[:, -q.shape[1] :])
        bias = rows.gather_bias(bias)
        if columns is not None:
            bias = take_columns(bias, columns, 3)
        out = paged.attend(
            place,
            rows.gather(q),
            q_lens=rows.counts,
            causal=mask.bias is None,
            bias=bias,
            window_left=mask.window_left,
            chunk=mask.chunk or 0,
            **options,
        )
        return rows.scatter(out)

    def _read_prompt(
        self,
        paged: PagedKVCache,
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
            layers = place, paged.num_layers
            seen = Prefill(*own, lse, window_left, *layers, rope, options["scale"], options["softcap"])
            paged.set_scores(place, compression.policy.checked_score(seen), rows=rows)
        return out


class _RealTokens:
    """The places of real tokens in padded rows. The cache needs them first in each row.

    Args:
        real: bool ``[B, T]``, False for padding, which may be anywhere in a row; None without padding.

    Attributes:
        counts: int32 ``[B]``; None if all tokens are real.
    """

    def __init__(self, real: Tensor | None) -> None:
        self.counts = None if real is None else real.sum(1, dtype=torch.int32)
        # [B, T]: the real tokens of each row in order, then its padding. A single token is first, real or not.
        self._order = None if real is None or real.shape[1] == 1 else tokens_in_order(real)

    def gather(self, x: Tensor) -> Tensor:
        """``[B, T, ...]`` -> the same with the real tokens of each row first."""
        return x if self._order is None else _take(x, self._order)

    def gather_bias(self, bias: Tensor) -> Tensor:
        """``[B or 1, H or 1, T or 1, S]`` -> the same with the real tokens of each row first."""
        return bias if self._order is None else take_columns(bias, self._order, 2)

    def scatter(self, x: Tensor) -> Tensor:
        """Undo :meth:`gather`."""
        return x if self._order is None else _take(x, self._order.argsort(dim=1))


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Row b of the result is ``x[b, order[b]]``."""
    return x[torch.arange(len(x), device=x.device)[:, None], order]
