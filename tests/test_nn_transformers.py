"""kvops.nn.Attention in the place of the attention layers of transformers."""

import copy

import pytest
import torch
import transformers
from test_transformers import MODELS, TINY, assert_no_worse, make_model, padded, rows, train

from kvops.integrations.transformers import KVOpsCache, attention_module, replace

FAMILIES = MODELS | {"Qwen3": ("Qwen3Config", {}), "Gemma": ("GemmaConfig", {})}


def make_any(family: str, monkeypatch, **changes) -> torch.nn.Module:
    monkeypatch.setitem(MODELS, family, FAMILIES[family])
    model = make_model(family, **changes)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):  # ones or zeros hide a norm that was forgotten
            torch.nn.init.normal_(weight, 1.0, 0.3)
    return model


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2"])
@torch.no_grad()
def test_a_layer_of_transformers_is_taken_over(family, monkeypatch):
    model = make_any(family, monkeypatch)
    model.set_attn_implementation("eager")
    seen = {}

    def record(module, args, kwargs, output):
        seen[module.layer_idx] = kwargs.get("hidden_states", args[0] if args else None), output[0]

    layers = [layer.self_attn for layer in model.model.layers]
    for layer in layers:
        layer.register_forward_hook(record, with_kwargs=True)
    model(torch.cat(rows()[:1]))
    for index, layer in enumerate(layers):
        own = attention_module(layer)
        assert own.q_proj is layer.q_proj
        x, expected = seen[index]
        torch.testing.assert_close(own(x), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_replaced_layers_give_the_models_logits_gradients_and_tokens(family, monkeypatch):
    model, batch = make_any(family, monkeypatch), padded("left")
    alone = [{"input_ids": row} for row in rows()]
    reference, names = copy.deepcopy(model), list(model.state_dict())
    report = replace(model)
    assert (report.swapped, str(report)) == (2, "2 of 2 attention layers run on kvops.nn.Attention")
    assert list(model.state_dict()) == names
    theirs = train(reference, "eager", alone)
    assert_no_worse(train(model, "kvops", [batch]), theirs, train(reference.double(), "eager", alone))
    prompt = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    options = {"max_new_tokens": 4, "do_sample": False}
    cache = KVOpsCache(model.config, max_tokens=32, block_size=4)
    replaced = model.generate(**prompt, **options, past_key_values=cache)
    assert torch.equal(replaced, model.generate(**prompt, **options))


def test_a_replaced_layer_takes_the_cache_under_both_names():
    """transformers 5.24 calls ``past_key_values`` ``cache``."""
    model, seen = make_model("Llama"), []
    replace(model)
    layer = model.model.layers[0].self_attn

    class Cache:
        def update(self, k, v, layer_idx):
            seen.append(layer_idx)
            return 2 * k, v

    turn = torch.randn(2, 1, 5, layer.head_dim)
    x = torch.randn(1, 5, model.config.hidden_size)
    alone, before, now = (
        layer(x, tuple(turn), **cache)[0] for cache in ({}, {"past_key_values": Cache()}, {"cache": Cache()})
    )
    assert seen == [0, 0]
    assert torch.equal(before, now)
    assert not torch.equal(before, alone)


def test_the_report_tells_what_was_left_and_why():
    model = make_model("Llama", attention_dropout=0.5)

    class OwnAttention(torch.nn.Module):
        pass

    model.first, model.second = torch.nn.MultiheadAttention(4, 2), OwnAttention()
    report = replace(model)
    assert report.swapped == 2
    assert str(report).splitlines() == [
        "2 of 4 attention layers run on kvops.nn.Attention",
        "  left: first (MultiheadAttention): takes query, key and value: build kvops.nn.Attention.from_torch and call "
        "it with x",
        "  left: second (OwnAttention): not one of Gemma2Attention, Gemma3Attention, GemmaAttention, GptOssAttention, "
        "LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention",
    ]
    assert replace(model).swapped == 0, "a layer is swapped once"
    assert [layer.self_attn.dropout for layer in model.model.layers] == [0.5, 0.5]


def test_frequencies_that_are_scaled_must_be_given():
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}
    layer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, rope_parameters=scaled)).model.layers[0]
    with pytest.raises(ValueError, match=r"rope: expected the frequencies, .* rotary_emb.inv_freq"):
        attention_module(layer.self_attn)
    assert attention_module(layer.self_attn, rope=torch.ones(4)).rope.tolist() == [1.0] * 4


def test_what_is_no_layer_and_no_model_is_refused():
    with pytest.raises(ValueError, match=r"layer: .* got Linear: not one of Gemma2"):
        attention_module(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"model: expected a model of transformers, got Linear"):
        replace(torch.nn.Linear(1, 1))
