"""The attention function that transformers' models call, and its registration."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvops import checks
from kvops.extras import require
from kvops.integrations.transformers.masks import ELSEWHERE, Mask, Packing, make_mask
from kvops.integrations.transformers.placeholders import Deferred, as_tensor
from kvops.ops.attention import flash_attention
from kvops.ops.varlen import flash_attention_varlen

NAME = "kvops"

# Arguments that models pass from their forward to attention and that do not change its result.
HARMLESS = frozenset(
    {
        *("position_ids", "cache_position", "position_embeddings", "use_cache", "return_dict", "logits_to_keep"),
        *("labels", "num_items_in_batch", "output_hidden_states", "output_router_logits", "seq_idx", "deterministic"),
    }
)


def enable() -> str:
    """Register ``"kvops"`` as an attention implementation of transformers and return that name.

    Afterwards ``from_pretrained(..., attn_implementation="kvops")`` and ``model.set_attn_implementation("kvops")``
    work. Calling it again does nothing.

    Raises:
        RuntimeError: this version of transformers describes masks in a way that kvops cannot read.
        ImportError: transformers is not installed.
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


# Over 80 lines: 45 are the signature and its documentation.
def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Mask | Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that :func:`enable` registers; called by transformers' models.

    Args:
        module: the attention layer.
        query: ``[B, Hq, T, D]``.
        key, value: ``[B, Hkv, S, ·]``, or the placeholder that :class:`KVOpsCache` returns.
        attention_mask: what :func:`make_mask` returned. None in a model that makes no mask: then ``is_causal`` (the
            argument, or the attribute of ``module``) and ``sliding_window`` say what a query sees. Or a bool mask or
            float bias that broadcasts to ``[B, Hq, T, S]``, which says all of it.
        s_aux: ``[Hq]``, attention sinks as in GPT-OSS.
        position_bias: broadcasts to ``[B, Hq, T, S]``, added to the scores as in T5; differentiable. Beside padded rows
            it takes memory for ``[B, Hq, T, S]``.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed sequences, as transformers' flattening collator
            describes them.
        output_attentions: True warns, as with ``"sdpa"``.
        **kwargs: arguments of the model's forward that do not change attention (:data:`HARMLESS`).

    Returns:
        The output ``[B, T, Hq, Dv]``, and None in place of the weights.

    Raises:
        ValueError: a mask that was made for other lengths, dropout beside a :class:`KVOpsCache` or a :class:`Decoder`,
            a bias beside a :class:`Decoder`, or any other argument that is not None.
    """
    for name, given in kwargs.items():
        if given is not None and name not in HARMLESS:
            raise ValueError(
                f"{name}: expected None, got {checks.shown(given)}: kvops does not know what it does to attention in "
                f"{type(module).__name__}, {ELSEWHERE}"
            )
    if output_attentions:
        _warn_about_weights()
    batch, _, q_length, _ = query.shape
    if isinstance(key, Deferred) and not key.attends_with(value):  # the model has computed with them
        key, value = key.tensor(), as_tensor(value)
    held = not isinstance(key, Tensor)  # a placeholder of a KVOpsCache or a Decoder
    kv_length = key.kv_length if held else key.shape[2]
    mask = _mask(attention_mask, module, is_causal, sliding_window, q_length, kv_length)
    mask.expect_lengths(batch, q_length, kv_length)
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux}
    if dropout:
        options["dropout_p"] = dropout
    packing = _given_packing(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    if held:
        if dropout:
            raise ValueError(
                f"dropout: expected 0 beside a KVOpsCache or a Decoder, got {dropout}: call model.eval() to generate, "
                "and train without a cache"
            )
        if not isinstance(key, Deferred):
            _refuse_bias_of_a_decoder(position_bias, mask)
        if packing is not None:
            raise ValueError("cu_seq_lens_q: expected None with a cache that holds padded rows, got packed sequences")
        if position_bias is not None and mask.bias is not None:
            mask = replace(mask, bias=_bias(position_bias, mask, False)[0])
        elif position_bias is not None:
            options["bias"] = position_bias
        return key.attend(query.transpose(1, 2), mask, options), None
    mask = mask.packed()
    bias, mask = _bias(position_bias, mask, packing is not None)
    if bias is not None:
        options["bias"] = bias
    q, k, v = (_row_contiguous(x.transpose(1, 2)) for x in (query, key, as_tensor(value)))
    return attend(q, k, v, mask, packing or mask.packing, options), None


def _refuse_bias_of_a_decoder(position_bias: Tensor | None, mask: Mask) -> None:
    name, expected = "attention_mask", "a causal mask with windows and padding only"
    if position_bias is not None:
        name, expected = "position_bias", "None"
    bias = mask.bias if position_bias is None else position_bias
    if bias is not None:
        raise ValueError(
            f"{name}: expected {expected} beside a Decoder, whose loop has no bias, got {checks.shown(bias)}: "
            "use model.generate with KVOpsCache"
        )


def _bias(position_bias: Tensor | None, mask: Mask, packed: bool) -> tuple[Tensor | None, Mask]:
    """The bias of this call, and what is left of the mask beside it.

    A mask with a bias of its own needs nothing beside it. Packed sequences have no bias, so padding becomes a part of
    the position bias.
    """
    seen = mask.bias
    if position_bias is not None and seen is None and mask.packing is not None:
        seen = mask.seen()
    if packed and (position_bias is not None or seen is not None):
        raise ValueError(
            f"cu_seq_lens_q: expected None beside a position bias or a mask that needs one, got a tensor: {ELSEWHERE}"
        )
    if seen is None:
        return position_bias, mask
    mask = replace(mask, causal=False, window_left=-1, window_right=-1, packing=None)
    if position_bias is None:
        return seen, mask
    if seen.dtype == torch.bool:
        return position_bias.masked_fill(~seen, -torch.inf), mask
    return position_bias + seen, mask


def _mask(
    given: Any,
    module: torch.nn.Module,
    is_causal: bool | None,
    sliding_window: int | None,
    q_length: int,
    kv_length: int,
) -> Mask:
    """The mask of this call. Raises ValueError if it is not clear what a query sees."""
    if given is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and 1 < q_length != kv_length:
            raise ValueError(
                f"attention_mask: expected a mask for {q_length} queries and {kv_length} keys in causal attention, got "
                f"None, which does not tell which keys the first query sees: {ELSEWHERE}"
            )
        window = sliding_window or 0
        return Mask(causal, window - 1, -1 if causal else window - 1, None, q_length, kv_length)
    if not isinstance(given, Mask):
        if given.dim() != 4 or any(
            size not in (1, whole) for size, whole in zip(given.shape[2:], (q_length, kv_length), strict=True)
        ):
            raise ValueError(
                f"attention_mask: expected a mask [batch, heads, {q_length}, {kv_length}] or one of padding [batch, "
                f"seqlen], got a tensor of shape {list(given.shape)}"
            )
        return Mask(False, -1, -1, None, q_length, kv_length, bias=given)
    if given.bias is None and is_causal is not None and is_causal != given.causal and q_length > 1:
        raise ValueError(
            f"is_causal: expected {given.causal}, as the mask has it, got {is_causal}: leave it out, or set "
            "is_causal in the model's config"
        )
    return given


def _row_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _warn_about_weights() -> None:
    require("transformers").utils.logging.get_logger(__name__).warning_once(
        "`kvops` attention does not support `output_attentions=True`: the weights are never in memory and None is "
        "returned in their place. Set attn_implementation to 'eager' to get them."
    )


def _given_packing(
    cu_q: Tensor | None, cu_k: Tensor | None, longest_q: int | Tensor | None, longest_k: int | Tensor | None
) -> Packing | None:
    """The packed sequences from a caller's cumulative lengths; None without them."""
    if cu_q is None and cu_k is None:
        return None
    if cu_q is None or cu_k is None:
        raise ValueError("cu_seq_lens_q: expected together with cu_seq_lens_k, got only one of them")
    longest_q = cu_q.diff().max() if longest_q is None else longest_q
    longest_k = cu_k.diff().max() if longest_k is None else longest_k
    return Packing(cu_q.int(), cu_k.int(), int(longest_q), int(longest_k))


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
