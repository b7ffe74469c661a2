"""Device functions that several kernels share, named for their mathematics."""

import triton
import triton.language as tl
from triton import knobs

# exp2 is one instruction on a GPU. Scores are scaled by log2(e) once, so that exp2 replaces exp.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# The largest float32.
LARGEST = tl.constexpr(3.4028234663852886e38)

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
def without_nan(x):
    """``x`` with +inf for NaN, which a maximum would leave out."""
    return tl.where(x == x, x, float("inf"))


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
def e5m2_to_float16(bits):
    """float8 e5m2 (its bits as uint8) as float16, exactly: it is the high byte of one."""
    return (bits.to(tl.uint16) << 8).to(tl.float16, bitcast=True)


@triton.jit
def int8_to_float32(x):
    """int8 as float32, exactly: x + 128 is in the low bits of 2^23 + (x + 128).

    Triton's own conversion is wrong for bfloat16 in its interpreter, and on GPUs assembly that only they run.
    """
    shifted = (x.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint32) | 0x4B000000
    return shifted.to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def float32_to_float8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST_FLOAT8: tl.constexpr):
    """float32 -> the bits (uint8) of a float8: rounded to nearest even and clamped to its largest; NaN stays NaN.

    e4m3 has 3 bits of mantissa, a bias of 7 and ends at 448; e5m2 has 2, 15 and ends at 57,344.
    """
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = tl.minimum(tl.abs(x), LARGEST_FLOAT8)
    magnitude_bits = magnitude.to(tl.uint32, bitcast=True)
    # Keep some of 23 mantissa bits and move the exponent's bias from 127.
    DROPPED: tl.constexpr = 23 - MANTISSA
    HALF: tl.constexpr = (1 << (DROPPED - 1)) - 1
    normal = ((magnitude_bits + HALF + ((magnitude_bits >> DROPPED) & 1)) >> DROPPED) - ((127 - BIAS) << MANTISSA)
    # Below the smallest normal number the spacing is constant: adding 1.5 times a power of two rounds to it, and leaves
    # the count in the low bits.
    subnormal = (magnitude + 1.5 * 2.0 ** (24 - BIAS - MANTISSA)).to(tl.uint32, bitcast=True) & 0xF
    code = tl.where(magnitude < 2.0 ** (1 - BIAS), subnormal, normal)
    code = tl.where(x == x, code, 0x7F)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def float32_to_int8(x):
    """float32 -> int8: clamped to [-127, 127] and rounded to nearest even; NaN becomes 0, as int8 has none."""
    x = tl.where(x == x, x, 0.0)
    x = tl.minimum(tl.maximum(x, -127.0), 127.0)
    # Adding 1.5 * 2^23 rounds to a whole number, and leaves it in the low bits.
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def as_uint8_pointer(ptr):
    """A pointer to float8 e5m2 as one to its bits. Other pointers stay as they are."""
    if ptr.dtype.element_ty == tl.float8e5:
        ptr = ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    return ptr
