"""The numbers that describe a Llama-family decoder, and how they are read from Hugging Face's ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_ARCHITECTURE_OF_MODEL_TYPE = dict(zip(("llama", "mistral", "qwen2"), SUPPORTED_ARCHITECTURES, strict=True))


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's stretching of the rotary frequencies (Grattafiori et al. 2024, "The Llama 3 Herd of Models").

    A frequency whose wavelength is shorter than ``original_max_positions / high_freq_factor`` is kept, one that is
    longer than ``original_max_positions / low_freq_factor`` is divided by ``factor``, those between are blended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        _expect_positive(self, "factor", "low_freq_factor", "original_max_positions")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor: expected more than low_freq_factor {self.low_freq_factor}, "
                f"got {self.high_freq_factor}"
            )


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
        rope_scaling: Llama 3.1's stretching of the frequencies, or None.
        max_positions: the longest context that the model was made for, in tokens.
        tie_embeddings: the output matrix is the embedding; no ``lm_head.weight`` then.
        sliding_window: how many of the latest tokens, its own included, a query sees in every layer; None: all.
        attention_bias: the query, key and value projections (not the output projection) have a bias, as in Qwen2.

    Raises:
        ValueError: a number that makes no model, by the attribute's name.
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
    rope_scaling: Llama3RopeScaling | None = None
    max_positions: int = 2048
    tie_embeddings: bool = False
    sliding_window: int | None = None
    attention_bias: bool = False

    def __post_init__(self) -> None:
        _expect_positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        _expect_positive(self, "num_kv_heads", "head_dim", "rms_norm_eps", "rope_theta", "max_positions")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads {self.num_heads}, got {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even size for the rotary embedding, got {self.head_dim}")
        if self.sliding_window is not None:
            _expect_positive(self, "sliding_window")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read the content of a Hugging Face ``config.json`` (of transformers 4 or 5).

        Raises:
            ValueError: an architecture, a rotary embedding or another setting that this model does not have, or a
                missing entry; the message says what is supported.
        """
        architecture = _architecture(config)
        is_llama, is_qwen2 = architecture == "LlamaForCausalLM", architecture == "Qwen2ForCausalLM"
        _refuse(config, "hidden_act", supported="silu")
        _refuse(config, "mlp_bias", supported=False)
        if not is_qwen2:  # in a Llama it would give the output projection a bias too
            _refuse(config, "attention_bias", supported=False)

        num_heads, hidden_size = _require(config, "num_attention_heads"), _require(config, "hidden_size")
        _expect_number("num_attention_heads", num_heads)
        _expect_number("hidden_size", hidden_size)
        num_kv_heads = config.get("num_key_value_heads")
        if num_kv_heads is None:
            # Only Llama's default is "as many as the query heads".
            num_kv_heads = num_heads if is_llama else _require(config, "num_key_value_heads")
        head_dim = config.get("head_dim")
        rope_theta, rope_scaling = _rope(config)
        return cls(
            vocab_size=_require(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_require(config, "intermediate_size"),
            num_layers=_require(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=hidden_size // num_heads if head_dim is None else head_dim,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_positions=_require(config, "max_position_embeddings"),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            sliding_window=_sliding_window(config, architecture),
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


def _expect_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _expect_number(name, value)
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")


def _expect_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}: expected a number, got {value!r}")


def _require(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise ValueError(f"{key}: expected in the model's configuration, but there is none")
    return config[key]


def _refuse(config: Mapping[str, Any], key: str, *, supported: object) -> None:
    value = config.get(key, supported)
    if value != supported:
        raise ValueError(f"{key}: only {supported!r} is supported, got {value!r}")


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    if not names:
        names = [_ARCHITECTURE_OF_MODEL_TYPE.get(config.get("model_type", ""), config.get("model_type"))]
    if names[0] not in SUPPORTED_ARCHITECTURES:
        raise ValueError(f"architectures: supported are {', '.join(SUPPORTED_ARCHITECTURES)}; got {names[0]}")
    return names[0]


def _rope(config: Mapping[str, Any]) -> tuple[float, Llama3RopeScaling | None]:
    """The base and the scaling; transformers 5 writes both into ``rope_parameters``, before they were apart."""
    parameters = config.get("rope_parameters")
    if parameters is None:
        parameters = config.get("rope_scaling") or {}
    theta = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
    _refuse(config, "partial_rotary_factor", supported=1.0)
    _refuse(parameters, "partial_rotary_factor", supported=1.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rope_type: supported are default and llama3, got {kind}")
    scaling = Llama3RopeScaling(
        factor=_require(parameters, "factor"),
        low_freq_factor=_require(parameters, "low_freq_factor"),
        high_freq_factor=_require(parameters, "high_freq_factor"),
        original_max_positions=_require(parameters, "original_max_position_embeddings"),
    )
    return theta, scaling


def _sliding_window(config: Mapping[str, Any], architecture: str) -> int | None:
    if architecture == "LlamaForCausalLM":
        return None
    if architecture == "MistralForCausalLM":
        return config.get("sliding_window", 4096)  # transformers' default where the file is silent
    if not config.get("use_sliding_window", False) or config.get("sliding_window") is None:
        return None
    layers, first = _require(config, "num_hidden_layers"), config.get("max_window_layers", 28)
    if first >= layers:
        return None
    if first > 0:
        raise ValueError(
            f"max_window_layers: a sliding window in some layers only is not supported "
            f"(expected 0, or at least {layers} for none), got {first}"
        )
    return config["sliding_window"]
