"""The list of planted faults: each still names a place in the sources, and tests that are there."""

import shlex

import pytest
from mutations import MUTATIONS, ROOT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.fault)
def test_a_planted_fault_has_one_place_and_tests(mutation):
    """A change of that line needs a change of the fault in faults.py, and a run of ``make mutations``."""
    assert mutation.old != mutation.new
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    files = [word for word in shlex.split(mutation.tests) if word.endswith(".py")]
    assert files
    for file in files:
        assert (ROOT / file).is_file(), file


def test_no_fault_is_planted_twice():
    assert (
        len({mutation.fault for mutation in MUTATIONS}) == len({(m.file, m.new) for m in MUTATIONS}) == len(MUTATIONS)
    )
