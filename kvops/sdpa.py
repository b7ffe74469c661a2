"""torch's attention signature on top of the operators."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvops import checks
from kvops.ops.attention import flash_attention
from kvops.ops.varlen import flash_attention_varlen

_LAYOUT = "[..., heads, seqlen, head_dim]"


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
        query: ``[..., Hq, Sq, D]`` with any number of batch dimensions; ``[B, Sq, D]`` and ``[Sq, D]`` for one head.
        key: ``[..., Hkv, Sk, D]``. Batch dimensions broadcast, and heads do if one side has a single one.
        value: ``[..., Hkv, Sk, Dv]``.
        attn_mask: a bool mask (True takes part) or a float bias, differentiable, of any shape that broadcasts to
            ``[..., Hq, Sq, Sk]``; or ``causal_upper_left`` and ``causal_lower_right`` of ``torch.nn.attention.bias``.
            It is read in place. On the CPU a bool mask that is the same for all heads and queries, ``[B, 1, 1, Sk]``,
            is looked at: padding at the ends of each row is skipped.
        dropout_p: the share of probabilities that is dropped, 0 <= dropout_p < 1, as in :func:`kvops.flash_attention`.
            torch drops with other random numbers.
        is_causal: aligned to the **top left** if lengths differ, as in torch: query i sees keys 0 to i.
            (:func:`kvops.flash_attention` aligns to the bottom right.)
        scale: None for ``D ** -0.5``.
        enable_gqa: allow fewer heads of keys and values than of queries.

    Returns:
        ``[..., Hq, Sq, Dv]``; a query that sees no key gives 0.

    Raises:
        ValueError: a ``dropout_p`` of 1, shapes that do not fit.
        TypeError: dtypes that do not fit.
    """
    _check(query, key, value)
    inputs = query, key, value
    rank = max(x.dim() for x in inputs)
    one_head = rank < 4 and not enable_gqa
    wide = [_four_dims(x, rank, one_head) for x in inputs]
    batch = _broadcast_batch(wide)
    q, k, v = (_last_contiguous(x.expand(*batch, -1, -1, -1).flatten(0, -4)) for x in wide)
    q, k, v = (x.transpose(1, 2) for x in _fitting_heads(q, k, v, enable_gqa))
    shape = (*batch, *(() if one_head else q.shape[2:3]), q.shape[1], v.shape[3])[-rank:]

    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p}
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask: expected None along with is_causal=True, got a mask")
    if attn_mask is not None and hasattr(attn_mask, "variant"):  # torch.nn.attention.bias.CausalBias
        queries, keys = (getattr(attn_mask, name) for name in ("seq_len_q", "seq_len_kv"))  # its own shape is another
        if (queries, keys) != (q.shape[1], k.shape[1]):
            raise ValueError(
                f"attn_mask: expected a bias of {q.shape[1]} queries and {k.shape[1]} keys, "
                f"got one of {queries} and {keys}"
            )
        if attn_mask.variant.name == "UPPER_LEFT":
            is_causal = True
        else:
            options["causal"] = True
    elif attn_mask is not None:
        _check_mask(attn_mask, query, (*batch, *(() if one_head else q.shape[2:3]), q.shape[1], k.shape[1])[-rank:])
        bias = _flat_batch(_four_dims(attn_mask, rank, one_head), batch)
        if _is_padding(bias, k.shape[1]):
            return _padded(q, k, v, bias[:, 0, 0], options).transpose(1, 2).reshape(shape)
        options["bias"] = bias
    if is_causal:
        return _top_left(q, k, v, options).transpose(1, 2).reshape(shape)
    return flash_attention(q, k, v, **options)[0].transpose(1, 2).reshape(shape)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    """The checks that need the caller's names, which differ from those of the operators."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.expect_tensor(name, tensor)
        if tensor.dim() < 2:
            raise ValueError(f"{name}: expected at least 2 dimensions {_LAYOUT}, got shape {list(tensor.shape)}")
    kind = query.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):  # which casts to one dtype
        checks.expect_dtype("query", query, *checks.FLOAT_DTYPES)
        checks.expect_same_dtype("key", key, "query", query)
        checks.expect_same_dtype("value", value, "query", query)
    for name, tensor in (("key", key), ("value", value)):
        checks.expect_same_device(name, tensor, "query", query)
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key: expected head_dim {query.shape[-1]} as query has, got shape {list(key.shape)}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value: expected seqlen {key.shape[-2]} as key has, got shape {list(value.shape)}")
    for name, tensor in (("query", query), ("value", value)):
        checks.expect_at_least(f"{name}.shape[-1] (head_dim)", tensor.shape[-1], 1)


def _four_dims(x: Tensor, rank: int, one_head: bool) -> Tensor:
    """A view [..., heads, rows, columns], with 4 dimensions or more, of an input of ``rank`` dimensions or a mask."""
    if one_head:  # [batch, rows, columns]
        return x[(None,) * (3 - x.dim())].unsqueeze(1)
    return x[(None,) * (max(rank, 4) - x.dim())]


def _broadcast_batch(wide: list[Tensor]) -> tuple[int, ...]:
    """The batch dimensions of all inputs together."""
    batch = tuple(wide[0].shape[:-3])
    for name, x in zip(("key", "value"), wide[1:], strict=True):
        try:
            batch = tuple(torch.broadcast_shapes(batch, x.shape[:-3]))
        except RuntimeError:
            raise ValueError(
                f"{name}: expected batch dimensions that broadcast with {list(batch)}, got {list(x.shape[:-3])}"
            ) from None
    return batch


def _fitting_heads(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """[batch, heads, seqlen, head_dim] with one number of heads in k and v, which divides that of q."""
    heads = q.shape[1], k.shape[1], v.shape[1]
    if enable_gqa:
        for name, own in (("key", heads[1]), ("value", heads[2])):
            checks.expect_head_ratio("query", heads[0], name, own)
        if heads[1] != heads[2]:
            k, v = (x.repeat_interleave(heads[0] // x.shape[1], 1) for x in (k, v))
        return q, k, v
    most = heads[0]
    for name, own in (("key", heads[1]), ("value", heads[2])):
        if own != most and 1 not in (own, most):
            raise ValueError(f"{name}: expected {most} heads as query has, got {own}: set enable_gqa=True")
        most = most if own == 1 else own
    if heads[1] != heads[2]:
        k, v = (x.expand(-1, most, -1, -1) for x in (k, v))
    return q.expand(-1, most, -1, -1), k, v


def _check_mask(mask: Tensor, query: Tensor, sizes: tuple[int, ...]) -> None:
    checks.expect_tensor("attn_mask", mask)
    checks.expect_dtype("attn_mask", mask, *dict.fromkeys((torch.bool, torch.float32, query.dtype)))
    checks.expect_same_device("attn_mask", mask, "query", query)
    own = tuple(mask.shape)
    if len(own) > len(sizes) or any(
        size not in (1, whole) for size, whole in zip(reversed(own), reversed(sizes), strict=False)
    ):
        raise ValueError(
            f"attn_mask: expected a shape that broadcasts to the scores, {list(sizes)}, got {list(own)}: padding "
            "[batch, seqlen] is mask[:, None, None]"
        )


def _flat_batch(mask: Tensor, batch: tuple[int, ...]) -> Tensor:
    """[..., heads, rows, columns] -> [1 or B, heads, rows, columns], a view unless it has several batch dimensions and
    is the same in some of them alone."""
    if mask.shape[:-3].numel() == 1:
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*batch, *mask.shape[-3:]).flatten(0, -4)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _top_left(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """Attention in which query i sees keys 0 to i."""
    Sq, Sk = q.shape[1], k.shape[1]
    if Sk >= Sq:  # no query sees the keys from Sq on
        return flash_attention(q, k[:, :Sq], v[:, :Sq], causal=True, **options)[0]
    return flash_attention(q, k, v, window_right=Sq - Sk, **options)[0]


def _is_padding(mask: Tensor, num_keys: int) -> bool:
    """Whether a mask [1 or B, heads, rows, columns] hides keys at the ends of rows and nothing else.

    Its numbers are read, so this is False on a GPU, which would have to be waited for, and in a graph.
    """
    same = all(size == 1 or step == 0 for size, step in zip(mask.shape[1:3], mask.stride()[1:3], strict=True))
    if mask.dtype != torch.bool or not same or mask.numel() == 0 or mask.shape[3] != num_keys:
        return False
    if mask.device.type != "cpu" or not checks.has_data(mask) or torch.compiler.is_compiling():
        return False
    first, end = _ends(mask[:, 0, 0])
    return bool((mask[:, 0, 0].sum(1) == end - first).all())


def _ends(real: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [B]: the first real key of each row of bool [B, Sk], and the one behind the last; equal where none is."""
    place = torch.arange(real.shape[1], device=real.device)
    first = torch.where(real, place, real.shape[1]).amin(1)
    end = torch.where(real, place + 1, 0).amax(1)
    return torch.minimum(first, end), end


def _padded(q: Tensor, k: Tensor, v: Tensor, real: Tensor, options: dict[str, Any]) -> Tensor:
    """Attention to the real keys [1 or B, Sk] of each row: what lies around them becomes sequences without queries."""
    B, Sq, _, _ = q.shape
    Sk = k.shape[1]
    if real.all():
        return flash_attention(q, k, v, **options)[0]
    first, end = _ends(real.expand(B, Sk))
    rows = torch.arange(B, device=real.device)[:, None]
    cu_q = rows * Sq + torch.tensor([0, Sq, Sq], device=real.device)
    cu_k = rows * Sk + torch.stack([first, end, torch.full_like(end, Sk)], 1)
    cu_seqlens_q, cu_seqlens_k = (F.pad(cu.flatten(), (1, 0)).to(torch.int32) for cu in (cu_q, cu_k))
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out, _ = flash_attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, Sq, Sk, **options)
    return out.unflatten(0, (B, Sq))
