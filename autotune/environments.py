"""Other versions of Triton, each in its own folder, for use with the installed torch and kvops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Relative to the working directory, which is the repository for its command line and its tests.
FOLDER = Path(".cache/triton")


class UnreachableIndexError(RuntimeError):
    """The package index did not answer."""


def newest_triton() -> str:
    """The newest version in the package index for this Python. Raises UnreachableIndexError without an answer."""
    return json.loads(_pip("--dry-run", "--ignore-installed", "--report", "-", "triton"))["install"][0]["metadata"][
        "version"
    ]


def triton_folder(version: str, folder: Path = FOLDER) -> Path:
    """A folder with this version of Triton, for the front of ``PYTHONPATH``. The first call installs it.

    Raises UnreachableIndexError if the package index does not answer, ValueError for an unknown version.
    """
    place = (folder / version).absolute()
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, ignore_cleanup_errors=True) as temporary:
            made = Path(temporary) / version
            _pip("--no-compile", "--target", str(made), f"triton=={version}")
            try:
                made.rename(place)
            except OSError:
                if not place.exists():  # another process may have made it
                    raise
    return place


def environment(version: str, folder: Path = FOLDER) -> dict[str, str]:
    """The environment of this process, changed so that a Python process imports this version of Triton."""
    paths = [str(triton_folder(version, folder)), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    # Without its index, pip may still answer from local folders that only have older versions.
    if "Retrying (Retry(" in done.stderr:
        raise UnreachableIndexError(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    if done.returncode:
        raise ValueError(f"triton: {' '.join(command[1:])} failed:\n{done.stderr.strip()}")
    return done.stdout
