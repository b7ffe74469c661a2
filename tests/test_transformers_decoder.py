"""transformers' models in the loop of kvops.generation.generate: batches of ragged prompts, drafts, compression."""

import pytest
import torch
import transformers
from test_transformers import MODELS, TINY, make_model
from test_transformers_cache import left_padded, prompts

from kvops.generation.generate import generate
from kvops.generation.passes import new_cache, prefill, recite
from kvops.integrations.transformers import Decoder, KVOpsCache
from kvops.policies import ByHeart, Compression, Recital, SnapKV


def repetitive() -> list[list[int]]:
    """Prompts of several lengths in which something is looked up."""
    return [row[:20] * 2 for row in prompts()[:2]] + [prompts()[2][:17] * 2]


def by_transformers(model: torch.nn.Module, rows: list[list[int]], **options) -> list[list[int]]:
    inputs = left_padded(rows)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False, **options)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("family", [family for family in MODELS if family != "Gemma3"])
def test_the_tokens_are_those_of_transformers_with_and_without_drafts(family):
    model = make_model(family)
    model.set_attn_implementation("eager")
    expected = by_transformers(model, repetitive())
    decoder = Decoder(model)
    assert generate(decoder, repetitive(), max_new_tokens=12).tokens == expected
    drafted = generate(decoder, repetitive(), max_new_tokens=12, draft="prompt_lookup", num_draft=3, min_ngram=1)
    assert drafted.tokens == expected
    assert drafted.stats.drafted > 0


def test_another_model_drafts_chains_and_trees_for_a_batch():
    model, assistant = make_model("Mistral"), make_model("Gemma2", num_hidden_layers=1)
    for decoder, draft in ((model, model), (model, assistant)):
        plain = generate(Decoder(decoder), repetitive(), max_new_tokens=8)
        for tree in (1, 2):
            drafted = generate(
                Decoder(decoder), repetitive(), max_new_tokens=8, draft=Decoder(draft), num_draft=3, tree=tree
            )
            assert drafted.tokens == plain.tokens
            if draft is decoder:
                assert drafted.stats.accepted > 0


@pytest.mark.parametrize(("family", "every"), [("Gemma2", 0), ("GptOss", 3)])
def test_compressed_tokens_are_those_of_the_cache_within_transformers(family, every):
    model = make_model(family)
    decoder = Decoder(model)
    policy = SnapKV(observe=8)
    compression = Compression(ratio=2, policy=policy, protect_first=2, protect_last=4, every=every)
    ours = generate(decoder, prompts(), max_new_tokens=12, compression=compression)
    cache = KVOpsCache(model.config, max_tokens=96, compression=compression)
    assert ours.tokens == by_transformers(model, prompts(), past_key_values=cache)
    drafted = generate(decoder, prompts(), max_new_tokens=12, compression=compression, draft="prompt_lookup")
    assert drafted.tokens == ours.tokens


def test_prompts_are_recited_by_transformers_models_too_and_sinks_count():
    """Layers with attention sinks and without windows: what a recital pays is less than what there is to pay."""
    decoder = Decoder(make_model("GptOss", layer_types=["full_attention"] * 2))
    compression = Compression(ratio=2, policy=ByHeart(recital=Recital(chunk=16)), protect_first=2, protect_last=4)
    plain = generate(decoder, prompts(), max_new_tokens=8, compression=compression)
    drafted = generate(decoder, prompts(), max_new_tokens=8, compression=compression, draft="prompt_lookup")
    assert drafted.tokens == plain.tokens
    cache, ids = new_cache(decoder, max_batch=1, max_tokens=32), torch.tensor([prompts()[0][:12]])
    with torch.no_grad():
        prefill(decoder, cache, ids, 0)
        paid = recite(decoder, cache, ids, 0, Recital())
        queries = 12 * 3
        with_sinks = [float(one.total.sum()) / 2 for one in paid]
        for layer in decoder.model.model.layers:
            layer.self_attn.sinks.fill_(-1e4)
        without = [float(one.total.sum()) / 2 for one in recite(decoder, cache, ids, 0, Recital())]
    assert with_sinks[0] < without[0] < queries
    with pytest.raises(ValueError, match="policy: expected one without recital, as the model's window of"):
        generate(Decoder(make_model("Mistral")), prompts(), max_new_tokens=2, compression=compression)


def test_scores_know_of_scale_and_softcap():
    """With the attention's own scale and cap, what the last query pays each layer sums to one a head."""
    paid = []

    class Watch(SnapKV):
        def score(self, seen):
            paid.append(seen.attention(last=1).sum(-1))
            return super().score(seen)

    decoder = Decoder(make_model("Gemma2", query_pre_attn_scalar=2))
    generate(decoder, prompts()[:1], max_new_tokens=1, compression=Compression(policy=Watch()))
    for sums in paid:
        torch.testing.assert_close(sums, torch.full_like(sums, 3.0))  # query heads of a group


def test_models_that_decode_otherwise_are_refused():
    config = transformers.LlamaConfig(**TINY, layer_types=["full_attention", "chunked_attention"])
    with pytest.raises(ValueError, match="model: expected layers of full or sliding attention, got chunked_attention"):
        Decoder(transformers.LlamaForCausalLM(config))
    with pytest.raises(ValueError, match="model: expected a causal language model, got LlamaModel"):
        Decoder(transformers.LlamaModel(transformers.LlamaConfig(**TINY)))
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=48, n_layer=1, n_head=6, vocab_size=61))
    with pytest.raises(
        ValueError, match=r"model: expected one that hands keys and values straight on .* \(BloomForCausalLM\)"
    ):
        Decoder(bloom)


def test_models_that_do_more_to_their_logits():
    """Granite divides them, Cohere multiplies them, and BERT has a layer before the matrix."""
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2, "vocab_size": 61}
    for model in (
        transformers.GraniteForCausalLM(transformers.GraniteConfig(**TINY, logits_scaling=4.0, initializer_range=0.2)),
        transformers.CohereForCausalLM(transformers.CohereConfig(**TINY, logit_scale=0.5, initializer_range=0.2)),
        transformers.BertLMHeadModel(transformers.BertConfig(**sizes, is_decoder=True, initializer_range=0.2)),
    ):
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        model.eval()
        alone = [by_transformers(model, [row])[0] for row in repetitive()]
        decoder = Decoder(model)
        for options in ({}, {"draft": "prompt_lookup"}):
            assert generate(decoder, repetitive(), max_new_tokens=12, **options).tokens == alone
        assert "forward" not in vars(model.base_model)


def test_a_model_that_counts_its_tokens_itself_is_refused():
    """The decoders of BART's family get their positions from the length of a cache."""
    sizes = {"d_model": 48, "decoder_layers": 1, "decoder_attention_heads": 6, "decoder_ffn_dim": 16}
    model = transformers.BartForCausalLM(transformers.BartConfig(**sizes, vocab_size=61, init_std=0.2)).eval()
    with pytest.raises(ValueError, match=r"model: expected one that goes by its position_ids, got BartForCausalLM"):
        Decoder(model)


def test_layers_that_share_keys_are_refused():
    sizes = {"vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8, "laurel_rank": 8}
    types = ["sliding_attention", "full_attention"] * 2
    options = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": types}
    model = transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**TINY | sizes | options)).eval()
    with pytest.raises(ValueError, match=r"model: expected one that hands keys .* got one whose layers share them"):
        Decoder(model)


def test_a_model_without_groups_of_heads_and_with_half_a_rotary_embedding():
    """A config that counts no heads of keys ended in an AttributeError, and policies were told of frequencies that the
    model does not have."""
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 1, "vocab_size": 61}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=48, n_head=6, n_layer=1, vocab_size=61)).eval()
    phi = transformers.PhiForCausalLM(transformers.PhiConfig(**sizes, partial_rotary_factor=0.5)).eval()
    for model in (gpt2, phi):
        expected = by_transformers(model, repetitive())
        decoder = Decoder(model)
        assert decoder.rope is None
        assert generate(decoder, repetitive(), max_new_tokens=12).tokens == expected
