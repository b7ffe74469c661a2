"""No operator waits for the device, and no grid or buffer depends on what the tensors hold: all can be captured."""

import importlib

import pytest
import torch
from no_sync import SynchronisationError, no_synchronisation
from test_contracts import BLOCK_SIZE, HKV, HQ, SAMPLES, B, D, T, every_operator, int32, kernel_functions
from torch._subclasses.fake_tensor import FakeTensorMode

import kvops


def launch_function(name):
    module, function = kernel_functions()[name].split(":")
    return getattr(importlib.import_module(module), function)


def with_tensors(change, args, keywords):
    def changed(value):
        return change(value) if isinstance(value, torch.Tensor) else value

    return [changed(value) for value in args], {key: changed(value) for key, value in keywords.items()}


def other_data(tensor):
    """The same shape and strides, filled with something else: lengths from 0 to the whole table."""
    new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    if tensor.dtype.is_floating_point:
        return new.copy_(torch.randn(tensor.shape))
    return new.copy_(torch.randint(0, 2 if tensor.dtype == torch.bool else 13, tensor.shape))


def uniform():
    """A 4-D cache, whose heads share the schedule."""
    cache = torch.randn(5, BLOCK_SIZE, HKV, D)
    return (torch.randn(B, 1, HQ, D), cache, cache, int32([0, 1, 2], [3, 4, 0]), int32(12, 7)), {
        "scores": torch.rand(5, BLOCK_SIZE, HKV)
    }


def float8():
    args, _ = SAMPLES["paged_attention"]()
    caches = (cache.to(torch.float8_e4m3fn) for cache in args[1:3])
    return (args[0], *caches, *args[3:]), {"k_scale": torch.rand(HKV), "v_scale": torch.rand(HKV)}


def drafts_in_a_tree():
    args, keywords = SAMPLES["paged_attention"]()
    tree = torch.ones(T, T, dtype=torch.bool).tril()
    return args, {"tree_mask": tree, "q_lens": int32(3, 1), "scores": keywords["scores"], "score_reduce": "sumsq"}


def a_chunk_of_prefill():
    args, keywords = SAMPLES["paged_attention"]()
    return (torch.randn(B, 70, HQ, D), *args[1:]), {"window_left": 5, "scores": keywords["scores"]}


def a_planned_step():
    args, _ = SAMPLES["paged_attention"]()
    return args, {"schedule": kvops.paged_schedule(args[4], BLOCK_SIZE, num_programs=9)}


def batch_invariant():
    args, keywords = SAMPLES["paged_attention"]()
    return args, {"batch_invariant": True, "scores": keywords["scores"]}


def decoding_and_prefill_packed():
    args, keywords = SAMPLES["paged_attention"]()
    q = torch.randn(70, HQ, D)
    options = {"cu_seqlens_q": int32(0, 1, 68), "max_seqlen_q": 67, "out": torch.randn(70, HQ, args[2].shape[-1])}
    return (q, *args[1:]), options | {"scores": keywords["scores"], "score_last": 2, "alibi_slopes": torch.rand(HQ)}


def packed_decoding():
    args, _ = SAMPLES["paged_attention"]()
    return (torch.randn(2, HQ, D), *args[1:]), {"cu_seqlens_q": int32(0, 1, 2), "max_seqlen_q": 1}


def packed_tokens():
    (k, v, *cache), _ = SAMPLES["paged_append"]()
    return (k.flatten(0, 1), v.flatten(0, 1), *cache), {"cu_seqlens_q": int32(0, 1, 6), "max_seqlen_q": 5}


def every_head_for_itself():
    args, _ = SAMPLES["select_blocks"]()
    return args, {"min_per_head": 2, "scope": "head"}


# The paths of the paged operators that their one sample in test_contracts does not take.
PATHS = [
    *((name, sample) for name, sample in SAMPLES.items()),
    *(
        ("paged_attention", path)
        for path in (
            *(uniform, float8, drafts_in_a_tree, a_chunk_of_prefill, a_planned_step, batch_invariant),
            *(decoding_and_prefill_packed, packed_decoding),
        )
    ),
    ("paged_append", packed_tokens),
    ("select_blocks", every_head_for_itself),
]
every_path = pytest.mark.parametrize(("name", "sample"), PATHS, ids=[sample.__name__ for _, sample in PATHS])


@every_path
def test_a_launch_neither_waits_for_the_device_nor_reads_what_tensors_hold(name, sample):
    """On tensors without data every read of a value raises, and every shape that depends on one."""
    args, keywords = sample()
    with FakeTensorMode() as mode:
        args, keywords = with_tensors(mode.from_tensor, args, keywords)
        with no_synchronisation(run_kernels=False) as trace:
            launch_function(name)(*args, **keywords)
    assert trace.launches


@every_path
def test_grids_and_buffers_follow_from_shapes_alone(name, sample):
    args, keywords = sample()
    traces = []
    for data in (torch.clone, torch.zeros_like, other_data):
        args, keywords = with_tensors(data, args, keywords)
        with no_synchronisation(run_kernels=False) as trace:
            launch_function(name)(*args, **keywords)
        traces.append(trace)
    assert traces[0].launches == traces[1].launches == traces[2].launches
    assert traces[0].allocations == traces[1].allocations == traces[2].allocations
    assert traces[0].allocations or name in ("paged_append", "copy_blocks")


@every_operator
def test_every_operator_has_a_path_here(name):
    assert name in dict(PATHS)


def test_a_whole_step_of_operators_is_watched_inside_the_operators(monkeypatch, device):
    """Appending, attending with scores, selecting and compacting, through torch.ops, with kernels that do run."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    args, keywords = with_tensors(lambda tensor: tensor.to(device), *SAMPLES["paged_append"]())
    cache, scores, positions = args[2:], keywords["scores"], keywords["positions"]
    q, budget = torch.randn(B, T, HQ, D, device=device), torch.full((B,), 3, dtype=torch.int32, device=device)

    def step():
        kvops.paged_append(*args, **keywords)
        schedule = kvops.paged_schedule(cache[3], BLOCK_SIZE)
        out, _ = kvops.paged_attention(q, *cache, q_lens=keywords["q_lens"], scores=scores, schedule=schedule)
        _, keep = kvops.select_blocks(scores, *cache[2:], budget, scope="sequence")
        return out, kvops.compact(*cache, keep, positions=positions, scores=scores)

    with no_synchronisation() as trace:
        out, freed = step()
    kernels = {kernel for kernel, *_ in trace.launches}
    assert {"paged_append_kernel", "paged_schedule_kernel", "paged_attention_kernel", "move_slots_kernel"} <= kernels
    assert out.isfinite().all()
    assert freed.sum() > 0


@pytest.mark.parametrize("without_data", [True, False])
@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: int(x[0]),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, x[:1]),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.to(device="cpu"),
        lambda x: torch.tensor([1], device=x.device),
        lambda x: 1 if x.max() > 0 else 0,
        lambda x: x.new_empty(x.sum().to(torch.int64)),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_synchronises_is_found(reads, without_data):
    x = torch.ones(3)
    if without_data:
        with FakeTensorMode() as mode:
            x = mode.from_tensor(x)
            with no_synchronisation(), pytest.raises((SynchronisationError, RuntimeError)):
                reads(x)
    else:
        with no_synchronisation(), pytest.raises(SynchronisationError):
            reads(x)


def test_a_buffer_or_a_grid_that_follows_data_is_found():
    from kvops.kernels.paged_schedule import paged_schedule_kernel

    def trace(size):
        with no_synchronisation(run_kernels=False) as trace:
            torch.empty(3).new_empty(size)
            paged_schedule_kernel[(size,)](None)
        return trace

    assert trace(3) == trace(3)
    assert trace(3).allocations != trace(4).allocations
    assert trace(3).launches != trace(4).launches
