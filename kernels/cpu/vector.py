"""Vectors of float32 in registers, for the inner products and weighted sums that LLVM would not vectorise well alone.

An address is an integer, in bytes; vectors need no alignment.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import config, int64, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, models, register_model

from kvops.kernels.cpu.jit import inlined, jit

_FEATURES = (get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES).split(",")

# Numbers in a vector: a register of the processor that numba compiles for.
LANES = 16 if "+avx512f" in _FEATURES else 8
# Whether that processor converts float16. For others LLVM calls functions that a process may not have.
_HAS_FLOAT16 = "+f16c" in _FEATURES or platform.machine() in ("aarch64", "arm64")
_VECTOR = ir.VectorType(ir.FloatType(), LANES)
LINE = 64  # bytes that come from memory at once


class _VectorType(types.Type):
    def __init__(self) -> None:
        super().__init__(f"float32x{LANES}")


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, data_model_manager: Any, numba_type: Any) -> None:
        super().__init__(data_model_manager, numba_type, _VECTOR)


vector = _VectorType()
_Generate = Callable[[Any, Any, Any, Any], Any]


@intrinsic
def zero(typing_context: Any) -> tuple[Any, _Generate]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(_VECTOR, None)

    return vector(), generate


@intrinsic
def load(typing_context: Any, address: Any) -> tuple[Any, _Generate]:
    """The ``LANES`` numbers from ``address`` on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], _VECTOR.as_pointer()), align=4)

    return vector(types.intp), generate


def _loader(bits: int, widen: Callable[[Any, Any], Any]) -> Any:
    """A function ``(address, count)`` that loads ``min(count, LANES)`` numbers of so many bits, and 0 for the rest."""
    narrow = ir.VectorType(ir.IntType(bits), LANES)
    name = f"llvm.masked.load.v{LANES}i{bits}.p0v{LANES}i{bits}"

    @intrinsic
    def load_widened(typing_context: Any, address: Any, count: Any) -> tuple[Any, _Generate]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], narrow.as_pointer())
            loaded = cgutils.alloca_once(builder, narrow)
            all_lanes = builder.icmp_signed(">=", arguments[1], arguments[1].type(LANES))
            with builder.if_else(all_lanes, likely=True) as (whole, part):
                with whole:
                    builder.store(builder.load(pointer, align=1), loaded)
                with part:
                    lanes = ir.VectorType(ir.IntType(32), LANES)
                    count = builder.insert_element(
                        ir.Constant(lanes, ir.Undefined), builder.trunc(arguments[1], lanes.element), lanes.element(0)
                    )
                    count = builder.shuffle_vector(count, count, ir.Constant(lanes, None))
                    mask = builder.icmp_signed("<", ir.Constant(lanes, list(range(LANES))), count)
                    masked_load = cgutils.get_or_insert_function(
                        builder.module,
                        ir.FunctionType(narrow, [pointer.type, lanes.element, mask.type, narrow]),
                        name,
                    )
                    builder.store(
                        builder.call(masked_load, [pointer, lanes.element(1), mask, ir.Constant(narrow, None)]), loaded
                    )
            return widen(builder, builder.load(loaded))

        return vector(types.intp, types.intp), generate

    return load_widened


def _every(number: int) -> Any:
    return ir.Constant(ir.VectorType(ir.IntType(32), LANES), [number] * LANES)


def _from_float16(builder: Any, x: Any) -> Any:
    if _HAS_FLOAT16:
        return builder.fpext(builder.bitcast(x, ir.VectorType(ir.HalfType(), LANES)), _VECTOR)
    bits = builder.zext(x, _every(0).type)
    sign = builder.shl(builder.and_(bits, _every(0x8000)), _every(16))
    magnitude = builder.shl(builder.and_(bits, _every(0x7FFF)), _every(13))
    # The exponent's bias is 15 where float32 has 127; the largest exponent is that of infinity and NaN.
    scaled = builder.fmul(builder.bitcast(magnitude, _VECTOR), ir.Constant(_VECTOR, [2.0**112] * LANES))
    is_finite = builder.icmp_unsigned("<", magnitude, _every(31 << 23))
    exponent = builder.select(is_finite, _every(0), _every(255 << 23))
    return builder.bitcast(builder.or_(builder.or_(builder.bitcast(scaled, bits.type), exponent), sign), _VECTOR)


def _to_float16(builder: Any, x: Any) -> Any:
    """Rounded to even."""
    narrow = ir.VectorType(ir.IntType(16), LANES)
    if _HAS_FLOAT16:
        return builder.bitcast(builder.fptrunc(x, ir.VectorType(ir.HalfType(), LANES)), narrow)
    bits = builder.bitcast(x, _every(0).type)
    magnitude = builder.and_(bits, _every(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, _every(13)), _every(1))
    code = builder.lshr(builder.add(magnitude, builder.add(odd, _every(0xFFF - (112 << 23)))), _every(13))
    # What is no normal float16 is a multiple of 2 ** -24, the last place of 0.5.
    rounded = builder.fadd(builder.bitcast(magnitude, _VECTOR), ir.Constant(_VECTOR, [0.5] * LANES))
    is_small = builder.icmp_unsigned("<", magnitude, _every(113 << 23))
    code = builder.select(is_small, builder.sub(builder.bitcast(rounded, bits.type), _every(126 << 23)), code)
    overflows = builder.icmp_unsigned(">=", magnitude, _every(0x47800000))  # 65,536
    code = builder.select(overflows, _every(0x7C00), code)
    code = builder.select(builder.icmp_unsigned(">", magnitude, _every(255 << 23)), _every(0x7E00), code)  # NaN
    return builder.trunc(builder.or_(code, builder.and_(builder.lshr(bits, _every(16)), _every(0x8000))), narrow)


def _halves(number: int) -> Any:
    return ir.Constant(ir.VectorType(ir.IntType(16), LANES), [number] * LANES)


def _from_e4m3(builder: Any, x: Any) -> Any:
    """Its exponent's bias is 7 where float16 has 15, and all bits set are NaN."""
    signed = builder.sext(x, _halves(0).type)
    bits = builder.and_(builder.shl(signed, _halves(7)), _halves(0xBF80))
    is_nan = builder.icmp_signed("==", builder.and_(signed, _halves(0x7F)), _halves(0x7F))
    nan = builder.and_(builder.sext(is_nan, signed.type), _halves(0x7E00))
    return builder.fmul(_from_float16(builder, builder.or_(bits, nan)), ir.Constant(_VECTOR, [256.0] * LANES))


def _from_e5m2(builder: Any, x: Any) -> Any:
    """It is the high byte of a float16."""
    return _from_float16(builder, builder.shl(builder.zext(x, _halves(0).type), _halves(8)))


load_float32 = _loader(32, lambda builder, x: builder.bitcast(x, _VECTOR))
load_float16 = _loader(16, _from_float16)
load_bfloat16 = _loader(
    16, lambda builder, x: builder.bitcast(builder.shl(builder.zext(x, _every(0).type), _every(16)), _VECTOR)
)
load_e4m3 = _loader(8, _from_e4m3)
load_e5m2 = _loader(8, _from_e5m2)
load_int8 = _loader(8, lambda builder, x: builder.sitofp(builder.sext(x, _every(0).type), _VECTOR))


@intrinsic
def store(typing_context: Any, address: Any, x: Any) -> tuple[Any, _Generate]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[1], builder.inttoptr(arguments[0], _VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, vector), generate


def _storer(bits: int, narrow: Callable[[Any, Any], Any]) -> Any:
    """A function ``(address, x)`` that stores the numbers of a vector in so many bits each."""
    target = ir.VectorType(ir.IntType(bits), LANES)

    @intrinsic
    def store_narrowed(typing_context: Any, address: Any, x: Any) -> tuple[Any, _Generate]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], target.as_pointer())
            builder.store(narrow(builder, arguments[1]), pointer, align=1)
            return context.get_dummy_value()

        return types.void(types.intp, vector), generate

    return store_narrowed


def _to_bfloat16(builder: Any, x: Any) -> Any:
    """Rounded to even by the 16 bits that go; NaN keeps a bit of its fraction."""
    bits = builder.bitcast(x, _every(0).type)
    odd = builder.and_(builder.lshr(bits, _every(16)), _every(1))
    rounded = builder.add(bits, builder.add(odd, _every(0x7FFF)))
    is_nan = builder.fcmp_unordered("uno", x, x)
    bits = builder.select(is_nan, builder.or_(bits, _every(0x400000)), rounded)
    return builder.trunc(builder.lshr(bits, _every(16)), ir.VectorType(ir.IntType(16), LANES))


store_bfloat16 = _storer(16, _to_bfloat16)
store_float16 = _storer(16, _to_float16)


@intrinsic
def copy(typing_context: Any, target: Any, source: Any, count: Any) -> tuple[Any, _Generate]:
    """Copy ``count`` bytes from one address to another; the two do not overlap."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source = (builder.inttoptr(x, ir.IntType(8).as_pointer()) for x in arguments[:2])
        cgutils.raw_memcpy(builder, target, source, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


def _repeat(builder: Any, number: Any) -> Any:
    first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, ir.IntType(32)(0))
    return _pick(builder, first, first, [0] * LANES)


@intrinsic
def splat(typing_context: Any, x: Any) -> tuple[Any, _Generate]:
    """A vector of one number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _repeat(builder, arguments[0])

    return vector(types.float32), generate


@intrinsic
def number_at(typing_context: Any, address: Any) -> tuple[Any, _Generate]:
    """The int64 at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()), align=8)

    return types.int64(types.intp), generate


@intrinsic
def every(typing_context: Any, address: Any) -> tuple[Any, _Generate]:
    """A vector of the one number at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _repeat(builder, builder.load(builder.inttoptr(arguments[0], ir.FloatType().as_pointer()), align=4))

    return vector(types.intp), generate


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> tuple[Any, _Generate]:
    """a * b + c, rounded once where the processor can."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b, c = arguments
        return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))

    return vector(vector, vector, vector), generate


def _pick(builder: Any, a: Any, b: Any, lanes: Iterable[int]) -> Any:
    """The named lanes of two vectors, those of ``b`` behind those of ``a``."""
    places = list(lanes)
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places))


@intrinsic
def store_totals(typing_context: Any, address: Any, a: Any, b: Any, c: Any, d: Any) -> tuple[Any, _Generate]:
    """Store the sums of four vectors' numbers, each by halves, from ``address`` on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, vectors, width = arguments[0], list(arguments[1:]), LANES

        def add(a: Any, b: Any, low: list[int], high: list[int]) -> Any:
            return builder.fadd(_pick(builder, a, b, low), _pick(builder, a, b, high))

        while width > 8:
            width //= 2
            vectors = [add(x, x, [*range(width)], [*range(width, 2 * width)]) for x in vectors]
        a, b, c, d = vectors
        # a and c side by side, as are b and d; then all four; in the end a, b, c, d.
        halves = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
        quarters = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
        four = add(add(a, c, *halves), add(b, d, *halves), *quarters)
        sums = add(four, four, [0, 2, 4, 6], [1, 3, 5, 7])
        builder.store(sums, builder.inttoptr(address, sums.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, vector, vector, vector, vector), generate


@intrinsic
def _larger(typing_context: Any, a: Any, b: Any) -> tuple[Any, _Generate]:
    """The larger number of each lane; ``b`` beside a NaN in ``a``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)

    return vector(vector, vector), generate


@intrinsic
def _largest_lane(typing_context: Any, x: Any) -> tuple[Any, _Generate]:
    """The largest number of a vector without NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.FloatType(), [_VECTOR]), f"llvm.vector.reduce.fmax.v{LANES}f32"
        )
        return builder.call(function, arguments, fastmath=("nnan",))

    return types.float32(vector), generate


@intrinsic
def touch(typing_context: Any, address: Any) -> tuple[Any, _Generate]:
    """Bring the memory at an address into the cache: an atomic load is not taken out where nothing uses it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.load_atomic(builder.inttoptr(arguments[0], ir.IntType(32).as_pointer()), "monotonic", align=4)
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def prefetch(typing_context: Any, address: Any) -> tuple[Any, _Generate]:
    """Ask for the memory at an address, and go on before it is there."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [pointer, number, number, number]), "llvm.prefetch.p0i8"
        )
        reads, into_the_nearest_cache, data = number(0), number(3), number(1)
        builder.call(function, [builder.inttoptr(arguments[0], pointer), reads, into_the_nearest_cache, data])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@jit
def address_of(array):
    """Where an array begins. Signed as all else that is added to it: numba adds an unsigned number in float64."""
    return np.int64(array.ctypes.data)


@jit
def largest_of(numbers, count, largest):
    """The largest of so many numbers and ``largest``, without regard to NaN. A plain loop would not be vectorised: LLVM
    does that where it may assume that there is no NaN."""
    lanes, address = splat(largest), address_of(numbers)
    for _ in range(count // LANES):
        lanes = _larger(load(address), lanes)
        address += 4 * LANES
    largest = _largest_lane(lanes)
    for j in range(count // LANES * LANES, count):
        largest = numbers[j] if numbers[j] > largest else largest
    return largest


class Ahead(NamedTuple):
    """Rows that are read next, which a product asks for while it computes.

    One line of four rows each is asked for at a time, a quarter of all rows apart: these lie in different blocks or
    pages, and a core reads four of them at a time faster than one by one.
    """

    rows: int64  # where their addresses stand
    count: int64
    size: int64  # bytes of a row


NOTHING = Ahead(0, 0, 0)


@inlined
def _ask(ahead, lines, quad, byte):
    """Ask for so many of the next lines of four rows each. Returns what is next: the first of the rows, and the line's
    place in them."""
    quarter = ahead.count // 4
    for _ in range(lines):
        if quad >= quarter:
            break
        address = ahead.rows + 8 * quad
        for _ in range(4):
            prefetch(number_at(address) + byte)
            address += 8 * quarter
        byte += LINE
        if byte >= ahead.size:
            quad, byte = quad + 1, 0
    return quad, byte


@jit
def multiply_transposed(a, rows, b, columns, width, out, ahead):
    """out [rows, columns] = a [rows, width] @ b [columns, width].T; widths are multiples of ``LANES``.

    ``b`` has the addresses of its rows. Three rows of ``a`` by four of ``b`` at a time: every number that is loaded is
    used more than once. ``b`` and ``out`` have room for columns by fours.
    """
    step, stride = 4 * LANES, a.strides[0]
    pairs = -rows % 3 if rows > 1 else 1
    next_row = stride if rows > 1 else 0  # a single row is its own partner
    quad, byte = 0, 0
    for j in range(0, columns, 4):
        quad, byte = _ask(ahead, -(-ahead.size // LINE), quad, byte)
        b0, b1, b2, b3 = b[j], b[j + 1], b[j + 2], b[j + 3]
        a0, address = address_of(a), address_of(out) + 4 * j
        for _ in range((rows - 2 * pairs) // 3):
            a1, a2 = a0 + stride, a0 + 2 * stride
            x0, x1, x2, x3 = zero(), zero(), zero(), zero()
            y0, y1, y2, y3 = zero(), zero(), zero(), zero()
            z0, z1, z2, z3 = zero(), zero(), zero(), zero()
            for d in range(0, 4 * width, step):
                x, y, z = load(a0 + d), load(a1 + d), load(a2 + d)
                c = load(b0 + d)
                x0, y0, z0 = fma(x, c, x0), fma(y, c, y0), fma(z, c, z0)
                c = load(b1 + d)
                x1, y1, z1 = fma(x, c, x1), fma(y, c, y1), fma(z, c, z1)
                c = load(b2 + d)
                x2, y2, z2 = fma(x, c, x2), fma(y, c, y2), fma(z, c, z2)
                c = load(b3 + d)
                x3, y3, z3 = fma(x, c, x3), fma(y, c, y3), fma(z, c, z3)
            store_totals(address, x0, x1, x2, x3)
            store_totals(address + out.strides[0], y0, y1, y2, y3)
            store_totals(address + 2 * out.strides[0], z0, z1, z2, z3)
            a0, address = a2 + stride, address + 3 * out.strides[0]
        for _ in range(pairs):
            a1 = a0 + next_row
            x0, x1, x2, x3 = zero(), zero(), zero(), zero()
            y0, y1, y2, y3 = zero(), zero(), zero(), zero()
            for d in range(0, 4 * width, step):
                x, y = load(a0 + d), load(a1 + d)
                c = load(b0 + d)
                x0, y0 = fma(x, c, x0), fma(y, c, y0)
                c = load(b1 + d)
                x1, y1 = fma(x, c, x1), fma(y, c, y1)
                c = load(b2 + d)
                x2, y2 = fma(x, c, x2), fma(y, c, y2)
                c = load(b3 + d)
                x3, y3 = fma(x, c, x3), fma(y, c, y3)
            store_totals(address, x0, x1, x2, x3)
            store_totals(address + (out.strides[0] if rows > 1 else 0), y0, y1, y2, y3)
            a0, address = a1 + stride, address + 2 * out.strides[0]


@jit
def multiply_add(a, rows, depth, b, width, out, ahead):
    """out [rows, width] += a [rows, depth] @ b [depth, width], a multiple of ``2 * LANES`` wide.

    ``b`` has the addresses of its rows. Four rows by two vectors of ``out`` stay in registers; ``a`` and ``out`` have
    room for rows by fours.
    """
    step, stride = 4 * LANES, a.strides[0]
    quad, byte = 0, 0
    for i in range(0, rows, 4):
        out0 = address_of(out) + i * out.strides[0]
        out1, out2, out3 = out0 + out.strides[0], out0 + 2 * out.strides[0], out0 + 3 * out.strides[0]
        for d in range(0, 4 * width, 2 * step):
            e = d + step
            w0, x0, y0, z0 = load(out0 + d), load(out1 + d), load(out2 + d), load(out3 + d)
            w1, x1, y1, z1 = load(out0 + e), load(out1 + e), load(out2 + e), load(out3 + e)
            a0, row = address_of(a) + i * stride, address_of(b)
            a1, a2, a3 = a0 + stride, a0 + 2 * stride, a0 + 3 * stride
            left = depth
            while left > 0:
                quad, byte = _ask(ahead, 2, quad, byte)
                for _ in range(min(left, 8)):
                    b0, b1 = load(number_at(row) + d), load(number_at(row) + e)
                    c = every(a0)
                    w0, w1 = fma(c, b0, w0), fma(c, b1, w1)
                    c = every(a1)
                    x0, x1 = fma(c, b0, x0), fma(c, b1, x1)
                    c = every(a2)
                    y0, y1 = fma(c, b0, y0), fma(c, b1, y1)
                    c = every(a3)
                    z0, z1 = fma(c, b0, z0), fma(c, b1, z1)
                    row += 8
                    a0, a1, a2, a3 = a0 + 4, a1 + 4, a2 + 4, a3 + 4
                left -= 8
            store(out0 + d, w0)
            store(out0 + e, w1)
            store(out1 + d, x0)
            store(out1 + e, x1)
            store(out2 + d, y0)
            store(out2 + e, y1)
            store(out3 + d, z0)
            store(out3 + e, z1)
