"""The truth the tests compare with: attention written out in float64, and the tolerance that follows from it."""

import math

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
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention with the whole matrix in memory, every step in ``dtype`` (softmax in at least float32).

    q [B, Sq, Hq, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv], mask bool broadcastable to [B, Hq, Sq, Sk] ->
    out [B, Sq, Hq, Dv], lse [B, Hq, Sq], p [B, Hq, Sq, Sk]. Rows that see nothing: out 0, lse -inf, p 0.
    Order: scale, softcap, ALiBi bias -slope * |distance|, mask, sinks in the denominator only.
    """
    softmax_dtype = torch.promote_types(dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    num_queries, num_keys = q.shape[1], k.shape[1]
    s = torch.einsum("bqhd,bkhd->bhqk", q, k).to(softmax_dtype)
    s = s * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        position = torch.arange(num_queries)[:, None] + num_keys - num_queries
        distance = (position - torch.arange(num_keys)[None, :]).abs().to(softmax_dtype)
        slopes = alibi_slopes.to(softmax_dtype)
        s = s - slopes.reshape(-1, slopes.shape[-1], 1, 1) * distance
    if mask is not None:
        s = s.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.to(softmax_dtype)[None, :, None, None].expand(*s.shape[:-1], 1)
        seen = (s > float("-inf")).any(-1, keepdim=True)
        lse = torch.cat([s, sink.masked_fill(~seen, float("-inf"))], -1).logsumexp(-1)
    else:
        lse = s.logsumexp(-1) if num_keys else s.new_full(s.shape[:-1], float("-inf"))
    p = torch.exp(s - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    out = torch.einsum("bhqk,bkhd->bqhd", p.to(dtype), v)
    return out, lse, p


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
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradient as flash attention computes it, P recomputed from lse: the arithmetic of ``dtype`` to measure with.

    The truth to compare with is autograd through :func:`attention` in float64. P and dS are rounded to ``dtype`` where
    a matrix product reads them; products accumulate in at least float32.
    """
    work = torch.promote_types(dtype, torch.float32)

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).to(work)

    num_queries, num_keys, kv_heads = q.shape[1], k.shape[1], k.shape[2]
    group = q.shape[2] // kv_heads
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    dout, q, k, v, out = (rounded(x) for x in (dout, q, k, v, out))
    lse = lse.to(work)
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    t = torch.tanh(s / softcap) if softcap else torch.zeros_like(s)
    if softcap:
        s = softcap * t
    if alibi_slopes is not None:
        position = torch.arange(num_queries)[:, None] + num_keys - num_queries
        distance = (position - torch.arange(num_keys)[None, :]).abs().to(work)
        s = s - alibi_slopes.to(work).reshape(-1, alibi_slopes.shape[-1], 1, 1) * distance
    empty = lse == float("-inf")
    p = torch.exp(s - lse.masked_fill(empty, float("inf"))[..., None])
    if mask is not None:
        p = p.masked_fill(~mask, 0.0)
    delta = (dout * out).sum(-1).transpose(1, 2)
    if dlse is not None:
        delta = delta - dlse.to(work)
    delta = delta.masked_fill(empty, 0.0)
    ds = p * (torch.einsum("bqhd,bkhd->bhqk", dout, v) - delta[..., None]) * (1 - t * t)
    dq = torch.einsum("bhqk,bkhd->bqhd", rounded(ds), k) * scale
    dk = torch.einsum("bhqk,bqhd->bkhd", rounded(ds), q) * scale
    dv = torch.einsum("bhqk,bqhd->bkhd", rounded(p), dout)
    dk, dv = (x.unflatten(2, (kv_heads, group)).sum(3) for x in (dk, dv))
    dsinks = None
    if sinks is not None:
        sink_p = torch.exp(sinks.to(work)[:, None] - lse.masked_fill(empty, float("inf")))
        dsinks = -(sink_p * delta).sum((0, 2)).to(sinks.dtype)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), dsinks


def assert_accurate(actual: Tensor, exact: Tensor, same_arithmetic: Tensor, name: str = "output") -> None:
    """The error against the float64 truth is at most twice that of torch's own low-precision arithmetic, plus one
    rounding of the largest value to the output's dtype.

    ``same_arithmetic`` is the oracle run in the dtype under test. Infinities must stand in the same places; a NaN
    anywhere (a poisoned slot that nobody wrote, say) fails.
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    actual64, exact, same_arithmetic = (
        actual.detach().double().cpu(),
        exact.double().cpu(),
        same_arithmetic.double().cpu(),
    )
    assert not actual64.isnan().any(), f"{name}: {int(actual64.isnan().sum())} NaN"
    infinite = exact.isinf()
    assert torch.equal(actual64[infinite], exact[infinite]), f"{name}: infinities differ"
    if infinite.all():
        return
    finite = ~infinite
    error = (actual64 - exact)[finite].abs().max().item()
    torch_error = (same_arithmetic - exact)[finite].abs().max().item()
    rounding = torch.finfo(actual.dtype).eps * exact[finite].abs().max().item()
    allowed = 2 * torch_error + rounding
    assert error <= allowed, (
        f"{name}: error {error:.3e} against float64, allowed {allowed:.3e} "
        f"(torch in the same precision: {torch_error:.3e}, one rounding: {rounding:.3e})"
    )
