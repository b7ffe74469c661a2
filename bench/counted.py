"""``python -m bench counted``: what the compiled kernels do, counted on a CPU without a GPU; nothing is measured.

The machine of ``kvops.autotune.machine`` runs the PTX of each case, at model shapes scaled down, and counts: bytes of
global memory over the bytes that the operator must move, the bytes of the 32-byte sectors that its warps touch, bank
conflicts of shared memory, instructions by pipe, and the work of matrix instructions over the work needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.lists import heavy_tailed, lengths, make_lists
from kvops.cli.console import table

HEAD_DIM, HEADS, GROUP = 64, 2, 4  # of K and V; query heads to each
DTYPE = torch.float16


@dataclass(frozen=True)
class CountedCase:
    """``run`` launches kernels; ``needed_bytes`` is what it reads and writes if it does so once, ``needed_work`` the
    operations of its matrix products, ``keys`` how many keys its queries meet."""

    name: str
    run: Callable[[], Any]
    needed_bytes: int
    needed_work: float
    keys: int


def _decode(name: str, lens: torch.Tensor, *, scores: bool = False) -> CountedCase:
    from kvops.kernels.paged_attention import paged_attention

    held = make_lists(lens, HEAD_DIM, torch.device("cpu"), DTYPE, torch.Generator().manual_seed(0))
    q = torch.randn(lens.shape[0], 1, HEADS * GROUP, HEAD_DIM, generator=torch.Generator().manual_seed(1)).to(DTYPE)
    options = {"scores": held["scores"]} if scores else {}
    arguments = q, held["k_cache"], held["v_cache"], held["block_tables"], held["seq_lens"]
    slots = int(lens.sum())
    blocks = int(((lens + 15) // 16).sum())
    needed = (
        slots * 2 * HEAD_DIM * DTYPE.itemsize + 2 * q.nbytes + 4 * q.numel() // HEAD_DIM + 4 * (blocks + lens.numel())
    )
    needed += 2 * 4 * slots if scores else 0
    work = 4.0 * slots * GROUP * HEAD_DIM
    return CountedCase(name, lambda: paged_attention(*arguments, **options), needed, work, slots)


def _prefill(name: str, length: int, **options: Any) -> CountedCase:
    from kvops.kernels.flash_forward import flash_forward

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, length, GROUP, HEAD_DIM, generator=generator).to(DTYPE)
    k, v = torch.randn(2, 1, length, 1, HEAD_DIM, generator=generator).to(DTYPE)
    pairs = length * (length + 1) // 2 if options.get("causal") else length * length
    needed = 2 * q.nbytes + k.nbytes + v.nbytes + 4 * q.numel() // HEAD_DIM
    work = 4.0 * pairs * GROUP * HEAD_DIM
    return CountedCase(name, lambda: flash_forward(q, k, v, **options), needed, work, pairs * GROUP)


def _append(name: str) -> CountedCase:
    from kvops.kernels.paged_append import paged_append

    lens = lengths(4, HEADS, 128, ragged=True)
    held = make_lists(lens, HEAD_DIM, torch.device("cpu"), DTYPE, torch.Generator().manual_seed(0))
    new = torch.randn(4, 1, HEADS, HEAD_DIM).to(DTYPE)
    arguments = new, new + 1, held["k_cache"], held["v_cache"], held["block_tables"], held["seq_lens"]
    needed = 4 * new.nbytes + 8 * lens.numel()
    return CountedCase(name, lambda: paged_append(*arguments), needed, 0.0, lens.numel())


def cases() -> list[CountedCase]:
    uniform, heavy = lengths(4, HEADS, 256, ragged=False), heavy_tailed(4, HEADS, 256, longest=4)
    return [
        _decode("decode, uniform lists", uniform),
        _decode("decode, heavy-tailed lists", heavy),
        _decode("decode, uniform lists, scores", uniform, scores=True),
        _prefill("prefill, causal", 256, causal=True),
        _prefill("prefill, window of 64", 256, causal=True, window_left=64),
        _append("append a token"),
    ]


def count(case: CountedCase, target: str, num_sms: int = 8) -> dict[str, Any]:
    """One row. ``needed_bytes`` counts the tables and lengths, too."""
    from kvops.autotune.machine import Options, on_machine
    from kvops.autotune.machine.counts import Counter

    counter = Counter()
    with on_machine(
        target, options=Options(check=False, counter=counter), num_sms=num_sms, track_empty=False
    ) as machine:
        case.run()
    return {
        "case": case.name,
        "target": target,
        "kernels": sorted({execution.kernel for execution in machine.executions}),
        "needed_bytes": case.needed_bytes,
        "moved_bytes": counter.global_bytes,
        "sector_bytes": 32 * counter.sectors,
        "needed_work": case.needed_work,
        "matrix_work": counter.matrix_operations,
        "wavefronts": counter.wavefronts,
        "fewest_wavefronts": counter.fewest_wavefronts,
        "conflicts": {place: ways for place, ways in sorted(counter.conflicts.items()) if ways > 1},
        "instructions": counter.instructions,
        "instructions_per_key": round(32 * counter.instructions / max(case.keys, 1), 2),
        "pipes": dict(sorted(counter.pipes.items())),
    }


def run(target: str, path: Path | None = None) -> list[dict[str, Any]]:
    """Count every case, print the table and write the rows to ``path``."""
    rows = [count(case, target) for case in cases()]
    lines = [
        (
            row["case"],
            f"{row['moved_bytes'] / row['needed_bytes']:.2f}",
            f"{row['sector_bytes'] / row['needed_bytes']:.2f}",
            f"{row['matrix_work'] / row['needed_work']:.2f}" if row["needed_work"] else "",
            f"{row['wavefronts'] / max(row['fewest_wavefronts'], 1):.2f}",
            max(row["conflicts"].values(), default=1),
            row["instructions_per_key"],
        )
        for row in rows
    ]
    headers = (
        "counted",
        "bytes / needed",
        "sectors / needed",
        "matrix / needed",
        "wavefronts",
        "worst bank",
        "per key",
    )
    print(table(lines, headers))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n")
    return rows
