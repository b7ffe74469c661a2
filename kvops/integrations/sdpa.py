"""Unmodified models on kvops: the flash attention behind ``F.scaled_dot_product_attention`` on a GPU.

    import kvops.integrations.sdpa

    kvops.integrations.sdpa.enable()

A library can replace torch's flash attention on CUDA devices (``torch.nn.attention.register_flash_attention_impl``).
kvops then runs wherever torch would choose flash attention, forward and backward. Other calls (a dense mask, float32,
the CPU) are not changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvops.ops.attention import flash_attention, flash_attention_backward
from kvops.ops.dense import seed_for
from kvops.ops.gradients import last_contiguous
from kvops.ops.varlen import flash_attention_varlen, flash_attention_varlen_backward

NAME = "kvops"


def enable() -> None:
    """Replace torch's flash attention with kvops in this process.

    ``torch.nn.attention.restore_flash_attention_impl()`` undoes it.

    Raises RuntimeError for a version of torch without that registry.
    """
    attention = torch.nn.attention
    if not hasattr(attention, "register_flash_attention_impl"):
        raise RuntimeError(
            "torch: expected a version with torch.nn.attention.register_flash_attention_impl, "
            f"got {torch.__version__}: upgrade torch, or call kvops.scaled_dot_product_attention"
        )
    attention.register_flash_attention_impl(NAME, register_fn=lambda: Registration("CUDA"))
    attention.activate_flash_attention_impl(NAME)


class Registration:
    """Replaces torch's flash attention operators for one dispatch key until :meth:`remove`."""

    def __init__(self, key: str) -> None:
        self.library: torch.library.Library | None = torch.library.Library("aten", "IMPL", key)
        for name, implementation in (
            ("_scaled_dot_product_flash_attention", _sdpa_forward),
            ("_scaled_dot_product_flash_attention_backward", _sdpa_backward),
            ("_flash_attention_forward", _forward),
            ("_flash_attention_backward", _backward),
        ):
            self.library.impl(name, implementation, key)

    def remove(self) -> None:
        if self.library is not None:
            self.library._destroy()
        self.library = None


def _refuse(return_debug_mask: bool, **unsupported: Any) -> None:
    if return_debug_mask:
        raise RuntimeError("return_debug_mask: expected False, kvops never has the probabilities in memory")
    for name, value in unsupported.items():
        if value is not None:
            raise RuntimeError(f"{name}: expected None, kvops does not take it here")


def _window(size: int | None) -> int:
    return -1 if size is None else size


def _dropout(dropout_p: float, state: Tensor) -> dict[str, Any]:
    """The options of dropout; the seed is the first number of ``state``, uint64 [2]."""
    return {"dropout_p": dropout_p, "dropout_seed": state.view(torch.int64)[:1]} if dropout_p else {}


def _state(dropout_p: float, query: Tensor) -> Tensor:
    """What torch keeps for the backward of dropout, uint64 [2]: here a seed and 0."""
    seed = seed_for(dropout_p, None, query)
    state = torch.zeros(2, dtype=torch.int64, device=query.device)
    return (state if seed is None else torch.cat((seed, state[:1]))).view(torch.uint64)


def _nothing(query: Tensor) -> tuple[Tensor, Tensor]:
    """No offset of random numbers, and no matrix of probabilities."""
    return torch.zeros((), dtype=torch.uint64, device=query.device), query.new_empty(0)


def _sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    _refuse(return_debug_mask)
    state = _state(dropout_p, query)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = flash_attention(q, k, v, causal=is_causal, scale=scale, **_dropout(dropout_p, state))
    # Compiled graphs expect the layout of the query for the result, as in torch.
    layout = torch.empty_like(query, device="meta").stride()
    result = out.transpose(1, 2)
    if result.stride() != layout:
        result = torch.empty_like(query).copy_(result)
    return result, lse, None, None, query.shape[2], key.shape[2], state, *_nothing(query)


def _sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = (x.transpose(1, 2) for x in (last_contiguous(grad_out), query, key, value, out))
    options: dict[str, Any] = {"causal": is_causal, "scale": scale, **_dropout(dropout_p, philox_seed)}
    with torch.no_grad():  # torch refuses a second derivative
        dq, dk, dv, _ = flash_attention_backward(dout, q, k, v, out, logsumexp, **options)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Any, ...]:
    """Called by ``torch.nn.attention.varlen`` and nested tensors, with tokens before heads, packed or dense."""
    # torch's backward has no slopes, so the gradient would be wrong.
    _refuse(return_debug_mask, seqused_k=seqused_k, alibi_slopes=alibi_slopes, block_table=block_table)
    state = _state(dropout_p, query)
    options: dict[str, Any] = {
        "causal": is_causal,
        "scale": scale,
        "window_left": _window(window_size_left),
        "window_right": _window(window_size_right),
        **_dropout(dropout_p, state),
    }
    if cum_seq_q is None or cum_seq_k is None:
        out, lse = flash_attention(query, key, value, **options)
    else:
        out, lse = flash_attention_varlen(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, **options)
    return out, lse, state, *_nothing(query)


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    options: dict[str, Any] = {
        "causal": is_causal,
        "scale": scale,
        "window_left": _window(window_size_left),
        "window_right": _window(window_size_right),
        **_dropout(dropout_p, rng_state),
    }
    saved = last_contiguous(grad_out), query, key, value, out, logsumexp
    with torch.no_grad():
        if cum_seq_q is None or cum_seq_k is None:
            return flash_attention_backward(*saved, **options)[:3]
        return flash_attention_varlen_backward(*saved, cum_seq_q, cum_seq_k, max_q, max_k, **options)[:3]
