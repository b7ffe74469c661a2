"""Pictures of a quality result: what is kept, what ragged heads gain, and how long every head's list is."""

from __future__ import annotations

from statistics import mean
from typing import Any

import numpy

from bench.drawing import FAINT, LINE, PALETTE, pyplot
from bench.quality.kept import Form, Kept, form_of, kept, label_of
from bench.quality.tasks import MAP_RATIO
from bench.results import Result
from kvops.cli.evaluate_plot import label_ends
from kvops.generation.evaluate import AFTER, BEFORE, TEXT

TITLES = {TEXT: "Text that follows", BEFORE: "Questions read before eviction", AFTER: "Questions asked after eviction"}


def curves(result: Result) -> Any:
    """A panel overall and one for each setting. The best policies overall are named and coloured, the others grey."""
    answers, plt = kept(result), pyplot()
    shown = (None, *answers.settings)
    figure, grid = _panels(plt, len(shown), sharey=True)
    forms = [form for form in answers.forms if form in answers.default]
    forms.sort(key=lambda form: mean(answers.overall(form, ratio) for ratio in answers.ratios), reverse=True)
    named, others = forms[: len(PALETTE)], forms[len(PALETTE) :]
    for axes, setting in zip(grid, shown, strict=True):
        for form in others:
            axes.plot(answers.ratios, _percent(answers, form, setting), color=FAINT, linewidth=1)
        ends = []
        for form, color in zip(named, PALETTE, strict=False):
            shares = _percent(answers, form, setting)
            style = "o-" if form.ragged else "s--"
            axes.plot(answers.ratios, shares, style, color=color, markersize=4, linewidth=1.5)
            ends.append((shares[-1], form.policy + ("" if form.ragged else ", equal heads"), color))
        label_ends(axes, answers.ratios[-1], ends)
        axes.axhline(100, color=LINE, linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(answers.ratios, [f"{ratio}x" for ratio in answers.ratios])
        axes.set_xlim(answers.ratios[0] / 1.15, answers.ratios[-1] * 3.8)
        axes.set_ylim(0, 107)
        axes.minorticks_off()
        axes.set_title(TITLES.get(setting or "", "Overall: the mean of the others"), loc="left")
    for axes in grid[::2]:
        axes.set_ylabel("% of the full cache's quality")
    for axes in grid[-2:]:
        axes.set_xlabel("compression asked for")
    figure.suptitle(
        f"Grey: the other {len(others)} policies" if others else "", fontsize=9, color=LINE, x=0.99, ha="right"
    )
    return figure


def ragged(result: Result) -> Any:
    """Equal heads to the right, ragged ones upwards: a point above the diagonal is a gain."""
    study, plt = kept(result), pyplot()
    shown = (None, *study.settings)
    figure, grid = _panels(plt, len(shown), sharey=True, sharex=True)
    colors = plt.get_cmap("viridis")(numpy.linspace(0, 0.92, len(study.ratios)))
    for axes, setting in zip(grid, shown, strict=True):
        for color, ratio in zip(colors, study.ratios, strict=True):
            points = [
                [100 * study.of(Form(policy, kind), ratio, setting) for kind in (False, True)]
                for policy in study.pairs()
            ]
            axes.plot(*zip(*points, strict=True), "o", color=color, label=f"{ratio}x", alpha=0.8, markeredgewidth=0)
        axes.axline((0, 0), slope=1, color=LINE, linewidth=0.8)
        axes.set_title(TITLES.get(setting or "", "Overall: the mean of the others"), loc="left")
    for axes in grid[-2:]:
        axes.set_xlabel("kept with equal heads, %")
    for axes in grid[::2]:
        axes.set_ylabel("kept with ragged heads, %")
    grid[0].legend(loc="upper left", title="a point for each policy", title_fontsize=9, fontsize=9)
    return figure


def heads(result: Result) -> Any:
    """The length of every head's list on the first text that counts, for every policy with ragged heads."""
    study = kept(result)
    maps = {
        form_of(row).policy: row["lengths"]
        for row in reversed(study.rows)
        if "lengths" in row and form_of(row).ragged and label_of(row) == study.main
    }
    if not maps:
        return None
    lines = -(-len(maps) // 5)
    columns = -(-len(maps) // lines)
    figure, grid = pyplot().subplots(
        lines, columns, figsize=(8.2, 4.0 * lines), sharey=True, squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(maps) :]:
        axes.set_visible(False)
    # Four times the mean, so that the longest lists do not leave all others in the dark.
    most = 4 * numpy.mean(list(maps.values()))
    for axes, policy in zip(grid.flat, sorted(maps), strict=False):
        image = axes.imshow(maps[policy], aspect="auto", cmap="viridis", vmin=0, vmax=most)
        axes.set_title(policy, fontsize=10)
        axes.set_xticks(range(len(maps[policy][0])))
    for axes in grid[:, 0]:
        axes.set_ylabel("layer")
    for axes in grid[-1]:
        axes.set_xlabel("KV head")
    label = f"tokens that the head keeps at {MAP_RATIO}x"
    figure.colorbar(image, ax=grid, label=label, extend="max", location="bottom", aspect=50, pad=0.02)
    return figure


def _panels(plt: Any, count: int, **options: Any) -> tuple[Any, list[Any]]:
    """Two panels to a line; a single one has the line to itself."""
    lines = -(-count // 2)
    figure, grid = plt.subplots(
        lines, min(count, 2), figsize=(8.2, 3.7 * lines), squeeze=False, layout="constrained", **options
    )
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:count])


def _percent(study: Kept, form: Form, setting: str | None) -> list[float]:
    return [100 * study.of(form, ratio, setting) for ratio in study.ratios]
