"""transformers models with a position bias (T5 and its relatives), and where a bias is refused."""

import pytest
import torch
import transformers
from test_transformers import TINY, assert_like_eager, make_model

from kvops.integrations.transformers import KVOpsCache, attention
from kvops.policies import Compression


@pytest.mark.parametrize("family", ["T5", "MT5", "UMT5", "LongT5", "SwitchTransformers"])
@pytest.mark.parametrize("padded", [False, True])
def test_models_with_a_position_bias(family, padded):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    config = getattr(transformers, f"{family}Config")(**sizes, vocab_size=61, decoder_start_token_id=0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    for parameter in model.parameters():  # as initialised, the biases are near 0
        torch.nn.init.normal_(parameter, std=0.3)
    ids, real = torch.randint(1, 61, (2, 7)), torch.ones(2, 5, dtype=torch.int64)
    batch = {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    if padded:
        batch["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7])
        real[0, 3:] = 0
        batch["decoder_attention_mask"] = real
    assert_like_eager(model, batch, real, use_cache=False)
    expected = []
    for name in ("eager", "kvops"):
        model.set_attn_implementation(name)
        given = {"attention_mask": batch["attention_mask"]} if padded else {}
        expected.append(model.generate(ids, **given, max_new_tokens=4, do_sample=False))
    assert torch.equal(*expected)


def test_a_bias_beside_a_paged_cache_is_refused():
    model, ids = make_model("Llama"), torch.randint(1, TINY["vocab_size"], (1, 5))
    model.set_attn_implementation("kvops")
    with pytest.raises(ValueError, match=r"attention_mask: expected .* beside a KVOpsCache .* own cache"):
        model(ids, attention_mask=torch.zeros(1, 1, 5, 5), past_key_values=KVOpsCache(model.config, max_tokens=64))


def test_a_bias_beside_packed_sequences_is_refused():
    model, lens = make_model("Llama"), torch.tensor([0, 4], dtype=torch.int32)
    q, k, v = (torch.zeros(1, heads, 4, 8) for heads in (6, 2, 2))
    packing = {"cu_seq_lens_q": lens, "cu_seq_lens_k": lens}
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected None beside a position bias"):
        attention(model.model.layers[0].self_attn, q, k, v, None, position_bias=torch.zeros(1, 6, 4, 4), **packing)


def gemma3_of_images() -> torch.nn.Module:
    """Gemma 3 with layers of a window; tokens of an image see one another in both directions."""
    text = {**TINY, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
    text["layer_types"] = ["sliding_attention", "full_attention"]
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 8, "patch_size": 4}, mm_tokens_per_image=4
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.set_attn_implementation("kvops")
    return model


@pytest.mark.parametrize("padded", [False, True])
def test_a_prompt_with_ranges_of_image_tokens_goes_into_a_paged_cache(padded):
    model, ids = gemma3_of_images(), torch.randint(1, TINY["vocab_size"], (2, 14))
    kinds, real = torch.zeros_like(ids), torch.ones_like(ids)
    kinds[0, 3:9], kinds[1, 7:12] = 1, 1
    if padded:
        real[1, :5], kinds[1, :5] = 0, 0
    given = {"token_type_ids": kinds, "attention_mask": real, "max_new_tokens": 8, "do_sample": False}
    given |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, **given)
    cache = KVOpsCache(model.config, max_tokens=64, block_size=4)
    got = model.generate(ids, **given, past_key_values=cache)
    plain = model.generate(ids, **given | {"token_type_ids": torch.zeros_like(kinds)})
    assert not torch.allclose(plain.logits[0], expected.logits[0], atol=1e-3), "the mask changes nothing here"
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 14 + 7
    lens = [pool.seq_lens.amax((0, 2)).tolist() for pool in cache.pools]
    assert lens == [[21, 16 if padded else 21]]


def test_a_dense_mask_after_the_prompt_and_with_a_compression_is_refused():
    model, ids = gemma3_of_images(), torch.randint(1, TINY["vocab_size"], (1, 12))
    kinds = torch.zeros_like(ids)
    kinds[0, 3:9] = 1
    cache = KVOpsCache(model.config, max_tokens=64)
    with torch.no_grad():
        model(ids, token_type_ids=kinds, past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask: expected .* beside a KVOpsCache"):
            model(ids, token_type_ids=kinds, past_key_values=cache)
        cache = KVOpsCache(model.config, max_tokens=64, compression=Compression(ratio=2))
        with pytest.raises(ValueError, match="compression: expected None with a prompt under a dense mask"):
            model(ids, token_type_ids=kinds, past_key_values=cache)
