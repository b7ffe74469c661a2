"""Dense attention: schemas, checks, fakes, gradients and the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvops import checks
from kvops.eager import attention as eager
from kvops.ops.dense import (
    DENSE,
    check_bias,
    check_options,
    check_queries_and_keys,
    check_rows,
    check_tokens,
    check_values,
    seed_for,
)
from kvops.ops.gradients import attention_gradients, register_gradient
from kvops.ops.registry import caller, register
from kvops.ops.transforms import allow_transforms, fold_dense

OPTIONS = (
    "bool causal=False, int window_left=-1, int window_right=-1, float? scale=None, float softcap=0.0, "
    "Tensor? sinks=None, Tensor? alibi_slopes=None"
)
DROPOUT = "float dropout_p=0.0, Tensor? dropout_seed=None"
# The gradient of a bias needs no sinks: lse has them.
BIAS_OPTIONS = OPTIONS.replace("Tensor? sinks=None, ", "")


def _check_forward(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, **options: Any) -> None:
    check_queries_and_keys(q, k, DENSE)
    check_values(v, k, q, DENSE)
    check_options(q, q.shape[0], **options)
    if bias is not None:
        check_bias(bias, q, k.shape[1])


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


def _check_bias_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor, **options: Any
) -> None:
    _check_backward(dout, q, k, v, out, lse, bias=bias, **options)
    if bias.dtype == torch.bool:
        raise TypeError("bias: expected a float dtype, got bool: a mask has no gradient")


def _fake_bias_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor, **options: Any
) -> Tensor:
    return bias.new_empty(bias.shape)


_forward_op = register(
    f"flash_attention(Tensor q, Tensor k, Tensor v, *, {OPTIONS}, Tensor? bias=None, {DROPOUT}) -> (Tensor, Tensor)",
    check=_check_forward,
    fake=_fake_forward,
    eager=eager.flash_attention,
    kernel="kvops.kernels.flash_forward:flash_forward",
    differentiable=True,
    autocast=("q", "k", "v"),
)

_backward_op = register(
    f"flash_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, *, {OPTIONS}, "
    f"Tensor? dlse=None, Tensor? bias=None, {DROPOUT}) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=_fake_backward,
    eager=eager.flash_attention_backward,
    kernel="kvops.kernels.flash_backward_launch:flash_backward",
)

_bias_backward_op = register(
    "flash_attention_bias_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor bias, *, "
    f"{BIAS_OPTIONS}, Tensor? dlse=None, {DROPOUT}) -> Tensor",
    check=_check_bias_backward,
    fake=_fake_bias_backward,
    eager=eager.flash_attention_bias_backward,
    kernel="kvops.kernels.flash_backward_bias:flash_bias_backward",
)


register_gradient(_forward_op, _backward_op, _bias_backward_op)
allow_transforms(_forward_op, attention_gradients((_backward_op, _bias_backward_op)), fold_dense)
allow_transforms(_backward_op, fold=fold_dense)
allow_transforms(_bias_backward_op)
_call_forward, _call_backward, _call_bias_backward = map(caller, (_forward_op, _backward_op, _bias_backward_op))


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
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention without the matrix of scores in memory, differentiable in q, k, v, sinks and
    bias.

    Scale, softcap, ALiBi, bias and mask apply to scores in this order; sinks join the denominator only. Query i has
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
        alibi_slopes: ``[Hq]`` or ``[B, Hq]``; adds ``-slope * |distance|``.
        bias: a bool mask (True: may attend) or a float tensor that is added to the scores, of any shape that broadcasts
            to ``[B, Hq, Sq, Sk]`` and any strides; it is read in place. -inf hides a key, and so does a number below
            -2.3e38 (the lowest one of float32, for instance). Its gradient has its own shape: pass dimensions of size 1
            instead of expanded ones, and the gradient is summed over them.
        dropout_p: the share of probabilities that is dropped, 0 <= dropout_p < 1, and the others are divided by
            ``1 - dropout_p``. lse stays that of attention without dropout.
        dropout_seed: int64 ``[1]`` on the device of q: equal seeds drop the same. None draws one with
            :func:`torch.randint`, which :func:`torch.manual_seed` repeats; ``torch.ops.kvops.flash_attention`` draws
            none and needs one.

    Returns:
        out ``[B, Sq, Hq, Dv]`` in the dtype of q and lse ``[B, Hq, Sq]``, float32: the natural logarithm of the
        softmax's denominator. A row that sees no key has out 0 and lse -inf; a score that is NaN makes its row NaN.

    Raises:
        ValueError: shapes, strides, devices or values that do not fit.
        TypeError: dtypes that do not fit.

    FlashAttention (Dao et al., 2022, arXiv:2205.14135; Dao, 2023, arXiv:2307.08691); ALiBi (Press et al., 2021,
    arXiv:2108.12409); sinks in the denominator as in GPT-OSS (Xiao et al., 2023, arXiv:2309.17453).
    """
    return _call_forward(
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
        bias=bias,
        dropout_p=dropout_p,
        dropout_seed=seed_for(dropout_p, dropout_seed, q),
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
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of :func:`flash_attention`, deterministic: the same bits for the same input.

    Args:
        dout: ``[B, Sq, Hq, Dv]``, the gradient of out, in the dtype of q.
        q, k, v: the inputs of the forward.
        out, lse: its results.
        dlse: ``[B, Hq, Sq]``, float32: the gradient of lse, None for 0.
        causal, window_left, window_right, scale, softcap, sinks, alibi_slopes, bias: as in the forward.
        dropout_p, dropout_seed: as in the forward, which must have been given the seed.

    Returns:
        dq, dk, dv, contiguous, in the shapes and dtypes of q, k and v, and dsinks, like sinks (float32 ``[0]`` without
        sinks). There is no gradient of a gradient. :func:`flash_attention_bias_backward` has that of
        the bias.

    Raises:
        ValueError, TypeError: as :func:`flash_attention`.
    """
    return _call_backward(
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
        bias=bias,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )


def flash_attention_bias_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor,
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
    """The gradient of :func:`flash_attention` for its bias, deterministic: every sum has a fixed order.

    Nothing of size ``[B, Hq, Sq, Sk]`` is stored unless ``bias`` has that shape.

    Args:
        dout, q, k, v, out, lse, dlse: as :func:`flash_attention_backward` takes them.
        bias: a float tensor; what it broadcasts over, its gradient is summed over.
        causal, window_left, window_right, scale, softcap, alibi_slopes, dropout_p, dropout_seed: as in the forward.
            Sinks are in lse.

    Returns:
        dbias, contiguous, in the shape and dtype of bias.

    Raises:
        ValueError, TypeError: as :func:`flash_attention`; TypeError for a bool mask, which has no gradient.
    """
    return _call_bias_backward(  # type: ignore[no-any-return]
        dout,
        q,
        k,
        v,
        out,
        lse,
        bias,
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
