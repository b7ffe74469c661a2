"""The same registry under pytest-benchmark: ``pytest bench --benchmark-only`` (``-k`` picks operators, models, peers).

``--benchmark-group-by=group`` (the default) puts the contenders of a case into one table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import measure
from bench.case import Case, Peer, UnavailableError, scale_for
from bench.cases import all_cases

DEVICE = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
CONTENDERS = [(case, peer) for case in all_cases(scale_for(DEVICE)) for peer in (None, *case.peers)]


def _finished(call: Callable[[], object]) -> Callable[[], None]:
    """The host's clock stops when the GPU has finished, not after the launch."""

    def run() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    return run


@pytest.mark.parametrize(
    ("case", "peer"),
    [pytest.param(case, peer, id=f"{case.name}/{peer.name if peer else measure.KVOPS}") for case, peer in CONTENDERS],
)
def test_operator(benchmark: Any, case: Case, peer: Peer | None) -> None:
    inputs = measure.build(case, DEVICE, DTYPE)
    try:
        call = (lambda: case.run(inputs)) if peer is None else peer.prepare(inputs)
        wrong = measure.complaint(case, inputs, DTYPE, call)
    except (UnavailableError, ImportError) as error:
        pytest.skip(measure.reason(error))
    if wrong and peer is not None:
        pytest.skip(f"wrong: {wrong}")
    assert not wrong, wrong
    benchmark.group = case.name
    benchmark.name = peer.name if peer else measure.KVOPS
    benchmark.extra_info |= {"flops": case.flops, "bytes": case.bytes(DTYPE.itemsize)}
    benchmark.pedantic(_finished(call), setup=lambda: measure.reset(case, inputs), rounds=10, warmup_rounds=2)
