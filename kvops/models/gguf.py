"""Models in llama.cpp's GGUF files: the configuration that the metadata describes, the weights in our order."""

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
from kvops.models.config import Llama3RopeScaling, LlamaConfig

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
        ValueError: not a GGUF file, a broken one, or one that the installed ``gguf`` package does not know; the
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
        if reader.byte_order == "S":  # of which the reader swaps the metadata only
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


def read_config(file: GGUFFile) -> LlamaConfig:
    """The configuration that a file describes.

    Raises:
        ValueError: an architecture or a setting that :class:`LlamaConfig` does not have, or a missing entry.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"general.architecture: supported are {', '.join(SUPPORTED_ARCHITECTURES)} "
            f"(Llama, Mistral, Qwen2 and others of their shape); got {architecture} in {file.path}"
        )

    def entry(key: str, default: Any = None) -> Any:
        value = file.metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise ValueError(f"{architecture}.{key}: expected in the metadata of {file.path}, but there is none")
        return value

    if entry("expert_count", 0):
        raise ValueError(f"{architecture}.expert_count: a mixture of experts is not supported, got {file.path}")
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"token_embd.weight: expected among the tensors of {file.path}, but there is none")
    num_heads, hidden_size = entry("attention.head_count"), entry("embedding_length")
    rotated = entry("rope.dimension_count", 0)
    head_dim = entry("attention.key_length", rotated or hidden_size // num_heads)
    for key, value in (("rope.dimension_count", rotated or head_dim), ("attention.value_length", head_dim)):
        if entry(key, value) != head_dim:
            raise ValueError(f"{architecture}.{key}: expected the head size {head_dim}, got {entry(key)}")
    theta = entry("rope.freq_base", 10000.0)
    window = entry("attention.sliding_window", 0)
    return LlamaConfig(
        vocab_size=file.shape("token_embd.weight")[0],
        hidden_size=hidden_size,
        intermediate_size=entry("feed_forward_length"),
        num_layers=entry("block_count"),
        num_heads=num_heads,
        num_kv_heads=entry("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=entry("attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, architecture, head_dim, theta),
        max_positions=entry("context_length"),
        tie_embeddings="output.weight" not in file.tensors,
        sliding_window=window or None,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
    )


def _rope_scaling(file: GGUFFile, architecture: str, head_dim: int, theta: float) -> Llama3RopeScaling | None:
    """Llama 3's scaling, which a GGUF holds as its effect: the divisor of each frequency."""
    kind = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    factor = file.metadata.get(f"{architecture}.rope.scaling.factor", 1.0)
    if kind not in ("none", "linear") or (kind == "linear" and factor not in (0.0, 1.0)):
        raise ValueError(f"{architecture}.rope.scaling.type: supported is Llama 3's scaling only, got {kind} {factor}")
    if "rope_freqs.weight" not in file.tensors:
        return None
    divisors = file.read("rope_freqs.weight")
    if bool((divisors == 1).all()):
        return None
    # The parameters that Meta published for all its models; only the factor differs between them.
    scaling = Llama3RopeScaling(divisors.max().item(), 1.0, 4.0, 8192)
    wavelengths = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = (scaling.original_max_positions / wavelengths - 1.0) / (4.0 - 1.0)
    smooth = smooth.clamp(0, 1)
    expected = 1 / ((1 - smooth) / scaling.factor + smooth)
    if divisors.shape != expected.shape or not torch.allclose(divisors.double(), expected, rtol=1e-4):
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
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; names without a counterpart stay."""
    stem, _, kind = name.rpartition(".")
    if stem in _NAMES and not stem.startswith(("attn", "ffn")):
        return f"{_NAMES[stem]}.{kind}"
    block, _, part = stem.rpartition(".")
    if block.startswith("blk.") and part in _NAMES:
        return f"model.layers.{block.removeprefix('blk.')}.{_NAMES[part]}.{kind}"
    return name


def read_weights(file: GGUFFile, config: LlamaConfig) -> Iterator[tuple[str, Tensor, int]]:
    """Every weight as ``(Hugging Face's name, float32 values, bytes in the file)``.

    llama.cpp's Llama rotates neighbouring dimensions and so stores the rows of the query and key projections of each
    head interleaved; Hugging Face's, and ours, rotates dimension i with i + head_dim / 2. The rows are put back.
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
