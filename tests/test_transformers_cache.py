"""KVOpsCache in transformers' generate: the tokens of transformers' own cache, and memory that really comes back."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from test_transformers import TINY, make_model

import kvops
import kvops.integrations.transformers as kvops_transformers
from kvops.generation.generate import generate
from kvops.integrations.transformers import KVOpsCache
from kvops.integrations.transformers.config import cache_argument, storing_layers
from kvops.models.config import LlamaConfig
from kvops.models.llama import Llama
from kvops.policies import AdaKV, Compression, ExpectedAttention, KVzip, SnapKV

LENGTHS = (70, 41, 64)


def make(family: str = "Llama", **changes) -> torch.nn.Module:
    model = make_model(family, **changes)
    model.set_attn_implementation(kvops_transformers.enable())
    return model


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(1, 61, (length,), generator=generator).tolist() for length in LENGTHS]


def left_padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def new_tokens(model: torch.nn.Module, rows: list[list[int]], **options) -> list[list[int]]:
    inputs = left_padded(rows)
    out = model.generate(**inputs, max_new_tokens=10, do_sample=False, **options)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.skipif(cache_argument(transformers.LlamaModel) != "cache", reason="transformers before 5.24")
def test_generate_takes_the_cache_under_its_new_name():
    model = make()
    cache = KVOpsCache(model.config, max_tokens=96, block_size=4)
    assert new_tokens(model, prompts(), cache=cache) == new_tokens(model, prompts())
    assert cache.get_seq_length() > max(LENGTHS)


def test_the_cache_is_handed_to_a_model_under_the_name_that_its_forward_has():
    class Before(torch.nn.Module):
        def forward(self, input_ids, past_key_values=None): ...

    class Now(torch.nn.Module):
        def forward(self, input_ids, cache=None): ...

    assert cache_argument(Before()) == "past_key_values"
    assert cache_argument(Now()) == "cache"


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "GptOss"])
def test_without_compression_the_tokens_are_those_of_the_dynamic_cache(family):
    model = make(family)
    cache = KVOpsCache(model.config, max_tokens=96, block_size=4)
    assert new_tokens(model, prompts(), past_key_values=cache) == new_tokens(model, prompts())
    # Padding takes no memory, and the last token is never run. Keys behind a window are given up now and then.
    types = getattr(model.config, "layer_types", None) or ["sliding_attention" if family == "Mistral" else ""] * 2
    for layer, kind in enumerate(types):
        lens = cache.paged.seq_lens[layer, :, 0]
        if kind == "sliding_attention":
            assert 4 <= lens.min() <= lens.max() <= 4 + 4
        else:
            assert lens.tolist() == [length + 9 for length in LENGTHS]
    assert cache.get_seq_length() == max(LENGTHS) + 9


@pytest.mark.parametrize(
    ("policy", "every"), [(SnapKV(observe=8), 4), (ExpectedAttention(scope="head"), 0), (AdaKV(observe=8), 0)]
)
def test_compressed_tokens_are_those_of_the_reference_model(policy, every):
    """Two ways to the same lists: transformers with this cache, and the loop of kvops.models."""
    theirs = make()
    config = theirs.config
    ours = Llama(
        LlamaConfig(
            61, 48, 32, 2, 6, 2, 8, config.rms_norm_eps, config.rope_parameters["rope_theta"], None, 128, False
        ),
        {name: weight.detach() for name, weight in theirs.state_dict().items()},
    )
    compression = Compression(ratio=3, policy=policy, protect_first=2, protect_last=4, every=every)
    expected = generate(ours, prompts(), max_new_tokens=10, compression=compression)
    # The loop's cache has blocks of 16.
    cache = KVOpsCache(theirs.config, max_tokens=96, compression=compression)
    assert new_tokens(theirs, prompts(), past_key_values=cache) == expected.tokens
    uncompressed = sum(cache.paged.blocks_for(length + 9) for length in LENGTHS)
    stats = cache.stats()
    assert stats.bytes_in_use <= stats.bytes_per_block * uncompressed / 2
    assert cache.get_seq_length() == max(LENGTHS) + 9
    assert cache.paged.next_positions.tolist() == [length + 9 for length in LENGTHS]


def test_freed_blocks_let_a_small_pool_go_on():
    model = make()
    compression = Compression(ratio=4, protect_first=2, protect_last=4)
    tight = KVOpsCache(model.config, max_tokens=128, num_blocks=4 * 16, block_size=4)
    row = prompts()[2:]  # 64 tokens: 16 blocks in each of 4 lists, all there are
    with pytest.raises(kvops.OutOfBlocksError):
        new_tokens(model, row, past_key_values=tight)
    roomy = KVOpsCache(model.config, max_tokens=128, num_blocks=4 * 16, block_size=4, compression=compression)
    new_tokens(model, row, past_key_values=roomy)
    assert roomy.stats().blocks_in_use <= 4 * 4 + 4 * 3
    roomy.reset()
    assert roomy.stats().blocks_in_use == 0
    assert roomy.get_seq_length() == 0


def test_prompt_lookup_of_one_sequence_takes_refused_drafts_back():
    model = make()
    row = [prompts()[1] * 2]
    cache = KVOpsCache(model.config, max_tokens=128, block_size=4)
    plain = new_tokens(model, row)
    assert new_tokens(model, row, past_key_values=cache, prompt_lookup_num_tokens=3) == plain
    assert cache.paged.seq_lens.unique().tolist() == [len(row[0]) + 9]


def test_drafts_are_gone_before_the_prompt_is_compressed():
    model = make()
    compression = Compression(ratio=2, protect_first=2, protect_last=4)
    cache = KVOpsCache(model.config, max_tokens=128, block_size=4, compression=compression)
    row = [prompts()[1] * 2]  # 82 tokens: 21 blocks in each of 4 lists
    assert len(new_tokens(model, row, past_key_values=cache, prompt_lookup_num_tokens=3)[0]) == 10
    assert cache.paged.next_positions.tolist() == [82 + 9]
    assert cache.stats().blocks_in_use <= 4 * 21 // 2 + 4 * 4


def test_a_second_turn_adds_to_what_is_there():
    model = make("Mistral")
    first, more = prompts()[0], prompts()[1][:7]
    cache = KVOpsCache(model.config, max_tokens=128, block_size=4)
    said = new_tokens(model, [first], past_key_values=cache)[0]
    longer = [first + said + more]
    assert new_tokens(model, longer, past_key_values=cache) == new_tokens(model, longer)


def test_a_pass_that_was_broken_off_leaves_nothing_behind():
    """The next pass went on as the broken one: at its positions, with its padding."""
    model = make()
    cache = KVOpsCache(model.config, max_tokens=128, block_size=4)
    rows = left_padded(prompts()[:2])
    broken = {"input_ids": torch.ones(2, 5, dtype=torch.int64)}

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        model(**rows, past_key_values=cache)
        for layer in model.model.layers:
            hook = layer.self_attn.o_proj.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(**broken, past_key_values=cache)
            hook.remove()
            if layer is model.model.layers[-1]:  # all layers had attended: for the cache the pass was whole
                cache.crop(-5)
            new = torch.tensor([[7, 8, 9], [9, 8, 7]])
            mask = torch.cat((rows["attention_mask"], torch.ones_like(new)), 1)
            whole = torch.cat((rows["input_ids"], new), 1)
            expected = model(input_ids=whole, attention_mask=mask).logits[:, -3:]
            got = model(input_ids=new, attention_mask=mask, past_key_values=cache).logits
            torch.testing.assert_close(got, expected)
            assert cache.get_seq_length() == whole.shape[1]
            cache.crop(-3)


def test_kernels_read_the_cache(backend, device):
    model = make("Gemma2", num_hidden_layers=1).to(device)
    cache = KVOpsCache(model.config, max_tokens=16, block_size=8)
    rows = [row[:length] for row, length in zip(prompts(), (7, 3), strict=False)]
    inputs = {name: value.to(device) for name, value in left_padded(rows).items()}
    options = {"max_new_tokens": 2, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options, past_key_values=cache), model.generate(**inputs, **options))


def test_misuse_is_told_apart():
    model = make()
    ids = torch.ones(1, 4, dtype=torch.int64)

    def cache(**options):
        return KVOpsCache(model.config, max_tokens=16, **options)

    with pytest.raises(RuntimeError, match=r"no gradient: generate under torch.no_grad"):
        model(ids, past_key_values=cache())
    with pytest.raises(RuntimeError, match="paged: expected a cache that a model has run with"):
        cache().stats()
    used = cache()
    with torch.no_grad():
        model(ids, past_key_values=used)
        with pytest.raises(ValueError, match="key_states: expected a batch of 1, as before, got 2"):
            model(ids.repeat(2, 1), past_key_values=used)
    with pytest.raises(ValueError, match="tokens_to_remove: expected a number from 0 down, got 2"):
        used.crop(2)
    with pytest.raises(ValueError, match=r"tokens_to_remove: expected at least -4, got -5$"):
        used.crop(-5)
    with pytest.raises(TypeError, match=r"compression: expected a kvops.policies.Compression, got 4"):
        cache(compression=4)
    with pytest.raises(TypeError, match=r"config: expected that of a model, model.config, got LlamaForCausalLM"):
        KVOpsCache(model, max_tokens=16)
    for sizes in ({"max_tokens": 0}, {"max_tokens": 16, "num_blocks": 0}, {"max_tokens": 16, "block_size": 0}):
        with pytest.raises(ValueError, match=f"{list(sizes)[-1]}: expected at least 1, got 0"):
            KVOpsCache(model.config, **sizes)
    with pytest.raises(ValueError, match="compression: expected chunk=0"):
        cache(compression=Compression(chunk=4))
    with pytest.raises(ValueError, match="compression: expected every=0 with ExpectedAttention"):
        cache(compression=Compression(every=4, policy=ExpectedAttention()))
    with pytest.raises(ValueError, match="compression: expected a policy without recital, as a cache cannot make"):
        cache(compression=Compression(policy=KVzip()))
    sliding = make("Mistral")
    trimmed = KVOpsCache(sliding.config, max_tokens=16, block_size=2)
    with torch.no_grad():
        sliding(torch.ones(1, 9, dtype=torch.int64), past_key_values=trimmed)
    trimmed.stats()  # gives up what no later token sees
    with pytest.raises(ValueError, match="tokens_to_remove: expected at least 0, got -1: what earlier tokens saw"):
        trimmed.crop(-1)
    model.set_attn_implementation("eager")
    with pytest.raises(TypeError, match=r"attn_implementation: expected 'kvops' .* got 'eager'"), torch.no_grad():
        model(ids, past_key_values=cache())
    config = transformers.DeepseekV32Config(num_hidden_layers=2)
    with pytest.raises(ValueError, match="config: expected layers of full or sliding attention, got indexed_attention"):
        KVOpsCache(config, max_tokens=16)
    config = transformers.LlamaConfig(num_hidden_layers=1, layer_types=["linear_attention"])
    with pytest.raises(ValueError, match="config: expected at least one layer of attention, got none"):
        KVOpsCache(config, max_tokens=16)


def gemma3n(**changes) -> torch.nn.Module:
    """The last two of four layers attend to the keys of the first two."""
    sizes = {"vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8, "laurel_rank": 8}
    types = ["sliding_attention", "full_attention"] * 2
    options = {"num_kv_shared_layers": 2, "layer_types": types, "sliding_window": 16, "initializer_range": 0.2}
    config = transformers.Gemma3nTextConfig(**TINY | sizes | options | {"num_hidden_layers": 4} | changes)
    return shared(transformers.Gemma3nForCausalLM(config))


def gemma4(**changes) -> torch.nn.Module:
    sizes = {"vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8, "global_head_dim": 8}
    types = ["sliding_attention", "full_attention"] * 2
    options = {"num_kv_shared_layers": 2, "layer_types": types, "sliding_window": 16, "initializer_range": 0.2}
    config = transformers.Gemma4TextConfig(**TINY | sizes | options | {"num_hidden_layers": 4} | changes)
    return shared(transformers.Gemma4ForCausalLM(config))


def shared(model: torch.nn.Module) -> torch.nn.Module:
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.set_attn_implementation(kvops_transformers.enable())
    return model.eval()


def test_keys_that_layers_share_may_be_moved_to_where_they_are():
    """As transformers before 5.23 does, whose config tells the number of such layers alone."""
    config = SimpleNamespace(layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2)
    assert storing_layers(config) == [0, 1]
    model = make()
    cache = KVOpsCache(model.config, max_tokens=96, block_size=4)
    k = torch.randn(1, model.config.num_key_value_heads, 3, model.config.head_dim)
    keys, values = cache.update(k, k, 0)
    assert keys.to(k.device) is keys
    assert values.to(k.device) is values
    assert keys.attends_with(values)


@pytest.mark.parametrize("make_model", [gemma3n, gemma4])
def test_layers_that_share_keys_attend_to_those_of_the_layer_that_stores_them(make_model):
    """The last layer stored nothing, so that no pass ever ended: the length stayed 0, and other tokens came."""
    model = make_model()
    model.set_attn_implementation("eager")
    expected = new_tokens(model, prompts())
    model.set_attn_implementation("kvops")
    assert new_tokens(model, prompts()) == expected
    cache = KVOpsCache(model.config, max_tokens=96, block_size=4)
    assert new_tokens(model, prompts(), past_key_values=cache) == expected
    assert cache.get_seq_length() == max(LENGTHS) + 9
    assert cache.paged.num_layers == 2
    assert cache.paged.seq_lens[1, :, 0].tolist() == [length + 9 for length in LENGTHS]


@pytest.mark.parametrize("make_model", [gemma3n, gemma4])
def test_layers_that_share_keys_see_the_whole_prompt_before_it_is_compressed(make_model):
    model = make_model()
    compression = Compression(ratio=2, policy=SnapKV(observe=8), protect_first=2, protect_last=4)
    cache = KVOpsCache(model.config, max_tokens=96, block_size=4, compression=compression)
    ids = torch.tensor([prompts()[0]])
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected)
        model(ids[:, :1], past_key_values=cache)
    assert cache.stats().blocks_in_use < 0.7 * 4 * ids.shape[1] / 4
    assert cache.paged.next_positions.tolist() == [ids.shape[1] + 1]


@pytest.mark.parametrize("chunk", [1, 2, 7])
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_a_padded_prompt_in_chunks_leaves_no_padding_in_the_cache(family, chunk):
    """With chunks of one token the padding was stored, and attended to."""
    model = make(family)
    rows = [row[:length] for row, length in zip(prompts(), (9, 4, 7), strict=True)]
    cache = KVOpsCache(model.config, max_tokens=32, block_size=4)
    chunked = new_tokens(model, rows, past_key_values=cache, prefill_chunk_size=chunk)
    assert chunked == new_tokens(model, rows)
    assert cache.paged.next_positions.tolist() == [len(row) + 9 for row in rows]


def test_a_padded_prompt_in_chunks_is_compressed_without_its_padding():
    model = make()
    compression = Compression(ratio=2, policy=SnapKV(observe=4), protect_first=1, protect_last=2, every=4)
    rows = [row[:length] for row, length in zip(prompts(), (9, 4, 7), strict=True)]
    cache = KVOpsCache(model.config, max_tokens=32, block_size=4, compression=compression)
    new_tokens(model, rows, past_key_values=cache, prefill_chunk_size=1)
    assert cache.paged.next_positions.tolist() == [len(row) + 9 for row in rows]


@pytest.mark.parametrize(("max_tokens", "block_size"), [(25, 8), (25, 16), (32, 16)])
def test_max_tokens_is_the_longest_that_a_sequence_may_become(max_tokens, block_size):
    """25 allowed 32, as blocks are whole."""
    model = make()
    cache = KVOpsCache(model.config, max_tokens=max_tokens, block_size=block_size)
    with torch.no_grad():
        model(torch.ones(1, max_tokens - 1, dtype=torch.int64), past_key_values=cache)
        model(torch.ones(1, 1, dtype=torch.int64), past_key_values=cache)
        with pytest.raises(ValueError, match=f"{max_tokens} .*max_tokens"):
            model(torch.ones(1, 1, dtype=torch.int64), past_key_values=cache)
    assert cache.get_seq_length() == max_tokens


def test_a_layer_that_never_stores_is_told_at_the_second_pass():
    """Every pass went on as the first one."""
    model = make()
    cache = KVOpsCache(transformers.LlamaConfig(**TINY | {"num_hidden_layers": 3}), max_tokens=16)
    cache._text = model.config
    ids = torch.ones(1, 4, dtype=torch.int64)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(RuntimeError, match=r"keys from every layer in the first pass, got none from layers \[2\]"):
            model(ids, past_key_values=cache)


def test_packed_sequences_are_refused():
    model, ids = make(), torch.ones(1, 4, dtype=torch.int64)
    lens = torch.tensor([0, 1, 4], dtype=torch.int32)
    cache = KVOpsCache(model.config, max_tokens=16)
    with torch.no_grad(), pytest.raises(ValueError, match="cu_seq_lens_q: expected None with a cache"):
        model(ids, past_key_values=cache, cu_seq_lens_q=lens, cu_seq_lens_k=lens, max_length_q=3, max_length_k=3)


def lfm2() -> torch.nn.Module:
    """Convolutions with a state of a few tokens, and attention."""
    types = ["conv", "full_attention", "conv", "full_attention"]
    config = transformers.Lfm2Config(**TINY | {"num_hidden_layers": 4, "layer_types": types, "initializer_range": 0.2})
    return shared(transformers.Lfm2ForCausalLM(config))


def qwen3_next() -> torch.nn.Module:
    """Linear attention with a recurrent state, and attention."""
    types = ["linear_attention", "full_attention"]
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "mlp_only_layers": [0, 1]}
    states = {f"linear_{name}_head_dim": 8 for name in ("key", "value")} | {"linear_num_key_heads": 2}
    sizes = experts | states | {"linear_num_value_heads": 2, "layer_types": types, "initializer_range": 0.2}
    return shared(transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**TINY | sizes)))


@pytest.mark.parametrize("make_model", [lfm2, qwen3_next])
def test_layers_with_a_state_keep_it_beside_the_paged_cache(make_model):
    model = make_model()
    cache = KVOpsCache(model.config, max_tokens=96, block_size=4)
    expected = new_tokens(model, prompts())
    assert new_tokens(model, prompts(), past_key_values=cache) == expected
    assert cache.paged.num_layers == model.config.layer_types.count("full_attention")
    cache.reset()
    assert new_tokens(model, prompts(), past_key_values=cache) == expected


def test_what_a_state_has_seen_is_taken_back_where_it_can_be():
    """Convolutions keep their last inputs; a recurrent state is a sum."""
    model, row = lfm2(), [prompts()[1] * 2]
    cache = KVOpsCache(model.config, max_tokens=128, block_size=4)
    plain = new_tokens(model, row)
    assert new_tokens(model, row, past_key_values=cache, prompt_lookup_num_tokens=3) == plain
    model = qwen3_next()
    cache = KVOpsCache(model.config, max_tokens=128, block_size=4)
    with torch.no_grad():
        model(torch.tensor(row), past_key_values=cache)
    with pytest.raises(ValueError, match="tokens_to_remove: expected 0, got -1: the states of linear attention cannot"):
        cache.crop(-1)


def test_a_broken_pass_of_a_model_with_states_is_told():
    model = lfm2()
    cache = KVOpsCache(model.config, max_tokens=32)
    ids = torch.ones(1, 4, dtype=torch.int64)

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        model(ids, past_key_values=cache)
        hook = model.model.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids, past_key_values=cache)
        hook.remove()
        with pytest.raises(RuntimeError, match=r"expected passes that end, .* call reset\(\)"):
            model(ids, past_key_values=cache)
        cache.reset()
        model(ids, past_key_values=cache)
