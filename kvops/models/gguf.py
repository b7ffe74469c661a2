"""Models in llama.cpp's GGUF files: the configuration from the metadata, and the weights in Hugging Face's order."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvops.extras import require
from kvops.models.config import LlamaConfig
from kvops.models.entries import Entries
from kvops.models.rope import (
    LinearRopeScaling,
    Llama3RopeScaling,
    RopeScaling,
    YarnRopeScaling,
    frequencies,
    yarn_attention_factor,
)

if TYPE_CHECKING:
    from gguf import ReaderTensor

SUPPORTED_ARCHITECTURES = ("llama", "qwen2")


class GGUFFile:
    """A GGUF file, opened by ``gguf.GGUFReader``; its tensors are mapped, not read.

    Opening takes 2.3 s for SmolLM2 with its 49,152 tokens: the reader makes an array of every string.

    Attributes:
        metadata: key to value; arrays are lists.
        tensors: name to ``gguf.ReaderTensor``.

    Raises:
        ValueError: not a GGUF file, a broken one, or one that is newer than the installed ``gguf`` package; the
            message begins with the path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = require("gguf").GGUFReader(path)
            self.metadata: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        except (ValueError, LookupError, ArithmeticError) as error:
            raise ValueError(
                f"{path}: expected a whole GGUF file, but the gguf package cannot read it ({error}); the next step is "
                "to download it again or, if it is newer than that package: pip install --upgrade gguf"
            ) from error
        if reader.byte_order == "S":  # the reader swaps the bytes of the metadata only
            raise ValueError(f"{path}: expected a GGUF file in {sys.byteorder}-endian order, got the other one")
        self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape in PyTorch's order: rows first."""
        return tuple(reversed(self.tensors[name].shape.tolist()))

    def read(self, name: str) -> Tensor:
        """A tensor's values in float32, owning their memory."""
        tensor = self.tensors[name]
        try:
            values = require("gguf").quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path}: expected types that the gguf package can dequantise, "
                f"got {name} of type {tensor.tensor_type.name}"
            ) from error
        return torch.from_numpy(np.require(values, requirements="W"))  # float32 comes as a view of the file


# Entries that are read below.
_READ = (
    *("embedding_length", "block_count", "feed_forward_length", "context_length", "expert_count"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "attention.sliding_window"),
    *("rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.yarn_ext_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
)
# Entries without an effect in these architectures.
_HARMLESS = (
    *("vocab_size", "tensor_data_layout", "expert_used_count", "rope.scaling.finetuned"),
    "attention.layer_norm_epsilon",
)
# Entries without an effect if they have one of these values. llama.cpp reads none of the scales and caps in its
# architectures "llama" and "qwen2" (Granite, MiniCPM and Gemma, which need them, have architectures of their own), and
# takes 0 for "not set". A file that has one with an effect was made for another model.
_WITHOUT_EFFECT: dict[str, tuple[float, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "pooling_type": (0,),
    "rope.scaling.yarn_attn_factor": (-1.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "use_parallel_residual": (False,),
}


def read_config(file: GGUFFile) -> LlamaConfig:
    """The configuration that a file describes.

    Raises:
        ValueError: one part of a model that was split into several files, an architecture or a setting that
            :class:`LlamaConfig` does not have, a missing entry, or one of the wrong type.
    """
    source = f"the metadata of {file.path}"
    _refuse_parts(Entries(file.metadata, source, "split."), file.path)
    architecture = Entries(file.metadata, source, "general.").get("architecture", str, "none")
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"general.architecture: supported are {', '.join(SUPPORTED_ARCHITECTURES)} "
            f"(Llama, Mistral, Qwen2 and others of their shape); got {architecture} in {file.path}"
        )
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"token_embd.weight: expected among the tensors of {file.path}, but there is none")

    entries = Entries(file.metadata, source, f"{architecture}.")
    if entries.get("expert_count", int, 0):
        raise ValueError(f"{architecture}.expert_count: a mixture of experts is not supported, got {file.path}")
    num_heads, hidden_size = entries.need("attention.head_count", int), entries.need("embedding_length", int)
    rotated = entries.get("rope.dimension_count", int, 0)
    head_dim = entries.get("attention.key_length", int, rotated or hidden_size // max(num_heads, 1))
    for key, value in (("rope.dimension_count", rotated or head_dim), ("attention.value_length", head_dim)):
        if entries.get(key, int, value) != head_dim:
            raise ValueError(f"{architecture}.{key}: expected the head size {head_dim}, got {entries.find(key, int)}")
    _refuse_other_entries(entries, head_dim)
    theta, context_length = entries.get("rope.freq_base", float, 10000.0), entries.need("context_length", int)
    return LlamaConfig(
        vocab_size=file.shape("token_embd.weight")[0],
        hidden_size=hidden_size,
        intermediate_size=entries.need("feed_forward_length", int),
        num_layers=entries.need("block_count", int),
        num_heads=num_heads,
        num_kv_heads=entries.get("attention.head_count_kv", int, num_heads),
        head_dim=head_dim,
        rms_norm_eps=entries.need("attention.layer_norm_rms_epsilon", float),
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, entries, head_dim, theta, context_length),
        max_positions=context_length,
        tie_embeddings="output.weight" not in file.tensors,
        sliding_window=entries.get("attention.sliding_window", int, 0) or None,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
    )


def _refuse_parts(entries: Entries, path: Path) -> None:
    count = entries.get("count", int, 0)
    if count > 1:
        raise ValueError(
            f"{path}: expected a whole model, got part {entries.get('no', int, 0) + 1} of {count} of a split one; the "
            "next step is to join them: llama-gguf-split --merge FIRST_PART.gguf WHOLE.gguf (a tool of llama.cpp)"
        )


def _refuse_other_entries(entries: Entries, head_dim: int) -> None:
    """Raise ValueError for an entry of the architecture that is not known and may change the results."""
    scales = (0.0, head_dim**-0.5)
    for name, value in entries.values.items():
        key = name.removeprefix(entries.prefix)
        if key == name or key in _READ or key in _HARMLESS:
            continue
        if key == "attention.scale":
            neutral = isinstance(value, (int, float)) and any(math.isclose(value, s, rel_tol=1e-5) for s in scales)
        else:
            neutral = value in _WITHOUT_EFFECT.get(key, ())
        if not neutral:
            raise ValueError(f"{name}: this entry is not supported, got {value!r:.80} in {entries.source}")


def _rope_scaling(
    file: GGUFFile, entries: Entries, head_dim: int, theta: float, context_length: int
) -> RopeScaling | None:
    """The scaling of the rotary frequencies, with llama.cpp's defaults: linear, with a factor of 1."""
    kind = entries.get("rope.scaling.type", str, "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"{entries.prefix}rope.scaling.type: supported are none, linear and yarn, got {kind}")
    factor = entries.find("rope.scaling.factor", float)
    if factor is None:
        factor = entries.get("rope.scale_linear", float, 0.0)  # the older name
    factor = 1.0 if kind == "none" else factor or 1.0
    attention_factor = entries.get("rope.scaling.attn_factor", float, 1.0)
    # The weight of YaRN's blend; a negative number means the type's default.
    blend = entries.get("rope.scaling.yarn_ext_factor", float, -1.0)
    if kind != "yarn" and attention_factor != 1:
        raise ValueError(
            f"{entries.prefix}rope.scaling.attn_factor: only supported beside yarn, got {attention_factor}"
        )
    if blend >= 0 and blend != (1.0 if kind == "yarn" else 0.0):
        raise ValueError(f"{entries.prefix}rope.scaling.yarn_ext_factor: not supported beside {kind}, got {blend}")

    llama3 = _llama3_scaling(file, head_dim, theta)
    if llama3 is not None and factor != 1:
        raise ValueError(f"rope_freqs.weight: not supported beside {entries.prefix}rope.scaling in {file.path}")
    if llama3 is not None or (factor == 1 and attention_factor == 1):
        return llama3
    if kind == "linear":
        return LinearRopeScaling(factor)
    return YarnRopeScaling(
        factor,
        entries.get("rope.scaling.original_context_length", int, context_length),
        attention_factor=yarn_attention_factor(factor) * attention_factor,
        beta_fast=entries.get("rope.scaling.yarn_beta_fast", float, 32.0),
        beta_slow=entries.get("rope.scaling.yarn_beta_slow", float, 1.0),
    )


def _llama3_scaling(file: GGUFFile, head_dim: int, theta: float) -> Llama3RopeScaling | None:
    """Llama 3's scaling. A GGUF file stores its effect, the divisor of each frequency."""
    if "rope_freqs.weight" not in file.tensors:
        return None
    divisors = file.read("rope_freqs.weight")
    if bool((divisors == 1).all()):
        return None
    # Meta's published parameters; only the factor differs between models.
    scaling = Llama3RopeScaling(divisors.max().item(), 1.0, 4.0, 8192)
    expected = frequencies(head_dim, theta) / frequencies(head_dim, theta, scaling)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(
            "rope_freqs.weight: supported is Llama 3's scaling with its published parameters (low_freq_factor 1, "
            f"high_freq_factor 4, original_max_position_embeddings 8192), which these divisors in {file.path} are not"
        )
    return scaling


_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NOT_WEIGHTS = ("rope_freqs.weight",)


def hugging_face_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; other names stay."""
    stem, _, kind = name.rpartition(".")
    if stem in _NAMES and not stem.startswith(("attn", "ffn")):
        return f"{_NAMES[stem]}.{kind}"
    block, _, part = stem.rpartition(".")
    if block.startswith("blk.") and part in _NAMES:
        return f"model.layers.{block.removeprefix('blk.')}.{_NAMES[part]}.{kind}"
    return name


def read_weights(file: GGUFFile, config: LlamaConfig) -> Iterator[tuple[str, Tensor, int]]:
    """Every weight as ``(Hugging Face's name, float32 values, bytes in the file)``.

    llama.cpp rotates neighbouring dimensions, so it stores the rows of each head's query and key projections
    interleaved. Hugging Face and kvops rotate dimension i with i + head_dim / 2, so the rows are reordered.
    """
    interleaved = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    if file.metadata["general.architecture"] != "llama":
        interleaved = {}
    for name, tensor in file.tensors.items():
        if name in _NOT_WEIGHTS:
            continue
        values = file.read(name)
        heads = interleaved.get(name.rpartition(".")[0].rpartition(".")[2])
        if heads is not None:
            values = values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        yield hugging_face_name(name), values, tensor.n_bytes
