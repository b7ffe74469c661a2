"""Objects that take the place of a tensor in a transformers model and only pass through it."""

from __future__ import annotations

from typing import Any, NoReturn

# Python's special methods and how the operators are written in a program.
_BINARY = {
    **{"add": "+", "sub": "-", "mul": "*", "truediv": "/", "matmul": "@", "and": "&", "or": "|", "xor": "^"},
    **{"lt": "<", "le": "<=", "gt": ">", "ge": ">="},
}
_OTHER = {"neg": "-", "invert": "~", "len": "len()", "iter": "a loop", "getitem": "an index", "setitem": "an index"}


class NotATensorError(TypeError, AttributeError):
    """A model computes with a :class:`Placeholder`."""


class Placeholder:
    """Reading an attribute, an operator or a function of torch raises :class:`NotATensorError`."""

    def refuse(self, use: str) -> NoReturn:
        """Raise :class:`NotATensorError`; ``use`` is what the model did, in a few words."""
        raise NotATensorError(f"{type(self).__name__}: expected a model that passes it on, got {use}")

    def __getattr__(self, name: str) -> Any:
        self.refuse(f"one that reads .{name}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            for part in value if isinstance(value, tuple | list) else (value,):
                if isinstance(part, Placeholder):
                    part.refuse(f"one that calls {getattr(function, '__name__', function)}() on it")
        return NotImplemented


def _refusing(written: str) -> Any:
    def operator(self: Placeholder, *args: Any) -> NoReturn:
        self.refuse(f"one that uses {written} on it")

    return operator


for _name, _written in _BINARY.items():
    setattr(Placeholder, f"__{_name}__", _refusing(_written))
    setattr(Placeholder, f"__r{_name}__", _refusing(_written))
for _name, _written in _OTHER.items():
    setattr(Placeholder, f"__{_name}__", _refusing(_written))
