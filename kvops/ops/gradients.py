"""Gradients of attention operators: autograd functions that call the backward operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvops.ops.registry import register_autograd
from kvops.private_torch import schema_of


def last_contiguous(gradient: Tensor) -> Tensor:
    """A copy with a contiguous last dimension. Autograd passes expanded gradients, for instance of a sum.

    ``contiguous()`` returns an empty expanded tensor unchanged, so it does not suffice.
    """
    return gradient if gradient.stride(-1) == 1 else gradient.clone(memory_format=torch.contiguous_format)


class _FirstDerivative(torch.autograd.Function):
    """A backward operator whose result is part of a graph. The graph ends here."""

    @staticmethod
    def forward(ctx: Any, backward: Any, names: tuple[str, ...], *values: Any) -> Any:
        ctx.name = schema_of(backward).name.removeprefix("kvops::").removesuffix("_backward").removesuffix("_bias")
        positional = len(values) - len(names)
        return backward(*values[:positional], **dict(zip(names, values[positional:], strict=True)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        raise RuntimeError(
            f"kvops.{ctx.name} has no second derivative, only the first (which create_graph=True may ask for): detach "
            "its gradient, or compute this loss with attention written in plain torch"
        )


def first_derivative(backward: Any, *args: Any, **keywords: Any) -> Any:
    """Call the operator ``backward``; under ``create_graph=True`` its result refuses to be differentiated."""
    if not torch.is_grad_enabled():
        return backward(*args, **keywords)
    return _FirstDerivative.apply(backward, tuple(keywords), *args, *keywords.values())


class _Attention(torch.autograd.Function):
    """``layout`` holds the operator's arguments between v and the keywords: the sequence lengths of packed inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        forward: Any,
        backwards: tuple[Any, Any],
        layout: tuple[Any, ...],
        options: dict[str, Any],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        alibi_slopes: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if alibi_slopes is not None and alibi_slopes.requires_grad:
            raise RuntimeError("alibi_slopes: expected a tensor without gradient (slopes are not learned), detach it")
        biased = {} if bias is None else {"bias": bias}
        results = forward(q, k, v, *layout, sinks=sinks, alibi_slopes=alibi_slopes, **biased, **options)
        # Autograd refuses operations in place on a view that a function returns.
        out, lse = (x.detach() if x._is_view() else x for x in results)
        ctx.save_for_backward(
            q, k, v, out, lse, sinks, alibi_slopes, bias, *(x for x in layout if isinstance(x, Tensor))
        )
        ctx.lengths = tuple(x for x in layout if not isinstance(x, Tensor))
        ctx.backwards, ctx.options = backwards, options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        dout, dlse = gradients
        q, k, v, out, lse, sinks, alibi_slopes, bias, *cu_seqlens = ctx.saved_tensors
        nothing = (None,) * 4
        if dout is None and dlse is None:
            return (*nothing, None, None, None, None, None, None)
        given = torch.zeros_like(out) if dout is None else last_contiguous(dout), q, k, v, out, lse
        options = ctx.options | {
            "alibi_slopes": alibi_slopes,
            "dlse": None if dlse is None else last_contiguous(dlse),
        }
        backward, bias_backward = ctx.backwards
        biased = {} if bias is None else {"bias": bias}
        dq, dk, dv, dsinks = first_derivative(
            backward, *given, *cu_seqlens, *ctx.lengths, sinks=sinks, **biased, **options
        )
        dbias = first_derivative(bias_backward, *given, bias, **options) if ctx.needs_input_grad[9] else None
        return (*nothing, dq, dk, dv, None if sinks is None else dsinks, None, dbias)


def register_gradient(forward: Any, backward: Any, bias_backward: Any = None) -> None:
    """Make ``forward`` differentiable through ``backward``, and in its bias through ``bias_backward``."""

    def apply(
        below: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *layout: Any,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        bias: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        backwards = backward, bias_backward
        return _Attention.apply(below, backwards, layout, options, q, k, v, sinks, alibi_slopes, bias)

    register_autograd(forward, apply)
