"""A separate process for calls that may crash or hang: compiling a candidate, or running it on a GPU.

After a crash or a time-out the next call gets a new process.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import traceback
from collections.abc import Sequence
from functools import cache
from multiprocessing.connection import Connection
from typing import Any


class CandidateError(RuntimeError):
    """A call raised an exception in the worker; the message ends with it."""


class CandidateLostError(CandidateError):
    """A call crashed its process, or exceeded its time limit and was killed."""


def resolve_function(name: str) -> Any:
    """Import ``"module:name"``."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _serve(connection: Connection, imports: Sequence[str]) -> None:
    # Kernels are compiled here, even if the parent interprets them.
    os.environ.pop("TRITON_INTERPRET", None)
    for module in imports:
        importlib.import_module(module)
    function = cache(resolve_function)
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = True, function(name)(*arguments)
        except Exception:
            answer = False, traceback.format_exc(limit=-3)
        connection.send(answer)


class Worker:
    """Calls functions, named ``"module:name"``, in another process.

    ``imports`` are modules that it imports first, such as those that register kernels.
    """

    def __init__(self, imports: Sequence[str] = ()) -> None:
        self._imports = tuple(imports)
        self._process: Any = None
        self._connection: Connection | None = None

    def call(self, name: str, *arguments: Any, limit: float) -> Any:
        """The function's result. Raises CandidateError if it raises, CandidateLostError if it is not back after
        ``limit`` seconds or took its process down; starting a process does not count (its imports take seconds)."""
        connection = self._start()
        try:
            connection.send((name, arguments))
            answered = connection.poll(limit)
            succeeded, result = connection.recv() if answered else (False, "")
        except (EOFError, OSError):
            code = self._kill()
            raise CandidateLostError(f"crashed its process (exit code {code})") from None
        if not answered:
            self._kill()
            raise CandidateLostError(f"hung for more than {limit:g} s")
        if not succeeded:
            raise CandidateError(str(result).strip())
        return result

    def _start(self) -> Connection:
        if self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._imports), daemon=True)
            self._process.start()
            theirs.close()
            self._connection.send(("builtins:bool", ()))  # the answer comes after its imports
            try:
                self._connection.recv()
            except EOFError:
                raise RuntimeError(f"worker: its process ended at once (exit code {self._kill()})") from None
        return self._connection

    def _kill(self) -> int | None:
        process, self._process = self._process, None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if process is None:
            return None
        process.join(0.2)  # a crashed process has an exit code
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode

    def close(self) -> None:
        self._kill()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
