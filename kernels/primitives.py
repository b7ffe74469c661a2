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
