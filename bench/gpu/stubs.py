"""The tests of the GPU run with stubbed launches: which kernels they compile, without a GPU."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bench.gpu.record import needs_device
from bench.gpu.share import rank


class _OnCPU(TorchFunctionMode):
    """Tensors that a test wants on the GPU are made on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: self._here(name, value) for name, value in (kwargs or {}).items()}
        return function(*(self._here("", value) for value in args), **kwargs)

    @staticmethod
    def _here(name: str, value: Any) -> Any:
        return "cpu" if isinstance(value, str) and value == "cuda" else value


def _agree(*args: Any, **kwargs: Any) -> None:
    """For garbage, so that a test goes on to its next launch."""


def _no_attention(q: Any, k: Any, v: Any, *, sinks: Any = None, **options: Any) -> tuple[Any, Any, None]:
    """In the place of references that take seconds."""
    tie = 0 * sum(x.sum() for x in (q, k, v, sinks) if x is not None)
    batch, rows, heads, _ = q.shape
    return torch.zeros(batch, rows, heads, v.shape[-1]) + tie, torch.zeros(batch, heads, rows) + tie, None


_STAND_INS = {"assert_accurate": _agree}
_REFERENCES = {"attention": _no_attention, "rounded": lambda *args, **kwargs: (None,) * 3}


class StubbedTests:
    """A pytest plugin that runs the tests which need a device, on CPU tensors and with stubbed launches.

    Args:
        stub: a context in which launches do not run; it yields what a test launched.
        noted: called after each test with its name, what it launched and its seconds of CPU time.
        chosen: which of the tests run, and in which order.
        patience: the seconds until a test whose garbage goes in circles ends.
        seconds: after them no further test runs.
    """

    def __init__(
        self,
        stub: Callable[[], contextlib.AbstractContextManager[list[Any]]],
        noted: Callable[[str, list[Any], float], None],
        chosen: Callable[[list[pytest.Item]], list[pytest.Item]] = list,
        patience: int = 20,
        seconds: float = float("inf"),
    ) -> None:
        self.stub, self.noted, self.chosen, self.patience = stub, noted, chosen, patience
        self.deadline = time.monotonic() + seconds

    @pytest.hookimpl(wrapper=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> Iterator[None]:
        collected = list(items)
        yield  # the suite on the machine for PTX, whose way the tests go here, leaves out what runs there no kernel
        items[:] = self.chosen([item for item in collected if needs_device(item) and self._runs_kernels(item)])
        for item in items:
            item.own_markers = [mark for mark in item.own_markers if mark.name not in ("skip", "skipif")]
            for name, stand_in in (_STAND_INS | (_REFERENCES if rank(item.nodeid) == 2 else {})).items():
                if hasattr(item.module, name):  # type: ignore[attr-defined]
                    setattr(item.module, name, stand_in)  # type: ignore[attr-defined]
        torch.testing.assert_close = _agree

    @staticmethod
    def _runs_kernels(item: Any) -> bool:
        callspec = getattr(item, "callspec", None)
        return callspec is None or callspec.params.get("backend", "triton") == "triton"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: Any) -> Any:
        os.environ["TRITON_INTERPRET"] = "1"  # CPU tensors go to the kernels, which were imported for GPUs

        def too_long(*_: Any) -> None:
            raise TimeoutError("garbage went in circles")

        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(self.patience)
        launches: list[Any] = []
        started = time.process_time()
        try:
            with _OnCPU(), self.stub() as launches:
                return (yield)
        finally:
            signal.alarm(0)
            if time.monotonic() > self.deadline:
                item.session.shouldstop = "the time is up"
            self.noted(item.nodeid, launches, time.process_time() - started)


def run_stubbed(plugin: StubbedTests, files: Sequence[str]) -> int:
    """pytest on ``files``. The process must have started with ``KVOPS_TEST_MACHINE``, the target of its launches."""
    with _without_machine():
        words = ("-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--tb=no")
        return int(pytest.main([*words, *files], [plugin]))


@contextlib.contextmanager
def _without_machine() -> Iterator[None]:
    """The tests' fixture would run launches on the machine for PTX."""
    import kvops.autotune.machine as machine

    before = machine.on_machine
    machine.on_machine = lambda *args, **kwargs: contextlib.nullcontext(_NoExecutions())  # type: ignore[assignment]
    try:
        yield
    finally:
        machine.on_machine = before


class _NoExecutions:
    executions: tuple[()] = ()
