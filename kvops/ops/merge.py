"""merge_attention: schema, checks, fake, gradient and the public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvops import checks
from kvops.eager import merge as eager
from kvops.ops.dense import DENSE, PACKED
from kvops.ops.gradients import first_derivative, last_contiguous
from kvops.ops.registry import register, register_autograd
from kvops.ops.transforms import Values, allow_transforms, into_batch, mapped_first


def _check_part(name: str, tensor: Tensor, out_a: Tensor) -> None:
    layout = DENSE if out_a.dim() == 4 else PACKED
    checks.expect_dtype(name, tensor, *checks.FLOAT_DTYPES)
    checks.expect_same_dtype(name, tensor, "out_a", out_a)
    checks.expect_shape(name, tensor, layout, *out_a.shape)
    checks.expect_same_device(name, tensor, "out_a", out_a)
    checks.expect_last_contiguous(name, tensor)


def _check_lse(name: str, lse: Tensor, out_a: Tensor) -> None:
    *batch, tokens, heads, _ = out_a.shape
    layout = "[batch, heads, seqlen]" if batch else "[heads, total_tokens]"
    checks.expect_dtype(name, lse, torch.float32)
    checks.expect_shape(name, lse, layout, *batch, heads, tokens)
    checks.expect_same_device(name, lse, "out_a", out_a)
    checks.expect_last_contiguous(name, lse)


def _check_forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    checks.expect_rank("out_a", out_a, PACKED if out_a.dim() == 3 else DENSE)
    _check_part("out_a", out_a, out_a)
    checks.expect_at_least("out_a.shape[-1] (head_dim)", out_a.shape[-1], 1)
    _check_lse("lse_a", lse_a, out_a)
    _check_part("out_b", out_b, out_a)
    _check_lse("lse_b", lse_b, out_a)


def _check_backward(
    dout: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, dlse: Tensor | None = None
) -> None:
    _check_forward(out_a, lse_a, out_b, lse_b)
    _check_part("dout", dout, out_a)
    if dlse is not None:
        _check_lse("dlse", dlse, out_a)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _fake_forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return _like(out_a), _like(lse_a)


def _fake_backward(
    dout: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, dlse: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(out_a), _like(lse_a), _like(out_b), _like(lse_b)


_forward_op = register(
    "merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    check=_check_forward,
    fake=_fake_forward,
    eager=eager.merge_attention,
    kernel="kvops.kernels.merge_attention:merge_attention",
    cpu="kvops.kernels.cpu.merge_attention:merge_attention",
    differentiable=True,
    autocast=("out_a", "out_b"),
)

_backward_op = register(
    "merge_attention_backward(Tensor dout, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, *, "
    "Tensor? dlse=None) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=_fake_backward,
    eager=eager.merge_attention_backward,
    kernel="kvops.kernels.merge_attention:merge_attention_backward",
    cpu="kvops.kernels.cpu.merge_attention:merge_attention_backward",
)


_PARTS = ("out_a", "lse_a", "out_b", "lse_b")


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return forward(*inputs)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(gradient is None for gradient in gradients):
            return None, None, None, None, None
        return None, *_gradients(ctx.saved_tensors, *gradients)


def _gradients(inputs: Sequence[Tensor], dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor, ...]:
    dout = torch.zeros_like(inputs[0]) if dout is None else last_contiguous(dout)
    dlse = None if dlse is None else last_contiguous(dlse)
    return first_derivative(_backward_op, dout, *inputs, dlse=dlse)  # type: ignore[no-any-return]


def _gradients_by_name(values: Values, results: object, gradients: Sequence[Tensor | None], needed: object) -> Values:
    return dict(zip(_PARTS, _gradients([values[name] for name in _PARTS], *gradients), strict=True))


def _fold(values: Values, dims: dict[str, int | None], size: int) -> tuple[Values, bool] | None:
    """The mapped dimension as part of the batch; of packed parts it is the batch."""
    if size == 0:
        return None
    mapped = {name: mapped_first(values[name], dim, size) for name, dim in dims.items()}
    packed = mapped["out_a"].dim() == 4
    return values | {name: last_contiguous(x) if packed else into_batch(x) for name, x in mapped.items()}, not packed


register_autograd(_forward_op, _Merge.apply)
allow_transforms(_forward_op, _gradients_by_name, _fold)
allow_transforms(_backward_op, fold=_fold)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The exact attention over the union of two disjoint sets of keys, differentiable in all four arguments.

    For shared prefixes, split caches and context parallelism, which attend to parts of the keys separately. A sink may
    be in one of the parts, not in both.

    Args:
        out_a: ``[B, S, H, Dv]``, or ``[T, H, Dv]`` packed; float16, bfloat16 or float32; any strides but the last.
        lse_a: ``[B, H, S]`` or ``[H, T]``, float32, from the same call of :func:`kvops.flash_attention`.
        out_b, lse_b: the other part, in the same shapes and dtypes.

    Returns:
        out and lse in the shapes and dtypes of the parts. A row that is empty in both has out 0 and lse -inf.

    A part of a row is empty if its lse is -inf (as kvops' operators return it) or +inf (as FlashAttention-2 and others
    return it). Its out must be finite, for instance 0, and its gradient is 0.

    Raises:
        ValueError: shapes, strides or devices that do not fit.
        TypeError: dtypes that do not fit.

    Online softmax (Milakov and Gimelshein, 2018, arXiv:1805.02867).
    """
    return _forward_op(out_a, lse_a, out_b, lse_b)


def merge_attention_backward(
    dout: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, dlse: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of :func:`merge_attention`.

    Args:
        dout: the gradient of out, ``[B, S, H, Dv]`` or ``[T, H, Dv]`` as ``out_a``, in its dtype.
        out_a, lse_a, out_b, lse_b: the inputs of the forward.
        dlse: the gradient of lse, float32 ``[B, H, S]`` or ``[H, T]``, None for 0.

    Returns:
        dout_a, dlse_a, dout_b, dlse_b.

    Raises:
        ValueError, TypeError: as :func:`merge_attention`.
    """
    return _backward_op(dout, out_a, lse_a, out_b, lse_b, dlse=dlse)
