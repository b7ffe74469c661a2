"""Share the work of one call among the threads of torch's own OpenMP pool.

numba brings pools of its own, but torch's threads keep spinning for a while after each of torch's operators: a second
pool would fight them for the cores. So the region is opened in the very OpenMP library that torch has loaded.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kvops.kernels.cpu.jit import jit

_INT32, _INT64, _BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
_LEAST_BYTES = 1 << 17  # that a thread should have to move
_FUNCTIONS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
_forked = False


def _alone() -> None:
    """A forked child has none of its parent's threads, and OpenMP would wait for them for ever."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_alone)


def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch uses; None where it has none that opens regions as GCC does."""
    if os.name != "posix":
        return None
    # As torch found its functions: first those that the whole process shares, then those of what torch is linked to.
    linked = (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.so")
    for name in (None, *map(str, linked)):
        library = ctypes.CDLL(name)
        if hasattr(library, _FUNCTIONS[0]):
            return library
    return None


_LIBRARY = _openmp()
_NO_ADDRESS = 1  # compiled code names the functions also where one thread, which calls none of them, does all
for _name in _FUNCTIONS:
    _address = ctypes.cast(getattr(_LIBRARY, _name), ctypes.c_void_p).value if _LIBRARY else _NO_ADDRESS
    llvm.add_symbol(f"kvops_{_name}", _address)


def has_pool() -> bool:
    """Whether there are threads to share work among: torch's OpenMP library was found."""
    return _LIBRARY is not None


def num_threads() -> int:
    """The most threads that a call may use: torch's number, and one where there is no pool."""
    return torch.get_num_threads() if has_pool() and not _forked else 1


@jit
def worth(threads, size):
    """How many of the threads so many bytes to be moved are worth."""
    return max(1, min(threads, size // _LEAST_BYTES))


@intrinsic
def run_shares(typing_context: Any, function: Any, arguments: Any, threads: Any) -> Any:
    """Call ``function(share, shares, *arguments)`` on ``threads`` threads at once, each with a share of its own.

    Returns False where a call failed, which is for want of memory.
    """
    share_types = (types.int64, types.int64, *arguments.types)
    function.dispatcher.compile(share_types)
    compiled = function.dispatcher.overloads[share_types]

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        context.add_linking_libs([compiled.library])
        module = builder.module
        callee = context.declare_function(module, compiled.fndesc)

        def call(builder: Any, share: Any, shares: Any, arguments: Any) -> Any:
            unpacked = cgutils.unpack_tuple(builder, arguments, len(share_types) - 2)
            status, _ = context.call_conv.call_function(
                builder, callee, types.none, share_types, [share, shares, *unpacked]
            )
            return builder.zext(status.is_ok, _INT32)

        # What all threads read: the arguments, and how many calls have failed.
        data = cgutils.pack_struct(builder, (_unowned(context, builder, arguments, values[1]), _INT32(0)))
        shared = cgutils.alloca_once_value(builder, data)
        region_type = ir.FunctionType(ir.VoidType(), [_BYTES])
        region = ir.Function(module, region_type, module.get_unique_name("share"))
        region.linkage = "internal"
        inside = ir.IRBuilder(region.append_basic_block())
        own = inside.bitcast(region.args[0], shared.type)
        share, shares = (
            inside.sext(inside.call(_declare(module, name, _INT32, []), []), _INT64) for name in _FUNCTIONS[1:]
        )
        succeeded = call(inside, share, shares, inside.load(cgutils.gep_inbounds(inside, own, 0, 0)))
        failed = inside.sub(_INT32(1), succeeded)
        inside.atomic_rmw("add", cgutils.gep_inbounds(inside, own, 0, 1), failed, "monotonic")
        inside.ret_void()

        with builder.if_else(builder.icmp_signed(">", values[2], values[2].type(1))) as (many, one):
            with many:
                open_region = _declare(
                    module, _FUNCTIONS[0], ir.VoidType(), [region_type.as_pointer(), _BYTES, _INT32, _INT32]
                )
                builder.call(
                    open_region,
                    [region, builder.bitcast(shared, _BYTES), builder.trunc(values[2], _INT32), _INT32(0)],
                )
            with one:
                succeeded = call(
                    builder, _INT64(0), _INT64(1), builder.load(cgutils.gep_inbounds(builder, shared, 0, 0))
                )
                builder.store(builder.sub(_INT32(1), succeeded), cgutils.gep_inbounds(builder, shared, 0, 1))
        failures = builder.load(cgutils.gep_inbounds(builder, shared, 0, 1))
        return builder.icmp_signed("==", failures, _INT32(0))

    return types.boolean(function, arguments, types.int64), generate


def _unowned(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """Arrays, in tuples or not, as views that keep nothing alive: the caller does, and threads that count references
    to one array wait for each other."""
    if isinstance(kind, types.BaseTuple):
        items = zip(kind.types, cgutils.unpack_tuple(builder, value, len(kind.types)), strict=True)
        return context.make_tuple(builder, kind, [_unowned(context, builder, *item) for item in items])
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = cgutils.get_null_value(array.meminfo.type)
        array.parent = cgutils.get_null_value(array.parent.type)
        return array._getvalue()
    return value


def _declare(module: Any, name: str, returned: Any, arguments: list[Any]) -> Any:
    return cgutils.get_or_insert_function(module, ir.FunctionType(returned, arguments), f"kvops_{name}")
