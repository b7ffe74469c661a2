"""torch's attention signature on top of the operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvops import checks
from kvops.ops.attention import flash_attention
from kvops.ops.varlen import flash_attention_varlen

_LAYOUT = "[batch, heads, seqlen, head_dim]"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention` on :func:`kvops.flash_attention`, differentiable.

    Args:
        query: ``[B, Hq, Sq, D]``, or ``[B, Sq, D]`` for one head.
        key: ``[B, Hkv, Sk, D]``.
        value: ``[B, Hkv, Sk, Dv]``.
        attn_mask: a mask that needs no matrix: padding of keys at the ends of each row, bool ``[B or 1, 1, 1, Sk]``
            (without heads ``[B or 1, 1, Sk]``; True takes part), which the host reads; or ``causal_upper_left`` and
            ``causal_lower_right`` of ``torch.nn.attention.bias``.
        dropout_p: 0.
        is_causal: aligned to the **top left** if lengths differ, as in torch: query i sees keys 0 to i.
            (:func:`kvops.flash_attention` aligns to the bottom right.)
        scale: None for ``D ** -0.5``.
        enable_gqa: allow fewer heads of keys and values than of queries.

    Returns:
        ``[B, Hq, Sq, Dv]``; a query that sees no key gives 0.

    Raises:
        ValueError: a mask that would need the matrix of scores, dropout, shapes that do not fit.
        TypeError: dtypes that do not fit.
    """
    if dropout_p != 0:
        raise ValueError(f"dropout_p: expected 0, got {dropout_p}: kvops has no dropout, pass 0.0 if not self.training")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.expect_tensor(name, tensor)
        if tensor.dim() != query.dim() or tensor.dim() not in (3, 4):
            raise ValueError(f"{name}: expected 4 dimensions {_LAYOUT} or 3 without heads, got {list(tensor.shape)}")
    if query.dim() == 3:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        if attn_mask is not None and attn_mask.dim() == 3 and not hasattr(attn_mask, "variant"):
            attn_mask = attn_mask.unsqueeze(1)
        return scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale).squeeze(1)
    # With the caller's names, which differ from those of the operators.
    kind = query.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):  # which casts to one dtype
        checks.expect_dtype("query", query, *checks.FLOAT_DTYPES)
        checks.expect_same_dtype("key", key, "query", query)
        checks.expect_same_dtype("value", value, "query", query)
    for name, tensor in (("key", key), ("value", value)):
        checks.expect_same_device(name, tensor, "query", query)
    checks.expect_shape("key", key, _LAYOUT, query.shape[0], None, None, query.shape[3])
    checks.expect_shape("value", value, _LAYOUT, *key.shape[:3], None)
    for name, tensor in (("query", query), ("value", value)):
        checks.expect_at_least(f"{name}.shape[-1] (head_dim)", tensor.shape[-1], 1)
    if enable_gqa:
        checks.expect_head_ratio("query", query.shape[1], "key", key.shape[1])
    elif query.shape[1] != key.shape[1]:
        raise ValueError(f"key: expected {query.shape[1]} heads as query has, got {key.shape[1]}: set enable_gqa=True")
    q, k, v = (_last_contiguous(x).transpose(1, 2) for x in (query, key, value))
    if attn_mask is None:
        out = _top_left(q, k, v, scale) if is_causal else flash_attention(q, k, v, scale=scale)[0]
        return out.transpose(1, 2)
    if is_causal:
        raise ValueError("attn_mask: expected None along with is_causal=True, got a mask")
    if hasattr(attn_mask, "variant"):  # torch.nn.attention.bias.CausalBias
        queries, keys = (getattr(attn_mask, name) for name in ("seq_len_q", "seq_len_kv"))  # its own shape is another
        if (queries, keys) != (q.shape[1], k.shape[1]):
            raise ValueError(
                f"attn_mask: expected a bias of {q.shape[1]} queries and {k.shape[1]} keys, "
                f"got one of {queries} and {keys}"
            )
        if attn_mask.variant.name == "UPPER_LEFT":
            return _top_left(q, k, v, scale).transpose(1, 2)
        return flash_attention(q, k, v, causal=True, scale=scale)[0].transpose(1, 2)
    return _padded(q, k, v, attn_mask, scale).transpose(1, 2)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _top_left(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    Sq, Sk = q.shape[1], k.shape[1]
    if Sk >= Sq:  # no query sees the keys from Sq on
        return flash_attention(q, k[:, :Sq], v[:, :Sq], causal=True, scale=scale)[0]
    return flash_attention(q, k, v, window_right=Sq - Sk, scale=scale)[0]


def _padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Attention to the real keys of each row: what lies around them becomes sequences without queries."""
    B, Sq, _, _ = q.shape
    Sk = k.shape[1]
    # Dimensions are counted from the last, as torch broadcasts them: [B, Sk] would be a row for each query.
    shape = (*[1] * (4 - mask.dim()), *mask.shape)
    if mask.dtype != torch.bool or shape not in ((1, 1, 1, Sk), (B, 1, 1, Sk)):
        raise ValueError(
            f"attn_mask: expected bool [batch or 1, 1, 1, seqlen] = [{B}, 1, 1, {Sk}], got {mask.dtype} "
            f"{list(mask.shape)}: padding [batch, seqlen] is mask[:, None, None], a full matrix is what "
            "kvops never holds, use torch.nn.functional.scaled_dot_product_attention with it"
        )
    if Sk == 0:  # an empty mask
        return flash_attention(q, k, v, scale=scale)[0]
    real = mask.reshape(-1, Sk).expand(B, Sk)
    place = torch.arange(Sk, device=mask.device)
    first = torch.where(real, place, Sk).amin(1)
    end = torch.where(real, place + 1, 0).amax(1)
    first = torch.minimum(first, end)
    gapless = (real.sum(1) == end - first).all()
    if torch.compiler.is_compiling():
        torch._assert_async(gapless, "attn_mask: expected padding at the ends of each row only")
    elif not gapless:
        raise ValueError(
            "attn_mask: expected padding at the ends of each row only, got padding between tokens: use "
            "torch.nn.functional.scaled_dot_product_attention with it"
        )
    rows = torch.arange(B, device=mask.device)[:, None]
    cu_q = rows * Sq + torch.tensor([0, Sq, Sq], device=mask.device)
    cu_k = rows * Sk + torch.stack([first, end, torch.full_like(end, Sk)], 1)
    cu_seqlens_q, cu_seqlens_k = (F.pad(cu.flatten(), (1, 0)).to(torch.int32) for cu in (cu_q, cu_k))
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out, _ = flash_attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, Sq, Sk, scale=scale)
    return out.unflatten(0, (B, Sq))
