"""The machine for PTX: values that are loaded, changed and stored again, launches with several seeds, and counts."""

import pytest
from machine_ptx import HEADER, OWN_GLOBAL, kinds, prepared, run, words

from kvops.autotune.machine.counts import Counter
from kvops.autotune.machine.grid import run_with_seeds
from kvops.autotune.machine.ptx import Program


@pytest.fixture(params=["warp", "program"])
def lockstep(request):
    """The same is found, whichever warps run in step."""
    return request.param


# Every warp loads the same 32 words; %p1 holds for warp 0.
UPDATE = """mov.u32 %r1, %laneid;
mov.u32 %r6, %tid.x;
setp.lt.u32 %p1, %r6, 32;
ld.param.b64 %rd1, [kernel_param_0];
mul.wide.u32 %rd2, %r1, 4;
add.s64 %rd3, %rd1, %rd2;
ld.global.b32 %r2, [%rd3];
add.u32 %r3, %r2, %r1;
"""


def test_what_other_warps_load_and_drop_may_be_updated_by_one(lockstep):
    """Triton gives the elements of a small tensor to several warps: all load them, one stores."""
    buffer = words(32)
    assert kinds(run(f"{UPDATE}@%p1 st.global.b32 [%rd3], %r3;\nret;", buffer, warps=2, lockstep=lockstep)) == []
    assert buffer.tolist() == list(range(32))


@pytest.mark.parametrize("place", ["", "add.s64 %rd3, %rd3, 4;\n"])
@pytest.mark.parametrize("exchange", ["", "shfl.sync.bfly.b32 %r3, %r3, 1, 31, -1;\n"])
def test_the_warp_that_stores_may_exchange_the_values_and_move_them(lockstep, exchange, place):
    """A change of layout in between; no other warp has a use for what it has loaded."""
    rest = f"{exchange}{place}@%p1 st.global.b32 [%rd3], %r3;\nret;"
    assert kinds(run(UPDATE + rest, words(128), warps=2, lockstep=lockstep)) == []


@pytest.mark.parametrize(
    "rest",
    [
        # The others store what they have loaded somewhere else, ask it where to go, or load it again behind the store.
        "@%p1 st.global.b32 [%rd3], %r3;\n@!%p1 st.global.b32 [%rd3+128], %r2;\nret;",
        "setp.eq.u32 %p2, %r2, 0;\n@%p1 st.global.b32 [%rd3], %r3;\n@!%p2 st.global.b32 [%rd3+128], %r1;\nret;",
        "@%p1 st.global.b32 [%rd3], %r3;\nld.global.b32 %r4, [%rd3];\n@!%p1 st.global.b32 [%rd3+128], %r4;\nret;",
        # The second warp stores elsewhere what it has loaded, by the same instruction; or other threads of it do.
        "@!%p1 add.s64 %rd3, %rd3, 128;\nst.global.b32 [%rd3], %r3;\nret;",
        "@!%p1 add.s64 %rd3, %rd3, 128;\nshfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;\nst.global.b32 [%rd3], %r3;\nret;",
    ],
)
def test_what_other_warps_load_and_use_is_not_updated_by_one(lockstep, rest):
    found = kinds(run(UPDATE + rest, words(128), warps=2, lockstep=lockstep))
    assert found
    assert all(kind.startswith("race in global memory within a program") for kind in found)


@pytest.mark.parametrize("writer", [0, 32])
def test_a_warp_that_writes_what_it_has_read_itself_does_not_forget_the_other_readers(lockstep, writer):
    """The machine knew the last reader alone: where that was the writer, the reads of others were lost."""
    body = f"{UPDATE}setp.eq.u32 %p2, %r6, {writer};\nadd.s64 %rd4, %rd3, 128;\nst.global.b32 [%rd4], %r2;\nBARRIER"
    body += "@%p2 st.global.b32 [%rd3], %r6;\nret;"
    same = "race in global memory within a program, write after write of the same value"
    good = run(body.replace("BARRIER", "bar.sync 0;\n"), words(128), warps=2, lockstep=lockstep)
    assert kinds(good) == []
    assert [fault.kind for fault in good.found.values()] == [same]
    found = kinds(run(body.replace("BARRIER", ""), words(128), warps=2, lockstep=lockstep))
    assert found
    assert all(kind.startswith("race in global memory within a program") for kind in found)


def test_two_warps_do_not_update_one_place_even_to_equal_values(lockstep):
    """In step both store the same; on a GPU the second may have loaded what the first has stored."""
    found = kinds(run(f"{UPDATE}st.global.b32 [%rd3], %r3;\nret;", words(32), warps=2, lockstep=lockstep))
    assert found == ["race in global memory within a program, write after write"]


def test_a_launch_runs_with_each_seed_from_the_same_memory_and_must_give_the_same_bits():
    """Programs add to one word: with races the last may win, and another order has another last."""
    body = f"{OWN_GLOBAL}mov.u32 %r2, %ctaid.x;\nadd.u32 %r2, %r2, 1;\nSTORE\nret;"
    runs = []

    def launch(store, grid):
        buffer = words(64)
        runs.clear()

        def prepare(seed):
            held = prepared(body.replace("STORE", store), buffer, grid=grid, seed=seed, lockstep="warp")
            runs.append(held)
            return held

        run_with_seeds(prepare, (0, 1, 2, 3))
        return buffer, [kinds(held.execution) for held in runs]

    buffer, found = launch("atom.global.add.u32 %r3, [%rd3], %r2;", grid=3)
    assert found == [[]] * 4
    assert buffer[:32].tolist() == [6] * 32
    _, found = launch("st.global.b32 [%rd3], %r2;", grid=5)
    assert any("another seed gives other results" in kinds for kinds in found)
    _, found = launch("st.global.b32 [%rd3], %r2;", grid=1)
    assert found == [[]]  # one warp: nothing is drawn


def test_bytes_sectors_bank_conflicts_and_instructions_are_counted():
    body = f"""{OWN_GLOBAL}ld.global.b32 %r2, [%rd3];
shl.b32 %r3, %r1, 7;
st.shared.b32 [%r3+1024], %r2;
shl.b32 %r3, %r1, 2;
st.shared.b32 [%r3+1024], %r2;
st.shared.b32 [1024], 7;
ret;"""
    counter = Counter()
    storage = words(64)
    start = -storage.ctypes.data // 4 % 8  # at a multiple of 32 bytes
    assert kinds(run(body, storage[start : start + 32], shared=4096, counter=counter, check=False)) == []
    assert (counter.global_bytes, counter.sectors) == (128, 4)
    # 32 words of one bank take 32 turns; a word to a bank, or one word for all, takes one.
    assert (counter.wavefronts, counter.fewest_wavefronts) == (34, 3)
    assert sorted(counter.conflicts.values()) == [1, 1, 32]
    assert counter.pipes["memory"] == 4
    assert counter.pipes["parameter"] == 1
    assert counter.matrix_operations == 0


def test_what_all_threads_of_a_warp_read_is_moved_once_for_each_warp():
    counter = Counter()
    run(f"{OWN_GLOBAL}ld.global.b32 %r2, [%rd1];\nret;", words(), warps=2, grid=3, counter=counter, check=False)
    assert (counter.global_bytes, counter.sectors) == (6 * 4, 6)


def test_bank_conflicts_in_loops_are_told_from_others():
    body = f"""{OWN_GLOBAL}shl.b32 %r3, %r1, 7;
mov.b32 %r4, 0;
st.shared.b32 [%r3+1024], %r1;
$L__BB0_1:
shl.b32 %r3, %r1, 3;
st.shared.b32 [%r3+1024], %r1;
add.s32 %r4, %r4, 1;
setp.lt.s32 %p1, %r4, 3;
@%p1 bra $L__BB0_1;
ret;"""
    counter = Counter()
    run(body, words(), shared=4096, counter=counter, check=False)
    assert sorted(counter.conflicts.values()) == [2, 32]
    assert list(counter.loop_conflicts.values()) == [2]


def test_an_instruction_of_an_inlined_function_names_the_line_of_the_kernel_too():
    body = """.loc 1 7 0 // helper.py:7:0 @[ middle.py:3:1 @[ kernel.py:12:4 ] ]
mov.u32 %r1, %tid.x;
.loc 1 8 0 // kernel.py:8:0
ret;"""
    first, second = Program(HEADER.format(parameters="", threads=32, body=body)).instructions
    assert str(first.place) == "kernel.py:7 in kernel.py:12  mov.u32 %r1, %tid.x"
    assert str(second.place) == "kernel.py:8  ret"
