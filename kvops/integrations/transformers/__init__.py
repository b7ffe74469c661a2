"""Hugging Face transformers: ``attn_implementation="kvops"``, a compressed cache for ``generate``, and drafts.

    import kvops.integrations.transformers as kvops_transformers

    kvops_transformers.enable()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="kvops")

Models train and generate with it: padding on either side, packed sequences, sliding windows, softcap, sinks, position
biases. Padding and packing become cumulative lengths; masks that have no such form become a bias. ``KVOpsCache``
compresses the cache within transformers' ``generate``; ``Decoder`` runs a model in this package's own loop, with drafts
for whole batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvops.extras import require
from kvops.integrations.transformers.attention import NAME, attention, enable

if TYPE_CHECKING:
    from kvops.integrations.transformers.cache import KVOpsCache
    from kvops.integrations.transformers.decoder import Decoder
    from kvops.integrations.transformers.folder import write_folder
    from kvops.integrations.transformers.layers import attention_module, replace
    from kvops.integrations.transformers.serving import continuous_batching

__all__ = [
    "NAME",
    "Decoder",
    "KVOpsCache",
    "attention",
    "attention_module",
    "continuous_batching",
    "enable",
    "replace",
    "write_folder",
]


def __getattr__(name: str) -> Any:
    """Import names lazily that need transformers' classes, models or modules."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("transformers")
    if name == "KVOpsCache":
        from kvops.integrations.transformers.cache import KVOpsCache

        return KVOpsCache
    if name == "Decoder":
        from kvops.integrations.transformers.decoder import Decoder

        return Decoder
    if name == "write_folder":
        from kvops.integrations.transformers.folder import write_folder

        return write_folder
    if name == "continuous_batching":
        from kvops.integrations.transformers.serving import continuous_batching

        return continuous_batching
    from kvops.integrations.transformers import layers

    return getattr(layers, name)
