"""docs/compression-study.md, from a quality result alone: every figure and every verdict in it is computed here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

from bench import table
from bench.quality.kept import Form, Kept, form_of, kept, label_of
from bench.quality.tasks import SIZES
from bench.results import Result
from kvops.generation.evaluate import AFTER, BEFORE, TEXT

GOALS = ((4, 0.95), (8, 0.90))
"""At that ratio the best policy should keep that share."""
BROKEN = 0.5

_NAMES = {TEXT: "text", BEFORE: "asked before", AFTER: "asked after"}

_HOW = """## How it is measured

The model reads a context into a full cache. A copy of the cache is compressed once (`Compression(ratio, policy)` with
its defaults: 4 first and 32 last tokens protected, blocks of 16), and decoding goes on from the copy. Quality is the
share of the full cache's quality that remains:

- **text**: a part of Python's manual and the {held_out} tokens that follow it. Perplexity (the full cache's over the
  compressed one's) and agreement (how often the most likely token is that of the full cache).
- **asked after**: facts hidden in the manual (contexts of {facts} tokens) and {digits} random digits. The questions
  come after eviction, so no policy can know them: single needles, several of one kind, key-value pairs, questions
  about a report, and the first {repeated} digits, to be repeated. The facts are evenly spread; the last one stands at
  the very end, which every policy keeps. An answer counts if greedy decoding gives all of it (each digit counts by
  itself).
- **asked before**: {before} of the questions about each context, at the end of the prompt that is compressed. Only
  the last token comes after eviction, so the full cache predicts no token of an answer. If a policy has the prompt
  recited, context and question are read one after the other, and each is recited right after it is read.

Only answers that the full cache gets right are counted. A task's share is the mean over its answers, a setting's the
mean over its tasks, and **overall** is the mean over the three settings. *Ragged* heads compete for blocks (of a
layer or of the whole sequence, as the policy says); *equal* heads of a layer all keep the same number of blocks.
Scores and budget are the same for both. Tasks have few answers (the last table counts them): one answer more or less
is several points, so small differences mean little. The defaults of standout were chosen on two of these contexts.
What by-heart adds to it was chosen on other contexts of the same kind, with other pages, facts and digits."""


def render(result: Result, source: Path, page: Path, pictures: Sequence[Path]) -> None:
    """Writes the page; ``source`` is the result's file."""
    study = kept(result)
    size = SIZES[result["setting"]["size"]]
    link = Path(os.path.relpath(source, page.parent)).as_posix()
    shown = {path.stem.rpartition("-")[2]: Path(os.path.relpath(path, page.parent)).as_posix() for path in pictures}
    lengths = " and ".join(str(length) for length, _ in size.facts)
    how = _HOW.format(
        held_out=size.held_out, facts=lengths, before=size.before, digits=size.digits, repeated=size.repeated
    )
    parts = [
        "# What compression keeps",
        f"`python -m bench report` makes this page from [`{source.name}`]({link}). `python -m bench quality --json "
        "FILE` measures; a run that was stopped continues. [Compression](compression.md) is the guide.",
        table.setting_text(result["setting"]),
        "## In short",
        "\n".join(f"- {line}" for line in summary(study)),
        how,
        "## What is kept, by policy",
        _picture(shown, "curves", "What is kept against compression"),
        "Overall, in % of the full cache. Bold: the best of a column; *: the form that a policy has by default.\n\n"
        f"{overall_table(study, 'pipe')}",
        *(_by_task(study, ratio) for ratio in (4, 8, 64) if ratio in study.ratios),
        "## What ragged heads gain",
        _picture(shown, "ragged", "Ragged against equal heads at the same number of blocks"),
        f"Percentage points that ragged heads keep beyond equal ones, at the same budget of blocks.\n\n{_gains(study)}",
        _picture(shown, "heads", "Tokens that every head keeps"),
        "## Longer and shorter contexts",
        f"Perplexity of the text that follows: the share kept, in %, default forms.\n\n{_contexts(study)}",
        "## Blocks and time",
        _memory(study),
        "## What the full cache knows",
        _answered(study),
    ]
    if study.left_out:
        parts.append(f"Not measured to the end, and left out of everything above: {', '.join(study.left_out)}.")
    page.parent.mkdir(parents=True, exist_ok=True)
    partial = page.with_name(page.name + ".partial")
    partial.write_text("\n\n".join(part for part in parts if part) + "\n")
    os.replace(partial, page)


def overall_table(study: Kept, style: str = "simple") -> str:
    """Overall, in % of the full cache; bold is the best of a column, * the form that a policy has by default."""
    best = {ratio: max(study.overall(form, ratio) for form in study.forms) for ratio in study.ratios}
    cells = []
    for form in sorted(study.forms):
        shares = [study.overall(form, ratio) for ratio in study.ratios]
        marked = [
            f"**{100 * share:.1f}**" if share == best[ratio] else f"{100 * share:.1f}"
            for ratio, share in zip(study.ratios, shares, strict=True)
        ]
        cells.append([form.policy, form.heads + ("*" if form in study.default else ""), *marked])
    return table.render(cells, ["policy", "heads", *(f"{ratio}x" for ratio in study.ratios)], style, left=2)


def summary(study: Kept) -> list[str]:
    """The verdicts: goals, winners, what ragged heads gain, where it breaks."""
    lines = []
    for ratio, goal in GOALS:
        if ratio in study.ratios:
            form, share = study.best(ratio)
            verdict = "met" if share >= goal else "**missed**"
            lines.append(f"{ratio}x smaller, {_name(form)} keeps {share:.1%}: the goal of {goal:.0%} is {verdict}.")
    for setting in study.settings:
        winners = ", ".join(
            f"{_name(form)} at {ratio}x ({share:.0%})"
            for ratio in study.ratios
            for form, share in [study.best(ratio, setting)]
        )
        lines.append(f"Best for {_NAMES[setting]}: {winners}.")
    return [*lines, *_reading(study), *_ragged_verdict(study), *_breaks(study)]


def _reading(study: Kept) -> list[str]:
    """What a recital costs: it is a second reading, of longer rows."""
    taken: dict[str, list[float]] = {}
    for row in study.rows:
        if row["setting"] == TEXT and "reading" in row:
            taken.setdefault(row["policy"], []).append(row["reading"])
    settings = "; ".join(
        f"{policy} {median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
        for policy, times in sorted(taken.items())
    )
    return [f"What a recital costs, reading a prompt with it as a multiple of reading it: {settings}."] if taken else []


def _ragged_verdict(study: Kept) -> list[str]:
    pairs = study.pairs()
    if not pairs:
        return []
    gains = {(policy, ratio): study.gain(policy, ratio) for policy in pairs for ratio in study.ratios}
    better = sum(gain > 0.005 for gain in gains.values())
    worse = sum(gain < -0.005 for gain in gains.values())
    average = mean(gains.values())
    verb = "gain" if average >= 0 else "lose"
    by_setting = ", ".join(
        f"{_NAMES[setting]} {_points(mean(study.gain(policy, ratio, setting) for policy, ratio in gains))}"
        for setting in study.settings
    )
    most, least = max(gains, key=lambda key: gains[key]), min(gains, key=lambda key: gains[key])
    beside = ", ".join(
        f"{study.best(ratio, ragged=True)[1]:.0%} beside {study.best(ratio, ragged=False)[1]:.0%} at {ratio}x"
        for ratio in study.ratios
    )
    return [
        f"The best policy with ragged heads beside the best with equal ones: {beside}.",
        f"At the same number of blocks, ragged heads {verb} {abs(100 * average):.1f} points on average over "
        f"{len(pairs)} policies and {len(study.ratios)} ratios, {by_setting}: better in {better} of {len(gains)}, "
        f"worse in {worse}, within half a point in {len(gains) - better - worse}.",
        f"The most they gain is {_points(gains[most])} ({most[0]} at {most[1]}x), the least {_points(gains[least])} "
        f"({least[0]} at {least[1]}x).",
    ]


def _breaks(study: Kept) -> list[str]:
    lines = []
    for setting in study.settings if len(study.ratios) > 1 else ():
        broken = next((ratio for ratio in study.ratios if study.best(ratio, setting)[1] < BROKEN), None)
        low, high = study.ratios[0], study.ratios[-1]
        end = f"from {study.best(low, setting)[1]:.0%} at {low}x to {study.best(high, setting)[1]:.0%} at {high}x"
        says = f"the best policy falls {end}"
        says += f" and below {BROKEN:.0%} at {broken}x" if broken else f" and never below {BROKEN:.0%}"
        lines.append(f"Where it breaks, {_NAMES[setting]}: {says}.")
    ratio = 8 if 8 in study.ratios else study.ratios[-1]
    form, _ = study.best(ratio)
    hardest = min(study.tasks, key=lambda task: study.shares[form, ratio, task])
    share = study.shares[form, ratio, hardest]
    lines.append(f"What {_name(form)}, the best overall at {ratio}x, keeps least of: {_task(hardest)} ({share:.0%}).")
    return lines


def _name(form: Form) -> str:
    return f"{form.policy} with {form.heads} heads"


def _task(task: Sequence[str]) -> str:
    return task[1] if task[0] == TEXT else f"{task[1]}, {_NAMES[task[0]]}"


def _points(gain: float) -> str:
    return f"{100 * gain:+.1f}"


def _picture(shown: dict[str, str], name: str, title: str) -> str:
    return f"![{title}]({shown[name]})" if name in shown else ""


def _by_task(study: Kept, ratio: int) -> str:
    best = {task: max(study.shares[form, ratio, task] for form in study.default) for task in study.tasks}
    cells = []
    for form in sorted(study.default):
        shares = [(study.shares[form, ratio, task], best[task]) for task in study.tasks]
        cells.append(
            [
                form.policy,
                *(f"**{100 * share:.0f}**" if share == top > 0 else f"{100 * share:.0f}" for share, top in shares),
            ]
        )
    text = f"### {ratio}x, task by task\n\nDefault forms, in % of the full cache."
    return f"{text}\n\n{table.render(cells, ['policy', *map(_task, study.tasks)], 'pipe')}"


def _gains(study: Kept) -> str:
    pairs = study.pairs()
    cells = [[policy, *(_points(study.gain(policy, ratio)) for ratio in study.ratios)] for policy in sorted(pairs)]
    cells.append(
        [
            "**mean**",
            *(_points(mean(study.gain(pair, ratio) for pair in pairs)) for ratio in study.ratios),
        ]
    )
    for setting in study.settings:
        means = [mean(study.gain(pair, ratio, setting) for pair in pairs) for ratio in study.ratios]
        cells.append([f"mean, {_NAMES[setting]}", *map(_points, means)])
    return table.render(cells, ["policy", *(f"{ratio}x" for ratio in study.ratios)], "pipe")


def _labels(study: Kept) -> list[str]:
    """Of the texts, from short to long."""
    return sorted(study.texts, key=lambda label: next(row["length"] for row in study.rows if label_of(row) == label))


def _contexts(study: Kept) -> str:
    ratios = [ratio for ratio in study.ratios if ratio <= 16]
    columns = [(label, ratio) for label in _labels(study) for ratio in ratios]
    cells = [
        [form.policy, *(f"{100 * study.texts[label][form, ratio]:.0f}" for label, ratio in columns)]
        for form in sorted(study.default)
    ]
    headers = ["policy", *(f"{label.removeprefix('text ')}, {ratio}x" for label, ratio in columns)]
    return table.render(cells, headers, "pipe")


def _memory(study: Kept) -> str:
    """Blocks in use and time of a step, median over policies (those that were timed), for every length of text."""
    texts = [row for row in study.rows if row["setting"] == TEXT]
    timed = [row for row in texts if "ms" in row]
    cells = []
    for label in _labels(study):
        for ratio in study.ratios:
            rows = [row for row in texts if label_of(row) == label and row["ratio"] == ratio]
            line = [label.removeprefix("text "), f"{ratio}x", str(rows[0]["full_blocks"])]
            for kind in (True, False):
                these = [row for row in rows if form_of(row).ragged == kind]
                blocks = median(row["blocks"] for row in these)
                line += [f"{blocks:.0f}", f"{rows[0]['full_blocks'] / blocks:.1f}x"]
                if timed:
                    gains = [row["full_ms"] / row["ms"] for row in these if "ms" in row]
                    line.append(f"{median(gains):.2f}" if gains else "–")
            cells.append(line)
    headers = ["context", "asked for", "full cache, blocks"]
    names = ("blocks", "smaller", "tokens/s") if timed else ("blocks", "smaller")
    headers += [f"{kind}: {name}" for kind in ("ragged", "equal") for name in names]
    text = (
        "Blocks in use right after eviction, medians over the policies. The protected tokens alone take 3 blocks "
        "of every list, so short contexts do not become 64 times smaller."
    )
    if timed:
        text += (
            " Tokens/s of decoding one sequence, as a multiple of the full cache's, whose steps were taken in turn; "
            f"measured with {', '.join(sorted({row['policy'] for row in timed}))}."
        )
    return f"{text}\n\n{table.render(cells, headers, 'pipe', left=2)}"


def _answered(study: Kept) -> str:
    failed = [_task(task) for task, (right, _) in study.answered.items() if not right]
    cells = [[_task(task), str(right), str(asked)] for task, (right, asked) in study.answered.items()]
    body = table.render(cells, ["task", "right", "asked"], "pipe")
    text = "Only answers that the full cache gets right are counted above."
    if failed:
        text += f" It fails {', '.join(failed)} altogether: compression is not judged by that."
    return f"{text}\n\n{body}"
