"""A small Llama-family decoder.

The model is independent of caches: every layer passes its queries, keys and values to ``attend(layer, q, k, v)``, which
returns the output of attention. Dense attention, a ragged paged cache and a training step are three such functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvops.models.config import LlamaConfig
from kvops.models.linear import Linear, after_attention, rotated_heads
from kvops.models.rope import YarnRopeScaling, frequencies

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``(layer, q [B, T, Hq, D], k [B, T, Hkv, D], v [B, T, Hkv, D]) -> [B, T, Hq, D]``"""
LayerAttend = Callable[[Tensor, Tensor, Tensor], Tensor]


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """Angular frequency of each pair of dimensions, float32 [D / 2]: see :mod:`kvops.models.rope`."""
    return frequencies(config.head_dim, config.rope_theta, config.rope_scaling)


class LlamaLayer(nn.Module):
    """One decoder layer: attention and SwiGLU, each behind an RMSNorm and a residual connection."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        heads = config.num_heads + 2 * config.num_kv_heads
        # Projections of the same input are one matrix, for fewer and larger reads of the weights.
        self.qkv = Linear(config.hidden_size, heads * config.head_dim, bias=config.attention_bias)
        self.out = Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """x [B, T, hidden] -> [B, T, hidden]."""
        config = self.config
        heads = config.num_heads, config.num_kv_heads
        q, k, v = rotated_heads(self.attention_norm, self.qkv, x, cos, sin, heads)
        return after_attention(x, attend(q, k, v).flatten(2), self.out, self.mlp_norm, self.gate_up, self.down)


class Llama(nn.Module):
    """A decoder of the Llama family (Llama 2 / 3, SmolLM, Mistral, Qwen2).

    ``weights`` maps Hugging Face's parameter names to tensors; they are copied into this module's fused parameters,
    with the same dtype and device. Raises ValueError for a missing weight or a wrong shape.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.num_layers))
            self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.unembedding = Linear(config.hidden_size, config.vocab_size, bias=False)
        self._lay_in(weights)
        device = self.embedding.weight.device
        positions = torch.arange(config.max_positions, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, rope_frequencies(config)).to(device)
        scaling = config.rope_scaling
        magnitude = scaling.attention_factor if isinstance(scaling, YarnRopeScaling) else 1.0
        self.register_buffer("cos", angles.cos() * magnitude, persistent=False)
        self.register_buffer("sin", angles.sin() * magnitude, persistent=False)

    def _lay_in(self, weights: Mapping[str, Tensor]) -> None:
        parts = {
            "embedding.weight": ["model.embed_tokens.weight"],
            "norm.weight": ["model.norm.weight"],
            "unembedding.weight": ["model.embed_tokens.weight" if self.config.tie_embeddings else "lm_head.weight"],
        }
        for i in range(self.config.num_layers):
            source = f"model.layers.{i}."
            attention = [source + f"self_attn.{name}_proj" for name in "qkv"]
            parts |= {
                f"layers.{i}.qkv.weight": [name + ".weight" for name in attention],
                f"layers.{i}.out.weight": [source + "self_attn.o_proj.weight"],
                f"layers.{i}.gate_up.weight": [source + f"mlp.{name}_proj.weight" for name in ("gate", "up")],
                f"layers.{i}.down.weight": [source + "mlp.down_proj.weight"],
                f"layers.{i}.attention_norm.weight": [source + "input_layernorm.weight"],
                f"layers.{i}.mlp_norm.weight": [source + "post_attention_layernorm.weight"],
            }
            if self.config.attention_bias:
                parts[f"layers.{i}.qkv.bias"] = [name + ".bias" for name in attention]
        for name, parameter in list(self.named_parameters()):
            missing = [part for part in parts[name] if part not in weights]
            if missing:
                raise ValueError(
                    f"weights: expected {missing[0]!r}, but it is not among the {len(weights)} tensors given"
                )
            sources = [weights[part] for part in parts[name]]
            value = sources[0] if len(sources) == 1 else torch.cat(sources)
            if value.shape != parameter.shape:
                raise ValueError(
                    f"weights: expected {' + '.join(parts[name])} to have shape {list(parameter.shape)}, "
                    f"got {list(value.shape)}"
                )
            owner, _, attribute = name.rpartition(".")
            setattr(self.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=value.is_floating_point()))
        if self.config.tie_embeddings:
            self.unembedding.weight = self.embedding.weight

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The hidden states after the last norm: tokens int64 [B, T], positions int [B, T] -> [B, T, hidden]."""
        x = self.embedding(tokens)
        cos, sin = (table[positions].unsqueeze(2).to(x.dtype) for table in (self.cos, self.sin))
        # x rotated (see kvops.rotary) is x * cos + x with its halves exchanged * sin, with a sign for each half.
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, lambda q, k, v, index=index: attend(index, q, k, v))
        return self.norm(x)

    @property
    def rope(self) -> Tensor:
        """The rotary embedding's frequencies, float32 [D / 2]."""
        return rope_frequencies(self.config).to(self.embedding.weight.device)

    def options(self, layer: int) -> dict[str, Any]:
        """The attention options of a layer, as keywords of :func:`kvops.flash_attention`."""
        window = self.config.sliding_window
        return {"window_left": -1 if window is None else window - 1}

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden_size] -> logits [..., vocab_size]."""
        return self.unembedding(hidden)
