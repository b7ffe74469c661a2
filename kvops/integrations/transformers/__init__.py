"""Hugging Face transformers: ``attn_implementation="kvops"``, a compressed cache for ``generate``, and drafts.

    import kvops.integrations.transformers as kvops_transformers

    kvops_transformers.enable()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="kvops")

Decoder models train and generate with it: padding on either side, packed sequences, sliding windows, softcap, sinks.
Padding and packing become cumulative lengths, never a dense mask. ``KVOpsCache`` compresses the cache within
transformers' ``generate``; ``Decoder`` runs a model in this package's own loop, with drafts for whole batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvops.extras import require
from kvops.integrations.transformers.attention import NAME, attention, enable

if TYPE_CHECKING:
    from kvops.integrations.transformers.cache import KVOpsCache
    from kvops.integrations.transformers.decoder import Decoder

__all__ = ["NAME", "Decoder", "KVOpsCache", "attention", "enable"]


def __getattr__(name: str) -> Any:
    if name == "KVOpsCache":  # derives from a class of transformers, which importing this package does not bring in
        require("transformers")
        from kvops.integrations.transformers.cache import KVOpsCache

        return KVOpsCache
    if name == "Decoder":  # brings in kvops.models
        from kvops.integrations.transformers.decoder import Decoder

        return Decoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
