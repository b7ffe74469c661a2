"""Dense attention: schemas, checks, fakes, gradients and the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvops import checks
from kvops.eager import attention as eager
from kvops.ops.dense import DENSE, check_options, check_queries_and_keys, check_rows, check_tokens, check_values
from kvops.ops.gradients import register_gradient
from kvops.ops.registry import register

OPTIONS = (
    "bool causal=False, int window_left=-1, int window_right=-1, float? scale=None, float softcap=0.0, "
    "Tensor? sinks=None, Tensor? alibi_slopes=None"
)


def _check_forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    check_queries_and_keys(q, k, DENSE)
    check_values(v, k, q, DENSE)
    check_options(q, q.shape[0], **options)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    B, Sq, Hq, _ = q.shape
    return q.new_empty(B, Sq, Hq, v.shape[3]), q.new_empty(B, Hq, Sq, dtype=torch.float32)


def _check_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    dlse: Tensor | None = None,
    **options: Any,
) -> None:
    _check_forward(q, k, v, **options)
    for name, tensor in (("dout", dout), ("out", out)):
        check_tokens(name, tensor, DENSE, q)
        checks.expect_shape(name, tensor, DENSE, *q.shape[:3], v.shape[3])
    check_rows("lse", lse, q)
    if dlse is not None:
        check_rows("dlse", dlse, q)


def _fake_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks = options.get("sinks")
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dsinks = q.new_empty(0, dtype=torch.float32) if sinks is None else torch.empty_like(sinks)
    return dq, dk, dv, dsinks


_forward_op = register(
    f"flash_attention(Tensor q, Tensor k, Tensor v, *, {OPTIONS}) -> (Tensor, Tensor)",
    check=_check_forward,
    fake=_fake_forward,
    eager=eager.flash_attention,
    kernel="kvops.kernels.flash_forward:flash_forward",
    differentiable=True,
    autocast=("q", "k", "v"),
)

_backward_op = register(
    f"flash_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, *, {OPTIONS}, "
    "Tensor? dlse=None) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=_fake_backward,
    eager=eager.flash_attention_backward,
    kernel="kvops.kernels.flash_backward_launch:flash_backward",
)


register_gradient(_forward_op, _backward_op)


def flash_attention(
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
) -> tuple[Tensor, Tensor]:
    """Exact attention without the matrix of scores in memory, differentiable in q, k, v and sinks.

    Scale, softcap, ALiBi bias and mask apply to scores in this order; sinks join the denominator only. Query i has
    position ``i + Sk - Sq`` (aligned to the bottom right).

    Args:
        q: ``[B, Sq, Hq, D]``, float16, bfloat16 or float32; any strides but the last.
        k: ``[B, Sk, Hkv, D]``; query head h reads head ``h // (Hq // Hkv)``.
        v: ``[B, Sk, Hkv, Dv]``.
        causal: a query sees no key after its own position.
        window_left: the number of keys before its own position that a query sees, -1 for no limit.
        window_right: the number of keys after its own position that a query sees, -1 for no limit.
        scale: None for ``D ** -0.5``.
        softcap: c > 0 means ``c * tanh(score / c)``.
        sinks: ``[Hq]``, a logit for each head.
        alibi_slopes: ``[Hq]`` or ``[B, Hq]``; the bias is ``-slope * |distance|``.

    Returns:
        out ``[B, Sq, Hq, Dv]`` in the dtype of q and lse ``[B, Hq, Sq]``, float32: the natural logarithm of the
        softmax's denominator. A row that sees no key has out 0 and lse -inf.

    Raises:
        ValueError: shapes, strides, devices or values that do not fit.
        TypeError: dtypes that do not fit.

    FlashAttention (Dao et al., 2022, arXiv:2205.14135; Dao, 2023, arXiv:2307.08691); ALiBi (Press et al., 2021,
    arXiv:2108.12409); sinks in the denominator as in GPT-OSS (Xiao et al., 2023, arXiv:2309.17453).
    """
    return _forward_op(
        q,
        k,
        v,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    )


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
    """The gradient of :func:`flash_attention`, deterministic: the same bits for the same input.

    Args:
        dout: ``[B, Sq, Hq, Dv]``, the gradient of out, in the dtype of q.
        q, k, v: the inputs of the forward.
        out, lse: its results.
        dlse: ``[B, Hq, Sq]``, float32: the gradient of lse, None for 0.
        causal, window_left, window_right, scale, softcap, sinks, alibi_slopes: as in the forward.

    Returns:
        dq, dk, dv, contiguous, in the shapes and dtypes of q, k and v, and dsinks, like sinks (float32 ``[0]`` without
        sinks). There is no gradient of a gradient.

    Raises:
        ValueError, TypeError: as :func:`flash_attention`.
    """
    return _backward_op(
        dout,
        q,
        k,
        v,
        out,
        lse,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        dlse=dlse,
    )
