"""Attention on the CPU, memory linear in the lengths.

torch's own CPU flash attention does the work wherever it can, fed with exactly the keys that a tile of queries sees;
softcaps and gradients through lse, which it has no notion of, run tile by tile in plain PyTorch. Half precision is
computed in float32: without matrix units a CPU is slower in float16 and bfloat16, and less accurate. float64 tensors
are computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kvops.prepared import prepared
from kvops.private_torch import flash_attention as _forward
from kvops.private_torch import flash_attention_backward as _backward

# Tiles of plain PyTorch: scores of this many elements stay in cache between the passes over them.
_TILE_ELEMENTS = 1 << 20
_TILE_ROWS = 128
# Queries to a call of torch's kernel under a window, and the largest mask (in elements) that is built for one.
_WINDOW_ROWS = 256
_MASK_ELEMENTS = 1 << 22


class Window(NamedTuple):
    """Which keys a query sees: query i stands at i + offset and sees ``left`` keys before and ``right`` after it.

    None is no limit. ``right`` may be negative: the nearest keys do not count then.
    """

    num_queries: int
    num_keys: int
    left: int | None
    right: int | None

    @classmethod
    def of(cls, num_queries: int, num_keys: int, causal: bool, window_left: int, window_right: int) -> Window:
        """Causal is a window without keys to the right; limits beyond every distance are none."""
        right = 0 if causal else window_right
        return cls(
            num_queries,
            num_keys,
            window_left if 0 <= window_left < num_keys - 1 else None,
            right if 0 <= right < num_queries - 1 else None,
        )

    @property
    def offset(self) -> int:
        return self.num_keys - self.num_queries

    @property
    def first_row(self) -> int:
        """The rows before it see no key."""
        if self.num_keys == 0:
            return self.num_queries
        return 0 if self.right is None else min(self.num_queries, max(0, -self.right - self.offset))

    def keys(self, start: int, end: int) -> tuple[int, int]:
        """The range of keys that some row of start..end-1 sees."""
        low = 0 if self.left is None else max(0, start + self.offset - self.left)
        high = self.num_keys
        if self.right is not None:
            high = max(low, min(high, end + self.offset + self.right))
        return low, high

    def sees_all(self, start: int, end: int, low: int, high: int) -> bool:
        """Whether every row of start..end-1 sees every key of low..high-1."""
        return (self.left is None or end - 1 + self.offset - self.left <= low) and (
            self.right is None or high - 1 <= start + self.offset + self.right
        )

    def hidden(self, start: int, end: int, low: int, high: int) -> list[tuple[int, int]]:
        """The ranges of keys within low..high-1 that not every row of start..end-1 sees: some at either end, or all."""
        first = low if self.left is None else max(low, end - 1 + self.offset - self.left)
        last = high if self.right is None else min(high, start + self.offset + self.right + 1)
        return [(low, first), (last, high)] if first < last else [(low, high)]

    def distance(self, start: int, end: int, low: int, high: int, device: torch.device) -> Tensor:
        """int64 [rows, keys]: how far each key is behind each query."""
        position = torch.arange(start, end, device=device) + self.offset
        return position[:, None] - torch.arange(low, high, device=device)

    def seen(self, distance: Tensor) -> Tensor:
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.left is not None:
            seen &= distance <= self.left
        if self.right is not None:
            seen &= distance >= -self.right
        return seen


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``: itself, or a contiguous copy.

    torch's CPU kernel reads rows of consecutive numbers. Operations that keep a memory format (``to``, ``mul``,
    ``pad``) may return rows that are not: of overlapping views, of channels-last tensors.
    """
    return x if x.dtype == dtype else x.to(dtype, memory_format=torch.contiguous_format)


def widen(x: Tensor, width: int) -> Tensor:
    """A contiguous copy with zeros behind the last dimension, up to ``width``."""
    wide = x.new_zeros(*x.shape[:-1], width)
    wide[..., : x.shape[-1]] = x
    return wide


def default_scale(scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if scale is None else scale


def tile_sizes(batch: int, heads: int, num_queries: int) -> tuple[int, int]:
    """Queries and keys to a tile of plain PyTorch."""
    rows = max(1, min(_TILE_ROWS, num_queries))
    return rows, min(8192, max(64, _TILE_ELEMENTS // max(1, batch * heads * rows)))


def group_queries(q: Tensor, kv_heads: int) -> Tensor:
    """A view [B, Hkv, G, S, D] of [B, S, Hq, D]."""
    return q.transpose(1, 2).unflatten(1, (kv_heads, q.shape[2] // kv_heads))


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
    start: int,
    low: int,
    scale: float,
    softcap: float,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Scores [B, Hkv, G, rows, keys] of q [B, Hkv, G, rows, D] and k [B, Hkv, keys, D], -inf where unseen.

    ``start`` and ``low`` are the numbers of the first row and key. Also the tanh of the softcap, for its derivative.
    """
    B, Hkv, G, T, D = q.shape
    K = k.shape[2]
    # The factor is applied to the finished dot products: scaling q first would round it once more.
    factor = scale / softcap if softcap > 0 else scale
    rows, keys = q.reshape(B * Hkv, G * T, D), k.reshape(B * Hkv, K, D)
    scores = torch.baddbmm(q.new_empty(()), rows, keys.transpose(1, 2), beta=0, alpha=factor).view(B, Hkv, G, T, K)
    capped = None
    if softcap > 0:
        capped = scores.tanh_()
        scores = capped * softcap
    if slopes is not None:
        scores -= slopes * window.distance(start, start + T, low, low + K, q.device).abs()
    for first, last in window.hidden(start, start + T, low, low + K):
        if first < last:
            distance = window.distance(start, start + T, first, last, q.device)
            scores[..., first - low : last - low].masked_fill_(~window.seen(distance), float("-inf"))
    return scores, capped


def union_weights(lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of two parts of a softmax in their union, and its lse; 0 and -inf where both are empty.

    The weights are divided by their own sum: exp(lse_a - lse) has the rounding of lse, 5e-4 where lse is 1e4.
    """
    m = torch.maximum(lse_a, lse_b)
    limits = torch.finfo(m.dtype)
    shift = m.clamp(min=limits.min, max=limits.max)  # inf - inf is NaN
    weight_a, weight_b = torch.exp(lse_a - shift), torch.exp(lse_b - shift)
    total = weight_a + weight_b
    lse = m + total.log()
    total.masked_fill_(total == 0, 1.0)
    return weight_a.div_(total), weight_b.div_(total), lse


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Let the sinks [Hq] into the denominator; rows without a key stay empty."""
    weight, _, with_sink = union_weights(lse, sinks.to(lse.dtype)[:, None].expand_as(lse))
    with_sink = torch.where(lse == float("-inf"), lse, with_sink)
    return out * weight.transpose(1, 2)[..., None], with_sink


def sink_probability(sinks: Tensor, lse: Tensor) -> Tensor:
    """exp(sinks - lse) for sinks that broadcast to lse, 0 in an empty row; an infinite sink has all of its row."""
    largest = torch.finfo(lse.dtype).max
    p = torch.exp(sinks.to(lse.dtype).clamp(max=largest) - lse.clamp(max=largest))
    return p.masked_fill_(lse == float("-inf"), 0.0)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys: out [..., S, H, D], lse [..., H, S]."""
    weight_a, weight_b, lse = union_weights(lse_a, lse_b)
    weight_a, weight_b = weight_a.mT.unsqueeze(-1), weight_b.mT.unsqueeze(-1)
    return torch.mul(out_a, weight_a).addcmul_(out_b, weight_b), lse


class _Call(NamedTuple):
    """One call of torch's kernel: all rows of start..end-1 against the keys low..high-1."""

    start: int
    end: int
    low: int
    high: int
    causal: bool = False
    masked: bool = False


@lru_cache(maxsize=256)
def _calls(window: Window, slopes: int) -> tuple[_Call, ...]:
    """How torch's kernel, which aligns its causal mask to the top left, covers the rows that see a key, under so many
    slopes."""
    return tuple(_cover(window, slopes))


def _cover(window: Window, slopes: int) -> Iterator[_Call]:
    first, Sq, Sk = window.first_row, window.num_queries, window.num_keys
    if first == Sq:
        return
    if not slopes and window.sees_all(first, Sq, 0, Sk):
        yield _Call(first, Sq, 0, Sk)
    elif not slopes and window.left is None and window.right == 0:
        square = max(0, window.offset)
        if square:
            yield _Call(first, Sq, 0, square)
        yield _Call(first, Sq, square, Sk, causal=True)
    else:
        reach = Sk if window.left is None or window.right is None else min(Sk, window.left + window.right + 1)
        mask_row = (reach + _WINDOW_ROWS) * max(1, slopes)
        rows = max(16, min(_WINDOW_ROWS, _MASK_ELEMENTS // mask_row))
        for start in range(first, Sq, rows):
            end = min(Sq, start + rows)
            low, high = window.keys(start, end)
            yield _Call(start, end, low, high, masked=bool(slopes) or not window.sees_all(start, end, low, high))


def _mask(window: Window, call: _Call, slopes: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to the scores: [rows, keys], or [1 or B, Hq, rows, keys] with ALiBi."""
    distance = window.distance(call.start, call.end, call.low, call.high, device)
    if slopes is None:
        mask = torch.zeros(distance.shape, dtype=dtype, device=device)
    else:
        mask = -slopes.flatten(1, 2) * distance.abs()
    return mask.masked_fill_(~window.seen(distance), float("-inf"))


def _positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """torch's kernel masks before it scales: with a scale that is not positive, -inf would become NaN or +inf."""
    return (q, scale) if scale > 0 else (torch.mul(q, scale, out=q.new_empty(q.shape)), 1.0)


def _equal_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """torch's kernel wants one head size: zeros change neither the scores nor the wanted columns."""
    width = max(q.shape[-1], v.shape[-1])
    if q.shape[-1] < width:
        q, k = widen(q, width), widen(k, width)
    elif v.shape[-1] < width:
        v = widen(v, width)
    return q, k, v


class _Kind:
    """What calls alike have in common: see :func:`kvops.prepared.prepared`."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = False,
        window_left: int = -1,
        window_right: int = -1,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
    ) -> None:
        B, Sq, Hq, D = q.shape
        self.dtype = compute_dtype(q.dtype)
        self.window = Window.of(Sq, v.shape[1], causal, window_left, window_right)
        self.scale = default_scale(scale, D)
        self.empty = B == 0 or Hq == 0 or self.window.first_row == Sq
        self.calls = _calls(self.window, 0 if alibi_slopes is None else alibi_slopes.numel())
        # Whether some row of a call is kept from a key by what the mask adds to its score.
        self.hides = any(call.masked and not self.window.sees_all(*call[:4]) for call in self.calls)
        # torch's kernel makes out like q and takes it for granted that rows of out are consecutive numbers, which they
        # are not where another dimension of q, too, has a stride of 1: windows that overlap, say.
        self.copies_q = D > 1 and any(
            size > 1 and step == 1 for size, step in zip(q.shape[:3], q.stride()[:3], strict=True)
        )
        # One call of torch's kernel and nothing around it: a short prompt notices.
        self.plain = (
            not (self.empty or self.copies_q or softcap > 0 or sinks is not None or alibi_slopes is not None)
            and (self.scale > 0 and q.dtype == self.dtype and v.shape[3] == D)
            and self.calls in ((_Call(0, Sq, 0, v.shape[1]),), (_Call(0, Sq, 0, v.shape[1], causal=True),))
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
    **in_kind: object,
) -> tuple[Tensor, Tensor]:
    """See :func:`kvops.flash_attention`."""
    if kind.plain:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out, lse = _forward(q, k, v, 0.0, kind.calls[0].causal, scale=kind.scale)
        return out.transpose(1, 2).contiguous(), lse.contiguous()
    B, Sq, Hq, _ = q.shape
    Hkv, Dv = v.shape[2:]
    dtype = kind.dtype
    slopes = group_slopes(alibi_slopes, Hkv, dtype)
    if kind.copies_q:
        q = q.clone(memory_format=torch.contiguous_format)
    if kind.empty:
        return q.new_zeros(B, Sq, Hq, Dv), q.new_full((B, Hq, Sq), float("-inf"), dtype=dtype)
    fused = softcap == 0
    if fused:
        out, lse = _fused_forward(kind, cast(q, dtype), cast(k, dtype), cast(v, dtype), slopes)
        # The score of a key that holds a NaN or an infinity is NaN even where -inf was added to hide it.
        fused = not (kind.hides and lse.isnan().any())
    if not fused:
        out, lse = _tiled_forward(q, k, v, kind.window, kind.scale, softcap, slopes, dtype)
    if sinks is not None:
        out, lse = add_sinks(out, lse, sinks)
    return cast(out, q.dtype).contiguous(), lse.contiguous()


def _part(x: Tensor, start: int, end: int) -> Tensor:
    """Tokens start..end-1 of [B, H, S, D] or [B, H, S]."""
    return x if end - start == x.shape[2] else x[:, :, start:end]


def _fused_forward(kind: _Kind, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None) -> tuple[Tensor, Tensor]:
    B, Sq, Hq, D = q.shape
    Dv = v.shape[3]
    q, scale = _positive_scale(q, kind.scale)
    if Dv != D:
        q, k, v = _equal_width(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    whole = kind.calls[0].start == 0 and kind.calls[0].end == Sq
    if not whole:
        out, lse = q.new_zeros(B, Sq, Hq, Dv), q.new_full((B, Hq, Sq), float("-inf"))
    done = 0
    for call in kind.calls:
        start, end, low, high, causal, masked = call
        mask = _mask(kind.window, call, slopes, q.dtype, q.device) if masked else None
        part, part_lse = _forward(
            _part(q, start, end), _part(k, low, high), _part(v, low, high), 0.0, causal, attn_mask=mask, scale=scale
        )
        part = part.transpose(1, 2)
        if Dv < D:
            part = part[..., :Dv]
        rows = slice(start, end)
        if start < done:
            part, part_lse = merge(out[:, rows], lse[:, :, rows], part, part_lse)
        if whole:
            out, lse = part, part_lse
        else:
            out[:, rows], lse[:, :, rows] = part, part_lse
        done = end
    return out, lse


def _tiled_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    scale: float,
    softcap: float,
    slopes: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    B, Sq, Hq, _ = q.shape
    Hkv, Dv = v.shape[2:]
    G = Hq // Hkv
    qg, k, v = group_queries(q, Hkv), k.transpose(1, 2), v.transpose(1, 2)
    out = torch.zeros(B, Hkv, G, Sq, Dv, dtype=dtype, device=q.device)
    lse = torch.full((B, Hkv, G, Sq), float("-inf"), dtype=dtype, device=q.device)
    rows, columns = tile_sizes(B, Hq, Sq)
    for start in range(window.first_row, Sq, rows):
        end = min(Sq, start + rows)
        tile = qg[:, :, :, start:end].to(dtype)
        first, last = window.keys(start, end)
        acc = torch.zeros(B, Hkv, G, end - start, Dv, dtype=dtype, device=q.device)
        m = torch.full((B, Hkv, G, end - start, 1), float("-inf"), dtype=dtype, device=q.device)
        l = torch.zeros_like(m)
        for low in range(first, last, columns):
            high = min(last, low + columns)
            scores, _ = score_tile(tile, k[:, :, low:high].to(dtype), window, start, low, scale, softcap, slopes)
            m_new = torch.maximum(m, scores.amax(-1, keepdim=True))
            shift = m_new.masked_fill(m_new == float("-inf"), 0.0)
            p = scores.sub_(shift).exp_()
            rescale = torch.exp(m - shift)
            l = l * rescale + p.sum(-1, keepdim=True)
            update = torch.matmul(p.flatten(2, 3), v[:, :, low:high].to(dtype)).view_as(acc)
            acc = acc.mul_(rescale).add_(update)
            m = m_new
        out[:, :, :, start:end] = acc / l
        lse[:, :, :, start:end] = (m + l.log()).squeeze(-1)
    return out.flatten(1, 2).transpose(1, 2), lse.flatten(1, 2)


def flash_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, Sq, Hq, D = q.shape
    Sk, Hkv, _ = v.shape[1:]
    dtype = compute_dtype(q.dtype)
    window = Window.of(Sq, Sk, causal, window_left, window_right)
    slopes = group_slopes(alibi_slopes, Hkv, dtype)
    scale = default_scale(scale, D)
    dsinks = q.new_empty(0, dtype=dtype)
    if sinks is not None:
        p = sink_probability(sinks[:, None], lse)
        dsinks = -(p * _delta(dout, out, lse, dlse, dtype)).sum((0, 2)).to(sinks.dtype)
    if B == 0 or Hq == 0 or window.first_row == Sq:
        dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        return dq, dk, dv, dsinks
    if softcap == 0 and dlse is None:
        inputs = cast(dout, dtype), cast(q, dtype), cast(k, dtype), cast(v, dtype), cast(out, dtype)
        dq, dk, dv = _fused_backward(*inputs, lse, window, scale, slopes)
    else:
        delta = _delta(dout, out, lse, dlse, dtype)
        dq, dk, dv = _tiled_backward(dout, q, k, v, lse, delta, window, scale, softcap, slopes, dtype)
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous(), dsinks


def _delta(dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What every dP of a row is measured from: [B, Hq, Sq], 0 in an empty row."""
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1).transpose(1, 2)
    if dlse is not None:
        delta = delta - dlse
    return delta.masked_fill(lse == float("-inf"), 0.0)


def _fused_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    window: Window,
    scale: float,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    D, Dv = q.shape[3], v.shape[3]
    given_scale = scale
    q, scale = _positive_scale(q, scale)
    q, k, v = (x.transpose(1, 2) for x in _equal_width(q, k, v))
    if Dv < D:
        dout, out = widen(dout, D), widen(out, D)
    dout, out = dout.transpose(1, 2), out.transpose(1, 2)
    calls = _calls(window, 0 if slopes is None else slopes.numel())
    whole = calls == (_Call(0, window.num_queries, 0, window.num_keys, calls[0].causal, calls[0].masked),)
    if not whole:
        # [B, S, H, D] in memory, like what torch's kernel returns.
        dq, dk, dv = (torch.zeros_like(x.transpose(1, 2).contiguous()).transpose(1, 2) for x in (q, k, v))
    for call in calls:
        mask = _mask(window, call, slopes, q.dtype, q.device) if call.masked else None
        rows, keys = slice(call.start, call.end), slice(call.low, call.high)
        parts = _backward(
            dout[:, :, rows],
            q[:, :, rows],
            k[:, :, keys],
            v[:, :, keys],
            out[:, :, rows],
            lse[:, :, rows],
            0.0,
            call.causal,
            attn_mask=mask,
            scale=scale,
        )
        if whole:
            dq, dk, dv = parts
        else:
            dq[:, :, rows] += parts[0]
            dk[:, :, keys] += parts[1]
            dv[:, :, keys] += parts[2]
    if given_scale <= 0:
        dq = dq * given_scale
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    return dq[..., :D], dk[..., :D], dv[..., :Dv]


def _tiled_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    window: Window,
    scale: float,
    softcap: float,
    slopes: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    B, Sq, Hq, D = q.shape
    Sk, Hkv, Dv = v.shape[1:]
    qg, doutg = group_queries(q, Hkv), group_queries(dout, Hkv)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    lse, delta = (x.unflatten(1, (Hkv, Hq // Hkv)).unsqueeze(-1) for x in (lse, delta))  # [B, Hkv, G, Sq, 1]
    dq = torch.zeros(B, Hkv, Hq // Hkv, Sq, D, dtype=dtype, device=q.device)
    dk = torch.zeros(B, Hkv, Sk, D, dtype=dtype, device=q.device)
    dv = torch.zeros(B, Hkv, Sk, Dv, dtype=dtype, device=q.device)
    rows, columns = tile_sizes(B, Hq, Sq)
    for start in range(window.first_row, Sq, rows):
        end = min(Sq, start + rows)
        tile = qg[:, :, :, start:end].to(dtype)
        flat_q = tile.flatten(2, 3)
        flat_dout = doutg[:, :, :, start:end].to(dtype).flatten(2, 3)
        first, last = window.keys(start, end)
        for low in range(first, last, columns):
            high = min(last, low + columns)
            kt, vt = k[:, :, low:high].to(dtype), v[:, :, low:high].to(dtype)
            scores, capped = score_tile(tile, kt, window, start, low, scale, softcap, slopes)
            p = scores.sub_(lse[:, :, :, start:end]).exp_()
            dv[:, :, low:high] += torch.matmul(p.flatten(2, 3).transpose(2, 3), flat_dout)
            ds = torch.matmul(flat_dout, vt.transpose(2, 3)).view_as(p)
            ds.sub_(delta[:, :, :, start:end]).mul_(p)
            if capped is not None:
                ds.mul_(1 - capped * capped)
            flat_ds = ds.flatten(2, 3)
            dk[:, :, low:high] += torch.matmul(flat_ds.transpose(2, 3), flat_q)
            dq[:, :, :, start:end] += torch.matmul(flat_ds, kt).view(B, Hkv, -1, end - start, D)
    dq.mul_(scale)
    dk.mul_(scale)
    return dq.flatten(1, 2).transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
