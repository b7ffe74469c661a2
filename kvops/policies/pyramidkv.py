"""PyramidKV: lower layers keep more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvops import checks
from kvops.policies.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's scores; budgets fall linearly from the first layer to the last (Cai et al. 2024, arXiv 2406.02069).

    The first layer gets ``2 - 1 / steepness`` times the mean and the last ``1 / steepness`` times.

    Attributes:
        steepness: the paper's beta, at least 1; 1 gives all layers the same budget.
    """

    scope: Literal["head", "layer", "sequence"] = "head"
    steepness: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.expect_at_least("steepness", self.steepness, 1)
        checks.expect_finite("steepness", self.steepness)

    def layer_weights(self, num_layers: int) -> list[float] | None:
        last = 1 / self.steepness
        if num_layers == 1:
            return [1.0]
        return [2 - last - layer * (2 - 2 * last) / (num_layers - 1) for layer in range(num_layers)]
