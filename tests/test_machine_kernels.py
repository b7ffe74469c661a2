"""Every kernel family runs its compiled code on the machine for PTX: right results and no fault, on sm_80 and sm_90.

A process of its own runs the cases of tests/machine_cases.py, for the kernels of this one were imported for Triton's
interpreter. What it found is kept below .cache/machine under the hash of everything that it depends on.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import machine_cases
import machine_mutations
import machine_suite
import pytest
from machine_mutations import ALIKE

ROOT = Path(__file__).parent.parent
TARGETS = ("sm_80", "sm_90")

pytestmark = pytest.mark.compile


def _sources() -> str:
    digest = hashlib.sha256(version("triton").encode())
    files = [path for folder in ("kernels", "autotune", "kvops/eager") for path in (ROOT / folder).rglob("*.py")]
    files += [
        ROOT / "tests" / f"{name}.py"
        for name in ("machine_cases", "machine_drafts", "machine_latents", "machine_call", "paged_lists")
    ]
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


@pytest.fixture(scope="module")
def cases_of(found):
    """``cases_of(target)``: what each case gave."""

    def cases_of(target: str) -> dict[str, dict]:
        if target not in found:
            found[target] = rows(target)
        return found[target]

    return cases_of


def cases() -> list:
    return [
        pytest.param(target, name, id=f"{target}-{name}")
        for target in TARGETS
        for name in machine_cases.names_for(target, skip=ALIKE if target != TARGETS[0] else ())
    ]


@pytest.mark.parametrize(("target", "name"), cases())
def test_compiled_code_gives_the_right_results_without_a_fault(target, name, cases_of):
    row = cases_of(target)[name]
    assert not row["faults"], "\n".join(row["faults"])
    assert not row["error"], row["error"]
    assert row["kernels"]


def test_every_kernel_runs(found):
    launched = {kernel for rows in found.values() for row in rows.values() for kernel in row["kernels"]}
    if set(found) != set(TARGETS):
        pytest.skip("not all cases ran")
    recorded = json.loads((ROOT / "tests/compiled.json").read_text())
    assert {kernel for _, kernel, *_ in recorded} == launched


def _expect_pinned_triton():
    pinned = re.search(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if version("triton") != pinned[1]:
        pytest.skip("other versions of Triton compile to other code")


@pytest.mark.parametrize("target", TARGETS)
def test_barriers_that_the_mutation_table_calls_necessary_are_noticed_when_they_are_left_out(target):
    """A few rows, for code that is still the same; ``tests/machine_mutations.py`` makes the table again."""
    _expect_pinned_triton()
    done = _run([sys.executable, str(ROOT / "tests/machine_mutations.py"), "--target", target, "--replay", "3"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stdout.startswith("0 rows"), done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_the_mutation_table_is_of_the_kernels_as_they_are(target, cases_of):
    """A barrier that is gone, or any other change of the code: make the table again, with machine_mutations.py."""
    _expect_pinned_triton()
    assert machine_mutations.changed(target, cases_of(target)) == []


@pytest.mark.parametrize("target", TARGETS)
def test_the_mutation_table_has_every_kernel_with_something_to_leave_out(target, cases_of):
    known = {kernel for _, kernel in machine_mutations.kept_rows(target)}
    found = {name for row in cases_of(target).values() for name, sites in row["synchronisation"].items() if sites}
    assert found <= known


def test_a_barrier_that_is_gone_is_named_with_its_line():
    (case, kernel), rows = next(iter(machine_mutations.kept_rows("sm_80").items()))
    sites = [f"{row['line']} {row['instruction']}" for row in rows]
    told = {case: {"code": {kernel: rows[0]["code"]}, "synchronisation": {kernel: sites}}}
    others = [line for line in machine_mutations.changed("sm_80", told) if line.startswith(f"{kernel} ")]
    assert others == []
    told[case] = {"code": {kernel: "other"}, "synchronisation": {kernel: sites[:1] + sites[2:]}}
    lost, changed = [line for line in machine_mutations.changed("sm_80", told) if line.startswith(f"{kernel} ")]
    assert f"{sites[1]} is gone" in lost
    assert changed.endswith("its code has changed since the table was made")


def test_what_is_counted_is_written_with_the_kernels_that_ran(tmp_path):
    path = tmp_path / "counted.json"
    done = _run([sys.executable, "-m", "bench", "counted", "--only", "paged_append", "--json", str(path)])
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["op"], row["contender"], row["target"]) == ("paged_append", "kvops", "sm_80")
    assert row["kernels"] == ["paged_append_kernel"]
    assert row["sector_bytes"] >= row["moved_bytes"] >= row["needed_bytes"] > 0
    assert row["instructions"] > 0


def test_a_second_call_of_the_suite_leaves_out_what_has_passed_in_the_same_code_with_these_seeds(monkeypatch, tmp_path):
    class Item:
        path = Path(__file__)

        def __init__(self, name, backend="triton"):
            self.nodeid = f"tests/test_a.py::{name}"
            self.callspec = SimpleNamespace(params={"backend": backend})

        def get_closest_marker(self, name):
            return name if "model" in self.nodeid else None

    def selected(seeds):
        monkeypatch.setattr(machine_suite, "SEEDS", seeds)
        items = [Item("of_the_model"), Item("one"), Item("eager", "eager"), Item("two"), Item("three")]
        left_out = []
        hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
        machine_suite.select(items, SimpleNamespace(hook=hook))
        assert len(items) + len(left_out) == 5
        return [item.nodeid.split("::")[1] for item in items]

    monkeypatch.setattr(machine_suite, "RECORD", str(tmp_path / "record.jsonl"))
    monkeypatch.setattr(machine_suite, "MACHINE", "sm_80")
    assert selected((0, 1)) == ["one", "two", "three", "of_the_model"]
    code = machine_suite.code(Item.path)
    for name, row in {
        "one": {"outcome": "passed", "code": code},
        "two": {"outcome": "failed", "code": code},
        "three": {"outcome": "passed", "code": "of other kernels"},
    }.items():
        machine_suite._write({"test": f"tests/test_a.py::{name}", "seeds": [0, 1], **row})
    assert selected((0, 1)) == ["two", "three", "of_the_model"]
    assert selected((0, 1, 2)) == ["one", "two", "three", "of_the_model"]


def test_a_record_of_the_suite_is_added_up_by_target_with_the_last_word_on_each_test():
    def row(test, outcome, reason=""):
        return {
            "target": "sm_80", "seeds": [0, 1], "code": "c", "test": f"tests/test_a.py::{test}", "outcome": outcome,
            "reason": reason, "launches": 2, "runs": 3, "instructions": 10, "kernels": ["k"], "faults": [],
            "seconds": 1.0, "machine_seconds": 0.5,
        }  # fmt: skip

    rows = [
        {"target": "sm_80", "collected": {"tests/test_a.py": 4, "tests/test_b.py": 1}},
        row("one", "failed", "broken"),
        {"target": "sm_80", "collected": {"tests/test_a.py": 3}},  # what is left, or a part
        row("one", "passed"),
        row("two", "skipped", "needs a GPU"),
        {"target": "sm_90", "collected": {"tests/test_a.py": 4}},
    ]
    found = machine_suite.summary(rows)
    told = found["sm_80"]
    assert [told[name] for name in ("tests", "passed", "skipped", "failed")] == [5, 1, 1, 0]
    assert [told[name] for name in ("launches", "runs", "instructions")] == [4, 6, 20]
    assert told["files"]["tests/test_a.py"] == {"tests": 4, "passed": 1, "skipped": 1}
    assert told["not passed"] == {"tests/test_a.py::two": "needs a GPU"}
    assert found["sm_90"]["passed"] == 0


@pytest.mark.parametrize("target", TARGETS)
def test_the_manual_has_the_numbers_of_the_recorded_runs(target):
    suite = json.loads((ROOT / "bench/results/machine/suite.json").read_text())
    page = (ROOT / "docs/machine.md").read_text()
    for row in (machine_suite.table_row(target, suite[target]), machine_mutations.table_row(target)):
        assert row in page.splitlines(), f"docs/machine.md: this row is missing\n{row}"


@pytest.mark.parametrize("target", TARGETS)
def test_every_test_of_a_kernel_has_passed_with_three_seeds_as_the_readme_says(target):
    told = json.loads((ROOT / "bench/results/machine/suite.json").read_text())[target]
    assert told["passed"] + told["skipped"] == told["tests"]
    assert told["seeds"] == [[0, 1, 2]]


BYTES_OF_TWO_LENGTHS = """
from bench import counted
from bench.cases.latents import decoding
counted._SMS = 1  # as many shares and partial results for both
for context in (512, 1024):
    row = counted.count(decoding(1, context, 16, 128, 64), "sm_80")
    print(row["needed_bytes"], row["moved_bytes"])
"""


def test_a_slot_of_latents_is_read_once_for_keys_and_values():
    """By what a longer list moves more: columns, and entries of the table."""
    done = _run([sys.executable, "-c", BYTES_OF_TWO_LENGTHS])
    assert done.returncode == 0, done.stderr
    (needed, moved), (more_needed, more_moved) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert more_moved - moved <= 1.02 * (more_needed - needed)
