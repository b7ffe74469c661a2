"""The CPU kernels, compiled before the tests: each process of a parallel run compiles a share of them.

A new machine has none on disk, and both processes begin with tests that need most of them: they would compile the same
kernels at the same time, for more than a minute.
"""

import importlib
import importlib.util
import inspect
import os
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "kernels" / "cpu"
MANY_FILES = 50  # a run of so many test files needs all kernels


def entry_points():
    """Every compiled function that a Binding is made of, with the type of its call, those of large files first."""
    for path in sorted(FOLDER.glob("[!_]*.py"), key=lambda path: -path.stat().st_size):
        module = importlib.import_module(f"kvops.kernels.cpu.{path.stem}")
        for function in vars(module).values():
            python = getattr(function, "py_func", None)
            if python is None or python.__module__ != module.__name__:
                continue
            if list(inspect.signature(python).parameters) == ["addresses", "table", "threads"]:
                names = [name for name in python.__code__.co_names if hasattr(vars(module).get(name), "_fields")]
                yield function, vars(module)[names[0]]


def compile_share(items):
    """Compile this process's share, if the tests are the whole suite in several processes."""
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker is None or workers == 1 or len({item.path for item in items}) < MANY_FILES:
        return
    if importlib.util.find_spec("numba"):
        from kvops.kernels.cpu.arguments import compile_for

        for function, call in list(entry_points())[int(worker.removeprefix("gw")) :: workers]:
            compile_for(function, call)
