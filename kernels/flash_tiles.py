"""Tiles of dense attention, for forward, gradients and column reductions: the blocks that a tile loops over under
causal masks and windows, and the gradients of one block.
"""

import triton
import triton.language as tl

from kvops.kernels.primitives import LOG2_E, dot, load_rows, log2_scores

# The last word of the counters of dropout: no other random numbers have it.
DROPOUT = tl.constexpr(0x44524F50)


@triton.jit
def sequence_tokens(cu_seqlens_ptr, batch, length):
    """The first token (int64) and the length of sequence ``batch``: 0 and ``length`` unless it is a packed one."""
    first = 0
    if cu_seqlens_ptr is not None:
        first = tl.load(cu_seqlens_ptr + batch)
        length = tl.load(cu_seqlens_ptr + batch + 1) - first
    return tl.cast(first, tl.int64), length


@triton.jit
def alibi_slope(slopes_ptr, batch, head, stride_b):
    """The ALiBi slope of a head in float32; 0 without slopes."""
    slope = 0.0
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + batch * stride_b + head).to(tl.float32)
    return slope


@triton.jit
def load_tile(
    desc,
    entry,
    first,
    head,
    ptr,
    start,
    rows,
    stride_row,
    num_rows,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """The tile [len(rows), PADDED] of a head from row ``start`` on: through ``desc``, or without one from ``ptr``.

    ``desc`` holds all of [batch, seqlen, heads, width] and reads 0 past its ends; the sequence begins at row ``first``
    of the batch entry ``entry``. ``ptr`` points to row 0 of the head in the sequence, see ``load_rows``.
    """
    if desc is not None:
        place = [tl.cast(entry, tl.int32), first.to(tl.int32) + start, head.to(tl.int32), 0]
        tile = desc.load(place).reshape(rows.shape[0], PADDED)
    else:
        ptr += tl.cast(start, tl.int64) * stride_row
        tile = load_rows(ptr, rows, stride_row, num_rows, WIDTH, PADDED, BOUNDED)
    return tile


@triton.jit
def in_window(distance, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Whether a query sees a key ``distance`` positions before it (negative: after it)."""
    seen = distance == distance
    if HAS_LEFT:
        seen &= distance <= left
    if HAS_RIGHT:
        seen &= distance >= -right
    return seen


@triton.jit
def window_blocks(
    first, last, before, after, length, HAS_BEFORE: tl.constexpr, HAS_AFTER: tl.constexpr, BLOCK: tl.constexpr
):
    """The blocks of [0, length) that the positions first..last see, each p seeing [p - before, p + after].

    Returns start, full_start, full_end, end: blocks between full_start and full_end are seen whole by every position
    and need no mask, those from start to full_start and from full_end to end do. All but ``end`` are multiples of
    BLOCK.
    """
    start = 0
    end = length
    full_start = 0
    full_end = length // BLOCK * BLOCK
    if HAS_AFTER:
        end = tl.maximum(0, tl.minimum(length, last + after + 1))
        full_end = tl.maximum(0, tl.minimum(full_end, (first + after + 1) // BLOCK * BLOCK))
    if HAS_BEFORE:
        start = tl.maximum(0, first - before) // BLOCK * BLOCK
        full_start = tl.maximum(0, last - before + BLOCK - 1) // BLOCK * BLOCK
        full_start = tl.minimum(full_start, tl.cdiv(end, BLOCK) * BLOCK)
    full_start = tl.maximum(start, full_start)
    full_end = tl.maximum(full_start, full_end)
    return start, full_start, full_end, end


@triton.jit
def key_blocks(
    start_m,
    seqlen_q,
    seqlen_k,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The blocks of keys that the tile of queries from ``start_m`` on sees, as ``window_blocks`` returns them."""
    offset = seqlen_k - seqlen_q
    last_position = tl.minimum(start_m + BLOCK_M, seqlen_q) - 1 + offset
    return window_blocks(
        start_m + offset, last_position, window_left, window_right, seqlen_k, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )


@triton.jit
def query_blocks(
    start_n,
    seqlen_q,
    seqlen_k,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The blocks of queries that see the tile of keys from ``start_n`` on: a key j, those at j - right ... j + left.

    Returns start, full_start, end: blocks before full_start need a mask. A window on the left masks all of them (a
    second loop beside it spills on sm_120 and gfx950), the boundary on the right its own.
    """
    offset = seqlen_k - seqlen_q
    last_key = tl.minimum(start_n + BLOCK_N, seqlen_k) - 1
    start, full_start, _, end = window_blocks(
        start_n - offset, last_key - offset, window_right, window_left, seqlen_q, HAS_RIGHT, HAS_LEFT, BLOCK_M
    )
    if HAS_LEFT:
        full_start = end
    elif not HAS_RIGHT:
        full_start = start
    return start, full_start, end


@triton.jit
def block_range(start, full_start, full_end, end, HAS_BEFORE: tl.constexpr, MASKED: tl.constexpr):
    """The range of a loop over blocks from ``window_blocks``: those that are masked if MASKED, else those seen whole.

    One loop serves the masked blocks on both sides, and ``block_at`` tells where it is: of three loops in a kernel
    ptxas serialises the matrix products (C7515, sm_90).
    """
    if not MASKED:
        low, high = full_start, full_end
    elif HAS_BEFORE:
        low, high = start, end - (full_end - full_start)
    else:
        low, high = full_end, end
    return low, high


@triton.jit
def block_at(place, full_start, full_end, HAS_BEFORE: tl.constexpr, MASKED: tl.constexpr):
    """The block at ``place`` in ``block_range``: masked blocks on both sides jump over what lies between."""
    if MASKED and HAS_BEFORE:
        place += tl.where(place < full_start, 0, full_end - full_start)
    return place


@triton.jit
def row_products(a, b):
    """The dot products of each row of ``a`` with each row of ``b``: a @ b^T in float32."""
    return dot(a, tl.trans(b), tl.zeros([a.shape[0], b.shape[0]], tl.float32))


@triton.jit
def add_bias(scores, bias_ptr, queries, keys, stride_m, stride_n, seqlen_q, seqlen_k):
    """Log2 scores plus the bias of one head, which is added in units of log2 as well.

    ``queries`` and ``keys`` broadcast to the shape of ``scores``. A bias in uint8 is a mask: 0 hides a key. So does
    -inf, whatever the score is, and what times log2(e) is below the range of float32.
    """
    inside = (queries < seqlen_q) & (keys < seqlen_k)
    places = queries.to(tl.int64) * stride_m + keys.to(tl.int64) * stride_n
    bias = tl.load(bias_ptr + places, mask=inside, other=0)
    if bias_ptr.dtype.element_ty == tl.uint8:
        scores = tl.where(bias != 0, scores, float("-inf"))
    else:
        bias = bias.to(tl.float32) * LOG2_E
        scores = tl.where(bias == float("-inf"), bias, scores + bias)
    return scores


@triton.jit
def dropout_of_head(seed_ptr, batch, heads, head):
    """The seed of dropout (0 without one), and the number of the head of the batch entry among all of them."""
    seed = tl.cast(0, tl.int64)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    return seed, (batch * heads + head).to(tl.int32)


@triton.jit
def dropout_keeps(seed, drop_below, plane, start_m, start_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """bool [BLOCK_M, BLOCK_N]: which probabilities dropout keeps, numbered as kvops/eager/dropout.py explains.

    One block of random numbers serves four keys in a row, and ``start_n`` is a multiple of four. ``drop_below`` has the
    bits of a uint32.
    """
    queries = start_m + tl.arange(0, BLOCK_M)[:, None]
    fours = start_n // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
    a, b, c, d = tl.philox(seed, fours, queries, plane, DROPOUT)  # each [BLOCK_M, BLOCK_N / 4]
    low = drop_below.to(tl.uint32, bitcast=True)
    keeps = tl.join(tl.join(a >= low, c >= low), tl.join(b >= low, d >= low))  # the last dimension counts fastest
    return keeps.reshape(BLOCK_M, BLOCK_N)


@triton.jit
def probabilities(
    dots,
    distance,
    lse,
    bias_ptr,
    queries,
    keys,
    stride_bias_m,
    stride_bias_n,
    seqlen_q,
    seqlen_k,
    scale,
    softcap,
    slope,
    AXIS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
):
    """The softmax of a tile from raw dot products and ``lse`` in units of log2, unmasked: P = exp(S - lse).

    Queries lie along dimension 1 - AXIS. Also the derivative of the softcap. See ``add_bias`` for ``bias_ptr``, which
    may be None.
    """
    s, slope_of_cap = log2_scores(dots, distance, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI)
    if bias_ptr is not None:
        queries, keys = tl.expand_dims(queries, AXIS), tl.expand_dims(keys, 1 - AXIS)
        s = add_bias(s, bias_ptr, queries, keys, stride_bias_m, stride_bias_n, seqlen_q, seqlen_k)
    return tl.exp2(s - tl.expand_dims(lse, AXIS)), slope_of_cap


@triton.jit
def score_gradient(p, dp, delta, slope_of_cap, AXIS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """dS = P (dP - delta), with dP = dO V^T and delta the sum of P dP over a query's keys (Dao et al., 2022)."""
    ds = p * (dp - tl.expand_dims(delta, AXIS))
    if HAS_SOFTCAP:
        ds *= slope_of_cap
    return ds
