"""The benchmarks measure what they say: cases hold to their oracles, counts to brute force, reports to results."""

import pytest
import torch

from bench import measure
from bench.case import SCALES, Case, UnavailableError
from bench.cases import all_cases

TINY = all_cases(SCALES["tiny"])
CPU = torch.device("cpu")

every_case = pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)


def check(case: Case, run, inputs) -> str:
    """The complaint about the outputs of ``run``, empty where they are right."""
    if case.reset is not None:
        case.reset(inputs)
    exact, similar = case.oracle(inputs, torch.float64), case.oracle(inputs, torch.float32)
    if case.reset is not None:
        case.reset(inputs)
    return measure.compare(case, inputs, run(), exact, similar)[2]


@every_case
def test_the_operator_and_its_peers_agree_with_the_oracle(case):
    inputs = measure.build(case, CPU, torch.float32)
    assert check(case, lambda: case.run(inputs), inputs) == ""
    assert check(case, lambda: case.run(inputs), inputs) == "", "a second call, after reset"
    ran = 0
    for peer in case.peers:
        try:
            call = peer.prepare(inputs)
        except (UnavailableError, ImportError):
            continue
        assert check(case, call, inputs) == "", peer.name
        ran += 1
    assert ran, "no peer of this case runs on a CPU"


def test_every_family_has_cases_at_every_scale():
    names = {name: {case.op for case in all_cases(scale)} for name, scale in SCALES.items()}
    assert names["full"] == names["cpu"] == names["tiny"]
