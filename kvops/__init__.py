"""kvops: attention over a KV cache as PyTorch operators with Triton kernels.

Importing this package registers ``torch.ops.kvops.*``. It needs torch alone; Triton comes in at the first launch. The
packages ``kvops.policies``, ``models``, ``generation``, ``autotune``, ``parallel``, ``tables`` and ``integrations`` and
the function ``kvops.warm_up`` are imported when they are first named.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from kvops import nn
from kvops.cache import CacheStats, OutOfBlocksError, PagedKVCache
from kvops.ops.attention import flash_attention, flash_attention_backward, flash_attention_bias_backward
from kvops.ops.blocks import copy_blocks
from kvops.ops.eviction import compact, select_blocks
from kvops.ops.latent import paged_latent_attention
from kvops.ops.merge import merge_attention, merge_attention_backward
from kvops.ops.paged import paged_append, paged_attention, paged_schedule
from kvops.ops.registry import backend
from kvops.ops.scores import attention_scores, attention_scores_varlen
from kvops.ops.varlen import (
    flash_attention_varlen,
    flash_attention_varlen_backward,
    flash_attention_varlen_bias_backward,
)
from kvops.ops.verify import prompt_lookup, verify_draft
from kvops.ops.verify_tree import tree_mask, verify_tree
from kvops.ops.verify_varlen import verify_draft_varlen, verify_tree_varlen
from kvops.sampling import process_logits
from kvops.sdpa import scaled_dot_product_attention

if TYPE_CHECKING:
    from kvops import autotune as autotune
    from kvops import generation as generation
    from kvops import integrations as integrations
    from kvops import models as models
    from kvops import parallel as parallel
    from kvops import policies as policies
    from kvops.cache import tables as tables
    from kvops.generation.warm_up import warm_up as warm_up

try:
    __version__ = version("kvops")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = [
    "CacheStats",
    "OutOfBlocksError",
    "PagedKVCache",
    "__version__",
    "attention_scores",
    "attention_scores_varlen",
    "backend",
    "compact",
    "copy_blocks",
    "flash_attention",
    "flash_attention_backward",
    "flash_attention_bias_backward",
    "flash_attention_varlen",
    "flash_attention_varlen_backward",
    "flash_attention_varlen_bias_backward",
    "merge_attention",
    "merge_attention_backward",
    "nn",
    "paged_append",
    "paged_attention",
    "paged_latent_attention",
    "paged_schedule",
    "process_logits",
    "prompt_lookup",
    "scaled_dot_product_attention",
    "select_blocks",
    "tree_mask",
    "verify_draft",
    "verify_draft_varlen",
    "verify_tree",
    "verify_tree_varlen",
]

_ON_DEMAND = {
    **{name: f"kvops.{name}" for name in ("autotune", "generation", "integrations", "models", "parallel", "policies")},
    "tables": "kvops.cache.tables",
    "warm_up": "kvops.generation.warm_up:warm_up",
}

if not TYPE_CHECKING:  # type checkers shall find a name that does not exist

    def __getattr__(name: str) -> Any:
        if name not in _ON_DEMAND:
            raise AttributeError(f"module 'kvops' has no attribute {name!r}")
        module, _, attribute = _ON_DEMAND[name].partition(":")
        found = importlib.import_module(module)
        return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted([*__all__, *_ON_DEMAND])
