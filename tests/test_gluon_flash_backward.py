"""The warp-specialised backward for Hopper: its arithmetic and protocol, and on a Hopper GPU its results."""

import inspect
import textwrap
from dataclasses import replace

import pytest
import torch
from autotune_fakes import H100, record
from gluon_memory import ProtocolError
from gluon_model import Multiprocessor
from hopper import on_hopper
from oracle import assert_accurate, attention, attention_backward, attention_mask
from rounding import rounded
from test_gluon_flash_forward import GPU_LENGTHS, batch_and_heads

from kvops.autotune import lookup, specs
from kvops.autotune.config import (
    GluonFlashBackwardConfig,
    gluon_flash_backward_keys_config,
    gluon_flash_backward_queries_config,
)
from kvops.autotune.devices import by_name
from kvops.autotune.prune import build_workload
from kvops.autotune.store import Layer, Store
from kvops.autotune.timing import relative_error
from kvops.kernels import flash_backward_launch as twin
from kvops.kernels import gluon_flash_backward as module
from kvops.kernels.device import Device
from kvops.kernels.gluon_flash_backward import gluon_flash_backward, launchable

HOPPER = Device("NVIDIA H100 80GB HBM3", "cuda", "sm_90", warp_size=32, num_sms=3, shared_memory=232_448)
KEYS, QUERIES = "gluon_flash_backward_keys_kernel", "gluon_flash_backward_queries_kernel"


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """``torch.empty`` comes filled with NaN: what nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU, as far as a launch function can tell."""
    monkeypatch.setattr(module, "current_device", lambda: HOPPER)


@pytest.fixture
def run(hopper, monkeypatch):
    """Runs the launch function on the model of a multiprocessor; returns the gradients and the models."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def run(*arguments, seed=0, replace_functions=None, **keywords):
        replaced = replace_functions or {}
        models = {name: Multiprocessor(getattr(module, name), seed, replaced.get(name)) for name in (KEYS, QUERIES)}
        with monkeypatch.context() as patch:
            for name, model in models.items():
                patch.setattr(module, name, model)
            return gluon_flash_backward(*arguments, **keywords), models

    return run


def small(stages=2, keys=(16, 16), queries=(16, 16), **changes):
    """Tiles that the hardware could not multiply, so that few tokens make many of them."""
    keys, queries = (GluonFlashBackwardConfig(*tile, stages, **changes) for tile in (keys, queries))
    return {"keys_config": keys, "queries_config": queries}


def inputs(batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, dtype, head_dim_v=None, device="cpu"):
    """dout, q, k and v."""
    head_dim_v = head_dim_v or head_dim
    shapes = ((seqlen_q, heads, head_dim_v), (seqlen_q, heads, head_dim), (seqlen_k, heads_kv, head_dim))
    shapes += ((seqlen_k, heads_kv, head_dim_v),)
    return [torch.randn(batch, *shape, device=device).to(dtype) for shape in shapes]


def attended(q, k, v, mask, scale=None, sinks=None):
    """out and lse as a forward gives them."""
    out, lse, _ = attention(q, k, v, mask=mask, scale=scale, sinks=sinks)
    return out.to(q.dtype), lse.float()


def assert_correct(
    run, dout, q, k, v, *, scale=None, sinks=None, dlse=None, seed=0, config=None, replace_functions=None, **window
):
    """Compare with autograd through the oracle."""
    mask = attention_mask(q.shape[1], k.shape[1], **window)
    leaves = [x.cpu().double().requires_grad_() for x in (q, k, v, *([] if sinks is None else [sinks]))]
    out, lse, _ = attention(*leaves[:3], mask=mask, scale=scale, sinks=leaves[3] if sinks is not None else None)
    outputs, gradients = [out], [dout.cpu().double()]
    if dlse is not None:
        outputs.append(lse.masked_fill(lse == float("-inf"), 0.0))
        gradients.append(dlse.cpu().double())
    exact = torch.autograd.grad(outputs, leaves, gradients)
    forward = out.detach().to(q.device, q.dtype), lse.detach().to(q.device, torch.float32)
    found, models = run(
        *(dout, q, k, v, *forward), scale=scale, sinks=sinks, dlse=dlse, seed=seed,
        replace_functions=replace_functions, **(config or small()), **window,
    )  # fmt: skip
    same = rounded(q.dtype, attention_backward, dout, q, k, v, *forward, mask=mask, scale=scale, sinks=sinks, dlse=dlse)
    for name, *values in zip(("dq", "dk", "dv", "dsinks"), found, exact, same):  # noqa: B905 - dsinks may be missing
        assert_accurate(*values, name)
    return found, models


# The kernels' own source on a model of the hardware


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("tiles", range(1, 11, 2))
def test_every_tile_is_used_once_whatever_the_order_of_events(run, tiles, stages):
    """Causal, so that the two consumers see different numbers of tiles, and three heads to a group."""
    seqlen = 16 * tiles - tiles % 5
    tensors = inputs(1, seqlen, 45, 3, 1, 16, torch.float16)
    for seed in range(2):
        _, models = assert_correct(run, *tensors, causal=True, seed=100 * tiles + seed, config=small(stages))
        seen = attention_mask(seqlen, 45, causal=True)
        pairs = [
            sum(
                bool(seen[row : row + rows, key : key + keys].any())
                for row in range(0, seqlen, rows)
                for key in range(0, 45, keys)
            )
            for rows, keys in ((16, 32), (32, 16))
        ]
        # The owned tiles of both consumers, K and V once a KV head or q and dO once a head, and every tile once:
        # of queries with dO, lse and delta, or of keys and values.
        assert len(models[KEYS].loaded) == 2 * 2 * 2 + 3 * 4 * pairs[0]
        assert len(models[QUERIES].loaded) == 3 * (-(-seqlen // 32) * 2 * 2 + 2 * pairs[1])


CASES = {
    "full": {},
    "causal": {"causal": True},
    "left": {"window_left": 11},
    "right": {"window_right": 7},
    "band": {"window_left": 37, "window_right": 5},
    "diagonal": {"window_left": 0, "window_right": 0},
    "sliding": {"causal": True, "window_left": 20},
    "wide": {"window_left": 10_000, "window_right": 10_000},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (1, 90), (70, 33), (33, 70), (97, 97)])
def test_the_source_computes_the_gradients(run, name, seqlen_q, seqlen_k):
    tensors = inputs(1, seqlen_q, seqlen_k, 3, 1, 24, torch.float16)
    assert_correct(run, *tensors, seed=1, **CASES[name])


@pytest.mark.parametrize("causal", [False, True])
def test_sinks_and_the_gradient_through_lse(run, causal):
    tensors = inputs(2, 40, 21, 4, 2, 16, torch.float16)
    assert_correct(run, *tensors, causal=causal, sinks=torch.randn(4), dlse=torch.randn(2, 4, 40))


@pytest.mark.parametrize("scale", [0.7, 0.0, -0.3])
def test_any_scale_will_do(run, scale):
    tensors = inputs(1, 40, 40, 2, 1, 16, torch.bfloat16)
    assert_correct(run, *tensors, causal=True, scale=scale)


def test_scores_far_from_zero_do_not_overflow(run):
    dout, q, k, v = inputs(1, 45, 51, 2, 1, 16, torch.float16)
    assert_correct(run, dout, 30 * q, 30 * k, v, window_left=30)


def test_rows_and_keys_that_see_nothing_have_no_gradient(run):
    tensors = inputs(1, 60, 20, 2, 2, 16, torch.float16)
    (dq, *_), _ = assert_correct(run, *tensors, causal=True)
    assert (dq[:, :40] == 0).all()
    tensors = inputs(1, 20, 60, 2, 2, 16, torch.float16)
    (_, dk, dv, _), _ = assert_correct(run, *tensors, window_left=3)
    assert (dk[:, :37] == 0).all()
    assert (dv[:, :37] == 0).all()


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "dtype"),
    [(64, 64, torch.bfloat16), (128, 128, torch.float16), (80, 48, torch.float16), (16, 120, torch.bfloat16)],
)
def test_head_sizes_are_padded_by_the_descriptors(run, head_dim, head_dim_v, dtype):
    tensors = inputs(1, 70, 150, 2, 1, head_dim, dtype, head_dim_v)
    width = 64 if max(head_dim, head_dim_v) <= 64 else 128
    config = {
        "keys_config": gluon_flash_backward_keys_config(width),
        "queries_config": gluon_flash_backward_queries_config(width),
    }
    assert_correct(run, *tensors, causal=True, config=config)


def test_free_strides_are_read_in_place(run):
    storage = torch.randn(2, 3, 50, 200).to(torch.float16)  # [batch, heads, tokens, dout | q | k | v | unused]
    tensors = [storage.transpose(1, 2)[..., 48 * i : 48 * (i + 1)] for i in range(4)]
    assert_correct(run, *tensors, causal=True)
    one = [x[:1, :, :1].as_strided((1, 50, 1, 48), (7, 200, 3, 1)) for x in tensors]  # strides that nobody follows
    assert_correct(run, *one)


def test_the_result_does_not_depend_on_the_order_of_events_or_of_works(run):
    dout, q, k, v = inputs(2, 75, 75, 4, 2, 16, torch.bfloat16)
    forward = attended(q, k, v, attention_mask(75, 75, causal=True))
    first, _ = run(dout, q, k, v, *forward, causal=True, **small())
    for changes in ({"stages": 4}, {"stages": 1}, {"section_bytes": 1}):
        again, _ = run(dout, q, k, v, *forward, causal=True, seed=7, **small(**changes))
        assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_it_agrees_with_the_triton_kernels(run, dtype):
    """float16 computed by both; the twin in float32 on the same numbers says that both mean the same."""
    dout, q, k, v = inputs(1, 70, 90, 4, 2, 24, torch.float16)
    sinks, options = torch.randn(4), {"causal": True, "window_left": 40}
    out, lse = attended(q, k, v, attention_mask(70, 90, **options), sinks=sinks)
    found, _ = run(dout, q, k, v, out, lse, sinks=sinks, **options, **small())
    theirs = twin.flash_backward(*(x.to(dtype) for x in (dout, q, k, v, out)), lse, sinks=sinks, **options)
    for ours, expected in zip(found, theirs, strict=True):
        rounding = torch.finfo(torch.float16).eps
        assert (ours.float() - expected.float()).abs().max() <= 4 * rounding * expected.abs().max()


def broken(kernel, name, old, new):
    """Builds the function ``name`` of the kernel's module with ``old`` replaced."""
    function = getattr(module, kernel).fn.__globals__[name].fn
    source = textwrap.dedent(inspect.getsource(function)).replace("@gluon.jit\n", "")
    assert old in source
    namespace = {}

    def build(model_globals):
        exec(source.replace(old, new), model_globals, namespace)
        return namespace[name]

    return build


MUTATIONS = {
    "no wait for a tile": ("_consumer", "mbarrier.wait(full.index(slot)", "(lambda *_: None)(full.index(slot)"),
    "no barrier before an arrival": ("give_back", "group_barrier()", "pass"),
    "tiles skipped unseen": ("skip", "mbarrier.wait(", "(lambda barrier, phase: None)("),
    "nothing skipped": ("skip", "range(first, last)", "range(first, first)"),
    "the slot refilled early": ("_producer", "mbarrier.wait(empty.index(slot)", "(lambda *_: None)(empty.index(slot)"),
    "a tile that is never given back": ("_consumer", "give_back(empty.index(slot))", "pass"),
    "the gradients not fenced": ("_consumer", "fence_async_shared()", "pass"),
    "stored before it was written": ("_producer", "mbarrier.wait(written.index(c), 0)", "pass"),
    "the end of the writing not told": ("_consumer", "give_back(written.index(CONSUMER))", "pass"),
    "too few bytes expected": ("_producer", "mbarrier.expect(arrived, ", "mbarrier.expect(arrived, -2 + "),
}
BEFORE_ITS_PRODUCTS_ARE_DONE = {
    KEYS: ("dk, dv = warpgroup_mma_wait(0", " " * 12),
    QUERIES: ("dq = warpgroup_mma_wait(0", " " * 8),
}


def gradients_with(run, seed, replaced):
    """With tiles so much smaller than what a consumer owns that several are skipped."""
    tensors = inputs(1, 100, 90, 2, 1, 16, torch.float16)
    config = small(keys=(16, 32), queries=(32, 16))
    assert_correct(run, *tensors, causal=True, window_left=20, seed=seed, config=config, replace_functions=replaced)


def assert_noticed(run, kernel, build):
    for seed in range(12):
        try:
            gradients_with(run, seed, {kernel: build})
        except (ProtocolError, AssertionError):
            return
    pytest.fail("it went unnoticed")


def test_the_model_notices_nothing_in_an_unbroken_protocol(run):
    for seed in range(4):
        gradients_with(run, seed, None)


@pytest.mark.parametrize("kernel", [KEYS, QUERIES])
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_model_notices_a_broken_protocol(run, kernel, name):
    assert_noticed(run, kernel, broken(kernel, *MUTATIONS[name]))


@pytest.mark.parametrize("kernel", [KEYS, QUERIES])
def test_the_model_notices_a_tile_that_is_given_back_early(run, kernel):
    wait, indent = BEFORE_ITS_PRODUCTS_ARE_DONE[kernel]
    assert_noticed(run, kernel, broken(kernel, "_consumer", wait, f"give_back(empty.index(slot))\n{indent}{wait}"))


# Where they run


@pytest.mark.parametrize("faster", [(), (KEYS,), (QUERIES,), (KEYS, QUERIES)], ids=str)
def test_each_runs_where_a_record_has_it_faster_than_its_twin(run, tmp_path, monkeypatch, faster):
    """The operator's launch function on a pretended H100: every combination gives the same gradients."""
    problem = {"width": 64, "itemsize": 2, "mask": 1, "heads": 2, "seqlen_q": 70, "seqlen_k": 90}
    layer = Layer("user", tmp_path, writable=True)
    for name in (KEYS, QUERIES):
        family = name.removesuffix("_kernel")
        assert layer.insert(record(family, us=90.0 if name in faster else 110.0, **problem))
        assert layer.insert(record(family.removeprefix("gluon_"), us=100.0, **problem))
    monkeypatch.setattr(twin, "current_device", lambda: HOPPER)
    monkeypatch.setattr(twin, "_hopper", lambda: module)
    models = {name: Multiprocessor(getattr(module, name), 1) for name in (KEYS, QUERIES)}
    for name, model in models.items():
        monkeypatch.setattr(module, name, model)

    def operator(*arguments, **options):
        for model in models.values():
            model.loaded.clear()
        wanted = {name: value for name, value in options.items() if name in ("causal", "alibi_slopes")}
        return twin.flash_backward(*arguments, **wanted), models

    tensors = inputs(1, 70, 90, 2, 1, 64, torch.float16)
    with lookup.using(Store([layer])):
        assert_correct(operator, *tensors, causal=True)
        assert tuple(name for name in models if models[name].loaded) == faster
        operator(*tensors, tensors[0], torch.zeros(1, 2, 70), alibi_slopes=torch.zeros(2), causal=True)
        assert not any(model.loaded for model in models.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the model of a multiprocessor")
@pytest.mark.parametrize("name", [KEYS, QUERIES])
def test_what_the_tuner_runs_is_the_kernel_held_to_its_reference(hopper, monkeypatch, name):
    spec = specs()[name.removesuffix("_kernel")]
    problem = {"width": 64, "itemsize": 2, "mask": 2, "heads": 2, "seqlen_q": 100, "seqlen_k": 150}
    monkeypatch.setattr(twin, "current_device", lambda: HOPPER)
    monkeypatch.setattr(twin, "_hopper", lambda: module)
    model = Multiprocessor(getattr(module, name), 1)
    monkeypatch.setattr(module, name, model)
    workload = build_workload(spec, problem, "cpu", True)
    with lookup.override(spec.name, spec.heuristic(problem, H100)):
        outputs = workload.run()
    assert model.loaded
    assert relative_error(outputs, workload.exact()) < torch.finfo(torch.bfloat16).eps


# What it refuses


def test_launchable_says_why_not(hopper, monkeypatch):
    dout, q, k, v = inputs(2, 8, 8, 4, 2, 64, torch.float16)
    assert launchable(dout, q, k, v) is None
    assert "float16 or bfloat16" in launchable(*(x.float() for x in (dout, q, k, v)))
    assert "head sizes up to 128" in launchable(*inputs(1, 8, 8, 1, 1, 136, torch.float16))
    assert "multiples of 8" in launchable(dout[..., :60], q, k, v[..., :60])
    assert "multiples of 8" in launchable(dout, q[..., :60], k[..., :60], v)
    assert launchable(dout, q, k, v, softcap=1.0) == "has no softcap"
    assert launchable(dout, q, k, v, alibi_slopes=torch.zeros(4)) == "has no ALiBi"
    assert launchable(dout, q, k, v, dropout_seed=torch.zeros(1)) == "has no dropout"
    assert "k to have elements" in launchable(dout, q, k[:, :0], v[:, :0])
    assert "q aligned" in launchable(dout, torch.zeros(2, 8, 4, 65, dtype=torch.float16)[..., 1:], k, v)
    assert "dout aligned" in launchable(dout[:, :1].expand(-1, 8, -1, -1), q, k, v)
    lse = torch.zeros(2, 4, 8)
    with pytest.raises(ValueError, match="gluon_flash_backward: has no ALiBi"):
        gluon_flash_backward(dout, q, k, v, dout, lse, alibi_slopes=torch.zeros(4))
    monkeypatch.setattr(module, "current_device", lambda: HOPPER._replace(arch="sm_100"))
    assert launchable(dout, q, k, v) == "needs a Hopper GPU (sm_90), this is sm_100"


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        (KEYS, {"block_n": 32}, "block_n to be a power of two from 64 on"),
        (KEYS, {"block_m": 16}, "block_m to be at least 32"),
        (QUERIES, {"block_m": 32}, "block_m to be a power of two from 64 on"),
        (QUERIES, {"block_n": 96}, "block_n"),
        (QUERIES, {"stages": 6}, "shared memory"),
        (KEYS, {"producer_registers": 32}, "2 x 240 + 32"),
    ],
)
def test_tiles_that_cannot_run_are_refused_with_the_reason(family, changes, reason):
    spec = specs()[family.removesuffix("_kernel")]
    problem = {**spec.problems[0], "width": 128}
    default = spec.heuristic(problem, H100)
    assert spec.refuse(default, problem, H100) is None
    assert reason in spec.refuse(replace(default, **changes), problem, H100)
    assert "head sizes up to 128" in spec.refuse(default, {**problem, "width": 256}, H100)
    assert "sm_80" in spec.refuse(default, problem, by_name("sm_80"))


# A Hopper GPU


def launched(*arguments, seed, replace_functions, keys_config=None, queries_config=None, **keywords):
    return gluon_flash_backward(*arguments, **keywords), None


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), GPU_LENGTHS)
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_it_computes_the_gradients(name, seqlen_q, seqlen_k, head_dim, dtype):
    batch, heads = batch_and_heads(seqlen_q, seqlen_k)
    tensors = inputs(batch, seqlen_q, seqlen_k, heads, heads // 3, head_dim, dtype, device="cuda")
    dlse = torch.randn(batch, heads, seqlen_q, device="cuda")
    assert_correct(launched, *tensors, sinks=torch.randn(heads, device="cuda"), dlse=dlse, **CASES[name])


@on_hopper
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_on_a_gpu_it_agrees_with_the_triton_kernels_and_repeats_itself(head_dim, causal, monkeypatch):
    from kvops.kernels.flash_forward import flash_forward

    monkeypatch.setattr(twin, "choose_proven", lambda *arguments, **options: None)
    dout, q, k, v = inputs(3, 2049, 1999, 16, 4, head_dim, torch.bfloat16, device="cuda")
    arguments = dout, q, k, v, *flash_forward(q, k, v, causal=causal)
    first = gluon_flash_backward(*arguments, causal=causal)
    for ours, theirs in zip(first, twin.flash_backward(*arguments, causal=causal), strict=True):
        if theirs.numel():
            rounding = torch.finfo(torch.bfloat16).eps
            assert (ours.float() - theirs.float()).abs().max() <= 4 * rounding * theirs.abs().max()
    for _ in range(20):
        assert all(map(torch.equal, first, gluon_flash_backward(*arguments, causal=causal)))
