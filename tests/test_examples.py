"""Every file of examples/ runs as its docstring says, in a quick form."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "engine_builder.py": [],
    "own_policy.py": ["--context", "256", "--held-out", "32", "--ratios", "2", "--new-tokens", "3"],
    "train_bytes.py": ["--steps", "1"],
    "train_packed.py": ["--steps", "1", "--tokens", "4096", "--window", "100"],
    "many_processes.py": ["--tokens", "60", "--new-tokens", "3"],
    "tune_your_kernel.py": [],
}
REAL_MODEL = ("own_policy.py", "many_processes.py")
PROCESSES = {"many_processes.py": 3}


def test_every_example_is_run_here():
    """The text and the questions are what two of them read; test_vllm_compressed.py runs that of vLLM."""
    files = {path.name for path in (ROOT / "examples").glob("*.*")}
    assert files == {*SCRIPTS, "command_line.sh", "harbour.txt", "questions.jsonl", "vllm_server.py"}


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
        "CONTEXT": "256",
        "DEMO": "0",  # tests of its own run it
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
    for part in ("Self-check", "blocks in use", "own_policy:Carried", "paged_attention"):  # of each command
        assert part in done.stdout
