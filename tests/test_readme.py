"""What README.md shows can be run: its Python as it stands, its commands in a quick form.

A line ``<!-- needs: NAME, NAME -->`` above a block says what it takes: ``cuda``, or a package that kvops does not
install. The block is skipped where that is missing.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:^<!-- needs: (?P<needs>.+) -->\n)?^```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
BLOCKS = [(match["kind"], match["needs"] or "", match["code"]) for match in BLOCK.finditer(README)]
# How a command becomes quick; None: tests of its own run it.
QUICK = {"generate": ["--max-new-tokens", "3"], "doctor": [], "demo": None}


def blocks(*kinds):
    found = [(needs, code) for kind, needs, code in BLOCKS if kind in kinds]
    return [pytest.param(needs, code, id=f"{kinds[0]}-{number}") for number, (needs, code) in enumerate(found)]


def run(tmp_path, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:] or done.stdout[-3000:]


def skip_without(needs):
    for name in filter(None, (name.strip() for name in needs.split(","))):
        there = torch.cuda.is_available() if name == "cuda" else importlib.util.find_spec(name)
        if not there:
            pytest.skip(f"needs {name}")


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
    text = "<!-- needs: cuda, x -->\n```python\na\n```\n\n```sh\nb\n```\n"
    found = [(match["needs"], match["kind"], match["code"]) for match in BLOCK.finditer(text)]
    assert found == [("cuda, x", "python", "a\n"), (None, "sh", "b\n")]
    assert {"python", "sh"} <= {kind for kind, _, _ in BLOCKS}
    assert README.count("```") == 2 * len(BLOCKS)
