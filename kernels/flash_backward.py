"""Flash attention, backward: P is recomputed from lse, and no gradient is summed with atomics.

Three kernels: delta = rowsum(dO * O) - dlse, here; dK and dV, ``flash_backward_keys``; dQ, ``flash_backward_queries``.
That is seven matrix products where a fused kernel needs five, and the same bits every time.

On Hopper, warp-specialised kernels (``kvops.kernels.gluon_flash_backward``) take the place of the last two where they
were measured there and found faster.
"""

from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kvops.autotune.config import AttentionConfig, GluonFlashBackwardConfig
from kvops.autotune.lookup import choose, choose_proven
from kvops.kernels.dense import (
    dense_problem,
    describable,
    descriptor,
    longest,
    mask_bounds,
    padded,
    row_strides,
    slope_stride,
    token_strides,
)
from kvops.kernels.device import current_device
from kvops.kernels.flash_backward_keys import flash_backward_keys_kernel
from kvops.kernels.flash_backward_queries import flash_backward_queries_kernel
from kvops.kernels.primitives import LOG2_E, load_rows, program_tile


@triton.jit(do_not_specialize=["seqlen_q"])
def flash_delta_kernel(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    delta_ptr,
    lse_log2_ptr,
    stride_ob,
    stride_om,
    stride_oh,
    stride_dob,
    stride_dom,
    stride_doh,
    stride_lb,
    stride_lh,
    stride_dlb,
    stride_dlh,
    stride_db,
    stride_dh,
    heads,
    seqlen_q,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """delta, and lse in units of log2 with +inf for an empty row, so that exp2(s - lse) is 0 there."""
    start_m, head, batch = program_tile(seqlen_q, heads, BLOCK_M, LAST_FIRST=False)
    rows = tl.arange(0, BLOCK_M)
    left = seqlen_q - start_m
    start_m = start_m.to(tl.int64)
    out_ptr += batch * stride_ob + head * stride_oh + start_m * stride_om
    dout_ptr += batch * stride_dob + head * stride_doh + start_m * stride_dom
    out = load_rows(out_ptr, rows, stride_om, left, HEAD_DIM_V, BLOCK_DV, True).to(tl.float32)  # [BLOCK_M, BLOCK_DV]
    dout = load_rows(dout_ptr, rows, stride_dom, left, HEAD_DIM_V, BLOCK_DV, True).to(tl.float32)
    delta = tl.sum(out * dout, 1)  # [BLOCK_M]
    lse = tl.load(lse_ptr + batch * stride_lb + head * stride_lh + start_m + rows, mask=rows < left, other=0.0)
    if dlse_ptr is not None:
        delta -= tl.load(
            dlse_ptr + batch * stride_dlb + head * stride_dlh + start_m + rows, mask=rows < left, other=0.0
        )
    empty = lse == float("-inf")
    place = batch * stride_db + head * stride_dh + start_m + rows
    tl.store(delta_ptr + place, tl.where(empty, 0.0, delta), mask=rows < left)
    tl.store(lse_log2_ptr + place, tl.where(empty, float("inf"), lse * LOG2_E), mask=rows < left)


class Backward(NamedTuple):
    """What the kernels read: a causal mask has ``window_right`` 0, packed sequences have cumulative lengths."""

    dout: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lse_log2: torch.Tensor
    delta: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    batch: int
    seqlen_q: int
    seqlen_k: int
    window_left: int
    window_right: int
    scale: float
    softcap: float
    alibi_slopes: torch.Tensor | None

    @property
    def problem(self) -> tuple[int, ...]:
        """What the configurations are chosen by."""
        return dense_problem(
            self.q, self.v, self.batch, self.seqlen_q, self.seqlen_k, self.window_left, self.window_right
        )


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the dense kernels; see ``kvops.flash_attention_backward``."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    call = prepare(
        dout, q, k, v, out, lse, None, None, q.shape[0], q.shape[1], k.shape[1],
        causal, window_left, window_right, scale, softcap, alibi_slopes, dlse,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernels on packed sequences; see ``kvops.flash_attention_varlen_backward``."""
    # Tokens after the last sequence belong to nobody: their gradient is 0.
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    call = prepare(
        dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k,
        cu_seqlens_q.shape[0] - 1, longest(max_seqlen_q, q), longest(max_seqlen_k, k),
        causal, window_left, window_right, scale, softcap, alibi_slopes, dlse,
    )  # fmt: skip
    launch_keys(call, dk, dv)
    launch_queries(call, dq)
    return dq, dk, dv, sink_gradients(call, sinks)


def prepare(
    dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, batch, seqlen_q, seqlen_k,
    causal, window_left, window_right, scale, softcap, alibi_slopes, dlse,
) -> Backward:  # fmt: skip
    """Launch the first kernel, for delta and lse in units of log2."""
    *outer, rows = lse.shape
    # The rows of a head begin at multiples of 16 bytes, as TMA asks of those who copy them.
    stored = torch.empty((2, *outer, triton.cdiv(rows, 4) * 4), dtype=torch.float32, device=lse.device)
    delta, lse_log2 = stored[..., :rows]
    heads, head_dim_v = out.shape[-2:]
    block_dv = padded(head_dim_v)
    # delta does not care where a sequence ends: packed rows are one long sequence.
    block_m = max(16, min(128, 4096 // block_dv))
    programs = triton.cdiv(rows, block_m) * heads * (lse.shape[0] if lse.dim() == 3 else 1)
    if programs > 0:
        flash_delta_kernel[(programs,)](
            out,
            dout,
            lse,
            dlse,
            delta,
            lse_log2,
            *token_strides(out),
            *token_strides(dout),
            *row_strides(lse),
            *(row_strides(dlse) if dlse is not None else (0, 0)),
            *row_strides(delta),
            heads,
            rows,
            HEAD_DIM_V=head_dim_v,
            BLOCK_M=block_m,
            BLOCK_DV=block_dv,
            num_warps=4,
        )
    return Backward(
        dout, q, k, v, lse_log2, delta, cu_seqlens_q, cu_seqlens_k, batch, seqlen_q, seqlen_k,
        *mask_bounds(causal, window_left, window_right), q.shape[-1] ** -0.5 if scale is None else scale, softcap,
        alibi_slopes,
    )  # fmt: skip


def sink_gradients(call: Backward, sinks: torch.Tensor | None) -> torch.Tensor:
    """[heads] of the dtype of ``sinks``, or empty without sinks."""
    if sinks is None:
        return call.q.new_empty(0, dtype=torch.float32)
    # lse counts the sink: its probability is exp(sink - lse). An infinite sink has all of its row, and delta is 0 in an
    # empty row, whose lse_log2 is inf, too.
    largest = torch.finfo(torch.float32).max
    p = torch.exp2((sinks.float()[:, None] * LOG2_E.value).clamp(max=largest) - call.lse_log2.clamp(max=largest))
    return -(p * call.delta).sum(-1 if call.lse_log2.dim() == 2 else (0, 2)).to(sinks.dtype)


@cache
def _hopper() -> ModuleType:
    """The kernels' twins, imported where they run: elsewhere Gluon's parts for Hopper need not even be there."""
    import kvops.kernels.gluon_flash_backward as hopper

    return hopper


def _for_hopper(op: str, call: Backward, problem: tuple[int, ...]) -> GluonFlashBackwardConfig | None:
    """What a kernel's twin would run with, where it was measured and found faster."""
    if call.cu_seqlens_q is not None:
        return None
    tensors = call.dout, call.q, call.k, call.v
    options = {"softcap": call.softcap, "alibi_slopes": call.alibi_slopes}
    return choose_proven(op, current_device(), *problem, refusal=lambda: _hopper().launchable(*tensors, **options))


def _descriptors(
    call: Backward, config: AttentionConfig, rows: int, *walked: torch.Tensor
) -> tuple[TensorDescriptor | None, ...]:
    """Of what a kernel's loop walks, ``rows`` at a time; None where it goes through pointers.

    Packed sequences do: past the end of one a descriptor reads the next, which may hold a NaN, and 0 * NaN is none.
    """
    if config.descriptors and call.cu_seqlens_q is None and all(map(describable, walked)):
        return tuple(descriptor(tensor, rows, padded(tensor.shape[-1])) for tensor in walked)
    return (None,) * len(walked)


def _arguments(call: Backward, heads: int, config: AttentionConfig) -> tuple[tuple, tuple]:
    """The end of the list of arguments that both kernels have: scalars, then constants."""
    head_dim, head_dim_v = call.q.shape[-1], call.v.shape[-1]
    scalars = heads, call.seqlen_q, call.seqlen_k, call.window_left, call.window_right, call.scale, call.softcap
    constants = (
        call.q.shape[-2] // call.k.shape[-2], head_dim, head_dim_v, call.window_left >= 0, call.window_right >= 0,
        call.softcap > 0, config.block_m, config.block_n, padded(head_dim), padded(head_dim_v),
    )  # fmt: skip
    return scalars, constants


def launch_keys(call: Backward, dk: torch.Tensor, dv: torch.Tensor) -> None:
    """Launch the kernel for dK and dV, or its twin for Hopper."""
    problem = call.problem
    proven = _for_hopper("gluon_flash_backward_keys", call, problem)
    if proven is not None:
        _hopper().launch_keys(call, dk, dv, proven)
        return
    config = choose("flash_backward_keys", current_device(), *problem)
    kv_heads = call.k.shape[-2]
    programs = triton.cdiv(call.seqlen_k, config.block_n) * kv_heads * call.batch
    if programs == 0:
        return
    q_desc, dout_desc = _descriptors(call, config, config.block_m, call.q, call.dout)
    scalars, constants = _arguments(call, kv_heads, config)
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
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        *token_strides(call.q),
        *token_strides(call.k),
        *token_strides(call.v),
        *token_strides(call.dout),
        *row_strides(call.delta),
        *token_strides(dk),
        *token_strides(dv),
        slope_stride(call.alibi_slopes),
        *scalars,
        *constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def launch_queries(call: Backward, dq: torch.Tensor) -> None:
    """Launch the kernel for dQ, or its twin for Hopper."""
    problem = call.problem
    proven = _for_hopper("gluon_flash_backward_queries", call, problem)
    if proven is not None:
        _hopper().launch_queries(call, dq, proven)
        return
    config = choose("flash_backward_queries", current_device(), *problem)
    heads = call.q.shape[-2]
    programs = triton.cdiv(call.seqlen_q, config.block_m) * heads * call.batch
    if programs == 0:
        return
    k_desc, v_desc = _descriptors(call, config, config.block_n, call.k, call.v)
    scalars, constants = _arguments(call, heads, config)
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
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        *token_strides(call.q),
        *token_strides(call.k),
        *token_strides(call.v),
        *token_strides(call.dout),
        *row_strides(call.delta),
        *token_strides(dq),
        slope_stride(call.alibi_slopes),
        *scalars,
        *constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
