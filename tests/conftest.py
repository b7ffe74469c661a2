"""Fixtures that every family shares.

``backend`` runs a test twice: once on the eager implementation and once on the Triton kernels, which run in Triton's
interpreter on a machine without a GPU and as compiled kernels where ``KVOPS_TEST_DEVICE=cuda``. With
``KVOPS_TEST_MACHINE=sm_90`` (or sm_80) their PTX runs on the machine of ``kvops.autotune.machine``, and a fault fails
the test: see machine_suite.py.
"""

import contextlib
import importlib
import os
import pathlib
from collections.abc import Iterator

import machine_suite
import numba_kernels
import numpy as np
import pytest
import torch
from machine_suite import MACHINE, pytest_runtest_call, pytest_runtest_makereport  # noqa: F401 - hooks
from margins import (  # noqa: F401 - hooks
    pytest_addoption,
    pytest_configure,
    pytest_sessionfinish,
    pytest_terminal_summary,
)


def _patch_once_a_launch() -> None:
    """Triton's interpreter replaces the functions of its language at a launch, and the same ones again at every call of
    a device function from within: that takes longer than what the call computes, and changes nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, launch, patched = interpreter._patch_lang, interpreter._LangPatchScope(), set()

    def patch_once(function):
        nonlocal launch
        names = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if not launch._changes:  # the last launch has restored what it replaced
            patched.clear()
        elif names in patched:
            return interpreter._LangPatchScope()
        scope = patch(function)
        launch = launch if patched else scope
        patched.add(names)
        return scope

    interpreter._patch_lang = patch_once


def _make_types_once() -> None:
    """Triton's interpreter makes a new type for each intermediate result, and what follows from it: that takes longer
    than to compute the result. Both are kept by the name of the type; operands of one type are not converted."""
    import triton.language as tl
    from triton.language import semantic
    from triton.runtime import interpreter

    make_type, make_tensor, as_numpy = tl.core.block_type.__init__, tl.core.tensor.__init__, interpreter._get_np_dtype
    types, tensors, numpy_types = {}, {}, {}

    def block_type(self, element_ty, shape):
        key = element_ty.name, tuple(shape)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = self.__dict__.copy()
        self.__dict__.update(types[key])

    def tensor(self, handle, type):
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = self.__dict__.copy()
        self.__dict__.update(tensors[type.name], handle=handle, type=type)

    def numpy_type(type):
        key = type.scalar.name
        if key not in numpy_types:
            numpy_types[key] = as_numpy(type)
        return numpy_types[key]

    check = semantic.TritonSemantic.binary_op_type_checking_impl
    alike = {"fp32", "fp64", "int32", "int64"}

    def check_types(self, lhs, rhs, *options, **named):
        operands = isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor)
        if operands and lhs.type.name == rhs.type.name and lhs.dtype.name in alike:
            return lhs, rhs
        return check(self, lhs, rhs, *options, **named)

    tl.core.block_type.__init__, tl.core.tensor.__init__ = block_type, tensor
    interpreter._get_np_dtype = numpy_type
    semantic.TritonSemantic.binary_op_type_checking_impl = check_types


def _leave_overflows_alone() -> None:
    """Triton's interpreter computes for every sum of whole numbers whether it overflows, by a dozen of its own
    operations, and drops the answer: only ``debug`` asserts it."""
    from triton.language import semantic

    semantic.TritonSemantic.binary_op_sanitize_overflow_impl = lambda self, lhs, rhs, operation: None


def _round_bfloat16_to_nearest() -> None:
    """Triton's interpreter cuts the bits off that bfloat16 has no room for; a GPU rounds to the nearest even one."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(x, source, target, rounding_mode):
        if (source, target) == (tl.bfloat16, tl.float32):
            return x.astype(np.uint32) << 16
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, rounding_mode)
        bits = np.ascontiguousarray(x).view(np.uint32).reshape(x.shape)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(x), bits >> 16 | 0x40, nearest).astype(np.uint16)

    interpreter._convert_float = convert_float


DEVICE = os.environ.get("KVOPS_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    # Triton reads this when a kernel is decorated: import every kernel now, for the interpreter or for the machine.
    os.environ["TRITON_INTERPRET"] = "0" if MACHINE else "1"
    for _path in sorted((pathlib.Path(__file__).parent.parent / "kernels").glob("[!_]*.py")):
        importlib.import_module(f"kvops.kernels.{_path.stem}")
    del os.environ["TRITON_INTERPRET"]
    if not MACHINE:
        _patch_once_a_launch()
        _make_types_once()
        _leave_overflows_alone()
        _round_bfloat16_to_nearest()
else:
    # Tests that ask for deterministic algorithms multiply matrices, too: cuBLAS wants this by then.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["eager", "numba", "triton"])
def backend(request, monkeypatch) -> Iterator[str]:
    """The implementation under test; on a GPU only the kernels exist. Where a test names no ``device``, tensors are
    made on the one under test."""
    where = contextlib.nullcontext()
    if MACHINE and request.param != "triton":
        pytest.skip("runs no kernel")
    if MACHINE:
        where = machine_suite.on_test_machine(request.node)
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1" if request.param == "triton" else "0")
        monkeypatch.setenv("KVOPS_CPU", "eager" if request.param == "eager" else "")
    elif request.param != "triton":
        pytest.skip("serves CPU tensors")
    elif "device" not in request.fixturenames:
        where = torch.device(DEVICE)
    with where:
        yield request.param


@pytest.fixture(autouse=True, scope="session")
def _compiled_kernels(request) -> None:
    if DEVICE == "cpu" and not MACHINE:
        numba_kernels.compile_share(request.session.items)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items, config) -> None:
    # A file whose operators have CPU kernels says so: elsewhere "numba" would run the eager implementation once more.
    items[:] = [
        item
        for item in items
        if getattr(item.module, "NUMBA", False) or getattr(item, "callspec", None) is None
        or item.callspec.params.get("backend") != "numba"
    ]  # fmt: skip
    _longest_first(items)
    if MACHINE:
        machine_suite.select(items, config)


def _longest_first(items) -> None:
    """The files with the longest tests first, so that no process is left with them at the end of a parallel run."""
    rank: dict[pathlib.Path, int] = {}
    for item in items:
        own = next((place for place, mark in enumerate(("model", "compile")) if item.get_closest_marker(mark)), 2)
        rank[item.path] = min(own, rank.get(item.path, own))
    items.sort(key=lambda item: rank[item.path])
