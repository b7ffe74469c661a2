"""Flash attention, backward, for Hopper in Gluon: the arguments that it supports, and its launches.

The kernels stand in ``gluon_flash_backward_keys`` and ``gluon_flash_backward_queries``. They are twins of the two of
``flash_backward_keys`` and ``flash_backward_queries``, with which they share delta and the gradient of sinks. They use
no atomics, so equal inputs give equal bits.
"""

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kvops.autotune.config import GluonFlashBackwardConfig
from kvops.autotune.lookup import choose
from kvops.kernels.dense import describable, padded
from kvops.kernels.device import current_device
from kvops.kernels.flash_backward import Backward, prepare, sink_gradients
from kvops.kernels.gluon_flash_backward_keys import gluon_flash_backward_keys_kernel
from kvops.kernels.gluon_flash_backward_queries import gluon_flash_backward_queries_kernel
from kvops.kernels.gluon_tiles import DTYPES, bounded, descriptor
from kvops.kernels.primitives import LOG2_E

_ROWS_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


def launchable(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dropout_seed: torch.Tensor | None = None,
) -> str | None:
    """Why the kernels cannot run these (valid) arguments, or None if they can."""
    arch = current_device().arch
    if arch != "sm_90":
        return f"needs a Hopper GPU (sm_90), this is {arch}"
    if q.dtype not in DTYPES:
        return f"needs float16 or bfloat16, got {q.dtype}"
    if max(q.shape[3], v.shape[3]) > 128:
        # At 256, dK and dV of 64 keys would take all 255 registers of a thread.
        return f"needs head sizes up to 128, got {q.shape[3]} and {v.shape[3]}"
    if q.shape[3] % 8 or v.shape[3] % 8:
        return f"needs head sizes that are multiples of 8, got {q.shape[3]} and {v.shape[3]}"
    if softcap > 0:
        return "has no softcap"
    if alibi_slopes is not None:
        return "has no ALiBi"
    if bias is not None:
        return "has no bias"
    if dropout_seed is not None:
        return "has no dropout"
    for name, tensor in (("q", q), ("k", k), ("v", v), ("dout", dout)):
        if 0 in tensor.shape:
            return f"needs {name} to have elements, got shape {list(tensor.shape)}"
        if not describable(tensor):
            return f"needs {name} aligned to 16 bytes, base and strides, got strides {list(tensor.stride())}"
    return None


def gluon_flash_backward(
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
    keys_config: GluonFlashBackwardConfig | None = None,
    queries_config: GluonFlashBackwardConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernels; see ``kvops.flash_attention_backward``. A configuration replaces that of the store.

    Raises ValueError with the reason where ``launchable`` gives one.
    """
    reason = launchable(dout, q, k, v, softcap=softcap, alibi_slopes=alibi_slopes)
    if reason is not None:
        raise ValueError(f"gluon_flash_backward: {reason}")
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    call = prepare(
        dout, q, k, v, out, lse, None, None, q.shape[0], q.shape[1], k.shape[1],
        causal, window_left, window_right, scale, softcap, alibi_slopes, dlse,
    )  # fmt: skip
    launch_keys(call, dk, dv, keys_config or choose("gluon_flash_backward_keys", current_device(), *call.problem))
    launch_queries(call, dq, queries_config or choose("gluon_flash_backward_queries", current_device(), *call.problem))
    return dq, dk, dv, sink_gradients(call, sinks)


def _rows_descriptor(rows: torch.Tensor, block: int) -> TensorDescriptor:
    """A descriptor of float32 [batch, heads, rows]. A block is ``block`` rows of one head, with zeros past the last."""
    batch, heads, length = rows.shape
    return TensorDescriptor(rows, [batch * heads, length], [rows.stride(1), 1], [1, block], _ROWS_LAYOUT)


def launch_keys(call: Backward, dk: torch.Tensor, dv: torch.Tensor, config: GluonFlashBackwardConfig) -> None:
    """Launch the kernel for dK and dV on ``launchable`` arguments."""
    heads, kv_heads = call.q.shape[2], call.k.shape[2]
    group, all_heads, offset = heads // kv_heads, kv_heads * call.batch, call.seqlen_k - call.seqlen_q
    left, right = bounded(call.window_left, call.window_right, call.seqlen_q, call.seqlen_k)
    width = max(64, padded(call.q.shape[3]), padded(call.v.shape[3]))
    blocks = triton.cdiv(call.seqlen_k, 2 * config.block_n)
    bytes_per_head = group * call.seqlen_q * (call.q.shape[3] + call.v.shape[3]) * call.q.element_size()
    section = min(all_heads, max(1, config.section_bytes // bytes_per_head))
    gluon_flash_backward_keys_kernel[(blocks * all_heads,)](
        descriptor(call.q, config.block_m, width),
        descriptor(call.k, config.block_n, width),
        descriptor(call.v, config.block_n, width),
        descriptor(call.dout, config.block_m, width),
        _rows_descriptor(call.lse_log2, config.block_m),
        _rows_descriptor(call.delta, config.block_m),
        descriptor(dk, config.block_n, width),
        descriptor(dv, config.block_n, width),
        kv_heads,
        call.seqlen_q,
        call.seqlen_k,
        -offset - call.window_right if right else 0,
        -offset + call.window_left + 1 if left else 0,
        blocks,
        all_heads,
        section,
        section * blocks,
        call.scale * LOG2_E.value,
        GROUP=group,
        HAS_LOW=right,
        HAS_HIGH=left,
        STAGES=config.stages,
        CONSUMER_REGISTERS=config.consumer_registers,
        PRODUCER_REGISTERS=config.producer_registers,
        num_warps=4,
        enable_fp_fusion=True,
    )


def launch_queries(call: Backward, dq: torch.Tensor, config: GluonFlashBackwardConfig) -> None:
    """Launch the kernel for dQ on ``launchable`` arguments."""
    heads, kv_heads = call.q.shape[2], call.k.shape[2]
    group, all_heads, offset = heads // kv_heads, heads * call.batch, call.seqlen_k - call.seqlen_q
    left, right = bounded(call.window_left, call.window_right, call.seqlen_q, call.seqlen_k)
    width = max(64, padded(call.q.shape[3]), padded(call.v.shape[3]))
    blocks = triton.cdiv(call.seqlen_q, 2 * config.block_m)
    bytes_per_head = call.seqlen_k * (call.q.shape[3] + call.v.shape[3]) * call.q.element_size()
    section = min(all_heads, group * max(1, config.section_bytes // bytes_per_head))
    gluon_flash_backward_queries_kernel[(blocks * all_heads,)](
        descriptor(call.q, config.block_m, width),
        descriptor(call.k, config.block_n, width),
        descriptor(call.v, config.block_n, width),
        descriptor(call.dout, config.block_m, width),
        descriptor(dq, config.block_m, width),
        call.lse_log2,
        call.delta,
        call.delta.stride(1),
        heads,
        call.seqlen_q,
        call.seqlen_k,
        offset - call.window_left if left else 0,
        offset + call.window_right + 1 if right else 0,
        blocks,
        all_heads,
        section,
        section * blocks,
        call.scale * LOG2_E.value,
        GROUP=group,
        HAS_LOW=left,
        HAS_HIGH=right,
        STAGES=config.stages,
        CONSUMER_REGISTERS=config.consumer_registers,
        PRODUCER_REGISTERS=config.producer_registers,
        num_warps=4,
        enable_fp_fusion=True,
    )
