"""The truth the tests compare with: attention written out in float64, and the tolerance that follows from it."""

import math

import margins
import torch
from torch import Tensor


def attention_mask(
    num_queries: int, num_keys: int, *, causal: bool = False, window_left: int = -1, window_right: int = -1
) -> Tensor:
    """bool [Sq, Sk]: which keys a query sees; query i stands at position i + Sk - Sq."""
    position = torch.arange(num_queries)[:, None] + num_keys - num_queries
    key = torch.arange(num_keys)[None, :]
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if causal:
        mask &= key <= position
    if window_left >= 0:
        mask &= key >= position - window_left
    if window_right >= 0:
        mask &= key <= position + window_right
    return mask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    distance: Tensor | None = None,
    weights: Tensor | None = None,
    key_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention in float64 with the whole matrix in memory.

    q [B, Sq, Hq, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv], mask bool broadcastable to [B, Hq, Sq, Sk], ALiBi's
    distance [Sq, Sk], by default from the bottom right corner, and the scales of keys [Sk] ->
    out [B, Sq, Hq, Dv], lse [B, Hq, Sq], p [B, Hq, Sq, Sk]. Rows that see nothing: out 0, lse -inf, p 0.
    Order: scale, softcap, ALiBi -slope * |distance|, bias (bool: False hides), mask, sinks in the denominator only.
    Dropout multiplies P by ``weights`` [B, Hq, Sq, Sk] for out alone.
    """
    group = q.shape[2] // k.shape[2]
    num_queries, num_keys = q.shape[1], k.shape[1]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = q @ k.mT  # not einsum: it makes products of one term elementwise, whose operands are then not rounded
    s = s * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if key_scales is not None:
        s = s * key_scales.double()
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        s = s - _alibi(alibi_slopes, num_queries, num_keys, distance)
    if bias is not None:
        s = _biased(s, bias)
    if mask is not None:
        s = s.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.double()[None, :, None, None].expand(*s.shape[:-1], 1)
        seen = (s > float("-inf")).any(-1, keepdim=True)
        lse = torch.cat([s, sink.masked_fill(~seen, float("-inf"))], -1).logsumexp(-1)
    else:
        lse = s.logsumexp(-1) if num_keys else s.new_full(s.shape[:-1], float("-inf"))
    p = torch.exp(s - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    return (_weighted(p, weights) @ v).transpose(1, 2), lse, p


def _weighted(p: Tensor, weights: Tensor | None) -> Tensor:
    return p if weights is None else p * weights


def _biased(s: Tensor, bias: Tensor) -> Tensor:
    hidden = ~bias if bias.dtype == torch.bool else bias == float("-inf")
    return (s if bias.dtype == torch.bool else s + bias).masked_fill(hidden, float("-inf"))


def _alibi(slopes: Tensor, num_queries: int, num_keys: int, distance: Tensor | None = None) -> Tensor:
    """slope * |distance|, [1 or B, H, Sq, Sk]."""
    if distance is None:
        distance = torch.arange(num_queries)[:, None] + num_keys - num_queries - torch.arange(num_keys)[None, :]
    return slopes.double().reshape(-1, slopes.shape[-1], 1, 1) * distance.abs()


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dlse: Tensor | None = None,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradient as flash attention computes it, P recomputed from lse: what :func:`rounding.rounded` measures.

    The truth to compare with is autograd through :func:`attention`.
    """
    num_queries, num_keys, kv_heads = q.shape[1], k.shape[1], k.shape[2]
    group = q.shape[2] // kv_heads
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    dout, q, k, v, out = (x.double().transpose(1, 2) for x in (dout, q, k, v, out))  # [B, H, S, D]
    k, v, lse = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), lse.double()
    s = q @ k.mT * scale
    t = torch.tanh(s / softcap) if softcap else torch.zeros_like(s)
    if softcap:
        s = softcap * t
    if alibi_slopes is not None:
        s = s - _alibi(alibi_slopes, num_queries, num_keys)
    if bias is not None:
        s = _biased(s, bias)
    empty = lse == float("-inf")
    p = torch.exp(s - lse.masked_fill(empty, float("inf"))[..., None])
    if mask is not None:
        p = p.masked_fill(~mask, 0.0)
    delta = (dout * out).sum(-1)
    if dlse is not None:
        delta = delta - dlse.double()
    delta = delta.masked_fill(empty, 0.0)
    ds = p * (_weighted(dout @ v.mT, weights) - delta[..., None])
    dbias = ds.sum_to_size(bias.shape) if bias is not None and bias.is_floating_point() else None
    ds = ds * (1 - t * t)
    dq, dk, dv = ds @ k * scale, ds.mT @ q * scale, _weighted(p, weights).mT @ dout
    dk, dv = (x.unflatten(1, (kv_heads, group)).sum(2) for x in (dk, dv))
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    dsinks = None
    if sinks is not None:
        sink_p = torch.exp(sinks.double()[:, None] - lse.masked_fill(empty, float("inf")))
        dsinks = -(sink_p * delta).sum((0, 2))
    return dq, dk, dv, dsinks, dbias


# How many times the spread of rounding errors an error may be: the largest of a hundred thousand normal errors is 4.5
# spreads, and twice that leaves room for tiles and orders of summation that the model of rounding does not know.
SPREADS = 10.0
# And how many units in the last place of the output's dtype: its own rounding is half of one.
UNITS = 2.0


def assert_accurate(actual: Tensor, exact: Tensor, same_arithmetic: Tensor, name: str = "output") -> None:
    """Every number's error against the float64 truth is at most :data:`SPREADS` times what rounding does to it, plus
    :data:`UNITS` in the last place of the output's dtype.

    ``same_arithmetic`` is the computation in the arithmetic under test: the samples of :func:`rounding.rounded`,
    stacked in front, or a single run where there are many numbers. Its distance from ``exact``, as the root of the mean
    square over the samples of a number, or over the whole output where that is more, is what rounding does: never the
    luck of a few numbers. Infinities must stand in the same places; a NaN anywhere (a poisoned slot that nobody wrote,
    say) fails.
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    dtype = actual.dtype
    actual, exact, same_arithmetic = (x.detach().cpu().double() for x in (actual, exact, same_arithmetic))
    if same_arithmetic.dim() == exact.dim():  # of correct roundings, which samples are twice of
        same_arithmetic = (exact + 2 * (same_arithmetic - exact).nan_to_num(0.0))[None]
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} NaN"
    infinite = exact.isinf()
    assert torch.equal(actual[infinite], exact[infinite]), f"{name}: infinities differ"
    if infinite.all():
        return
    actual, exact, same_arithmetic = actual[~infinite], exact[~infinite], same_arithmetic[:, ~infinite]
    squares = (same_arithmetic - exact).square().mean(0)
    spread = squares.clamp(min=squares.mean().item()).sqrt()
    number = torch.finfo(dtype)
    unit = number.eps * exact.abs().clamp(min=number.tiny)  # below tiny, numbers are that far apart
    error, allowed = (actual - exact).abs(), SPREADS * spread + UNITS * unit
    margin = (error / allowed).nan_to_num(0.0)  # 0 of 0 is nothing
    worst = int(margin.argmax())
    assert margin[worst] <= 1, (
        f"{name}: error {error[worst]:.3e} against float64, allowed {allowed[worst]:.3e} "
        f"({SPREADS:g} times a spread of {spread[worst]:.3e}, {UNITS:g} times a unit of {unit[worst]:.3e})"
    )
    margins.record(margin[worst].item(), name)
