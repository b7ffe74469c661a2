"""Dense attention: schemas, checks, fakes, gradients and the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvops import checks
from kvops.eager import attention as eager
from kvops.ops.dense import DENSE, check_options, check_queries_and_keys, check_rows, check_tokens, check_values
from kvops.ops.registry import LIBRARY, register

_OPTIONS = (
    "bool causal=False, int window_left=-1, int window_right=-1, float? scale=None, float softcap=0.0, "
    "Tensor? sinks=None, Tensor? alibi_slopes=None"
)


def _check_forward(
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
    check_queries_and_keys(q, k, DENSE)
    check_values(v, k, q, DENSE)
    check_options(q, q.shape[0], window_left, window_right, softcap, sinks, alibi_slopes)


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
    f"flash_attention(Tensor q, Tensor k, Tensor v, *, {_OPTIONS}) -> (Tensor, Tensor)",
    check=_check_forward,
    fake=_fake_forward,
    eager=eager.flash_attention,
    kernel="kvops.kernels.flash_forward:flash_forward",
    differentiable=True,
)

_backward_op = register(
    f"flash_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, *, {_OPTIONS}, "
    "Tensor? dlse=None) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=_fake_backward,
    eager=eager.flash_attention_backward,
    kernel="kvops.kernels.flash_backward:flash_backward",
)


def _dense_last(gradient: Tensor) -> Tensor:
    """Autograd hands in expanded gradients (of a sum, say); the operator wants the last dimension contiguous."""
    return gradient if gradient.stride(-1) == 1 else gradient.contiguous()


class _Attention(torch.autograd.Function):
    """The gradient of an attention operator.

    Written out: ``torch.library.register_autograd`` takes no keyword-only tensors, and costs 33 µs a call against 20.
    ``layout`` holds the operator's arguments between v and the keywords: the sequence lengths of packed inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        forward: Any,
        backward: Any,
        layout: tuple[Any, ...],
        options: dict[str, Any],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        alibi_slopes: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if alibi_slopes is not None and alibi_slopes.requires_grad:
            raise RuntimeError("alibi_slopes: expected a tensor without gradient (slopes are not learned), detach it")
        out, lse = forward(q, k, v, *layout, sinks=sinks, alibi_slopes=alibi_slopes, **options)
        ctx.save_for_backward(q, k, v, out, lse, sinks, alibi_slopes, *(x for x in layout if isinstance(x, Tensor)))
        ctx.lengths = tuple(x for x in layout if not isinstance(x, Tensor))
        ctx.backward_op, ctx.options = backward, options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        dout, dlse = gradients
        q, k, v, out, lse, sinks, alibi_slopes, *cu_seqlens = ctx.saved_tensors
        nothing = (None,) * 4
        if dout is None and dlse is None:
            return (*nothing, None, None, None, None, None)
        dq, dk, dv, dsinks = ctx.backward_op(
            torch.zeros_like(out) if dout is None else _dense_last(dout),
            q,
            k,
            v,
            out,
            lse,
            *cu_seqlens,
            *ctx.lengths,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            dlse=None if dlse is None else _dense_last(dlse),
            **ctx.options,
        )
        return (*nothing, dq, dk, dv, None if sinks is None else dsinks, None)


def _register_gradient(forward: Any, backward: Any) -> None:
    """Make ``forward`` differentiable through ``backward``."""

    def on_autograd(
        keyset: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *layout: Any,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        below = keyset & torch._C._after_autograd_keyset

        def redispatch(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            with torch._C._AutoDispatchBelowAutograd():
                return forward.redispatch(below, *args, **kwargs)

        inputs = (q, k, v, sinks, alibi_slopes)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
            return _Attention.apply(redispatch, backward, layout, options, *inputs)
        return redispatch(q, k, v, *layout, sinks=sinks, alibi_slopes=alibi_slopes, **options)

    LIBRARY.impl(forward._schema.name.split("::")[1], on_autograd, "Autograd", with_keyset=True)


_register_gradient(_forward_op, _backward_op)


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

    Scores pass through, in this order: scale, softcap, ALiBi bias, mask; sinks join the denominator only. Query i
    stands at position ``i + Sk - Sq`` (aligned to the bottom right).

    Args:
        q: ``[B, Sq, Hq, D]``, float16, bfloat16 or float32; any strides but the last.
        k: ``[B, Sk, Hkv, D]``; query head h reads head ``h // (Hq // Hkv)``.
        v: ``[B, Sk, Hkv, Dv]``.
        causal: a query sees no key after its own position.
        window_left: how many keys before its own position a query sees, -1 for no limit.
        window_right: how many keys after its own position a query sees, -1 for no limit.
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
