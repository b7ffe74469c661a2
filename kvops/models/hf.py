"""Models in Hugging Face folders: ``config.json`` and safetensors, in one file or in shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvops.extras import require
from kvops.models import rope
from kvops.models.config import LlamaConfig
from kvops.models.entries import Entries
from kvops.models.tokenizer import read_json


class FolderWeights(NamedTuple):
    """The weights of a folder: their shapes and the files that hold them, by name."""

    shapes: dict[str, tuple[int, ...]]
    files: dict[str, Path]


def read_config(folder: Path) -> LlamaConfig:
    """Raises FileNotFoundError without a ``config.json``, and ValueError for one that is not supported or not valid."""
    content = read_json(folder / "config.json")
    quantization = content.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(f"quantization_config: supported are plain weights and GGUF files, got {method} in {folder}")
    return LlamaConfig.from_hf(content)


def tie_as_stored(config: LlamaConfig, weights: FolderWeights) -> LlamaConfig:
    """``config`` with ``tie_embeddings`` off if an output matrix is stored that differs from the embedding.

    transformers 5 also uses the stored matrix, whatever ``tie_word_embeddings`` is.
    """
    names = ("lm_head.weight", "model.embed_tokens.weight")
    if not config.tie_embeddings or any(name not in weights.shapes for name in names):
        return config
    outputs, embeddings = (values for _, values, _ in read_weights(weights, names))
    is_tied = outputs.dtype == embeddings.dtype and torch.equal(outputs, embeddings)
    return replace(config, tie_embeddings=is_tied)


def find_weights(folder: Path) -> FolderWeights:
    """Read the headers of the weights' files: ``model.safetensors``, or all shards that the index names.

    Raises:
        FileNotFoundError: no safetensors, or a shard that the index names is not there.
        ValueError: a file that is not whole, an index that is not valid, a weight that the index places in a shard that
            does not have it, or a weight that two shards have.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():  # as in transformers, which ignores an index beside it
        shapes = _header(single)
        return FolderWeights(shapes, dict.fromkeys(shapes, single))
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder}: expected model.safetensors or model.safetensors.index.json, but there is neither"
        )
    shapes = {}
    files: dict[str, Path] = {}
    listed = Entries(read_json(index), str(index)).need("weight_map", dict)
    for shard, names in _by_shard(listed, index).items():
        path = folder / shard
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected this shard, as {index.name} names it, but there is no such file")
        stored = _header(path)
        for name in names:
            if name not in stored:
                raise ValueError(f"{path}: expected the weight {name}, as {index.name} says, but it is not in there")
        for name, shape in stored.items():  # including weights that are not in the index, which transformers loads too
            if name in files:
                raise ValueError(f"{path}: the weight {name} is also in {files[name].name}; expected it in one shard")
            shapes[name], files[name] = shape, path
    return FolderWeights(shapes, files)


def read_weights(weights: FolderWeights, names: Iterable[str]) -> Iterator[tuple[str, Tensor, int]]:
    """The weights of these names as ``(name, values as stored, bytes in the file)``, file after file.

    Raises:
        ValueError: a weight whose numbers are not floating-point.
    """
    safetensors = require("safetensors")
    names_in: dict[Path, list[str]] = defaultdict(list)
    for name in names:
        names_in[weights.files[name]].append(name)
    for path, stored in names_in.items():
        with safetensors.safe_open(path, framework="pt") as file:
            for name in stored:
                values = file.get_tensor(name)
                if not values.is_floating_point():
                    raise ValueError(f"{path}: expected {name} to have a floating dtype, got {values.dtype}")
                yield name, values, values.nbytes


def check_frequencies(weights: FolderWeights, config: LlamaConfig) -> None:
    """Compare the rotary frequencies that old folders store with those that the configuration describes.

    Raises:
        ValueError: they differ by more than the rounding of half precision.
    """
    names = [name for name in weights.shapes if name.endswith("rotary_emb.inv_freq")]
    # With and without scaling: some versions of transformers scaled positions instead of frequencies.
    expected = [rope.frequencies(config.head_dim, config.rope_theta, s) for s in (config.rope_scaling, None)]
    for name, values, _ in read_weights(weights, names):
        if not any(
            values.shape == e.shape and torch.allclose(values.float(), e, rtol=1e-2, atol=1e-7) for e in expected
        ):
            raise ValueError(
                f"{weights.files[name]}: {name} holds other frequencies than rope_theta {config.rope_theta} gives"
            )


def _by_shard(weight_map: Mapping[str, Any], index: Path) -> dict[str, list[str]]:
    names: dict[str, list[str]] = defaultdict(list)
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise ValueError(f"{index}: weight_map: expected a file name for {name}, got {shard!r}")
        names[shard].append(name)
    return names


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    safetensors = require("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: expected a whole safetensors file: {error}") from error
