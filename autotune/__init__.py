"""Which configuration a kernel is launched with: chosen at once, explained on request, tuned only when asked for.

``register`` brings a kernel of yours under the store, ``choose`` answers at a launch; ``explain``, ``override``,
``watch`` and ``invariant`` look into it and steer it. ``python -m kvops.autotune`` is its command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvops.autotune.devices import DeviceFacts
from kvops.autotune.distributed import load_snapshot, share_snapshot, snapshot
from kvops.autotune.lookup import Choice, choose, explain, forget, invariant, override, register, specs, watch
from kvops.autotune.spec import OpSpec, Problem, Workload
from kvops.extras import require

if TYPE_CHECKING:
    from kvops.kernels.device import Device

__all__ = [
    "Choice",
    "DeviceFacts",
    "OpSpec",
    "Problem",
    "Workload",
    "choose",
    "current_device",
    "explain",
    "forget",
    "invariant",
    "load_snapshot",
    "override",
    "register",
    "share_snapshot",
    "snapshot",
    "specs",
    "watch",
]


def current_device() -> Device:
    """The device that a launch would run on now, as :func:`choose` takes it.

    It is that of Triton's active driver, which follows ``torch.cuda.current_device()``; in Triton's interpreter, a
    stand-in whose ``arch`` is ``"interpreter"``.

    Raises:
        ImportError: Triton is not installed.
        RuntimeError: no GPU, and not in Triton's interpreter.
    """
    require("triton")
    from kvops.kernels.device import current_device as ask

    return ask()
