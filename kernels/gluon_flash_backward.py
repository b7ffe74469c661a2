"""Flash attention, backward, for Hopper in Gluon: what it can run, and its launches.

The kernels are those of ``kvops.kernels.gluon_flash_backward_keys`` and ``..._queries``, twins of the two of
``kvops.kernels.flash_backward``, with which they share delta and the gradient of sinks: deterministic, no atomics.
"""

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kvops.autotune.config import (
    GluonFlashBackwardConfig,
    gluon_flash_backward_keys_config,
    gluon_flash_backward_queries_config,
)
from kvops.kernels.dense import describable
from kvops.kernels.device import current_device
from kvops.kernels.flash_backward import row_terms, sink_gradients
from kvops.kernels.gluon_flash_backward_keys import gluon_flash_backward_keys_kernel
from kvops.kernels.gluon_flash_backward_queries import gluon_flash_backward_queries_kernel
from kvops.kernels.gluon_flash_forward import _LOG2_E, _descriptor

_ROWS_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


def launchable(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
) -> str | None:
    """Why the kernels cannot run these (valid) arguments, or None if they can."""
    arch = current_device().arch
    if arch != "sm_90":
        return f"needs a Hopper GPU (sm_90), this is {arch}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, got {q.dtype}"
    if max(q.shape[3], v.shape[3]) > 128:
        # dK and dV of 64 keys at 256 would take all 255 registers of a thread.
        return f"needs head sizes up to 128, got {q.shape[3]} and {v.shape[3]}"
    if q.shape[3] % 8 or v.shape[3] % 8:
        return f"needs head sizes that are multiples of 8, got {q.shape[3]} and {v.shape[3]}"
    if softcap > 0:
        return "has no softcap"
    if alibi_slopes is not None:
        return "has no ALiBi"
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
    """Launch the kernels; see ``kvops.flash_attention_backward``. A configuration replaces what would be chosen.

    Raises ValueError with the reason where ``launchable`` gives one.
    """
    reason = launchable(dout, q, k, v, softcap=softcap, alibi_slopes=alibi_slopes)
    if reason is not None:
        raise ValueError(f"gluon_flash_backward: {reason}")
    if causal:
        window_right = 0
    if keys_config is None:
        keys_config = gluon_flash_backward_keys_config(_width(q, v))
    if queries_config is None:
        queries_config = gluon_flash_backward_queries_config(_width(q, v))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta, lse_log2 = row_terms(dout, out, lse, dlse)
    shared = dout, q, k, v, lse_log2, delta
    launch_keys(*shared, dk, dv, window_left, window_right, scale, keys_config)
    launch_queries(*shared, dq, window_left, window_right, scale, queries_config)
    return dq, dk, dv, sink_gradients(q, sinks, lse_log2, delta)


def _width(q: torch.Tensor, v: torch.Tensor) -> int:
    return max(64, triton.next_power_of_2(max(q.shape[3], v.shape[3])))


def _rows_descriptor(rows: torch.Tensor, block: int) -> TensorDescriptor:
    """Of float32 [batch, heads, rows]: a block is so many rows of one head, zeros past the last."""
    batch, heads, length = rows.shape
    return TensorDescriptor(rows, [batch * heads, length], [rows.stride(1), 1], [1, block], _ROWS_LAYOUT)


def launch_keys(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse_log2: torch.Tensor,
    delta: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    window_left: int,
    window_right: int,
    scale: float | None,
    config: GluonFlashBackwardConfig,
) -> None:
    """dK and dV of what is ``launchable``; a causal mask has ``window_right`` 0."""
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    # A window that reaches past the ends is none: positions run from seqlen_k - seqlen_q to seqlen_k - 1.
    has_low = 0 <= window_right < seqlen_q - 1
    has_high = 0 <= window_left < seqlen_k - 1
    width = _width(q, v)
    blocks = triton.cdiv(seqlen_k, 2 * config.block_n)
    bytes_per_head = group * seqlen_q * (head_dim + v.shape[3]) * q.element_size()
    section = min(kv_heads * batch, max(1, config.section_bytes // bytes_per_head))
    gluon_flash_backward_keys_kernel[(blocks * kv_heads * batch,)](
        _descriptor(q, config.block_m, width),
        _descriptor(k, config.block_n, width),
        _descriptor(v, config.block_n, width),
        _descriptor(dout, config.block_m, width),
        _rows_descriptor(lse_log2, config.block_m),
        _rows_descriptor(delta, config.block_m),
        _descriptor(dk, config.block_n, width),
        _descriptor(dv, config.block_n, width),
        kv_heads,
        seqlen_q,
        seqlen_k,
        seqlen_q - seqlen_k - window_right if has_low else 0,
        seqlen_q - seqlen_k + window_left + 1 if has_high else 0,
        blocks,
        kv_heads * batch,
        section,
        section * blocks,
        (head_dim**-0.5 if scale is None else scale) * _LOG2_E,
        GROUP=group,
        HAS_LOW=has_low,
        HAS_HIGH=has_high,
        STAGES=config.stages,
        CONSUMER_REGISTERS=config.consumer_registers,
        PRODUCER_REGISTERS=config.producer_registers,
        num_warps=4,
    )


def launch_queries(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse_log2: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
    window_left: int,
    window_right: int,
    scale: float | None,
    config: GluonFlashBackwardConfig,
) -> None:
    """dQ of what is ``launchable``; a causal mask has ``window_right`` 0."""
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k, kv_heads = k.shape[1:3]
    has_low = 0 <= window_left < seqlen_k - 1
    has_high = 0 <= window_right < seqlen_q - 1
    width = _width(q, v)
    blocks = triton.cdiv(seqlen_q, 2 * config.block_m)
    bytes_per_head = seqlen_k * (head_dim + v.shape[3]) * q.element_size()
    section = min(heads * batch, heads // kv_heads * max(1, config.section_bytes // bytes_per_head))
    gluon_flash_backward_queries_kernel[(blocks * heads * batch,)](
        _descriptor(q, config.block_m, width),
        _descriptor(k, config.block_n, width),
        _descriptor(v, config.block_n, width),
        _descriptor(dout, config.block_m, width),
        _descriptor(dq, config.block_m, width),
        lse_log2,
        delta,
        delta.stride(1),
        heads,
        seqlen_q,
        seqlen_k,
        seqlen_k - seqlen_q - window_left if has_low else 0,
        seqlen_k - seqlen_q + window_right + 1 if has_high else 0,
        blocks,
        heads * batch,
        section,
        section * blocks,
        (head_dim**-0.5 if scale is None else scale) * _LOG2_E,
        GROUP=heads // kv_heads,
        HAS_LOW=has_low,
        HAS_HIGH=has_high,
        STAGES=config.stages,
        CONSUMER_REGISTERS=config.consumer_registers,
        PRODUCER_REGISTERS=config.producer_registers,
        num_warps=4,
    )
