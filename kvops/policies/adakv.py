"""AdaKV: SnapKV with a budget that the heads of a layer compete for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvops.policies.snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV's scores; the heads of a layer compete for its budget (Feng et al. 2024, arXiv 2407.11550).

    Attributes:
        floor: what every head keeps in any case, as a share of its part under an equal division (the paper's
            safeguard).
    """

    scope: Literal["head", "layer", "sequence"] = "layer"
    floor: float = 0.2
