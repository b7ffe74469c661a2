"""What a launch does when the driver refuses its configuration: it takes the next one, and remembers.

Predicates and tables exclude what cannot run before a launch. A kernel may still ask for more than a GPU has, if it was
compiled with options that the tables do not cover, or for a GPU that they do not know.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from triton.runtime.errors import OutOfResources

from kvops.autotune import lookup

T = TypeVar("T")


class _OwnChoices(list[lookup.Choice]):
    """The choices of this thread: a watcher hears those of all."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def append(self, choice: lookup.Choice) -> None:
        if threading.get_ident() == self._thread:
            super().append(choice)


def relaunched(call: Callable[[], T], error: Exception) -> T:
    """The result of ``call``, which raised ``error`` when it launched its kernels.

    If the driver refused a launch (Triton's OutOfResources), ``call`` runs again with the next configuration of that
    kernel, until one runs; the refused ones are never chosen again. Any other error, and one under an override, is
    raised as it is. ``call`` must bear to be repeated up to the launch that was refused.

    Raises RuntimeError if no configuration is left.
    """
    refused: list[object] = []
    while isinstance(error, OutOfResources) and not lookup.is_overridden():
        with lookup.watch(_OwnChoices()) as choices:
            try:
                return call()  # Triton keeps the error of a kernel: it is raised again at the same launch
            except OutOfResources as again:
                error = again
        if not choices or (choices[-1].spec.name, choices[-1].config) in refused:
            break  # a kernel without configurations, or one whose configuration something else decides
        refused.append((choices[-1].spec.name, choices[-1].config))
        lookup.refuse(choices[-1], str(error))
    raise error


def launched(call: Callable[[], T]) -> T:
    """``call``, :func:`relaunched` if the driver refuses it: for each launch of an operator that works in place, which
    must not be repeated as a whole."""
    try:
        return call()
    except OutOfResources as error:
        return relaunched(call, error)
