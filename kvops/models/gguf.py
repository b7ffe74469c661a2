"""Models in llama.cpp's GGUF files: the header, the configuration that it describes, the weights.

The header is read here and not by ``gguf.GGUFReader``, which wraps every single string of the vocabulary in an array:
2.4 s for SmolLM2's 98 MB file, against 0.1 s.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvops.models.config import Llama3RopeScaling, LlamaConfig
from kvops.models.dequantize import dequantize
from kvops.models.extras import require

MAGIC = b"GGUF"
SUPPORTED_ARCHITECTURES = ("llama", "qwen2")

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class TensorEntry(NamedTuple):
    """Where one tensor lies: ``shape`` in PyTorch's order (rows first), ``offset`` in bytes from the file's start."""

    shape: tuple[int, ...]
    type_id: int
    offset: int
    num_bytes: int


class GGUFFile:
    """An opened GGUF file (version 2 or 3, little endian); its tensors are mapped, not read.

    Attributes:
        metadata: key to value; arrays are lists.
        tensors: name to place.

    Raises:
        ValueError: not a GGUF file, or a broken one; the message begins with the path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise ValueError(f"{path}: expected a GGUF file, which begins with {MAGIC!r}")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise ValueError(f"{path}: expected a whole GGUF file, but its header is cut off or damaged") from error

    def _read_header(self) -> None:
        header = _Cursor(self._map, len(MAGIC))
        version = header.scalar("I")
        if version not in (2, 3):
            kind = "a big-endian file" if version & 0xFFFF == 0 else f"version {version}"
            raise ValueError(f"{self.path}: expected GGUF version 2 or 3 in little-endian order, got {kind}")
        num_tensors, num_entries = header.scalar("Q"), header.scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = header.string()
            self.metadata[key] = header.value(header.scalar("I"))
        places = {}
        for _ in range(num_tensors):
            name = header.string()
            shape = tuple(reversed([header.scalar("Q") for _ in range(header.scalar("I"))]))
            places[name] = (shape, header.scalar("I"), header.scalar("Q"))
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-header.offset // alignment) * alignment
        self.tensors = {name: self._entry(name, start, *place) for name, place in places.items()}

    def _entry(self, name: str, start: int, shape: tuple[int, ...], type_id: int, offset: int) -> TensorEntry:
        gguf = require("gguf")
        try:
            block_values, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_id)]
        except (ValueError, KeyError):
            raise ValueError(
                f"{self.path}: expected types that the installed gguf package knows, but {name} has type {type_id}; "
                "the next step is: pip install --upgrade gguf"
            ) from None
        if not shape or shape[-1] % block_values:
            raise ValueError(f"{self.path}: expected rows of whole blocks of {block_values}, got {name} {list(shape)}")
        num_bytes = math.prod(shape) // block_values * block_bytes
        end = start + offset + num_bytes
        if end > len(self._map):
            raise ValueError(
                f"{self.path}: expected {end} bytes, as {name} ends there, but the file has {len(self._map)}: "
                "it was not copied or downloaded to its end"
            )
        return TensorEntry(shape, type_id, start + offset, num_bytes)

    def rows(self, name: str) -> np.ndarray:
        """The stored bytes of a tensor: uint8 [rows, bytes of a row], a view of the file."""
        entry = self.tensors[name]
        stored = np.frombuffer(self._map, np.uint8, entry.num_bytes, entry.offset)
        return stored.reshape(math.prod(entry.shape[:-1]), -1)

    def read(self, name: str) -> Tensor:
        """A tensor's values in float32."""
        return dequantize(self.rows(name), self.tensors[name].type_id).reshape(self.tensors[name].shape)


class _Cursor:
    """Reads values one after another."""

    def __init__(self, data: mmap.mmap, offset: int) -> None:
        self.data = data
        self.offset = offset

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.offset)
        self.offset += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        end = self.offset + length
        if end > len(self.data):
            raise struct.error("a string goes beyond the end of the file")
        text = self.data[self.offset : end].decode("utf-8")
        self.offset = end
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item_kind, count = self.scalar("I"), self.scalar("Q")
            if item_kind in _SCALARS:
                form = f"<{count}{_SCALARS[item_kind]}"
                values = list(struct.unpack_from(form, self.data, self.offset))
                self.offset += struct.calcsize(form)
                return values
            return [self.value(item_kind) for _ in range(count)]
        if kind not in _SCALARS:
            raise struct.error(f"metadata of type {kind}")
        return self.scalar(_SCALARS[kind])


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
        vocab_size=file.tensors["token_embd.weight"].shape[0],
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
    for name, entry in file.tensors.items():
        if name in _NOT_WEIGHTS:
            continue
        rows = file.rows(name)
        heads = interleaved.get(name.rpartition(".")[0].rpartition(".")[2])
        if heads is not None and name.endswith(".weight"):
            # On the bytes: a quantised row is moved whole, and is several times smaller than its values.
            rows = rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
        values = dequantize(rows, entry.type_id).reshape(entry.shape)
        if heads is not None and name.endswith(".bias"):
            values = values.reshape(heads, -1, 2).transpose(1, 2).reshape(entry.shape)
        yield hugging_face_name(name), values, entry.num_bytes
