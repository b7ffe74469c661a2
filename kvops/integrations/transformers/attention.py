"""The attention function that transformers' models call, and its registration."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from kvops.extras import require
from kvops.integrations.transformers.masks import Mask, Packing, make_mask
from kvops.ops.attention import flash_attention
from kvops.ops.varlen import flash_attention_varlen

NAME = "kvops"


def enable() -> str:
    """Register ``"kvops"`` as an attention implementation of transformers; returns that name. Twice is harmless.

    ``from_pretrained(..., attn_implementation="kvops")`` and ``model.set_attn_implementation("kvops")`` work from then
    on.

    Raises RuntimeError where the installed transformers describes masks in another way than kvops reads them.
    """
    require("transformers")
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        import transformers

        raise RuntimeError(
            "transformers: expected a version whose mask functions take q_length and q_offset (5.23 does), "
            f"got {transformers.__version__}: upgrade it"
        )
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, make_mask)
    return NAME


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Mask | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that :func:`enable` registers; called by transformers' models.

    Args:
        module: the attention layer.
        query: ``[B, Hq, T, D]``.
        key, value: ``[B, Hkv, S, ·]``, or what :class:`KVOpsCache` hands out.
        attention_mask: what :func:`make_mask` returned; None in a model that makes no mask, which then goes by its
            ``is_causal`` and ``sliding_window``.
        s_aux: ``[Hq]``, the sinks of GPT-OSS.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed sequences (transformers' flattening collator).

    Returns ``[B, T, Hq, Dv]`` and None: the weights are never in memory.
    """
    if dropout:
        raise ValueError(f"dropout: expected 0, got {dropout}: set attention_dropout to 0 in the model's config")
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: expected False, kvops never has the weights in memory: use 'eager'")
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        window = sliding_window or 0
        attention_mask = Mask(causal, window - 1, -1 if causal else window - 1, None)
    elif not isinstance(attention_mask, Mask):
        raise ValueError(
            f"attention_mask: expected a 2-D mask of padding, got a tensor of shape {list(attention_mask.shape)}: "
            "kvops never holds the matrix of scores, use attn_implementation='sdpa' or 'eager' with it"
        )
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux}
    if not isinstance(key, Tensor):  # the handle of a KVOpsCache
        return key.attend(query.transpose(1, 2), attention_mask, options), None

    packing = attention_mask.packing
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None and max_length_q is not None:
        longest_k = max_length_q if max_length_k is None else max_length_k
        packing = Packing(cu_seq_lens_q.int(), cu_seq_lens_k.int(), int(max_length_q), int(longest_k))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attend(q, k, v, attention_mask, packing, options), None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, packing: Packing | None, options: dict[str, Any]) -> Tensor:
    """q ``[B, T, Hq, D]``, k and v ``[B, S, Hkv, ·]`` -> ``[B, T, Hq, Dv]``."""
    options = options | {
        "causal": mask.causal,
        "window_left": mask.window_left,
        "window_right": mask.window_right,
    }
    if packing is None:
        return flash_attention(q, k, v, **options)[0]
    out, _ = flash_attention_varlen(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        packing.cu_seqlens_q,
        packing.cu_seqlens_k,
        packing.max_seqlen_q,
        packing.max_seqlen_k,
        **options,
    )
    return out.unflatten(0, q.shape[:2])
