"""The random numbers of verification: Philox, uniforms and the numbers of a race."""

import pytest
import speculation
import torch

from kvops.eager import philox


def test_few_numbers_are_those_of_many():
    """Few are drawn one by one."""
    seed, step = torch.randint(-(2**63), 2**63 - 1, (2, 40, 1))
    position = torch.arange(3)
    many = philox.uniform(philox.ACCEPT, position, seed, step)
    few = [philox.uniform(philox.ACCEPT, position, *each) for each in zip(seed, step, strict=True)]
    assert torch.equal(torch.stack(few), many)
    assert philox.uniform(philox.ACCEPT, position[0], seed[0, 0], step[0, 0]) == many[0, 0]


def test_philox_gives_the_published_numbers():
    """The known answers of Random123, counter and key of zeros, ones and the digits of pi."""
    cases = [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, seed, answer in cases:
        words = philox.philox(*torch.tensor(counter), torch.tensor(seed))
        assert tuple(int(word) for word in words) == answer
        assert tuple(speculation.philox(counter, seed)) == answer


def test_uniforms_stay_inside_0_and_1():
    u = philox.uniform_from_bits(torch.tensor([0, 1, 2**24, 2**31, 2**32 - 1]))
    assert u[0] == 2.0**-33
    assert u[-1] == 1 - 2.0**-24
    assert (u.diff() > 0).all()
    assert ((-torch.log1p(-u)).isfinite() & (-torch.log1p(-u) > 0)).all()


@pytest.mark.parametrize(("groups", "width"), [(1, 1), (1, 255), (1, 256), (1, 700), (2, 1024), (5, 1024)])
def test_numbers_of_a_race_do_not_depend_on_the_vocabulary(groups, width):
    one = torch.tensor([3])
    of_groups, of_entries = philox.race_exponentials(one, one, one, groups, width)
    all_groups, all_entries = philox.race_exponentials(one, one, one, 7, 1024)
    assert torch.equal(of_groups, all_groups[:, : groups if groups > 1 else 0])
    assert torch.equal(of_entries, all_entries[:, :width])
    assert torch.cat((all_groups, all_entries), 1).unique().numel() == 7 + 1024
