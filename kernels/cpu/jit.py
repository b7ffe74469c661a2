"""Compile functions for the CPU with numba, and keep what was compiled on disk.

numba's own cache looks at one source file only, so that a change of a helper in another file would go unseen. This one
keeps a folder for each state of all files beside this one, of numba and of Python.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numba
import torch
from numba.core import caching

from kvops.user_cache import user_cache

_LOGGER = logging.getLogger("kvops.cpu")  # to stderr, unless the program says otherwise
_LONG = 1.5  # seconds of compiling until the user is told

# What may change the last bits of a sum: not the meaning of NaN and infinities, which stand for "masked" and "empty".
_FAST_MATH = {"reassoc", "nsz", "arcp", "contract", "afn"}


def jit(function: Callable[..., Any]) -> Any:
    """``numba.njit`` without the GIL, with vectorised sums and a cache on disk."""
    return _njit(function, _FAST_MATH)


def inner(function: Callable[..., Any]) -> Any:
    """:func:`jit` for what compiled code alone calls, a call from Python being fatal.

    To unpack the tuples of arrays that such functions take, for a call from Python, numba would compile more code than
    most of them have.
    """
    return _njit(function, _FAST_MATH, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def inlined(function: Callable[..., Any]) -> Any:
    """:func:`inner` for what is called where registers are full of what a call would have to save."""
    return _njit(function, _FAST_MATH, no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True)


def exact(function: Callable[..., Any]) -> Any:
    """:func:`jit` for what must round as it is written: sums in their order, products before they are added."""
    return _njit(function, set())


def _njit(function: Callable[..., Any], fast_math: set[str], **options: bool) -> Any:
    dispatcher = numba.njit(nogil=True, error_model="numpy", fastmath=fast_math or False, **options)(function)
    dispatcher._cache = _Cache(function)
    return dispatcher


@functools.cache
def compiled(function: Any, signature: tuple[Any, ...]) -> Callable[..., Any]:
    """``function`` compiled for arguments of these types, without the search for the signature of each call."""
    name, folder = function.py_func.__module__.rpartition(".")[2], Path(function._cache.cache_path)
    kept = f"once, which takes some seconds, and keeps it in {folder}"
    if _temporary.cache_info().currsize and folder == _own_folder():
        kept = "for this process alone; name a folder that can be written with KVOPS_CACHE_DIR"
    notice = threading.Timer(_LONG, _tell_once, [f"kvops compiles its CPU kernel {name} {kept}"])
    notice.daemon = True
    notice.start()
    try:
        function.compile(signature)
    finally:
        notice.cancel()
    return function.overloads[signature].entry_point  # type: ignore[no-any-return]


def cache_folder() -> Path:
    """Where compiled functions are kept: in the user's cache, or for as long as this process lives."""
    cache = user_cache()
    return _own_folder() if cache is None else cache / "numba" / _state()


def _own_folder() -> Path:
    return Path(_temporary().name)


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="kvops-numba-")


@functools.cache
def _state() -> str:
    """A hash of all that decides what is compiled; numba itself tells processors apart."""
    digest = hashlib.sha256(f"{numba.__version__} {torch.__version__} {sys.prefix} {sys.version}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class _Locator(caching._CacheLocator):
    """Where numba keeps a function, and since when."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._lineno = function.__code__.co_firstlineno
        self.folder = cache_folder()

    def ensure_cache_path(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=self.folder).close()  # raises OSError where nothing can be written

    def get_cache_path(self) -> str:
        return str(self.folder)

    def get_source_stamp(self) -> str:
        return _state()

    def get_disambiguator(self) -> str:
        return str(self._lineno)

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> _Locator | None:
        locator = cls(py_func)
        try:
            locator.ensure_cache_path()
        except OSError:  # compiled again in every process
            locator.folder = _own_folder()
        return locator


class _CacheImpl(caching.CompileResultCacheImpl):
    _locator_classes: ClassVar = [_Locator]


class _Cache(caching.FunctionCache):
    """numba's cache, which costs time and nothing else where files are damaged and disks are full."""

    _impl_class = _CacheImpl

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(signature, target_context)
        except Exception as error:  # a damaged file may raise anything
            _tell_once(f"kvops compiles CPU kernels again, as what {self.cache_path} keeps cannot be read: {error!r}")
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        try:
            super().save_overload(signature, data)
        except OSError as error:
            _tell_once(
                f"kvops cannot keep its compiled CPU kernels in {self.cache_path} ({error.strerror}), so that every "
                "process compiles them; free some space, or name another folder with KVOPS_CACHE_DIR"
            )


@functools.cache
def _tell_once(message: str) -> None:
    _LOGGER.warning(message)
