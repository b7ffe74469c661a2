"""Dense attention through tensor descriptors (TMA): the bits of the pointers, wherever the tensors allow it."""

from dataclasses import replace

import pytest
import torch

from kvops.autotune.architectures import has_tma
from kvops.autotune.config import (
    flash_backward_keys_config,
    flash_backward_queries_config,
    flash_forward_config,
)
from kvops.autotune.inspect import TARGETS
from kvops.kernels import flash_backward_launch, flash_forward
from kvops.kernels.dense import describable


class Descriptors:
    """Which way the next launches read what they walk, and how many descriptors they made."""

    def __init__(self, monkeypatch):
        self.wanted, self.made = True, 0
        for launcher in (flash_forward, flash_backward_launch):
            self._watch(monkeypatch, launcher, launcher.choose, launcher.descriptor)

    def _watch(self, monkeypatch, launcher, choose, make):
        def counted(*arguments):
            self.made += 1
            return make(*arguments)

        monkeypatch.setattr(launcher, "choose_proven", lambda *arguments, **options: None)
        monkeypatch.setattr(launcher, "choose", lambda *a: replace(choose(*a), descriptors=self.wanted))
        monkeypatch.setattr(launcher, "descriptor", counted)

    def both_ways(self, function, *arguments, made=2, **options):
        """The results through descriptors, of which there are ``made``, and through pointers."""
        results = []
        for self.wanted in (True, False):
            self.made = 0
            results.append(function(*arguments, **options))
            assert self.made == (made if self.wanted else 0)
        return results


@pytest.fixture
def descriptors(monkeypatch):
    torch.use_deterministic_algorithms(True)  # torch.empty comes filled with NaN
    yield Descriptors(monkeypatch)
    torch.use_deterministic_algorithms(False)


def assert_same_bits(results):
    for tensor, other in zip(*results, strict=True):
        assert not tensor.isnan().any()
        assert torch.equal(tensor, other)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 45, 70, 6, 2, 40, 24), {"causal": True}),
        ((1, 70, 101, 3, 1, 64, 64), {"causal": True, "window_left": 40, "softcap": 4.0}),
        ((2, 33, 64, 2, 2, 16, 72), {}),
        ((1, 1, 1, 1, 1, 8, 8), {"causal": True}),
    ],
    ids=["grouped", "window", "full", "one token"],
)
def test_gives_the_bits_of_pointers(descriptors, device, shape, options):
    batch, queries, keys, heads, kv_heads, width, width_v = shape
    q = torch.randn(batch, queries, heads, width, device=device).half()
    k = torch.randn(batch, keys, kv_heads, width, device=device).half()
    v = torch.randn(batch, keys, kv_heads, width_v, device=device).half()
    assert_same_bits(descriptors.both_ways(flash_forward.flash_forward, q, k, v, **options))


def test_reads_views_in_place(descriptors, device):
    """Heads of one projection side by side, then a time-major batch, with NaN where no element of a view lies."""
    fused = torch.full((2, 40, 7, 48), float("nan"), device=device).half()
    fused[..., :6, :32] = torch.randn(2, 40, 6, 32)
    q, k, v = fused[:, :, :4, :32], fused[:, :, 4:5, :32], fused[:, :, 5:6, :32]
    assert_same_bits(descriptors.both_ways(flash_forward.flash_forward, q, k, v, causal=True))
    q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    assert_same_bits(descriptors.both_ways(flash_forward.flash_forward, q, k, v, causal=True))


@pytest.mark.parametrize(
    "options", [{"causal": True}, {"window_left": 20, "window_right": 3}], ids=["causal", "window"]
)
def test_a_packed_sequence_ends_where_the_next_begins(descriptors, device, options):
    """What stands behind a sequence is read by its last tile and must not count, not even as 0 * NaN."""
    lengths_q, lengths_k = torch.tensor([30, 0, 1, 40]), torch.tensor([50, 7, 0, 40])
    cu_q, cu_k = (torch.cat([n.new_zeros(1), n.cumsum(0)]).int().to(device) for n in (lengths_q, lengths_k))
    q = torch.randn(80, 4, 24, device=device).half()
    k, v = torch.randn(2, 110, 2, 24, device=device).half()
    for start in (50, 97):  # the sequence of which no query sees a key, and what belongs to nobody
        k[start : start + 7], v[start : start + 7] = float("nan"), float("inf")
    results = descriptors.both_ways(flash_forward.flash_forward_varlen, q, k, v, cu_q, cu_k, 40, 50, **options)
    assert_same_bits(results)


def backward_inputs(shape, device):
    batch, queries, keys, heads, kv_heads, width, width_v = shape
    q = torch.randn(batch, queries, heads, width, device=device).half()
    k = torch.randn(batch, keys, kv_heads, width, device=device).half()
    v = torch.randn(batch, keys, kv_heads, width_v, device=device).half()
    out, dout = torch.randn(2, batch, queries, heads, width_v, device=device).half()
    lse = torch.randn(batch, heads, queries, device=device) + 4
    return dout, q, k, v, out, lse


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 45, 70, 6, 2, 40, 24), {"causal": True}),
        ((1, 70, 101, 3, 1, 64, 64), {"causal": True, "window_left": 40, "softcap": 4.0}),
        ((2, 70, 33, 2, 2, 16, 72), {}),
        ((1, 1, 1, 1, 1, 8, 8), {"causal": True}),
    ],
    ids=["grouped", "window", "full", "one token"],
)
def test_gradients_have_the_bits_of_pointers(descriptors, device, shape, options):
    given = backward_inputs(shape, device)
    assert_same_bits(descriptors.both_ways(flash_backward_launch.flash_backward, *given, made=4, **options))


def test_gradients_of_packed_sequences_come_through_pointers(descriptors, device):
    """A descriptor would read the next sequence, here all NaN, and 0 * NaN is none."""
    dout, q, k, v, out, lse = (x[0] for x in backward_inputs((1, 60, 60, 2, 1, 16, 16), device))
    cu_seqlens = torch.tensor([0, 25, 40], dtype=torch.int32, device=device)
    for tensor in (dout, q, k, v, out):
        tensor[40:] = float("nan")
    descriptors.wanted = True
    lengths = cu_seqlens, cu_seqlens, 25, 25
    gradients = flash_backward_launch.flash_backward_varlen(dout, q, k, v, out, lse, *lengths, causal=True)
    assert descriptors.made == 0
    assert not any(gradient[:40].isnan().any() for gradient in gradients[:3])


def test_what_tma_cannot_read_comes_through_pointers(descriptors, device):
    k = torch.randn(1, 40, 2, 64, device=device).half()
    odd = torch.randn(40 * 2 * 65 + 1, device=device).half()
    pointers_only = {
        "a row that is no multiple of 16 bytes": odd[:-1].view(1, 40, 2, 65)[..., :64],
        "a base that is no multiple of 16 bytes": odd[1 : 1 + 40 * 2 * 64].view(1, 40, 2, 64),
        "float32": k.float(),
        "an expanded head": k[:, :, :1].expand(1, 40, 2, 64),
        "no keys": k[:, :0],
    }
    assert describable(k)
    # The stride of a single entry may be anything.
    assert describable(k.as_strided((1, 40, 2, 64), (3, 128, 64, 1)))
    for what, tensor in pointers_only.items():
        assert not describable(tensor), what
        q = torch.randn(1, 3, 2, 64, device=device).to(tensor.dtype)
        descriptors.made = 0
        flash_forward.flash_forward(q, tensor, tensor)
        assert descriptors.made == 0, what


def test_are_chosen_where_there_is_tma_and_16_bits():
    for arch in (*TARGETS, "interpreter"):
        assert flash_forward_config(128, 2, 4096, arch).descriptors == has_tma(arch)
        assert not flash_forward_config(128, 4, 4096, arch).descriptors
        for width in (64, 128):
            assert flash_backward_queries_config(width, 2, 4096, arch).descriptors == has_tma(arch)
            assert flash_backward_keys_config(width, 2, arch).descriptors == has_tma(arch)
            assert not flash_backward_keys_config(width, 4, arch).descriptors
