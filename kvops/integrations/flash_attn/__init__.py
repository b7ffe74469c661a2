"""flash-attn's functions on kvops: the same names, arguments, defaults and layouts, on any device that kvops runs on.

    from kvops.integrations.flash_attn import flash_attn_func  # or:
    kvops.integrations.flash_attn.install()  # makes them `flash_attn` where that package is not installed

They follow flash-attn 2.8, with ``seqused_q``, ``seqused_k`` and ``attention_chunk`` of flash-attn 3 as keywords.
Differences: dropout draws other random numbers; a row that sees no key has an lse of -inf; results are always
deterministic; the matrix of probabilities, which flash-attn returns for its tests alone, is None.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from kvops.integrations.flash_attn import bert_padding, rotary
from kvops.integrations.flash_attn.interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from kvops.integrations.flash_attn.kvcache import flash_attn_with_kvcache

VERSION = "2.8.3"

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def install() -> bool:
    """Make these functions importable as ``flash_attn`` in this process.

    Its modules ``flash_attn_interface``, ``bert_padding`` and ``layers.rotary`` come along. Does nothing if the real
    package is installed. Returns whether ``flash_attn`` now has these functions.
    """
    present = sys.modules.get("flash_attn")
    if present is not None:
        return getattr(present, "flash_attn_func", None) is flash_attn_func
    if importlib.util.find_spec("flash_attn") is not None:
        return False
    functions = {name: globals()[name] for name in __all__}
    package = _module("flash_attn", functions | {"__version__": VERSION}, package=True)
    _module("flash_attn.flash_attn_interface", functions)
    _module("flash_attn.bert_padding", {name: getattr(bert_padding, name) for name in bert_padding.__all__})
    _module("flash_attn.layers", {}, package=True)
    _module("flash_attn.layers.rotary", {name: getattr(rotary, name) for name in rotary.__all__})
    return sys.modules["flash_attn"] is package


def _module(name: str, contents: dict[str, object], *, package: bool = False) -> ModuleType:
    """A new module, known by ``name`` and as an attribute of the package that it is in."""
    module = ModuleType(name, __doc__)
    module.__spec__ = ModuleSpec(name, None, is_package=package)
    if package:
        module.__path__ = []
    vars(module).update(contents)
    sys.modules[name] = module
    parent, _, own = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], own, module)
    return module
