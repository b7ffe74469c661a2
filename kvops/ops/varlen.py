"""Attention over packed sequences: schemas, checks, fakes, the gradient and the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvops import checks
from kvops.eager import varlen as eager
from kvops.ops.attention import BIAS_OPTIONS, DROPOUT, OPTIONS
from kvops.ops.dense import (
    PACKED,
    check_bias,
    check_lengths,
    check_lengths_data,
    check_options,
    check_queries_and_keys,
    check_rows,
    check_tokens,
    check_values,
    seed_for,
)
from kvops.ops.gradients import attention_gradients, register_gradient
from kvops.ops.registry import caller, register
from kvops.ops.transforms import allow_transforms

_LENGTHS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"


def _check_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    bias: Tensor | None = None,
    **options: Any,
) -> None:
    check_queries_and_keys(q, k, PACKED)
    check_values(v, k, q, PACKED)
    check_lengths(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    check_options(q, cu_seqlens_q.shape[0] - 1, **options)
    if bias is not None:
        check_bias(bias, q, max_seqlen_k)


def _check_forward_data(q: Tensor, k: Tensor, v: Tensor, *lengths: Any, **options: Any) -> None:
    check_lengths_data(len(q), len(k), *lengths)


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    Tq, Hq, _ = q.shape
    return q.new_empty(Tq, Hq, v.shape[2]), q.new_empty(Hq, Tq, dtype=torch.float32)


def _check_backward(
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
) -> None:
    _check_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)
    for name, tensor in (("dout", dout), ("out", out)):
        check_tokens(name, tensor, PACKED, q)
        checks.expect_shape(name, tensor, PACKED, *q.shape[:2], v.shape[2])
    check_rows("lse", lse, q)
    if dlse is not None:
        check_rows("dlse", dlse, q)


def _check_backward_data(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *lengths: Any, **options: Any
) -> None:
    check_lengths_data(len(q), len(k), *lengths)


def _fake_backward(
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
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks = options.get("sinks")
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(0, dtype=torch.float32) if sinks is None else torch.empty_like(sinks)


def _check_bias_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor, *lengths: Any, **options: Any
) -> None:
    _check_backward(dout, q, k, v, out, lse, *lengths, bias=bias, **options)
    if bias.dtype == torch.bool:
        raise TypeError("bias: expected a float dtype, got bool: a mask has no gradient")


def _check_bias_backward_data(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor, *lengths: Any, **options: Any
) -> None:
    check_lengths_data(len(q), len(k), *lengths)


def _fake_bias_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor, *lengths: Any, **options: Any
) -> Tensor:
    return bias.new_empty(bias.shape)


_forward_op = register(
    f"flash_attention_varlen(Tensor q, Tensor k, Tensor v, {_LENGTHS}, *, {OPTIONS}, Tensor? bias=None, "
    f"{DROPOUT}) -> (Tensor, Tensor)",
    check=_check_forward,
    check_data=_check_forward_data,
    fake=_fake_forward,
    eager=eager.flash_attention_varlen,
    kernel="kvops.kernels.flash_forward:flash_forward_varlen",
    differentiable=True,
    autocast=("q", "k", "v"),
)

_backward_op = register(
    "flash_attention_varlen_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_LENGTHS}, *, {OPTIONS}, Tensor? dlse=None, Tensor? bias=None, {DROPOUT}) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check_backward,
    check_data=_check_backward_data,
    fake=_fake_backward,
    eager=eager.flash_attention_varlen_backward,
    kernel="kvops.kernels.flash_backward_launch:flash_backward_varlen",
)

_bias_backward_op = register(
    "flash_attention_varlen_bias_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"Tensor bias, {_LENGTHS}, *, {BIAS_OPTIONS}, Tensor? dlse=None, {DROPOUT}) -> Tensor",
    check=_check_bias_backward,
    check_data=_check_bias_backward_data,
    fake=_fake_bias_backward,
    eager=eager.flash_attention_varlen_bias_backward,
    kernel="kvops.kernels.flash_backward_bias:flash_bias_backward_varlen",
)

register_gradient(_forward_op, _backward_op, _bias_backward_op)
allow_transforms(
    _forward_op,
    attention_gradients(
        (_backward_op, _bias_backward_op), layout=("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    ),
)
allow_transforms(_backward_op)
allow_transforms(_bias_backward_op)
_call_forward, _call_backward, _call_bias_backward = map(caller, (_forward_op, _backward_op, _bias_backward_op))


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`kvops.flash_attention` over packed sequences, differentiable in q, k, v, sinks and bias.

    Args:
        q: ``[Tq, Hq, D]``, float16, bfloat16 or float32; any strides but the last.
        k: ``[Tk, Hkv, D]``.
        v: ``[Tk, Hkv, Dv]``.
        cu_seqlens_q: int32 ``[B + 1]``, 0 and then the end of each sequence of queries.
        cu_seqlens_k: the same for the keys. Either side of a sequence may be empty.
        max_seqlen_q: the length of the longest sequence of queries, or more.
        max_seqlen_k: the length of the longest sequence of keys, or more.
        causal, window_left, window_right, scale, softcap, sinks: as in :func:`kvops.flash_attention`; positions are
            aligned to the bottom right within each sequence.
        alibi_slopes: ``[Hq]`` or ``[B, Hq]``.
        bias: a bool mask or a float tensor as in :func:`kvops.flash_attention`, of any shape that broadcasts to ``[Hq,
            Tq, max_seqlen_k]``: its rows are those of q, and column j is key j of the query's own sequence.
        dropout_p, dropout_seed: as in :func:`kvops.flash_attention`. A sequence drops what the same entry of a dense
            batch does.

    Returns:
        out ``[Tq, Hq, Dv]`` in the dtype of q and lse ``[Hq, Tq]``, float32. A token that sees no key, or comes after
        the last sequence, has out 0 and lse -inf.

    Raises:
        ValueError: shapes, strides, devices or values that do not fit. Lengths are checked on the CPU; on a GPU only
            with ``KVOPS_DEBUG=1``, because it synchronises.
        TypeError: dtypes that do not fit.
    """
    return _call_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        bias=bias,
        dropout_p=dropout_p,
        dropout_seed=seed_for(dropout_p, dropout_seed, q),
    )


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
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dlse: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of :func:`flash_attention_varlen`, deterministic: the same bits for the same input.

    Args:
        dout: ``[Tq, Hq, Dv]``, the gradient of out, in the dtype of q.
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: the inputs of the forward.
        out, lse: its results.
        dlse: ``[Hq, Tq]``, float32: the gradient of lse, None for 0.
        causal, window_left, window_right, scale, softcap, sinks, alibi_slopes, bias: as in the forward.
        dropout_p, dropout_seed: as in the forward, which must have been given the seed.

    Returns:
        dq, dk, dv, contiguous, in the shapes and dtypes of q, k and v, and dsinks, like sinks (float32 ``[0]`` without
        sinks). :func:`flash_attention_varlen_bias_backward` has the gradient of the bias.

    Raises:
        ValueError, TypeError: as :func:`flash_attention_varlen`.
    """
    return _call_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        dlse=dlse,
        bias=bias,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )


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
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dlse: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """The gradient of :func:`flash_attention_varlen` for its bias, deterministic: every sum has a fixed order.

    Args:
        dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as
            :func:`flash_attention_varlen_backward` takes them, q as ``[Tq, Hq, D]``.
        bias: a float tensor; what it broadcasts over, its gradient is summed over.
        causal, window_left, window_right, scale, softcap, alibi_slopes, dropout_p, dropout_seed: as in the forward.
            Sinks are in lse.

    Returns:
        dbias, contiguous, in the shape and dtype of bias.

    Raises:
        ValueError, TypeError: as :func:`flash_attention_varlen`; TypeError for a bool mask, which has no gradient.
    """
    return _call_bias_backward(  # type: ignore[no-any-return]
        dout,
        q,
        k,
        v,
        out,
        lse,
        bias,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dlse=dlse,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )
