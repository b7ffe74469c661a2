"""Compile what calls of operators would launch on a GPU, in several processes and without launching anything.

Each process makes all the calls, on the CPU. Operators compute by their eager implementation; beside it each kernel
that they would launch compiles for the GPU, in one of the processes, into Triton's cache on disk.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kvops import private_torch
from kvops.extras import require
from kvops.ops import registry

if TYPE_CHECKING:
    from kvops.kernels.device import Device


def compile_ahead(
    calls: Callable[..., object],
    arguments: Sequence[Any],
    jobs: int,
    told: Callable[[str], None] = lambda name: None,
    device: Device | None = None,
) -> int:
    """Compile the kernels that ``calls(*arguments)`` would launch on ``device``, by default the current one, in
    ``jobs`` processes; returns how many there were.

    Function and arguments are pickled, with tensors on the CPU. ``told`` is called with the name of each kernel when it
    is compiled. Raises RuntimeError with the end of what a process wrote if one of them fails.
    """
    environment = os.environ | {
        **{"KVOPS_CPU": "eager", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    environment.pop("TRITON_INTERPRET", None)
    if device is None:
        from kvops.kernels.device import current_device

        device = current_device()
    names: list[str] = []

    def listen(process: subprocess.Popen[bytes], payload: bytes, errors: list[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin as stdin:
            stdin.write(payload)
        lines = []
        for line in process.stdout:
            lines.append(line.decode(errors="replace").rstrip())
            if lines[-1].startswith(_COMPILED):
                names.append(lines[-1].removeprefix(_COMPILED))
                told(names[-1])
        if process.wait():
            errors.append("\n".join(lines[-8:]))

    threads: list[threading.Thread] = []
    errors: list[str] = []
    for place in range(jobs):
        payload = pickle.dumps((calls, tuple(arguments), tuple(device), place, jobs))
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        threads.append(threading.Thread(target=listen, args=(process, payload, errors)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    if errors:
        raise RuntimeError(f"compile_ahead: a process failed:\n{errors[0]}")
    return len(names)


_COMPILED = "compiled "


@contextmanager
def compiling_beside(
    device: Device,
    chosen: Callable[[str], bool] = lambda identity: True,
    told: Callable[[str], None] = lambda name: None,
) -> Iterator[None]:
    """Inside, operators on CPU tensors also compile their kernels for ``device``, those with a ``chosen`` identity, and
    ``told`` hears their names. The process must have imported the kernels without ``TRITON_INTERPRET``."""
    require("triton")
    from kvops.autotune.inspect import CompileOnlyDriver, Target, launches_compile
    from kvops.kernels import device as devices

    arch = int(device.arch.removeprefix("sm_")) if device.backend == "cuda" else device.arch
    stand_in = CompileOnlyDriver(
        Target(device.arch, device.backend, arch, device.warp_size, device.shared_memory, device.num_sms)
    )
    prepare = registry._Operator._prepare

    def prepare_both(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        compute = prepare(self, args, kwargs)
        launch = registry._launch(registry._kernel(self.kernel), args, kwargs)

        def both(*args: Any, **kwargs: Any) -> Any:
            written = private_torch.written(self.overload, args, kwargs).values()
            before = [tensor.clone() for tensor in written]
            launch(*args, **kwargs)
            for tensor, value in zip(written, before, strict=True):  # a launch function may have filled it
                tensor.copy_(value)
            return compute(*args, **kwargs)

        return both

    def compile_chosen(do_compile: Callable[..., Any], kernel: Any, key: Any, *args: Any, **options: Any) -> Any:
        if not chosen(hashlib.sha256(f"{kernel.cache_key} {key}".encode()).hexdigest()):
            return SimpleNamespace()  # another process compiles it
        compiled = do_compile(kernel, key, *args, **options)
        told(kernel.fn.__name__)
        return compiled

    registry.forget_launches()
    devices._devices[id(stand_in), stand_in.get_current_device()] = device
    registry._Operator._prepare = prepare_both  # type: ignore[method-assign]
    try:
        with launches_compile(stand_in, compile_chosen):
            yield
    finally:
        registry._Operator._prepare = prepare  # type: ignore[method-assign]
        del devices._devices[id(stand_in), stand_in.get_current_device()]
        registry.forget_launches()


def main() -> int:
    """One of the processes of :func:`compile_ahead`."""
    from kvops.kernels.device import Device

    calls, arguments, device, place, jobs = pickle.load(sys.stdin.buffer)

    def mine(identity: str) -> bool:
        return int(identity, 16) % jobs == place

    def tell(name: str) -> None:
        print(f"{_COMPILED}{name}", flush=True)

    with compiling_beside(Device(*device), mine, tell):
        calls(*arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
