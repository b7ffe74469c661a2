"""Launches that were checked and prepared, by what calls with the same launch have in common: everything but data."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor

from kvops import private_torch

Launch = Callable[..., Any]

# The number of kinds of calls in the cache. If it is full, the cache is cleared.
_MAX_LAUNCHES = 4096

_facts, _strides = attrgetter("shape", "dtype", "device"), Tensor.stride
_facts_and_gradient = attrgetter("shape", "dtype", "device", "requires_grad")


def _call_key(tensors: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The key of a call in the cache: shapes, dtypes, devices, strides and numbers, but no data; where gradients are
    on, ``requires_grad`` as well. ``args`` begins with the given number of tensors."""
    gradients, first = torch.is_grad_enabled(), args[:tensors]
    facts_of = _facts_and_gradient if gradients else _facts
    facts = [gradients, *map(facts_of, first), *map(_strides, first), *kwargs]
    for value in kwargs.values() if len(args) == tensors else (*args[tensors:], *kwargs.values()):
        if isinstance(value, Tensor):
            facts += facts_of(value), _strides(value)
        else:
            facts.append(value)
    return tuple(facts)


class _Kind:
    """A launch, and whether another call is of its kind."""

    def __init__(self, launch: Launch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.launch, self.count, self.names = launch, len(args), tuple(kwargs)
        values = *args, *kwargs.values()
        tensors = [place for place, value in enumerate(values) if isinstance(value, Tensor)]
        numbers = [place for place, value in enumerate(values) if not isinstance(value, Tensor)]
        self.alike = private_torch.tensors_like(*(values[place] for place in tensors))
        # Without numbers, as in decoding, there is nothing to pick.
        self.pick_tensors = itemgetter(*tensors, tensors[0]) if numbers else None
        self.pick_numbers = itemgetter(*numbers, numbers[0]) if numbers else None
        self.numbers = self.pick_numbers(values) if self.pick_numbers is not None else None

    def has(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if len(args) != self.count or tuple(kwargs) != self.names:
            return False
        values = *args, *kwargs.values()
        if self.pick_numbers is None or self.pick_tensors is None:
            return self.alike(*values)
        return bool(self.pick_numbers(values) == self.numbers) and self.alike(*self.pick_tensors(values)[:-1])


class Launches:
    """A cache of launches. The last one is found fastest, as layers of a model make the same call one after another.

    ``tensors`` is the number of tensors that every call begins with.
    """

    def __init__(self, tensors: int) -> None:
        self._tensors = tensors
        self._kinds: dict[tuple[Any, ...], _Kind] = {}
        self._last: _Kind | None = None

    def __len__(self) -> int:
        return len(self._kinds)

    def clear(self) -> None:
        self._kinds.clear()
        self._last = None

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any], prepare: Callable[..., Launch]) -> Launch:
        """The launch for this call; from ``prepare(args, kwargs)`` for the first of its kind.

        Raises AttributeError if one of the tensors that every call begins with is None.
        """
        last = self._last
        if last is not None and last.has(args, kwargs):
            return last.launch
        key = _call_key(self._tensors, args, kwargs)
        kind = self._kinds.get(key)
        if kind is None:
            kind = _Kind(prepare(args, kwargs), args, kwargs)
            if len(self._kinds) >= _MAX_LAUNCHES:
                self._kinds.clear()
            self._kinds[key] = kind
        self._last = kind
        return kind.launch
