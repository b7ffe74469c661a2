"""Objects that take the place of a tensor in a transformers model and only pass through it."""

from __future__ import annotations

import operator
from typing import Any, NoReturn

import torch
from torch import Tensor

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


class Deferred:
    """An object that a model may pass on, and that becomes a tensor as soon as the model computes with it."""

    def tensor(self) -> Tensor:
        """The tensor. It is made at the first call."""
        raise NotImplementedError

    def attends_with(self, values: Any) -> bool:
        """Whether these keys and ``values`` are still what the cache handed out, so that it can attend to them."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Of the tensor that it stands for."""
        raise NotImplementedError

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself for the device that it is on: transformers before 5.23 moves keys that layers share to the queries."""
        return self if args == (self.device,) and not kwargs else self.tensor().to(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*map(as_tensor, args), **{name: as_tensor(value) for name, value in (kwargs or {}).items()})


def as_tensor(value: Any) -> Any:
    """``value`` with the tensor in place of each :class:`Deferred`, also within a list or tuple."""
    if isinstance(value, Deferred):
        return value.tensor()
    return type(value)(map(as_tensor, value)) if type(value) in (list, tuple) else value


def _refusing(written: str) -> Any:
    def operator(self: Placeholder, *args: Any) -> NoReturn:
        self.refuse(f"one that uses {written} on it")

    return operator


def _deferring(name: str) -> Any:
    def method(self: Deferred, *args: Any) -> Any:
        function = len if name == "__len__" else iter if name == "__iter__" else getattr(operator, name)
        return function(self.tensor(), *args)

    return method


for _name, _written in _BINARY.items():
    setattr(Placeholder, f"__{_name}__", _refusing(_written))
    setattr(Placeholder, f"__r{_name}__", _refusing(_written))
for _name, _written in _OTHER.items():
    setattr(Placeholder, f"__{_name}__", _refusing(_written))
for _name in (*(f"__{_name}__" for _name in _BINARY), *(f"__{_name}__" for _name in _OTHER)):
    setattr(Deferred, _name, _deferring(_name))
