"""The model of ``--model``: the reference model if it supports the file, otherwise any causal model of transformers."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kvops.extras import require
from kvops.generation.passes import Decoder
from kvops.models.config import SUPPORTED_ARCHITECTURES
from kvops.models.llama import Llama
from kvops.models.loading import load
from kvops.models.tokenizer import Tokenizer


class LoadedDecoder(NamedTuple):
    """A model that generates, its tokenizer and its name."""

    model: Decoder
    tokenizer: Tokenizer
    name: str


def load_model(path: Path | None, device: torch.device, *, by_transformers: bool = False) -> LoadedDecoder:
    """Load a GGUF file, a Hugging Face folder or a model that transformers finds by its name (``owner/name``).

    GGUF files and folders of the Llama family run in :class:`kvops.models.llama.Llama`. All other models, and all
    models with ``by_transformers``, run in :class:`kvops.integrations.transformers.Decoder`.

    Raises ValueError and FileNotFoundError for files of other content, and ImportError for a missing package.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if by_transformers or (path is not None and _needs_transformers(path)):
        if path is None or path.suffix == ".gguf":
            raise ValueError("--model: expected a Hugging Face folder or a name, which transformers loads, got GGUF")
        return _load_by_transformers(str(path), dtype, device)
    loaded = load(path, dtype=dtype, device=device)
    return LoadedDecoder(Llama(loaded.config, loaded.weights), loaded.tokenizer, loaded.name)


def _needs_transformers(path: Path) -> bool:
    config = path / "config.json"
    if config.is_file():
        try:
            architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures")
        except (ValueError, AttributeError):
            return False  # the loader reports what is wrong
        return bool(architectures) and not set(architectures) & set(SUPPORTED_ARCHITECTURES)
    # "owner/name" of a model that transformers has in its cache or downloads.
    return not path.exists() and len(path.parts) == 2 and path.suffix != ".gguf"


def _load_by_transformers(name: str, dtype: torch.dtype, device: torch.device) -> LoadedDecoder:
    transformers = require("transformers")
    from kvops.integrations.transformers import Decoder as TransformersDecoder

    print(f"{name}: runs in transformers' own modules", file=sys.stderr)
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    tokenizer = tokenizer_of(transformers.AutoTokenizer.from_pretrained(name), model.generation_config)
    return LoadedDecoder(TransformersDecoder(model), tokenizer, Path(name).name)


def tokenizer_of(theirs: Any, generation_config: Any = None) -> Tokenizer:
    """Convert a fast tokenizer of transformers to a :class:`~kvops.models.tokenizer.Tokenizer`."""
    backend = getattr(theirs, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"--model: expected a fast tokenizer (tokenizer.json), got {type(theirs).__name__}")
    ends = getattr(generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    special: Mapping[str, Any] = theirs.special_tokens_map
    return Tokenizer(
        backend=copy.deepcopy(backend),  # the original keeps its settings of truncation and padding
        eos_token_ids=tuple(dict.fromkeys(end for end in (*ends, theirs.eos_token_id) if end is not None)),
        bos_token_id=theirs.bos_token_id,
        add_bos=theirs.bos_token_id is not None and theirs("a")["input_ids"][:1] == [theirs.bos_token_id],
        chat_template=theirs.chat_template if isinstance(theirs.chat_template, str) else None,
        special_tokens={name: text for name, text in special.items() if isinstance(text, str)},
    )
