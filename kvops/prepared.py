"""Functions that work out once for all calls alike what does not follow from data: grids, strides, ranges of keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any


def prepared(prepare: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make ``launch(kind, *args, **kwargs)`` a function of ``args`` and ``kwargs``.

    ``prepare(*args, **kwargs)`` returns ``kind``: whatever follows from shapes, strides, dtypes, numbers and which
    tensors there are, and nothing that follows from data or the device. The registry of operators asks the function's
    own ``prepare`` for a launch with its ``kind`` in place and keeps that for all calls alike.
    """

    def decorate(launch: Callable[..., Any]) -> Callable[..., Any]:
        def unprepared(*args: Any, **kwargs: Any) -> Any:
            return launch(prepare(*args, **kwargs), *args, **kwargs)

        def prepare_launch(*args: Any, **kwargs: Any) -> Callable[..., Any]:
            return partial(launch, prepare(*args, **kwargs))

        update_wrapper(unprepared, launch)
        unprepared.prepare = prepare_launch  # type: ignore[attr-defined]
        return unprepared

    return decorate
