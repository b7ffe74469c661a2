"""Pictures of a quality result: what is kept, what ragged heads gain, and how long every head's list is."""

from __future__ import annotations

from typing import Any

import numpy

from bench.plots import pyplot
from bench.quality.kept import Form, form_of, kept, label_of
from bench.quality.tasks import AFTER, BEFORE, MAP_RATIO, TEXT
from bench.results import Result

TITLES = {TEXT: "text that follows", BEFORE: "questions read before eviction", AFTER: "questions asked after eviction"}


def curves(result: Result) -> Any:
    """A panel overall and one for each setting, a line for each policy in its default form."""
    found, plt = kept(result), pyplot()
    shown = (None, *found.settings)
    figure, grid = plt.subplots(1, len(shown), figsize=(3.75 * len(shown), 4), sharey=True, layout="constrained")
    forms = [form for form in found.forms if form in found.default]
    colors = plt.get_cmap("tab20").colors
    for axes, setting in zip(grid, shown, strict=True):
        for number, form in enumerate(forms):
            shares = [100 * found.of(form, ratio, setting) for ratio in found.ratios]
            style = "o-" if form.ragged else "s--"
            label = f"{form.policy}, {form.heads}"
            axes.plot(found.ratios, shares, style, color=colors[number % 20], label=label, markersize=4, linewidth=1.3)
        axes.axhline(100, color="#334155", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(found.ratios, [f"{ratio}x" for ratio in found.ratios])
        axes.minorticks_off()
        axes.set_title(TITLES.get(setting or "", "overall"), loc="left")
        axes.set_xlabel("compression asked for")
    grid[0].set_ylabel("% of the full cache's quality")
    grid[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    return figure


def ragged(result: Result) -> Any:
    """Equal heads to the right, ragged ones upwards: a point above the diagonal is a gain."""
    found, plt = kept(result), pyplot()
    shown = (None, *found.settings)
    figure, grid = plt.subplots(1, len(shown), figsize=(3.75 * len(shown), 4), layout="constrained")
    colors = plt.get_cmap("viridis")(numpy.linspace(0, 0.92, len(found.ratios)))
    for axes, setting in zip(grid, shown, strict=True):
        for color, ratio in zip(colors, found.ratios, strict=True):
            points = [
                [100 * found.of(Form(policy, kind), ratio, setting) for kind in (False, True)]
                for policy in found.pairs()
            ]
            axes.plot(*zip(*points, strict=True), "o", color=color, label=f"{ratio}x", alpha=0.8, markeredgewidth=0)
        axes.axline((0, 0), slope=1, color="#334155", linewidth=0.8)
        axes.set_title(TITLES.get(setting or "", "overall"), loc="left")
        axes.set_xlabel("kept with equal heads, %")
    grid[0].set_ylabel("kept with ragged heads, %")
    grid[0].legend(loc="upper left")
    return figure


def heads(result: Result) -> Any:
    """The length of every head's list on the first text that counts, for every policy with ragged heads."""
    found = kept(result)
    maps = {
        form_of(row).policy: row["lengths"]
        for row in reversed(found.rows)
        if "lengths" in row and form_of(row).ragged and label_of(row) == found.main
    }
    if not maps:
        return None
    figure, grid = pyplot().subplots(1, len(maps), figsize=(1.35 * len(maps) + 1, 5), sharey=True, layout="constrained")
    # Four times the mean, so that the longest lists do not leave all others in the dark.
    most = 4 * numpy.mean(list(maps.values()))
    for axes, policy in zip(numpy.atleast_1d(grid), sorted(maps), strict=True):
        image = axes.imshow(maps[policy], aspect="auto", cmap="viridis", vmin=0, vmax=most)
        axes.set_title(policy.replace("-", "\n", 1), fontsize=8)
        axes.set_xticks(range(len(maps[policy][0])))
        axes.set_xlabel("KV head", fontsize=8)
    numpy.atleast_1d(grid)[0].set_ylabel("layer")
    figure.colorbar(image, ax=grid, label=f"tokens kept at {MAP_RATIO}x", extend="max")
    return figure
