"""What the tests of the autotune store share: records, devices, and candidates that misbehave."""

import os
import signal
import time

from kvops.autotune import specs
from kvops.autotune.devices import by_name
from kvops.autotune.feasibility import current_source
from kvops.autotune.records import Record, Times

H100 = by_name("NVIDIA H100 80GB HBM3")
H200 = by_name("NVIDIA H200")


def triton_version() -> str:
    from triton import __version__

    return __version__


def record(
    op="paged_append", device=H100, config=None, us=10.0, source=None, triton=None, date="2026-01-02", **changes
):
    """A valid record of ``op``: its first realistic problem, changed, with the second candidate."""
    spec = specs()[op]
    problem = {**spec.problems[0], **changes}
    if config is None:
        config = spec.candidates(problem, device)[1]
    return Record(
        op=op,
        source=current_source(spec) if source is None else source,
        key=spec.key_of(problem),
        shape=spec.sizes_of(problem),
        config=dict(vars(config)),
        time=Times(us, us, us, 30),
        device=device,
        environment={"triton": triton_version() if triton is None else triton},
        date=date,
        heuristic_us=2 * us,
    )


# Called by name in a worker's process.


def double(value):
    return 2 * value


def fail(message):
    raise ValueError(message)


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def hang():
    time.sleep(600)
