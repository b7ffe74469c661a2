"""Attention layers of transformers models as :class:`kvops.nn.Attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvops.integrations.transformers.attention import attention, enable
from kvops.integrations.transformers.config import rope_of
from kvops.nn import Attention, frequencies

# Layers of the same arithmetic: project, normalise each head if there are norms, rotate halves, attend, project.
KNOWN = frozenset(
    f"{family}Attention" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "GptOss")
)


def _obstacle(layer: torch.nn.Module) -> str:
    """The reason why a layer cannot be swapped; empty if it can be."""
    kind = type(layer)
    if kind is torch.nn.MultiheadAttention:
        return "takes query, key and value: build kvops.nn.Attention.from_torch and call it with x"
    if kind.__name__ not in KNOWN or not kind.__module__.startswith("transformers."):
        return "not one of " + ", ".join(sorted(KNOWN))
    return ""


def options_of(layer: Any) -> dict[str, Any]:
    """Arguments of :class:`kvops.nn.Attention` for a layer of transformers. Raises ValueError if there are none."""
    obstacle = _obstacle(layer)
    if obstacle:
        raise ValueError(f"layer: expected an attention layer to take over, got {type(layer).__name__}: {obstacle}")
    config = layer.config
    # Mistral's layers read the config; layers of mixed models have an attribute.
    window = layer.sliding_window if hasattr(layer, "sliding_window") else getattr(config, "sliding_window", None)
    if type(layer).__name__ in ("LlamaAttention", "GemmaAttention"):
        window = None
    return {
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": layer.head_dim,
        "causal": layer.is_causal,
        "window": window,
        "softcap": getattr(layer, "attn_logit_softcapping", None) or 0.0,
        "scale": layer.scaling,
        "dropout": getattr(layer, "attention_dropout", 0.0),
        "layer": layer.layer_idx,
    }


class TransformersAttention(Attention):
    """:class:`kvops.nn.Attention` as transformers' decoder layers call it."""

    @property
    def layer_idx(self) -> int:
        return self.layer

    @property
    def is_causal(self) -> bool:
        return self.causal

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states ``[B, T, hidden]`` and the positions' cos and sin -> ``[B, T, hidden]`` and None. From
        transformers 5.24 on ``past_key_values`` is called ``cache``."""
        cos, sin = (turn[..., : self.head_dim // 2] for turn in position_embeddings)
        q, k, v = (x.transpose(1, 2) for x in self.project(hidden_states, hidden_states, cos, sin))
        cache = past_key_values if cache is None else cache
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        out, _ = attention(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scale,
            sliding_window=self.window,
            softcap=self.softcap,
            s_aux=self.sinks,
            **kwargs,
        )
        return self.o_proj(out.flatten(-2)), None


def attention_module(layer: torch.nn.Module, *, rope: Tensor | None = None) -> Attention:
    """A :class:`kvops.nn.Attention` that shares the projections of an attention layer of a transformers model.

    Args:
        layer: an attention layer of Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma2, Gemma3 or GPT-OSS.
        rope: the frequencies, float32 ``[head_dim / 2]``: the ``inv_freq`` of the model's rotary embedding. None
            computes them from the ``rope_theta`` of the config, if the config has no scaling.

    Raises:
        ValueError: the layer is of another kind, or the config describes a scaled rotary embedding and ``rope`` is
            None. :func:`replace` needs no frequencies.
    """
    options = options_of(layer)
    if rope is None:
        rope = rope_of(layer.config)
        if rope is None:
            raise ValueError(
                "rope: expected the frequencies, as the config's rotary embedding is not the plain one: pass the "
                "model's rotary_emb.inv_freq"
            )
    module = Attention.around(layer, **options)
    module.rope = frequencies(rope, module.head_dim, module.q_proj.weight.device)
    return module


@dataclass(frozen=True)
class Swap:
    """What happened to the attention layer ``name`` of class ``kind``: swapped, or kept for a ``reason``."""

    name: str
    kind: str
    reason: str = ""

    @property
    def swapped(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Replacement:
    """What :func:`replace` did to each layer. ``str()`` gives a report."""

    layers: tuple[Swap, ...]

    @property
    def swapped(self) -> int:
        """The number of layers that were swapped."""
        return sum(layer.swapped for layer in self.layers)

    def __str__(self) -> str:
        lines = [f"{self.swapped} of {len(self.layers)} attention layers run on kvops.nn.Attention"]
        lines += [f"  left: {layer.name} ({layer.kind}): {layer.reason}" for layer in self.layers if not layer.swapped]
        return "\n".join(lines)


def replace(model: torch.nn.Module) -> Replacement:
    """Swap the attention layers of a loaded transformers model for :class:`kvops.nn.Attention`, in place.

    The new layers share the old ones' projections, so nothing is copied and the state dict keeps its names. The model
    makes its masks as with ``attn_implementation="kvops"``.

    Raises:
        ValueError: ``model`` is not a transformers model.
        RuntimeError: as :func:`enable`.
    """
    implementation = enable()
    owners = [module for module in model.modules() if hasattr(module, "set_attn_implementation")]
    if not owners:
        raise ValueError(f"model: expected a model of transformers, got {type(model).__name__}")
    swaps = []
    for name, layer in list(model.named_modules()):
        kind = type(layer).__name__
        if not kind.endswith("Attention") or isinstance(layer, Attention):
            continue
        obstacle = _obstacle(layer)
        swaps.append(Swap(name, kind, obstacle))
        if not obstacle:
            swapped = TransformersAttention.around(layer, **options_of(layer))
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, swapped)
    if any(swap.swapped for swap in swaps):
        owners[0].set_attn_implementation(implementation)  # type: ignore[operator]
    return Replacement(tuple(swaps))
