"""How an attention operator gets its gradient: an Autograd-key implementation that calls the backward operator.

Written out: ``torch.library.register_autograd`` takes no keyword-only tensors, and costs 33 µs a call against 20.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvops.ops.registry import LIBRARY


def last_contiguous(gradient: Tensor) -> Tensor:
    """Autograd hands in expanded gradients (of a sum, say); the operators want the last dimension contiguous.

    A copy, as ``contiguous()`` returns an empty expanded tensor as it is.
    """
    return gradient if gradient.stride(-1) == 1 else gradient.clone(memory_format=torch.contiguous_format)


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
    name = forward._schema.name.replace("::", ".")

    def on_autograd(keyset: Any, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{name} does not run under torch.func's transforms (grad, vjp, jacrev): use torch.autograd.grad"
            )
        below = keyset & torch._C._after_autograd_keyset
        inputs = (*args[:3], options.get("sinks"), options.get("alibi_slopes"))
        if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)):
            with torch._C._AutoDispatchBelowAutograd():
                return forward.redispatch(below, *args, **options)

        def redispatch(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
            with torch._C._AutoDispatchBelowAutograd():
                return forward.redispatch(below, *args, **options)

        options = {name: value for name, value in options.items() if name not in ("sinks", "alibi_slopes")}
        return _Attention.apply(redispatch, backward, args[3:], options, *inputs)

    LIBRARY.impl(forward._schema.name.split("::")[1], on_autograd, "Autograd", with_keyset=True)
