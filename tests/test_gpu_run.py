"""The GPU run without a GPU: nothing hides anything, what is good is kept, and no phase falls over a typing error."""

import argparse
import importlib
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from pretend_gpu import pretend_gpu

from bench import results, throughput
from bench.gpu import __main__ as gpu_run
from bench.gpu import cases, graphs, operators, phases, record, tune
from bench.gpu import units as units_module
from bench.gpu.phases import PHASES, Setup, Step
from bench.gpu.summary import phase_summary
from bench.gpu.units import FAILED, PASSED, SKIPPED, Outcome, Unit, read_rows, report, run_unit, run_units
from kvops.autotune.arguments import add as add_autotune_commands
from kvops.autotune.devices import by_name
from kvops.autotune.inspect import TARGETS

GPU = torch.device("cuda:0")
CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    with pretend_gpu(monkeypatch):
        yield


def script(folder: Path, name: str, body: str, seconds: float = 60, **options) -> Unit:
    """A unit that runs a few lines of Python with ``say(name, outcome)`` at hand."""
    rows = folder / f"{name}.jsonl"
    say = f"""
        import json, os, signal, subprocess, sys, time
        def say(name, outcome="passed", note=""):
            with open({str(rows)!r}, "a") as file:
                file.write(json.dumps(dict(name=name, outcome=outcome, note=note)) + "\\n")
    """
    source = textwrap.dedent(say) + textwrap.dedent(body)
    return Unit(name, (sys.executable, "-S", "-c", source), rows, folder / f"{name}.log", seconds, **options)


# Units


def test_a_unit_that_fails_dies_or_hangs_hides_nothing_of_the_others(tmp_path):
    child = tmp_path / "child"
    units = [
        script(tmp_path, "good", "say('a'); say('b', 'skipped', 'no such thing')"),
        script(tmp_path, "wrong", "say('a'); say('b', 'failed', 'off by one'); print('a traceback'); sys.exit(3)"),
        script(tmp_path, "dead", "say('a'); os.kill(os.getpid(), signal.SIGSEGV)"),
        script(
            tmp_path,
            "hangs",
            f"""
            say("before")
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
            open({str(child)!r}, "w").write(str(child.pid))
            time.sleep(600)
            """,
            seconds=4,
        ),
        script(tmp_path, "also good", "say('a')"),
    ]
    heard = []
    outcomes = {outcome.unit: outcome for outcome in run_units(units, 2, time.monotonic() + 60, heard.append)}
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "good": "finished",
        "wrong": "failed (exit 3)",
        "dead": "died (SIGSEGV)",
        "hangs": "timed out",
        "also good": "finished",
    }
    assert [len(outcomes[name].rows) for name in ("good", "wrong", "dead", "hangs")] == [2, 2, 1, 1]
    assert [outcome.good for outcome in outcomes.values()] == [True, False, False, False, True]
    assert len(heard) == 5
    assert "a traceback" in (tmp_path / "wrong.log").read_text()
    for _ in range(100):
        if not _lives(int(child.read_text())):
            break
        time.sleep(0.05)
    assert not _lives(int(child.read_text())), "what a unit starts ends with it"


def _lives(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_behind_the_deadline_no_unit_starts(tmp_path):
    units = [script(tmp_path, name, "say('a')") for name in "ab"]
    assert [outcome.status for outcome in run_units(units, 1, time.monotonic() - 1)] == ["not reached"] * 2
    assert not (tmp_path / "a.jsonl").exists()


def test_a_step_says_how_far_it_has_come(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(units_module, "PROGRESS_SECONDS", 0.05)
    go = tmp_path / "go"
    unit = script(tmp_path, "slow", f"say('a'); say('b')\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)")
    told = gpu_run._told("check", Step([unit], 1, "kernels", 12))

    def progress(rows):
        told(rows)
        if rows == 2:
            go.touch()

    run_units([unit], 1, time.monotonic() + 60, progress=progress)
    assert "check       2 of about 12 kernels in" in capsys.readouterr().out


def test_a_unit_that_resumes_goes_on_behind_what_killed_it_and_stops_when_nothing_comes(tmp_path):
    body = f"""
        done = sum(1 for line in open({str(tmp_path / "r.jsonl")!r}))
        if done < 3:
            say(f"row {{done}}", "failed" if done == 1 else "passed")
            os._exit(9)
        sys.exit(CODE)
    """
    good = run_unit(script(tmp_path, "r", body.replace("CODE", "0"), resumes=True))
    assert good.status == "finished"
    assert [row["name"] for row in good.rows] == ["row 0", "row 1", "row 2"]
    assert not good.good, "a failed row"
    again = run_unit(script(tmp_path, "r", body.replace("CODE", "7"), resumes=True))
    assert again.status == "failed (exit 7)", "two rows were kept, one more came, then none"
    assert [row["name"] for row in again.rows] == ["row 0", "row 2", "row 2"]


def test_a_half_written_row_is_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    report(path, "a", PASSED, seconds=1.5)
    with path.open("a") as file:
        file.write('{"name": "b", "outc')
    assert read_rows(path) == [{"name": "a", "outcome": PASSED, "note": "", "seconds": 1.5}]


# Tests as a unit


def test_tests_that_fail_hang_or_kill_the_process_each_become_a_row(tmp_path):
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent("""
        import os, time
        import pytest

        @pytest.fixture
        def device():
            return "cpu"

        def test_passes(device): pass
        def test_fails(device): assert 1 + 1 == 3
        def test_dies(device): os._exit(1)
        def test_skips(device): pytest.skip("not today")
        def test_hangs(device): time.sleep(600)
        def test_of_the_host(): raise AssertionError("needs no device: is not run")
        @pytest.mark.gpu
        def test_last(): pass
        """)
    )
    (tmp_path / "test_else.py").write_text("import no_such.package\ndef test_nothing(device): pass")
    (tmp_path / "test_odd.py").write_text("import bench.no_such_part\ndef test_nothing(device): pass")
    rows = tmp_path / "rows.jsonl"
    command = (sys.executable, "-m", "pytest", "-p", "bench.gpu.record", "-p", "no:cacheprovider", "-q")
    environment = {"KVOPS_RECORD": str(rows), "KVOPS_SHARE": "0/1", "KVOPS_TEST_SECONDS": "2"}
    options = ("--capture=sys", "--continue-on-collection-errors", "-c", os.devnull, str(tmp_path))
    unit = Unit("tests", (*command, *options), rows, tmp_path / "log", 120, environment, resumes=True)
    outcome = run_unit(unit)
    assert outcome.status == "finished", (tmp_path / "log").read_text()
    found = {row["name"].split("::")[-1]: row["outcome"] for row in outcome.rows}
    assert found == {
        "test_else.py": SKIPPED,
        "test_odd.py": FAILED,
        "test_passes": PASSED,
        "test_fails": FAILED,
        "test_dies": FAILED,
        "test_skips": SKIPPED,
        "test_hangs": FAILED,
        "test_last": PASSED,
    }
    log = (tmp_path / "log").read_text()
    assert "assert (1 + 1) == 3" in log
    assert "time.sleep(600)" in log or "in test_hangs" in log


def test_tests_that_need_a_gpu_are_among_those_that_it_runs():
    import test_cache_graph as graph
    import test_gluon_flash_backward as backward
    import test_gluon_flash_forward as forward
    import test_torch_features as features

    class Item:
        fixturenames = ()

        def __init__(self, function):
            self.marks = {mark.name for mark in getattr(function, "pytestmark", ())}

        def get_closest_marker(self, name):
            return name if name in self.marks else None

    assert record.needs_device(Item(forward.test_on_a_gpu_it_computes_attention))
    assert record.needs_device(Item(backward.test_on_a_gpu_it_computes_the_gradients))
    assert record.needs_device(Item(graph.test_a_step_in_one_cuda_graph_is_replayed_with_changing_lengths))
    assert record.needs_device(Item(features.test_a_cuda_graph_replays_a_module_and_a_decoding_step))
    assert not record.needs_device(Item(forward.test_a_single_stage_is_refused))


def test_tests_are_collected_where_nothing_but_torch_triton_numpy_and_pytest_is_installed(tmp_path):
    absent = [
        *("hypothesis", "scipy", "transformers", "gguf", "regex", "tokenizers", "safetensors", "jinja2", "tqdm"),
        *("psutil", "matplotlib", "xdist", "accelerate", "kernels"),
    ]
    source = (
        f"import sys\nfor name in {absent}: sys.modules[name] = None\n"
        "import pytest\nwords = '-p bench.gpu.record --collect-only --continue-on-collection-errors -q tests'\n"
        "code = pytest.main(words.split())\n"
        "import bench.throughput, bench.gpu.__main__, bench.gpu.cases, bench.gpu.graphs, bench.gpu.greedy\n"
        "import bench.gpu.operators, bench.gpu.tune\n"
        "sys.exit(code)"
    )
    rows = tmp_path / "rows.jsonl"
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "KVOPS_TEST_DEVICE": "cpu"}
    environment["KVOPS_RECORD"] = str(rows)
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", source], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = read_rows(rows)
    assert all(row["outcome"] == SKIPPED and row["note"].split(":")[0] in absent for row in found), found
    files = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    families = "attention eviction merge nn paged policies prompt_lookup verify"
    assert files >= {f"tests/test_{family}.py" for family in families.split()}


# Phases


def fake_phases(tmp_path, **bodies):
    """Phases of one script each, in the place of the real ones."""

    def phase(name, body):
        def steps(setup):
            rows, log = setup.rows(name, "unit"), setup.log(name, "unit")
            rows.parent.mkdir(parents=True, exist_ok=True)
            unit = script(tmp_path, name, body)
            source = unit.command[-1].replace(str(unit.rows), str(rows))
            yield Step([Unit("unit", (*unit.command[:-1], source), rows, log, 60)])

        return steps

    return {name: phase(name, body) for name, body in bodies.items()}


def test_a_failing_phase_hides_no_other_and_only_it_runs_again(tmp_path, monkeypatch, capsys):
    starts = tmp_path / "starts"
    note = f"open({str(starts)!r}, 'a').write"
    found = fake_phases(
        tmp_path,
        check=f"{note}('check '); say('kernel x', 'failed', 'off by 0.5'); say('kernel y')",
        graphs=f"{note}('graphs '); say('step'); say('odd', 'skipped', 'not here')",
    )
    monkeypatch.setattr(gpu_run, "PHASES", found)
    out = tmp_path / "out"
    words = ["--rehearse", "--phases", "check,graphs", "--out", str(out), "--commit", "abc123"]
    assert gpu_run.main(words) == 1
    text = capsys.readouterr().out
    assert "check: 1 passed, 1 failed, 0 skipped; 0 of 1 processes good" in text
    assert "failed: kernel x: off by 0.5" in text
    assert "graphs: 1 passed, 0 failed, 1 skipped; 1 of 1 processes good" in text
    assert "skipped 1: not here" in text
    check = results.load(out / "check.json")
    assert check["kind"] == "gpu-check"
    assert {"device", "torch", "triton", "date", "commit"} <= check["setting"].keys()
    assert check["setting"]["commit"] == "abc123"
    total, failure = check["rows"]
    assert (total["unit"], total["status"], total["passed"], total["failed"]) == ("unit", "finished", 1, 1)
    assert (failure["name"], failure["outcome"], failure["note"]) == ("kernel x", FAILED, "off by 0.5")

    assert gpu_run.main(words) == 1
    assert starts.read_text().split() == ["check", "graphs", "check"]
    assert gpu_run.main([*words, "--fresh"]) == 1
    assert starts.read_text().split()[3:] == ["check", "graphs"]
    assert gpu_run.main([*words[:-1], "another"]) == 1, "other sources: everything again"
    assert starts.read_text().split()[5:] == ["check", "graphs"]


def test_without_a_gpu_it_says_what_to_do(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_run.main([])
    assert "--rehearse" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_run.main(["--rehearse", "--phases", "check,dance"])
    assert "got dance" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["B300", "GB10", "MI300X"])
def test_the_tuning_phase_compiles_for_the_architecture_of_the_gpu(name, tmp_path, monkeypatch):
    """AMD's gfx942 was taken for sm_94, and sm_103 was no target."""
    monkeypatch.setattr(phases, "this_gpu", lambda: by_name(name))
    compiling = next(iter(PHASES["tune"](Setup("cuda", tmp_path, 480, 8)))).units[0].command
    assert compiling[compiling.index("--targets") + 1] == by_name(name).arch
    assert by_name(name).arch in TARGETS


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("phase", PHASES)
def test_every_unit_of_every_phase_is_started_with_words_that_it_takes(phase, device, tmp_path, monkeypatch):
    monkeypatch.setattr(phases, "find_sanitizer", lambda: "/opt/compute-sanitizer")
    monkeypatch.setattr(phases, "this_gpu", lambda: by_name("sm_90"))
    units = [unit for step in PHASES[phase](Setup(device, tmp_path, 480, 8)) for unit in step.units]
    assert len({unit.name for unit in units}) == len(units)
    assert all(0 < unit.seconds <= 480 for unit in units)
    for unit in units:
        words, parser = list(unit.command), argparse.ArgumentParser()
        if words[0] == "/opt/compute-sanitizer":
            words = words[words.index(sys.executable) :]
        assert words[:2] == [sys.executable, "-m"]
        if words[2] == "pytest":
            assert unit.resumes
            continue
        module = importlib.import_module(words[2])
        if words[2] == "kvops.autotune":
            add_autotune_commands(parser.add_subparsers())
            parser.parse_args(words[3:])
            continue
        arguments = module.arguments_of(words[3:])
        assert arguments.rows == unit.rows
        assert arguments.device == device
    if (phase, device) == ("check", "cuda"):
        assert sum(unit.name.startswith("tests-") for unit in units) == 8
        assert [unit.name for unit in units[:8]] == [f"compile-{share}" for share in range(8)]
        assert {"gluon", "greedy", "memcheck", "racecheck-gluon", "shapes-0", "shapes-1"} <= {u.name for u in units}


# What the rehearsal runs of each phase, thinned out: whole it is `make gpu ARGS=--rehearse`.
THIN = {
    "check": (cases, "--scale tiny --dtypes float32 --ops merge_attention paged_append"),
    "tune": (tune, "--store {out}/store"),
    "bench": (operators, "merge_attention --scale tiny --json {out}/operators.json"),
    "throughput": (throughput, "--shape tiny --compression 1 --json {out}/throughput.json"),
    "graphs": (graphs, "operators --dtypes float32 --ops merge_attention paged_append"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_runs_with_the_interpreter_and_compiles_for_hopper(phase, tmp_path, monkeypatch, capfd):
    module, words = THIN[phase]
    monkeypatch.setenv("TRITON_INTERPRET", "0" if phase == "tune" else "1")
    rows = tmp_path / "rows"
    arguments = [*words.format(out=tmp_path).split(), "--device", "cpu", "--rows", str(rows)]
    monkeypatch.setattr(sys, "argv", [phase, *arguments])
    assert not module.main()
    found = read_rows(rows)
    assert found, capfd.readouterr()
    assert all(row["outcome"] == PASSED for row in found), found
    if phase == "tune":
        assert "configurations compiled" in capfd.readouterr().out
        (table,) = (tmp_path / "store").glob("*.json")
        assert "sm_90" in table.read_text()


def test_the_summary_names_what_did_not_end_well(tmp_path):
    outcomes = [
        Outcome(
            "a", "timed out", 3.0, [{"name": f"case {i}", "outcome": FAILED, "note": "no"} for i in range(20)], "l"
        ),
        Outcome("b", "finished", 1.0, [{"name": "x", "outcome": PASSED, "note": ""}], "l"),
    ]
    text = phase_summary("check", outcomes, tmp_path)
    assert "1 passed, 20 failed" in text
    assert "a: timed out; l" in text
    assert "and 5 more" in text
    assert "no operator was measured" in phase_summary("bench", outcomes, tmp_path)


def test_the_summary_of_the_benchmarks_has_the_worst_peer_of_each_case(tmp_path):
    common = {"op": "paged_attention", "of_roofline": None, "ratio": None}
    rows = [
        common | {"case": "p/1", "contender": "kvops", "of_roofline": 0.9},
        common | {"case": "p/1", "contender": "A", "ratio": 3.0},
        common | {"case": "p/1", "contender": "B", "ratio": 1.25},
        common | {"case": "p/2", "contender": "kvops", "of_roofline": 0.8},
        common | {"case": "p/2", "contender": "A", "ratio": 2.25},
    ]
    results.save(tmp_path / "operators.json", "operators", {}, rows)
    line = next(line for line in phase_summary("bench", [], tmp_path).splitlines() if line.startswith("paged"))
    assert line.split() == ["paged_attention", "2", "85%", "80%", "1.75", "1.25"]


# What runs in the units
