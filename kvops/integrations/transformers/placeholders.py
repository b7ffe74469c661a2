"""Objects that a transformers model carries in the place of a tensor and hands back to this package unopened."""

from __future__ import annotations

from typing import Any, NoReturn

_OPERATORS = (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul", "rmatmul", "neg", "invert"),
    *("and", "rand", "or", "ror", "xor", "rxor", "lt", "le", "gt", "ge", "len", "iter", "getitem", "setitem"),
)


class NotATensorError(TypeError, AttributeError):
    """A model computes with an object that stands in the place of a tensor."""


class Placeholder:
    """Whatever a model does with it, other than passing it on, raises :class:`NotATensorError` with one sentence."""

    def refuse(self, use: str) -> NoReturn:
        """Raise :class:`NotATensorError`; ``use`` is what the model did, in a few words."""
        raise NotATensorError(f"{type(self).__name__}: expected a model that passes it on unopened, got {use}")

    def __getattr__(self, name: str) -> Any:
        self.refuse(f"one that reads .{name}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            for part in value if isinstance(value, tuple | list) else (value,):
                if isinstance(part, Placeholder):
                    part.refuse(f"one that calls {getattr(function, '__name__', function)}() on it")
        return NotImplemented


def _refusing(name: str) -> Any:
    def operator(self: Placeholder, *args: Any) -> NoReturn:
        self.refuse(f"one that calls {name} on it")

    return operator


for _name in _OPERATORS:
    setattr(Placeholder, f"__{_name}__", _refusing(f"__{_name}__"))
