"""Results as pictures: how fast beside whom, how near to the roofline, how it grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import growth, table
from bench.measure import KVOPS
from bench.results import Result, Row

_OURS, _THEIRS, _LINE = "#c2410c", "#94a3b8", "#334155"


def pyplot() -> Any:
    """matplotlib, drawing into files. ValueError that says what to install where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("matplotlib: expected for plots, not installed; next step: pip install '.[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": _LINE,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "figure.dpi": 110,
            "legend.frameon": False,
        }
    )
    return plt


def draw(result: Result, stem: Path) -> list[Path]:
    """The pictures of one result file, named ``<stem>-<what>.png``; none for kinds without."""
    from bench.quality import pictures  # which draws with pyplot(), too

    kinds = {
        "operators": (("speed", _speed), ("roofline", _roofline)),
        "growth": (("", _growth),),
        "quality": (("curves", pictures.curves), ("ragged", pictures.ragged), ("heads", pictures.heads)),
    }
    paths = []
    for what, picture in kinds.get(result.get("kind", ""), ()):
        figure = picture(result)
        if figure is None:
            continue
        path = stem.with_name(f"{stem.name}-{what}.png" if what else f"{stem.name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
        pyplot().close(figure)
        paths.append(path)
    return paths


def _where(result: Result) -> str:
    setting = result["setting"]
    return f"{setting['runs']}, {setting['date'][:10]}"


def _speed(result: Result) -> Any:
    """A line for each operator and peer, a point for each case: how many times as fast kvops is."""
    rows = [row for row in result["rows"] if row["contender"] != KVOPS and row["ratio"]]
    if not rows:
        return None
    plt = pyplot()
    labels = list(dict.fromkeys((row["op"], row["contender"]) for row in rows))
    figure, axes = plt.subplots(figsize=(8.5, 0.27 * len(labels) + 1.2))
    for place, label in enumerate(labels):
        found = [row["ratio"] for row in rows if (row["op"], row["contender"]) == label]
        axes.plot(found, [place] * len(found), "o", color=_OURS, alpha=0.55, markersize=5, markeredgewidth=0)
        middle = sorted(found)[len(found) // 2]
        axes.plot([middle], [place], "|", color=_LINE, markersize=11, markeredgewidth=1.6)
        if place and labels[place - 1][0] != label[0]:
            axes.axhline(place - 0.5, color="#e2e8f0", linewidth=0.8)
    axes.axvline(1, color=_LINE, linewidth=1)
    axes.set_xscale("log")
    low, high = min(row["ratio"] for row in rows), max(row["ratio"] for row in rows)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low / 2 <= tick <= high * 2]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(labels)), [f"{op}  beside {peer}" for op, peer in labels])
    axes.invert_yaxis()
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlabel("how many times as fast kvops is: a point for each shape, a bar at the median")
    axes.set_title(f"Beside peers in the same run\n{_where(result)}", loc="left")
    return figure


def _roofline(result: Result) -> Any:
    """Each operator's cases under the roof that this device's measured peaks make."""
    setting = result["setting"]
    rows = [row for row in result["rows"] if row["contender"] == KVOPS and row["ms"] and row["flops"]]
    if not rows or "matrix_tflops" not in setting:
        return None
    plt = pyplot()
    peak, bandwidth = setting["matrix_tflops"], setting["copy_gbps"] / 1e3  # TB/s
    figure, axes = plt.subplots(figsize=(8.5, 4.8))
    intensity = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(*intensity, peak / bandwidth) / 3, max(*intensity, peak / bandwidth) * 3
    knee = peak / bandwidth
    axes.plot([low, knee, high], [low / knee, 1, 1], color=_LINE, linewidth=1.5)
    ops = list(dict.fromkeys(row["op"] for row in rows))
    markers, colors = "osD^vP*Xph", plt.get_cmap("tab10").colors
    for number, op in enumerate(ops):
        found = [row for row in rows if row["op"] == op]
        axes.plot(
            [row["flops"] / row["bytes"] for row in found],
            [row["tflops"] / peak for row in found],
            markers[number % len(markers)],
            color=colors[number % len(colors)],
            alpha=0.8,
            label=op,
            linestyle="none",
            markersize=6,
            markeredgewidth=0,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte that must be moved")
    axes.set_ylabel("share of the measured matrix peak")
    axes.legend(loc="lower right", fontsize=8)
    figures = f"matrix product {table.significant(peak)} TFLOP/s, copy {table.significant(bandwidth * 1e3)} GB/s"
    axes.set_title(f"Under the measured roofline: {figures}\n{_where(result)}", loc="left")
    return figure


def _growth(result: Result) -> Any:
    """Time and memory of each sweep on log-log axes, with the fitted slopes."""
    rows = result["rows"]
    if not rows:
        return None
    plt = pyplot()
    swept, fitted = growth.by_sweep(rows), growth.fits(rows)
    columns = 4
    lines = -(-len(swept) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(2.9 * columns, 2.5 * lines), squeeze=False)
    for axes in grid.flat[len(swept) :]:
        axes.set_visible(False)
    for axes, points, fit in zip(grid.flat, swept, fitted, strict=False):
        _panel(axes, points, fit)
    figure.suptitle(f"Growth, in multiples of the smallest size; {_where(result)}", x=0.01, ha="left", weight="bold")
    figure.tight_layout()
    return figure


def _panel(axes: Any, points: Sequence[Row], fit: growth.Fit) -> None:
    values = [row["value"] for row in points]
    for name, color, marker, found, text in (
        ("ms", _OURS, "o", fit.time, f"time {fit.time:.2f}, theory {fit.time_theory:g}"),
        ("memory_bytes", _THEIRS, "s", fit.memory, f"memory {fit.memory:.2f}"),
    ):
        measured = [max(row[name], 1) if name == "memory_bytes" else row[name] for row in points]
        relative = [one / measured[0] for one in measured]
        axes.plot(values, relative, marker, color=color, markersize=4.5, label=text)
        fitted = growth.fitted(values)
        last = relative[-1]
        axes.plot(fitted, [last * (value / values[-1]) ** found for value in fitted], color=color, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(values, [f"{value // 1024}k" if value % 1024 == 0 else str(value) for value in values])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    low, high = axes.get_ylim()
    axes.set_ylim(min(0.5, low), max(4, high))
    axes.set_title(f"{fit.sweep}: {fit.axis}", loc="left", fontsize=8.5)
    axes.legend(fontsize=7.5, loc="upper left", handlelength=1)
