"""Third-party packages that only part of kvops needs, imported when they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

# The command that installs each package.
_COMMANDS = {
    **dict.fromkeys(("gguf", "jinja2", "safetensors", "tokenizers", "tqdm"), 'pip install "kvops[models]"'),
    "matplotlib": 'pip install "kvops[plot]"',
    "numba": 'pip install "kvops[cpu]"',
    "triton": 'pip install "triton>=3.6"',
    "transformers": 'pip install "transformers>=5.20"',
    "kvpress": "pip install kvpress",
    "vllm": 'pip install "kvops[vllm]"',
}


def require(module: str, extra: str | None = None) -> ModuleType:
    """Import ``module``, or raise with the command that installs it. ``extra`` names the extra of kvops if several have
    it.

    Raises:
        ImportError: the module is not installed, or importing it fails.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        command = _COMMANDS[package] if extra is None else f'pip install "kvops[{extra}]"'
        # The package is installed, but its import fails: its own message says why.
        reason = "" if getattr(error, "name", None) == package else f", importing it fails: {error}"
        raise ImportError(f"{package}: expected to be installed{reason}; next step: {command}", name=package) from error
