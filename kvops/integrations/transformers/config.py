"""Reads configurations of transformers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvops.models.rope import frequencies

# Layer types that keep keys and values of all tokens, or of the tokens in a window.
_ATTENTION = {"full_attention", "sliding_attention"}
_CHUNKED = {"chunked_attention"}
# Layer types that keep a state of fixed size, alone or beside keys and values.
_STATE = {"linear_attention", "conv"}
_BOTH = {"hybrid", "hybrid_sliding"}
# Layer types that keep nothing.
_STATELESS = {"moe", "mlp"}
# Families in which the type of a layer decides on its heads without the config saying so.
_HEADS_BY_TYPE = {"mimo_v2_flash"}


@dataclass(frozen=True)
class HeadGroup:
    """Layers with the same heads.

    Attributes:
        kv_heads: their number in a layer, relative to other groups.
        layers: in order.
    """

    kv_heads: int
    layers: list[int]


def expect_layers(name: str, config: Any, *, states: bool, advice: str) -> None:
    """Raise ValueError for layers that are neither full nor sliding attention; ``states`` allows layers with a
    state, and chunked attention."""
    allowed = _ATTENTION | _STATELESS | (_STATE | _BOTH | _CHUNKED if states else set())
    others = set(layer_types_of(config)) - allowed
    if others:
        raise ValueError(
            f"{name}: expected layers of full or sliding attention, got {', '.join(sorted(others))}: {advice}"
        )
    if not storing_layers(config):
        raise ValueError(f"{name}: expected at least one layer of attention, got none: {advice}")


def cache_argument(model: Any) -> str:
    """How the forward of a model calls its cache: transformers 5.24 has renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def layer_types_of(config: Any) -> list[str]:
    return list(getattr(config, "layer_types", None) or ["full_attention"] * num_layers_of(config))


def state_layers(config: Any) -> list[int]:
    """The layers that keep a state of fixed size (convolutions, linear attention)."""
    return [layer for layer, kind in enumerate(layer_types_of(config)) if kind in _STATE | _BOTH]


def num_layers_of(config: Any) -> int:
    """The number of layers of the decoder; num_hidden_layers may count an encoder's."""
    return getattr(config, "decoder_layers", None) or config.num_hidden_layers


def storing_layers(config: Any) -> list[int]:
    """The layers that store keys and values of their own; others may attend to those of an earlier layer."""
    types = layer_types_of(config)
    modes = getattr(config, "kv_sharing_modes", None)
    if not modes:  # transformers before 5.23 has a number alone
        shared = getattr(config, "num_kv_shared_layers", None) or 0
        modes = [""] * (len(types) - shared) + ["reuse"] * shared
    return [
        layer
        for layer, (kind, mode) in enumerate(zip(types, modes, strict=True))
        if kind in _ATTENTION | _BOTH | _CHUNKED and mode != "reuse"
    ]


def head_groups(config: Any) -> list[HeadGroup]:
    """The layers that store keys, in groups whose heads have the same number and size as far as the config tells."""
    types = layer_types_of(config)
    by_type = getattr(config, "model_type", "") in _HEADS_BY_TYPE
    by_layer = config.per_layer_config if getattr(config, "is_heterogeneous", False) else None
    groups: dict[Any, HeadGroup] = {}
    for layer in storing_layers(config):
        heads = 1
        kind: Any = types[layer] if by_type else None
        if by_layer is not None:
            heads = getattr(by_layer[layer], "num_key_value_heads", None) or by_layer[layer].num_attention_heads
            kind = heads, head_dim_of(by_layer[layer])
        groups.setdefault(kind, HeadGroup(heads, [])).layers.append(layer)
    return list(groups.values())


def head_dim_of(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_of(config: Any) -> Tensor | None:
    """Frequencies of the unscaled rotary embedding, float32 [D / 2]; None if the config has another embedding or
    none."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "default" or rope.get("partial_rotary_factor", 1) != 1:
        return None
    return frequencies(head_dim_of(config), rope["rope_theta"])
