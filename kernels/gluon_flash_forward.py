"""Flash attention, forward, for Hopper in Gluon: the arguments that it supports, and its launches.

``gluon_flash_forward_kernel`` has the kernel, the twin of the one in ``flash_forward``.
"""

import torch
import triton

from kvops.autotune.config import GluonFlashForwardConfig
from kvops.autotune.lookup import choose
from kvops.kernels.dense import dense_problem, describable, mask_bounds, padded
from kvops.kernels.device import current_device
from kvops.kernels.gluon_flash_forward_kernel import gluon_flash_forward_kernel
from kvops.kernels.gluon_tiles import DTYPES, TURN, bounded, descriptor
from kvops.kernels.primitives import LOG2_E


def launchable(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> str | None:
    """Why these (valid) arguments, dense or packed, cannot be launched, or None if they can."""
    arch = current_device().arch
    if arch != "sm_90":
        return f"needs a Hopper GPU (sm_90), this is {arch}"
    if q.dtype not in DTYPES:
        return f"needs float16 or bfloat16, got {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"needs head sizes up to 256, got {q.shape[-1]} and {v.shape[-1]}"
    if v.shape[-1] % 8:
        return f"needs a value head size that is a multiple of 8, got {v.shape[-1]}"
    if q.shape[:-1].numel() >= 2**31:
        return f"needs fewer than 2^31 rows of queries, got shape {list(q.shape)}"
    if alibi_slopes is not None:
        return "has no ALiBi"
    if bias is not None:
        return "has no bias"
    if dropout_p:
        return "has no dropout"
    if scale is not None and not scale > 0:
        return f"needs a positive scale, got {scale}"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if 0 in tensor.shape:
            return f"needs {name} to have elements, got shape {list(tensor.shape)}"
        if tensor.dim() == 3 and tensor.shape[0] > TURN.value:
            return f"needs {name} to have at most 2^30 tokens, got shape {list(tensor.shape)}"
        if not describable(tensor):
            return f"needs {name} aligned to 16 bytes, base and strides, got strides {list(tensor.stride())}"
    return None


def gluon_flash_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    config: GluonFlashForwardConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel; see ``kvops.flash_attention``. ``config`` replaces the configuration of the store.

    Raises ValueError with the reason where ``launchable`` gives one.
    """
    _refuse(launchable(q, k, v, scale=scale, alibi_slopes=alibi_slopes))
    window_left, window_right = mask_bounds(causal, window_left, window_right)
    sizes = q.shape[0], q.shape[1], k.shape[1]
    config = config or choose(
        "gluon_flash_forward", current_device(), *dense_problem(q, v, *sizes, window_left, window_right)
    )
    return launch(q, k, v, None, None, *sizes, window_left, window_right, scale, softcap, sinks, config)


def gluon_flash_forward_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
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
    config: GluonFlashForwardConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on packed sequences; see ``kvops.flash_attention_varlen`` and ``gluon_flash_forward``."""
    _refuse(launchable(q, k, v, scale=scale, alibi_slopes=alibi_slopes))
    window_left, window_right = mask_bounds(causal, window_left, window_right)
    sizes = cu_seqlens_q.shape[0] - 1, max_seqlen_q, max_seqlen_k
    config = config or choose(
        "gluon_flash_forward_varlen", current_device(), *dense_problem(q, v, *sizes, window_left, window_right)
    )
    return launch(q, k, v, cu_seqlens_q, cu_seqlens_k, *sizes, window_left, window_right, scale, softcap, sinks, config)


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f"gluon_flash_forward: {reason}")


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    window_left: int,
    window_right: int,
    scale: float | None,
    softcap: float,
    sinks: torch.Tensor | None,
    config: GluonFlashForwardConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on ``launchable`` arguments.

    A causal mask has ``window_right`` 0. The lengths of packed sequences are their maxima.
    """
    heads, head_dim = q.shape[-2:]
    heads_kv, head_dim_v = v.shape[-2:]
    has_low, has_high = bounded(window_left, window_right, seqlen_q, seqlen_k)
    scale = (head_dim**-0.5 if scale is None else scale) * LOG2_E.value
    width = max(64, padded(head_dim), padded(head_dim_v))
    if cu_seqlens_q is None:
        out = q.new_empty(batch, seqlen_q, heads, head_dim_v)
        lse = q.new_empty(batch, heads, seqlen_q, dtype=torch.float32)
        offset, lse_rows = seqlen_k - seqlen_q, seqlen_q
    else:
        # Tokens after the last sequence belong to no sequence and see no key.
        out = q.new_zeros(q.shape[0], heads, head_dim_v)
        lse = q.new_full((heads, q.shape[0]), float("-inf"), dtype=torch.float32)
        offset, lse_rows = 0, q.shape[0]
    blocks = triton.cdiv(seqlen_q, 2 * config.block_rows)
    works = blocks * heads * batch
    if works == 0:
        return out, lse
    bytes_per_head = max(1, seqlen_k) * (head_dim + head_dim_v) * q.element_size()
    section = min(heads * batch, heads // heads_kv * max(1, config.section_bytes // bytes_per_head))
    programs = min(works, current_device().num_sms) if config.persistent else works
    gluon_flash_forward_kernel[(programs,)](
        descriptor(q, config.block_rows, width),
        descriptor(k, config.block_n, width),
        descriptor(v, config.block_n, width),
        descriptor(out, config.block_rows, width),
        lse,
        sinks,
        cu_seqlens_q,
        cu_seqlens_k,
        heads,
        lse_rows,
        seqlen_k,
        offset - window_left if has_low else 0,
        offset + window_right + 1 if has_high else 0,
        blocks,
        works,
        programs,
        heads * batch,
        section,
        section * blocks,
        scale / softcap if softcap > 0 else scale,
        softcap * LOG2_E.value,
        GROUP=heads // heads_kv,
        HAS_LOW=has_low,
        HAS_HIGH=has_high,
        HAS_SOFTCAP=softcap > 0,
        STAGES=config.stages,
        CONSUMER_REGISTERS=config.consumer_registers,
        PRODUCER_REGISTERS=config.producer_registers,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out, lse
