"""``torch.func`` over the differentiable operators: grad, vjp and jacrev through their gradients, vmap over a batch.

A call under a transform arrives at :class:`_Transformed`, which torch takes through one transform after another. Calls
without transforms never come here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvops.ops.gradients import last_contiguous, no_second_derivative
from kvops.ops.registry import register_transforms
from kvops.private_torch import schema_of

Values = dict[str, Any]
"""The arguments of an operator by name, without those that were not given."""
Gradient = Callable[[Values, Sequence[Tensor], Sequence[Tensor | None], set[str]], Values]
"""Values, results, gradients of the results and the names that need one -> gradients by name."""
Fold = Callable[[Values, dict[str, int | None], int], tuple[Values, bool] | None]
"""Values, the mapped dimension of each tensor (or None) and its size -> values with it at the front of the batch, and
whether there is a batch besides it. None to call the operator once for each mapped element."""


class _Call:
    """An operator with the arguments that are no tensors, and the names of those that are."""

    def __init__(self, operator: Any, gradient: Gradient | None, fold: Fold | None, values: Values) -> None:
        self.operator, self.gradient, self.fold = operator, gradient, fold
        self.names = [name for name, value in values.items() if isinstance(value, Tensor)]
        self.rest = {name: value for name, value in values.items() if not isinstance(value, Tensor)}

    def values(self, tensors: Sequence[Tensor]) -> Values:
        return self.rest | dict(zip(self.names, tensors, strict=True))


def _transformed(operator: Any, gradient: Gradient | None, fold: Fold | None, values: Values) -> Any:
    """Call the operator under the transforms that are active here."""
    call = _Call(operator, gradient, fold, values)
    return _Transformed.apply(call, *(values[name] for name in call.names))


class _Transformed(torch.autograd.Function):
    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> Any:
        results = call.operator(**call.values(tensors))
        if isinstance(results, Tensor):
            return results
        # Autograd refuses operations in place on a view that a function returns.
        return tuple(x.detach() if x._is_view() else x for x in results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors, *((output,) if isinstance(output, Tensor) else output))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        call = ctx.call
        if call.gradient is None:
            raise no_second_derivative(call.operator)
        if all(gradient is None for gradient in gradients):
            return (None,) * (1 + len(call.names))
        tensors, results = ctx.saved_tensors[: len(call.names)], ctx.saved_tensors[len(call.names) :]
        needed = {name for name, needs in zip(call.names, ctx.needs_input_grad[1:], strict=True) if needs}
        found = call.gradient(call.values(tensors), results, gradients, needed)
        return None, *(found.get(name) for name in call.names)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], call: _Call, *tensors: Tensor) -> tuple[Any, Any]:
        dims, size = dict(zip(call.names, in_dims[1:], strict=True)), info.batch_size
        values = call.values(tensors)
        folded = None if call.fold is None else call.fold(values, dims, size)
        if folded is not None:
            mapped, batched = folded
            whole = _transformed(call.operator, call.gradient, call.fold, mapped)
            # An empty result, the gradient of no sinks, has no batch.
            out_dims = tuple(None if x.dim() == 1 else 0 for x in whole)
            if batched:
                whole = tuple(x if x.dim() == 1 else x.unflatten(0, (size, x.shape[0] // size)) for x in whole)
            return whole, out_dims
        rows = []
        for row in range(size):
            own = {name: values[name].select(dim, row) for name, dim in dims.items() if dim is not None}
            rows.append(_transformed(call.operator, call.gradient, call.fold, values | own))
        if isinstance(rows[0], Tensor):
            return torch.stack(rows), 0
        return tuple(map(torch.stack, zip(*rows, strict=True))), (0,) * len(rows[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        name = schema_of(ctx.call.operator).name.removeprefix("kvops::")
        raise RuntimeError(
            f"kvops.{name} has no forward-mode derivative (jvp): differentiate backwards with torch.func.grad or vjp"
        )


def mapped_first(value: Tensor, dim: int | None, size: int) -> Tensor:
    """``value`` with the mapped dimension in front; the same ``size`` times where it has none."""
    return value[None].expand(size, *value.shape) if dim is None else value.movedim(dim, 0)


def into_batch(value: Tensor) -> Tensor:
    return last_contiguous(value.flatten(0, 1))


def fold_dense(values: Values, dims: dict[str, int | None], size: int) -> tuple[Values, bool] | None:
    """The mapped dimension as part of the batch of dense attention. Sinks have no batch, and in a larger batch dropout
    would number its entries in another way."""
    if values.get("dropout_p"):
        return None
    if size == 0 or dims.get("sinks") is not None or ("dout" in values and values.get("sinks") is not None):
        return None
    folded = dict(values)
    for name in ("q", "k", "v", "dout", "out", "lse", "dlse"):
        if values.get(name) is not None:
            folded[name] = into_batch(mapped_first(values[name], dims[name], size))
    batch = folded["q"].shape[0] // size
    for name, rank in (("alibi_slopes", 2), ("bias", 4)):
        value, dim = values.get(name), dims.get(name)
        if value is None or (dim is None and (value.dim() < rank or (name == "bias" and value.shape[0] == 1))):
            continue  # none, or the same one for the whole batch
        value = mapped_first(value, dim, size)
        value = value.view(size, *(1,) * (rank + 1 - value.dim()), *value.shape[1:])
        folded[name] = into_batch(value.expand(size, batch, *value.shape[2:]))
    return folded, True


def allow_transforms(operator: Any, gradient: Gradient | None = None, fold: Fold | None = None) -> None:
    """Let ``operator`` run under ``torch.func``'s transforms. Without a ``gradient`` it is a backward itself, and is
    refused where it is to be differentiated; without a ``fold``, vmap calls it once for each mapped element."""
    names = [argument.name for argument in schema_of(operator).arguments]

    def on_transform(*args: Any, **kwargs: Any) -> Any:
        return _transformed(operator, gradient, fold, dict(zip(names, args, strict=False)) | kwargs)

    register_transforms(operator, on_transform)
