"""The sections of BENCHMARKS.md and the picture about vLLM, from result files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import table
from bench.drawing import PALETTE, THEIRS, pyplot
from bench.results import Result, Row

OWN = "vLLM's own"


def serving(result: Result) -> str:
    """Both workloads, an engine on each line, and what it is to vLLM's own."""
    parts = [
        f"The same requests and the same pool of {result['setting']['pages']} pages for every engine. `arrivals` are "
        f"{result['setting']['requests']} requests of a Poisson process, some of which ask the questions of "
        "`examples/questions.jsonl`; `burst` is eight prompts of 520 to 555 tokens at once. An answer is kept if "
        "vLLM's own backend gives it too. 1x is kvops without compression."
    ]
    for workload, rows in _by_workload(result["rows"]).items():
        own = next(row for row in rows if row["engine"] == OWN)
        cells = [
            [
                row["engine"],
                f"{row['mean_at_once']:.2f} ({row['most_at_once']})",
                f"{row['steps']}",
                f"{own['steps'] / row['steps']:.2f}",
                table.significant(row["tokens_per_second"]),
                f"{row['tokens_per_second'] / own['tokens_per_second']:.2f}",
                table.significant(row["first_token_seconds"]),
                f"{row['preemptions']}",
                f"{kept(row, own)} of {len(own['right'])}" if own["questions"] else "",
            ]
            for row in rows
        ]
        headers = [workload, "at once: mean (most)", "steps", "fewer", "tokens/s", "times own", "s to first token"]
        parts.append(table.render(cells, [*headers, "preemptions", "answers kept"], "pipe", left=1))
    return "\n\n".join(parts)


def answers(result: Result) -> str:
    """What both engines answer right, each pair on a line."""
    text = (
        "Right answers among those that vLLM gives with the whole cache. Both engines read the same chunks (`context`: "
        "the context, then the question), compress after each of them by the same policy, and hold as many blocks. "
        "`smaller` is the size of the whole cache over the size when the answer begins, context and question together. "
        "`same tokens` counts the answers, right or wrong, that are the same token by token."
    )
    pairs: dict[tuple[float, Any], dict[str, Row]] = {}
    for row in result["rows"]:
        pairs.setdefault((row["ratio"], row["chunks"]), {})[row["engine"]] = row
    cells = [
        [
            f"{ratio:g}x",
            str(chunks),
            f"{pair['vLLM']['smaller']:.1f}x",
            *(f"{len(pair[engine]['right'])} of {pair[engine]['asked']}" for engine in ("our loop", "vLLM")),
            f"{sum(pair['our loop']['tokens'][name] == got for name, got in pair['vLLM']['tokens'].items())}",
        ]
        for (ratio, chunks), pair in pairs.items()
        if len(pair) == 2
    ]
    headers = ["asked for", "chunks", "smaller", "our loop", "vLLM", "same tokens"]
    return f"{text}\n\n{table.render(cells, headers, 'pipe', left=2)}"


def soak(result: Result) -> str:
    """The sums, and a line for each round."""
    rows = result["rows"]
    sums = {name: sum(row[name] for row in rows) for name in ("requests", "aborted", "preemptions", "steps", "checks")}
    text = (
        f"{sums['requests']} random requests, with prompts of up to {max(row['longest'] for row in rows)} tokens, in "
        f"pools of {min(row['pages'] for row in rows)} to {max(row['pages'] for row in rows)} pages. "
        f"Requests that were aborted: {sums['aborted']}; preemptions: {sums['preemptions']}. After each of "
        f"{sums['steps']:,} steps every page was free or held by one request. At the end every request that was not "
        "aborted had all its tokens, and every page was free. Attention was compared with dense attention in float32 "
        f"over the kept tokens {sums['checks']:,} times (layers x KV heads x requests x steps); the largest difference "
        f"is {max(row['worst_difference'] for row in rows):.1e}."
    )
    names = ["seed", "ratio", "policy", "pages", "page_size", "max_num_batched_tokens", "requests", "aborted"]
    names += ["preemptions", "pages_freed_early", "checks"]
    cells = [[str(row[name]) for name in names] for row in rows]
    return f"{text}\n\n{table.render(cells, [name.replace('_', ' ') for name in names], 'pipe', left=0)}"


def kept(row: Row, own: Row) -> int:
    """How many of the answers of ``own`` the engine of ``row`` gives too."""
    return len(set(row["right"]) & set(own["right"]))


def picture(result: Result) -> Any:
    """Requests that run in every step of the arrivals, and speed, waiting and answers of every engine."""
    rows = _by_workload(result["rows"]).get("arrivals", [])
    own = next((row for row in rows if row["engine"] == OWN), None)
    if own is None:
        return None
    colours = {row["engine"]: PALETTE[place] for place, row in enumerate(rows)} | {OWN: THEIRS}
    shape = {"width_ratios": [2.4, 1, 1, 1]}
    figure, (steps, *bars) = pyplot().subplots(1, 4, figsize=(12, 3.2), gridspec_kw=shape, layout="constrained")
    for row in rows:
        width = 3.5 if row is own else 1.5  # kvops at 1x takes the same steps and lies on it
        steps.step(
            range(len(row["running"])), row["running"], color=colours[row["engine"]], label=row["engine"], lw=width
        )
    steps.set(xlabel="step of the engine", ylim=(0, None), xlim=(0, None))
    steps.set_title("Requests at once", loc="left")
    steps.legend(fontsize=8, ncols=2)
    panels = {
        "Tokens/s": [row["tokens_per_second"] for row in rows],
        "First token, s": [row["first_token_seconds"] for row in rows],
        "Answers kept": [kept(row, own) for row in rows],
    }
    for axes, (title, values) in zip(bars, panels.items(), strict=True):
        axes.bar([row["engine"] for row in rows], values, color=[colours[row["engine"]] for row in rows])
        axes.set_title(title, loc="left")
        axes.tick_params(axis="x", labelrotation=60, labelsize=8)
    setting = result["setting"]
    figure.suptitle(
        f"vLLM {setting['vllm']}, {setting['model']}, {setting['requests']} requests at random, a pool of "
        f"{setting['pages']} pages of {setting['tokens of a page']} tokens, CPU",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    return figure


def _by_workload(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["workload"], []).append(row)
    return found
