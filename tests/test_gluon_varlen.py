"""Packed sequences in the warp-specialised forward for Hopper: each ends where the next begins."""

import inspect
import textwrap
from types import SimpleNamespace

import pytest
import torch
from gluon_memory import Descriptor, ProtocolError
from gluon_model import Multiprocessor
from no_sync import no_synchronisation
from oracle import assert_accurate, attention, attention_mask
from rounding import rounded
from test_gluon_flash_forward import CASES, HOPPER, on_hopper, small

from kvops.kernels import gluon_flash_forward as module
from kvops.kernels.gluon_flash_forward import gluon_flash_forward, gluon_flash_forward_varlen, launchable
from kvops.kernels.gluon_tiles import descriptor, rows_at

# Both kinds of nothing, one token, odd ones, several blocks, and more queries than keys.
LENGTHS = ((37, 37), (0, 19), (1, 1), (5, 90), (23, 0), (70, 33), (0, 0), (1, 40), (64, 64))


class Packed:
    """Sequences of (queries, keys) one after the other, and ``tail`` tokens of NaN that belong to nobody."""

    def __init__(self, lengths=LENGTHS, heads=(3, 1), dims=(24, 24), dtype=torch.float16, tail=5, device="cpu"):
        self.ends = [
            torch.tensor([0, *part], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
            for part in zip(*lengths, strict=True)
        ]
        self.longest = [max(part) for part in zip(*lengths, strict=True)]
        tokens = [int(ends[-1]) + tail for ends in self.ends]
        shapes = (tokens[0], heads[0], dims[0]), (tokens[1], heads[1], dims[0]), (tokens[1], heads[1], dims[1])
        self.tensors = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
        for tensor in self.tensors:
            tensor[tensor.shape[0] - tail :] = float("nan")

    @property
    def arguments(self):
        return *self.tensors, *self.ends, *self.longest

    def sequences(self):
        q, k, v = self.tensors
        for place in range(len(self.ends[0]) - 1):
            rows, keys = (slice(*ends[place : place + 2].tolist()) for ends in self.ends)
            yield rows, (q[None, rows], k[None, keys], v[None, keys])

    def assert_correct(self, out, lse, *, causal=False, window_left=-1, window_right=-1, **keywords):
        window = {"causal": causal, "window_left": window_left, "window_right": window_right}
        q, _, v = self.tensors
        assert out.shape == (*q.shape[:2], v.shape[2])

        def sequence_by_sequence():
            whole = torch.zeros(out.shape, dtype=torch.float64)
            whole_lse = torch.full(lse.shape, float("-inf"), dtype=torch.float64)
            for rows, tensors in self.sequences():
                tensors = [tensor.cpu() for tensor in tensors]
                mask = attention_mask(tensors[0].shape[1], tensors[1].shape[1], **window)
                part, part_lse, _ = attention(*tensors, mask=mask, **keywords)
                whole[rows], whole_lse[:, rows] = part[0], part_lse[0]
            return whole, whole_lse

        exact, same = sequence_by_sequence(), rounded(q.dtype, sequence_by_sequence)
        for name, *values in zip(("out", "lse"), (out, lse), exact, same, strict=True):
            assert_accurate(*values, name)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(module, "current_device", lambda: HOPPER)


@pytest.fixture
def run(hopper, monkeypatch):
    """Runs the launch function on the model of a multiprocessor."""

    def run(packed, *, seed=0, replace_functions=None, **keywords):
        model = Multiprocessor(module.gluon_flash_forward_kernel, seed, replace_functions)
        with monkeypatch.context() as patch:
            patch.setattr(module, "gluon_flash_forward_kernel", model)
            out, lse = gluon_flash_forward_varlen(*packed.arguments, **keywords)
        return out, lse, model

    return run


# The descriptor, as the hardware computes with it


@pytest.mark.parametrize("layout", ["contiguous", "fused", "one token"])
def test_a_descriptor_reads_and_writes_a_sequence_and_nothing_beside_it(layout):
    tokens = 1 if layout == "one token" else 40
    memory = torch.arange(tokens * 3 * 128, dtype=torch.float32).view(tokens, 3, 128).to(torch.bfloat16)
    tensor = memory[..., 16:80] if layout == "fused" else memory[..., :64].clone()
    if layout == "one token":
        tensor = tensor.as_strided(tensor.shape, (7, *tensor.stride()[1:]))  # a stride that nobody follows
    made = Descriptor(descriptor(tensor, 8, 64))
    slot = SimpleNamespace(data=torch.empty(1, 1, 8, 1, 64, dtype=torch.bfloat16))
    for first, length in ((0, tokens), (0, 1), (tokens - 1, 1), (3, 21), (17, 0), (9, 8)):
        if first + length > tokens:
            continue
        for row in (0, 5, 8, 16, 24, 48):
            place = coordinates(2, row, first, length)
            made.read(place, slot)
            left = min(8, max(0, length - row))
            read = slot.data[0, 0, :, 0]
            assert torch.equal(read[:left], tensor[first + row : first + row + left, 2])
            assert (read[left:] == 0).all()
            before, made.written = tensor.clone(), torch.zeros_like(made.written)
            slot.data.fill_(-1)
            made.write(place, slot)
            before[first + row : first + row + left, 2] = -1
            assert torch.equal(tensor, before)
            tensor.copy_(memory[..., 16:80] if layout == "fused" else memory[..., :64])


def coordinates(head, row, first, length):
    """Written out: what the addresses of the hardware are made of."""
    return 2**30, first + length, 2**30 - length + row, head, 0


def test_coordinates_are_those_of_the_kernel(monkeypatch):
    monkeypatch.setitem(rows_at.fn.__globals__, "TURN", 2**30)
    assert rows_at.fn(7, 2, 30, 1000, 40, True) == coordinates(2, 30, 1000, 40)
    assert rows_at.fn(7, 2, 30, 0, 40, False) == (7, 30, 2, 0)


# The kernel's own source on a model of the hardware


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_source_computes_attention_of_each_sequence(run, name, persistent):
    packed = Packed()
    out, lse, _ = run(packed, config=small(persistent=persistent), seed=1, **CASES[name])
    packed.assert_correct(out, lse, **CASES[name])


@pytest.mark.parametrize("stages", [2, 3])
def test_the_order_of_events_does_not_matter(run, stages):
    packed = Packed(lengths=((33, 50), (0, 4), (2, 3), (40, 40)), heads=(2, 2), dims=(16, 16))
    first = run(packed, causal=True, config=small(stages))
    packed.assert_correct(*first[:2], causal=True)
    for seed in range(1, 6):
        again = run(packed, causal=True, config=small(stages), seed=seed)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_sinks_and_head_sizes_of_their_own(run):
    packed = Packed(heads=(4, 2), dims=(40, 16), dtype=torch.bfloat16)
    sinks = torch.randn(4)
    out, lse, _ = run(packed, causal=True, sinks=sinks, config=small())
    packed.assert_correct(out, lse, causal=True, sinks=sinks)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_left": 20, "window_right": 3}], ids=str)
def test_each_sequence_gets_the_bits_of_the_dense_kernel(run, monkeypatch, options):
    packed = Packed()
    out, lse, _ = run(packed, config=small(), **options)
    for rows, tensors in packed.sequences():
        if 0 in tensors[0].shape or 0 in tensors[1].shape:
            continue
        model = Multiprocessor(module.gluon_flash_forward_kernel, 3)
        with monkeypatch.context() as patch:
            patch.setattr(module, "gluon_flash_forward_kernel", model)
            alone, alone_lse = gluon_flash_forward(*tensors, config=small(), **options)
        assert torch.equal(out[rows], alone[0])
        assert torch.equal(lse[:, rows], alone_lse[0])


@pytest.mark.parametrize("poisoned", [0, 3, 5, 8])
def test_nan_in_a_neighbour_does_not_leak(run, poisoned):
    """Its rows fill the end of the last tile of the sequence before: 0 * NaN would be NaN."""
    packed = Packed()
    clean = run(packed, causal=True, config=small())
    for tensor, ends in zip(packed.tensors, (packed.ends[0], packed.ends[1], packed.ends[1]), strict=True):
        tensor[ends[poisoned] : ends[poisoned + 1]] = float("nan")
    out, lse, _ = run(packed, causal=True, config=small())
    others = torch.ones(out.shape[0], dtype=torch.bool)
    others[packed.ends[0][poisoned] : packed.ends[0][poisoned + 1]] = False
    assert torch.equal(out[others], clean[0][others])
    assert torch.equal(lse[:, others], clean[1][:, others])
    assert not out[others].isnan().any()


def test_what_belongs_to_nobody_and_who_sees_nothing(run):
    packed = Packed(tail=7)
    out, lse, _ = run(packed, config=small(), sinks=torch.zeros(3))
    blind = slice(*packed.ends[0][4:6].tolist())
    for rows in (blind, slice(-7, None)):
        assert (out[rows] == 0).all()
        assert (lse[:, rows] == float("-inf")).all()


def test_works_past_the_end_load_nothing(run):
    """The longest sequence decides how many there are: five short ones and a long one."""
    packed = Packed(lengths=((1, 16),) * 5 + ((320, 16),), heads=(2, 1), tail=0)
    out, lse, model = run(packed, config=small())
    packed.assert_correct(out, lse)
    works = 2 * (5 + 10)
    assert len(model.loaded) == works * 4  # two halves of the queries, a tile of K and of V


def test_free_strides_are_read_in_place(run):
    packed = Packed(heads=(2, 2), dims=(48, 48))
    fused = torch.full((packed.tensors[0].shape[0], 2, 3, 48), float("nan"), dtype=torch.float16)
    packed.ends[1], packed.longest[1] = packed.ends[0], packed.longest[0]
    for place in range(3):
        fused[: packed.ends[0][-1], :, place] = torch.randn(int(packed.ends[0][-1]), 2, 48).half()
    packed.tensors = [fused[:, :, place] for place in range(3)]
    out, lse, _ = run(packed, config=small(), causal=True)
    packed.assert_correct(out, lse, causal=True)


def test_no_sequences_and_no_queries_launch_nothing(run):
    packed = Packed(lengths=((0, 9), (0, 3)), tail=2)
    out, lse, model = run(packed, config=small())
    assert not model.loaded
    assert (out == 0).all()
    assert (lse == float("-inf")).all()


def test_the_host_neither_waits_nor_looks_at_the_lengths(hopper):
    packed, traces = Packed(), []
    for fill in (torch.clone, torch.zeros_like):
        packed.ends = [fill(ends) for ends in packed.ends]
        with no_synchronisation(run_kernels=False) as trace:
            gluon_flash_forward_varlen(*packed.arguments, causal=True)
        traces.append(trace)
    assert len(traces[0].launches) == 1
    assert traces[0] == traces[1]


def broken(name, old, new):
    function = module.gluon_flash_forward_kernel.fn.__globals__[name]
    source = textwrap.dedent(inspect.getsource(function.fn)).replace("@gluon.jit\n", "")
    assert old in source
    namespace = {}

    def build(model_globals):
        exec(source.replace(old, new), model_globals, namespace)
        return namespace[name]

    return build


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("rows_at", "TURN - length + row", "TURN - length - 16 + row"),  # another address
        ("rows_at", "TURN, first + length, TURN - length + row", "TURN, first + TURN, row"),  # no end
        ("sequence", "cu_seqlens_ptr + batch + 1", "cu_seqlens_ptr + batch + 2"),
        ("_producer", "not PACKED or row < length_q", "True"),  # loads what no consumer takes
        ("_consumer", "not PACKED or block_row < length_q", "True"),  # takes what nobody loads
        ("_consumer", "row + rows < length_q", "row + rows < seqlen_q"),  # lse of the neighbour's rows
        ("_consumer", "head * seqlen_q + first_q + row", "head * seqlen_q + row"),
        ("_producer", "length_k - length_q if PACKED", "0 if PACKED"),  # causal, aligned to the first key
        ("_consumer", "length_k - length_q if PACKED", "0 if PACKED"),
    ],
)
def test_the_model_notices_a_mistake(run, name, old, new):
    packed = Packed(lengths=((20, 40), (33, 7), (0, 5), (3, 21)), heads=(2, 1))
    noticed = 0
    for seed in range(4):
        try:
            out, lse, _ = run(packed, causal=True, config=small(), seed=seed, replace_functions=broken(name, old, new))
            packed.assert_correct(out, lse, causal=True)
        except (ProtocolError, AssertionError, RuntimeError, IndexError):
            noticed += 1
    assert noticed


# What it refuses


def test_launchable_says_why_not(hopper):
    q, k, v = Packed(tail=0, dims=(64, 64)).tensors
    assert launchable(q, k, v) is None
    assert "float16 or bfloat16" in launchable(q.float(), k.float(), v.float())
    assert "k to have elements" in launchable(q, k[:0], v[:0])
    assert "ALiBi" in launchable(q, k, v, alibi_slopes=torch.zeros(3))
    assert "v aligned" in launchable(q, k, torch.zeros(*v.shape[:2], 68, dtype=torch.float16)[..., :64])
    assert "at most 2^30 tokens" in launchable(q, k.new_zeros(1, 1, 64).expand(2**30 + 1, 1, 64), v)
    with pytest.raises(ValueError, match="gluon_flash_forward: has no ALiBi"):
        gluon_flash_forward_varlen(*Packed().arguments, alibi_slopes=torch.zeros(3))


# A Hopper GPU


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_it_computes_attention_of_each_sequence(name, head_dim, dtype):
    lengths = (*LENGTHS, (400, 700), (129, 128), (1, 900), (300, 20))
    packed = Packed(lengths=lengths, heads=(6, 2), dims=(head_dim, head_dim), dtype=dtype, device="cuda")
    out, lse = gluon_flash_forward_varlen(*packed.arguments, **CASES[name])
    packed.assert_correct(out.cpu(), lse.cpu(), **CASES[name])
    again = gluon_flash_forward_varlen(*packed.arguments, **CASES[name])
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])
