"""How the tests of the GPU run are shared out, and that no kernel is compiled twice."""

import json
import subprocess
import sys
import textwrap

from bench.gpu import plan
from bench.gpu.share import COSTS, function_of, rank, shares
from bench.gpu.units import PASSED, SKIPPED, read_rows


def names(**functions):
    return [f"tests/test_{file}.py::test_it[{i}]" for file, count in functions.items() for i in range(count)]


def test_every_test_goes_to_one_share_and_the_tests_of_a_kernel_to_few():
    tests = names(gluon_flash_forward=64, paged=32, merge=32, attention=32)
    found = shares(tests, tests, 16, {})
    assert sorted(test for part in found for test in part) == sorted(tests)
    for function in {function_of(test) for test in tests}:
        own = [test for test in tests if function_of(test) == function]
        places = [place for place, part in enumerate(found) if set(own) & set(part)]
        # Of the functions of its rank, its share of the processes, and one that it splits with a neighbour.
        of_rank = sum(rank(test) == rank(own[0]) for test in tests)
        assert len(places) <= 16 * len(own) / of_rank + 1
        assert places == list(range(places[0], places[-1] + 1))


def test_what_every_program_launches_is_tested_first():
    tests = names(gluon_flash_forward=40, merge=40, paged=40)
    for part in shares(tests, tests, 4, {}):
        assert [rank(test) for test in part] == [0] * 10 + [1] * 10 + [2] * 10
    assert rank("tests/test_gluon_varlen.py::test_x[1]") == 2
    assert rank("tests/test_cache.py::test_x") == 1


def test_shares_take_about_the_same_time():
    costs = {"tests/test_a.py::test_it": 4.0}
    tests = names(a=20, b=80)
    sums = [sum(costs.get(function_of(test), 1.0) for test in part) for part in shares(tests, tests, 8, costs)]
    assert max(sums) - min(sums) <= 4
    assert shares([], [], 3, {}) == [[], [], []]


LOCKED = """
    import sys, time
    from pathlib import Path
    import torch, triton
    import triton.language as tl
    from bench.gpu.compile_once import compile_once
    from kvops.autotune.inspect import compile_only
    compiled = []

    @triton.jit
    def kernel(x_ptr, ROWS: tl.constexpr):
        rows = tl.arange(0, ROWS)
        tl.store(x_ptr + rows, tl.load(x_ptr + rows) + 1)

    from triton import knobs
    knobs.compilation.listener = lambda **facts: compiled.append(not facts["cache_hit"])
    compile_once()
    Path(sys.argv[1]).touch()
    while len(list(Path(sys.argv[1]).parent.glob("ready-*"))) < 2:
        time.sleep(0.001)
    with compile_only("sm_90"):
        kernel[(1,)](torch.empty(4096), ROWS=4096)
    print(sum(compiled))
"""


def test_two_processes_that_launch_a_kernel_at_once_compile_it_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "script.py").write_text(textwrap.dedent(LOCKED))
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    command = [sys.executable, str(tmp_path / "script.py")]
    processes = [
        subprocess.Popen([*command, str(tmp_path / f"ready-{i}")], stdout=subprocess.PIPE, text=True) for i in range(2)
    ]
    assert sorted(process.communicate(timeout=300)[0].strip() for process in processes) == ["0", "1"]


def test_a_simulation_waits_for_a_kernel_that_another_process_compiles():
    variants = {"a": [("k", "0")], "b": [("k", "0")], "c": []}
    besides = {"a": 1.0, "b": 1.0, "c": 4.0}

    def simulated(*by_worker):
        return plan.makespan(by_worker, variants, {"k": 10.0}, besides) - plan.START_SECONDS

    assert simulated(["a", "b"]) == 12
    assert simulated(["a"], ["c", "b"]) == 11  # waited for until 10
    assert simulated(["a", "c"], ["b"]) == 15


def test_the_plan_compiles_everything_first_and_then_tests():
    """Two starts; 16 x 3 kernels on 16 processes take 3 of them, and as many tests each."""
    tests = [f"tests/test_paged.py::test_it[{i}]" for i in range(48)]
    found = plan.plan({test: [("k", test)] for test in tests}, {"k": 10.0}, dict.fromkeys(tests, 0.5))
    assert found["seconds_compiling"] == round(plan.START_SECONDS + 3 * 10.5)
    assert found["seconds_testing"] == round(plan.START_SECONDS + 3 * 0.5)
    costs = found["seconds_per_test"]
    assert (costs["compile"]["tests/test_paged.py::test_it"], costs["test"]["tests/test_paged.py::test_it"]) == (
        10.5,
        0.5,
    )


def test_the_plan_sees_tests_that_the_machine_for_ptx_leaves_out():
    """The suite on the machine, whose way the tests go in the plan, runs those with a ``backend`` alone."""
    test = "tests/test_gluon_flash_forward.py::test_on_a_gpu_it_agrees_with_the_triton_kernel"
    variants, seconds = plan.launched([test])
    assert variants.keys() == seconds.keys()
    kernels = {kernel for own in variants.values() for kernel, _ in own}
    assert {"gluon_flash_forward_kernel", "flash_forward_kernel"} <= kernels


def test_the_tests_of_the_check_phase_fit_its_eight_minutes_on_16_cores():
    """By the committed computation; it takes minutes to repeat, so that this test only reads it."""
    found = json.loads(COSTS.read_text())
    assert "not measured on a GPU" in found["about"]
    assert found["workers"] == 16
    assert found["seconds_of_a_reference"] == plan.REFERENCE_SECONDS
    assert found["seconds_of_a_start"] == plan.START_SECONDS
    assert found["seconds"] == found["seconds_compiling"] + found["seconds_testing"] < 480
    assert found["tests"] > 1900
    assert {"paged_attention_kernel", "gluon_flash_forward_kernel"} <= found["variants"].keys()
    # No process can be done before its share of the work.
    compiling = sum(number * found["seconds_per_variant"][kernel] for kernel, number in found["variants"].items())
    assert found["seconds_compiling"] > plan.START_SECONDS + compiling / 16


COMPILED = """
    import pytest, torch, triton
    import triton.language as tl

    @triton.jit
    def first_kernel(x_ptr, ROWS: tl.constexpr):
        tl.store(x_ptr + tl.arange(0, ROWS), 1.0)

    @triton.jit
    def second_kernel(x_ptr, ROWS: tl.constexpr):
        tl.store(x_ptr + tl.arange(0, ROWS), 2.0)

    @triton.jit
    def wrong_kernel(x_ptr, ROWS: tl.constexpr):
        tl.store(x_ptr + tl.arange(0, ROWS + 1), 2.0)

    @pytest.fixture
    def device():
        return torch.device("cuda")

    @pytest.mark.parametrize("rows", [16, 16, 32])
    def test_paged(device, rows):
        x = torch.zeros(rows, device="cuda")
        first_kernel[(1,)](x, rows)
        second_kernel[(1,)](x, 16)
        assert x.sum() == 0, "launches do not run"

    def test_wrong(device):
        wrong_kernel[(1,)](torch.zeros(16, device="cuda"), 16)

    def test_of_the_host():
        raise AssertionError("needs no device: is not run")
"""


def test_kernels_of_tests_are_compiled_into_the_cache_before_the_tests_run(tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text(textwrap.dedent(COMPILED))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    monkeypatch.setenv("KVOPS_TEST_MACHINE", "sm_90")
    rows = tmp_path / "rows"
    words = ["--target", "sm_90", "--rows", str(rows), str(tmp_path)]
    command = [sys.executable, "-m", "bench.gpu.compile_first", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [(row["name"], row["outcome"]) for row in read_rows(rows)]
    assert found == [
        *(("first_kernel", PASSED), ("second_kernel", PASSED), ("first_kernel", PASSED)),
        *(("wrong_kernel", SKIPPED), ("share 0/1", PASSED)),
    ]
    assert read_rows(rows)[-1]["note"] == "4 of 4 tests"
    assert len(list((tmp_path / "cache").rglob("*.cubin"))) == 3
    rows.unlink()
    subprocess.run([*command, "--seconds", "0"], capture_output=True, text=True, timeout=300)
    assert [(row["name"], row["outcome"]) for row in read_rows(rows)][-1] == ("share 0/1", SKIPPED)
    assert read_rows(rows)[-1]["note"] == "1 of 4 tests", "the time is up after the first"
