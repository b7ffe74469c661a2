"""Processes that launch the same kernel at the same time compile it once: one compiles, the others wait for its binary
in Triton's cache on disk."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path
from typing import Any


def compile_once() -> None:
    """From now on this process takes a lock for each kernel that it compiles. Without Triton it does nothing.

    The locks are files in Triton's cache folder. A process that dies gives its locks back.
    """
    try:
        from triton import knobs
        from triton.runtime.jit import JITFunction
    except ImportError:
        return
    original = JITFunction._do_compile
    if getattr(original, "locks", False):
        return

    def do_compile(self: Any, key: Any, *arguments: Any, **options: Any) -> Any:
        name = hashlib.sha256(f"{self.cache_key} {key}".encode()).hexdigest()[:24]
        folder = Path(knobs.cache.dir) / "kvops-locks"
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            return original(self, key, *arguments, **options)
        finally:
            os.close(descriptor)

    do_compile.locks = True  # type: ignore[attr-defined]
    JITFunction._do_compile = do_compile
