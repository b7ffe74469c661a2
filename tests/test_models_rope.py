"""Rotary frequencies and their scaling, against transformers, llama.cpp's rules and the papers in float64."""

import math

import pytest
import torch
from model_files import TINY, hf_config, write_gguf

from kvops import flash_attention
from kvops.models.config import LlamaConfig
from kvops.models.llama import Llama
from kvops.models.loading import load
from kvops.models.rope import (
    LinearRopeScaling,
    Llama3RopeScaling,
    YarnRopeScaling,
    frequencies,
    yarn_attention_factor,
)

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
SCALINGS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    YARN,
    {**YARN, "beta_fast": 16, "beta_slow": 2.0},
    {**YARN, "attention_factor": 1.3},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1},
    {**YARN, "mscale": 0.7},
    {**YARN, "truncate": False},
    {**YARN, "factor": 1.0},
    {**YARN, "factor": 32.0, "original_max_position_embeddings": 64, "beta_fast": None},
    {"rope_type": "yarn", "factor": 2.0},  # the original context is then the whole one
]


def exact(head_dim, theta, parameters, max_positions):
    """The papers' formulas, one frequency at a time in float64, and what cosines and sines are multiplied by."""
    plain = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    kind = parameters["rope_type"]
    if kind == "default":
        return plain, 1.0
    factor = parameters["factor"]
    if kind == "linear":
        return [f / factor for f in plain], 1.0
    original = parameters.get("original_max_position_embeddings", max_positions)

    def pair(turns):  # whose frequency makes so many turns: original * theta ** (-2 i / head_dim) = 2 pi turns
        return head_dim / 2 * math.log(original / (2 * math.pi * turns)) / math.log(theta)

    low, high = pair(parameters.get("beta_fast") or 32), pair(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    share = [min(max((i - low) / max(high - low, 0.001), 0), 1) for i in range(head_dim // 2)]
    growth = 0.1 * math.log(factor)
    mscale, of_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    magnitude = (growth * mscale + 1) / (growth * of_all + 1) if mscale and of_all else growth + 1
    scaled = [f * (1 - s) + f / factor * s for f, s in zip(plain, share, strict=True)]
    return scaled, parameters.get("attention_factor", magnitude)


@pytest.mark.parametrize("parameters", SCALINGS)
@pytest.mark.parametrize(("head_dim", "theta"), [(128, 10000.0), (64, 1e6), (80, 500.0)])
def test_frequencies_equal_transformers_and_the_formula(parameters, head_dim, theta):
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {**parameters, "rope_theta": theta}
    content = hf_config(head_dim=head_dim, max_position_embeddings=16384, rope_parameters=parameters)
    config = LlamaConfig.from_hf(content)
    ours = frequencies(config.head_dim, config.rope_theta, config.rope_scaling).double()
    expected, magnitude = exact(head_dim, theta, parameters, 16384)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)
    ours_magnitude = getattr(config.rope_scaling, "attention_factor", 1.0)
    assert ours_magnitude == pytest.approx(magnitude, rel=1e-12)
    if parameters["rope_type"] != "default":
        theirs = transformers.LlamaConfig(**{**content, "rope_parameters": dict(parameters)})
        inverse, their_magnitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs)
        torch.testing.assert_close(ours, inverse.double(), rtol=1e-6, atol=0)
        assert ours_magnitude == pytest.approx(their_magnitude, rel=1e-12)


@pytest.mark.parametrize("parameters", [SCALINGS[1], {**YARN, "original_max_position_embeddings": 16}])
def test_logits_with_scaled_frequencies_equal_transformers(tmp_path, parameters):
    import transformers

    content = {**hf_config(max_position_embeddings=64), "rope_parameters": {**parameters, "rope_theta": 1e4}}
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**content)).float().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # the usual 0.02 leaves nothing of attention in the logits
            parameter.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path)
    tokens = torch.arange(40)[None] % 64
    loaded = load(tmp_path)
    model = Llama(loaded.config, loaded.weights)

    def attend(layer, q, k, v):
        return flash_attention(q, k, v, causal=True)[0]

    with torch.no_grad():
        expected = theirs(tokens).logits
        actual = model.logits(model(tokens, torch.arange(40)[None], attend))
        plain = Llama(LlamaConfig(**{**vars(loaded.config), "rope_scaling": None}), loaded.weights)
        other = plain.logits(plain(tokens, torch.arange(40)[None], attend))
    scale = expected.abs().max()
    assert (actual - expected).abs().max() < 1e-4 * scale
    assert (other - expected).abs().max() > 1e-2 * scale  # the test sees a scaling that is lost


S = "llama.rope.scaling."


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({S + "factor": 4.0}, LinearRopeScaling(4.0)),  # llama.cpp's default is linear
        ({S + "type": "linear", S + "factor": 4.0}, LinearRopeScaling(4.0)),
        ({"llama.rope.scale_linear": 8.0}, LinearRopeScaling(8.0)),
        ({S + "type": "linear", "llama.rope.scale_linear": 8.0}, LinearRopeScaling(8.0)),
        ({S + "factor": 4.0, "llama.rope.scale_linear": 8.0}, LinearRopeScaling(4.0)),
        ({S + "factor": 1.0}, None),
        ({S + "factor": 0.0}, None),
        ({S + "type": "none", S + "factor": 4.0}, None),
        ({S + "type": "yarn"}, None),
        (
            {S + "type": "yarn", S + "factor": 4.0, S + "original_context_length": 24},
            YarnRopeScaling(4.0, 24, yarn_attention_factor(4.0)),
        ),
        (
            {S + "type": "yarn", S + "factor": 4.0, S + "attn_factor": 0.5, S + "yarn_ext_factor": 1.0},
            YarnRopeScaling(4.0, 96, yarn_attention_factor(4.0) * 0.5),  # 96: the whole context
        ),
        (
            {S + "type": "yarn", S + "factor": 2.0, S + "yarn_beta_fast": 16.0, S + "yarn_beta_slow": 2.0},
            YarnRopeScaling(2.0, 96, yarn_attention_factor(2.0), 16.0, 2.0),
        ),
    ],
)
def test_gguf_scaling_follows_llama_cpp(tmp_path, metadata, scaling):
    write_gguf(tmp_path / "s.gguf", metadata=metadata)
    assert load(tmp_path / "s.gguf").config.rope_scaling == scaling


def test_two_scalings_at_once_are_refused(tmp_path):
    config = LlamaConfig(**{**vars(TINY), "rope_theta": 5e5})
    divisors = frequencies(8, 5e5) / frequencies(8, 5e5, Llama3RopeScaling(8.0, 1.0, 4.0, 8192))
    tensors = {"rope_freqs.weight": divisors.numpy()}
    write_gguf(tmp_path / "r.gguf", config, tensors=tensors)
    assert load(tmp_path / "r.gguf").config.rope_scaling == Llama3RopeScaling(8.0, 1.0, 4.0, 8192)
    write_gguf(tmp_path / "r.gguf", config, tensors=tensors, metadata={S + "factor": 2.0})
    with pytest.raises(ValueError, match=r"rope_freqs.weight: not supported beside llama.rope.scaling"):
        load(tmp_path / "r.gguf")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearRopeScaling(0.0), "factor: expected a positive number, got 0.0"),
        (lambda: YarnRopeScaling(4.0, 0, 1.0), "original_max_positions: expected a positive number, got 0"),
        (lambda: YarnRopeScaling(4.0, 64, -1.0), "attention_factor: expected a positive number"),
        (lambda: YarnRopeScaling(4.0, 64, 1.0, beta_fast=1.0), "beta_fast: expected more than beta_slow 1.0, got 1.0"),
    ],
)
def test_scalings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
