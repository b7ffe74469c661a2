"""What configurations of transformers say, in the words of this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def head_dim_of(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_of(config: Any) -> Tensor | None:
    """Frequencies of the plain rotary embedding, float32 [D / 2]; None where the config has another one, or none."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "default" or rope.get("partial_rotary_factor", 1) != 1:
        return None
    head_dim = head_dim_of(config)
    return rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
