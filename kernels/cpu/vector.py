"""Vectors of float32 in registers, for the inner products and weighted sums that LLVM would not vectorise well alone.

An address is an integer, in bytes; vectors need no alignment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from kvops.kernels.cpu.jit import jit

# Numbers in a vector: a register of the processor that compiles.
LANES = 16 if llvm.get_host_cpu_features().get("avx512f") else 8
_VECTOR = ir.VectorType(ir.FloatType(), LANES)


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


def _from_e4m3(builder: Any, x: Any) -> Any:
    """The exponent's bias is 7 where float32 has 127, and all bits set are NaN."""
    bits = builder.zext(x, _every(0).type)
    magnitude = builder.and_(bits, _every(0x7F))
    scale = ir.Constant(_VECTOR, [2.0**120] * LANES)
    value = builder.fmul(builder.bitcast(builder.shl(magnitude, _every(20)), _VECTOR), scale)
    is_nan = builder.icmp_signed("==", magnitude, _every(0x7F))
    unsigned = builder.select(is_nan, _every(0x7FC00000), builder.bitcast(value, bits.type))
    sign = builder.shl(builder.and_(bits, _every(0x80)), _every(24))
    return builder.bitcast(builder.or_(unsigned, sign), _VECTOR)


def _from_float16(builder: Any, x: Any) -> Any:
    return builder.fpext(builder.bitcast(x, ir.VectorType(ir.HalfType(), LANES)), _VECTOR)


def _from_e5m2(builder: Any, x: Any) -> Any:
    """It is the high byte of a float16."""
    halves = ir.VectorType(ir.IntType(16), LANES)
    return _from_float16(builder, builder.shl(builder.zext(x, halves), ir.Constant(halves, [8] * LANES)))


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
store_float16 = _storer(
    16,
    lambda builder, x: builder.bitcast(
        builder.fptrunc(x, ir.VectorType(ir.HalfType(), LANES)), ir.VectorType(ir.IntType(16), LANES)
    ),
)


@intrinsic
def copy(typing_context: Any, target: Any, source: Any, count: Any) -> tuple[Any, _Generate]:
    """Copy ``count`` bytes from one address to another; the two do not overlap."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source = (builder.inttoptr(x, ir.IntType(8).as_pointer()) for x in arguments[:2])
        cgutils.raw_memcpy(builder, target, source, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


@intrinsic
def splat(typing_context: Any, x: Any) -> tuple[Any, _Generate]:
    """A vector of one number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), arguments[0], ir.IntType(32)(0))
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
        return builder.shuffle_vector(first, ir.Constant(_VECTOR, ir.Undefined), lanes)

    return vector(types.float32), generate


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
        # a and b side by side, as are c and d; then all four; in the end a, b, c, d.
        halves = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
        quarters = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
        four = add(add(a, b, *halves), add(c, d, *halves), *quarters)
        sums = add(four, four, [0, 4, 2, 6], [1, 5, 3, 7])
        builder.store(sums, builder.inttoptr(address, sums.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, vector, vector, vector, vector), generate


@intrinsic
def touch(typing_context: Any, address: Any) -> tuple[Any, _Generate]:
    """Bring the memory at an address into the cache: an atomic load is not taken out where nothing uses it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.load_atomic(builder.inttoptr(arguments[0], ir.IntType(32).as_pointer()), "monotonic", align=4)
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def prefetch_once(typing_context: Any, address: Any) -> tuple[Any, _Generate]:
    """Ask for memory that is read once, which then does not push out of the caches what is read again."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [pointer, number, number, number]), "llvm.prefetch.p0i8"
        )
        reads, once, data = number(0), number(0), number(1)
        builder.call(function, [builder.inttoptr(arguments[0], pointer), reads, once, data])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@jit
def multiply_transposed(a, rows, b, columns, width, out, ahead):
    """out [rows, columns] = a [rows, width] @ b [columns, width].T; widths are multiples of ``LANES``.

    ``b`` has the addresses of its rows. Two rows of ``a`` by four of ``b`` at a time: every number that is loaded is
    used more than once. ``b`` and ``out`` have room for columns by fours. What stands ``ahead`` bytes behind the rows
    of ``b`` is asked for early, unless that is 0: it waits for memory less where ``b`` is far and in one piece.
    """
    step = 4 * LANES
    for j in range(0, columns, 4):
        b0, b1, b2, b3 = b[j], b[j + 1], b[j + 2], b[j + 3]
        for i in range(0, rows - 1, 2):
            a0 = a.ctypes.data + i * a.strides[0]
            a1 = a0 + a.strides[0]
            x0, x1, x2, x3 = zero(), zero(), zero(), zero()
            y0, y1, y2, y3 = zero(), zero(), zero(), zero()
            for d in range(0, 4 * width, step):
                if ahead and i == 0:
                    for row in (b0, b1, b2, b3):
                        prefetch_once(row + d + ahead)
                x, y = load(a0 + d), load(a1 + d)
                c = load(b0 + d)
                x0, y0 = fma(x, c, x0), fma(y, c, y0)
                c = load(b1 + d)
                x1, y1 = fma(x, c, x1), fma(y, c, y1)
                c = load(b2 + d)
                x2, y2 = fma(x, c, x2), fma(y, c, y2)
                c = load(b3 + d)
                x3, y3 = fma(x, c, x3), fma(y, c, y3)
            address = out.ctypes.data + i * out.strides[0] + 4 * j
            store_totals(address, x0, x1, x2, x3)
            store_totals(address + out.strides[0], y0, y1, y2, y3)
        if rows % 2:
            i = rows - 1
            a0 = a.ctypes.data + i * a.strides[0]
            x0, x1, x2, x3 = zero(), zero(), zero(), zero()
            for d in range(0, 4 * width, step):
                if ahead and i == 0:
                    for row in (b0, b1, b2, b3):
                        prefetch_once(row + d + ahead)
                x = load(a0 + d)
                x0, x1 = fma(x, load(b0 + d), x0), fma(x, load(b1 + d), x1)
                x2, x3 = fma(x, load(b2 + d), x2), fma(x, load(b3 + d), x3)
            store_totals(out.ctypes.data + i * out.strides[0] + 4 * j, x0, x1, x2, x3)


@jit
def multiply_add(a, rows, depth, b, width, out):
    """out [rows, width] += a [rows, depth] @ b [depth, width], a multiple of ``2 * LANES`` wide.

    ``b`` has the addresses of its rows. Four rows by two vectors of ``out`` stay in registers; ``a`` and ``out`` have
    room for rows by fours.
    """
    step = 4 * LANES
    for i in range(0, rows, 4):
        out0 = out.ctypes.data + i * out.strides[0]
        out1, out2, out3 = out0 + out.strides[0], out0 + 2 * out.strides[0], out0 + 3 * out.strides[0]
        for d in range(0, 4 * width, 2 * step):
            e = d + step
            w0, x0, y0, z0 = load(out0 + d), load(out1 + d), load(out2 + d), load(out3 + d)
            w1, x1, y1, z1 = load(out0 + e), load(out1 + e), load(out2 + e), load(out3 + e)
            for j in range(depth):
                b0, b1 = load(b[j] + d), load(b[j] + e)
                c = splat(a[i, j])
                w0, w1 = fma(c, b0, w0), fma(c, b1, w1)
                c = splat(a[i + 1, j])
                x0, x1 = fma(c, b0, x0), fma(c, b1, x1)
                c = splat(a[i + 2, j])
                y0, y1 = fma(c, b0, y0), fma(c, b1, y1)
                c = splat(a[i + 3, j])
                z0, z1 = fma(c, b0, z0), fma(c, b1, z1)
            store(out0 + d, w0)
            store(out0 + e, w1)
            store(out1 + d, x0)
            store(out1 + e, x1)
            store(out2 + d, y0)
            store(out2 + e, y1)
            store(out3 + d, z0)
            store(out3 + e, z1)
