"""BENCHMARKS.md, docs/compression-study.md and their pictures, made from the committed results alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import counted, growth, plots, results, table
from bench.measure import KVOPS
from bench.quality import study
from bench.quality.kept import kept
from bench.results import Result, Row
from bench.serving import pages

STUDY = Path("docs") / "compression-study.md"

_HEAD = """# Benchmarks

`python -m bench report` makes this page from the result files under `bench/results`. `make bench` measures again;
`python -m bench --help` lists what else there is.

- Each contender's output is compared with float64 in the same run before it is timed. Its error may be at most twice
  that of plain torch in the tested precision, plus one rounding; integers must be equal. Contenders with wrong output
  are not timed; the table says why.
- Contenders take turns, in a random order in every round. A ratio is the median over the rounds, ± half the distance
  from the 20th to the 80th percentile. Inputs are random and made outside the timing.
- On a GPU: CUDA events, the L2 cache flushed before every call, warm clocks, calls below 0.2 ms as replays of a
  graph. On a CPU: fixed threads, caches as the call before left them (mostly another contender's), and ratios
  only, because only ratios carry over to another machine.
- **× PEER** is how many times as fast kvops is: above 1 kvops is faster, below 1 the peer is. **of roofline** is the
  least time that the measured copy bandwidth and matrix peak allow, over kvops' time: on a GPU those of the run, on a
  CPU the medians just before and after each case, as what a shared host gives changes from minute to minute. Inputs
  that fit into a CPU's caches can exceed 100 %.
"""


def render(folder: Path, page: Path) -> list[Path]:
    """Writes ``page``, the pictures beside the results and, where there is a result of that kind, the study of quality
    (``docs/compression-study.md`` beside ``page``); returns what was written. ValueError without any result."""
    devices = [path for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    sections, written = [], [page]
    for device in devices:
        files = list(results.under(device))
        if not files:
            continue
        parts = [f"## {device.name}"]
        for kind, group in _by_kind(files).items():
            paths = [path for path, _ in group]
            result = _joined([result for _, result in group])
            pictures = plots.draw(result, device / kind)
            written += pictures
            if kind == "quality" and page.parent / STUDY not in written:
                study.render(result, paths[0], page.parent / STUDY, pictures)
                written.append(page.parent / STUDY)
            pictures = pictures or [path.with_suffix(".png") for path in paths if path.with_suffix(".png").exists()]
            parts.append(_section(kind, result, paths, pictures, page.parent))
        sections.append("\n\n".join(parts))
    if not sections:
        raise ValueError(f"{folder}: expected result files in folders named after devices, got none; first: make bench")
    partial = page.with_name(page.name + ".partial")
    partial.write_text(_HEAD + "\n" + "\n\n".join(sections) + "\n")
    os.replace(partial, page)
    return written


def _by_kind(found: Sequence[tuple[Path, Result]]) -> dict[str, list[tuple[Path, Result]]]:
    """Files of the same kind, such as a GPU run's one for each operator, make one section; others one each."""
    kinds: dict[str, list[tuple[Path, Result]]] = {}
    for path, result in found:
        kinds.setdefault(result.get("kind") or path.stem, []).append((path, result))
    first = [kind for kind in ("operators", "growth", "generate", "steps", "throughput") if kind in kinds]
    return {kind: kinds[kind] for kind in [*first, *sorted(set(kinds) - set(first))]}


def _joined(group: Sequence[Result]) -> Result:
    return dict(group[0]) | {"rows": [row for result in group for row in result["rows"]]}


def _section(kind: str, result: Result, paths: Sequence[Path], pictures: Sequence[Path], root: Path) -> str:
    titles = {
        "operators": "Operators",
        "growth": "Growth",
        "generate": "Generation",
        "steps": "Decoding steps",
        "throughput": "Serving",
        "quality": "What compression keeps",
        "serving": "Serving in vLLM",
        "answers": "Answers in vLLM",
        "soak": "A soak in vLLM",
        "ring": "Context parallelism",
        "counted": "Counted work",
    }
    title = titles.get(kind, kind.replace("_", " ").replace("-", " ").capitalize())
    sources = ", ".join(f"[`{path.name}`]({_link(path, root)})" for path in paths[:1])
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    body: dict[str, Callable[[Result], str]] = {
        "operators": _operators,
        "growth": _growth,
        "throughput": _serving,
        "quality": _quality,
        "demo": _demo,
        "serving": pages.serving,
        "answers": pages.answers,
        "soak": pages.soak,
        "counted": counted.pages,
    }
    if kind.startswith("gpu-"):
        title, body[kind] = f"GPU run: {kind.removeprefix('gpu-')}", _gpu_phase
    parts = [f"### {title}", f"{table.setting_text(result['setting'])} ({sources}{more})"]
    parts += [f"![{title}: {path.stem}]({_link(path, root)})" for path in pictures]
    return "\n\n".join([*parts, body.get(kind, _generic)(result)])


def _link(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def _operators(result: Result) -> str:
    times = "cuda" in result["setting"]
    parts = [
        f"#### {op}\n\n{table.operator_table(rows, 'pipe', times=times)}"
        for op, rows in table.by_operator(result["rows"])
    ]
    return "\n\n".join([_summary(result["rows"]), *parts])


def _summary(rows: Sequence[Row]) -> str:
    """A line for each operator: how many shapes, and the median ratio to each peer that ran."""
    lines = []
    for op, own_rows in table.by_operator(rows):
        ratios: dict[str, list[float]] = {}
        for row in own_rows:
            if row["contender"] != KVOPS and row["ratio"]:
                ratios.setdefault(row["contender"], []).append(row["ratio"])
        shapes = len({row["case"] for row in own_rows})
        middle = ", ".join(f"{sorted(many)[len(many) // 2]:.2f} × {peer}" for peer, many in ratios.items())
        lines.append([f"`{op}`", middle, str(shapes)])
    headers = ["operator", "median over the shapes: how many times as fast kvops is", "shapes"]
    return table.render(lines, headers, "pipe", left=2)


def growth_table(rows: Sequence[Row], style: str) -> str:
    cells = []
    for fit, points in zip(growth.fits(rows), growth.by_sweep(rows), strict=True):
        span = f"{fit.axis} {points[0]['value']} to {points[-1]['value']}"
        memory = "" if fit.memory_theory is None else f"at most {fit.memory_theory:g}"
        verdict = "as theory" if fit.as_theory else "**not as theory**"
        slopes = f"{fit.time:.2f}", f"{fit.time_theory:g}", f"{fit.memory:.2f}", memory
        cells.append([fit.sweep, fit.op, span, *slopes, verdict])
    headers = ["what", "operator", "from, to", "time grows with", "theory", "memory of the call", "theory", ""]
    return table.render(cells, headers, style, left=3)


def _growth(result: Result) -> str:
    text = (
        "Powers are fitted to the upper half of each series. Memory is what one call allocates beyond its inputs, "
        f"outputs included. A power within {growth.TOLERANCE} of theory counts as equal."
    )
    return f"{text}\n\n{growth_table(result['rows'], 'pipe')}"


def _quality(result: Result) -> str:
    lines = "\n".join(f"- {line}" for line in study.summary(kept(result)))
    return f"{lines}\n\nThe whole study: [`{STUDY.as_posix()}`]({STUDY.as_posix()})."


def _demo(result: Result) -> str:
    """Sizes and quality; of the seconds that the demo also notes, Generation has better ones."""
    rows = [{name: value for name, value in row.items() if "second" not in name} for row in result["rows"]]
    return f"Speeds are under Generation, measured beside transformers.\n\n{_generic({'rows': rows})}"


def _serving(result: Result) -> str:
    from bench import throughput

    first = result["rows"][0]
    text = (
        f"Simulated: {first['tokens_in']} tokens in and {first['tokens_out']} out for each request, random weights, "
        "drafts accepted at random; `python -m bench.throughput --help` says what is measured and what is computed. "
        "The multiples are over the uncompressed cache (1x), drafts off, with the same kind of batch. Published: "
        "KV-Compress (Rehg 2024) over vLLM, Llama-3.1-8B."
    )
    return f"{text}\n\n{throughput.table(result['rows'], 'pipe')}"


def _gpu_phase(result: Result) -> str:
    """A line for each process, then the failures."""
    units = [row for row in result["rows"] if "status" in row]
    names = ["unit", "status", "passed", "failed", "skipped"]
    lines = [table.render([[str(row[name]) for name in names] for row in units], names, "pipe", left=2)]
    failed = [row for row in result["rows"] if row.get("outcome") == "failed"]
    return "\n\n".join([*lines, *(["\n".join(f"- {row['name']}: {row['note']}" for row in failed)] if failed else [])])


def _generic(result: Result) -> str:
    """The columns of flat rows that differ; equal ones are listed above the table."""
    rows = [row for row in result["rows"] if isinstance(row, dict)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    same = (
        {}
        if len(rows) < 2
        else {name: rows[0].get(name) for name in names if all(row.get(name) == rows[0].get(name) for row in rows)}
    )
    shown = [name for name in names if name not in same]
    cells = [[_cell(row.get(name)) for name in shown] for row in rows]
    left = next((place for place, name in enumerate(shown) if not isinstance(rows[0].get(name), str)), len(shown))
    text = ", ".join(f"{name.replace('_', ' ')}: {_cell(value)}" for name, value in same.items())
    body = table.render(cells, [name.replace("_", " ") for name in shown], "pipe", left=left) if rows else "No rows."
    return f"{text}\n\n{body}" if text else body


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "" if value is None else ("yes" if value else "no")
    if isinstance(value, float):
        return table.significant(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return str(value).replace("|", "\\|").replace("\n", " ")
