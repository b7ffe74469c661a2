"""Packed attention on the CPU: each sequence is a dense call on its own slice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kvops.eager import attention, scores
from kvops.eager.attention import compute_dtype


def _sequences(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, options: dict[str, Any]
) -> Iterator[tuple[slice, slice, dict[str, Any]]]:
    """The queries, the keys and the options of each sequence."""
    slopes, bias = options.get("alibi_slopes"), options.get("bias")
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(starts_q) - 1):
        if slopes is not None and slopes.dim() == 2:
            options = options | {"alibi_slopes": slopes[i]}
        if options.get("dropout_p"):
            options = options | {"first_entry": i}
        rows, keys = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        if bias is not None:
            options = options | {"bias": _own_bias(bias, rows, keys)}
        yield rows, keys, options


def _own_bias(bias: Tensor, rows: slice, keys: slice) -> Tensor:
    """The view [1 or Hq, 1 or queries, 1 or keys] of a sequence."""
    bias = bias[(None,) * (3 - bias.dim())]
    return bias[
        :,
        rows if bias.shape[1] > 1 else slice(None),
        slice(keys.stop - keys.start) if bias.shape[2] > 1 else slice(None),
    ]


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    # Tokens after the last sequence belong to nobody: they see no key.
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=compute_dtype(q.dtype))
    for rows, keys, own in _sequences(cu_seqlens_q, cu_seqlens_k, options):
        part, part_lse = attention.flash_attention(q[None, rows], k[None, keys], v[None, keys], **own)
        out[rows], lse[:, rows] = part[0], part_lse[0]
    return out, lse


def flash_attention_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dlse: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    sinks = options.get("sinks")
    dsinks = q.new_zeros(0 if sinks is None else len(sinks), dtype=compute_dtype(q.dtype))
    for rows, keys, own in _sequences(cu_seqlens_q, cu_seqlens_k, options):
        own = own | {"dlse": None if dlse is None else dlse[None, :, rows]}
        part = attention.flash_attention_backward(
            dout[None, rows], q[None, rows], k[None, keys], v[None, keys], out[None, rows], lse[None, :, rows], **own
        )
        dq[rows], dk[keys], dv[keys] = (x[0] for x in part[:3])
        dsinks += part[3]
    return dq, dk, dv, dsinks if sinks is None else dsinks.to(sinks.dtype)


def flash_attention_varlen_bias_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dlse: Tensor | None = None,
    **options: Any,
) -> Tensor:
    dbias = torch.zeros(bias.shape, dtype=compute_dtype(q.dtype), device=bias.device)
    wide = options | {"bias": bias.to(dbias.dtype)}
    for rows, keys, own in _sequences(cu_seqlens_q, cu_seqlens_k, wide):
        own = own | {"dlse": None if dlse is None else dlse[None, :, rows]}
        target, own_lse = _own_bias(dbias, rows, keys), lse[None, :, rows]
        target += attention.flash_attention_bias_backward(
            dout[None, rows], q[None, rows], k[None, keys], v[None, keys], out[None, rows], own_lse, **own
        )
    return dbias.to(bias.dtype)


def attention_scores_varlen(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Any,
) -> Tensor:
    result = q.new_zeros(k.shape[1], k.shape[0], dtype=compute_dtype(q.dtype))
    for rows, keys, own in _sequences(cu_seqlens_q, cu_seqlens_k, options):
        result[:, keys] = scores.attention_scores(q[None, rows], k[None, keys], lse[None, :, rows], **own)[0]
    return result
