"""Reports of ``python -m kvops.autotune inspect`` on tests/compile_cases.py, made again only when a source changes.

A report is kept below .cache/compiled under the hash of everything that it depends on: the kernels, what chooses their
configurations, the cases, and the versions of Triton and Python.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

from kvops.autotune.environments import environment

ROOT = Path(__file__).parent.parent
CASES_FILE = ROOT / "tests/compile_cases.py"


def _sources() -> str:
    files = sorted(path for folder in ("kernels", "autotune") for path in (ROOT / folder).rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for path in (*files, CASES_FILE):
        if "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def report(targets: str, only: str = "", triton: str | None = None) -> list[dict]:
    """The rows of the cases whose names contain ``only``, with the installed Triton or the version ``triton``."""
    variables = dict(os.environ) if triton is None else environment(triton, ROOT / ".cache/triton")
    kind = f"{triton or installed_version('triton')}-py{platform.python_version()}-{only or 'all'}-{targets}"
    folder = ROOT / ".cache/compiled"
    kept = folder / f"{kind}-{_sources()}.json"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = folder / f"{os.getpid()}.tmp"
        workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        command = [sys.executable, "-m", "kvops.autotune", "inspect", f"--only={only}", "--targets", targets]
        command += ["--cases", str(CASES_FILE), "--json", str(made)]
        command += ["--jobs", str(max(1, (os.cpu_count() or 1) // workers))]
        done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
        assert made.exists(), done.stderr
        assert done.returncode == any(row["problems"] for row in json.loads(made.read_text())), done.stderr
        for old in folder.glob(f"{kind}-*.json"):
            old.unlink(missing_ok=True)
        made.rename(kept)
    return json.loads(kept.read_text())
