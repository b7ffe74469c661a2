"""dQ: each program owns a tile of queries and loops over keys, through tensor descriptors (TMA) or pointers."""

import triton
import triton.language as tl

from kvops.kernels.flash_tiles import (
    alibi_slope,
    block_at,
    block_range,
    dropout_keeps,
    dropout_of_head,
    in_window,
    key_blocks,
    load_tile,
    probabilities,
    row_products,
    score_gradient,
    sequence_tokens,
)
from kvops.kernels.primitives import dot, load_rows, program_tile, store_rows


@triton.jit
def _gather_query_gradient(
    dq,
    q,
    dout,
    lse,
    delta,
    position,
    k_desc,
    v_desc,
    batch,
    first_k,
    kv_head,
    k_ptr,
    v_ptr,
    stride_kn,
    stride_vn,
    start,
    full_start,
    full_end,
    end,
    seqlen_k,
    window_left,
    window_right,
    scale,
    softcap,
    slope,
    bias_ptr,
    stride_bias_m,
    stride_bias_n,
    start_m,
    seqlen_q,
    seed,
    drop_below,
    plane,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Add what the key blocks that need a mask (if MASKED, else the others) give to dQ."""
    columns = tl.arange(0, BLOCK_N)
    low, high = block_range(start, full_start, full_end, end, HAS_LEFT, MASKED)
    for place in tl.range(low, high, BLOCK_N):
        start_n = block_at(place, full_start, full_end, HAS_LEFT, MASKED)
        left = seqlen_k - start_n
        k = load_tile(  # [BLOCK_N, BLOCK_D]
            k_desc, batch, first_k, kv_head, k_ptr, start_n, columns, stride_kn, left, HEAD_DIM, BLOCK_D, MASKED
        )
        v = load_tile(  # [BLOCK_N, BLOCK_DV]
            v_desc, batch, first_k, kv_head, v_ptr, start_n, columns, stride_vn, left, HEAD_DIM_V, BLOCK_DV, MASKED
        )
        s = row_products(q, k)  # [BLOCK_M, BLOCK_N]
        distance = position[:, None] - (start_n + columns)[None, :]
        p, slope_of_cap = probabilities(
            s, distance, lse, bias_ptr, start_m + tl.arange(0, q.shape[0]), start_n + columns, stride_bias_m,
            stride_bias_n, seqlen_q, seqlen_k, scale, softcap, slope, 1, HAS_SOFTCAP, HAS_ALIBI,
        )  # fmt: skip
        if MASKED:
            seen = in_window(distance, window_left, window_right, HAS_LEFT, HAS_RIGHT) & (columns < left)[None, :]
            p = tl.where(seen, p, 0.0)
        dp = row_products(dout, v)
        if HAS_DROPOUT:
            dp = tl.where(dropout_keeps(seed, drop_below, plane, start_m, start_n, q.shape[0], BLOCK_N), dp, 0.0)
        ds = score_gradient(p, dp, delta, slope_of_cap, 1, HAS_SOFTCAP)
        dq = dot(ds.to(k.dtype), k, dq)  # [BLOCK_M, BLOCK_D]
    return dq


# Over 80 lines: 52 are the signature.
@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "window_left", "window_right", "drop_below"])
def flash_backward_queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_log2_ptr,
    delta_ptr,
    k_desc,
    v_desc,
    dq_ptr,
    slopes_ptr,
    bias_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seed_ptr,
    stride_qb,
    stride_qm,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_dob,
    stride_dom,
    stride_doh,
    stride_lb,
    stride_lh,
    stride_dqb,
    stride_dqm,
    stride_dqh,
    stride_slopes_b,
    stride_bias_b,
    stride_bias_h,
    stride_bias_m,
    stride_bias_n,
    heads,
    seqlen_q,
    seqlen_k,
    window_left,
    window_right,
    scale,
    softcap,
    drop_below,
    kept_share,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    HAS_ALIBI: tl.constexpr = slopes_ptr is not None
    HAS_DROPOUT: tl.constexpr = seed_ptr is not None
    start_m, head, batch = program_tile(seqlen_q, heads, BLOCK_M, LAST_FIRST=True)
    first_q, seqlen_q = sequence_tokens(cu_seqlens_q_ptr, batch, seqlen_q)
    first_k, seqlen_k = sequence_tokens(cu_seqlens_k_ptr, batch, seqlen_k)
    if cu_seqlens_q_ptr is not None:  # noqa: SIM102 - asked of dense inputs, it spills float32 (sm_80)
        if start_m >= seqlen_q:
            return
    first_row = first_q
    first_q += start_m
    q_ptr += batch * stride_qb + head * stride_qh + first_q * stride_qm
    dout_ptr += batch * stride_dob + head * stride_doh + first_q * stride_dom
    lse_log2_ptr += batch * stride_lb + head * stride_lh + first_q
    delta_ptr += batch * stride_lb + head * stride_lh + first_q
    k_ptr += batch * stride_kb + head // GROUP * stride_kh + first_k * stride_kn
    v_ptr += batch * stride_vb + head // GROUP * stride_vh + first_k * stride_vn
    slope = alibi_slope(slopes_ptr, batch, head, stride_slopes_b)
    if bias_ptr is not None:
        bias_ptr += batch * stride_bias_b + head * stride_bias_h + first_row * stride_bias_m
    seed, plane = dropout_of_head(seed_ptr, batch, heads, head)

    rows = tl.arange(0, BLOCK_M)
    left = seqlen_q - start_m
    offset = seqlen_k - seqlen_q
    position = start_m + rows + offset
    q = load_rows(q_ptr, rows, stride_qm, left, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    dout = load_rows(dout_ptr, rows, stride_dom, left, HEAD_DIM_V, BLOCK_DV, True)  # [BLOCK_M, BLOCK_DV]
    lse = tl.load(lse_log2_ptr + rows, mask=rows < left, other=float("inf"))
    delta = tl.load(delta_ptr + rows, mask=rows < left, other=0.0)
    if HAS_DROPOUT:
        delta *= kept_share
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    start, full_start, full_end, end = key_blocks(
        start_m, seqlen_q, seqlen_k, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    # First the blocks that every query sees whole, then those that need a mask.
    for MASKED in tl.static_range(2):
        dq = _gather_query_gradient(
            dq, q, dout, lse, delta, position, k_desc, v_desc, batch, first_k, head // GROUP, k_ptr, v_ptr, stride_kn,
            stride_vn, start, full_start, full_end, end, seqlen_k, window_left, window_right, scale, softcap, slope,
            bias_ptr, stride_bias_m, stride_bias_n, start_m, seqlen_q, seed, drop_below, plane, HEAD_DIM, HEAD_DIM_V,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, MASKED, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    if HAS_DROPOUT:
        scale = scale / kept_share
    dq_ptr += batch * stride_dqb + head * stride_dqh + first_q * stride_dqm
    store_rows(dq_ptr, rows, stride_dqm, left, dq * scale, HEAD_DIM, BLOCK_D)
