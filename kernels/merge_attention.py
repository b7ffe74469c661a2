"""Merge attention over two disjoint sets of keys, and its gradient: each program owns a tile of rows of one head."""

import torch
import triton
import triton.language as tl

from kvops.kernels.dense import padded, row_strides, token_strides
from kvops.kernels.primitives import LN_2, LOG2_E, load_rows, program_tile, store_rows


@triton.jit
def union_weights(lse_a, lse_b):
    """The weights of two parts of a softmax in their union and its lse; both are 0 where both parts are empty.

    Some kernels, FlashAttention-2's among them, give an empty row an lse of +inf.
    """
    lse_a = tl.where(lse_a == float("inf"), float("-inf"), lse_a)
    lse_b = tl.where(lse_b == float("inf"), float("-inf"), lse_b)
    m = tl.maximum(lse_a, lse_b)
    shift = tl.where(m == float("-inf"), 0.0, m)
    a = tl.exp2((lse_a - shift) * LOG2_E)
    b = tl.exp2((lse_b - shift) * LOG2_E)
    total = tl.where(a + b == 0.0, 1.0, a + b)
    return a / total, b / total, m + tl.log2(total) * LN_2


@triton.jit(do_not_specialize=["seqlen"])
def merge_attention_kernel(
    out_a_ptr,
    lse_a_ptr,
    out_b_ptr,
    lse_b_ptr,
    out_ptr,
    lse_ptr,
    stride_ab,
    stride_am,
    stride_ah,
    stride_bb,
    stride_bm,
    stride_bh,
    stride_ob,
    stride_om,
    stride_oh,
    stride_lab,
    stride_lah,
    stride_lbb,
    stride_lbh,
    stride_lb,
    stride_lh,
    heads,
    seqlen,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    start, head, batch = program_tile(seqlen, heads, BLOCK_M, LAST_FIRST=False)
    start = start.to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    left = seqlen - start
    lse_a = tl.load(lse_a_ptr + batch * stride_lab + head * stride_lah + start + rows, mask=rows < left, other=0.0)
    lse_b = tl.load(lse_b_ptr + batch * stride_lbb + head * stride_lbh + start + rows, mask=rows < left, other=0.0)
    weight_a, weight_b, lse = union_weights(lse_a, lse_b)
    out_a_ptr += batch * stride_ab + head * stride_ah + start * stride_am
    out_b_ptr += batch * stride_bb + head * stride_bh + start * stride_bm
    out_a = load_rows(out_a_ptr, rows, stride_am, left, HEAD_DIM, BLOCK_D, True).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    out_b = load_rows(out_b_ptr, rows, stride_bm, left, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    out = out_a * weight_a[:, None] + out_b * weight_b[:, None]
    out_ptr += batch * stride_ob + head * stride_oh + start * stride_om
    store_rows(out_ptr, rows, stride_om, left, out, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + batch * stride_lb + head * stride_lh + start + rows, lse, mask=rows < left)


@triton.jit(do_not_specialize=["seqlen"])
def merge_attention_backward_kernel(
    dout_ptr,
    dlse_ptr,
    out_a_ptr,
    lse_a_ptr,
    out_b_ptr,
    lse_b_ptr,
    dout_a_ptr,
    dlse_a_ptr,
    dout_b_ptr,
    dlse_b_ptr,
    stride_dob,
    stride_dom,
    stride_doh,
    stride_ab,
    stride_am,
    stride_ah,
    stride_bb,
    stride_bm,
    stride_bh,
    stride_gb,
    stride_gm,
    stride_gh,
    stride_dlb,
    stride_dlh,
    stride_lab,
    stride_lah,
    stride_lbb,
    stride_lbh,
    stride_glb,
    stride_glh,
    heads,
    seqlen,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradients of both parts have the same strides: ``stride_g*`` for out, ``stride_gl*`` for lse."""
    start, head, batch = program_tile(seqlen, heads, BLOCK_M, LAST_FIRST=False)
    start = start.to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    left = seqlen - start
    lse_a = tl.load(lse_a_ptr + batch * stride_lab + head * stride_lah + start + rows, mask=rows < left, other=0.0)
    lse_b = tl.load(lse_b_ptr + batch * stride_lbb + head * stride_lbh + start + rows, mask=rows < left, other=0.0)
    weight_a, weight_b, _ = union_weights(lse_a, lse_b)
    out_a_ptr += batch * stride_ab + head * stride_ah + start * stride_am
    out_b_ptr += batch * stride_bb + head * stride_bh + start * stride_bm
    dout_ptr += batch * stride_dob + head * stride_doh + start * stride_dom
    out_a = load_rows(out_a_ptr, rows, stride_am, left, HEAD_DIM, BLOCK_D, True).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    out_b = load_rows(out_b_ptr, rows, stride_bm, left, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    dout = load_rows(dout_ptr, rows, stride_dom, left, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    # d weight_a / d lse_a = weight_a * weight_b = -d weight_b / d lse_a
    change = tl.sum(dout * (out_a - out_b), 1) * weight_a * weight_b
    dlse_a = change
    dlse_b = -change
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + batch * stride_dlb + head * stride_dlh + start + rows, mask=rows < left, other=0.0)
        # The gradient of an empty row's -inf is nothing, whatever it reads.
        dlse_a += tl.where(weight_a == 0.0, 0.0, dlse * weight_a)
        dlse_b += tl.where(weight_b == 0.0, 0.0, dlse * weight_b)
    place = batch * stride_gb + head * stride_gh + start * stride_gm
    store_rows(dout_a_ptr + place, rows, stride_gm, left, dout * weight_a[:, None], HEAD_DIM, BLOCK_D)
    store_rows(dout_b_ptr + place, rows, stride_gm, left, dout * weight_b[:, None], HEAD_DIM, BLOCK_D)
    place = batch * stride_glb + head * stride_glh + start
    tl.store(dlse_a_ptr + place + rows, dlse_a, mask=rows < left)
    tl.store(dlse_b_ptr + place + rows, dlse_b, mask=rows < left)


def _grid(out: torch.Tensor) -> tuple[int, dict[str, int]]:
    """The number of programs and the constants of a launch."""
    batch = out.shape[0] if out.dim() == 4 else 1
    seqlen, heads, head_dim = out.shape[-3:]
    block_d = padded(head_dim)
    block_m = max(8, min(64, 4096 // block_d))
    constants = {"HEAD_DIM": head_dim, "BLOCK_M": block_m, "BLOCK_D": block_d}
    return triton.cdiv(seqlen, block_m) * heads * batch, constants


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel; see ``kvops.merge_attention``."""
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=lse_a.dtype, device=lse_a.device)
    programs, constants = _grid(out)
    if programs > 0:
        merge_attention_kernel[(programs,)](
            out_a,
            lse_a,
            out_b,
            lse_b,
            out,
            lse,
            *token_strides(out_a),
            *token_strides(out_b),
            *token_strides(out),
            *row_strides(lse_a),
            *row_strides(lse_b),
            *row_strides(lse),
            out.shape[-2],
            out.shape[-3],
            **constants,
            enable_fp_fusion=True,
        )
    return out, lse


def merge_attention_backward(
    dout: torch.Tensor,
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    dlse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernel; see ``kvops.merge_attention_backward``."""
    dout_a, dout_b = (torch.empty(dout.shape, dtype=dout.dtype, device=dout.device) for _ in range(2))
    dlse_a, dlse_b = (torch.empty(lse_a.shape, dtype=lse_a.dtype, device=lse_a.device) for _ in range(2))
    programs, constants = _grid(dout)
    if programs > 0:
        merge_attention_backward_kernel[(programs,)](
            dout,
            dlse,
            out_a,
            lse_a,
            out_b,
            lse_b,
            dout_a,
            dlse_a,
            dout_b,
            dlse_b,
            *token_strides(dout),
            *token_strides(out_a),
            *token_strides(out_b),
            *token_strides(dout_a),
            *(row_strides(dlse) if dlse is not None else (0, 0)),
            *row_strides(lse_a),
            *row_strides(lse_b),
            *row_strides(dlse_a),
            dout.shape[-2],
            dout.shape[-3],
            **constants,
            enable_fp_fusion=True,
        )
    return dout_a, dlse_a, dout_b, dlse_b
