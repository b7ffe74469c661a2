"""Frequencies of the rotary position embedding, unscaled and scaled to longer contexts.

Su et al. 2021, "RoFormer" (arXiv:2104.09864).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearRopeScaling:
    """All frequencies divided by ``factor`` (Chen et al. 2023, "Position Interpolation", arXiv:2306.15595)."""

    factor: float

    def __post_init__(self) -> None:
        expect_positive(self, "factor")

    def frequencies(self, plain: Tensor, theta: float) -> Tensor:
        """``plain`` [D / 2] divided by the factor."""
        return plain / self.factor


@dataclass(frozen=True)
class Llama3RopeScaling:
    """The scaling of Llama 3.1 (Grattafiori et al. 2024, "The Llama 3 Herd of Models", arXiv:2407.21783).

    A frequency whose wavelength is shorter than ``original_max_positions / high_freq_factor`` is kept. One whose
    wavelength is longer than ``original_max_positions / low_freq_factor`` is divided by ``factor``. Those between are
    blended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        expect_positive(self, "factor", "low_freq_factor", "original_max_positions")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor: expected more than low_freq_factor {self.low_freq_factor}, "
                f"got {self.high_freq_factor}"
            )

    def frequencies(self, plain: Tensor, theta: float) -> Tensor:
        """``plain`` [D / 2], scaled."""
        turns = self.original_max_positions * plain / (2 * math.pi)  # over the original context
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return kept * plain + (1 - kept) * plain / self.factor


@dataclass(frozen=True)
class YarnRopeScaling:
    """YaRN (Peng et al. 2023, arXiv:2309.00071).

    Dimensions that turn more than ``beta_fast`` times within ``original_max_positions`` keep their frequency. Those
    that turn less than ``beta_slow`` times have it divided by ``factor``. Those between are blended, linearly in the
    dimension's index.

    Attributes:
        factor: the ratio of the new context length to the original one.
        original_max_positions: the context before scaling, in tokens.
        attention_factor: multiplies the cosines and sines, so that attention scores grow by its square. The paper's
            value is ``0.1 * ln(factor) + 1``: see :func:`yarn_attention_factor`.
        beta_fast: see above.
        beta_slow: see above.
        truncate: round the two bounds of the blend to whole dimensions.
    """

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        expect_positive(self, "factor", "original_max_positions", "attention_factor", "beta_fast", "beta_slow")
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast: expected more than beta_slow {self.beta_slow}, got {self.beta_fast}")

    def frequencies(self, plain: Tensor, theta: float) -> Tensor:
        """``plain`` [D / 2], scaled."""
        pairs = len(plain)
        # The (fractional) index of the pair that makes this number of turns within the original context.
        low, high = (
            pairs * math.log(self.original_max_positions / (turns * 2 * math.pi)) / math.log(theta)
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        if low == high:
            high += 0.001
        stretched = ((torch.arange(pairs, dtype=plain.dtype, device="cpu") - low) / (high - low)).clamp(0, 1)
        return plain / self.factor * stretched + plain * (1 - stretched)


RopeScaling = LinearRopeScaling | Llama3RopeScaling | YarnRopeScaling


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """The factor of cosines and sines in YaRN for a context ``factor`` times as long; 1 if it is not longer."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Angular frequency of each pair of dimensions, float32 [head_dim / 2] on the CPU, scaled; without scaling
    ``theta ** (-2 i / head_dim)``."""
    plain = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    return plain if scaling is None else scaling.frequencies(plain, theta)


def expect_positive(config: object, *names: str) -> None:
    """Raise ValueError for the first of these attributes that is not a finite number above 0."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name}: expected a number, got {value!r}")
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {value}")
