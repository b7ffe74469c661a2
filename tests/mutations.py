"""Planted faults, and the tests that must notice each of them: ``make mutations``.

A tolerance is worth what it catches. Each fault (``faults.py``, ``dropout_faults.py``, ``numba_faults.py``) is one
small change of a kernel or of the eager code that changes numbers and no shapes. ``python tests/mutations.py`` copies
the tree, plants the faults one by one and runs the tests named with each: they must fail. ``test_mutations.py`` checks
the lists.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from dropout_faults import DROPOUT_FAULTS
from faults import FAULTS, Mutation
from numba_faults import NUMBA_FAULTS
from slot_scale_faults import SLOT_SCALE_FAULTS

ROOT = pathlib.Path(__file__).parent.parent
MUTATIONS = [*FAULTS, *DROPOUT_FAULTS, *SLOT_SCALE_FAULTS, *NUMBA_FAULTS]


def copied(target: pathlib.Path) -> None:
    """Copy the files of the working tree that git tracks or would add; links stay links."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, place = ROOT / name, target / name
        if source.is_symlink() or source.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, place, follow_symlinks=False)


def killed(mutation: Mutation, tree: pathlib.Path) -> bool:
    """Whether the tests named with it fail. Any other exit, as where no test is selected, is an error."""
    file = tree / mutation.file
    source = file.read_text()
    file.write_text(source.replace(mutation.old, mutation.new))
    try:
        environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        command = f"exec {sys.executable} -m pytest -q -x -p no:cacheprovider --no-header {mutation.tests}"
        run = subprocess.run(command, shell=True, cwd=tree, env=environment, capture_output=True, text=True)
    finally:
        file.write_text(source)
    if run.returncode not in (0, 1):
        output = run.stdout[-2000:] + run.stderr[-2000:]
        raise SystemExit(f"{mutation.fault}: pytest ended with {run.returncode}\n{output}")
    return run.returncode == 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Plant faults and see that the tests named with them fail.")
    parser.add_argument("words", nargs="*", help="only faults whose description or file has one of these words")
    words = parser.parse_args().words
    chosen = [m for m in MUTATIONS if not words or any(word in m.fault or word in m.file for word in words)]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder) / "kvops"
        copied(tree)
        for mutation in chosen:
            start = time.perf_counter()
            dead = killed(mutation, tree)
            fate = f"{'killed' if dead else 'SURVIVES'} in {time.perf_counter() - start:.0f} s"
            print(f"{fate}: {mutation.fault} ({mutation.file})", flush=True)
            if not dead:
                survivors.append(mutation)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults are noticed")
    if survivors:
        raise SystemExit("Not noticed: " + "; ".join(m.fault for m in survivors))


if __name__ == "__main__":
    main()
