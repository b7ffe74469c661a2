"""The warp-specialised forward for Hopper: its arithmetic and protocol, and on a Hopper GPU its results."""

from dataclasses import replace

import pytest
import torch
from gluon_memory import ProtocolError
from gluon_model import Multiprocessor
from hopper import on_hopper
from oracle import assert_accurate, attention, attention_mask
from rounding import LEVELS, error_of_half, rounded

from kvops.autotune.config import GluonFlashForwardConfig, gluon_flash_forward_config
from kvops.kernels import gluon_flash_forward as module
from kvops.kernels.device import Device
from kvops.kernels.gluon_flash_forward import gluon_flash_forward, launchable
from kvops.kernels.gluon_tiles import key_tiles, work_item

HOPPER = Device("NVIDIA H100 80GB HBM3", "cuda", "sm_90", warp_size=32, num_sms=3, shared_memory=232_448)


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU with three multiprocessors, as far as a launch function can tell."""
    monkeypatch.setattr(module, "current_device", lambda: HOPPER)


@pytest.fixture
def run(hopper, monkeypatch):
    """Runs the launch function on the model of a multiprocessor."""

    def run(*arguments, seed=0, replace_functions=None, **keywords):
        model = Multiprocessor(module.gluon_flash_forward_kernel, seed, replace_functions)
        with monkeypatch.context() as patch:
            patch.setattr(module, "gluon_flash_forward_kernel", model)
            out, lse = gluon_flash_forward(*arguments, **keywords)
        return out, lse, model

    return run


def small(stages=2, block_rows=16, block_n=16, **changes) -> GluonFlashForwardConfig:
    """Tiles that the hardware could not multiply, so that few tokens make many of them."""
    return replace(GluonFlashForwardConfig(block_rows, block_n, stages, 240, 24), **changes)


def inputs(batch, seqlen_q, seqlen_k, heads, heads_kv, head_dim, dtype, head_dim_v=None, device="cpu"):
    q = torch.randn(batch, seqlen_q, heads, head_dim, device=device).to(dtype)
    k = torch.randn(batch, seqlen_k, heads_kv, head_dim, device=device).to(dtype)
    v = torch.randn(batch, seqlen_k, heads_kv, head_dim_v or head_dim, device=device).to(dtype)
    return q, k, v


def assert_correct(out, lse, q, k, v, *, causal=False, window_left=-1, window_right=-1, **keywords):
    mask = attention_mask(q.shape[1], k.shape[1], causal=causal, window_left=window_left, window_right=window_right)
    arguments = [tensor.cpu() for tensor in (q, k, v)]
    keywords = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in keywords.items()}
    exact_out, exact_lse, _ = attention(*arguments, mask=mask, **keywords)
    same_out, same_lse, _ = rounded(q.dtype, attention, *arguments, mask=mask, **keywords)
    assert_accurate(out, exact_out, same_out, "out")
    assert_accurate(lse, exact_lse, same_lse, "lse")


# Which tiles of keys a block of queries needs


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k"),
    [(1, 1), (1, 200), (200, 1), (64, 64), (63, 129), (150, 97), (97, 150), (128, 16), (33, 512)],
)
@pytest.mark.parametrize(("left", "right"), [(-1, -1), (-1, 0), (0, 0), (5, 0), (-1, 3), (17, -1), (40, 9), (70, 70)])
def test_key_tiles_agree_with_the_dense_mask(seqlen_q, seqlen_k, left, right, block):
    mask = attention_mask(seqlen_q, seqlen_k, window_left=left, window_right=right)
    offset = seqlen_k - seqlen_q
    tiles = -(-seqlen_k // block)
    for rows in (16, 64, 128):
        before = 0, 0
        for row in range(0, seqlen_q + rows, rows):
            first, full_first, full_last, last = key_tiles.fn(
                row,
                min(rows, seqlen_q - row),
                offset - left,
                offset + right + 1,
                seqlen_k,
                left >= 0,
                right >= 0,
                block,
            )
            assert 0 <= first <= full_first <= full_last <= last <= tiles
            seen = mask[row : row + rows]
            for tile in range(tiles):
                part = seen[:, tile * block : (tile + 1) * block]
                assert part.any().item() <= (first <= tile < last), "a tile with a visible key is left out"
                if full_first <= tile < full_last:
                    assert part.shape[1] == block, "a partial tile counts as full"
                    assert part.all()
            if seen.any():
                visible = seen.any(0).nonzero().flatten()
                assert (first, last) == (int(visible[0]) // block, int(visible[-1]) // block + 1)
                # Tiles walk forward with the rows: a consumer's lie among those of its block.
                assert before <= (first, last)
                before = first, last


def test_most_tiles_of_a_long_causal_sequence_need_no_mask():
    first, full_first, full_last, last = key_tiles.fn(1024, 64, 0, 1, 4096, False, True, 128)
    assert (first, full_first, full_last, last) == (0, 0, 8, 9)


@pytest.mark.parametrize(
    ("blocks", "heads", "section"), [(1, 1, 1), (5, 7, 3), (4, 6, 6), (3, 8, 2), (9, 1, 1), (2, 5, 4)]
)
def test_each_block_of_each_head_is_worked_on_once_and_the_last_rows_first(blocks, heads, section):
    works = [work_item.fn(work, blocks, heads, section, section * blocks) for work in range(blocks * heads)]
    assert sorted(works) == [(block, head) for block in range(blocks) for head in range(heads)]
    for first in range(0, heads, section):
        part = works[first * blocks : (first + section) * blocks]
        assert {head for _, head in part} == set(range(first, min(first + section, heads)))
        assert [block for block, _ in part] == sorted((block for block, _ in part), reverse=True)


# The kernel's own source on a model of the hardware


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("tiles", range(1, 13))
def test_every_tile_is_used_once_whatever_the_order_of_events(run, tiles, stages):
    """Causal, so that the two consumers see different numbers of tiles, several works to a program."""
    seqlen_k = 16 * tiles - tiles % 5
    q, k, v = inputs(1, 45, seqlen_k, 3, 1, 16, torch.float16)
    for seed in range(3):
        out, lse, model = run(q, k, v, causal=True, config=small(stages), seed=100 * tiles + seed)
        assert_correct(out, lse, q, k, v, causal=True)
        # 3 heads x 2 blocks: both query halves and the output, and every key tile of the block for K and for V
        assert len(model.loaded) == 3 * sum(
            2 + 2 * key_tiles.fn(row, min(32, 45 - row), 0, seqlen_k - 44, seqlen_k, False, True, 16)[3]
            for row in (0, 32)
        )


CASES = {
    "full": {},
    "causal": {"causal": True},
    "left": {"window_left": 11},
    "right": {"window_right": 7},
    "band": {"window_left": 37, "window_right": 5},
    "diagonal": {"window_left": 0, "window_right": 0},
    "sliding": {"causal": True, "window_left": 20},
    "softcap": {"causal": True, "softcap": 3.0, "scale": 0.7},
    "wide": {"window_left": 10_000, "window_right": 10_000},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (1, 90), (70, 33), (33, 70), (64, 64), (97, 97)])
def test_the_source_computes_attention(run, name, seqlen_q, seqlen_k):
    q, k, v = inputs(2, seqlen_q, seqlen_k, 3, 1, 24, torch.float16)
    out, lse, _ = run(q, k, v, config=small(), seed=1, **CASES[name])
    assert_correct(out, lse, q, k, v, **CASES[name])


@pytest.mark.parametrize("causal", [False, True])
def test_sinks_join_the_denominator_only(run, causal):
    q, k, v = inputs(1, 40, 21, 4, 2, 16, torch.float16)
    sinks = torch.randn(4)
    out, lse, _ = run(q, k, v, config=small(), causal=causal, sinks=sinks)
    assert_correct(out, lse, q, k, v, causal=causal, sinks=sinks)


@pytest.mark.parametrize("level", LEVELS)
def test_one_key_and_a_sink_of_its_score_share_a_row(run, level):
    q, one = torch.full((1, 1, 1, 16), 0.0, dtype=torch.bfloat16), torch.ones(1, 1, 1, 16, dtype=torch.bfloat16)
    q[..., 0] = level
    score = q[..., 0].float().flatten()
    out, _, _ = run(q, one, one, config=small(), scale=1.0, sinks=score)
    torch.testing.assert_close(out.float(), torch.full_like(out.float(), 0.5), rtol=error_of_half(level), atol=0)


def test_an_infinite_sink_leaves_nothing_to_the_keys(run):
    q, k, v = inputs(1, 60, 20, 2, 2, 16, torch.float16)
    out, lse, _ = run(q, k, v, config=small(), causal=True, sinks=torch.tensor([float("inf"), float("-inf")]))
    assert (out[:, :, 0] == 0).all()
    assert (lse[:, 0, 40:] == float("inf")).all()
    assert (lse[:, 0, :40] == float("-inf")).all()
    assert_correct(out[:, :, 1:], lse[:, 1:], q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], causal=True)


def test_rows_without_a_key_give_zero_and_minus_infinity(run):
    q, k, v = inputs(1, 60, 20, 2, 2, 16, torch.float16)
    out, lse, _ = run(q, k, v, config=small(), causal=True, sinks=torch.zeros(2))
    assert (out[:, :40] == 0).all()
    assert (lse[..., :40] == float("-inf")).all()
    assert (lse[..., 40:] > float("-inf")).all()


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "dtype"),
    [
        (64, 64, torch.bfloat16),
        (128, 128, torch.float16),
        (40, 40, torch.bfloat16),
        (80, 48, torch.float16),
        (192, 256, torch.float16),
    ],
)
def test_head_sizes_are_padded_by_the_descriptors(run, head_dim, head_dim_v, dtype):
    q, k, v = inputs(1, 70, 90, 2, 1, head_dim, dtype, head_dim_v)
    out, lse, _ = run(q, k, v, causal=True, config=replace(gluon_flash_forward_config(64), persistent=False))
    assert_correct(out, lse, q, k, v, causal=True)


def test_free_strides_are_read_in_place(run):
    storage = torch.randn(2, 3, 50, 160).to(torch.float16)  # [batch, heads, tokens, q | k | v | unused]
    q, k, v = (storage.transpose(1, 2)[..., 48 * i : 48 * (i + 1)] for i in range(3))
    out, lse, _ = run(q, k, v, config=small(), causal=True)
    assert_correct(out, lse, q, k, v, causal=True)
    one = q[:1, :, :1].as_strided((1, 50, 1, 48), (7, 160, 3, 1))  # strides that nobody follows
    out, lse, _ = run(one, k[:1, :, :1], v[:1, :, :1], config=small())
    assert_correct(out, lse, one, k[:1, :, :1], v[:1, :, :1])


def test_the_result_does_not_depend_on_the_order_of_events_or_on_the_grid(run):
    q, k, v = inputs(2, 75, 75, 4, 2, 16, torch.bfloat16)
    first = run(q, k, v, causal=True, config=small())
    for changes in ({"stages": 4}, {"persistent": False}, {"section_bytes": 1}):
        again = run(q, k, v, causal=True, config=small(**changes), seed=7)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_the_model_notices_a_broken_protocol(run):
    q, k, v = inputs(1, 64, 96, 2, 1, 16, torch.float16)
    functions = module.gluon_flash_forward_kernel.fn.__globals__

    def broken(name, old, new):
        import inspect
        import textwrap

        source = textwrap.dedent(inspect.getsource(functions[name].fn)).replace("@gluon.jit\n", "")
        assert old in source
        namespace = {}

        def build(model_globals):
            exec(source.replace(old, new), model_globals, namespace)
            return namespace[name]

        return build

    cases = {
        "no wait for K": broken("_attend", "mbarrier.wait(k_full.index(slot), t // STAGES & 1)", "pass"),
        "wrong phase of V": broken(
            "_attend", "mbarrier.wait(v_full.index(slot), t // STAGES & 1)", "mbarrier.wait(v_full.index(slot), 0)"
        ),
        "V given back early": broken(
            "_attend", "        acc, p = warp", "        give_back(v_empty.index(before))\n        acc, p = warp"
        ),
        "no barrier before an arrival": broken("give_back", "group_barrier()", "pass"),
        "tiles skipped unseen": broken("_skip", "mbarrier.wait(", "(lambda barrier, phase: None)("),
        "nothing skipped": broken("_skip", "range(first, last)", "range(first, first)"),
        "the slot refilled early": broken("_producer", "mbarrier.wait(k_empty.index(slot), phase)", "pass"),
        "the output not fenced": broken("_consumer", "fence_async_shared()", "pass"),
        "the queries' slot not given back": broken("_consumer", "give_back(q_empty.index(CONSUMER))", "pass"),
    }
    for name, build in cases.items():
        noticed = 0
        for seed in range(8):
            try:
                out, lse, _ = run(q, k, v, causal=True, config=small(), seed=seed, replace_functions=build)
                assert_correct(out, lse, q, k, v, causal=True)
            except (ProtocolError, AssertionError):
                noticed += 1
        assert noticed, name
    with pytest.raises(ProtocolError, match="deadlock"):
        run(q, k, v, config=replace_stages(small(), 1))


def replace_stages(config, stages):
    """Around the configuration's own check."""
    object.__setattr__(config, "stages", stages)
    return config


# What it refuses


def test_a_single_stage_is_refused():
    with pytest.raises(ValueError, match="stages: expected at least 2, got 1"):
        small(stages=1)


def test_launchable_says_why_not(hopper, monkeypatch):
    q, k, v = inputs(2, 8, 8, 4, 2, 64, torch.float16)
    assert launchable(q, k, v) is None
    assert "float16 or bfloat16" in launchable(q.float(), k.float(), v.float())
    assert "head sizes up to 256" in launchable(*inputs(1, 8, 8, 1, 1, 264, torch.float16))
    assert "multiple of 8" in launchable(q, k, v[..., :60])
    huge = torch.zeros(1, dtype=torch.float16).expand(2**25, 16, 4, 64)
    assert "2^31 rows" in launchable(huge, k, v)
    assert "ALiBi" in launchable(q, k, v, alibi_slopes=torch.zeros(4))
    assert launchable(q, k, v, dropout_p=0.1) == "has no dropout"
    assert "positive scale" in launchable(q, k, v, scale=-1.0)
    assert "k to have elements" in launchable(q, k[:, :0], v[:, :0])
    assert "q aligned" in launchable(torch.zeros(2, 8, 4, 65, dtype=torch.float16)[..., 1:], k, v)
    assert "v aligned" in launchable(q, k, torch.zeros(2, 8, 2, 68, dtype=torch.float16)[..., :64])
    assert "k aligned" in launchable(q, k[:1].expand(2, -1, -1, -1), v)
    with pytest.raises(ValueError, match="gluon_flash_forward: has no ALiBi"):
        gluon_flash_forward(q, k, v, alibi_slopes=torch.zeros(4))
    monkeypatch.setattr(module, "current_device", lambda: HOPPER._replace(arch="sm_100"))
    assert launchable(q, k, v) == "needs a Hopper GPU (sm_90), this is sm_100"


# A Hopper GPU

GPU_LENGTHS = [(1, 1), (1, 700), (129, 65), (400, 900), (777, 777), (300, 77)]


def batch_and_heads(seqlen_q, seqlen_k):
    """Of one KV head for three query heads where sequences are long: the reference takes a core for seconds there, and
    there are hundreds of these tests."""
    return (2, 6) if seqlen_q * seqlen_k < 100_000 else (1, 3)


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128, 192, 256])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), GPU_LENGTHS)
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_it_computes_attention(name, seqlen_q, seqlen_k, head_dim, dtype):
    batch, heads = batch_and_heads(seqlen_q, seqlen_k)
    q, k, v = inputs(batch, seqlen_q, seqlen_k, heads, heads // 3, head_dim, dtype, device="cuda")
    out, lse = gluon_flash_forward(q, k, v, **CASES[name])
    assert_correct(out, lse, q, k, v, **CASES[name])


@on_hopper
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_on_a_gpu_it_agrees_with_the_triton_kernel(head_dim, causal, monkeypatch):
    from kvops.kernels import flash_forward as twin

    monkeypatch.setattr(twin, "choose_proven", lambda *arguments, **options: None)
    q, k, v = inputs(3, 2049, 2049, 16, 4, head_dim, torch.bfloat16, device="cuda")
    out, lse = gluon_flash_forward(q, k, v, causal=causal)
    twin_out, twin_lse = twin.flash_forward(q, k, v, causal=causal)
    rounding = torch.finfo(torch.bfloat16).eps
    assert (out.float() - twin_out.float()).abs().max() <= 2 * rounding * twin_out.abs().max()
    assert (lse - twin_lse).abs().max() <= 1e-4


@on_hopper
@pytest.mark.parametrize("causal", [False, True])
def test_on_a_gpu_the_same_input_gives_the_same_bits(causal):
    q, k, v = inputs(4, 1500, 1700, 8, 2, 128, torch.bfloat16, device="cuda")
    first = gluon_flash_forward(q, k, v, causal=causal)
    for _ in range(20):
        again = gluon_flash_forward(q, k, v, causal=causal)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
