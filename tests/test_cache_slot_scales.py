"""A paged cache whose slots have scales of their own holds what a cache of its dequantised tokens holds."""

import copy

import pytest
import torch
from cache_helpers import BLOCKS, HEADS, LAYERS, SIZE, make_cache
from paged_lists import QUANTISED, quantise_by_slot
from test_generate import prompts_of, tiny_model

import kvops
from kvops.generation.evaluate import forced_logits
from kvops.generation.generate import generate
from kvops.generation.passes import prefill
from kvops.policies import Compression

NUMBA = True
D, GROUP = 16, 2
INT8 = torch.int8
SIDES = [(INT8, INT8), (torch.float8_e4m3fn, INT8), (INT8, torch.float32)]


def dequantised(x, dtype):
    if dtype not in QUANTISED:
        return x
    stored, scale = quantise_by_slot(x, dtype)
    return stored.float() * scale[..., None]


class Pair:
    """A cache with scales of slots, and one of the float32 numbers that it stands for, under the same operations."""

    def __init__(self, device, k_dtype, v_dtype):
        self.dtypes = k_dtype, v_dtype
        sizes = {"head_dim": D, "v_head_dim": D}
        self.caches = [
            make_cache(device, **sizes, dtype=k_dtype, v_dtype=v_dtype, slot_scales=True),
            make_cache(device, **sizes),
        ]

    def step(self, num_tokens, rows, accumulate="sum", **options):
        """Append and attend; the outputs and scores of both must be alike."""
        batch = len(rows)
        for layer in range(LAYERS):
            q = torch.randn(batch, num_tokens, HEADS * GROUP, D)
            k, v = torch.randn(2, batch, num_tokens, HEADS, D)
            k[:, 0], v[:, -1] = 30 * k[:, 0], 1000 * v[:, -1]  # outliers, whose scale no other token has
            outs = []
            for number, cache in enumerate(self.caches):
                device = cache.device
                if layer == 0:
                    self.positions = cache.extend(num_tokens, rows=rows)
                own = (k, v) if number == 0 else [dequantised(x, t) for x, t in zip((k, v), self.dtypes, strict=True)]
                cache.append(layer, *(x.to(device) for x in own), self.positions, rows=rows)
                outs.append(cache.attend(layer, q.to(device), rows=rows, accumulate=accumulate, **options))
            # Scores of some hundreds are rounded by 2^-24 of them a few times, and weights by as much relatively.
            torch.testing.assert_close(*outs, rtol=0, atol=1e-4 * float(outs[1].abs().max()))

    def each(self, method, *args, **kwargs):
        for cache in self.caches:
            getattr(cache, method)(*args, **kwargs)
        self.compare()

    def compare(self):
        stored, wide = self.caches
        assert torch.equal(stored.seq_lens, wide.seq_lens)
        for layer in range(LAYERS):
            for row in range(stored.max_batch):
                for head in range(HEADS):
                    found, wanted = self.list(stored, layer, row, head), self.list(wide, layer, row, head)
                    for a, b in zip(found, wanted, strict=True):
                        assert torch.equal(a, b)

    def list(self, cache, layer, row, head):
        k, v, positions = cache.gather(layer, row, head)
        length = len(positions)
        table = cache.block_tables[layer, row, head, : -(-length // SIZE)].long()
        numbers = []
        for side, scales in ((k, cache.k_slot_scale), (v, cache.v_slot_scale)):
            factor = 1.0 if scales is None else scales[table].flatten()[:length, None]
            numbers.append(side.float() * factor)
        return *numbers, positions


@pytest.mark.parametrize(("k_dtype", "v_dtype"), SIDES)
def test_all_that_moves_slots_moves_their_scales(backend, device, k_dtype, v_dtype):
    """Appending, attending, eviction, forks and copies on write, rollback, drafts that are kept in part, beams."""
    pair = Pair(device, k_dtype, v_dtype)
    pair.step(13, [0, 1])
    pair.each("evict", 16, rows=[0, 1], protect_last=3)
    pair.each("fork", 0, [2])
    pair.step(3, [2, 0])  # each gets copies of the blocks that both hold
    pair.step(1, [0, 1, 2], window_left=9)
    pair.each("rollback", 2, rows=[2])
    pair.step(4, [0, 2], accumulate=None)
    keep = torch.tensor([[True, False, True, False], [False, True, True, True]], device=device)
    pair.each("retain", keep, rows=[0, 2])
    pair.each("evict", 10, rows=[0, 2])
    pair.each("reorder", [2, 2, 0])
    pair.step(2, [0, 1, 2])
    pair.each("unshare")
    kept = torch.rand(3, HEADS, 12, device=device) < 0.5
    pair.each("keep", 1, kept)
    pair.step(1, [0, 1, 2])


@pytest.mark.parametrize("how", ["save", "copy", "with_rows"])
def test_copies_of_a_cache_have_its_scales(device, tmp_path, how):
    pair = Pair(device, INT8, torch.float32)
    pair.step(9, [0, 1])
    for number, cache in enumerate(pair.caches):
        if how == "save":
            cache.save(tmp_path / "cache")
            pair.caches[number] = kvops.PagedKVCache.load(tmp_path / "cache", device=device)
        else:
            pair.caches[number] = copy.deepcopy(cache) if how == "copy" else cache.with_rows([1, 0, 1])
        cache.k_cache.zero_()
        if cache.k_slot_scale is not None:
            cache.k_slot_scale.zero_()
    pair.compare()
    pair.step(2, [0, 1])
    assert pair.caches[0].v_slot_scale is None


def test_remembered_prefixes_have_their_scales(device):
    pair = Pair(device, INT8, INT8)
    pair.step(9, [0])
    pair.each("remember", 0, list(range(9)))
    pair.each("recall", 1, list(range(9)))
    pair.each("free", 0)
    pair.step(3, [1])
    pair.compare()


def test_scales_of_slots_are_counted(device):
    sizes = {"head_dim": 64, "v_head_dim": 64}
    plain = make_cache(device, dtype=INT8, **sizes)
    both = make_cache(device, dtype=INT8, slot_scales=True, **sizes)
    keys = make_cache(device, dtype=INT8, v_dtype=torch.bfloat16, slot_scales=True, **sizes)
    assert plain.bytes_per_block == SIZE * 128
    assert both.bytes_per_block == SIZE * (128 + 8)
    assert keys.bytes_per_block == SIZE * (64 + 128 + 4)
    assert both.stats().bytes_reserved == BLOCKS * SIZE * 136
    assert plain.k_slot_scale is None
    assert both.k_slot_scale.shape == both.v_slot_scale.shape == (BLOCKS, SIZE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": torch.float32},
            "slot_scales: expected only with a side of float8 or int8, got a cache of .*float32",
        ),
        ({"dtype": INT8, "k_scale": 0.5}, "k_scale: expected None with slot_scales=True, as each slot has one scale"),
        ({"dtype": INT8, "v_scale": 0.5}, "v_scale: expected None with slot_scales=True"),
    ],
)
def test_scales_of_slots_beside_others_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_cache("cpu", slot_scales=True, **options)


@pytest.mark.parametrize("dtype", QUANTISED)
def test_an_uncalibrated_cache_is_close_to_one_of_float32(device, dtype):
    """Heads of very different sizes, and no scale was given: the error is that of rounding each token."""
    tokens = 30
    caches = [
        make_cache(device, head_dim=D, v_head_dim=D, dtype=t, slot_scales=t == dtype) for t in (dtype, torch.float32)
    ]
    q = torch.randn(1, tokens, HEADS * GROUP, D, device=device)
    k, v = torch.randn(2, 1, tokens, HEADS, D, device=device)
    v *= torch.tensor([1e-3, 1e3], device=device)[:, None]
    outs = []
    for cache in caches:
        cache.append(0, k, v, cache.extend(tokens, rows=[0]), rows=[0])
        outs.append(cache.attend(0, q, rows=[0]).unflatten(2, (HEADS, GROUP)).double())
    off, size = ((x * x).sum((0, 1, 3, 4)).sqrt() for x in (outs[0] - outs[1], outs[1]))
    step = {INT8: 1 / 127}.get(dtype, 2.0 ** (-3 if dtype == torch.float8_e5m2 else -4))
    assert (off < 3 * step * size).all()  # of keys, whose scores are sums of 16 products, and of values


def slot_scaled_cache(model, dtype=INT8):
    config = model.config
    return kvops.PagedKVCache(
        num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, num_blocks=200,
        max_batch=2, max_tokens=200, dtype=dtype, slot_scales=dtype in QUANTISED,
    )  # fmt: skip


def test_a_model_says_over_int8_what_it_says_over_float32():
    """The logits of a prompt that goes on, read through a cache that nobody calibrated."""
    model, tokens = tiny_model(), prompts_of(120)[0]
    logits = []
    for dtype in (torch.float32, INT8):
        cache = slot_scaled_cache(model, dtype)
        with torch.no_grad():
            hidden = prefill(model, cache, torch.tensor([tokens[:90]]), 0)
        logits.append(forced_logits(model, cache, hidden[:, -1:], torch.tensor(tokens[90:]), chunk=8)[1:])
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 0 < error < 0.02


@pytest.mark.parametrize("draft", [None, "prompt_lookup"])
def test_a_model_generates_over_an_int8_cache_that_is_compressed(draft):
    """Prompts of different lengths, evictions while decoding, and drafts that are kept in part."""
    model = tiny_model()
    cache, prompts = slot_scaled_cache(model), [prompts_of(30)[0] * 3, prompts_of(40)[0]]
    compression = Compression(ratio=2, protect_first=2, protect_last=8, every=8)
    result = generate(model, prompts, max_new_tokens=20, cache=cache, compression=compression, draft=draft)
    assert [len(tokens) for tokens in result.tokens] == [20, 20]
    assert result.stats.blocks_in_use <= cache.blocks_for(110) / 2 + cache.blocks_for(60) / 2 + 2 * cache.blocks_for(16)
    assert cache.stats().blocks_in_use == 0
