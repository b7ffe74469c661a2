"""dK and dV: each program owns a tile of keys and loops over the queries of every head of its group.

Scores are computed transposed, [keys, queries], so that P^T and dS^T can be left operands without a transposition. Q
and dO are read through tensor descriptors (TMA) if the configuration asks for it and the tensors allow it, else through
pointers.
"""

import triton
import triton.language as tl

from kvops.kernels.flash_tiles import (
    alibi_slope,
    dropout_keeps,
    dropout_of_head,
    in_window,
    load_tile,
    probabilities,
    query_blocks,
    row_products,
    score_gradient,
    sequence_tokens,
)
from kvops.kernels.primitives import dot, load_rows, program_tile, store_rows


# Over 80 lines: 56 are the signature; the loops with and without a mask share all accumulators.
@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "window_left", "window_right", "drop_below"])
def flash_backward_keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_log2_ptr,
    delta_ptr,
    q_desc,
    dout_desc,
    dk_ptr,
    dv_ptr,
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
    stride_dkb,
    stride_dkn,
    stride_dkh,
    stride_dvb,
    stride_dvn,
    stride_dvh,
    stride_slopes_b,
    stride_bias_b,
    stride_bias_h,
    stride_bias_m,
    stride_bias_n,
    kv_heads,
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
    # Under a causal mask the first keys are seen by the most queries: they start first.
    start_n, kv_head, batch = program_tile(seqlen_k, kv_heads, BLOCK_N, LAST_FIRST=False)
    first_q, seqlen_q = sequence_tokens(cu_seqlens_q_ptr, batch, seqlen_q)
    first_k, seqlen_k = sequence_tokens(cu_seqlens_k_ptr, batch, seqlen_k)
    if start_n >= seqlen_k:
        return
    first_k += start_n
    q_ptr += batch * stride_qb + first_q * stride_qm
    dout_ptr += batch * stride_dob + first_q * stride_dom
    lse_log2_ptr += batch * stride_lb + first_q
    delta_ptr += batch * stride_lb + first_q
    k_ptr += batch * stride_kb + kv_head * stride_kh + first_k * stride_kn
    v_ptr += batch * stride_vb + kv_head * stride_vh + first_k * stride_vn
    columns = tl.arange(0, BLOCK_N)
    keys = start_n + columns
    left = seqlen_k - start_n
    k = load_rows(k_ptr, columns, stride_kn, left, HEAD_DIM, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    v = load_rows(v_ptr, columns, stride_vn, left, HEAD_DIM_V, BLOCK_DV, True)  # [BLOCK_N, BLOCK_DV]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    offset = seqlen_k - seqlen_q
    start, full_start, end = query_blocks(
        start_n, seqlen_q, seqlen_k, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    rows = tl.arange(0, BLOCK_M)
    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        slope = alibi_slope(slopes_ptr, batch, head, stride_slopes_b)
        qh_ptr = q_ptr + head * stride_qh
        douth_ptr = dout_ptr + head * stride_doh
        lseh_ptr = lse_log2_ptr + head * stride_lh
        deltah_ptr = delta_ptr + head * stride_lh
        biash_ptr = None
        if bias_ptr is not None:
            biash_ptr = bias_ptr + batch * stride_bias_b + head * stride_bias_h + first_q * stride_bias_m
        seed, plane = dropout_of_head(seed_ptr, batch, kv_heads * GROUP, head)
        # One loop with a branch around the mask: two loops spill at this tile, and fit one of half as many queries.
        for start_m in tl.range(start, end, BLOCK_M):
            left_q = seqlen_q - start_m
            q = load_tile(  # [BLOCK_M, BLOCK_D]
                q_desc, batch, first_q, head, qh_ptr, start_m, rows, stride_qm, left_q, HEAD_DIM, BLOCK_D, True
            )
            # Rows past the end need no mask: their lse reads as +inf, which makes P 0.
            lse = tl.load(lseh_ptr + start_m + rows, mask=rows < left_q, other=float("inf"))
            delta = tl.load(deltah_ptr + start_m + rows, mask=rows < left_q, other=0.0)
            s = row_products(k, q)  # [BLOCK_N, BLOCK_M]
            distance = (start_m + rows + offset)[None, :] - keys[:, None]
            p, slope_of_cap = probabilities(
                s, distance, lse, biash_ptr, start_m + rows, keys, stride_bias_m, stride_bias_n, seqlen_q, seqlen_k,
                scale, softcap, slope, 0, HAS_SOFTCAP, HAS_ALIBI,
            )  # fmt: skip
            if HAS_LEFT or HAS_RIGHT:  # noqa: SIM102 - the first is known to the compiler
                if start_m < full_start:
                    p = tl.where(in_window(distance, window_left, window_right, HAS_LEFT, HAS_RIGHT), p, 0.0)
            dout = load_tile(  # [BLOCK_M, BLOCK_DV]
                dout_desc, batch, first_q, head, douth_ptr, start_m, rows, stride_dom, left_q, HEAD_DIM_V, BLOCK_DV,
                True,
            )  # fmt: skip
            weights = p
            if HAS_DROPOUT:
                keeps = tl.trans(dropout_keeps(seed, drop_below, plane, start_m, start_n, BLOCK_M, BLOCK_N))
                weights = tl.where(keeps, p, 0.0)
                delta *= kept_share
            dv = dot(weights.to(dout.dtype), dout, dv)
            dp = row_products(v, dout)
            if HAS_DROPOUT:
                dp = tl.where(keeps, dp, 0.0)
            ds = score_gradient(p, dp, delta, slope_of_cap, 0, HAS_SOFTCAP)
            dk = dot(ds.to(q.dtype), q, dk)

    # Not before the loop, which has no registers to spare.
    dk_ptr += batch * stride_dkb + kv_head * stride_dkh + first_k * stride_dkn
    dv_ptr += batch * stride_dvb + kv_head * stride_dvh + first_k * stride_dvn
    if HAS_DROPOUT:
        scale = scale / kept_share
        dv = dv / kept_share
    store_rows(dk_ptr, columns, stride_dkn, left, dk * scale, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr, columns, stride_dvn, left, dv, HEAD_DIM_V, BLOCK_DV)
