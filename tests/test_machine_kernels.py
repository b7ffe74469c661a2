"""Every kernel family runs its compiled code on the machine for PTX: right results and no fault, on sm_80 and sm_90.

A process of its own runs the cases of tests/machine_cases.py, for the kernels of this one were imported for Triton's
interpreter. What it found is kept below .cache/machine under the hash of everything that it depends on.
"""

import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import machine_cases
import pytest

ROOT = Path(__file__).parent.parent
TARGETS = ("sm_80", "sm_90")
# Kernels without matrix products or asynchronous copies are compiled to the same instructions for both.
ALIKE = ("paged_append", "paged_schedule", "select", "compact", "copy", "verify", "prompt", "merge")

pytestmark = pytest.mark.compile


def _sources() -> str:
    digest = hashlib.sha256(version("triton").encode())
    files = [path for folder in ("kernels", "autotune", "kvops/eager") for path in (ROOT / folder).rglob("*.py")]
    files += [ROOT / "tests" / f"{name}.py" for name in ("machine_cases", "machine_call", "paged_lists")]
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def rows(target: str, seed: int = 0) -> dict[str, dict]:
    """What the cases of ``target`` gave, by name."""
    folder = ROOT / ".cache/machine"
    kept = folder / f"{target}-{seed}-{_sources()}.json"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = folder / f"{os.getpid()}.tmp"
        command = [sys.executable, machine_cases.__file__, "--target", target, "--seed", str(seed), "--json", str(made)]
        if target != TARGETS[0]:
            command += ["--skip", ",".join(ALIKE)]
        done = _run(command)
        assert done.returncode == 0, done.stderr
        for old in folder.glob(f"{target}-{seed}-*.json"):
            old.unlink(missing_ok=True)
        made.rename(kept)
    return {row["case"]: row for row in json.loads(kept.read_text())}


def _run(command: list[str]) -> subprocess.CompletedProcess:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), variables.get("PYTHONPATH", "")])
    return subprocess.run(command, env=variables, capture_output=True, text=True)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, dict]]:
    return {}


def cases() -> list:
    return [
        pytest.param(target, name, id=f"{target}-{name}")
        for target in TARGETS
        for name in machine_cases.names_for(target, skip=ALIKE if target != TARGETS[0] else ())
    ]


@pytest.mark.parametrize(("target", "name"), cases())
def test_compiled_code_gives_the_right_results_without_a_fault(target, name, found):
    if target not in found:
        found[target] = rows(target)
    row = found[target][name]
    assert not row["faults"], "\n".join(row["faults"])
    assert not row["error"], row["error"]
    assert row["kernels"]


def test_every_kernel_runs(found):
    launched = {kernel for rows in found.values() for row in rows.values() for kernel in row["kernels"]}
    if set(found) != set(TARGETS):
        pytest.skip("not all cases ran")
    recorded = json.loads((ROOT / "tests/compiled.json").read_text())
    assert {kernel for _, kernel, *_ in recorded} == launched


@pytest.mark.parametrize("target", TARGETS)
def test_barriers_that_the_mutation_table_calls_necessary_are_noticed_when_they_are_left_out(target):
    """A few rows, for code that is still the same; ``tests/machine_mutations.py`` makes the table again."""
    done = _run([sys.executable, str(ROOT / "tests/machine_mutations.py"), "--target", target, "--replay", "3"])
    assert done.returncode == 0, done.stdout + done.stderr
    if done.stdout.startswith("0 rows"):
        pytest.skip("the kernels have changed since the table was made")
