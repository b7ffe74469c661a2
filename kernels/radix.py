"""Selection and sorting by digits: int32 keys in the order of float32 scores, and integer counts of their digits.

These are device functions of one program, which owns a contiguous range of keys. They only count and add integers, so
equal keys give equal results.
"""

import triton
import triton.language as tl

# Special keys. NaN is below -inf, an absent slot below that, and a protected slot above +inf.
ABSENT = tl.constexpr(-(2**31))
NAN = tl.constexpr(-(2**31) + 1)
PROTECTED = tl.constexpr(2**31 - 1)
# Scores are clamped to these limits, so that the sum of a block is always finite.
LARGEST = tl.constexpr(1.5 * 2.0**126)


@triton.jit
def ordered_keys(x):
    """int32 keys that order as float32 ``x`` does; NaN lowest, the two zeros equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    # Adding zero does not make -0.0 positive once a compiler has dropped the addition.
    bits = tl.where(x == 0.0, 0, bits)
    return tl.where(x != x, NAN, bits ^ ((bits >> 31) & PROTECTED))


@triton.jit
def ordered_values(keys):
    """The finite float32 values of ``ordered_keys``, infinities and NaN at the limits."""
    values = (keys ^ ((keys >> 31) & PROTECTED)).to(tl.float32, bitcast=True)
    values = tl.minimum(tl.maximum(values, -LARGEST), LARGEST)
    return tl.where(keys == NAN, -LARGEST, values)


@triton.jit
def unsigned(keys):
    """uint32 with the order of int32 ``keys``, so that digits compare from the highest down."""
    return keys.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def radix_select(keys_ptr, count, take, BLOCK: tl.constexpr):
    """Where to cut ``count`` keys so that ``take`` are left: (threshold, ties, equal).

    All keys above ``threshold`` are taken, and ``ties`` of the ``equal`` keys that are the same as it. Four readings,
    eight bits each.
    """
    digits = tl.arange(0, 256)
    prefix = tl.full((), 0, tl.uint32)
    ties = take
    equal = take
    for step in range(4):
        shift = 24 - 8 * step
        counts = tl.zeros([256], tl.int32)
        for start in range(0, count, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            within = offsets < count
            key = unsigned(tl.load(keys_ptr + offsets, mask=within, other=0))  # [BLOCK]
            digit = ((key >> shift) & 255).to(tl.int32)
            counts += tl.histogram(digit, 256, mask=within & (((key >> shift) >> 8) == prefix))
        above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
        cut = tl.max(tl.where(above + counts >= ties, digits, 0), 0)
        ties -= tl.sum(tl.where(digits == cut, above, 0), 0)
        equal = tl.sum(tl.where(digits == cut, counts, 0), 0)
        prefix = prefix * 256 + cut.to(tl.uint32)
    return (prefix ^ 0x80000000).to(tl.int32, bitcast=True), ties, equal


@triton.jit
def radix_sort_descending(keys_ptr, stride_buffer, count, BLOCK: tl.constexpr):
    """Sort ``count`` keys from buffer 0 into buffer 2, through buffer 1, ``stride_buffer`` keys apart each."""
    digits = tl.arange(0, 16)
    for step in range(8):
        # Other threads of this program wrote what this pass reads.
        tl.debug_barrier()
        source_ptr = keys_ptr + tl.where(step == 0, 0, 1 + (step - 1) % 2) * stride_buffer
        target_ptr = keys_ptr + (1 + step % 2) * stride_buffer
        counts = tl.zeros([16], tl.int32)
        for start in range(0, count, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            within = offsets < count
            key = unsigned(tl.load(source_ptr + offsets, mask=within, other=0))
            digit = 15 - ((key >> (step * 4)) & 15).to(tl.int32)
            counts += tl.histogram(digit, 16, mask=within)
        first = tl.cumsum(counts, 0) - counts  # [16]: where the keys of each digit go
        for start in range(0, count, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            within = offsets < count
            key = tl.load(source_ptr + offsets, mask=within, other=0)
            digit = 15 - ((unsigned(key) >> (step * 4)) & 15).to(tl.int32)
            mine = (digit[:, None] == digits[None, :]) & within[:, None]  # [BLOCK, 16]
            ones = mine.to(tl.int32)
            place = tl.sum(tl.where(mine, tl.cumsum(ones, 0) - 1 + first[None, :], 0), 1)
            tl.store(target_ptr + place, key, mask=within)
            first += tl.sum(ones, 0)
