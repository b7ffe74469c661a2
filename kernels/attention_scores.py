"""Column reductions of the softmax: each program owns a tile of keys and loops over the queries that see it.

As in the pass for dK and dV of flash attention, p = exp(s - lse) is recomputed and reduced over the queries. The loop
covers all query heads of a group. Nothing is summed with atomics.
"""

import torch
import triton
import triton.language as tl

from kvops.autotune.lookup import choose
from kvops.kernels.dense import FAR, longest, mask_bounds, mask_kind, padded, row_strides, slope_stride, token_strides
from kvops.kernels.device import current_device
from kvops.kernels.flash_tiles import alibi_slope, in_window, query_blocks, row_products, sequence_tokens
from kvops.kernels.primitives import LOG2_E, load_rows, log2_scores, program_tile, without_nan


@triton.jit
def _reduce_queries(
    total,
    k,
    keys,
    q_ptr,
    lse_ptr,
    stride_qm,
    start,
    end,
    query_start,
    seqlen_q,
    offset,
    window_left,
    window_right,
    scale,
    softcap,
    slope,
    HEAD_DIM: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    REDUCE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Reduce the query blocks from ``start`` to ``end`` of one head into ``total`` (log2 of p for a maximum)."""
    rows = tl.arange(0, BLOCK_M)
    for start_m in tl.range(start, end, BLOCK_M):
        first = tl.cast(start_m, tl.int64)
        left = seqlen_q - start_m
        q = load_rows(q_ptr + first * stride_qm, rows, stride_qm, left, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
        # Rows that do not count read +inf, which makes p 0.
        counted = (rows < left) & (start_m + rows >= query_start)
        lse = tl.load(lse_ptr + first + rows, mask=counted, other=float("inf"))
        # A query that sees no key has lse -inf.
        lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
        s = row_products(k, q)  # [BLOCK_N, BLOCK_M]
        distance = (start_m + rows + offset)[None, :] - keys[:, None]
        s, _ = log2_scores(s, distance, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI)
        s -= lse[None, :]
        if MASKED:
            s = tl.where(in_window(distance, window_left, window_right, HAS_LEFT, HAS_RIGHT), s, float("-inf"))
        if REDUCE == "max":
            total = tl.maximum(total, tl.max(without_nan(s), 1))
        elif REDUCE == "sumsq":
            total += tl.sum(tl.exp2(2.0 * s), 1)
        else:
            total += tl.sum(tl.exp2(s), 1)
    return total


# Over 80 lines: 38 are the signature; the loop over the queries of a group keeps its tile of keys in registers.
@triton.jit(
    do_not_specialize=[
        *("stride_lb", "stride_lh", "stride_sb", "stride_sh"),
        *("seqlen_q", "seqlen_k", "query_start", "window_left", "window_right"),
    ]
)
def attention_scores_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    scores_ptr,
    slopes_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qb,
    stride_qm,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_lb,
    stride_lh,
    stride_sb,
    stride_sh,
    stride_slopes_b,
    kv_heads,
    seqlen_q,
    seqlen_k,
    query_start,
    window_left,
    window_right,
    scale,
    softcap,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    REDUCE: tl.constexpr,
    REDUCE_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    HAS_ALIBI: tl.constexpr = slopes_ptr is not None
    start_n, kv_head, batch = program_tile(seqlen_k, kv_heads, BLOCK_N, LAST_FIRST=False)
    first_q, seqlen_q = sequence_tokens(cu_seqlens_q_ptr, batch, seqlen_q)
    first_k, seqlen_k = sequence_tokens(cu_seqlens_k_ptr, batch, seqlen_k)
    if start_n >= seqlen_k:
        return
    first_k += start_n
    q_ptr += batch * stride_qb + first_q * stride_qm
    lse_ptr += batch * stride_lb + first_q
    k_ptr += batch * stride_kb + kv_head * stride_kh + first_k * stride_kn
    scores_ptr += batch * stride_sb + kv_head * stride_sh + first_k
    if query_start < 0:
        query_start = tl.maximum(0, query_start + seqlen_q)
    columns = tl.arange(0, BLOCK_N)
    keys = start_n + columns
    left = seqlen_k - start_n
    k = load_rows(k_ptr, columns, stride_kn, left, HEAD_DIM, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]

    offset = seqlen_k - seqlen_q
    start, full_start, end = query_blocks(
        start_n, seqlen_q, seqlen_k, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    # Of the queries that see a key, those from query_start on count.
    start = tl.maximum(start, query_start // BLOCK_M * BLOCK_M)
    if not HAS_LEFT:
        full_start = tl.maximum(full_start, start)

    result = tl.zeros([BLOCK_N], tl.float32)
    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        slope = alibi_slope(slopes_ptr, batch, head, stride_slopes_b)
        qh_ptr = q_ptr + head * stride_qh
        lseh_ptr = lse_ptr + head * stride_lh
        total = tl.full([BLOCK_N], float("-inf") if REDUCE == "max" else 0.0, tl.float32)
        if HAS_LEFT or HAS_RIGHT:
            total = _reduce_queries(
                total, k, keys, qh_ptr, lseh_ptr, stride_qm, start, full_start, query_start, seqlen_q,
                offset, window_left, window_right, scale, softcap, slope, HEAD_DIM, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
                HAS_ALIBI, REDUCE, True, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        if not HAS_LEFT:
            total = _reduce_queries(
                total, k, keys, qh_ptr, lseh_ptr, stride_qm, full_start, end, query_start, seqlen_q,
                offset, window_left, window_right, scale, softcap, slope, HEAD_DIM, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
                HAS_ALIBI, REDUCE, False, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        if REDUCE == "max":
            total = tl.exp2(total)
        if REDUCE_GROUP == "max":
            result = tl.maximum(result, without_nan(total))
        else:
            result += total
    if REDUCE_GROUP == "mean":
        result = result / GROUP
    tl.store(scores_ptr + columns, result, mask=columns < left)


def attention_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    query_start: int = 0,
    skip_recent: int = 0,
    reduce: str = "sum",
    group: str = "sum",
) -> torch.Tensor:
    """Launch the dense kernel; see ``kvops.attention_scores``."""
    scores = q.new_empty(k.shape[0], k.shape[2], k.shape[1], dtype=torch.float32)
    _launch(
        q, k, lse, scores, None, None, k.shape[0], q.shape[1], k.shape[1], causal, window_left, window_right,
        scale, softcap, alibi_slopes, query_start, skip_recent, reduce, group,
    )  # fmt: skip
    return scores


def attention_scores_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
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
    alibi_slopes: torch.Tensor | None = None,
    query_start: int = 0,
    skip_recent: int = 0,
    reduce: str = "sum",
    group: str = "sum",
) -> torch.Tensor:
    """Launch the kernel on packed sequences; see ``kvops.attention_scores_varlen``."""
    # Tokens after the last sequence belong to no sequence, so no query attends to them.
    scores = q.new_zeros(k.shape[1], k.shape[0], dtype=torch.float32)
    _launch(
        q, k, lse, scores, cu_seqlens_q, cu_seqlens_k,
        cu_seqlens_q.shape[0] - 1, longest(max_seqlen_q, q), longest(max_seqlen_k, k),
        causal, window_left, window_right, scale, softcap, alibi_slopes, query_start, skip_recent, reduce, group,
    )  # fmt: skip
    return scores


def _launch(
    q, k, lse, scores, cu_seqlens_q, cu_seqlens_k, batch, seqlen_q, seqlen_k, causal, window_left, window_right,
    scale, softcap, alibi_slopes, query_start, skip_recent, reduce, group,
):  # fmt: skip
    heads, head_dim = q.shape[-2:]
    kv_heads = k.shape[-2]
    block_d = padded(head_dim)
    window_left, window_right = mask_bounds(causal, window_left, window_right)
    mask = mask_kind(window_left, window_right)
    config = choose(
        "attention_scores", current_device(), block_d, q.element_size(), mask, batch * heads, seqlen_q, seqlen_k
    )
    programs = triton.cdiv(seqlen_k, config.block_n) * kv_heads * batch
    if programs == 0:
        return
    bounded_right = window_right >= 0
    if skip_recent > 0:
        # Skipping recent keys is a window that ends before the query.
        window_right, bounded_right = -min(skip_recent, FAR), True
    attention_scores_kernel[(programs,)](
        q,
        k,
        lse,
        scores,
        alibi_slopes,
        cu_seqlens_q,
        cu_seqlens_k,
        *token_strides(q),
        *token_strides(k),
        *row_strides(lse),
        *row_strides(scores),
        slope_stride(alibi_slopes),
        kv_heads,
        seqlen_q,
        seqlen_k,
        query_start,
        window_left,
        window_right,
        head_dim**-0.5 if scale is None else scale,
        softcap,
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        HAS_LEFT=window_left >= 0,
        HAS_RIGHT=bounded_right,
        HAS_SOFTCAP=softcap > 0,
        REDUCE=reduce,
        REDUCE_GROUP=group,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=block_d,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
