"""transformers' continuous batching, ``model.generate_batch``, with attention by kvops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvops import checks
from kvops.extras import require
from kvops.integrations.transformers.attention import HARMLESS
from kvops.ops.varlen import flash_attention_varlen

# The attention implementation of transformers that takes packed tokens and a paged cache on every device.
PAGED = "paged|eager"
# What the engine passes to attention beside the arguments of paged_attention_forward.
_OF_ENGINE = frozenset(
    {"read_index", "write_index", "block_table", "logits_indices", "logits_processor_args", "is_causal", "input_ids"}
)


@contextmanager
def continuous_batching(model: Any) -> Iterator[None]:
    """A context in which ``model.generate_batch`` attends with kvops.

    transformers 5.24 serves the implementations that it knows by name and no other, so the context registers kvops
    under one of these names, ``"paged|eager"``, for the whole process, and sets the model to it. Afterwards both are as
    before. A manager that goes on beyond the context (``persistent_manager=True``) must be stopped within it.

    Raises ImportError: transformers is not installed.
    """
    require("transformers")
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known, before = ALL_ATTENTION_FUNCTIONS[PAGED], model.config._attn_implementation
    AttentionInterface.register(PAGED, paged_attention_forward)
    try:
        model.set_attn_implementation(PAGED)
        yield
    finally:
        AttentionInterface.register(PAGED, known)
        model.set_attn_implementation(before)


@torch.compiler.disable  # the cache is written through views
def paged_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cache: Any = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that :func:`continuous_batching` registers; called by transformers' models.

    Args:
        query: ``[1, Hq, T, D]``, the tokens of all requests, packed.
        key, value: ``[1, Hkv, T, ·]``. ``cache`` stores them and returns those of all tokens of each request, packed.
            From transformers 5.24 on they are what its cache has returned, and ``cache`` is None.
        attention_mask: not read: causality and the window are known.
        cu_seq_lens_q, max_length_q: the lengths of the requests; those of their keys are among ``kwargs``.

    Raises ValueError for dropout, for a call that is not of ``generate_batch`` and for arguments that kvops does not
    know.
    """
    if cu_seq_lens_q is None:
        raise ValueError(
            "cu_seq_lens_q: expected the packed requests of generate_batch, got None: use attn_implementation='kvops'"
        )
    if dropout:
        raise ValueError(f"dropout: expected 0, got {dropout}: call model.eval() to generate")
    lengths = ("cu_seq_lens_k", "max_length_k")
    for name, given in kwargs.items():
        if given is not None and name not in HARMLESS | _OF_ENGINE and name not in lengths:
            raise ValueError(
                f"{name}: expected None, got {checks.shown(given)}: kvops does not know what it does to attention in "
                f"{type(module).__name__}"
            )
    if cache is not None:
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out, _ = flash_attention_varlen(
        q,
        k,
        v,
        cu_seq_lens_q.to(torch.int32),
        kwargs["cu_seq_lens_k"],
        max_length_q,
        kwargs["max_length_k"],
        causal=True,
        window_left=sliding_window - 1 if sliding_window else -1,
        scale=scaling,
        softcap=softcap or 0.0,
        sinks=s_aux,
    )
    return out[None], None
