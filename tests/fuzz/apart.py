"""An area swept in a process of its own: a crash or a hang is a failure like any other, with its case."""

from __future__ import annotations

import importlib
import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

from fuzz.core import Failure, Result, from_json, sweep, to_json

# A case that takes longer than this hangs.
PATIENCE = 240.0


def area_module(area: str) -> ModuleType:
    import conftest  # noqa: F401 - imports the kernels as Triton's interpreter wants them

    return importlib.import_module(f"fuzz.{area}")


def _work(area: str, seed: int, seconds: float, diary: str, answer: Connection) -> None:
    module = area_module(area)
    last = Path(diary)
    answer.send("ready")
    answer.send(sweep(module, seed, seconds=seconds, before=lambda case: last.write_text(to_json(case))))


def run(area: str, seed: int, seconds: float) -> Result:
    """Sweep in a process of its own."""
    here, there = multiprocessing.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile() as diary:
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=_work, args=(area, seed, seconds, diary.name, there), daemon=True)
        process.start()
        there.close()
        begin = time.monotonic()
        what = "crashed"
        try:
            here.recv()  # the imports are done
            begin = time.monotonic()
            if here.poll(seconds + 5 * 60 + PATIENCE):
                return here.recv()
            what = "hangs"
            process.kill()
        except EOFError:
            process.join()
            what = f"crashed with exit code {process.exitcode}"
        text = Path(diary.name).read_text() or "{}"
        return Result(0, time.monotonic() - begin, [Failure(from_json(area_module(area).Case, text), what, what)])
