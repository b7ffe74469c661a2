"""Results as tables, for the terminal and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from bench.measure import KVOPS
from bench.results import Row


def render(cells: Sequence[Sequence[str]], headers: Sequence[str], style: str, left: int = 1) -> str:
    """The first ``left`` columns to the left, figures to the right."""
    from tabulate import tabulate

    align = ["left" if column < left else "right" for column in range(len(headers))]
    return tabulate(cells, headers=headers, tablefmt=style, disable_numparse=True, colalign=align)


def shape_text(row: Row) -> str:
    """``Llama-3.1-8B, batch 1, tokens 1024, causal``"""
    parts = [f"{key} {value}" if isinstance(value, int) else str(value) for key, value in row["shape"].items()]
    return ", ".join([row["model"], *parts])


def significant(value: float | None, digits: int = 3) -> str:
    """``digits`` significant ones and no exponent."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def ratio_cell(row: Row | None) -> str:
    """How many times as fast kvops is, and half the distance from the 20th to the 80th percentile."""
    if row is None:
        return ""
    if row["ratio"] is not None:
        return f"{row['ratio']:.2f} ± {(row['p80_ratio'] - row['p20_ratio']) / 2:.2f}"
    if row["ms"] is not None:
        return "no ratio"
    return "wrong" if row["note"].startswith("wrong") else "–"


def by_operator(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    return [(op, list(found)) for op, found in groupby(rows, key=lambda row: row["op"])]


def operator_table(rows: Sequence[Row], style: str, *, times: bool) -> str:
    """The table of an operator: a line for each case, a column for each peer that ran, and the reasons of the others
    below.

    ``times``: milliseconds, TFLOP/s and GB/s too; on a CPU only ratios carry over to another machine.
    """
    peers = list(dict.fromkeys(row["contender"] for row in rows if row["contender"] != KVOPS))
    shown = [name for name in peers if any(row["ms"] is not None for row in rows if row["contender"] == name)]
    lines = []
    for _, own_rows in groupby(rows, key=lambda row: row["case"]):
        contenders = {row["contender"]: row for row in own_rows}
        ours = contenders[KVOPS]
        line = [shape_text(ours)]
        if times:
            spread = "" if ours["ms"] is None else f" ± {significant((ours['p80_ms'] - ours['p20_ms']) / 2, 2)}"
            line += [significant(ours["ms"], 4) + spread, significant(ours["tflops"]), significant(ours["gbps"])]
        share = ours["of_roofline"]
        line.append(ours["note"] if share is None else f"{share:.0%}")
        lines.append([*line, *(ratio_cell(contenders.get(name)) for name in shown)])
    headers = ["shape", *(["ms", "TFLOP/s", "GB/s"] if times else []), "of roofline", *(f"× {name}" for name in shown)]
    text = render(lines, headers, style)
    notes = remarks(rows)
    return text + ("\n\n" + "\n".join(f"- {note}" for note in notes) if notes else "")


def remarks(rows: Sequence[Row]) -> list[str]:
    """The reasons why contenders have no figure, each once, with its cases unless it holds for all."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    reasons: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["note"]:
            reasons.setdefault((row["note"], row["contender"]), []).append(row)
    merged: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (note, contender), found in reasons.items():
        where = () if len(found) == len(cases) else tuple(shape_text(row) for row in found)
        merged.setdefault((note, where), []).append(contender)
    lines = []
    for (note, where), contenders in merged.items():
        places = "" if not where else f" ({where[0]})" if len(where) == 1 else f" ({len(where)} of {len(cases)} shapes)"
        lines.append(f"{', '.join(contenders)}: {note}{places}")
    return lines


def setting_text(setting: Mapping[str, Any]) -> str:
    """The setting in one line, without device and torch, which are in ``runs``."""
    known = {"device", "torch"} if "runs" in setting else set()
    facts = {name: value for name, value in setting.items() if value is not None and name not in known}
    return ", ".join(
        f"{name.replace('_', ' ')}: {significant(value) if isinstance(value, float) else value}"
        for name, value in facts.items()
    )
