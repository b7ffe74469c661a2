"""The gradient of a bias: each program owns a tile of it and recomputes the scores that the tile was added to.

A bias that is the same for all rows, columns, heads or batch entries gets the sum over them. One program adds all terms
of its tile in a fixed order, so no sum depends on which program is first. Where a single row or column is left of the
matrix, a head has too few tiles to fill a GPU: each head and batch entry is then summed by itself, and ``launch_bias``
adds those small results. Packed sequences are batch entries that own rows of one matrix.
"""

import torch
import triton
import triton.language as tl

from kvops.kernels.dense import bias_arguments, longest, padded, row_strides, slope_stride, token_strides
from kvops.kernels.device import current_device
from kvops.kernels.flash_backward import Backward, prepare
from kvops.kernels.flash_tiles import (
    alibi_slope,
    dropout_keeps,
    dropout_of_head,
    in_window,
    probabilities,
    row_products,
    sequence_tokens,
)
from kvops.kernels.primitives import load_rows


@triton.jit
def _tile_gradient(
    total,
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_log2_ptr,
    delta_ptr,
    bias_ptr,
    stride_qm,
    stride_kn,
    stride_vn,
    stride_dom,
    stride_bias_m,
    stride_bias_n,
    start_m,
    start_n,
    seqlen_q,
    seqlen_k,
    window_left,
    window_right,
    scale,
    softcap,
    slope,
    seed,
    drop_below,
    kept_share,
    plane,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """``total`` [BLOCK_M, BLOCK_N] plus P (dP - delta) of one head, for the queries and keys from these starts on."""
    rows = tl.arange(0, total.shape[0])
    columns = tl.arange(0, total.shape[1])
    left_q = seqlen_q - start_m
    left_k = seqlen_k - start_n
    first_q = tl.cast(start_m, tl.int64)
    first_k = tl.cast(start_n, tl.int64)
    q = load_rows(q_ptr + first_q * stride_qm, rows, stride_qm, left_q, HEAD_DIM, BLOCK_D, True)
    k = load_rows(k_ptr + first_k * stride_kn, columns, stride_kn, left_k, HEAD_DIM, BLOCK_D, True)
    lse = tl.load(lse_log2_ptr + first_q + rows, mask=rows < left_q, other=float("inf"))
    delta = tl.load(delta_ptr + first_q + rows, mask=rows < left_q, other=0.0)
    distance = (start_m + rows + seqlen_k - seqlen_q)[:, None] - (start_n + columns)[None, :]
    p, _ = probabilities(
        row_products(q, k), distance, lse, bias_ptr, start_m + rows, start_n + columns, stride_bias_m, stride_bias_n,
        seqlen_q, seqlen_k, scale, softcap, slope, 1, HAS_SOFTCAP, HAS_ALIBI,
    )  # fmt: skip
    seen = in_window(distance, window_left, window_right, HAS_LEFT, HAS_RIGHT) & (columns < left_k)[None, :]
    p = tl.where(seen, p, 0.0)
    v = load_rows(v_ptr + first_k * stride_vn, columns, stride_vn, left_k, HEAD_DIM_V, BLOCK_DV, True)
    dout = load_rows(dout_ptr + first_q * stride_dom, rows, stride_dom, left_q, HEAD_DIM_V, BLOCK_DV, True)
    dp = row_products(dout, v)
    if HAS_DROPOUT:
        keeps = dropout_keeps(seed, drop_below, plane, start_m, start_n, total.shape[0], total.shape[1])
        dp = tl.where(keeps, dp, 0.0)
        delta *= kept_share
    return total + p * (dp - delta[:, None])


# Over 80 lines: 59 are the signature.
@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "window_left", "window_right", "drop_below"])
def flash_backward_bias_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_log2_ptr,
    delta_ptr,
    bias_ptr,
    dbias_ptr,
    slopes_ptr,
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
    stride_bias_b,
    stride_bias_h,
    stride_bias_m,
    stride_bias_n,
    stride_dbias_b,
    stride_dbias_h,
    stride_dbias_m,
    stride_slopes_b,
    batches,
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
    SUM_BATCHES: tl.constexpr,
    SUM_HEADS: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    HAS_ALIBI: tl.constexpr = slopes_ptr is not None
    HAS_DROPOUT: tl.constexpr = seed_ptr is not None
    offset = seqlen_k - seqlen_q
    # The first tile, head and batch entry of this program, and the first ones that are no longer its own.
    place = tl.program_id(0)
    first_n = 0
    end_n = seqlen_k
    if not SUM_COLUMNS:
        first_n = place % tl.cdiv(seqlen_k, BLOCK_N) * BLOCK_N
        end_n = tl.minimum(first_n + BLOCK_N, seqlen_k)
        place = place // tl.cdiv(seqlen_k, BLOCK_N)
    first_m = 0
    end_m = seqlen_q
    if not SUM_ROWS:
        first_m = place % tl.cdiv(seqlen_q, BLOCK_M) * BLOCK_M
        end_m = tl.minimum(first_m + BLOCK_M, seqlen_q)
        place = place // tl.cdiv(seqlen_q, BLOCK_M)
    first_head = 0
    end_head = heads
    if not SUM_HEADS:
        first_head = place % heads
        end_head = first_head + 1
        place = place // heads
    first_batch = place
    end_batch = batches if SUM_BATCHES else place + 1
    if cu_seqlens_q_ptr is not None:
        first_q, seqlen_q = sequence_tokens(cu_seqlens_q_ptr, place, seqlen_q)
        first_k, seqlen_k = sequence_tokens(cu_seqlens_k_ptr, place, seqlen_k)
        offset = seqlen_k - seqlen_q
        end_m = tl.minimum(end_m, seqlen_q)
        end_n = tl.minimum(end_n, seqlen_k)
        q_ptr += first_q * stride_qm
        k_ptr += first_k * stride_kn
        v_ptr += first_k * stride_vn
        dout_ptr += first_q * stride_dom
        lse_log2_ptr += first_q
        delta_ptr += first_q
        bias_ptr += first_q * stride_bias_m
        if not SUM_ROWS:
            dbias_ptr += first_q * stride_dbias_m

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for entry in tl.range(first_batch, end_batch):
        batch = tl.cast(entry, tl.int64)
        for member in tl.range(first_head, end_head):
            head = tl.cast(member, tl.int64)
            row = batch * stride_lb + head * stride_lh
            slope = alibi_slope(slopes_ptr, batch, head, stride_slopes_b)
            seed, plane = dropout_of_head(seed_ptr, batch, heads, head)
            for start_m in tl.range(first_m, end_m, BLOCK_M):
                for start_n in tl.range(first_n, end_n, BLOCK_N):
                    # The distances of the last query to the first key, and of the first query to the last key.
                    farthest = start_m + BLOCK_M - 1 + offset - start_n
                    nearest = start_m + offset - (start_n + BLOCK_N - 1)
                    seen = start_m < end_m
                    if HAS_LEFT:
                        seen = seen & (nearest <= window_left)
                    if HAS_RIGHT:
                        seen = seen & (farthest >= -window_right)
                    if seen:
                        total = _tile_gradient(
                            total,
                            q_ptr + batch * stride_qb + head * stride_qh,
                            k_ptr + batch * stride_kb + head // GROUP * stride_kh,
                            v_ptr + batch * stride_vb + head // GROUP * stride_vh,
                            dout_ptr + batch * stride_dob + head * stride_doh,
                            lse_log2_ptr + row,
                            delta_ptr + row,
                            bias_ptr + batch * stride_bias_b + head * stride_bias_h,
                            stride_qm, stride_kn, stride_vn, stride_dom, stride_bias_m, stride_bias_n, start_m, start_n,
                            seqlen_q, seqlen_k, window_left, window_right, scale, softcap, slope, seed, drop_below,
                            kept_share, plane, HEAD_DIM, HEAD_DIM_V, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI,
                            HAS_DROPOUT, BLOCK_D, BLOCK_DV,
                        )  # fmt: skip

    if HAS_DROPOUT:
        total = total / kept_share
    rows = first_m + tl.arange(0, BLOCK_M)[:, None]
    columns = first_n + tl.arange(0, BLOCK_N)[None, :]
    if SUM_ROWS:
        total = tl.sum(total, 0, keep_dims=True)
        rows = tl.zeros([1, 1], tl.int32)
    if SUM_COLUMNS:
        total = tl.sum(total, 1, keep_dims=True)
        columns = tl.zeros([1, 1], tl.int32)
    dbias_ptr += tl.cast(first_batch, tl.int64) * stride_dbias_b + tl.cast(first_head, tl.int64) * stride_dbias_h
    places = rows.to(tl.int64) * stride_dbias_m + columns
    tl.store(dbias_ptr + places, total, mask=(rows < end_m) & (columns < end_n))


def _tile(width: int, itemsize: int, dropout: bool) -> tuple[int, int, int]:
    """block_m, block_n and warps, which compile with next to no spills (4 stores on sm_80) on what was tried."""
    if itemsize == 4 or width > 256:
        return 16, 16, 4
    if width <= 128:
        return 16 if dropout else 32, 64, 4 if current_device().backend == "hip" else 8
    return 16, 32, 8


def flash_bias_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor,
    *,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    dlse: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch the kernel; see ``kvops.flash_attention_bias_backward``."""
    call = prepare(
        dout, q, k, v, out, lse, None, None, q.shape[0], q.shape[1], k.shape[1],
        causal, window_left, window_right, scale, softcap, alibi_slopes, dlse, bias, dropout_p, dropout_seed,
    )  # fmt: skip
    return launch_bias(call, bias)


def flash_bias_backward_varlen(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor,
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
    dlse: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch the kernel on packed sequences; see ``kvops.flash_attention_varlen_bias_backward``."""
    call = prepare(
        dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k,
        cu_seqlens_q.shape[0] - 1, longest(max_seqlen_q, q), longest(max_seqlen_k, k),
        causal, window_left, window_right, scale, softcap, alibi_slopes, dlse, bias, dropout_p, dropout_seed,
    )  # fmt: skip
    return launch_bias(call, bias)


def _stored(call: Backward, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[bool, ...], list[int], list[int]]:
    """How the gradient of a bias of ``shape`` is made: sizes, over which of them a program sums, their numbers of
    parts, and the shape in which the results are stored.

    Packed sequences count as batch entries that own rows of one matrix [total_q, max_seqlen_k]; a sum over all rows has
    a result for each sequence.
    """
    sizes = call.batch, call.q.shape[-2], call.seqlen_q, call.seqlen_k
    packed = call.cu_seqlens_q is not None
    whole = (1, sizes[1], call.q.shape[0], max(shape[3], sizes[3])) if packed else sizes
    same = [own == 1 < size for own, size in zip(shape, whole, strict=True)]
    matrix = not (same[2] or same[3])
    sums = same[0] and matrix, same[1] and matrix, same[2], same[3]
    parts = [1 if summed else size for summed, size in zip(sums, sizes, strict=True)]
    stored = [1 if summed else size for summed, size in zip(sums, whole, strict=True)]
    if packed and same[2]:
        stored[0] = call.batch
    return sizes, sums, parts, stored


def launch_bias(call: Backward, bias: torch.Tensor) -> torch.Tensor:
    """The gradient in the shape and dtype of ``bias``."""
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    sizes, sums, parts, stored = _stored(call, shape)
    dbias = torch.zeros(stored, dtype=torch.float32, device=bias.device)
    strides = (dbias.stride(0) if stored[0] == parts[0] else 0, *dbias.stride()[1:3])
    head_dim, head_dim_v = call.q.shape[-1], call.v.shape[-1]
    width = max(padded(head_dim), padded(head_dim_v))
    block_m, block_n, warps = _tile(width, call.q.element_size(), call.dropout[0] is not None)
    programs = parts[0] * parts[1] * triton.cdiv(parts[2], block_m) * triton.cdiv(parts[3], block_n)
    if programs > 0 and all(sizes):
        flash_backward_bias_kernel[(programs,)](
            call.q,
            call.k,
            call.v,
            call.dout,
            call.lse_log2,
            call.delta,
            bias,
            dbias,
            call.alibi_slopes,
            call.cu_seqlens_q,
            call.cu_seqlens_k,
            call.dropout[0],
            *token_strides(call.q),
            *token_strides(call.k),
            *token_strides(call.v),
            *token_strides(call.dout),
            *row_strides(call.delta),
            *bias_arguments(bias, call.q, call.k)[1:],
            *strides,
            slope_stride(call.alibi_slopes),
            *sizes,
            call.window_left,
            call.window_right,
            call.scale,
            call.softcap,
            *call.dropout[1:],
            GROUP=call.q.shape[-2] // call.k.shape[-2],
            HEAD_DIM=head_dim,
            HEAD_DIM_V=head_dim_v,
            HAS_LEFT=call.window_left >= 0,
            HAS_RIGHT=call.window_right >= 0,
            HAS_SOFTCAP=call.softcap > 0,
            SUM_BATCHES=sums[0],
            SUM_HEADS=sums[1],
            SUM_ROWS=sums[2],
            SUM_COLUMNS=sums[3],
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=padded(head_dim),
            BLOCK_DV=padded(head_dim_v),
            num_warps=warps,
            num_stages=1,
            enable_fp_fusion=True,
        )
    result = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    result.view(shape).copy_(dbias.sum_to_size(shape))
    return result
