"""The picture of an evaluation: quality against compression."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvops.extras import require
from kvops.generation.evaluate import FULL, Summary


def draw(lines: Sequence[Summary], model: str) -> Any:
    """A matplotlib figure with a panel for each of perplexity, agreement and answers that was measured."""
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    full = next(line for line in lines if line.policy == FULL)
    others = [line for line in lines if line.policy != FULL]
    panels = [
        (title, value)
        for title, value in (
            ("Perplexity of the text that follows", _perplexity),
            ("Most likely token equals the full cache's, %", _agreement),
            ("Answers kept, %", _answers),
        )
        if any(value(line) is not None for line in others)
    ]
    size = 4.6 * max(len(panels), 1), 4
    figure, grid = pyplot.subplots(1, max(len(panels), 1), figsize=size, squeeze=False, layout="constrained")
    for axes, (title, value) in zip(grid[0], panels, strict=False):
        _panel(axes, others, value)
        if value is _perplexity and full.perplexity is not None:
            axes.axhline(full.perplexity, color="0.5", linewidth=0.8)
            axes.annotate(
                "full cache", (1, full.perplexity), (0, 3), ("axes fraction", "data"), "offset points", ha="right"
            )
        axes.set_title(title, loc="left", fontsize=10)
    figure.suptitle(model, fontsize=10)
    return figure


def _panel(axes: Any, lines: Sequence[Summary], value: Callable[[Summary], float | None]) -> None:
    ratios = sorted({line.ratio for line in lines})
    ends = []
    for policy in dict.fromkeys(line.policy for line in lines):
        points = sorted(
            (line.ratio, height) for line in lines if line.policy == policy and (height := value(line)) is not None
        )
        (drawn,) = axes.plot(*zip(*points, strict=True), "o-", markersize=4)
        ends.append((points[-1][1], policy, drawn.get_color()))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ratios, [f"{ratio:g}x" for ratio in ratios])
    axes.minorticks_off()
    axes.set_xlabel("compression asked for")
    axes.set_xlim(ratios[0] / 1.2, ratios[-1] * 4)
    axes.spines[["top", "right"]].set_visible(False)
    if value is not _perplexity:
        axes.set_ylim(0, 104)  # shares: the distance from 0 is part of the picture
    low, high = axes.get_ylim()
    label_ends(axes, ratios[-1], ends, apart=0.06 * (high - low), least=low + 0.04 * (high - low))


def label_ends(
    axes: Any, x: float, ends: Sequence[tuple[float, str, str]], apart: float = 6.4, least: float = 2.0
) -> None:
    """Names beside the ends of lines (value, name, colour), ``apart`` from one another and none below ``least``."""
    ends = sorted(ends)
    places = [value for value, _, _ in ends]
    for _ in range(200):
        for low, high in zip(range(len(places)), range(1, len(places)), strict=False):
            short = apart - (places[high] - places[low])
            if short > 0:
                places[low] -= short / 2
                places[high] += short / 2
        lift = max(0.0, least - places[0]) if places else 0.0
        places = [place + lift for place in places]
    for place, (value, name, color) in zip(places, ends, strict=True):
        axes.annotate(
            name,
            (x, value),
            (x * 1.5, place),
            color=color,
            fontsize=8.5,
            va="center",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkB": 4},
        )


def _perplexity(line: Summary) -> float | None:
    return line.perplexity


def _agreement(line: Summary) -> float | None:
    return None if line.agreement is None else 100 * line.agreement


def _answers(line: Summary) -> float | None:
    return 100 * line.right / line.asked if line.asked and line.right is not None else None
