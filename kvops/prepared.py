"""Caches what a launch derives from shapes and options alone, such as grids, strides and ranges of keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any


def prepared(prepare: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make ``launch(kind, *args, **kwargs)`` a function of ``args`` and ``kwargs``.

    ``prepare(*args, **kwargs)`` returns ``kind``. It may depend on shapes, strides, dtypes, numbers and the presence of
    tensors, but not on data or the device. The registry of operators calls the function's ``prepare`` once for each
    such combination and reuses the launch with its ``kind``.
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
