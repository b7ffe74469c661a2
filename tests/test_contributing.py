"""CONTRIBUTING's example of an operator passes the checks of a change, in a copy of the tree."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from snippets import ROOT

PATCH = ROOT / "docs" / "scale_rows.patch"
FOLDERS = ("autotune", "bench", "docs", "kernels", "kvops", "tests")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The tree with the patch applied. Links stay links, results and pictures stay behind."""
    if shutil.which("git") is None:
        pytest.skip("needs git, which applies the patch")
    tree = tmp_path_factory.mktemp("contributed")
    ignore = shutil.ignore_patterns("__pycache__", "results", "*.png")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "BENCHMARKS.md", "Makefile"):
        shutil.copy(ROOT / name, tree)
    # Inside a repository git apply would skip files that the repository does not have, without an error.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.parent)}
    done = subprocess.run(
        ["git", "apply", "-C1", str(PATCH)], cwd=tree, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"{done.stderr}next step: apply what docs/scale_rows.patch adds to today's files"
    assert (tree / "kernels" / "scale_rows.py").exists()
    return tree


def run(tree, *arguments):
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done.stdout


def test_the_example_passes_the_linters(copy):
    pytest.importorskip("ruff")
    added = re.findall(r"^\+\+\+ b/(\S+\.py)$", PATCH.read_text(encoding="utf-8"), re.M)
    run(copy, "-m", "ruff", "check", "--no-cache", *added)
    run(copy, "-m", "ruff", "format", "--no-cache", "--check", *added)


def test_the_example_passes_its_tests_and_those_of_every_operator(copy):
    run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_rows.py")
    families = [f"tests/test_{name}.py" for name in ("contracts", "no_sync", "docs")]
    chosen = "scale_rows or every_operator or registered or public"
    out = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *families, "-k", chosen)
    assert int(re.search(r"(\d+) passed", out)[1]) >= 8


def test_the_example_is_benchmarked(copy):
    run(copy, "-m", "bench", "run", "--device", "cpu", "--ops", "scale_rows", "--seconds", "0.05", "--scale", "tiny")


def test_contributing_names_every_file_of_the_example():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in re.findall(r"^\+\+\+ b/(\S+)$", PATCH.read_text(encoding="utf-8"), re.M):
        assert path in text or path == "docs/operators/index.md", path
