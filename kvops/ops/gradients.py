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
        ctx.name = schema_of(backward).name.removeprefix("kvops::").removesuffix("_backward")
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
        results = forward(q, k, v, *layout, sinks=sinks, alibi_slopes=alibi_slopes, **options)
        # Autograd refuses operations in place on a view that a function returns.
        out, lse = (x.detach() if x._is_view() else x for x in results)
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
        dq, dk, dv, dsinks = first_derivative(
            ctx.backward_op,
            torch.zeros_like(out) if dout is None else last_contiguous(dout),
            q,
            k,
            v,
            out,
            lse,
            *cu_seqlens,
            *ctx.lengths,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            dlse=None if dlse is None else last_contiguous(dlse),
            **ctx.options,
        )
        return (*nothing, dq, dk, dv, None if sinks is None else dsinks, None)


def register_gradient(forward: Any, backward: Any) -> None:
    """Make ``forward`` differentiable through ``backward``."""

    def apply(
        below: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *layout: Any,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        return _Attention.apply(below, backward, layout, options, q, k, v, sinks, alibi_slopes)

    register_autograd(forward, apply)
