"""Tensors as compiled functions take them: by address, beside a table of all that calls alike have in common.

A tensor becomes a NumPy array, and that an array of numba's, in 2 µs, which is more than most kernels take. So shapes,
strides and numbers stand in a table that is made once for all calls alike (see ``kvops.prepared``), and a call hands
over nothing but addresses.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from kvops.checks import DataError
from kvops.kernels.cpu.jit import compiled
from kvops.kernels.cpu.threads import num_threads

_INT64 = ir.IntType(64)
OUTSIDE = 2  # the status of a function that did nothing, as lengths or blocks are out of range


def _arrays(call: type[NamedTuple]) -> list[types.Array]:
    return [kind for kind in call.__annotations__.values() if isinstance(kind, types.Array)]


@intrinsic
def unpack(typing_context: Any, call: Any, addresses: Any, table: Any) -> Any:
    """The named tuple ``call`` of a :class:`Binding`'s ``addresses`` and ``table``."""
    kinds = list(call.instance_class.__annotations__.values())
    call_type = types.NamedTuple(kinds, call.instance_class)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = builder.inttoptr(arguments[2], _INT64.as_pointer())
        numbers = (builder.load(builder.gep(start, [_INT64(i)])) for i in itertools.count())
        places = iter(range(len(kinds)))
        fields = []
        for kind in kinds:
            if isinstance(kind, types.Array):
                array = context.make_array(kind)(context, builder)
                address = builder.extract_value(arguments[1], next(places))
                shape, strides = ([next(numbers) for _ in range(kind.ndim)] for _ in range(2))
                itemsize = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
                data = builder.inttoptr(address, array.data.type)
                populate_array(array, data=data, shape=shape, strides=strides, itemsize=itemsize, meminfo=None)
                fields.append(array._getvalue())
            elif kind == types.float64:
                fields.append(builder.bitcast(next(numbers), ir.DoubleType()))
            else:
                fields.append(next(numbers))
        return context.make_tuple(builder, call_type, fields)

    return call_type(call, addresses, table), generate


def _layout(x: torch.Tensor | None, kind: types.Array) -> list[int]:
    """Shape and strides, in bytes; the elements of a wider dtype are bytes themselves where the array's are."""
    if x is None:
        return [0] * (2 * kind.ndim)
    itemsize = x.element_size()
    shape, strides = list(x.shape), [stride * itemsize for stride in x.stride()]
    if kind.dtype == types.uint8:
        shape[-1] *= itemsize
        strides[-1] = 1  # contiguous, or of one element
    if len(shape) != kind.ndim:
        raise ValueError(f"expected {kind.ndim} dimensions, got {shape}")
    return shape + strides


def per_head(x: torch.Tensor | None, heads: int, rank: int) -> torch.Tensor | None:
    """A cache or side array with a dimension for the heads behind its slots; its stride is 0 where all share."""
    return x if x is None or x.dim() == rank else x.unsqueeze(2).expand(-1, -1, heads, *x.shape[2:])


def side_bytes(side: torch.Tensor | None) -> torch.Tensor | None:
    """A side array [num_blocks, block_size] in the shape of a cache, whose last dimension may be taken for bytes."""
    return None if side is None else side.unsqueeze(-1)


def for_heads(scale: torch.Tensor | None, heads: int) -> torch.Tensor | None:
    """One number for each head, where there may be one for all."""
    return None if scale is None else scale.expand(heads)


def in_float32(bias: torch.Tensor | None) -> torch.Tensor | None:
    """A bias or a mask in float32, without repeating what it broadcasts over."""
    if bias is None or bias.dtype == torch.float32:
        return bias
    own = bias[tuple(slice(1) if stride == 0 else slice(None) for stride in bias.stride())]
    if own.dtype == torch.bool:
        return torch.zeros_like(own, dtype=torch.float32).masked_fill_(~own, -torch.inf)
    return own.float()


def compile_for(function: Any, call: type[NamedTuple]) -> Callable[..., int]:
    """The function of a :class:`Binding`, compiled: all that it depends on is the type of the call."""
    addresses = types.UniTuple(types.int64, len(_arrays(call)))
    return compiled(function, (addresses, types.int64, types.int64))


class Binding:
    """A compiled function ``(addresses, table, threads) -> status``, bound to what calls alike have in common. The
    status is True, False where memory is wanting, or ``OUTSIDE``.

    ``call`` names the fields of a call, each with its type in numba: an array, ``int64`` or ``float64``. ``fields``
    gives their values, of tensors their layout: those of a call may lie elsewhere. None stands for an empty array.
    """

    def __init__(self, function: Any, call: type[NamedTuple], **fields: Any) -> None:
        numbers: list[int] = []
        for name, kind in call.__annotations__.items():
            value = fields.pop(name)
            if isinstance(kind, types.Array):
                numbers += _layout(value, kind)
            else:
                numbers.append(int(np.float64(value).view(np.int64)) if kind == types.float64 else int(value))
        if fields:
            raise TypeError(f"{call.__name__} has no field {', '.join(fields)}")
        self._numbers = np.array(numbers, np.int64)
        self._table = self._numbers.ctypes.data
        self._function = compile_for(function, call)

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """Call the function with these tensors in the place of the arrays, in the order of the fields.

        Raises MemoryError for want of memory, and DataError for the status ``OUTSIDE``.
        """
        addresses = tuple([0 if x is None else x.data_ptr() for x in tensors])
        status = self._function(addresses, self._table, num_threads())
        if status == OUTSIDE:
            raise DataError("expected lengths and blocks that are in the tensors, the tables and the cache")
        if not status:
            raise MemoryError("kvops: not enough memory for the intermediate results of a CPU kernel")
