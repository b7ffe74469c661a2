"""Flash attention, backward: P is recomputed from lse, and no gradient is summed with atomics.

Three kernels: delta = rowsum(dO * O) - dlse, here; dK and dV, ``flash_backward_keys``; dQ, ``flash_backward_queries``.
Together they compute seven matrix products where a fused kernel needs five, but they give the same bits every time. The
gradient of a bias is an operator and a kernel of its own, ``flash_backward_bias``.
``flash_backward_launch`` launches them. This file has the parts that their twins for Hopper use as well.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kvops.kernels.dense import (
    dense_problem,
    dropout_arguments,
    mask_bounds,
    padded,
    row_strides,
    token_strides,
)
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
    """The arguments of the kernels. A causal mask has ``window_right`` 0; packed sequences have cumulative lengths."""

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
    bias: torch.Tensor | None = None
    dropout: tuple[Any, ...] = (None,) * 3  # as ``dropout_arguments`` returns it

    @property
    def problem(self) -> tuple[int, ...]:
        """The problem that configurations are chosen for."""
        return dense_problem(
            self.q, self.v, self.batch, self.seqlen_q, self.seqlen_k, self.window_left, self.window_right
        )


def prepare(
    dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, batch, seqlen_q, seqlen_k,
    causal, window_left, window_right, scale, softcap, alibi_slopes, dlse, bias=None,
    dropout_p=0.0, dropout_seed=None,
) -> Backward:  # fmt: skip
    """Launch the first kernel, which computes delta and lse in units of log2."""
    *outer, rows = lse.shape
    # The rows of each head begin at a multiple of 16 bytes, as TMA needs.
    stored = torch.empty((2, *outer, triton.cdiv(rows, 4) * 4), dtype=torch.float32, device=lse.device)
    delta, lse_log2 = stored[..., :rows]
    heads, head_dim_v = out.shape[-2:]
    block_dv = padded(head_dim_v)
    # delta of a row depends on that row alone: packed rows are one long sequence.
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
            # Threads that share a row add each other's products. If a thread's own product went into that addition
            # unrounded, each would store other bits of one delta.
            enable_fp_fusion=False,
        )
    return Backward(
        dout, q, k, v, lse_log2, delta, cu_seqlens_q, cu_seqlens_k, batch, seqlen_q, seqlen_k,
        *mask_bounds(causal, window_left, window_right), q.shape[-1] ** -0.5 if scale is None else scale, softcap,
        alibi_slopes, bias, dropout_arguments(dropout_p, dropout_seed),
    )  # fmt: skip


def sink_gradients(call: Backward, sinks: torch.Tensor | None) -> torch.Tensor:
    """Gradients of the sinks, ``[heads]`` in their dtype; empty without sinks."""
    if sinks is None:
        return call.q.new_empty(0, dtype=torch.float32)
    # lse includes the sink, whose probability is exp(sink - lse). With an infinite sink that is 1, and in an empty row
    # delta is 0 and lse_log2 inf.
    largest = torch.finfo(torch.float32).max
    p = torch.exp2((sinks.float()[:, None] * LOG2_E.value).clamp(max=largest) - call.lse_log2.clamp(max=largest))
    return -(p * call.delta).sum(-1 if call.lse_log2.dim() == 2 else (0, 2)).to(sinks.dtype)
