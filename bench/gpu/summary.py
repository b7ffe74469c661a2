"""What the GPU run prints last: a few lines for each phase."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from bench import results
from bench.gpu.units import FAILED, PASSED, SKIPPED, Outcome
from bench.measure import KVOPS
from bench.table import render

# The number of failures to print; the result file has all.
_NAMED = 15


def phase_summary(phase: str, outcomes: Sequence[Outcome], out: Path) -> str:
    counts: Counter[str] = sum((outcome.counts() for outcome in outcomes), Counter())
    good = sum(outcome.good for outcome in outcomes)
    seconds = sum(outcome.seconds for outcome in outcomes)
    lines = [
        f"\n== {phase}: {counts[PASSED]} passed, {counts[FAILED]} failed, {counts[SKIPPED]} skipped; "
        f"{good} of {len(outcomes)} processes good, {seconds:.0f} s of processes: {out / phase}.json"
    ]
    for outcome in outcomes:
        if not outcome.complete:
            lines.append(f"  {outcome.unit}: {outcome.status}; {outcome.log}")
    failures = [(outcome, row) for outcome in outcomes for row in outcome.rows if row["outcome"] == FAILED]
    lines += [f"  failed: {row['name']}: {row['note']}" for _, row in failures[:_NAMED]]
    if len(failures) > _NAMED:
        lines.append(f"  ... and {len(failures) - _NAMED} more")
    reasons = Counter(row["note"] for outcome in outcomes for row in outcome.rows if row["outcome"] == SKIPPED)
    lines += [f"  skipped {number}: {reason}" for reason, number in reasons.most_common(5)]
    extra = _MEASURED.get(phase)
    if extra is not None:
        lines.append(extra(out))
    return "\n".join(lines)


def operators(out: Path) -> str:
    """For each operator: its share of the roofline, and its speed over the fastest peer of each case."""
    path = out / "operators.json"
    if not path.exists():
        return "  no operator was measured"
    shares, ratios = defaultdict(list), defaultdict(list)
    peers: dict[str, list[float]] = defaultdict(list)
    operator = {}
    for row in results.load(path)["rows"]:
        operator[row["case"]] = row["op"]
        if row["contender"] == KVOPS and row["of_roofline"] is not None:
            shares[row["op"]].append(row["of_roofline"])
        elif row["ratio"] is not None:
            peers[row["case"]].append(row["ratio"])
    for case, peer_ratios in peers.items():
        ratios[operator[case]].append(min(peer_ratios))
    cells = [
        [
            op,
            str(len(of_roofline)),
            f"{statistics.median(of_roofline):.0%}",
            f"{min(of_roofline):.0%}",
            *([f"{statistics.median(ratios[op]):.2f}", f"{min(ratios[op]):.2f}"] if ratios[op] else ["", ""]),
        ]
        for op, of_roofline in shares.items()
    ]
    headers = ["operator", "cases", "of roofline", "least", "x fastest peer", "least"]
    return f"{render(cells, headers, 'simple')}\n  {path}"


def serving(out: Path) -> str:
    path = out / "throughput.json"
    if not path.exists():
        return "  nothing was served"
    from bench.throughput import table

    return f"{table(results.load(path)['rows'])}\n  {path}"


_MEASURED = {"bench": operators, "throughput": serving}
