"""Models in Hugging Face folders: the configuration and the weights, against transformers."""

import dataclasses
import json

import pytest
import torch
from model_files import assert_same_weights, hf_config, transformers_model
from safetensors.torch import load_file, save_file

from kvops.models.config import LlamaConfig
from kvops.models.loading import load
from kvops.models.rope import Llama3RopeScaling


def test_config_of_transformers_4_is_read():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    config = LlamaConfig.from_hf(hf_config(rope_theta=5e5, rope_scaling=scaling, tie_word_embeddings=True, head_dim=16))
    assert config == LlamaConfig(
        64, 24, 40, 2, 3, 1, 16, 1e-5, 5e5, Llama3RopeScaling(8.0, 1.0, 4.0, 64), 128, tie_embeddings=True
    )


def test_config_defaults_are_those_of_the_architecture():
    assert LlamaConfig.from_hf(hf_config(num_key_value_heads=...)).num_kv_heads == 3
    assert LlamaConfig.from_hf(hf_config()).head_dim == 8
    assert LlamaConfig.from_hf(hf_config(architectures=..., model_type="mistral")).sliding_window == 4096
    assert (
        LlamaConfig.from_hf(hf_config(architectures=["MistralForCausalLM"], sliding_window=None)).sliding_window is None
    )
    qwen2 = hf_config(architectures=["Qwen2ForCausalLM"], sliding_window=32, max_window_layers=0)
    assert LlamaConfig.from_hf(qwen2).sliding_window is None  # use_sliding_window says no
    assert LlamaConfig.from_hf({**qwen2, "use_sliding_window": True}).sliding_window == 32
    assert LlamaConfig.from_hf({**qwen2, "use_sliding_window": True, "max_window_layers": 2}).sliding_window is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures: supported are LlamaForCausalLM.*got GPT2LMHeadModel"),
        ({"architectures": ..., "model_type": "gemma"}, "architectures: supported are .*got gemma"),
        ({"architectures": ...}, "architectures: supported are .*got none"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type: supported are default, linear.*got dynamic"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type: supported .* got longrope"),
        ({"rope_scaling": {"factor": 4.0}}, "factor: expected no such entry beside rope_type 'default'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "short_factor": [1.0]}}, "short_factor: expected no such"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1.0}}, "beta_fast: expected more than"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor: expected in the model's configuration"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: only 1.0 is supported, got 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act: only 'silu' is supported, got 'gelu'"),
        ({"attention_bias": True}, "attention_bias: only False is supported, got True"),
        ({"mlp_bias": True}, "mlp_bias: only False"),
        ({"vocab_size": ...}, "vocab_size: expected in the model's configuration"),
        ({"vocab_size": 0}, "vocab_size: expected a positive number, got 0"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers: expected an integer .*got 'many'"),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_kv_heads: expected a divisor of num_heads 4, got 3",
        ),
        ({"head_dim": 7}, "head_dim: expected an even size"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 1,
            },
            "max_window_layers, layer_types: expected .* in all layers or in none, got one in 1 of 2 layers",
        ),
    ],
)
def test_config_that_is_not_supported_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf(hf_config(**changes))


@pytest.mark.parametrize("kind", ["llama", "llama3", "mistral", "qwen2"])
@pytest.mark.parametrize("shard", ["10GB", "8KB"])
def test_folder_loads_to_what_transformers_saved(tmp_path, kind, shard):
    model = transformers_model(kind)
    if kind == "qwen2":  # zeros would hide a bias that is lost
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shard == "8KB")
    loaded = load(tmp_path)
    expected = {name: value for name, value in model.state_dict().items() if name in loaded.weights}
    missing = model.state_dict().keys() - loaded.weights.keys()
    assert missing == ({"lm_head.weight"} if loaded.config.tie_embeddings else set())
    assert_same_weights(loaded.weights, expected)
    config = loaded.config
    assert (config.hidden_size, config.num_heads, config.num_kv_heads, config.max_positions) == (24, 6, 2, 128)
    assert config.sliding_window == {"mistral": 8}.get(kind)
    assert config.attention_bias == (kind == "qwen2")
    assert config.tie_embeddings == (kind in ("llama3", "qwen2"))
    assert config.head_dim == (16 if kind == "llama3" else 4)
    assert config.rope_theta == {"llama": 3e4, "llama3": 5e5}.get(kind, 1e4)
    assert config.rope_scaling == (Llama3RopeScaling(8.0, 1.0, 4.0, 64) if kind == "llama3" else None)
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json: expected the tokenizer"):
        _ = loaded.tokenizer


@pytest.mark.model
def test_a_gguf_model_is_the_same_model_written_as_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    from kvops.integrations.transformers import write_folder

    model = load(dtype=torch.float16, progress=False)
    again = load(write_folder(model, tmp_path / "folder"), dtype=torch.float16, progress=False)
    assert again.config == model.config
    assert_same_weights(again.weights, model.weights)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    text = "What is a KV cache? 1234 <|im_end|>"
    assert tokenizer.encode(text, add_special_tokens=False) == model.tokenizer.encode(text)
    windowed = dataclasses.replace(model, config=dataclasses.replace(model.config, sliding_window=8))
    with pytest.raises(ValueError, match="model: expected sliding_window=None to write a folder, got 8"):
        write_folder(windowed, tmp_path)


def test_folder_with_something_missing_or_broken_is_refused(tmp_path):
    transformers_model("llama").save_pretrained(tmp_path, max_shard_size="8KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())

    content = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[1].name}: expected this shard"):
        load(tmp_path)
    shards[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{shards[1].name}: expected a whole safetensors file"):
        load(tmp_path)
    shards[1].write_bytes(content)

    moved = {
        **listed,
        "weight_map": {**listed["weight_map"], "model.norm.weight": listed["weight_map"]["lm_head.weight"]},
    }
    if moved != listed:
        index.write_text(json.dumps(moved))
        with pytest.raises(
            ValueError, match=r"expected the weight model.norm.weight, as model.safetensors.index.json says"
        ):
            load(tmp_path)
    fewer = {name: shard for name, shard in listed["weight_map"].items() if name != "lm_head.weight"}
    index.write_text(json.dumps({**listed, "weight_map": fewer}))
    with pytest.raises(ValueError, match=r"expected a weight lm_head.weight, but it is not among"):
        load(tmp_path)
    fewer = {name: shard for name, shard in listed["weight_map"].items() if name != "model.norm.weight"}
    index.write_text(json.dumps({**listed, "weight_map": fewer}))
    assert "model.norm.weight" in load(tmp_path).weights  # it is in a shard that the index names: transformers loads it
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model.safetensors or model.safetensors.index.json"):
        load(tmp_path)

    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="quantization_config: supported are plain weights and GGUF files, got gptq"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: expected JSON"):
        load(tmp_path)


# --- every stored weight is used or refused


def logits_of(loaded, tokens):
    from kvops import flash_attention
    from kvops.models.llama import Llama

    model = Llama(loaded.config, loaded.weights)

    def attend(layer, q, k, v):
        return flash_attention(q, k, v, causal=True, **model.options(layer))[0]

    with torch.no_grad():
        return model.logits(model(tokens, torch.arange(tokens.shape[1])[None], attend))


def test_an_output_matrix_that_is_stored_is_used_whatever_the_configuration_says(tmp_path):
    """``tie_word_embeddings: true`` beside another ``lm_head.weight``: transformers 5 uses what is stored."""
    import transformers

    model = transformers_model("llama3")
    model.save_pretrained(tmp_path)
    tokens = torch.arange(1, 9)[None]
    stored = load_file(tmp_path / "model.safetensors")
    for changed in (False, True):
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].flip(0) if changed else model.lm_head.weight
        save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
        loaded = load(tmp_path)
        assert loaded.config.tie_embeddings != changed
        assert ("lm_head.weight" in loaded.weights) == changed
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        with torch.no_grad():
            expected = theirs(tokens).logits
        torch.testing.assert_close(logits_of(loaded, tokens), expected, rtol=1e-4, atol=1e-5)
    stored["lm_head.weight"] = stored["lm_head.weight"][:-1].clone()
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"expected lm_head.weight to have shape \[64, 24\], got \[63, 24\]"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "model.layers.0.self_attn.q_norm.weight",
            torch.ones(4),
            "q_norm.weight belongs to no supported kind",
        ),
        ("model.layers.2.mlp.up_proj.weight", torch.ones(40, 24), "layers.2.mlp.up_proj.weight belongs to no"),
        (
            "model.norm.weight",
            torch.ones(24, dtype=torch.int8),
            "to have a floating dtype, got torch.int8",
        ),
        (
            "model.layers.1.self_attn.rotary_emb.inv_freq",
            torch.ones(2),
            "inv_freq holds other frequencies",
        ),
    ],
)
@pytest.mark.parametrize("shard", ["10GB", "8KB"])
def test_a_stored_weight_that_the_model_would_not_use_is_refused_by_name(tmp_path, name, values, message, shard):
    """Sharded: the weight is in a shard and the index does not name it."""
    transformers_model("llama").save_pretrained(tmp_path, max_shard_size=shard)
    files = sorted(tmp_path.glob("*.safetensors"))
    path = next((file for file in files if name in load_file(file)), files[-1])
    save_file({**load_file(path), name: values}, path)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_rotary_frequencies_that_old_folders_store_are_compared(tmp_path):
    transformers_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    frequencies = torch.tensor([1.0, 3e4**-0.5])
    save_file({**load_file(path), "model.layers.0.self_attn.rotary_emb.inv_freq": frequencies.half()}, path)
    assert not [name for name in load(tmp_path).weights if "inv_freq" in name]


def test_a_weight_in_two_shards_is_refused(tmp_path):
    transformers_model("llama").save_pretrained(tmp_path, max_shard_size="8KB")
    *_, path = sorted(tmp_path.glob("*.safetensors"))
    save_file({**load_file(path), "model.embed_tokens.weight": torch.ones(64, 24)}, path)
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight is also in .*; expected it in one shard"):
        load(tmp_path)


def test_a_whole_file_comes_before_an_index_as_in_transformers(tmp_path):
    model = transformers_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    assert_same_weights(load(tmp_path).weights, dict(model.state_dict()))


# --- null and wrong types


@pytest.mark.parametrize(
    "name",
    [
        *("quantization_config", "rope_scaling", "rope_parameters", "head_dim", "tie_word_embeddings", "mlp_bias"),
        *("rms_norm_eps", "rope_theta", "attention_bias", "partial_rotary_factor", "eos_token_id", "hidden_act"),
        *("num_key_value_heads", "sliding_window", "original_max_position_embeddings"),
    ],
)
def test_a_null_in_the_configuration_is_as_good_as_no_entry(tmp_path, name):
    transformers_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = {**json.loads(path.read_text()), "num_key_value_heads": 2}
    content |= {"rope_theta": 10000.0, "rope_parameters": None}
    if name == "num_key_value_heads":  # which means as many as there are query heads
        with pytest.raises(ValueError, match=r"k_proj.weight to have shape \[24, 24\], got \[8, 24\]"):
            write_and_load(tmp_path, {**content, name: None})
        return
    assert (
        write_and_load(tmp_path, {**content, name: None}).config
        == write_and_load(tmp_path, {key: value for key, value in content.items() if key != name}).config
    )


def write_and_load(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return load(folder)


WRONG = [None, True, -1, 2.5, "text", "", [], [1], {}, {"a": 1}]


def test_whatever_a_json_file_of_a_folder_holds_load_raises_nothing_but_value_error(tmp_path):
    """Every entry of every file is replaced by a value of every type; what is then loaded, is a model."""
    transformers_model("llama3").save_pretrained(tmp_path, max_shard_size="8KB")
    config, index = tmp_path / "config.json", tmp_path / "model.safetensors.index.json"
    whole = {path: json.loads(path.read_text()) for path in (config, index)}
    whole[config] |= {"sliding_window": 4, "use_sliding_window": False, "max_window_layers": 2, "layer_types": None}
    whole[config] |= {"quantization_config": None, "num_key_value_heads": 2}
    tried = refused = 0
    for path, content in whole.items():
        for changed in variants(content):
            path.write_text(json.dumps(changed))
            tried += 1
            try:
                load(tmp_path)
            except (ValueError, FileNotFoundError):
                refused += 1
            path.write_text(json.dumps(content))
    assert tried > 300
    assert refused > tried / 3


def variants(content):
    """Each value of a JSON document replaced by each of the others, the document itself too."""
    yield from WRONG
    for key, value in content.items():
        for other in variants(value) if isinstance(value, dict) else WRONG:
            yield {**content, key: other}


def test_the_wrong_values_are_named():
    for changes, message in [
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: expected true or false in .*got 'false'"),
        ({"rope_parameters": [1]}, r"rope_parameters: expected an object in .*got \[1\]"),
        ({"architectures": "LlamaForCausalLM"}, "architectures: expected a list in"),
        ({"architectures": [7]}, "architectures: expected a list of strings in .*got 7 at index 0"),
        ({"num_attention_heads": 0}, "num_heads: expected a positive number, got 0"),
        ({"vocab_size": 64.5}, "vocab_size: expected an integer in .*got 64.5"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps: expected a positive number, got inf"),
    ]:
        with pytest.raises(ValueError, match=message):
            LlamaConfig.from_hf(hf_config(**changes))


def test_layer_types_say_which_layers_have_a_window():
    qwen2 = hf_config(architectures=["Qwen2ForCausalLM"], use_sliding_window=True, sliding_window=32)
    assert LlamaConfig.from_hf({**qwen2, "layer_types": ["full_attention"] * 2}).sliding_window is None
    assert LlamaConfig.from_hf({**qwen2, "layer_types": ["sliding_attention"] * 2}).sliding_window == 32
    with pytest.raises(ValueError, match="layer_types: expected a sliding window in all layers or in none"):
        LlamaConfig.from_hf({**qwen2, "layer_types": ["full_attention", "sliding_attention"]})
