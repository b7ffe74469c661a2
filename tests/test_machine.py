"""The machine for PTX: every kind of fault in a kernel of a few lines that has it, and the same kernel mended."""

import numpy as np
import pytest
from machine_ptx import OWN_GLOBAL, kinds, program, run, words

from kvops.autotune.machine.counts import matrix_work
from kvops.autotune.machine.instructions.asynchronous import Descriptor
from kvops.autotune.machine.memory import DESCRIPTORS
from kvops.autotune.machine.report import MachineFaultError, raise_faults

# %r1: thread, %r4: its own word of shared memory, %r5: that of the thread 32 further on (of 64).
OWN_WORD = """mov.u32 %r1, %tid.x;
shl.b32 %r2, %r1, 2;
mov.u32 %r3, global_smem;
add.s32 %r4, %r3, %r2;
xor.b32 %r6, %r2, 128;
add.s32 %r5, %r3, %r6;
"""


@pytest.fixture(params=["warp", "program"])
def lockstep(request):
    """The same is found, whichever warps run in step."""
    return request.param


@pytest.mark.parametrize("seed", range(3))
def test_a_read_of_another_warps_store_needs_a_barrier(lockstep, seed):
    body = f"{OWN_WORD}st.shared.b32 [%r4], %r1;\nBARRIER;\nld.shared.b32 %r7, [%r5];\nret;"
    good = run(body.replace("BARRIER", "bar.sync 0"), warps=2, lockstep=lockstep, seed=seed)
    assert kinds(good) == []
    bad = run(body.replace("BARRIER;\n", ""), warps=2, lockstep=lockstep, seed=seed)
    found = kinds(bad)
    # A read before the store meets memory that was never written, too.
    assert "race in shared memory, read after write" in found or "race in shared memory, write after read" in found
    fault = next(fault for fault in bad.faults if fault.kind.startswith("race"))
    assert {fault.place.line, fault.other.line} == {7, 8}
    assert "st.shared.b32 [%r4], %r1" in str(fault)
    with pytest.raises(MachineFaultError, match=rf"kernel on a grid of .*, seed {seed}: .*race(?s:.*)kernel\.py:[78]"):
        raise_faults([bad])


def test_a_store_over_what_another_warp_reads_needs_a_barrier(lockstep):
    body = f"""{OWN_WORD}st.shared.b32 [%r4], %r1;
bar.sync 0;
ld.shared.b32 %r7, [%r5];
BARRIER;
st.shared.b32 [%r4], %r7;
ret;"""
    assert kinds(run(body.replace("BARRIER", "bar.sync 0"), warps=2, lockstep=lockstep)) == []
    found = kinds(run(body.replace("BARRIER;\n", ""), warps=2, lockstep=lockstep))
    assert set(found) <= {"race in shared memory, write after read", "race in shared memory, read after write"}
    assert found


def test_two_warps_may_store_the_same_value_and_no_other(lockstep):
    body = f"{OWN_WORD}st.shared.b32 [%r3], VALUE;\nret;"
    same = run(body.replace("VALUE", "7"), warps=2, lockstep=lockstep)
    assert kinds(same) == []
    assert [fault.kind for fault in same.found.values()] == [
        "race in shared memory, write after write of the same value"
    ]
    shifted = body.replace("st.shared", "shr.u32 %r8, %r1, 5;\nst.shared").replace("VALUE", "%r8")
    assert "race in shared memory, write after write" in kinds(run(shifted, warps=2, lockstep=lockstep))


def test_threads_of_a_warp_store_one_value_in_one_place():
    body = f"{OWN_WORD}st.shared.b32 [%r3], %r1;\nret;"
    assert kinds(run(body)) == ["threads store different values in one place"]


def test_programs_do_not_share_memory_that_one_of_them_writes(lockstep):
    own = OWN_GLOBAL.replace("mul.wide.u32 %rd2, %r1, 4", "mov.u32 %r2, %ctaid.x;\nmad.lo.s32 %r3, %r2, STEP, %r1;\n"
                             "mul.wide.u32 %rd2, %r3, 4")  # fmt: skip
    body = f"{own}st.global.b32 [%rd3], %r2;\nret;"
    assert kinds(run(body.replace("STEP", "32"), words(), grid=2, lockstep=lockstep)) == []
    clash = run(body.replace("STEP", "0"), words(), grid=2, lockstep=lockstep)
    assert "race in global memory between programs, write after write" in kinds(clash)
    reads = f"{own}ld.global.b32 %r4, [%rd1];\nst.global.b32 [%rd3], %r2;\nret;".replace("STEP", "32")
    found = kinds(run(reads, words(), grid=2, lockstep=lockstep))
    assert any(kind.startswith("race in global memory between programs") for kind in found)


def test_warps_of_a_program_may_pass_global_memory_on_behind_a_barrier(lockstep):
    body = f"{OWN_GLOBAL}st.global.b32 [%rd3], %r1;\nBARRIER;\nxor.b32 %r2, %r1, 32;\nmul.wide.u32 %rd4, %r2, 4;\n"
    body += "add.s64 %rd5, %rd1, %rd4;\nld.global.b32 %r3, [%rd5];\nret;"
    assert kinds(run(body.replace("BARRIER", "bar.sync 0"), words(), warps=2, lockstep=lockstep)) == []
    found = kinds(run(body.replace("BARRIER;\n", ""), words(), warps=2, lockstep=lockstep))
    assert found
    assert all(kind.startswith("race in global memory within a program") for kind in found)


@pytest.mark.parametrize(
    ("line", "kind", "detail"),
    [
        ("ld.global.b32 %r2, [%rd1+2];", "misaligned access", "a load of 4 bytes"),
        ("ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd1+8];", "misaligned access", "a load of 16 bytes"),
        ("ld.global.b32 %r2, [%rd1+256];", "out of bounds", "at byte 256 of a tensor of 256 bytes"),
        ("ld.global.v2.b32 {%r2, %r3}, [%rd1+256];", "out of bounds", "a load of 8 bytes at byte 256"),
        ("st.global.b32 [%rd1+-4], 0;", "out of bounds", ""),
        ("ld.shared.b32 %r2, [1024];", "shared memory is read before it is written", ""),
        ("ld.shared.b32 %r2, [0];", "out of bounds", "a load at byte -1024 of 1024 bytes of shared memory"),
        ("st.shared.b32 [2048], 0;", "out of bounds", "a store at byte 1024 of 1024 bytes of shared memory"),
        ("st.shared.b32 [1025], 0;", "misaligned access", "a store of 4 bytes"),
        ("atom.global.add.u32 %r2, [%rd1+1], 1;", "misaligned access", "an atomic operation"),
    ],
)
def test_an_access_must_be_aligned_within_bounds_and_of_written_memory(line, kind, detail):
    storage = np.zeros(96, np.uint32)
    start = (-storage.ctypes.data // 4) % 4
    execution = run(f"ld.param.b64 %rd1, [kernel_param_0];\n{line}\nret;", storage[start : start + 64])
    (fault,) = execution.faults
    assert fault.kind == kind
    assert detail in fault.detail
    assert fault.place.line == 2


def test_global_memory_that_nobody_wrote_is_not_read():
    load, store = "ld.global.b32 %r2, [%rd3];", "st.global.b32 [%rd3], 1;"
    assert kinds(run(f"{OWN_GLOBAL}{load}\nret;", words())) == []
    assert kinds(run(f"{OWN_GLOBAL}{load}\nret;", words(), written={0: False})) == [
        "global memory is read before it is written"
    ]
    assert kinds(run(f"{OWN_GLOBAL}{store}\n{load}\nret;", words(), written={0: False})) == []


def test_a_barrier_that_some_warps_never_reach_is_a_deadlock(lockstep):
    body = "mov.u32 %r1, %tid.x;\nsetp.lt.u32 %p1, %r1, 32;\n@%p1 bra $L__BB0_1;\nbar.sync 1, 64;\n$L__BB0_1:\nret;"
    execution = run(body, warps=2, lockstep=lockstep)
    assert kinds(execution) == ["deadlock"]
    assert execution.faults[0].place.line == 4


def test_warps_wait_at_the_same_barrier(lockstep):
    body = """mov.u32 %r1, %tid.x;
setp.lt.u32 %p1, %r1, 32;
@%p1 bra $L__BB0_1;
bar.sync 0;
ret;
$L__BB0_1:
bar.sync 0;
ret;"""
    assert kinds(run(body, warps=2, lockstep=lockstep)) == ["warps of a program wait at different barriers"]


def test_a_loop_without_an_end_is_stopped():
    assert kinds(run("$L__BB0_1:\nbra $L__BB0_1;", limit=1000)) == ["no end"]


def test_threads_part_and_meet_again():
    body = f"""{OWN_GLOBAL}and.b32 %r2, %r1, 1;
setp.eq.b32 %p1, %r2, 0;
mov.b32 %r3, 0;
@%p1 bra $L__BB0_2;
$L__BB0_1:
add.s32 %r3, %r3, 1;
setp.lt.u32 %p2, %r3, %r1;
@%p2 bra $L__BB0_1;
$L__BB0_2:
st.global.b32 [%rd3], %r3;
ret;"""
    buffer = words(32)
    assert kinds(run(body, buffer)) == []
    np.testing.assert_array_equal(buffer, [thread if thread % 2 else 0 for thread in range(32)])


# --- copies ---

COPY = f"""{OWN_WORD}ld.param.b64 %rd1, [kernel_param_0];
mul.wide.u32 %rd2, %r1, 4;
add.s64 %rd3, %rd1, %rd2;
cp.async.ca.shared.global [%r4], [%rd3], 4;
cp.async.commit_group;
"""


def test_a_copy_is_read_behind_its_wait_and_by_other_warps_behind_a_barrier(lockstep):
    wait, barrier = "cp.async.wait_group 0;\n", "bar.sync 0;\n"
    own, other = "ld.shared.b32 %r7, [%r4];\nret;", "ld.shared.b32 %r7, [%r5];\nret;"
    assert kinds(run(COPY + wait + own, words(), warps=2, lockstep=lockstep)) == []
    assert kinds(run(COPY + own, words(), warps=2, lockstep=lockstep)) == [
        "shared memory is read while a copy to it is under way"
    ]
    assert kinds(run(COPY + wait + barrier + other, words(), warps=2, lockstep=lockstep)) == []
    assert kinds(run(COPY + wait + other, words(), warps=2, lockstep=lockstep)) != []
    assert kinds(run(COPY + barrier + wait + other, words(), warps=2, lockstep=lockstep)) != []


def test_wait_group_leaves_the_last_groups_under_way():
    second = COPY.splitlines()[-2:]
    more = f"add.s32 %r4, %r4, 256;\n{second[0]}\n{second[1]}\n"
    first, last = "sub.s32 %r4, %r4, 256;\nld.shared.b32 %r7, [%r4];\nret;", "ld.shared.b32 %r7, [%r4];\nret;"
    assert kinds(run(f"{COPY}{more}cp.async.wait_group 1;\n{first}", words())) == []
    assert kinds(run(f"{COPY}{more}cp.async.wait_group 1;\n{last}", words())) != []
    assert kinds(run(f"{COPY}{more}cp.async.wait_group 0;\n{last}", words())) == []


def test_matrices_are_stored_and_loaded_row_by_row_or_transposed():
    body = f"""{OWN_GLOBAL}mov.u32 %r2, global_smem;
shl.b32 %r3, %r1, 4;
add.s32 %r4, %r2, %r3;
stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r4], {{%r1}};
ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {{%r5}}, [%r4];
st.global.b32 [%rd3], %r5;
ret;"""
    buffer = words(32)
    assert kinds(run(body, buffer)) == []
    # Lane l stored its number as element (l // 4, 2 (l % 4)) of a matrix whose odd columns are 0.
    matrix = np.zeros((8, 8), np.uint16)
    matrix[:, ::2] = np.arange(32).reshape(8, 4)
    np.testing.assert_array_equal(buffer, np.ascontiguousarray(matrix.T).view(np.uint32).reshape(-1))


def test_atomic_operations_meet_without_a_race_and_are_counted_one_by_one(lockstep):
    body = f"{OWN_GLOBAL}atom.global.add.u32 %r2, [%rd1], 1;\nred.global.max.u32 [%rd1+4], %r1;\n"
    body += "atom.global.cas.b32 %r3, [%rd1+8], 0, 5;\natom.global.exch.b32 %r4, [%rd1+12], 9;\nret;"
    buffer = words(4)
    assert kinds(run(body, buffer, warps=2, grid=2, lockstep=lockstep)) == []
    assert buffer.tolist() == [128, 63, 5, 9]


# --- mbarriers and tensor copies ---

FIRST = "mov.u32 %r1, %tid.x;\nsetp.eq.u32 %p1, %r1, 0;\n"
INIT = FIRST + "@%p1 mbarrier.init.shared::cta.b64 [1024], 1;\nbar.sync 0;\n"
LOAD = """mov.b64 %rd1, kernel_param_0;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [1024], 256;
mov.b32 %r2, 0;
@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [1152], [%rd1, {%r2, %r2}], [1024];
"""
WAIT = """{
.reg .pred complete;
waitLoop:
mbarrier.try_wait.parity.shared::cta.b64 complete, [1024], 0;
@!complete bra.uni waitLoop;
}
"""
READ = "shl.b32 %r3, %r1, 2;\nadd.s32 %r4, %r3, 1152;\nld.shared.b32 %r5, [%r4];\n"


def tensor_copy(body, source, **options):
    """A box of 4 rows of 16 words of ``source``."""
    descriptor = Descriptor(source.ctypes.data, [3, 16], [16, 1], [4, 16], 4, 0)
    return run(body, source, warps=2, descriptors={DESCRIPTORS: descriptor}, **options)


@pytest.mark.parametrize("seed", range(4))
def test_a_tensor_copy_is_read_behind_the_wait_for_its_mbarrier(seed, lockstep):
    source = np.arange(48, dtype=np.uint32)
    options = {"lockstep": lockstep, "seed": seed}
    assert kinds(tensor_copy(INIT + LOAD + WAIT + READ + "ret;", source, **options)) == []
    # Without it, it has not arrived or nobody knows that it has: whichever the seed has.
    assert kinds(tensor_copy(INIT + LOAD + READ + "ret;", source, **options)) != []
    behind = INIT + LOAD + WAIT + READ
    again = behind + LOAD.replace("mov.b64 %rd1, kernel_param_0;\n", "") + "ret;"
    # Whether the other warp has read by then hangs on the order of the warps: it is a fault either way.
    assert kinds(tensor_copy(again, source, **options)) != []
    barrier = behind + "bar.sync 0;\n" + LOAD.replace("mov.b64 %rd1, kernel_param_0;\n", "") + "ret;"
    assert kinds(tensor_copy(barrier, source, **options)) == []


def test_what_is_outside_of_the_tensor_becomes_zeros():
    source, out = np.arange(48, dtype=np.uint32), words(64)
    store = "ld.param.b64 %rd2, [kernel_param_1];\nmul.wide.u32 %rd3, %r1, 4;\nadd.s64 %rd4, %rd2, %rd3;\n"
    descriptor = Descriptor(source.ctypes.data, [3, 16], [16, 1], [4, 16], 4, 0)
    body = f"{INIT}{LOAD}{WAIT}{READ}{store}st.global.b32 [%rd4], %r5;\nret;"
    assert kinds(run(body, source, out, warps=2, descriptors={DESCRIPTORS: descriptor})) == []
    np.testing.assert_array_equal(out, [*range(48), *[0] * 16])


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (FIRST + "bar.sync 0;\n" + WAIT, "an mbarrier is used before it is initialised"),
        (INIT + WAIT, "deadlock"),
        (INIT + "@%p1 mbarrier.init.shared::cta.b64 [1024], 1;\n", "an mbarrier is initialised twice"),
        (
            INIT.replace("bar.sync 0;\n", "") + "@%p1 mbarrier.arrive.shared::cta.b64 _, [1024];\n" + WAIT,
            "an mbarrier is used by a warp that cannot know that it is initialised",
        ),
    ],
)  # fmt: skip
def test_mbarriers_are_initialised_once_known_and_complete(body, kind):
    assert kind in kinds(run(body + "ret;", warps=2, lockstep="program"))


STORE = """mov.b64 %rd1, kernel_param_0;
mov.b32 %r2, 0;
shl.b32 %r3, %r1, 2;
add.s32 %r4, %r3, 1152;
st.shared.b32 [%r4], %r1;
FENCE;
bar.sync 0;
@%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r2, %r2}], [1152];
cp.async.bulk.commit_group;
"""


def test_a_tensor_store_needs_a_fence_and_a_wait(lockstep):
    target = words(48)
    good = FIRST + STORE.replace("FENCE", "fence.proxy.async.shared::cta") + "cp.async.bulk.wait_group.read 0;\n"
    assert kinds(tensor_copy(good + "ret;", target, lockstep=lockstep)) == []
    np.testing.assert_array_equal(target, range(48))  # the fourth row is outside
    unfenced = FIRST + STORE.replace("FENCE;\n", "") + "cp.async.bulk.wait_group.read 0;\nret;"
    (kind,) = kinds(tensor_copy(unfenced, target, lockstep=lockstep))
    assert "without fence.proxy.async" in kind
    # Behind the barrier, by the warp that stores, it is as good.
    late = unfenced.replace("bar.sync 0;\n", "bar.sync 0;\nfence.proxy.async.shared::cta;\n")
    assert kinds(tensor_copy(late, target, lockstep=lockstep)) == []
    unwaited = FIRST + STORE.replace("FENCE", "fence.proxy.async.shared::cta") + "ret;"
    assert kinds(tensor_copy(unwaited, target, lockstep=lockstep)) == [
        "a warp ends while its TMA store reads shared memory"
    ]
    early = good.replace("cp.async.bulk.wait_group.read 0;\n", "st.shared.b32 [%r4], 0;\n") + (
        "cp.async.bulk.wait_group.read 0;\nret;"
    )
    assert "shared memory is written while a wgmma or a TMA store reads it" in kinds(
        tensor_copy(early, target, lockstep=lockstep)
    )


# --- wgmma: 64 x 8 = 64 x 16 by 16 x 8. Matrices of 8 x 8 lie one behind the other, those of a row 128 bytes apart. ---

DESCRIBE = (128 >> 4) << 16 | (256 >> 4) << 32
WGMMA = f"""mov.u32 %r1, %tid.x;
shl.b32 %r2, %r1, 2;
add.s32 %r3, %r2, 1024;
mov.b32 %r4, 0x3C003C00;
mov.b32 %r10, 0;
mov.b32 %r11, 0;
mov.b32 %r12, 0;
mov.b32 %r13, 0;
st.shared.b32 [%r3], %r4;
st.shared.b32 [%r3+512], %r4;
st.shared.b32 [%r3+1024], %r4;
st.shared.b32 [%r3+1536], %r4;
st.shared.b32 [%r3+2048], %r4;
fence.proxy.async.shared::cta;
bar.sync 0;
mov.b64 %rd1, {DESCRIBE | 1024 >> 4};
mov.b64 %rd2, {DESCRIBE | 3072 >> 4};
mov.pred %p1, 0;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%r10,%r11,%r12,%r13}}, %rd1, %rd2, %p1, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
"""
WAIT_GROUP = "wgmma.wait_group.sync.aligned 0;\n"


def product(tail: str, **options):
    buffer = np.zeros(128, np.float32)
    tail = f"{tail}ld.param.b64 %rd3, [kernel_param_0];\nmul.wide.u32 %rd4, %r1, 4;\nadd.s64 %rd5, %rd3, %rd4;\n"
    tail += "st.global.b32 [%rd5], %r13;\nret;"
    return run(WGMMA + tail, buffer, warps=4, shared=4096, **options), buffer


def test_the_accumulators_of_a_wgmma_are_touched_behind_its_wait():
    good, buffer = product(WAIT_GROUP)
    assert kinds(good) == []
    np.testing.assert_array_equal(buffer, 16)
    bad, _ = product("")
    assert kinds(bad) == ["an accumulator is touched before wgmma.wait_group"]
    assert bad.faults[0].other.text.startswith("wgmma.mma_async")
    later = WAIT_GROUP.replace(" 0;", " 1;")
    assert kinds(product(later)[0]) == ["an accumulator is touched before wgmma.wait_group"]


def test_the_operands_of_a_wgmma_are_overwritten_behind_its_wait():
    store = "st.shared.b32 [%r3], 0;\n"
    assert kinds(product(WAIT_GROUP + "bar.sync 0;\n" + store)[0]) == []
    assert kinds(product(store + WAIT_GROUP)[0]) == ["shared memory is written while a wgmma or a TMA store reads it"]
    assert kinds(product(WAIT_GROUP + store)[0]) == ["race in shared memory, write after read"]


def test_a_wgmma_reads_ordinary_stores_behind_a_fence():
    buffer = np.zeros(128, np.float32)
    body = WGMMA.replace("fence.proxy.async.shared::cta;\n", "") + WAIT_GROUP + "ret;"
    (kind, *_) = kinds(run(body, buffer, warps=4, shared=4096))
    assert kind == "a wgmma of what ordinary stores have written, without fence.proxy.async between"


def test_a_register_operand_of_a_wgmma_is_overwritten_behind_its_wait():
    text = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r10,%r11,%r12,%r13}, "
    body = WGMMA.replace(f"{text}%rd1, %rd2, %p1, 1, 1, 0, 0;", f"{text}{{%r4,%r4,%r4,%r4}}, %rd2, %p1, 1, 1, 0;")
    assert "{%r4,%r4" in body
    buffer = np.zeros(128, np.float32)
    assert kinds(run(body + WAIT_GROUP + "mov.b32 %r4, 0;\nret;", buffer, warps=4, shared=4096)) == []
    assert kinds(run(body + "mov.b32 %r4, 0;\n" + WAIT_GROUP + "ret;", buffer, warps=4, shared=4096)) == [
        "an operand of a wgmma is overwritten before wgmma.wait_group"
    ]


# --- what the mutation table does ---


def test_an_instruction_that_is_left_out_does_not_run_and_keeps_the_numbers_of_others():
    body = f"{OWN_WORD}st.shared.b32 [%r4], %r1;\nbar.sync 0;\nld.shared.b32 %r7, [%r5];\nret;"
    (barrier,) = program(body).synchronisation
    assert kinds(run(body, warps=2)) == []
    bad = run(body, warps=2, without={barrier.index})
    assert any(kind.startswith("race") for kind in kinds(bad))
    assert bad.program.instructions[barrier.index] == barrier


def test_a_wait_that_is_left_out_lets_everybody_through():
    body = INIT + LOAD + WAIT + READ + "ret;"
    wait = next(entry for entry in program(body, 1).synchronisation if "try_wait" in entry.opcode)
    source = np.arange(48, dtype=np.uint32)
    assert kinds(tensor_copy(body, source)) == []
    assert kinds(tensor_copy(body, source, without={wait.index})) != []


def test_what_no_thread_executed_is_not_covered():
    body = (
        "mov.u32 %r1, %tid.x;\nsetp.gt.u32 %p1, %r1, 99;\n@%p1 st.shared.b32 [1024], 0;\nst.shared.b32 [1028], 0;\nret;"
    )
    assert run(body).covered[2:4].tolist() == [False, True]


def test_the_work_of_matrix_instructions_is_counted_for_a_warp():
    entries = program(WGMMA + "ret;", 1, 128).instructions
    (work,) = [matrix_work(entry) for entry in entries if entry.base == "wgmma" and matrix_work(entry)]
    assert 4 * work == 2 * 64 * 8 * 16
