"""Device functions that several kernels share, named for their mathematics."""

import triton
import triton.language as tl
from triton import knobs

# exp2 is one instruction on a GPU: scores are scaled by log2(e) once and never pass through exp.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32: float32 inputs in full precision (ieee), never tf32.

    Triton's interpreter multiplies the raw bits of bfloat16 (every version up to 3.9), hence the detour there.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_rows(ptr, rows, stride_row, num_rows, WIDTH: tl.constexpr, PADDED: tl.constexpr, BOUNDED: tl.constexpr):
    """The tile [len(rows), PADDED] at ``ptr``; columns past WIDTH and, where BOUNDED, rows past num_rows read as 0."""
    columns = tl.arange(0, PADDED)
    pointers = ptr + rows.to(tl.int64)[:, None] * stride_row + columns[None, :]
    if BOUNDED and WIDTH != PADDED:
        return tl.load(pointers, mask=(rows < num_rows)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    if BOUNDED:
        return tl.load(pointers, mask=(rows < num_rows)[:, None], other=0.0)
    if WIDTH != PADDED:
        return tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    return tl.load(pointers)


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
def store_rows(ptr, rows, stride_row, num_rows, tile, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Store the first WIDTH columns of ``tile`` [len(rows), PADDED] in the rows below num_rows."""
    columns = tl.arange(0, PADDED)
    pointers = ptr + rows.to(tl.int64)[:, None] * stride_row + columns[None, :]
    mask = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def program_tile(length, heads, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """The first row, head and batch entry of this program's tile, when every head of ``length`` rows has its own tiles.

    With LAST_FIRST a head's tiles are taken from its end: under a causal mask the last rows see the most keys, and no
    long program starts late.
    """
    blocks = tl.cdiv(length, BLOCK)
    pid = tl.program_id(0)
    block = pid % blocks
    if LAST_FIRST:
        block = blocks - 1 - block
    rest = pid // blocks
    return block * BLOCK, (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)


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
def tanh(x):
    """tanh to float32 precision: a series near 0, where the quotient of exponentials cancels."""
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    large = (1.0 - t) / (1.0 + t)
    x2 = x * x
    small = x * (1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 - x2 * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.15, small, tl.where(x < 0.0, -large, large))


@triton.jit
def log2_scores(dots, distance, scale, softcap, slope, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr):
    """Scores times log2(e) from raw dot products, ready for exp2: scale, softcap, ALiBi bias -slope * |distance|.

    Also the derivative of the softcap (1 where there is none), which backward multiplies into dS.
    """
    slope_of_cap = 1.0
    if HAS_SOFTCAP:
        t = tanh(dots * (scale / softcap))
        slope_of_cap = 1.0 - t * t
        scores = t * (softcap * LOG2_E)
    else:
        scores = dots * (scale * LOG2_E)
    if HAS_ALIBI:
        scores -= (slope * LOG2_E) * tl.abs(distance).to(tl.float32)
    return scores, slope_of_cap


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
def online_softmax_step(scores, m, l):
    """Fold the log2 scores [rows, keys] into the running maximum m and sum l of each row.

    Returns p, the factor that rescales what was accumulated before, and the new m and l. A row that has seen nothing
    keeps m = -inf, l = 0 and p = 0.
    """
    m_new = tl.maximum(m, tl.max(scores, 1))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(scores - shift[:, None])
    rescale = tl.exp2(m - shift)
    return p, rescale, m_new, l * rescale + tl.sum(p, 1)


@triton.jit
def philox_words(seed, step, position, stream: tl.constexpr, counter):
    """The four random words (uint32) of ``counter`` (int32), numbered as kvops/eager/philox.py explains.

    ``seed`` and ``step`` are int64, ``position`` int32; the result has the shape to which all of them broadcast.
    """
    step_low = (step & 0xFFFFFFFF).to(tl.uint32)
    step_high = ((step >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, counter, position * 4 + stream, step_low, step_high)


@triton.jit
def uniform_from_bits(bits):
    """32 random bits -> float32 in (0, 1), centred in their cell; small values keep 24 significant bits."""
    return tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 5.9604644775390625e-08)


@triton.jit
def exponential_from_uniform(u):
    """-log(1 - u), exact to the last bits for small u too: the smallest values decide an exponential race."""
    series = u * (1.0 / 7.0) + (1.0 / 6.0)
    series = series * u + 0.2
    series = series * u + 0.25
    series = series * u + (1.0 / 3.0)
    series = series * u + 0.5
    series = series * u + 1.0
    return tl.where(u < 0.0625, series * u, -tl.log(1.0 - u))


@triton.jit
def page_address(table_ptr, slots, inside, stride_table, BLOCK_SIZE: tl.constexpr):
    """Block and offset (int64) of the ``slots`` of the list whose table is at ``table_ptr``; block 0 where not
    ``inside``, whose entries are not read."""
    block = tl.load(table_ptr + (slots // BLOCK_SIZE) * stride_table, mask=inside, other=0)
    return block.to(tl.int64), (slots % BLOCK_SIZE).to(tl.int64)


@triton.jit
def e4m3_to_float16(bits):
    """float8 e4m3 (its bits as uint8) divided by 256, exactly: the same fields under the exponent bias of float16.

    No GPU before sm_89 converts e4m3, and the factor 256 costs nothing once it is folded into a scale. NaN is kept.
    """
    wide = bits.to(tl.uint16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return tl.where((wide & 0x7F) == 0x7F, 0x7E00, half).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def float32_to_e4m3(x):
    """float32 -> the bits (uint8) of float8 e4m3: rounded to nearest even and clamped to 448; NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = tl.minimum(tl.abs(x), 448.0)
    magnitude_bits = magnitude.to(tl.uint32, bitcast=True)
    # Keep 3 of 23 mantissa bits and move the exponent's bias from 127 to 7.
    normal = ((magnitude_bits + 0x7FFFF + ((magnitude_bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the spacing is 2^-9: adding 1.5 * 2^14 rounds to it, and leaves the count in the low bits.
    subnormal = (magnitude + 24576.0).to(tl.uint32, bitcast=True) & 0xF
    code = tl.where(magnitude < 0.015625, subnormal, normal)
    code = tl.where(x == x, code, 0x7F)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
