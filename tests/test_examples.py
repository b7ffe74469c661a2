"""Every file of examples/ runs as its docstring says, in a quick form."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "engine_builder.py": [],
    "own_policy.py": ["--new-tokens", "3"],
    "train_bytes.py": ["--steps", "1"],
    "many_processes.py": ["--tokens", "60", "--new-tokens", "3"],
    "tune_your_kernel.py": [],
}
REAL_MODEL = ("own_policy.py", "many_processes.py")
PROCESSES = {"many_processes.py": 3}


def test_every_example_is_run_here():
    assert {path.name for path in (ROOT / "examples").glob("*.*")} == {*SCRIPTS, "command_line.sh"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.model] if name in REAL_MODEL else []) for name in SCRIPTS]
)
def test_examples_run(name, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if name == "tune_your_kernel.py" and os.environ.get("KVOPS_TEST_DEVICE", "cpu") == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable]
    if name in PROCESSES:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES[name]}"]
    done = subprocess.run(
        [*command, str(ROOT / "examples" / name), *SCRIPTS[name]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


@pytest.mark.model
def test_the_command_line_runs(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
        "NEW_TOKENS": "3",
    }
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "command_line.sh")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tokens/s" in done.stderr
    assert "paged_attention" in done.stdout
