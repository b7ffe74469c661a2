"""What README.md shows can be run: its Python as it stands, its commands in a quick form."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from snippets import ROOT, blocks_of, skip_without

from bench import results
from bench.quality.kept import Form, kept
from bench.quality.tasks import AFTER

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = blocks_of(README)
# How a command becomes quick; None: tests of its own run it.
QUICK = {"generate": ["--max-new-tokens", "3"], "doctor": [], "demo": None, "chat": None, "evaluate": None}


def blocks(*kinds):
    found = [block for block in BLOCKS if block.kind in kinds]
    return [
        pytest.param(
            block.needs,
            block.code,
            id=f"{kinds[0]}-{number}",
            marks=[pytest.mark.model] if "model" in block.needs else [],
        )
        for number, block in enumerate(found)
    ]


def run(tmp_path, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:] or done.stdout[-3000:]


@pytest.mark.parametrize(("needs", "code"), blocks("python"))
def test_python_runs_as_written(needs, code, tmp_path):
    skip_without(needs)
    run(tmp_path, "-c", code)


@pytest.mark.model
@pytest.mark.parametrize(("needs", "code"), blocks("sh", "console"))
def test_commands_run(needs, code, tmp_path):
    skip_without(needs)
    for line in code.splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[:3] == ["python", "-m", "kvops"]:
            quick = QUICK[words[3]]
            if quick is not None:
                run(tmp_path, *words[1:], *quick)
        elif words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


def test_blocks_are_found_with_what_they_need():
    text = "<!-- needs: cuda, x -->\n```python\na\n```\n\n```sh\nb\n```\n<!-- needs: y -->\n```sh\nc\n```\n"
    found = [(block.kind, block.needs, block.code) for block in blocks_of(text)]
    assert found == [("python", ("cuda", "x"), "a\n"), ("sh", (), "b\n"), ("sh", ("y",), "c\n")]
    assert {"python", "sh"} <= {block.kind for block in BLOCKS}
    assert README.count("```") == 2 * len(BLOCKS)


def test_the_first_table_is_the_committed_demo():
    record = json.loads((ROOT / "bench/results/cpu/demo.json").read_text(encoding="utf-8"))
    assert f"`{record['policy']}`" in README.partition("## Install")[0]
    for row in record["rows"]:
        if not row["drafts"]:
            cache = "full" if row["compression"] == 1 else f"{row['compression']:g}x smaller"
            line = f"| {cache} | {row['mebibytes']:.1f} MiB | {row['perplexity']:.1f} | {row['answer_kept']:.0%} |"
            assert line in README, f"next step: write {line!r} into README.md's first table"


def test_the_study_is_quoted_as_it_is():
    found = kept(results.load(ROOT / "bench/results/cpu/quality.json"))
    text = " ".join(README.split())
    for policy, sentence in (
        ("standout", "keeps {}% of the full cache's quality at 4x, {}% at 8x and {}% at 16x"),
        ("snapkv", "SnapKV {}%, {}% and {}%"),
        ("by-heart", "keeps {}%, {}% and {}%"),
    ):
        shares = (f"{100 * found.overall(Form(policy, True), ratio):.0f}" for ratio in (4, 8, 16))
        assert sentence.format(*shares) in text
    questions = [counts for task, counts in found.answered.items() if task.setting == AFTER and task.name != "digits"]
    right, asked = (sum(counts) for counts in zip(*questions, strict=True))
    assert f"{right} of {asked} questions" in text
