"""Models in Hugging Face folders: ``config.json`` and safetensors, in one file or in shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from kvops.extras import require
from kvops.models.config import LlamaConfig
from kvops.models.tokenizer import read_json


class FolderWeights(NamedTuple):
    """The weights of a folder: their shapes and the files that hold them, by name."""

    shapes: dict[str, tuple[int, ...]]
    files: dict[str, Path]


def read_config(folder: Path) -> LlamaConfig:
    """Raises ValueError or FileNotFoundError if ``config.json`` is not there or not supported."""
    content = read_json(folder / "config.json")
    if "quantization_config" in content:
        method = content["quantization_config"].get("quant_method")
        raise ValueError(f"quantization_config: supported are plain weights and GGUF files, got {method} in {folder}")
    return LlamaConfig.from_hf(content)


def find_weights(folder: Path) -> FolderWeights:
    """Read the headers of the weights' files.

    Raises:
        FileNotFoundError: no safetensors, or a shard that the index names is not there.
        ValueError: a file that is not whole, or an index that names a weight its shard does not have.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        weight_map = read_json(index).get("weight_map", {})
        files = {name: folder / shard for name, shard in weight_map.items()}
    elif single.is_file():
        files = dict.fromkeys(_header(single), single)
    else:
        raise FileNotFoundError(
            f"{folder}: expected model.safetensors or model.safetensors.index.json, but there is neither"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for path in dict.fromkeys(files.values()):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected this shard, as {index.name} names it, but there is no such file")
        stored = _header(path)
        for name in (name for name, its_path in files.items() if its_path == path):
            if name not in stored:
                raise ValueError(f"{path}: expected the weight {name}, as {index.name} says, but it is not in there")
            shapes[name] = stored[name]
    return FolderWeights(shapes, files)


def read_weights(weights: FolderWeights, names: Mapping[str, object]) -> Iterator[tuple[str, Tensor, int]]:
    """The weights of these names as ``(name, values as stored, bytes in the file)``, file after file."""
    safetensors = require("safetensors")
    names_in: dict[Path, list[str]] = defaultdict(list)
    for name in names:
        names_in[weights.files[name]].append(name)
    for path, stored in names_in.items():
        with safetensors.safe_open(path, framework="pt") as file:
            for name in stored:
                values = file.get_tensor(name)
                yield name, values, values.nbytes


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    safetensors = require("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: expected a whole safetensors file: {error}") from error
