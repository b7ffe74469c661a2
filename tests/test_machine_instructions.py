"""Each instruction of the machine against what the PTX ISA manual says of it, at the edges of its domain."""

import math

import numpy as np
import pytest
from machine_ptx import execute, program, result

from kvops.autotune.machine.instructions import SECTIONS, TABLE
from kvops.autotune.machine.memory import DESCRIPTORS
from kvops.autotune.machine.ptx import Unsupported

INF, NAN = math.inf, math.nan
TINY = np.float32(1e-40)  # subnormal
BIG = 2**31 - 1


def row(text, inputs, output, dtype, expected):
    return pytest.param(text, inputs, output, dtype, expected, id=text)


def one(opcode, dtype, operands, expected, result_dtype=None, types=None):
    """``opcode`` of operands in registers; ``operands`` is a list of columns, each with a value to a lane."""
    result_dtype = result_dtype or dtype
    name = {"pred": "%p", "16": "%rs", "32": "%r", "64": "%rd"}
    kinds = types or [dtype] * len(operands)

    def register(kind, number):
        bits = "pred" if kind == "pred" else "16" if kind[1:] in ("8", "16") else kind[1:]
        return f"{name[bits]}{number}"

    target = register(result_dtype, 1)
    sources = [register(kind, number) for number, kind in enumerate(kinds, 2)]
    inputs = {source: (kind, column) for source, kind, column in zip(sources, kinds, operands, strict=True)}
    return row(f"{opcode} {', '.join([target, *sources])};", inputs, target, result_dtype, expected)


ROWS = [
    # Integers wrap around.
    one("add.s32", "i32", [[BIG, -1], [1, 1]], [-(2**31), 0]),
    one("add.s16", "i16", [[32767], [1]], [-32768]),
    one("add.s64", "i64", [[2**62], [2**62]], [-(2**63)]),
    one("sub.s32", "i32", [[-(2**31)], [1]], [BIG]),
    one("mul.lo.s32", "i32", [[2**30, -3], [4, 7]], [0, -21]),
    one("mul.lo.s64", "i64", [[2**40], [2**30]], [0]),
    one("mul.hi.u32", "u32", [[2**32 - 1], [2**32 - 1]], [2**32 - 2]),
    one("mul.hi.s32", "i32", [[-1, BIG], [1, BIG]], [-1, 2**30 - 1]),
    one("mul.hi.u64", "u64", [[2**64 - 1], [2**64 - 1]], [2**64 - 2]),
    one("mul.hi.s64", "i64", [[-1, -5], [1, 2**62]], [-1, -2]),
    one("mul.wide.s32", "i32", [[-(2**31)], [2]], [-(2**32)], "i64"),
    one("mul.wide.u32", "u32", [[2**32 - 1], [2]], [2**33 - 2], "u64"),
    one("mul.wide.u16", "u16", [[65535], [65535]], [65535 * 65535], "u32"),
    one("mad.lo.s32", "i32", [[2**30], [4], [5]], [5]),
    one("mad.wide.s32", "i32", [[-(2**31)], [2], [1]], [-(2**32) + 1], "i64", ["i32", "i32", "i64"]),
    one("mad.wide.u32", "u32", [[2**32 - 1], [2], [1]], [2**33 - 1], "u64", ["u32", "u32", "u64"]),
    one("mad.lo.s64", "i64", [[3], [4], [-12]], [0]),
    one("div.s32", "i32", [[-7, 7, -7], [2, -2, -2]], [-3, -3, 3]),
    one("div.u32", "u32", [[2**32 - 1], [2]], [BIG]),
    one("rem.s32", "i32", [[-7, 7], [2, -2]], [-1, 1]),
    one("abs.s32", "i32", [[-5, -(2**31)]], [5, -(2**31)]),
    one("abs.s64", "i64", [[-5]], [5]),
    one("neg.s32", "i32", [[-(2**31), 3]], [-(2**31), -3]),
    one("min.s32", "i32", [[-1], [1]], [-1]),
    one("min.u32", "u32", [[2**32 - 1], [1]], [1]),
    one("max.s64", "i64", [[-1], [1]], [1]),
    one("min.relu.s32", "i32", [[-5, 3], [-2, 9]], [0, 3]),
    one("popc.b32", "u32", [[0, 2**32 - 1, 0x80000001]], [0, 32, 2]),
    one("clz.b32", "u32", [[0, 1, 2**31]], [32, 31, 0]),
    one("brev.b32", "u32", [[1, 0xF0000000]], [2**31, 15]),
    # Bits. Shift counts are unsigned and go beyond the width.
    one("and.b32", "u32", [[0b1100], [0b1010]], [0b1000]),
    one("or.b64", "u64", [[1 << 63], [1]], [(1 << 63) + 1]),
    one("xor.b32", "u32", [[0b1100], [0b1010]], [0b0110]),
    one("and.pred", "pred", [[True, True], [True, False]], [True, False]),
    one("xor.pred", "pred", [[True, True], [True, False]], [False, True]),
    one("not.b32", "u32", [[0]], [2**32 - 1]),
    one("not.pred", "pred", [[True, False]], [False, True]),
    one("cnot.b32", "u32", [[0, 7]], [1, 0]),
    one("shl.b32", "u32", [[1, 1, 1, 1], [31, 32, 33, 2**32 - 1]], [2**31, 0, 0, 0]),
    one("shl.b16", "u16", [[1, 1], [15, 16]], [2**15, 0], types=["u16", "u32"]),
    one("shl.b64", "u64", [[1, 1], [63, 64]], [2**63, 0], types=["u64", "u32"]),
    one("shr.u32", "u32", [[2**31, 2**31], [31, 32]], [1, 0]),
    one("shr.s32", "i32", [[-8, -8, 8], [1, 99, 99]], [-4, -1, 0], types=["i32", "u32"]),
    one("shr.s64", "i64", [[-8, -8], [1, 200]], [-4, -1], types=["i64", "u32"]),
    one("shr.u16", "u16", [[65535, 65535], [15, 16]], [1, 0], types=["u16", "u32"]),
    row("shl.b32 %r1, %r2, 40;", {"%r2": ("u32", 1)}, "%r1", "u32", [0]),
    row("shr.s32 %r1, %r2, 40;", {"%r2": ("i32", -1)}, "%r1", "i32", [-1]),
    one("shf.l.wrap.b32", "u32", [[0x80000000, 5], [1, 7], [1, 32]], [3, 7]),
    one("shf.r.clamp.b32", "u32", [[2, 5], [1, 7], [1, 40]], [0x80000001, 7]),
    one("bfe.u32", "u32", [[0xABCD, 0xFF, 0xFF], [4, 0, 40], [8, 0, 4]], [0xBC, 0, 0]),
    one("bfe.s32", "i32", [[0b1000, -1, -1], [0, 28, 31], [4, 8, 1]], [-8, -1, -1], types=["i32", "u32", "u32"]),
    one("bfi.b32", "u32", [[0xF, 0xF], [0, 2**32 - 1], [4, 8], [4, 0]], [0xF0, 2**32 - 1]),
    row(
        "lop3.b32 %r1, %r2, %r3, %r4, 0xE8;",
        {"%r2": ("u32", 0b0011), "%r3": ("u32", 0b0101), "%r4": ("u32", 0b1001)},
        "%r1", "u32", [0b0001],
    ),  # the majority
    row("prmt.b32 %r1, %r2, %r3, 0x7531;", {"%r2": ("u32", 0x33221100), "%r3": ("u32", 0x77665544)}, "%r1", "u32",
        [0x77553311]),
    row("prmt.b32 %r1, %r2, %r3, 0x000B;", {"%r2": ("u32", 0x80000011), "%r3": ("u32", 0)}, "%r1", "u32", [0x111111FF]),
    # Floats.
    one("add.f32", "f32", [[1.0, INF, TINY], [2.0, -INF, TINY]], [3.0, NAN, 2 * TINY]),
    one("add.ftz.f32", "f32", [[TINY, -TINY], [TINY, -0.0]], [0.0, -0.0]),
    one("sub.f32", "f32", [[3.0], [1e-8]], [3.0]),
    one("mul.f32", "f32", [[1e30, 0.0], [1e30, INF]], [INF, NAN]),
    one("mul.ftz.f32", "f32", [[1e-20], [1e-20]], [0.0]),
    one("add.sat.f32", "f32", [[2.0, -1.0, NAN], [0.0, 0.0, 0.0]], [1.0, 0.0, 0.0]),
    one("fma.rn.f32", "f32", [[1 + 2**-12], [1 - 2**-12], [-1.0]], [-(2.0**-24)]),
    one("fma.rn.f32", "f32", [[1 + 2**-23], [1 + 2**-23], [2.0**-60]], [1 + 2**-22]),
    one("fma.rn.ftz.f32", "f32", [[TINY], [1.0], [1.0]], [1.0]),
    one("div.rn.f32", "f32", [[1.0, 1.0, 0.0], [3.0, 0.0, 0.0]], [np.float32(1) / np.float32(3), INF, NAN]),
    one("neg.f32", "f32", [[0.0, NAN]], [-0.0, NAN]),
    one("abs.f32", "f32", [[-0.0, -INF]], [0.0, INF]),
    one("min.f32", "f32", [[NAN, -0.0, 0.0, NAN], [1.0, 0.0, -0.0, NAN]], [1.0, -0.0, -0.0, NAN]),
    one("max.f32", "f32", [[NAN, -0.0, 0.0], [1.0, 0.0, -0.0]], [1.0, 0.0, 0.0]),
    one("max.NaN.f32", "f32", [[NAN, 2.0], [1.0, 3.0]], [NAN, 3.0]),
    one("ex2.approx.ftz.f32", "f32", [[3.0, -INF, INF, -130.0, NAN]], [8.0, 0.0, INF, 0.0, NAN]),
    one("lg2.approx.f32", "f32", [[8.0, 0.0, -1.0]], [3.0, -INF, NAN]),
    one("rcp.approx.ftz.f32", "f32", [[4.0, -0.0, INF]], [0.25, -INF, 0.0]),
    one("sqrt.rn.f32", "f32", [[4.0, -1.0, -0.0]], [2.0, NAN, -0.0]),
    one("rsqrt.approx.f32", "f32", [[4.0, 0.0]], [0.5, INF]),
    one("sin.approx.f32", "f32", [[0.0]], [0.0]),
    one("cos.approx.f32", "f32", [[0.0]], [1.0]),
    one("tanh.approx.f32", "f32", [[0.0, INF]], [0.0, 1.0]),
    one("copysign.f32", "f32", [[-1.0, 1.0], [2.0, -3.0]], [-2.0, 3.0]),
    one("testp.finite.f32", "f32", [[1.0, INF, NAN]], [True, False, False], "pred"),
    # Comparisons: those of floats are false with a NaN, unless their name ends in u.
    one("setp.lt.s32", "i32", [[-1, 2], [1, 2]], [True, False], "pred"),
    one("setp.lt.u32", "u32", [[2**32 - 1], [1]], [False], "pred"),
    one("setp.ge.s64", "i64", [[-1], [-1]], [True], "pred"),
    one("setp.eq.f32", "f32", [[NAN, -0.0], [NAN, 0.0]], [False, True], "pred"),
    one("setp.ne.f32", "f32", [[NAN, 1.0], [1.0, 2.0]], [False, True], "pred"),
    one("setp.neu.f32", "f32", [[NAN, 1.0], [1.0, 1.0]], [True, False], "pred"),
    one("setp.leu.f32", "f32", [[NAN, 1.0], [1.0, 0.0]], [True, False], "pred"),
    one("setp.gt.f32", "f32", [[INF], [NAN]], [False], "pred"),
    one("setp.num.f32", "f32", [[NAN, 1.0], [1.0, 1.0]], [False, True], "pred"),
    one("setp.nan.f32", "f32", [[NAN, 1.0], [1.0, 1.0]], [True, False], "pred"),
    one("setp.num.bf16", "u16", [[0x7F80, 0x7FC0], [0, 0]], [True, False], "pred"),
    one("setp.ne.b16", "u16", [[1], [2]], [True], "pred"),
    one("setp.lt.and.s32", "i32", [[1, 1], [2, 2], [True, False]], [True, False], "pred", ["i32", "i32", "pred"]),
    one("selp.b32", "u32", [[1, 1], [2, 2], [True, False]], [1, 2], types=["u32", "u32", "pred"]),
    one("selp.f32", "f32", [[NAN], [2.0], [False]], [2.0], types=["f32", "f32", "pred"]),
    # Movement.
    one("mov.b32", "u32", [[0x7FC00001]], [0x7FC00001]),
    row("mov.b32 %r1, 0f3F800000;", {}, "%r1", "f32", [1.0]),
    row("mov.b32 %r1, -1082130432;", {}, "%r1", "f32", [-1.0]),
    row("mov.b32 %r1, {%rs1, %rs2};", {"%rs1": ("u16", 1), "%rs2": ("u16", 2)}, "%r1", "u32", [0x20001]),
    row("mov.b64 {_, %r1}, %rd1;", {"%rd1": ("u64", 5 << 32)}, "%r1", "u32", [5]),
    row("mov.b32 {%rs1, %rs2}, %r1;", {"%r1": ("u32", 0x20001)}, "%rs2", "u16", [2]),
    row("mov.u32 %r1, %tid.x;", {}, "%r1", "u32", list(range(32))),
    row("mov.pred %p1, -1;", {}, "%p1", "pred", [True]),
    row("cvta.global.u64 %rd1, %rd2;", {"%rd2": ("u64", 7)}, "%rd1", "u64", [7]),
    # Conversions: to the nearest even, saturating, NaN to 0.
    one("cvt.rn.f16.f32", "f32", [[1 + 2**-11, 65520.0, NAN]], [1.0, INF, NAN], "f16"),
    one("cvt.f32.f16", "f16", [[6e-8, INF]], [np.float32(np.float16(6e-8)), INF], "f32"),
    one("cvt.rn.bf16.f32", "f32", [[1 + 2**-8, 1 + 3 * 2**-8, NAN]], [0x3F80, 0x3F82, 0x7FFF], "u16"),
    one("cvt.f32.bf16", "u16", [[0x3F80, 0xFF80]], [1.0, -INF], "f32"),
    one("cvt.rn.bf16x2.f32", "f32", [[1.0], [2.0]], [0x3F804000], "u32"),
    one("cvt.rn.f16x2.f32", "f32", [[1.0], [2.0]], [0x3C004000], "u32"),
    one("cvt.rzi.s32.f32", "f32", [[-1.9, 3e9, -3e9, NAN]], [-1, BIG, -(2**31), 0], "i32"),
    one("cvt.rni.s32.f32", "f32", [[0.5, 1.5, 2.5]], [0, 2, 2], "i32"),
    one("cvt.rzi.u32.f32", "f32", [[-1.0, 5e9]], [0, 2**32 - 1], "u32"),
    one("cvt.rmi.f32.f32", "f32", [[-1.5]], [-2.0], "f32"),
    one("cvt.rpi.f32.f32", "f32", [[-1.5]], [-1.0], "f32"),
    one("cvt.rn.f32.s32", "i32", [[2**24 + 1, -1]], [2.0**24, -1.0], "f32"),
    one("cvt.rn.f32.u32", "u32", [[2**32 - 1]], [2.0**32], "f32"),
    one("cvt.s64.s32", "i32", [[-1]], [-1], "i64"),
    one("cvt.u64.u32", "u32", [[2**32 - 1]], [2**32 - 1], "u64"),
    one("cvt.u32.u64", "u64", [[2**32 + 5]], [5], "u32"),
    one("cvt.u16.u32", "u32", [[65537]], [1], "u16"),
    one("cvt.sat.s8.s32", "i32", [[300, -300]], [127, -128], "i16"),
    # Across a warp.
    row("shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;", {"%r2": ("u32", np.arange(32))}, "%r1", "u32", [1, 0, 3, 2]),
    row("shfl.sync.up.b32 %r1, %r2, 2, 0, -1;", {"%r2": ("u32", np.arange(32))}, "%r1", "u32", [0, 1, 0, 1, 2]),
    row("shfl.sync.down.b32 %r1, %r2, 31, 31, -1;", {"%r2": ("u32", np.arange(32))}, "%r1", "u32", [31, 1, 2]),
    row("shfl.sync.idx.b32 %r1, %r2, 5, 31, -1;", {"%r2": ("u32", np.arange(32))}, "%r1", "u32", [5, 5]),
    # Segments of 8 lanes: the mask of the segment stands in bits 8 to 12.
    row("shfl.sync.idx.b32 %r1, %r2, 9, 0x181f, -1;", {"%r2": ("u32", np.arange(32))}, "%r1", "u32",
        [1] * 8 + [9] * 8 + [17] * 8),
    row("shfl.sync.up.b32 %r1|%p1, %r2, 1, 0, -1;", {"%r2": ("u32", 0)}, "%p1", "pred", [False, True, True]),
    row("vote.sync.ballot.b32 %r1, %p1, -1;", {"%p1": ("pred", [True, False] * 16)}, "%r1", "u32", [0x55555555]),
    row("vote.sync.any.pred %p2, %p1, -1;", {"%p1": ("pred", [True] + [False] * 31)}, "%p2", "pred", [True, True]),
    row("vote.sync.all.pred %p2, %p1, -1;", {"%p1": ("pred", [False] + [True] * 31)}, "%p2", "pred", [False]),
    row("activemask.b32 %r1;", {}, "%r1", "u32", [2**32 - 1]),
    row("redux.sync.add.s32 %r1, %r2, %r3;", {"%r2": ("i32", [-1, 1, 1, 1]), "%r3": ("u32", 0xF)}, "%r1", "i32", [2]),
    row("redux.sync.min.s32 %r1, %r2, -1;", {"%r2": ("i32", np.arange(32) - 7)}, "%r1", "i32", [-7, -7]),
    row("redux.sync.max.s32 %r1, %r2, -1;", {"%r2": ("i32", np.arange(32) - 40)}, "%r1", "i32", [-9]),
    row("match.any.sync.b32 %r1, %r2, -1;", {"%r2": ("u32", [1, 2])}, "%r1", "u32", [0x55555555, 0xAAAAAAAA]),
    row("elect.sync %r1|%p1, -1;", {}, "%p1", "pred", [True] + [False] * 31),
]  # fmt: skip


@pytest.mark.parametrize(("text", "inputs", "output", "dtype", "expected"), ROWS)
def test_an_instruction_computes_what_the_manual_says(text, inputs, output, dtype, expected):
    got = result(execute(text, inputs), output, dtype)
    want = np.array(expected, dtype=got.dtype)
    np.testing.assert_array_equal(got[: len(want)], want)
    if got.dtype.kind == "f":  # -0 and 0 are equal
        np.testing.assert_array_equal(np.signbit(got[: len(want)])[want == 0], np.signbit(want)[want == 0])


def test_every_instruction_of_the_table_names_its_section_and_has_a_test():
    # Those that reach memory or run on by themselves are in tests/test_machine.py.
    elsewhere = {"ld", "st", "atom", "red", "cp", "mbarrier", "fence", "wgmma", "mma", "ldmatrix", "stmatrix"}
    tested = {parameters.values[0].split()[0].split(".")[0] for parameters in ROWS}
    assert set(TABLE) - elsewhere == tested
    assert set(TABLE) == set(SECTIONS)
    assert all(section[:1].isdigit() for section in SECTIONS.values())


@pytest.mark.parametrize(
    ("text", "exact", "ulps"),
    [("ex2.approx.f32", np.exp2, 2), ("lg2.approx.f32", lambda x: np.log2(np.abs(x)), 2),
     ("rcp.approx.f32", lambda x: 1 / x, 1), ("sqrt.approx.f32", lambda x: np.sqrt(np.abs(x)), 1)],
)  # fmt: skip
def test_an_approximation_is_off_within_its_bound_and_the_same_every_time(text, exact, ulps):
    x = np.linspace(0.1, 9.7, 32).astype(np.float32)
    first, again = (result(execute(f"{text} %r1, %r2;", {"%r2": ("f32", x)}), "%r1", "f32").copy() for _ in range(2))
    np.testing.assert_array_equal(first, again)
    want = exact(x.astype(np.float64))
    error = np.abs(first - want) / np.spacing(np.abs(want).astype(np.float32))
    assert error.max() <= ulps + 0.5
    assert (first != want.astype(np.float32)).any()  # not the nearest everywhere


def test_full_division_is_off_by_at_most_two_units():
    x, y = np.linspace(1, 9, 32).astype(np.float32), np.linspace(3, 4, 32).astype(np.float32)
    got = result(execute("div.full.f32 %r1, %r2, %r3;", {"%r2": ("f32", x), "%r3": ("f32", y)}), "%r1", "f32")
    want = x.astype(np.float64) / y
    assert (np.abs(got - want) / np.spacing(want.astype(np.float32))).max() <= 2


def test_a_predicate_keeps_the_result_of_other_threads():
    inputs = {"%p1": ("pred", [True, False]), "%r1": ("u32", 9), "%r2": ("u32", 4)}
    np.testing.assert_array_equal(result(execute("@%p1 mov.b32 %r1, %r2;", inputs), "%r1", "u32")[:4], [4, 9, 4, 9])
    np.testing.assert_array_equal(result(execute("@!%p1 mov.b32 %r1, %r2;", inputs), "%r1", "u32")[:4], [9, 4, 9, 4])


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mma_multiplies_the_fragments_of_the_manual(kind):
    """Lane 4 g + t holds A[g, 2 t], A[g + 8, 2 t], A[g, 2 t + 8], A[g + 8, 2 t + 8] and the element behind each."""
    numbers = np.random.default_rng(0)
    a, b = numbers.integers(-4, 5, (16, 16)).astype(np.float32), numbers.integers(-4, 5, (16, 8)).astype(np.float32)
    c = numbers.integers(-4, 5, (16, 8)).astype(np.float32)

    def pair(low, high):
        if kind == "f16":
            low, high = (np.float16(x).view(np.uint16) for x in (low, high))
        else:
            low, high = (np.float32(x).view(np.uint32) >> np.uint32(16) for x in (low, high))
        return int(low) | int(high) << 16

    registers = {f"%r{n}": ("u32", np.zeros(32, np.uint32)) for n in range(10, 16)}
    registers |= {f"%r{n}": ("f32", np.zeros(32, np.float32)) for n in range(20, 24)}
    for lane in range(32):
        g, t = divmod(lane, 4)
        for n, (r, k) in enumerate(((g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8))):
            registers[f"%r{10 + n}"][1][lane] = pair(a[r, k], a[r, k + 1])
        for n, k in enumerate((2 * t, 2 * t + 8)):
            registers[f"%r{14 + n}"][1][lane] = pair(b[k, g], b[k + 1, g])
        for n, (r, col) in enumerate(((g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1))):
            registers[f"%r{20 + n}"][1][lane] = c[r, col]
    text = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%r1, %r2, %r3, %r4}}, {{%r10, %r11, %r12, %r13}}, "
        "{%r14, %r15}, {%r20, %r21, %r22, %r23};"
    )
    team = execute(text, registers)
    want = a @ b + c
    for lane in range(32):
        g, t = divmod(lane, 4)
        got = [result(team, f"%r{n}", "f32")[lane] for n in range(1, 5)]
        np.testing.assert_array_equal(
            got, [want[g, 2 * t], want[g, 2 * t + 1], want[g + 8, 2 * t], want[g + 8, 2 * t + 1]]
        )


@pytest.mark.parametrize("text", ["tex.2d %r1;", "add.cc.u32 %r1, %r2, %r3;", "add.rz.f32 %r1, %r2, %r3;"])
def test_what_the_machine_does_not_know_is_named(text):
    with pytest.raises(Unsupported, match=text.split()[0].replace(".", r"\.")):
        execute(text, {})


@pytest.mark.parametrize(
    "text",
    [
        "mov.b64 %rd1, kernel_param_1;\ncvta.param.u64 %rd2, %rd1;",
        "mov.b32 %r1, kernel_param_1;\ncvt.u64.u32 %rd1, %r1;\ncvta.param.u64 %rd2, %rd1;",  # Triton 3.9
    ],
)
def test_the_address_of_a_descriptor_is_the_same_in_32_and_in_64_bits(text):
    assert set(result(execute(text, {}, parameters=2), "%rd2", "u64")) == {DESCRIPTORS + 1}


def test_the_name_of_a_table_may_stand_on_the_line_before():
    """As Triton 3.9 has it, in front of all instructions."""
    held = program(
        """JTI0_0:
        .branchtargets
        $L__BB0_1,
        $L__BB0_2;
        brx.idx %r1, JTI0_0;
        $L__BB0_1:
        bar.sync 0;
        $L__BB0_2:
        ret;"""
    )
    assert [entry.opcode for entry in held.instructions] == ["brx.idx", "bar.sync", "ret"]
    assert held.tables == {"JTI0_0": ["$L__BB0_1", "$L__BB0_2"]}


def test_the_parser_reads_scopes_tables_and_lines():
    held = program(
        """mov.u32 %r1, 0;
        {
        .reg .pred complete;
        waitLoop:
        mbarrier.try_wait.parity.shared::cta.b64 complete, [%r2], %r1;
        @!complete bra.uni waitLoop;
        }
        brx.idx %r1, $L_brx_0;
        $L_brx_0: .branchtargets
        $L__BB0_1,
        $L__BB0_2;
        $L__BB0_1: 
        bar.sync 0;
        $L__BB0_2:
        ret;"""
    )
    assert [entry.opcode for entry in held.instructions] == [
        "mov.u32", "mbarrier.try_wait.parity.shared::cta.b64", "bra.uni", "brx.idx", "bar.sync", "ret",
    ]  # fmt: skip
    assert held.tables == {"$L_brx_0": ["$L__BB0_1", "$L__BB0_2"]}
    assert [entry.opcode.split(".")[0] for entry in held.synchronisation] == ["mbarrier", "bar"]
    assert str(held.instructions[4].place) == "kernel.py:13  bar.sync 0"
