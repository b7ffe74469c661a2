"""Inference tensors cannot be written outside of inference mode, so a cache must not keep any."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def writable(state: dict[str, Any]) -> dict[str, Any]:
    """``state`` with normal tensors in place of inference tensors, for an object that was copied or unpickled."""
    with torch.inference_mode(False):
        return {
            name: value.clone() if isinstance(value, Tensor) and value.is_inference() else value
            for name, value in state.items()
        }
