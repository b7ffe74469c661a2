"""Flash attention, backward: the launches, of the kernels for all GPUs or of their twins for Hopper.

The twins (``kvops.kernels.gluon_flash_backward``) run where a measurement on the GPU at hand found them faster.
"""

from dataclasses import replace
from functools import cache
from types import ModuleType

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from kvops.autotune.config import AttentionConfig, GluonFlashBackwardConfig
from kvops.autotune.lookup import choose, choose_proven
from kvops.kernels.dense import (
    beside_others,
    bias_arguments,
    describable,
    descriptor,
    longest,
    padded,
    row_strides,
    slope_stride,
    token_strides,
)
from kvops.kernels.device import current_device
from kvops.kernels.flash_backward import Backward, prepare, sink_gradients
from kvops.kernels.flash_backward_keys import flash_backward_keys_kernel
from kvops.kernels.flash_backward_queries import flash_backward_queries_kernel


def flash_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    dlse: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the dense kernels; see ``kvops.flash_attention_backward``."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    call = prepare(
        dout, q, k, v, out, lse, None, None, q.shape[0], q.shape[1], k.shape[1],
        causal, window_left, window_right, scale, softcap, alibi_slopes, dlse, bias, dropout_p, dropout_seed,
    )  # fmt: skip
    launch_keys(call, dk, dv)
    launch_queries(call, dq)
    return dq, dk, dv, sink_gradients(call, sinks)


def flash_backward_varlen(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    dlse: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernels on packed sequences; see ``kvops.flash_attention_varlen_backward``."""
    # Tokens after the last sequence belong to no sequence: their gradient is 0.
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    call = prepare(
        dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k,
        cu_seqlens_q.shape[0] - 1, longest(max_seqlen_q, q), longest(max_seqlen_k, k),
        causal, window_left, window_right, scale, softcap, alibi_slopes, dlse, bias, dropout_p, dropout_seed,
    )  # fmt: skip
    launch_keys(call, dk, dv)
    launch_queries(call, dq)
    return dq, dk, dv, sink_gradients(call, sinks)


@cache
def _hopper() -> ModuleType:
    """The module of the twins, imported at their first launch: other GPUs do not need Gluon's parts for Hopper."""
    import kvops.kernels.gluon_flash_backward as hopper

    return hopper


def _for_hopper(op: str, call: Backward, problem: tuple[int, ...]) -> GluonFlashBackwardConfig | None:
    """The configuration of the twin ``op``, if a record of this GPU shows that it is faster; else None."""
    if call.cu_seqlens_q is not None:
        return None
    tensors = call.dout, call.q, call.k, call.v
    options = {"softcap": call.softcap, "alibi_slopes": call.alibi_slopes, "bias": call.bias}
    options["dropout_seed"] = call.dropout[0]
    return choose_proven(op, current_device(), *problem, refusal=lambda: _hopper().launchable(*tensors, **options))


def _descriptors(
    call: Backward, config: AttentionConfig, rows: int, *walked: torch.Tensor
) -> tuple[TensorDescriptor | None, ...]:
    """Descriptors of the tensors of a kernel's loop, ``rows`` tokens per block; None for each that uses pointers.

    Packed sequences use pointers: past the end of a sequence a descriptor reads the next one, and 0 * NaN is NaN.
    """
    if config.descriptors and call.cu_seqlens_q is None and all(map(describable, walked)):
        return tuple(descriptor(tensor, rows, padded(tensor.shape[-1])) for tensor in walked)
    return (None,) * len(walked)


def _arguments(call: Backward, heads: int, config: AttentionConfig) -> tuple[tuple, tuple]:
    """The last arguments of both kernels: scalars, then constants."""
    head_dim, head_dim_v = call.q.shape[-1], call.v.shape[-1]
    scalars = (
        heads, call.seqlen_q, call.seqlen_k, call.window_left, call.window_right, call.scale, call.softcap,
        *call.dropout[1:],
    )  # fmt: skip
    constants = (
        call.q.shape[-2] // call.k.shape[-2], head_dim, head_dim_v, call.window_left >= 0, call.window_right >= 0,
        call.softcap > 0, config.block_m, config.block_n, padded(head_dim), padded(head_dim_v),
    )  # fmt: skip
    return scalars, constants


def _beside_wider_values(config: AttentionConfig, call: Backward) -> AttentionConfig:
    """The configuration for a call whose keys are narrower than its values: of a square tile 16 queries at a time.

    64 x 64 is proven for keys and values of 128. With keys of 64 or less it spills 98 to 582 registers (sm_80), and
    with 32 queries up to 18; with 16 none.
    """
    narrow = padded(call.q.shape[-1]) <= 64 < padded(call.v.shape[-1])
    return replace(config, block_m=16) if narrow and config.block_m == config.block_n > 32 else config


def launch_keys(call: Backward, dk: torch.Tensor, dv: torch.Tensor) -> None:
    """Launch the kernel for dK and dV, or its twin for Hopper."""
    problem = call.problem
    proven = _for_hopper("gluon_flash_backward_keys", call, problem)
    if proven is not None:
        _hopper().launch_keys(call, dk, dv, proven)
        return
    config = _beside_wider_values(choose("flash_backward_keys", current_device(), *problem), call)
    config = beside_others(config, "block_m", call.v, call.bias, call.dropout[0])
    if call.bias is not None and call.dropout[0] is not None:
        config = replace(config, num_stages=1)  # beside both, a second stage spills (sm_90)
    kv_heads = call.k.shape[-2]
    programs = triton.cdiv(call.seqlen_k, config.block_n) * kv_heads * call.batch
    if programs == 0:
        return
    q_desc, dout_desc = _descriptors(call, config, config.block_m, call.q, call.dout)
    scalars, constants = _arguments(call, kv_heads, config)
    bias, *bias_strides = bias_arguments(call.bias, call.q, call.k)
    flash_backward_keys_kernel[(programs,)](
        call.q,
        call.k,
        call.v,
        call.dout,
        call.lse_log2,
        call.delta,
        q_desc,
        dout_desc,
        dk,
        dv,
        call.alibi_slopes,
        bias,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.dropout[0],
        *token_strides(call.q),
        *token_strides(call.k),
        *token_strides(call.v),
        *token_strides(call.dout),
        *row_strides(call.delta),
        *token_strides(dk),
        *token_strides(dv),
        slope_stride(call.alibi_slopes),
        *bias_strides,
        *scalars,
        *constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )


def launch_queries(call: Backward, dq: torch.Tensor) -> None:
    """Launch the kernel for dQ, or its twin for Hopper."""
    problem = call.problem
    proven = _for_hopper("gluon_flash_backward_queries", call, problem)
    if proven is not None:
        _hopper().launch_queries(call, dq, proven)
        return
    # A bias fits beside the whole tile, dropout does not (64 keys, sm_90).
    config = choose("flash_backward_queries", current_device(), *problem)
    config = beside_others(config, "block_n", call.v, None, call.dropout[0])
    heads = call.q.shape[-2]
    programs = triton.cdiv(call.seqlen_q, config.block_m) * heads * call.batch
    if programs == 0:
        return
    k_desc, v_desc = _descriptors(call, config, config.block_n, call.k, call.v)
    scalars, constants = _arguments(call, heads, config)
    bias, *bias_strides = bias_arguments(call.bias, call.q, call.k)
    flash_backward_queries_kernel[(programs,)](
        call.q,
        call.k,
        call.v,
        call.dout,
        call.lse_log2,
        call.delta,
        k_desc,
        v_desc,
        dq,
        call.alibi_slopes,
        bias,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.dropout[0],
        *token_strides(call.q),
        *token_strides(call.k),
        *token_strides(call.v),
        *token_strides(call.dout),
        *row_strides(call.delta),
        *token_strides(dq),
        slope_stride(call.alibi_slopes),
        *bias_strides,
        *scalars,
        *constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
