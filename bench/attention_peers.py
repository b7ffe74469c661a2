"""Everyone who computes dense attention, behind one call. What is not installed fails when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kvops

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [B, S, Hq, D], k and v [B, S, Hkv, D] -> [B, S, Hq, D]"""


def kvops_attention(causal: bool) -> Attention:
    return lambda q, k, v: kvops.flash_attention(q, k, v, causal=causal)[0]


def kvops_gluon(causal: bool) -> Attention:
    """The Hopper forward, launched directly: the operator uses it only where a measurement has chosen it."""
    from kvops.kernels.gluon_flash_forward import gluon_flash_forward

    return lambda q, k, v: gluon_flash_forward(q, k, v, causal=causal)[0]


def sdpa(backend: SDPBackend) -> Callable[[bool], Attention]:
    def prepare(causal: bool) -> Attention:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            with sdpa_kernel(backend):
                gqa = q.shape[1] != k.shape[1]
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa).transpose(1, 2)

        return attend

    return prepare


def flex(causal: bool) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # a shape is a graph of its own, and there is a limit of recompilations
    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[int, Any] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[1]
        if causal and length not in masks:
            masks[length] = create_block_mask(
                lambda b, h, query, key: query >= key, None, None, length, length, device=str(q.device)
            )
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return compiled(q, k, v, block_mask=masks.get(length), enable_gqa=True).transpose(1, 2)

    return attend


def flash_attn(module: str) -> Callable[[bool], Attention]:
    def prepare(causal: bool) -> Attention:
        function = importlib.import_module(module).flash_attn_func

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result = function(q, k, v, causal=causal)
            return result[0] if isinstance(result, tuple) else result

        return attend

    return prepare


CONTENDERS: dict[str, Callable[[bool], Attention]] = {
    "kvops": kvops_attention,
    "kvops Gluon": kvops_gluon,
    "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    # It has no grouped heads: it is given repeated ones, made outside the timing.
    "SDPA efficient, KV repeated": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "SDPA math": sdpa(SDPBackend.MATH),
    "FlexAttention": flex,
    "flash-attn 2": flash_attn("flash_attn"),
    "flash-attn 3": flash_attn("flash_attn_interface"),
    "flash-attn 4": flash_attn("flash_attn.cute"),
}
