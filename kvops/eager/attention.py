"""Attention on the CPU, memory linear in the lengths.

Queries and keys are cut into tiles. torch's own CPU flash attention computes a tile wherever it can; softcaps, dropout
and gradients through lse, which it has no notion of, take smaller tiles in plain PyTorch. float16 and bfloat16 are
computed in float32: without matrix units a CPU is slower in half precision, and less accurate. float64 is computed in
float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvops.eager.bias import bias_tile, four_dims
from kvops.eager.dropout import Dropout
from kvops.eager.softmax import beside_sinks, merge, sink_probability, softmax
from kvops.eager.window import Tile, Window
from kvops.prepared import prepared
from kvops.private_torch import flash_attention as _forward
from kvops.private_torch import flash_attention_backward as _backward

# Queries to a call of torch's kernel under a window, and the largest mask (in elements) that is built for one.
_WINDOW_ROWS = 256
_MASK_ELEMENTS = 1 << 22
_LANES = 16  # numbers in the longest vector of torch's kernel


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``: itself, or a contiguous copy.

    torch's CPU kernel reads rows of consecutive numbers. Operations that keep a memory format (``to``, ``mul``,
    ``pad``) may return rows that are not: of overlapping views, of channels-last tensors.
    """
    return x if x.dtype == dtype else x.to(dtype, memory_format=torch.contiguous_format)


def widen(x: Tensor, width: int) -> Tensor:
    """``x``, or a contiguous copy with zeros behind the last dimension, up to ``width``."""
    if x.shape[-1] == width:
        return x
    wide = x.new_zeros(*x.shape[:-1], width)
    wide[..., : x.shape[-1]] = x
    return wide


def default_scale(scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if scale is None else scale


def grouped(x: Tensor, kv_heads: int) -> Tensor:
    """A view [B, Hkv, G, ...] of [B, Hq, ...]."""
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads))


def group_slopes(alibi_slopes: Tensor | None, kv_heads: int, dtype: torch.dtype) -> Tensor | None:
    """[1 or B, Hkv, G, 1, 1] of [Hq] or [B, Hq]."""
    if alibi_slopes is None:
        return None
    heads = alibi_slopes.shape[-1]
    return alibi_slopes.to(dtype).reshape(-1, kv_heads, heads // kv_heads, 1, 1)


def score_tile(
    q: Tensor,
    k: Tensor,
    window: Window,
    tile: Tile,
    scale: float,
    softcap: float,
    slopes: Tensor | None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scores [B, Hkv, G, rows, keys] of a tile of q [B, Hq, Sq, D] and k [B, Hkv, Sk, D], -inf where unseen. Also the
    tanh of the softcap, for its derivative."""
    q, k = grouped(q[:, :, tile.rows], k.shape[1]), k[:, :, tile.keys]
    B, Hkv, G, T, D = q.shape
    K = k.shape[2]
    # The factor is applied to the finished dot products: scaling q first would round it once more.
    factor = scale / softcap if softcap > 0 else scale
    rows, keys = q.reshape(B * Hkv, G * T, D), k.reshape(B * Hkv, K, D)
    scores = torch.baddbmm(q.new_empty(()), rows, keys.mT, beta=0, alpha=factor).view(B, Hkv, G, T, K)
    capped = None
    if softcap > 0:
        capped = scores.tanh_()
        scores = capped * softcap
    if slopes is not None or not window.sees_all(tile):
        distance = window.distance(tile)
        if slopes is not None:
            scores -= slopes * distance.abs()
        scores.masked_fill_(window.hidden(distance), -torch.inf)
    if bias is not None:
        added, hides = bias_tile(bias, tile.rows, tile.keys, scores.dtype)
        added = added.expand(-1, Hkv * G, -1, -1).unflatten(1, (Hkv, G))
        scores += added
        if hides:
            scores.masked_fill_(added == -torch.inf, -torch.inf)  # also where the score is NaN
    return scores, capped


@lru_cache(maxsize=256)
def _fused_tiles(window: Window, planes: int) -> tuple[Tile, ...]:
    """How torch's kernel covers the rows that see a key, with so many different matrices of ALiBi or bias."""
    first, Sq, Sk = window.first_row, window.num_queries, window.num_keys
    if first == Sq:
        return ()
    whole, square = Tile(first, Sq, 0, Sk), max(0, window.offset)
    if not planes and window.sees_all(whole):
        return (whole,)
    if not planes and window.left is None and window.right == 0:
        before = (Tile(first, Sq, 0, square),) if square else ()
        return (*before, Tile(first, Sq, square, Sk, causal=True))
    reach = Sk if window.left is None or window.right is None else min(Sk, window.left + window.right + 1)
    rows = max(16, _MASK_ELEMENTS // ((reach + _WINDOW_ROWS) * max(1, planes)))
    if window.left is not None or window.right is not None:
        rows = min(rows, _WINDOW_ROWS)
    spans = ((start, min(Sq, start + rows)) for start in range(first, Sq, rows))
    return tuple(Tile(*span, *window.keys(*span)) for span in spans)


def _planes(alibi_slopes: Tensor | None, bias: Tensor | None) -> int:
    """How many different matrices are added to the scores; 0 for none."""
    slopes = 0 if alibi_slopes is None else alibi_slopes.numel()
    return max(slopes, 0 if bias is None else four_dims(bias).shape[:2].numel())


def _mask(
    window: Window, tile: Tile, slopes: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, bool]:
    """What is added to the scores: [rows, keys], or [1 or B, 1 or Hq, rows, keys] with ALiBi or a bias; None for
    nothing. Also whether a bias may hide all keys from a row."""
    if tile.causal or (slopes is None and bias is None and window.sees_all(tile)):
        return None, False
    mask, hides = (None, False) if bias is None else bias_tile(bias, tile.rows, tile.keys, dtype)
    if slopes is None and mask is not None and window.sees_all(tile):
        return mask, hides
    distance = window.distance(tile)
    added = torch.zeros(distance.shape, dtype=dtype) if slopes is None else -slopes.flatten(1, 2) * distance.abs()
    added.masked_fill_(window.hidden(distance), -torch.inf)
    return added if mask is None else added + mask, hides


def _may_hide_nan(lse: Tensor, keys: int) -> bool:
    """Whether a row may look empty to torch's kernel, which calls its lse 0, because its scores are NaN: that happens
    where the keys do not fill a vector."""
    return keys < _LANES and bool((lse == 0).any())


class _Attention:
    """One call, tile by tile: q, k and v [B, H, S, D] in the dtype that is computed in."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: Window,
        scale: float,
        softcap: float,
        alibi_slopes: Tensor | None,
        bias: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> None:
        self.dtype = compute_dtype(q.dtype)
        self.q, self.k, self.v = (cast(x, self.dtype).transpose(1, 2) for x in (q, k, v))
        self.window, self.scale, self.softcap = window, scale, softcap
        self.slopes = group_slopes(alibi_slopes, v.shape[2], self.dtype)
        self.dropout = dropout
        self.bias = None
        if bias is not None:
            bias = four_dims(bias)
            self.bias = bias.expand(*bias.shape[:2], q.shape[1], k.shape[1])

    def small_tiles(self) -> Iterator[Tile]:
        return self.window.tiles(self.window.first_row, self.q.shape[0] * self.q.shape[1])

    def run(self, attend: Callable[[Tile], tuple[Tensor, Tensor]], tiles: Iterable[Tile]) -> tuple[Tensor, Tensor]:
        """out [B, Sq, Hq, Dv] and lse [B, Hq, Sq] of what ``attend`` gives for each of the tiles."""
        B, Hq, Sq, _ = self.q.shape
        out = torch.zeros(B, Sq, Hq, self.v.shape[3], dtype=self.dtype).transpose(1, 2)
        lse = torch.full((B, Hq, Sq), -torch.inf, dtype=self.dtype)
        done = 0
        for tile in tiles:
            part = attend(tile)
            if tile.start < done:
                part = merge(out[:, :, tile.rows], lse[:, :, tile.rows], *part)
            out[:, :, tile.rows], lse[:, :, tile.rows] = part
            done = tile.end
        return out.transpose(1, 2), lse

    def fused(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """out [B, Hq, rows, Dv] and lse [B, Hq, rows] of torch's kernel."""
        inputs, options, hides = self._for_torch(tile)
        out, lse = _forward(*inputs, 0.0, tile.causal, **options)
        if hides:  # torch's lse of rows that its mask hides from all keys is 0, or NaN beside a key of NaN
            mask = options["attn_mask"]
            hidden = mask.amax(-1) == -torch.inf if mask.shape[-1] else mask.new_ones(mask.shape[:-1]).bool()
            lse = lse.masked_fill(hidden & ~lse.isnan(), -torch.inf)
        if _may_hide_nan(lse, inputs[1].shape[2]):
            return self.plain(tile)
        return out[..., : self.v.shape[3]], lse

    def plain(self, tile: Tile) -> tuple[Tensor, Tensor]:
        p, lse = softmax(self.scores(tile)[0])
        if self.dropout is not None:
            p *= self.dropped(tile)
        out = torch.matmul(p.flatten(2, 3), self.v[:, :, tile.keys])
        return out.view(*self.q.shape[:2], -1, out.shape[-1]), lse.flatten(1, 2)

    def fused_backward(self, tile: Tile, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv of the tile; dout, out [B, Hq, rows, Dv] and lse [B, Hq, rows] of all its rows."""
        inputs, options, _ = self._for_torch(tile)
        dout, out = (widen(x, inputs[0].shape[3]) for x in (dout, out))
        dq, dk, dv = _backward(dout, *inputs, out, lse, 0.0, tile.causal, **options)
        if self.scale <= 0:
            dq = dq * self.scale
        D, Dv = self.q.shape[3], self.v.shape[3]
        return dq[..., :D], dk[..., :D], dv[..., :Dv]

    def plain_backward(self, tile: Tile, dout: Tensor, delta: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same of delta [B, Hq, rows], what every dP of a row is measured from."""
        heads = self.k.shape[1]
        q = grouped(self.q[:, :, tile.rows], heads).flatten(2, 3)  # [B, Hkv, G * rows, D]
        ds, p, capped = self.score_gradient(tile, dout, delta, lse)
        dv = torch.matmul(p.flatten(2, 3).mT, grouped(dout, heads).flatten(2, 3))
        if capped is not None:
            ds.mul_(1 - capped * capped)
        ds = ds.flatten(2, 3)
        dq = torch.matmul(ds, self.k[:, :, tile.keys]).mul_(self.scale)
        return dq.view(*self.q.shape[:2], -1, dq.shape[-1]), torch.matmul(ds.mT, q).mul_(self.scale), dv

    def score_gradient(
        self, tile: Tile, dout: Tensor, delta: Tensor, lse: Tensor, into: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """[B, Hkv, G, rows, keys]: the gradient of the scores behind the softcap (written to ``into``, if given), P
        after dropout, and the tanh of the softcap."""
        heads = self.k.shape[1]
        delta, lse = (grouped(x, heads)[..., None] for x in (delta, lse))
        scores, capped = self.scores(tile)
        p = scores.sub_(lse.masked_fill(lse == -torch.inf, torch.inf)).exp_()  # 0 in an empty row, whatever its scores
        ds = torch.matmul(grouped(dout, heads).flatten(2, 3), self.v[:, :, tile.keys].mT).view_as(p)
        dropped = None if self.dropout is None else self.dropped(tile)
        if dropped is not None:
            ds *= dropped
        ds = torch.mul(ds.sub_(delta), p, out=ds if into is None else into)
        return ds, p if dropped is None else p.mul_(dropped), capped

    def dropped(self, tile: Tile) -> Tensor:
        """[B, Hkv, G, rows, keys]: what dropout multiplies probabilities by."""
        assert self.dropout is not None
        B, Hq = self.q.shape[:2]
        return grouped(self.dropout.weights(tile, B, Hq, self.dtype), self.k.shape[1])

    def scores(self, tile: Tile) -> tuple[Tensor, Tensor | None]:
        return score_tile(self.q, self.k, self.window, tile, self.scale, self.softcap, self.slopes, self.bias)

    def _for_torch(self, tile: Tile) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any], bool]:
        """q, k, v, options, and whether a bias may hide all keys from a row.

        torch's kernel wants one head size: zeros change neither the scores nor the wanted columns. It masks before it
        scales: with a scale that is not positive, -inf would become NaN or +inf.
        """
        q, k, v = self.q[:, :, tile.rows], self.k[:, :, tile.keys], self.v[:, :, tile.keys]
        scale = self.scale
        if scale <= 0:
            q, scale = torch.mul(q, scale, out=q.new_empty(q.shape)), 1.0
        width = max(q.shape[3], v.shape[3])
        mask, hides = _mask(self.window, tile, self.slopes, self.bias, self.dtype)
        return (widen(q, width), widen(k, width), widen(v, width)), {"attn_mask": mask, "scale": scale}, hides


class _Kind:
    """What calls alike have in common: see :func:`kvops.prepared.prepared`."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        bias: Tensor | None = None,
        dropout_p: float = 0.0,
        dropout_seed: Tensor | None = None,
        first_entry: int = 0,
        **window: Any,
    ) -> None:
        B, Sq, Hq, D = q.shape
        self.dtype = compute_dtype(q.dtype)
        self.window = Window.of(Sq, v.shape[1], **window)
        self.scale = default_scale(scale, D)
        self.empty = B == 0 or Hq == 0 or self.window.first_row == Sq
        self.tiles = _fused_tiles(self.window, _planes(alibi_slopes, bias))
        # Whether some row of a tile may be kept from a key by what the mask adds to its score.
        self.hides = bias is not None or any(not tile.causal and not self.window.sees_all(tile) for tile in self.tiles)
        # torch's kernel makes out like q and takes it for granted that rows of out are consecutive numbers, which they
        # are not where another dimension of q, too, has a stride of 1: windows that overlap, say.
        self.copies_q = D > 1 and any(
            size > 1 and step == 1 for size, step in zip(q.shape[:3], q.stride()[:3], strict=True)
        )
        # One call of torch's kernel and nothing around it: a short prompt notices.
        self.plain = (
            not (self.empty or self.hides or self.copies_q or softcap > 0 or sinks is not None or dropout_p > 0)
            and (self.scale > 0 and q.dtype == self.dtype and v.shape[3] == D and alibi_slopes is None)
            and (len(self.tiles) == 1 and self.tiles[0][:4] == (0, Sq, 0, v.shape[1]))
        )


@prepared(_Kind)
def flash_attention(
    kind: _Kind,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    first_entry: int = 0,
    **in_kind: object,
) -> tuple[Tensor, Tensor]:
    """See :func:`kvops.flash_attention`; ``first_entry`` numbers the first batch entry for dropout."""
    if kind.plain:
        inputs = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out, lse = _forward(*inputs, 0.0, kind.tiles[0].causal, scale=kind.scale)
        if not _may_hide_nan(lse, v.shape[1]):
            return out.transpose(1, 2).contiguous(), lse.contiguous()
    if kind.empty:
        return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(
            (q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=kind.dtype
        )
    if kind.copies_q:
        q = q.clone(memory_format=torch.contiguous_format)
    dropout = _dropout(dropout_p, dropout_seed, first_entry)
    call = _Attention(q, k, v, kind.window, kind.scale, softcap, alibi_slopes, bias, dropout)
    fused = softcap == 0 and dropout is None
    if fused:
        out, lse = call.run(call.fused, kind.tiles)
        # The score of a key that holds a NaN or an infinity is NaN even where -inf was added to hide it.
        fused = not (kind.hides and lse.isnan().any())
    if not fused:
        out, lse = call.run(call.plain, call.small_tiles())
    if sinks is not None:
        weight, lse = beside_sinks(lse, sinks[:, None])
        out *= weight.mT[..., None]
    return cast(out, q.dtype), lse


def flash_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dlse: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    first_entry: int = 0,
    **window: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`kvops.flash_attention_backward`."""
    dtype = compute_dtype(q.dtype)
    visible = Window.of(q.shape[1], v.shape[1], **window)
    dropout = _dropout(dropout_p, dropout_seed, first_entry)
    call = _Attention(q, k, v, visible, default_scale(scale, q.shape[3]), softcap, alibi_slopes, bias, dropout)
    dsinks, fused = q.new_empty(0, dtype=dtype), softcap == 0 and dlse is None and dropout is None
    if sinks is not None or not fused:
        delta = _delta(dout, out, lse, dlse, dtype)
    if sinks is not None:
        dsinks = -(sink_probability(sinks[:, None], lse) * delta).sum((0, 2)).to(sinks.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype) for x in (q, k, v))
    dout, out = (cast(x, dtype).transpose(1, 2) for x in (dout, out))
    if fused:  # exp(-inf - inf) is 0: rows that a bias hides from all keys
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    if q.shape[0] * q.shape[2] > 0:
        for tile in _fused_tiles(call.window, _planes(alibi_slopes, bias)) if fused else call.small_tiles():
            rows = tile.rows
            if fused:
                parts = call.fused_backward(tile, dout[:, :, rows], out[:, :, rows], lse[:, :, rows])
            else:
                parts = call.plain_backward(tile, dout[:, :, rows], delta[:, :, rows], lse[:, :, rows])
            for total, part, places in zip((dq, dk, dv), parts, (rows, tile.keys, tile.keys), strict=True):
                total.transpose(1, 2)[:, :, places] += part
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks


def flash_attention_bias_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dlse: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    first_entry: int = 0,
    **window: Any,
) -> Tensor:
    """See :func:`kvops.flash_attention_bias_backward`."""
    dtype = compute_dtype(q.dtype)
    visible = Window.of(q.shape[1], v.shape[1], **window)
    dropout = _dropout(dropout_p, dropout_seed, first_entry)
    call = _Attention(q, k, v, visible, default_scale(scale, q.shape[3]), softcap, alibi_slopes, bias, dropout)
    delta = _delta(dout, out, lse, dlse, dtype)
    dbias = torch.zeros(bias.shape, dtype=dtype)
    whole = four_dims(dbias)
    dout = cast(dout, dtype).transpose(1, 2)
    each = whole.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1])  # nothing is summed
    if q.shape[0] * q.shape[2] > 0:
        for tile in call.small_tiles():
            rows = tile.rows
            target = whole[:, :, rows if whole.shape[2] > 1 else slice(None)]
            target = target[..., tile.keys if whole.shape[3] > 1 else slice(None)]
            into = grouped(target, k.shape[2]) if each else None
            ds, _, _ = call.score_gradient(tile, dout[:, :, rows], delta[:, :, rows], lse[:, :, rows], into)
            if into is None:
                target += ds.flatten(1, 2).sum_to_size(target.shape)
    return dbias.to(bias.dtype)


def _dropout(dropout_p: float, dropout_seed: Tensor | None, first_entry: int) -> Dropout | None:
    if not dropout_p:
        return None
    assert dropout_seed is not None  # the operators checked it
    return Dropout(dropout_p, dropout_seed, first_entry)


def _delta(dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What every dP of a row is measured from: [B, Hq, Sq], 0 in an empty row."""
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1).transpose(1, 2)
    if dlse is not None:
        delta = delta - dlse
    return delta.masked_fill(lse == -torch.inf, 0.0)
