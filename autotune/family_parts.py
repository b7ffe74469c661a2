"""Parts that kernel families share: limits of a launch, the roofline, and the fields that change bits of a result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable

from kvops.autotune.devices import DeviceFacts
from kvops.autotune.spec import Config

_MAX_WARPS = 16
_MAX_STAGES = 8


def refuse_launch(config: Config, device: DeviceFacts, *powers_of_two: str) -> str | None:
    """Limits of every kernel: block sizes are powers of two, and warps and stages are within those of a GPU."""
    for name in powers_of_two:
        value = getattr(config, name)
        if value < 1 or value & (value - 1):
            return f"needs {name} to be a power of two, it is {value}"
    warps, stages = config.num_warps, getattr(config, "num_stages", 1)
    if not 1 <= warps <= _MAX_WARPS or warps & (warps - 1):
        return f"needs 1 to {_MAX_WARPS} warps, a power of two, it has {warps}"
    if not 1 <= stages <= _MAX_STAGES:
        return f"needs 1 to {_MAX_STAGES} stages, it has {stages}"
    return None


def refuse_shared(needed: int, device: DeviceFacts) -> str | None:
    """``needed`` is a lower bound in bytes; the feasibility tables have what the compiler really takes."""
    if needed > device.shared_memory:
        return f"needs {needed} bytes of shared memory or more, {device.name} has {device.shared_memory}"
    return None


def roofline_bound(flops: float, bytes_moved: float, device: DeviceFacts) -> str:
    """The limit of a launch by the roofline: memory or the matrix units of this device."""
    intensity = flops / max(bytes_moved, 1)
    if not device.bandwidth or not device.matrix_tflops:
        return f"{intensity:.0f} operations per byte"
    ridge = 1000 * device.matrix_tflops / device.bandwidth
    limit = "the matrix units" if intensity > ridge else "memory"
    return f"{intensity:.0f} operations per byte (ridge {ridge:.0f}): bound by {limit}"


def all_fields_but(*names: str) -> Callable[[Config], Hashable]:
    """Configurations that differ only in ``names`` give the same bits.

    Stages and descriptors are such fields: they change when and how data arrives, not the order of a sum.
    """

    def numerics(config: Config) -> Hashable:
        return tuple(value for name, value in dataclasses.asdict(config).items() if name not in names)

    return numerics


def bits_never_change(config: Config) -> Hashable:
    """Every configuration gives the same bits: the kernel computes with integers or copies."""
    return None
