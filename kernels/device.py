"""The GPU that a launch runs on: the properties that a launch configuration depends on."""

from typing import NamedTuple

import torch
from triton import knobs
from triton.runtime import driver

from kvops.kernels.interpreter import mend_loop_bounds, mend_masks

# The kernels were decorated for the interpreter, which has no driver.
_INTERPRETED = bool(knobs.runtime.interpret)
if _INTERPRETED:
    mend_loop_bounds()
    mend_masks()


class Device(NamedTuple):
    """A launch target. ``arch`` reads ``"sm_90"`` or ``"gfx942"``, and ``"interpreter"`` in Triton's interpreter;
    ``name`` is the driver's name of the GPU, or the architecture without a driver."""

    name: str
    backend: str
    arch: str
    warp_size: int
    num_sms: int
    shared_memory: int


_INTERPRETER = Device("interpreter", "cpu", "interpreter", warp_size=1, num_sms=4, shared_memory=232448)
_devices: dict[tuple[int, object], Device] = {}


def current_device() -> Device:
    """The device of Triton's active driver, which follows ``torch.cuda.current_device()``.

    Cached by driver and device: the autotuner's compile-only driver and every GPU of a machine have their own entry.
    """
    if _INTERPRETED:
        return _INTERPRETER
    active = driver.active
    index = active.get_current_device()
    device = _devices.get((id(active), index))
    if device is None:
        target = active.get_current_target()
        properties = active.utils.get_device_properties(index)
        arch = f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]
        device = Device(
            torch.cuda.get_device_name(index) if isinstance(index, int) else arch,
            target.backend,
            arch,
            target.warp_size,
            properties["multiprocessor_count"],
            properties["max_shared_mem"],
        )
        _devices[id(active), index] = device
    return device
