"""Every kernel compiles to a real binary for every supported GPU and keeps within its limits, with no GPU at hand."""

import json
import subprocess
import sys

import pytest
import torch
from compile_cases import CASES
from compile_exceptions import KnownException, unexpected_problems
from compiled import OTHER_VERSIONS, TESTED, record, report, sample, unrecorded

from kvops.autotune.gates import check_launches
from kvops.autotune.inspect import TARGETS, CompileCase, CompiledLaunch

pytestmark = pytest.mark.compile


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return report(",".join(TESTED))


@pytest.mark.parametrize("target", TESTED)
def test_all_launches_compile_within_the_limits_of(target, rows):
    own = [row for row in rows if row["target"] == target]
    expected = {case.name for case in CASES if not case.targets or target in case.targets}
    assert expected
    assert {row["case"] for row in own} == expected
    problems = unexpected_problems(own)
    assert not problems, "\n".join(problems)


def test_every_launch_is_recorded_and_compiling_again_gives_what_the_record_says(rows):
    """``compiled.report`` compiled a launch of each kernel for each architecture."""
    version = rows[0]["triton"]
    if version not in record() or version in OTHER_VERSIONS:
        pytest.skip("the launches were recorded with another version of Triton: they were compiled")
    wrong = unrecorded(rows)
    assert not wrong, "kernels, configurations or cases changed: make prune records what did\n" + "\n".join(wrong)
    again = sample(version, ",".join(TESTED))
    launched = {launch["identity"]: launch["kernel"] for row in rows for launch in row["launches"]}
    assert set(again.values()) <= set(launched), "the record has more than the cases launch: make prune"
    assert {kernel for kernel, _ in again} == set(launched.values())


def launches_of(rows, prefix):
    found = [
        (row["case"], launch)
        for row in rows
        for launch in row["launches"]
        if row["case"].startswith(prefix) and launch["kernel"].startswith("gluon")
    ]
    if not found:
        pytest.skip("this Triton has no Gluon to compile them with")
    assert {name for name, _ in found} == {case.name for case in CASES if case.name.startswith(prefix)}
    return found


def test_the_warp_specialised_forward_overlaps_its_products_with_exponentials(rows):
    for name, launch in launches_of(rows, "gluon-forward"):
        assert launch["matrix_instructions"].keys() == {"HGMMA"}, name
        assert launch["tma_loads"] >= 4, name
        assert launch["tma_stores"] == 2, name
        # Two consumers: a loop without a mask for each, and one for each side that has a mask.
        loops = 3 if "window" in name else 2
        assert len(launch["overlaps"]) == 2 * loops, name
        # The exponentials run while P V is under way, not after the wait for it.
        assert min(launch["overlaps"]) >= 0.9 * max(launch["overlaps"]), name
        assert min(launch["overlaps"]) >= (32 if "d256" in name else 64), name


def test_the_warp_specialised_backward_overlaps_its_products_with_exponentials(rows):
    for name, launch in launches_of(rows, "gluon-backward"):
        of_keys = launch["kernel"] == "gluon_flash_backward_keys_kernel"
        assert launch["matrix_instructions"].keys() == {"HGMMA"}, name
        assert launch["matrix_instructions"]["HGMMA"] >= 32, name
        assert launch["tma_loads"] >= (8 if of_keys else 6), name
        assert launch["tma_stores"] >= (4 if of_keys else 2), name
        # Two consumers, and one loop for each: a wait for S, one for dP and one for the accumulators.
        assert launch["waits"] == 6, name
        assert len(launch["overlaps"]) == (4 if of_keys else 2), name
        # The exponentials run while dP is under way, not after the wait for it.
        exponentials = launch["overlaps"][:: 2 if of_keys else 1]
        assert len(exponentials) == 2, name
        assert min(exponentials) >= 32, name


def test_a_known_exception_covers_its_own_figure_and_nothing_else():
    known = KnownException("3.6.0", "sm_90", "flash-bf16-d256-window", "flash_forward_kernel", "a reason", spills=53)
    where = f"{known.kernel} (8 warps, 2 stages)"

    def unexpected(problem, triton=known.triton, target=known.target, case=known.case):
        row = {"triton": triton, "target": target, "case": case, "problems": [f"{where}: {problem}"]}
        return len(unexpected_problems([row], (known,)))

    assert not unexpected("20 spill stores, 33 spill loads, 80 bytes of stack")
    assert unexpected("20 spill stores, 34 spill loads, 80 bytes of stack")
    assert unexpected("20 spill stores, 33 spill loads, 80 bytes of stack", triton="3.7.1")
    assert unexpected("20 spill stores, 33 spill loads, 80 bytes of stack", target="sm_80")
    assert unexpected("20 spill stores, 33 spill loads, 80 bytes of stack", case="flash-bf16-d256-causal")
    assert unexpected("300000 bytes of shared memory, sm_90 has 232448")
    assert unexpected("no matrix instructions")
    assert unexpected("60 waits for 60 HGMMA: serialised")


def launch(**changes) -> CompiledLaunch:
    facts = {
        "kernel": "k",
        "target": "sm_90",
        "grid": (1,),
        "constants": {},
        "num_warps": 4,
        "num_stages": 2,
        "shared_memory": 1024,
        "registers": 100,
        "stack": 0,
        "spill_stores": 0,
        "spill_loads": 0,
        "matrix_instructions": {"HGMMA": 4},
        "waits": 1,
        "overlaps": [],
        "tma_loads": 0,
        "tma_stores": 0,
        "instructions": 100,
        "dots_16bit": 1,
        "descriptor_loads": 0,
        "compile_seconds": 1.0,
        "identity": "0",
    }
    return CompiledLaunch(**(facts | changes))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"spill_stores": 3, "spill_loads": 5}, "3 spill stores, 5 spill loads"),
        ({"stack": 16}, "16 bytes of stack"),
        ({"shared_memory": 232_449}, "232449 bytes of shared memory, sm_90 has 232448"),
        ({"matrix_instructions": {}}, "no matrix instructions"),
        ({"matrix_instructions": {}, "dots_16bit": 0}, "no matrix instructions"),
        ({"kernel": "another"}, "k: never launched"),
        ({"matrix_instructions": {"HGMMA": 4, "HMMA": 2}}, "4 HGMMA and 2 HMMA, expected HGMMA only"),
        ({"waits": 3}, "3 waits for 4 HGMMA: serialised"),
        ({"descriptor_loads": 2}, "no TMA load for 2 loads through descriptors"),
    ],
)
def test_a_launch_beyond_a_limit_is_refused(changes, problem):
    case = CompileCase("case", lambda: None, matrix=("k",), warpgroup=("k",))
    assert check_launches(case, "sm_90", [launch()]) == []
    (found,) = check_launches(case, "sm_90", [launch(**changes)])
    assert problem in found


# A kernel with known properties: a product of 16-bit matrices that needs more registers the larger `ROWS` is.
PROBE = """
import torch, triton, triton.language as tl
from kvops.autotune.inspect import CompileCase, compile_only

@triton.jit
def probe(x_ptr, y_ptr, stride, n, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    tile = tl.load(x_ptr + rows[:, None] * stride + rows[None, :])
    acc = tl.zeros([ROWS, ROWS], tl.float32)
    for _ in range(n):
        acc = tl.dot(tile, tile, acc)
        tile = acc.to(tile.dtype)
    tl.store(y_ptr + rows[:, None] * stride + rows[None, :], acc)

def call(rows, stride=256, **options):
    x = torch.empty(256, 256, dtype=torch.float16)
    probe[lambda meta: (meta["n"], meta["ROWS"])](x, x, stride, 3, ROWS=rows, num_warps=4, num_stages=2, **options)

CASES = [
    CompileCase("small", lambda: call(64), matrix=("probe",)),
    CompileCase("spills", lambda: call(128, maxnreg=128)),
]
"""


def test_compile_only_reads_registers_spills_and_instructions_off_the_binary(tmp_path):
    (tmp_path / "cases.py").write_text(PROBE)
    command = [sys.executable, "-m", "kvops.autotune", "inspect", "--cases", "cases.py", "--json", "out.json"]
    done = subprocess.run([*command, "--targets", "sm_90,gfx942"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stderr  # for the spills
    rows = {(row["case"], row["target"]): row for row in json.loads((tmp_path / "out.json").read_text())}
    small = rows["small", "sm_90"]
    assert small["problems"] == []
    (fact,) = small["launches"]
    assert fact["grid"] == [3, 64]
    assert fact["constants"] == {"ROWS": 64}
    assert (fact["num_warps"], fact["num_stages"], fact["dots_16bit"]) == (4, 2, 1)
    assert fact["matrix_instructions"]["HGMMA"] > 0
    assert 16 < fact["registers"] < 255
    assert fact["shared_memory"] >= 64 * 64 * 2
    assert fact["spill_stores"] == fact["stack"] == 0
    assert rows["small", "gfx942"]["launches"][0]["matrix_instructions"]["v_mfma"] > 0
    spilled = rows["spills", "sm_90"]
    assert spilled["launches"][0]["spill_stores"] > 10
    assert "spill stores" in spilled["problems"][0]
    assert "maxnreg" in rows["spills", "gfx942"]["problems"][0]  # an option that AMD's backend does not know
    assert "HGMMA" in done.stdout


def test_compile_only_leaves_triton_as_it_was(tmp_path):
    script = PROBE + (
        "from triton.runtime import driver\n"
        "from triton.runtime.jit import JITFunction\n"
        "before = JITFunction.run, JITFunction._do_compile, driver._active\n"
        "try:\n"
        "    with compile_only('sm_90') as launches:\n"
        "        call(16)\n"
        "        call(16)\n"
        "        call(16, stride=255)\n"
        "        raise KeyError\n"
        "except KeyError:\n"
        "    pass\n"
        "assert (JITFunction.run, JITFunction._do_compile, driver._active) == before\n"
        "names = [launch.identity for launch in launches]\n"
        "assert names[0] == names[1] != names[2], names\n"  # a stride of 255 is another specialisation
    )
    (tmp_path / "script.py").write_text(script)
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=True)


def test_a_known_launch_is_not_compiled_and_one_of_other_sources_is(tmp_path):
    (tmp_path / "same.py").write_text(PROBE)
    (tmp_path / "changed.py").write_text(
        PROBE.replace("acc = tl.dot(tile, tile, acc)", "acc += tl.dot(tile, tile) + 1")
    )
    script = (
        "import changed, same\n"
        "from kvops.autotune.inspect import FACTS, compile_only\n"
        "def registers(module, known=None, **options):\n"
        "    module.probe.device_caches.clear()\n"
        "    with compile_only('sm_90', known) as launches:\n"
        "        module.call(16, **options)\n"
        "    return launches[0].registers, launches[0]\n"
        "compiled, launch = registers(same)\n"
        "known = {launch.identity: {name: getattr(launch, name) for name in FACTS} | {'registers': 7}}\n"
        "assert registers(same, known)[0] == 7 != compiled\n"
        "assert registers(same, known)[1].grid == launch.grid\n"
        "assert registers(same)[0] == compiled\n"  # nothing of it stays behind
        "assert registers(same, known, stride=255)[0] != 7\n"
        "assert registers(changed, known)[0] != 7\n"
    )
    (tmp_path / "script.py").write_text(script)
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=True)


def test_kernels_imported_for_the_interpreter_are_refused():
    from kvops.autotune.inspect import compile_only
    from kvops.kernels.device import current_device

    if current_device().arch != "interpreter":
        pytest.skip("the kernels of this process are compiled ones")
    import triton.runtime.interpreter as interpreter

    function = interpreter.InterpretedFunction(lambda x_ptr: None)
    with compile_only("sm_90"), pytest.raises(RuntimeError, match="in a fresh process"):
        function[(1,)](torch.empty(1))


def test_an_unknown_target_is_refused():
    from kvops.autotune.inspect import compile_only

    with pytest.raises(ValueError, match=r"target: expected one of sm_80, .*got 'sm_75'"), compile_only("sm_75"):
        pass
    assert set(TARGETS) >= {"sm_80", "sm_90", "sm_100", "gfx942"}
