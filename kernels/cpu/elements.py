"""Numbers as the CPU kernels read them: rows of a cache in any dtype, widened to float32 in registers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvops.kernels.cpu.jit import inlined, jit
from kvops.kernels.cpu.vector import (
    LANES,
    copy,
    load,
    load_bfloat16,
    load_e4m3,
    load_e5m2,
    load_float16,
    load_float32,
    load_int8,
    store,
    store_bfloat16,
    store_float16,
)

LOG2_E = 1.4426950408889634

# How the elements of a cache are read. Kernels take a cache as bytes, so that each is compiled once for all dtypes.
FLOAT32, FLOAT16, BFLOAT16, E4M3, E5M2, INT8 = range(6)
FORMATS = {
    torch.float32: FLOAT32,
    torch.float16: FLOAT16,
    torch.bfloat16: BFLOAT16,
    torch.float8_e4m3fn: E4M3,
    torch.float8_e5m2: E5M2,
    torch.int8: INT8,
}


@intrinsic
def bits_to_float(typing_context: Any, x: Any) -> Any:
    """The float32 with these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def float_to_bits(typing_context: Any, x: Any) -> Any:
    """The 32 bits of this float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@jit
def _to_float8(x, mantissa, bias, largest):
    """The float8 nearest to a float32, as a byte; beyond ``largest``, as the bits of a float32, it is that number, and
    NaN stays NaN. ``mantissa`` counts bits, and ``bias`` is that of the exponent, 127 in a float32."""
    bits = float_to_bits(x)
    sign, magnitude = (bits >> np.uint32(24)) & np.uint32(0x80), bits & np.uint32(0x7FFFFFFF)
    if magnitude > np.uint32(0x7F800000):
        return np.uint8(sign | np.uint32(0x7F))
    magnitude = min(magnitude, largest)
    if magnitude < np.uint32((128 - bias) << 23):  # no normal number: multiples of the last place of ``whole``
        whole = np.uint32((151 - bias - mantissa) << 23)
        code = float_to_bits(bits_to_float(magnitude) + bits_to_float(whole)) - whole
    else:  # the bits of the fraction that go are rounded to even
        dropped = np.uint32(23 - mantissa)
        odd = (magnitude >> dropped) & np.uint32(1)
        half = np.uint32((1 << (22 - mantissa)) - 1)
        code = (magnitude - np.uint32((127 - bias) << 23) + half + odd) >> dropped
    return np.uint8(sign | code)


@jit
def to_e4m3(x):
    return _to_float8(x, 3, 7, np.uint32(0x43E00000))  # 448


@jit
def to_e5m2(x):
    return _to_float8(x, 2, 15, np.uint32(0x47600000))  # 57,344


@jit
def to_int8(x):
    """The whole number from -127 to 127 nearest to a float32, as a byte; NaN becomes 0."""
    if x != x:
        return np.uint8(0)
    return np.uint8(np.int64(np.rint(min(max(x, np.float32(-127)), np.float32(127)))) & 0xFF)


@jit
def larger(a, b):
    """The larger of two numbers, or NaN if one of them is: ``max`` may leave it out."""
    return a if a > b or a != a else b


@jit
def padded(width):
    """A row's width in whole vectors, two at a time."""
    return -(-width // (2 * LANES)) * (2 * LANES)


@inlined
def _load_as(address, element, count):
    """A vector of ``min(count, LANES)`` elements, and 0 for the rest."""
    if element == FLOAT32:
        return load_float32(address, count)
    if element == BFLOAT16:
        return load_bfloat16(address, count)
    if element == FLOAT16:
        return load_float16(address, count)
    if element == E4M3:
        return load_e4m3(address, count)
    if element == E5M2:
        return load_e5m2(address, count)
    return load_int8(address, count)


@jit
def widen(address, element, count, out):
    """Write ``count`` elements from ``address`` on as float32 to the address ``out``, and 0 to a whole vector's end."""
    size = 4 if element == FLOAT32 else 2 if element in (BFLOAT16, FLOAT16) else 1
    for _ in range(count // LANES):
        store(out, _load_as(address, element, LANES))
        address += LANES * size
        out += 4 * LANES
    if count % LANES:
        store(out, _load_as(address, element, count % LANES))


@jit
def narrow(address, element, count, out, spare):
    """Write ``count`` float32 numbers from ``address`` on, rounded to ``element``, to the address ``out``. The memory
    at ``spare`` has room for a vector."""
    if element == FLOAT32:
        copy(out, address, 4 * count)
        return
    while count > 0:
        target = out if count >= LANES else spare
        if element == BFLOAT16:
            store_bfloat16(target, load(address))
        else:
            store_float16(target, load(address))
        if count < LANES:
            copy(out, spare, 2 * count)
        address += 4 * LANES
        out += 2 * LANES
        count -= LANES


@jit
def exp2(x):
    """2 ** x for x up to 127, in float32 with an error below 2 ulp; below 2 ** -126 it is 0.

    The exponential of the C library is called for one number at a time; this one is compiled into vector instructions.
    The polynomial interpolates 2 ** f at the Chebyshev nodes of [-0.5, 0.5], with a relative error of 2e-9.
    """
    x = np.float32(-127) if x < np.float32(-127) else x
    whole = np.rint(x)
    f = x - whole
    p = np.float32(0.00015461444854736328)
    p = p * f + np.float32(0.0013400427997112274)
    p = p * f + np.float32(0.009618056938052177)
    p = p * f + np.float32(0.05550327152013779)
    p = p * f + np.float32(0.24022650718688965)
    p = p * f + np.float32(0.6931471824645996)
    p = p * f + np.float32(1.0)
    exponent = np.int32(whole) + np.int32(127)
    return p * bits_to_float(np.uint32(exponent) << np.uint32(23))


@jit
def tanh(x):
    """tanh in float32: near 0, where the quotient of exponentials cancels, its series."""
    t = exp2(np.float32(-2 * LOG2_E) * abs(x))
    large = (np.float32(1) - t) / (np.float32(1) + t)
    square = x * x
    p = square * np.float32(62 / 2835) - np.float32(17 / 315)
    p = square * p + np.float32(2 / 15)
    p = square * p - np.float32(1 / 3)
    return x + x * square * p if abs(x) < np.float32(0.25) else (large if x > 0 else -large)
