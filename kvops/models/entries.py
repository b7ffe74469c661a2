"""Entries of a JSON object or of GGUF metadata, read by key and type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

T = TypeVar("T")

_KINDS: dict[type, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
}


class Entries:
    """Typed access to a mapping that came from a file. A null counts as a missing entry.

    Args:
        values: the mapping.
        source: where it came from, for messages: ``"config.json"``.
        prefix: put before each key, here and in messages: ``"llama."``.
    """

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self.values, self.source, self.prefix = values, source, prefix

    def find(self, key: str, kind: type[T]) -> T | None:
        """The entry, or None if it is absent or null. Raises ValueError if it has another type."""
        value = self.values.get(self.prefix + key)
        return None if value is None else as_kind(self.prefix + key, value, kind, self.source)

    def get(self, key: str, kind: type[T], default: T) -> T:
        """The entry, or ``default`` if it is absent or null."""
        value = self.find(key, kind)
        return default if value is None else value

    def need(self, key: str, kind: type[T]) -> T:
        """The entry. Raises ValueError if it is absent or null."""
        value = self.find(key, kind)
        if value is None:
            raise ValueError(f"{self.prefix}{key}: expected in {self.source}, but it is not there")
        return value

    def only(self, key: str, supported: T) -> None:
        """Raise ValueError for an entry that is not ``supported``."""
        value = self.get(key, type(supported), supported)
        if value != supported:
            raise ValueError(f"{self.prefix}{key}: only {supported!r} is supported, got {value!r} in {self.source}")

    def strings(self, key: str) -> list[str] | None:
        """A list of strings, or None if it is absent or null."""
        return self._items(key, str, "strings")

    def integers(self, key: str) -> list[int] | None:
        """A list of integers, or None if it is absent or null."""
        return self._items(key, int, "integers")

    def _items(self, key: str, kind: type[T], name: str) -> list[T] | None:
        items = self.find(key, list)
        # type() in place of isinstance(): a bool is no integer, and a vocabulary has 100,000 items.
        for index, item in enumerate(items or ()):
            if type(item) is not kind:
                raise ValueError(
                    f"{self.prefix}{key}: expected a list of {name} in {self.source}, got {item!r} at index {index}"
                )
        return items


def as_kind(name: str, value: object, kind: type[T], source: str) -> T:
    """``value`` if it has this type; a whole number is also a ``float``, a bool is never a number.

    Raises:
        ValueError: it has another type.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and is_number:
        return cast("T", float(cast("float", value)))
    if not isinstance(value, kind) or (kind is int and not is_number):
        raise ValueError(f"{name}: expected {_KINDS[kind]} in {source}, got {value!r:.80}")
    return value
