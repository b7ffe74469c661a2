"""A thin Llama-family reference model, its loaders and its tokenizer.

``load`` reads a GGUF file or a Hugging Face folder, ``Llama`` is the model, and :mod:`kvops.generation` makes text
with it.
"""

from kvops.models.config import LlamaConfig
from kvops.models.llama import Llama
from kvops.models.loading import LoadedModel, load
from kvops.models.tokenizer import TextStream, Tokenizer

__all__ = ["Llama", "LlamaConfig", "LoadedModel", "TextStream", "Tokenizer", "load"]
