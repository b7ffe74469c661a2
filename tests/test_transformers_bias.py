"""transformers models with a position bias (T5 and its relatives), and where a bias is refused."""

import pytest
import torch
import transformers
from test_transformers import TINY, assert_like_eager, make_model
from transformers.masking_utils import create_causal_mask

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


def make_cache(model, implementation):
    if implementation == "eager":
        return transformers.DynamicCache()
    return KVOpsCache(model.config, max_tokens=64, block_size=4)


@pytest.mark.parametrize("family", ["T5", "UMT5"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_position_bias_beside_a_paged_cache(family, padded, monkeypatch):
    """The decoder's own tokens are in the paged cache, and nothing is copied out of it."""
    monkeypatch.setattr(KVOpsCache, "copies", lambda *args: pytest.fail("keys were copied"))
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    config = getattr(transformers, f"{family}Config")(**sizes, vocab_size=61, decoder_start_token_id=0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    for parameter in model.parameters():  # as initialised, the biases are near 0
        torch.nn.init.normal_(parameter, std=0.3)
    ids, text = torch.randint(1, 61, (2, 7)), torch.randint(1, 61, (2, 12))
    real = torch.ones(2, 12, dtype=torch.int64)
    if padded:
        real[1, :3] = 0
    results = []
    for name in ("eager", "kvops"):
        model.set_attn_implementation(name)
        own = make_cache(model, name)
        cache, logits = transformers.EncoderDecoderCache(own, transformers.DynamicCache()), []
        for first, last in ((0, 6), (6, 10), (10, 11), (11, 12)):
            with torch.no_grad():
                out = model(
                    input_ids=ids, decoder_input_ids=text[:, first:last], past_key_values=cache,
                    decoder_attention_mask=real[:, :last] if padded else None,
                )  # fmt: skip
            logits.append(out.logits)
        results.append(torch.cat(logits, 1)[real.bool()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert own.pools[0].seq_lens.amax((0, 2)).tolist() == [12, 9 if padded else 12]


def read(model, passes, cache):
    """The logits of passes (tokens, mask), of which each goes on where the one before ended."""
    logits, done = [], 0
    for ids, mask in passes:
        places = torch.arange(done, done + ids.shape[1]).expand(len(ids), -1)
        done += ids.shape[1]
        with torch.no_grad():
            logits.append(model(ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits)
    return torch.cat(logits, 1)


def dense_passes(lengths, batch=2, heads=1, hidden=0.4):
    """Passes whose queries see their own tokens and some of all others, later ones of their pass included."""
    passes, done = [], 0
    for count in lengths:
        done += count
        seen = torch.rand(batch, heads, count, done) > hidden
        seen |= torch.eye(done, dtype=torch.bool)[done - count :]
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        passes.append((torch.randint(1, TINY["vocab_size"], (batch, count)), mask))
    return passes


@pytest.mark.parametrize("family", ["Llama", "GptOss", "Gemma2"])
def test_four_dimensional_masks_beside_a_paged_cache(family):
    model, passes = make_model(family), dense_passes([6, 4, 1, 1, 5])
    results = []
    for name in ("eager", "kvops"):
        model.set_attn_implementation(name)
        cache = make_cache(model, name)
        results.append(read(model, passes, cache))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 17


def test_a_dense_mask_behind_padding_beams_and_drafts():
    """Columns of the batch that are padding have no slots; the record of them moves with the rows."""
    model = make_model("Llama")
    real = torch.ones(2, 7, dtype=torch.int64)
    real[0, :3], real[1, 2:4] = 0, 0
    prompt, drafts = torch.randint(1, TINY["vocab_size"], (2, 7)), torch.randint(1, TINY["vocab_size"], (2, 3))
    seen = torch.rand(3, 1, 5, 12) > 0.3
    seen |= torch.eye(12, dtype=torch.bool)[7:]
    order = torch.tensor([1, 0, 0])
    seen[..., :7] &= real[order].bool()[:, None, None]
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    turn, results = torch.randint(1, TINY["vocab_size"], (3, 5)), []
    for name in ("eager", "kvops"):
        model.set_attn_implementation(name)
        cache = make_cache(model, name)
        with torch.no_grad():
            model(prompt, attention_mask=real, past_key_values=cache, position_ids=torch.arange(7)[None])
            whole = torch.cat((real, torch.ones_like(drafts)), 1)
            model(drafts, attention_mask=whole, past_key_values=cache, position_ids=torch.arange(7, 10)[None])
            cache.crop(-3)
            cache.batch_select_indices(order)
            places = torch.arange(7, 12)[None]
            results.append(model(turn, attention_mask=mask, past_key_values=cache, position_ids=places).logits)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_a_mask_that_shows_freed_keys_is_refused():
    """Layers with a window have given up the keys outside of it."""
    model = make_model("Gemma2", layer_types=["sliding_attention", "full_attention"])
    model.set_attn_implementation("kvops")
    cache = KVOpsCache(model.config, max_tokens=128, block_size=4)
    ids = torch.randint(1, TINY["vocab_size"], (1, 40))
    with torch.no_grad():
        for part in ids.split(8, 1):
            model(part, past_key_values=cache)
        mask = torch.ones(1, 1, 1, 41, dtype=torch.bool)
        with pytest.raises(ValueError, match="attention_mask: expected a mask that hides the keys outside"):
            model(ids[:, :1], attention_mask=mask, past_key_values=cache)


def test_a_position_bias_beside_packed_sequences_in_a_paged_cache_is_refused():
    model = make_model("Llama")
    bias, places = torch.zeros(1, 6, 6, 6), torch.tensor([[0, 1, 2, 0, 1, 2]])
    module = model.model.layers[0].self_attn
    model.set_attn_implementation("kvops")
    cache = KVOpsCache(model.config, max_tokens=64)
    mask = create_causal_mask(model.config, torch.zeros(1, 6, 48), None, None, position_ids=places)
    q, k, v = (torch.zeros(1, heads, 6, 8) for heads in (6, 2, 2))
    with pytest.raises(ValueError, match="position_ids: expected one sequence to a row"):
        attention(module, q, *cache.update(k, v, 0), mask, position_bias=bias)


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


@pytest.mark.parametrize("padded", [False, True])
def test_a_second_turn_with_image_tokens_where_a_layer_has_freed_keys(padded):
    """The lists of its layers with a window are shorter than the mask."""
    model, ids = gemma3_of_images(), torch.randint(1, TINY["vocab_size"], (2, 60))
    kinds, real = torch.zeros_like(ids), torch.ones_like(ids)
    kinds[:, 3:9], kinds[0, 42:48], kinds[1, 50:57] = 1, 1, 1
    if padded:
        real[1, :5], kinds[1, :5], real[0, 44] = 0, 0, 0
    results, shorter = [], False
    for cache in (transformers.DynamicCache(), KVOpsCache(model.config, max_tokens=64, block_size=4)):
        logits = []
        for first, last in ((0, 14), (14, 24), (24, 25), (25, 34), (34, 40), (40, 60)):
            given = {"token_type_ids": kinds[:, first:last], "attention_mask": real[:, :last]}
            with torch.no_grad():
                logits.append(model(ids[:, first:last], **given, past_key_values=cache).logits)
            if isinstance(cache, KVOpsCache) and first == 34:
                lens = cache.pools[0].seq_lens
                shorter = bool((lens[0] < lens[1]).all())
        results.append(torch.cat(logits, 1)[real.bool()])
    assert shorter, "no key was freed before the second image"
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_dense_masks_and_position_biases_beside_a_compression_are_refused():
    model, ids = make_model("Llama"), torch.randint(1, TINY["vocab_size"], (1, 5))
    model.set_attn_implementation("kvops")
    cache = KVOpsCache(model.config, max_tokens=64, compression=Compression(ratio=2))
    with torch.no_grad(), pytest.raises(ValueError, match=r"attention_mask: expected a causal .* beside a compression"):
        model(ids, attention_mask=torch.zeros(1, 1, 5, 5), past_key_values=cache)
    cache.reset()
    q, k, v = (torch.zeros(1, heads, 4, 8) for heads in (6, 2, 2))
    key, value = cache.update(k, v, 0)
    with pytest.raises(ValueError, match=r"position_bias: expected a causal .* leave out the compression"):
        attention(model.model.layers[0].self_attn, q, key, value, None, position_bias=torch.zeros(1, 6, 4, 4))
    model, ids = gemma3_of_images(), torch.randint(1, TINY["vocab_size"], (1, 12))
    kinds = torch.zeros_like(ids)
    kinds[0, 3:9] = 1
    cache = KVOpsCache(model.config, max_tokens=64, compression=Compression(ratio=2))
    with torch.no_grad(), pytest.raises(ValueError, match="attention_mask: expected a causal mask"):
        model(ids, token_type_ids=kinds, past_key_values=cache)
