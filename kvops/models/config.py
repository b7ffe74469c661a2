"""The numbers that describe a Llama-family decoder, and how they are read from Hugging Face's ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvops.models.entries import Entries, as_kind
from kvops.models.rope import (
    LinearRopeScaling,
    Llama3RopeScaling,
    RopeScaling,
    YarnRopeScaling,
    expect_positive,
    yarn_attention_factor,
)

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_ARCHITECTURE_OF_MODEL_TYPE = dict(zip(("llama", "mistral", "qwen2"), SUPPORTED_ARCHITECTURES, strict=True))
_SOURCE = "the model's configuration"


@dataclass(frozen=True)
class LlamaConfig:
    """A Llama-family decoder: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

    Attributes:
        vocab_size: rows of the embedding and of the output matrix.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the feed-forward layer.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides ``num_heads``.
        head_dim: size of a head, even; ``num_heads * head_dim`` need not be ``hidden_size``.
        rms_norm_eps: added to the mean square.
        rope_theta: base of the rotary frequencies ``rope_theta ** (-2 i / head_dim)``.
        rope_scaling: how the frequencies are stretched to a longer context, or None.
        max_positions: the longest context of the model, in tokens.
        tie_embeddings: the output matrix is the embedding; no ``lm_head.weight`` then.
        sliding_window: the number of latest tokens, including its own, that a query sees in every layer; None for all.
        attention_bias: the query, key and value projections (not the output projection) have a bias, as in Qwen2.

    Raises:
        ValueError: an attribute is out of range; the message starts with its name.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_positions: int = 2048
    tie_embeddings: bool = False
    sliding_window: int | None = None
    attention_bias: bool = False

    def __post_init__(self) -> None:
        window = () if self.sliding_window is None else ("sliding_window",)
        counts = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        expect_positive(self, *counts, "head_dim", "rms_norm_eps", "rope_theta", "max_positions", *window)
        for name in (*counts, "head_dim", "max_positions", *window):
            as_kind(name, getattr(self, name), int, "a configuration")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads {self.num_heads}, got {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even size for the rotary embedding, got {self.head_dim}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read the content of a Hugging Face ``config.json`` (of transformers 4 or 5). A null entry takes its default.

        Raises:
            ValueError: an architecture, a rotary embedding or another setting that this model does not have, a
                missing entry, or one of the wrong type; the message starts with the entry's name.
        """
        entries = Entries(config, _SOURCE)
        architecture = _architecture(entries)
        is_llama, is_qwen2 = architecture == "LlamaForCausalLM", architecture == "Qwen2ForCausalLM"
        entries.only("hidden_act", "silu")
        entries.only("mlp_bias", False)
        if not is_qwen2:  # for a Llama, it gives the output projection a bias too
            entries.only("attention_bias", False)

        num_heads, hidden_size = entries.need("num_attention_heads", int), entries.need("hidden_size", int)
        num_kv_heads = entries.find("num_key_value_heads", int)
        if num_kv_heads is None:
            # Only Llama's default is "as many as the query heads".
            num_kv_heads = num_heads if is_llama else entries.need("num_key_value_heads", int)
        max_positions = entries.need("max_position_embeddings", int)
        rope_theta, rope_scaling = _rope(entries, max_positions)
        return cls(
            vocab_size=entries.need("vocab_size", int),
            hidden_size=hidden_size,
            intermediate_size=entries.need("intermediate_size", int),
            num_layers=entries.need("num_hidden_layers", int),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=entries.get("head_dim", int, hidden_size // max(num_heads, 1)),
            rms_norm_eps=entries.get("rms_norm_eps", float, 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_positions=max_positions,
            tie_embeddings=entries.get("tie_word_embeddings", bool, False),
            sliding_window=_sliding_window(entries, architecture),
            attention_bias=is_qwen2,
        )

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight of the model under Hugging Face's name, with its shape."""
        hidden, queries, keys = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            for name, width in (("q", queries), ("k", keys), ("v", keys)):
                shapes[f"{prefix}self_attn.{name}_proj.weight"] = (width, hidden)
                if self.attention_bias:
                    shapes[f"{prefix}self_attn.{name}_proj.bias"] = (width,)
            shapes |= {
                f"{prefix}self_attn.o_proj.weight": (hidden, queries),
                f"{prefix}mlp.gate_proj.weight": (self.intermediate_size, hidden),
                f"{prefix}mlp.up_proj.weight": (self.intermediate_size, hidden),
                f"{prefix}mlp.down_proj.weight": (hidden, self.intermediate_size),
                f"{prefix}input_layernorm.weight": (hidden,),
                f"{prefix}post_attention_layernorm.weight": (hidden,),
            }
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes


def _architecture(entries: Entries) -> str:
    names = entries.strings("architectures")
    if names:
        name = names[0]
    else:
        model_type = entries.get("model_type", str, "none")
        name = _ARCHITECTURE_OF_MODEL_TYPE.get(model_type, model_type)
    if name not in SUPPORTED_ARCHITECTURES:
        raise ValueError(f"architectures: supported are {', '.join(SUPPORTED_ARCHITECTURES)}; got {name}")
    return name


# Further entries of each kind of scaling.
_ROPE_ENTRIES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"),
}
_COMMON_ROPE_ENTRIES = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


def _rope(entries: Entries, max_positions: int) -> tuple[float, RopeScaling | None]:
    """The base and the scaling. transformers 5 writes both into ``rope_parameters``; older versions have separate
    entries."""
    # If a file has both, transformers 5 takes the older name.
    parameters = Entries(entries.find("rope_scaling", dict) or entries.get("rope_parameters", dict, {}), _SOURCE)
    theta = parameters.get("rope_theta", float, entries.get("rope_theta", float, 10000.0))
    for place in (entries, parameters):
        place.only("partial_rotary_factor", 1.0)
    kind = parameters.find("rope_type", str) or parameters.get("type", str, "default")
    if kind not in _ROPE_ENTRIES:
        raise ValueError(f"rope_type: supported are {', '.join(_ROPE_ENTRIES)}; got {kind}")
    for key, value in parameters.values.items():
        if value is not None and key not in (*_COMMON_ROPE_ENTRIES, *_ROPE_ENTRIES[kind]):
            raise ValueError(f"{key}: expected no such entry beside rope_type {kind!r} in {_SOURCE}, got {value!r}")
    if kind == "default":
        return theta, None
    factor = parameters.need("factor", float)
    if kind == "linear":
        return theta, LinearRopeScaling(factor)
    # An entry outside the rotary embedding's object takes precedence, as in transformers.
    original = entries.find("original_max_position_embeddings", int)
    if original is None:
        original = parameters.get("original_max_position_embeddings", int, max_positions)
    if kind == "llama3":
        low, high = parameters.need("low_freq_factor", float), parameters.need("high_freq_factor", float)
        return theta, Llama3RopeScaling(factor, low, high, original)
    return theta, YarnRopeScaling(
        factor,
        original,
        attention_factor=_yarn_attention_factor(parameters, factor),
        beta_fast=parameters.get("beta_fast", float, 32.0),
        beta_slow=parameters.get("beta_slow", float, 1.0),
        truncate=parameters.get("truncate", bool, True),
    )


def _yarn_attention_factor(parameters: Entries, factor: float) -> float:
    given = parameters.find("attention_factor", float)
    if given is not None:
        return given
    mscale, of_all = parameters.get("mscale", float, 0.0), parameters.get("mscale_all_dim", float, 0.0)
    if mscale and of_all:
        return yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, of_all)
    return yarn_attention_factor(factor)


def _sliding_window(entries: Entries, architecture: str) -> int | None:
    if architecture == "LlamaForCausalLM":
        return None
    if architecture == "MistralForCausalLM":
        # A null means no window; without an entry, the default of transformers applies.
        return entries.find("sliding_window", int) if "sliding_window" in entries.values else 4096
    window = entries.find("sliding_window", int)
    if window is None and "sliding_window" not in entries.values:
        window = 4096
    if not entries.get("use_sliding_window", bool, False) or window is None:
        return None
    layers, first = entries.need("num_hidden_layers", int), entries.get("max_window_layers", int, 28)
    kinds = entries.strings("layer_types") or ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    windowed = [kind == "sliding_attention" for kind in kinds[:layers]]
    if not any(windowed):
        return None
    if not all(windowed):
        raise ValueError(
            "max_window_layers, layer_types: expected a sliding window in all layers or in none, "
            f"got one in {sum(windowed)} of {layers} layers"
        )
    return window
