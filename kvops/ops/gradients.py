"""Gradients of attention operators: autograd functions that call the backward operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvops.ops.registry import register_autograd
from kvops.private_torch import schema_of, transforms_are_active


def last_contiguous(gradient: Tensor) -> Tensor:
    """A copy with a contiguous last dimension. Autograd passes expanded gradients, for instance of a sum.

    ``contiguous()`` returns an empty expanded tensor unchanged, so it does not suffice.
    """
    return gradient if gradient.stride(-1) == 1 else gradient.clone(memory_format=torch.contiguous_format)


def no_second_derivative(backward: Any) -> RuntimeError:
    name = schema_of(backward).name.removeprefix("kvops::").removesuffix("_backward").removesuffix("_bias")
    return RuntimeError(
        f"kvops.{name} has no second derivative, only the first (which create_graph=True may ask for): detach "
        "its gradient, or compute this loss with attention written in plain torch"
    )


class _FirstDerivative(torch.autograd.Function):
    """A backward operator whose result is part of a graph. The graph ends here."""

    @staticmethod
    def forward(ctx: Any, backward: Any, names: tuple[str, ...], *values: Any) -> Any:
        ctx.operator = backward
        positional = len(values) - len(names)
        return backward(*values[:positional], **dict(zip(names, values[positional:], strict=True)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        raise no_second_derivative(ctx.operator)


def first_derivative(backward: Any, *args: Any, **keywords: Any) -> Any:
    """Call the operator ``backward``; under ``create_graph=True`` its result refuses to be differentiated."""
    if not torch.is_grad_enabled() or transforms_are_active():  # an operator under transforms refuses by itself
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
        dropout_seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if alibi_slopes is not None and alibi_slopes.requires_grad:
            raise _no_gradient_of_slopes()
        given = _given(bias=bias, dropout_seed=dropout_seed)
        results = forward(q, k, v, *layout, sinks=sinks, alibi_slopes=alibi_slopes, **given, **options)
        # Autograd refuses operations in place on a view that a function returns.
        out, lse = (x.detach() if x._is_view() else x for x in results)
        ctx.save_for_backward(
            *(q, k, v, out, lse, sinks, alibi_slopes, bias, dropout_seed),
            *(x for x in layout if isinstance(x, Tensor)),
        )
        ctx.lengths = tuple(x for x in layout if not isinstance(x, Tensor))
        ctx.backwards, ctx.options = backwards, options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        dout, dlse = gradients
        q, k, v, out, lse, sinks, alibi_slopes, bias, dropout_seed, *cu_seqlens = ctx.saved_tensors
        nothing = (None,) * 4
        if dout is None and dlse is None:
            return (*nothing, None, None, None, None, None, None, None)
        dq, dk, dv, dsinks, dbias = _gradients(
            ctx.backwards,
            (torch.zeros_like(out) if dout is None else last_contiguous(dout), q, k, v, out, lse),
            (*cu_seqlens, *ctx.lengths),
            {
                **ctx.options,
                **_given(dropout_seed=dropout_seed),
                "alibi_slopes": alibi_slopes,
                "dlse": None if dlse is None else last_contiguous(dlse),
            },
            sinks,
            bias,
            needs_bias=ctx.needs_input_grad[9],
        )
        return (*nothing, dq, dk, dv, dsinks, None, dbias, None)


def _given(**options: Tensor | None) -> dict[str, Tensor]:
    """The options that are not None: not every operator has all of them."""
    return {name: value for name, value in options.items() if value is not None}


def _gradients(
    backwards: tuple[Any, Any],
    given: tuple[Tensor, ...],
    layout: tuple[Any, ...],
    options: dict[str, Any],
    sinks: Tensor | None,
    bias: Tensor | None,
    *,
    needs_bias: bool,
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv, dsinks and dbias."""
    backward, bias_backward = backwards
    dq, dk, dv, dsinks = first_derivative(backward, *given, *layout, sinks=sinks, **_given(bias=bias), **options)
    dbias = first_derivative(bias_backward, *given, bias, *layout, **options) if needs_bias else None
    return dq, dk, dv, None if sinks is None else dsinks, dbias


def attention_gradients(
    backwards: tuple[Any, Any], layout: Sequence[str] = ()
) -> Callable[[dict[str, Any], Sequence[Tensor], Sequence[Tensor | None], set[str]], dict[str, Any]]:
    """The gradients of attention under ``torch.func``; ``layout`` names the sequence lengths of packed inputs."""

    def gradients(
        values: dict[str, Any], results: Sequence[Tensor], gradients: Sequence[Tensor | None], needed: set[str]
    ) -> dict[str, Any]:
        if "alibi_slopes" in needed:
            raise _no_gradient_of_slopes()
        options = dict(values)
        inputs = tuple(options.pop(name) for name in ("q", "k", "v"))
        lengths = tuple(options.pop(name) for name in layout)
        sinks, bias = options.pop("sinks", None), options.pop("bias", None)
        (out, lse), (dout, dlse) = results, gradients
        dq, dk, dv, dsinks, dbias = _gradients(
            backwards,
            (torch.zeros_like(out) if dout is None else last_contiguous(dout), *inputs, out, lse),
            lengths,
            options | {"dlse": None if dlse is None else last_contiguous(dlse)},
            sinks,
            bias,
            needs_bias="bias" in needed,
        )
        return {"q": dq, "k": dk, "v": dv, "sinks": dsinks, "bias": dbias}

    return gradients


def _no_gradient_of_slopes() -> RuntimeError:
    return RuntimeError("alibi_slopes: expected a tensor without gradient (slopes are not learned), detach it")


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
        dropout_seed: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        backwards = backward, bias_backward
        return _Attention.apply(below, backwards, layout, options, q, k, v, sinks, alibi_slopes, bias, dropout_seed)

    register_autograd(forward, apply)
