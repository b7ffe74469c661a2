"""The picture of a demo run, drawn from the record that ``python -m kvops demo --json`` writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvops.extras import require


def draw(record: Mapping[str, Any]) -> Any:
    """A matplotlib figure: left, the share of the document's tokens that every head keeps, on one colour scale for all
    ratios; right, the share of the answer that is kept, and below it the perplexity of the text that follows.
    """
    require("matplotlib").use("Agg")
    pyplot, colors = require("matplotlib.pyplot"), require("matplotlib.colors")

    lengths = {int(ratio): heads for ratio, heads in record["lengths"].items()}
    document = record["size"]["document"]
    figure = pyplot.figure(figsize=(2.0 * len(lengths) + 4.8, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[2.0 * len(lengths), 4.8])
    maps = left.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    # Square roots: most heads keep a small share, and a few keep nearly everything.
    scale = colors.PowerNorm(0.5, vmin=0, vmax=100)
    for axes, (ratio, heads) in zip(maps, lengths.items(), strict=True):
        shares = [[100 * tokens / document for tokens in layer] for layer in heads]
        image = axes.imshow(shares, aspect="auto", cmap="viridis", norm=scale)
        axes.set(title=f"{ratio}x smaller", xlabel="KV head", xticks=range(len(shares[0])))
    maps[0].set_ylabel("layer")
    bar = left.colorbar(image, ax=maps, location="bottom", aspect=40, label="tokens that the head keeps, %")
    bar.set_ticks([0, 5, 10, 25, 50, 100])

    answer, text = right.subplots(2, 1, sharex=True)
    plain = [row for row in record["rows"] if not row["drafts"]]
    ratios = [row["compression"] for row in plain]
    for axes, values, form, title in (
        (
            answer,
            [100 * row["answer_kept"] for row in plain],
            "{:.0f}%",
            "Answer: tokens predicted as by the full cache",
        ),
        (text, [row["perplexity"] for row in plain], "{:.1f}", "Text that follows: perplexity"),
    ):
        axes.plot(ratios, values, "o-", color="#c2410c")
        for ratio, value in zip(ratios, values, strict=True):
            axes.annotate(
                form.format(value), (ratio, value), (0, 7), textcoords="offset points", ha="center", fontsize=9
            )
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylim(0, 1.25 * max(values))
        axes.set_xscale("log", base=2)
        axes.set_xticks(ratios, ["full" if ratio == 1 else f"{ratio:g}x" for ratio in ratios])
        axes.margins(x=0.08)
        axes.spines[["top", "right"]].set_visible(False)
    answer.set_yticks([0, 25, 50, 75, 100])
    text.set_xlabel("how many times smaller the cache is")
    figure.suptitle(
        f"{record['model']}, a document of {document:,} tokens, policy {record['policy']}", fontsize=11, weight="bold"
    )
    return figure
