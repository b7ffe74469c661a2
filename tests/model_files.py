"""Small models in the files that users have: GGUF and Hugging Face folders."""

import gguf
import numpy as np
import torch

from kvops.models.config import LlamaConfig


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
        elif isinstance(value, bool):
            writer.add_bool(key, value)
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
