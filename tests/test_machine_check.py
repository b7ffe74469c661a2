"""``python -m kvops.autotune check``: what is wrong with a candidate of a user's own kernel is found without a GPU."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvops.autotune.checking import candidates
from kvops.autotune.lookup import specs

pytestmark = pytest.mark.compile

# Blocks of 256 have no mask; blocks of 128 forget the last element of each block.
KERNEL = """
import torch, triton, triton.language as tl
from dataclasses import dataclass
from kvops import autotune

@triton.jit
def twice_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    if BLOCK == 256:
        inside = index < size + BLOCK
    x = tl.load(x_ptr + index, mask=inside)
    if BLOCK == 128:
        inside = inside & (tl.arange(0, BLOCK) < BLOCK - 1)
    tl.store(out_ptr + index, 2 * x, mask=inside)

def twice(x):
    out = torch.zeros_like(x)
    config = autotune.choose("twice", autotune.current_device(), x.element_size(), x.numel())
    twice_kernel[(triton.cdiv(x.numel(), config.block),)](x, out, x.numel(), BLOCK=config.block)
    return out

def workload(problem, device, small):
    x = torch.randn(problem["size"], device=device)
    return autotune.Workload(run=lambda: (twice(x),), exact=lambda: (2 * x.double(),))

@dataclass(frozen=True)
class Config:
    block: int

autotune.register(autotune.OpSpec(
    name="twice", config=Config, key=("itemsize",), sizes=("size",),
    heuristic=lambda problem, device: Config(64),
    space=lambda problem, device: [Config(128), Config(256)],
    kernels=(twice_kernel,), workload=workload, problems=({"itemsize": 4, "size": 300},),
))
"""


def check(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    (folder / "users_kernel.py").write_text(KERNEL)
    command = [sys.executable, "-m", "kvops.autotune", "check", *arguments, "--import", "users_kernel"]
    path = f"{folder}:{Path(__file__).parent.parent}"
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=_environment(path))


def _environment(path: str) -> dict[str, str]:
    return {**{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}, "PYTHONPATH": path}


def test_wrong_candidates_of_a_users_kernel_never_reach_a_gpu(tmp_path):
    done = check(tmp_path, "twice")
    assert done.returncode == 1, done.stderr
    table = [line.split() for line in done.stdout.splitlines() if line.startswith("twice ") and ": " not in line]
    states = {next(word for word in row if word.startswith("block=")): row[4] for row in table}
    assert states == {"block=64": "right", "block=128": "wrong", "block=256": "faults"}, done.stdout
    assert "out of bounds: a load of" in done.stdout
    assert "users_kernel.py:" in done.stdout
    assert "3 candidates on sm_80: 1 right, 2 not" in done.stdout


def test_one_configuration_is_checked_alone(tmp_path):
    done = check(tmp_path, "twice", "--configs", "default", "--target", "sm_90")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 candidates on sm_90: 1 right, 0 not" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("twice", "--target", "gfx942"), "--target: expected one of sm_80, sm_86, sm_89, sm_90, got 'gfx942'"),
        (("thrice",), "op: expected one of"),
        (("twice", "--configs", "some"), "--configs: expected all, default or a configuration as JSON, got 'some'"),
    ],
)
def test_what_cannot_be_checked_is_refused(tmp_path, arguments, message):
    done = check(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_configuration_can_be_given_as_json():
    spec = specs()["compact"]
    (config,) = candidates(spec, spec.problems[0], "sm_80", "default")
    assert candidates(spec, spec.problems[0], "sm_80", json.dumps(dataclasses.asdict(config))) == [config]
