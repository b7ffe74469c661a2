"""Results as pictures: how fast beside whom, how near to the roofline, how it grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import growth, table
from bench.drawing import LINE, OURS, THEIRS, pyplot, where
from bench.measure import KVOPS
from bench.quality import pictures
from bench.results import Result, Row
from bench.serving import pages
from kvops.cli import demo_plot


def draw(result: Result, stem: Path) -> list[Path]:
    """The pictures of one result file, named ``<stem>-<what>.png``; none for kinds without."""
    kinds = {
        "operators": (("speed", _speed), ("roofline", _roofline)),
        "growth": (("", _growth),),
        "demo": (("", _demo),),
        "serving": (("", pages.picture),),
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


def _speed(result: Result) -> Any:
    """A line for each operator and peer, a point for each case: how many times as fast kvops is."""
    rows = [row for row in result["rows"] if row["contender"] != KVOPS and row["ratio"]]
    if not rows:
        return None
    plt = pyplot()
    labels = list(dict.fromkeys((row["op"], row["contender"]) for row in rows))
    figure, axes = plt.subplots(figsize=(9, 0.25 * len(labels) + 1.2), layout="constrained")
    for place, label in enumerate(labels):
        ratios = [row["ratio"] for row in rows if (row["op"], row["contender"]) == label]
        axes.plot(ratios, [place] * len(ratios), "o", color=OURS, alpha=0.55, markersize=5, markeredgewidth=0)
        middle = sorted(ratios)[len(ratios) // 2]
        axes.plot([middle], [place], "|", color=LINE, markersize=11, markeredgewidth=1.6)
        if place and labels[place - 1][0] != label[0]:
            axes.axhline(place - 0.5, color="#e2e8f0", linewidth=0.8)
    axes.axvline(1, color=LINE, linewidth=1)
    axes.set_xscale("log")
    low, high = min(row["ratio"] for row in rows), max(row["ratio"] for row in rows)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low / 2 <= tick <= high * 2]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(labels)), [f"{op}  beside {peer}" for op, peer in labels])
    axes.invert_yaxis()
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlabel("kvops is this many times as fast (a point for each shape, a bar at the median)")
    axes.set_title(f"Speed beside peers in the same run\n{where(result)}", loc="left")
    return figure


def _roofline(result: Result) -> Any:
    """Each operator's cases under the roof that this device's measured peaks make."""
    setting = result["setting"]
    rows = [row for row in result["rows"] if row["contender"] == KVOPS and row["ms"] and row["flops"]]
    if not rows or "matrix_tflops" not in setting:
        return None
    plt = pyplot()
    peak, bandwidth = setting["matrix_tflops"], setting["copy_gbps"] / 1e3  # TB/s
    figure, axes = plt.subplots(figsize=(8.2, 5.2))
    intensity = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(*intensity, peak / bandwidth) / 3, max(*intensity, peak / bandwidth) * 3
    knee = peak / bandwidth
    axes.plot([low, knee, high], [low / knee, 1, 1], color=LINE, linewidth=1.5)
    ops = list(dict.fromkeys(row["op"] for row in rows))
    markers, colors = "osD^vP*Xph", plt.get_cmap("tab10").colors
    for number, op in enumerate(ops):
        points = [row for row in rows if row["op"] == op]
        axes.plot(
            [row["flops"] / row["bytes"] for row in points],
            [row["tflops"] / peak for row in points],
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
    axes.legend(loc="lower right", fontsize=9)
    figures = f"matrix product {table.significant(peak)} TFLOP/s, copy {table.significant(bandwidth * 1e3)} GB/s"
    axes.set_title(f"Roofline: {figures}\n{where(result)}", loc="left")
    axes.text(
        0.02,
        0.98,
        "The line is what one large matrix product and one large\ncopy reached when the run began. Work that stays in\n"
        "the caches, or meets a faster clock on a shared host,\nmay stand above it.",
        transform=axes.transAxes,
        va="top",
        fontsize=9,
        color=LINE,
    )
    axes.set_ylim(top=8)
    return figure


def _demo(result: Result) -> Any:
    """The picture that the demo itself draws; none of a record without the lengths of heads."""
    return demo_plot.draw(result) if "lengths" in result else None


def _growth(result: Result) -> Any:
    """Time and memory of each sweep on log-log axes, with the fitted slopes."""
    rows = result["rows"]
    if not rows:
        return None
    plt = pyplot()
    swept, fitted = growth.by_sweep(rows), growth.fits(rows)
    columns = 3
    lines = -(-len(swept) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(2.9 * columns, 2.6 * lines), squeeze=False)
    for axes in grid.flat[len(swept) :]:
        axes.set_visible(False)
    for axes, points, fit in zip(grid.flat, swept, fitted, strict=False):
        _panel(axes, points, fit)
    figure.suptitle(
        f"Growth, in multiples of the smallest size\n{where(result)}", x=0.01, ha="left", weight="bold", fontsize=10.5
    )
    figure.tight_layout()
    return figure


def _panel(axes: Any, points: Sequence[Row], fit: growth.Fit) -> None:
    values = [row["value"] for row in points]
    for name, color, marker, found, text in (
        ("ms", OURS, "o", fit.time, f"time {fit.time:.2f}, theory {fit.time_theory:g}"),
        ("memory_bytes", THEIRS, "s", fit.memory, f"memory {fit.memory:.2f}"),
    ):
        measured = [max(row[name], 1) if name == "memory_bytes" else row[name] for row in points]
        relative = [figure / measured[0] for figure in measured]
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
