"""The reference model and its generation: logits, greedy tokens, drafts, compression, batches."""

import dataclasses
import inspect
import math
import re

import pytest
import torch

import kvops
from kvops.generation.evaluate import forced_logits
from kvops.generation.generate import GenerationOptions, GenerationStats, generate, stream
from kvops.generation.passes import decode, new_cache, prefill
from kvops.models.config import Llama3RopeScaling, LlamaConfig
from kvops.models.linear import Linear
from kvops.models.llama import Llama, rope_frequencies
from kvops.policies import POLICIES, Compression, SnapKV

TINY = LlamaConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=64,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    max_positions=512,
    tie_embeddings=False,
    sliding_window=None,
    attention_bias=False,
)


def tiny_model(**changes) -> Llama:
    """A random model whose logits are far enough apart for greedy decoding to be stable."""
    config = dataclasses.replace(TINY, **changes)
    generator = torch.Generator().manual_seed(1)
    weights = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "lm_head.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        for name, count in heads.items():
            weights[f"{layer}self_attn.{name}_proj.weight"] = (count * config.head_dim, config.hidden_size)
            weights[f"{layer}self_attn.{name}_proj.bias"] = (count * config.head_dim,)
        weights[f"{layer}self_attn.o_proj.weight"] = (config.hidden_size, config.num_heads * config.head_dim)
        for name in ("gate", "up"):
            weights[f"{layer}mlp.{name}_proj.weight"] = (config.intermediate_size, config.hidden_size)
        weights[f"{layer}mlp.down_proj.weight"] = (config.hidden_size, config.intermediate_size)
        weights[f"{layer}input_layernorm.weight"] = (config.hidden_size,)
        weights[f"{layer}post_attention_layernorm.weight"] = (config.hidden_size,)
    return Llama(
        config, {name: torch.randn(size, generator=generator, device="cpu") * 0.5 for name, size in weights.items()}
    )


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, TINY.vocab_size, (length,), generator=generator).tolist() for length in lengths]


def reference_logits(model: Llama, tokens: list[int]) -> torch.Tensor:
    """All logits of a sequence in one dense pass without any cache, float32 [S, V]."""
    window = model.config.sliding_window
    ids = torch.tensor([tokens])

    def attend(layer, q, k, v):
        left = -1 if window is None else window - 1
        return kvops.flash_attention(q, k, v, causal=True, window_left=left)[0]

    with torch.no_grad():
        return model.logits(model(ids, torch.arange(len(tokens))[None], attend))[0]


def greedy_reference(model: Llama, prompt: list[int], new_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(int(reference_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("window", [None, 9])
def test_greedy_tokens_are_those_of_dense_passes_for_every_prompt_of_a_ragged_batch(window):
    model = tiny_model(sliding_window=window)
    prompts = prompts_of(1, 40, 17, 33)
    expected = [greedy_reference(model, prompt, 24) for prompt in prompts]
    assert generate(model, prompts, max_new_tokens=24).tokens == expected
    assert generate(model, prompts[1:2], max_new_tokens=24).tokens == expected[1:2]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_drafts_do_not_change_greedy_tokens_and_are_accepted_when_the_text_repeats(temperature):
    model = tiny_model()
    phrase = prompts_of(12)[0]
    prompts = [phrase * 4, prompts_of(30)[0], phrase * 2]
    plain = generate(model, prompts, max_new_tokens=40)
    drafted = generate(model, prompts, max_new_tokens=40, draft="prompt_lookup", min_ngram=1)
    assert drafted.tokens == plain.tokens
    assert drafted.stats.accepted > 0
    assert drafted.stats.sequence_steps < plain.stats.sequence_steps
    sampled = generate(model, prompts, max_new_tokens=40, draft="prompt_lookup", min_ngram=1, temperature=temperature)
    assert [len(tokens) for tokens in sampled.tokens] == [40, 40, 40]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("draft", [None, "prompt_lookup"])
def test_a_bias_of_logits_steers_every_prompt_by_its_own_numbers(temperature, draft):
    model, prompts = tiny_model(), [[5, 6, 7, 5, 6], [9, 8, 9, 8]]
    options = {"max_new_tokens": 12, "temperature": temperature, "seed": [3, 4], "draft": draft}
    plain = generate(model, prompts, **options).tokens
    usual = plain[0][0]
    first = {usual: -math.inf, 11: 3.0}
    steered = generate(model, prompts, logit_bias=[first, None], **options).tokens
    assert usual not in steered[0]
    assert steered[1] == plain[1]
    table = torch.zeros(2, TINY.vocab_size)
    table[0, usual], table[0, 11] = -math.inf, 3.0
    assert generate(model, prompts, logit_bias=table, **options).tokens == steered
    always = generate(model, prompts, logit_bias={17: 1e4}, **options).tokens
    assert always == [[17] * 12] * 2


def test_a_sampled_prompt_does_not_depend_on_its_batch():
    model = tiny_model()
    prompts = prompts_of(20, 7, 13)
    together = generate(model, prompts, max_new_tokens=16, temperature=[0.8, 1.3, 0.0], seed=[5, 6, 7]).tokens
    alone = [
        generate(model, [prompt], max_new_tokens=16, temperature=heat, seed=seed).tokens[0]
        for prompt, heat, seed in zip(prompts, (0.8, 1.3, 0.0), (5, 6, 7), strict=True)
    ]
    assert together == alone
    assert together[0] != generate(model, prompts[:1], max_new_tokens=16, temperature=0.8, seed=50).tokens[0]


def test_kernels_and_eager_generate_the_same_tokens(monkeypatch):
    model = tiny_model(sliding_window=11)
    prompts = prompts_of(19, 3)
    options = {
        "max_new_tokens": 5,
        "compression": Compression(ratio=1.5, protect_first=2, protect_last=6, every=3),
        "draft": "prompt_lookup",
        "num_draft": 2,
        "min_ngram": 1,
    }
    eager = generate(model, prompts, **options)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kvops.backend() == "triton-interpreter"
    assert generate(model, prompts, **options).tokens == eager.tokens


def test_generation_ends_behind_a_stop_token_and_gives_its_blocks_back():
    model = tiny_model()
    prompts = prompts_of(9, 21)
    tokens = generate(model, prompts, max_new_tokens=12).tokens
    stop = tokens[0][4]
    cache = new_cache(model, max_batch=2, max_tokens=64)
    stopped = generate(model, prompts, max_new_tokens=12, stop_tokens=[stop], cache=cache).tokens
    assert stopped[0] == tokens[0][: tokens[0].index(stop) + 1]
    expected = tokens[1][: tokens[1].index(stop) + 1] if stop in tokens[1] else tokens[1]
    assert stopped[1] == expected
    assert cache.stats().blocks_in_use == 0


def test_statistics_add_up():
    model = tiny_model()
    prompts = [prompts_of(12)[0] * 3, prompts_of(10)[0]]
    stats = GenerationStats()
    emitted = [0, 0]
    for new in stream(model, prompts, max_new_tokens=20, draft="prompt_lookup", min_ngram=1, stats=stats):
        emitted = [count + len(tokens) for count, tokens in zip(emitted, new, strict=True)]
    assert emitted == [20, 20]
    assert (stats.prompt_tokens, stats.new_tokens, stats.decoded_tokens) == (46, 40, 38)
    assert stats.decoded_tokens == stats.accepted + stats.sequence_steps
    assert 0 < stats.accepted <= stats.drafted
    assert stats.first_token_seconds > 0
    assert stats.decode_seconds > 0
    assert stats.tokens_per_second == pytest.approx(38 / stats.decode_seconds)


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("scope", ["head", "sequence"])
def test_compression_keeps_the_cache_within_its_budget(name, scope):
    model = tiny_model()
    cache = new_cache(model, max_batch=1, max_tokens=200)
    policy = POLICIES[name](scope=scope)
    compression = Compression(ratio=3, policy=policy, protect_first=2, protect_last=10)
    prompt = prompts_of(160)[0]
    with torch.no_grad():
        prefill(model, cache, torch.tensor([prompt]), 0, policy)
        assert cache.stats().blocks_in_use == cache.blocks_for(160)
        compression.apply(cache, [160])
    held = cache.stats()
    assert held.blocks_in_use <= cache.blocks_for(160) / 3
    assert held.slots_in_use <= held.blocks_in_use * cache.block_size
    for layer in range(2):
        for head in range(2):
            positions = cache.gather(layer, 0, head)[2].tolist()
            assert positions == sorted(set(positions))
            assert set(range(2)) | set(range(150, 160)) <= set(positions)


def test_freed_blocks_let_a_second_sequence_in_that_did_not_fit_before():
    model = tiny_model()
    cache = new_cache(model, max_batch=2, max_tokens=160)
    small = kvops.PagedKVCache(
        num_layers=2, num_kv_heads=2, head_dim=8, num_blocks=cache.blocks_for(160) + 8, max_batch=2, max_tokens=176
    )
    prompts = prompts_of(160, 100)
    with pytest.raises(kvops.OutOfBlocksError, match="free"):
        generate(model, prompts, max_new_tokens=4, cache=small)
    small.free()
    compression = Compression(ratio=4, protect_first=1, protect_last=8)
    result = generate(model, prompts, max_new_tokens=4, cache=small, compression=compression)
    assert [len(tokens) for tokens in result.tokens] == [4, 4]


def test_continual_compression_bounds_the_cache_while_decoding():
    model = tiny_model()
    cache = new_cache(model, max_batch=1, max_tokens=256)
    continual = Compression(ratio=4, protect_first=2, protect_last=16, every=16)
    once = Compression(ratio=4, protect_first=2, protect_last=16)
    held = {}
    for name, compression in (("once", once), ("continual", continual)):
        result = generate(model, prompts_of(64), max_new_tokens=160, cache=cache, compression=compression)
        held[name] = result.stats.blocks_in_use
    assert held["once"] > cache.blocks_for(160)
    # to the ratio at the last eviction, and at most `every` tokens in each list since
    assert held["continual"] <= cache.blocks_for(224) / 4 + 2 * cache.blocks_for(16)


def test_forced_logits_are_those_of_a_dense_pass():
    model = tiny_model(rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 64))
    tokens = prompts_of(150)[0]
    exact = reference_logits(model, tokens)
    cache = new_cache(model, max_batch=1, max_tokens=200)
    with torch.no_grad():
        hidden = prefill(model, cache, torch.tensor([tokens[:90]]), 0)
    logits = forced_logits(model, cache, hidden[:, -1:], torch.tensor(tokens[90:]), chunk=16)
    torch.testing.assert_close(logits, exact[89:-1], rtol=1e-4, atol=1e-4)


def test_rows_past_their_query_length_change_nothing():
    model = tiny_model()
    prompts = prompts_of(30, 20)
    with torch.no_grad():
        cache = new_cache(model, max_batch=2, max_tokens=64)
        for row, prompt in enumerate(prompts):
            prefill(model, cache, torch.tensor([prompt]), row)
        before = cache.gather(1, 1, 0)[0].clone()
        decode(model, cache, torch.tensor([[3, 4], [5, 6]]), q_lens=torch.tensor([2, 0], dtype=torch.int32))
    assert cache.next_positions.tolist() == [32, 20]
    assert torch.equal(cache.gather(1, 1, 0)[0], before)


def test_rope_frequencies_of_llama_3_scaling_match_transformers():
    from transformers import LlamaConfig as HfConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](
        HfConfig(hidden_size=4096, num_attention_heads=32, max_position_embeddings=131072, rope_parameters=parameters)
    )
    ours = rope_frequencies(
        dataclasses.replace(
            TINY, head_dim=128, rope_theta=500000.0, rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 8192)
        )
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts: expected at least one"),
        ({"prompts": [[1], []]}, "prompts: expected at least one prompt, each"),
        ({"prompts": [[1] * 500]}, "prompts: expected prompt and new tokens within the model's 512"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"draft": "magic"}, "draft: expected None, 'prompt_lookup' or a model, got 'magic'"),
        ({"temperature": [0.1, 0.2]}, "temperature: expected one number or 1"),
        ({"seed": [1, 2]}, "seed: expected one number or 1"),
        ({"logit_bias": {97: 1.0}}, "logit_bias: expected tokens inside the vocabulary of 97, got 97"),
        ({"logit_bias": [{1: 1.0}, None]}, "logit_bias: expected a mapping for each of 1 requests, got 2"),
        ({"tree": 2}, "tree: expected 1 without drafts, got 2"),
        ({"verification": "block"}, "verification: expected 'token' without draft or with tree > 1, got 'block'"),
        ({"verification": "block", "draft": "prompt_lookup", "tree": 2}, "verification: expected 'token'"),
    ],
)
def test_generate_refuses_bad_arguments_by_name(change, message):
    options = {"prompts": [[1, 2, 3]], "max_new_tokens": 16} | change
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(), options.pop("prompts"), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [1, 2, 3]}, r"prompts: expected sequences of token ids, one for each prompt, got \[1, 2, 3\]"),
        ({"prompts": ["hello"]}, r"prompts: .* got \['hello'\]: generate\(model, \[tokenizer.encode\(text\)\]\)"),
        ({"prompts": [[1.5]]}, r"prompts: expected whole numbers, got \[1.5\]"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: expected an int, got 1.5"),
        ({"stop_tokens": "a"}, "stop_tokens: expected whole numbers, got 'a'"),
        ({"stop_tokens": 7}, "stop_tokens: expected whole numbers, got 7"),
        ({"seed": 1.5}, "seed: expected whole numbers"),
        ({"temperature": None}, "temperature: expected a number, or one for each prompt, got None"),
        ({"bad_words": [5]}, r"bad_words: expected sequences of tokens, such as \[\[17\], \[3, 5\]\], got \[5\]"),
        ({"logit_bias": 4}, r"logit_bias: expected a mapping from tokens to numbers"),
        ({"compression": 4}, r"compression: expected a kvops.policies.Compression, such as Compression\(4\), got 4"),
        ({"compression": [4]}, r"compression: expected a kvops.policies.Compression, such as Compression\(4\), got 4"),
        ({"cache": 4}, "cache: expected a kvops.PagedKVCache, got int"),
    ],
)
def test_generate_refuses_arguments_of_another_type_by_name(change, message):
    options = {"prompts": [[1, 2, 3]], "max_new_tokens": 16} | change
    with pytest.raises(TypeError, match=f"^{message}"):
        generate(tiny_model(), options.pop("prompts"), **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"draft": "prompt_lookup", "max_new_tokens": 2}, "draft: .* none was made: max_new_tokens=2 leaves no token"),
        (
            {"draft": "prompt_lookup", "max_new_tokens": 9, "compression": Compression(ratio=1, every=1)},
            "draft: .* none was made: max_new_tokens=9 and every=1 leave no token to draft",
        ),
        (
            {"draft": "prompt_lookup", "max_new_tokens": 3, "min_ngram": 4},
            "draft: .* none was made: the last 4 to 4 tokens never occurred earlier",
        ),
        ({"top_k": 5, "max_new_tokens": 2}, "top_k: asked for 5, without effect: temperature=0 always takes"),
        ({"top_p": [0.5], "temperature": [0.0], "max_new_tokens": 2}, r"top_p: asked for \[0.5\], without effect"),
        ({"min_p": 0.5, "temperature": 0.5, "max_new_tokens": 2}, None),
        ({"repetition_penalty": 1.5, "max_new_tokens": 2}, None),
    ],
)
def test_what_was_asked_for_and_did_not_happen_is_in_the_statistics(options, expected):
    unmet = generate(tiny_model(), prompts_of(9), **options).stats.unmet
    assert len(unmet) == (expected is not None)
    if expected:
        assert re.match(expected, unmet[0])


def test_drafts_that_are_made_are_no_unmet_request():
    stats = generate(tiny_model(), [prompts_of(12)[0] * 3], max_new_tokens=20, draft="prompt_lookup", min_ngram=1).stats
    assert stats.drafted > 0
    assert stats.unmet == []
    ended = generate(tiny_model(), prompts_of(9), max_new_tokens=9, draft="prompt_lookup", stop_tokens=range(97)).stats
    assert ended.unmet == ["draft: asked for drafts, none was made: every prompt ended before a pass with drafts"]


@pytest.mark.parametrize("function", [generate, stream])
def test_a_misspelt_argument_names_the_function_that_was_called(function):
    """``generate(max_new_token=3)`` named ``stream()``."""
    with pytest.raises(
        TypeError, match=rf"^{function.__name__}\(\) got an unexpected keyword argument 'max_new_token'"
    ):
        function(tiny_model(), [[1]], max_new_token=3)


def test_generate_and_stream_take_the_options_and_what_is_theirs():
    """One dataclass has the options; both functions write them out, for help, editors and type checkers."""
    options = dataclasses.fields(GenerationOptions)
    for function, own in ((generate, ["cache"]), (stream, ["cache", "stats"])):
        parameters = dict(list(inspect.signature(function).parameters.items())[2:])
        assert list(parameters) == [field.name for field in options] + own
        for field in options:
            parameter = parameters[field.name]
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
            assert (parameter.default, parameter.annotation) == (field.default, field.type)


def test_a_prompt_is_read_into_an_empty_row_only(device):
    """Dense attention over the new tokens alone: what the row held was in the cache and never seen."""
    model = tiny_model().to(device)
    cache, tokens = new_cache(model, max_batch=1, max_tokens=32), torch.ones(1, 5, dtype=torch.int64, device=device)
    with torch.no_grad():
        prefill(model, cache, tokens, 0)
        if device == "cpu":
            with pytest.raises(ValueError, match="row: expected an empty one, got 0, which holds tokens"):
                prefill(model, cache, tokens, 0)
        with pytest.raises(ValueError, match=r"cache.max_batch: expected at least 2, got 1"):
            prefill(model, cache, tokens, 1)
        with pytest.raises(ValueError, match=r"tokens: expected shape \[1, S\] = \[1, any\], got \[5\]"):
            prefill(model, cache, tokens[0], 0)


def test_tokens_and_numbers_may_come_as_tensors(device):
    """A stop token in a tensor was never met: it was looked up by its identity."""
    model, prompts = tiny_model().to(device), prompts_of(9, 5)
    expected = generate(model, prompts, max_new_tokens=6).tokens
    stop = expected[0][3]
    given = [torch.tensor(prompt, device=device) for prompt in prompts]
    options = {"temperature": torch.zeros(2), "seed": torch.tensor([3, 4])}
    result = generate(model, given, max_new_tokens=6, stop_tokens=torch.tensor([stop]), **options)
    assert result.tokens == generate(model, prompts, max_new_tokens=6, stop_tokens=[stop]).tokens
    assert result.tokens[0] == expected[0][: expected[0].index(stop) + 1]


def test_a_cache_of_another_shape_or_with_tokens_in_it_is_refused(device):
    """Tokens that an abandoned generation had left in a cache were attended to by the next."""
    model, prompts = tiny_model().to(device), prompts_of(9, 5)
    cache = new_cache(model, max_batch=2, max_tokens=32)
    steps = stream(model, prompts, max_new_tokens=8, cache=cache)
    next(steps)
    with pytest.raises(ValueError, match=r"cache: expected empty rows, got some of \[9, 5\] tokens: free\(\)"):
        generate(model, prompts, max_new_tokens=8, cache=cache)
    steps.close()
    assert cache.stats().blocks_in_use == 0
    expected = generate(model, prompts, max_new_tokens=8).tokens
    assert generate(model, prompts, max_new_tokens=8, cache=cache).tokens == expected
    other = tiny_model(num_layers=3).to(device)
    for wrong, message in (
        (new_cache(model, max_batch=3, max_tokens=32), "max_batch=2, .* got 3"),
        (new_cache(other, max_batch=2, max_tokens=32), "num_layers=2, .* got 3"),
    ):
        with pytest.raises(ValueError, match=f"cache: expected {message}"):
            generate(model, prompts, max_new_tokens=8, cache=wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 0.5}, "ratio: expected at least 1"),
        ({"protect_first": -1}, "protect_first: expected at least 0"),
        ({"protect_last": -1}, "protect_last: expected at least 0"),
        ({"every": -1}, "every: expected at least 0"),
    ],
)
def test_compression_refuses_bad_arguments_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Compression(**change)


def test_snapkv_refuses_an_even_pooling_window():
    with pytest.raises(ValueError, match="pool: expected an odd positive number, got 4"):
        SnapKV(pool=4)


def test_a_missing_or_misshapen_weight_is_named():
    weights = {"model.embed_tokens.weight": torch.zeros(TINY.vocab_size, TINY.hidden_size)}
    with pytest.raises(ValueError, match=r"weights: expected 'model\.layers\.0\.self_attn\.q_proj\.weight'"):
        Llama(TINY, weights)
    weights["model.embed_tokens.weight"] = torch.zeros(3, TINY.hidden_size)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight to have shape \[97, 48\], got \[3, 48\]"):
        Llama(TINY, weights)


@pytest.mark.parametrize("shape", [(40, 32), (24, 48), (40, 17), (30, 32)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(1, 1), (1, 2), (3, 2), (2, 4), (0, 5), (3, 11)])
def test_few_rows_are_multiplied_as_many_are(shape, bias, leading):
    layer = Linear(shape[1], shape[0], bias=bias)
    x = torch.randn(*leading, shape[1])
    exact = layer.double()(x.double()) if bias else x.double() @ layer.weight.double().t()
    with torch.no_grad():
        actual = layer.float()(x)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, exact.float(), rtol=1e-5, atol=1e-6)


def test_statistics_print_in_a_few_lines():
    stats = GenerationStats(
        prompt_tokens=30, new_tokens=9, decoded_tokens=8, decode_seconds=0.5, first_token_seconds=0.25
    )
    assert (
        repr(stats) == "GenerationStats(30 prompt tokens, 9 new, 0.25 s to the first tokens, 16.0 tokens/s from there)"
    )
    stats.drafted, stats.accepted, stats.full_blocks, stats.final_blocks = 6, 4, 8, 2
    stats.unmet.append("nothing was compressed")
    for part in ("4 of 6 drafted tokens accepted", "caches 4.0 times smaller at the end", "nothing was compressed"):
        assert part in repr(stats)
