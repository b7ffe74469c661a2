"""Which configuration a kernel is launched with: chosen at once, explained on request, tuned only when asked for.

``register`` brings a kernel of yours under the store, ``choose`` answers at a launch; ``explain``, ``override``,
``watch`` and ``invariant`` look into it and steer it. ``python -m kvops.autotune`` is its command line.
"""

from kvops.autotune.devices import DeviceFacts
from kvops.autotune.distributed import load_snapshot, share_snapshot, snapshot
from kvops.autotune.lookup import Choice, choose, explain, forget, invariant, override, register, specs, watch
from kvops.autotune.spec import OpSpec, Problem, Workload

__all__ = [
    "Choice",
    "DeviceFacts",
    "OpSpec",
    "Problem",
    "Workload",
    "choose",
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
