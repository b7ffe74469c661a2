"""Shared by all pictures: matplotlib set up for files, and colours. A page is about 8 inches wide."""

from __future__ import annotations

from typing import Any

from bench.results import Result

OURS, THEIRS, LINE, FAINT = "#c2410c", "#94a3b8", "#334155", "#d5dbe3"
# Distinguishable with every kind of colour vision (Wong, Nature Methods 2011), one of them darkened for white paper.
PALETTE = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#b8860b", "#000000")


def pyplot() -> Any:
    """matplotlib for files. Raises ValueError with the command that installs it."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("matplotlib: expected for plots, not installed; next step: pip install '.[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": LINE,
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "figure.dpi": 120,
            "legend.frameon": False,
        }
    )
    return plt


def where(result: Result) -> str:
    setting = result["setting"]
    return f"{setting['runs']}, {setting['date'][:10]}"
