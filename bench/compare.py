"""Compares two result files of operators: figures that became worse by more than a margin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench import table
from bench.measure import KVOPS
from bench.results import Result, Row


@dataclass(frozen=True)
class Change:
    """One figure in both: the ratio to a peer, or on the same GPU kvops' own time. Above 1 is better."""

    case: str
    what: str
    before: float
    after: float
    change: float
    """The ratio to the earlier figure; above 1 is better."""
    at_best: float
    """The same with the better end (20th or 80th percentile) of the second run, to allow for noise."""


def changes(before: Result, after: Result) -> Iterator[Change]:
    earlier = {(row["case"], row["contender"]): row for row in before["rows"]}
    same_gpu = before["setting"].get("device") == after["setting"].get("device") and "cuda" in after["setting"]
    for row in after["rows"]:
        old = earlier.get((row["case"], row["contender"]))
        if old is None or old["ms"] is None or row["ms"] is None:
            continue
        if row["contender"] != KVOPS and old["ratio"] and row["ratio"]:
            change, best = row["ratio"] / old["ratio"], row["p80_ratio"] / old["ratio"]
            yield Change(row["case"], f"× {row['contender']}", old["ratio"], row["ratio"], change, best)
        elif row["contender"] == KVOPS and same_gpu:
            yield Change(row["case"], "ms", old["ms"], row["ms"], old["ms"] / row["ms"], old["ms"] / row["p20_ms"])


def lost(before: Result, after: Result) -> list[Row]:
    """Rows of kvops that had a time before and failed now."""
    had = {row["case"] for row in before["rows"] if row["contender"] == KVOPS and row["ms"] is not None}
    return [row for row in after["rows"] if row["contender"] == KVOPS and row["ms"] is None and row["case"] in had]


def report(before: Result, after: Result, margin: float) -> tuple[str, bool]:
    """(text, whether anything is worse than the margin). Raises ValueError if there is nothing to compare."""
    ordered = sorted(changes(before, after), key=lambda change: change.change)
    failed = lost(before, after)
    if not ordered and not failed:
        raise ValueError("the two files: expected cases with times in both, got none; same --scale and --dtype?")
    worse = [change for change in ordered if change.at_best < 1 - margin]
    beyond = [change for change in ordered if change in worse or change.change > 1 + margin]
    cells = []
    for entry in beyond:
        figures = (table.significant(entry.before), table.significant(entry.after), f"{entry.change:.2f}")
        cells.append([entry.case, entry.what, *figures, "worse" if entry in worse else ""])
    lines = (
        [table.render(cells, ["case", "figure", "before", "after", "change", ""], "simple", left=2)] if cells else []
    )
    lines += [f"no longer runs: {row['case']}: {row['note']}" for row in failed]
    settings = [f"{name}: {result['setting'].get('runs')}" for name, result in (("before", before), ("after", after))]
    lines += [*settings, f"{len(ordered)} figures compared, {len(worse)} worse than {margin:.0%}, {len(failed)} lost"]
    return "\n".join(lines), bool(worse or failed)
