"""kvops' dense attention beside its peers, forward and forward with backward, in one run and one table.

    python bench/attention.py --json bench/results/<device>/attention.json

Peers: scaled_dot_product_attention with each of its backends forced, FlexAttention, flash-attn 2, 3 and 4. A peer that
is missing or refuses a case is a row that says why. Before anyone is timed, its output (and gradients) are held to a
float64 reference: at most twice the error of plain torch in the tested precision, plus one rounding. Contenders are
interleaved; on a GPU the L2 cache is flushed before every call. Operations are 4 B Hq S^2 D forward and 2.5 times that
backward, half of it under a causal mask. "peak" is what a large matrix product reaches in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from attention_peers import CONTENDERS, Attention
from tabulate import tabulate
from timing import Clock, largest_error, setting, tflops
from torch import Tensor
from tqdm import tqdm

PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    head_dim: int
    length: int
    causal: bool
    backward: bool
    batch: int
    heads: int
    kv_heads: int
    dtype: torch.dtype

    @property
    def operations(self) -> float:
        forward = 4 * self.batch * self.heads * self.length**2 * self.head_dim
        return forward * (3.5 if self.backward else 1) * (0.5 if self.causal else 1)

    def inputs(self, device: torch.device) -> list[Tensor]:
        """q, k, v and dout."""
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        return [
            torch.randn(self.batch, self.length, h, self.head_dim, device=device)
            .to(self.dtype)
            .requires_grad_(self.backward and place < 3)
            for place, h in enumerate(heads)
        ]

    def description(self) -> dict[str, Any]:
        return asdict(self) | {"dtype": str(self.dtype).removeprefix("torch.")}


@dataclass
class Row:
    """One contender in one case; ``note`` says why there are no times."""

    case: Case
    contender: str
    error: float | None = None
    allowed: float | None = None
    p20_ms: float | None = None
    ms: float | None = None
    p80_ms: float | None = None
    tflops: float | None = None
    of_peak: float | None = None
    speed_to_fastest_peer: float | None = None
    note: str = ""

    def facts(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name != "case"}
        return self.case.description() | own


def reference(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool, dtype: torch.dtype) -> list[Tensor]:
    """out, dq, dk and dv with operands in ``dtype``, softmax and results in at least float32, tile by tile."""
    work = torch.promote_types(dtype, torch.float32)
    B, S, Hq, D = q.shape
    group, rows, scale = Hq // k.shape[2], max(1, min(S, (1 << 25) // S)), D**-0.5
    out, dq = (torch.empty(q.shape, dtype=work, device=q.device) for _ in range(2))
    dk, dv = (torch.zeros(k.shape, dtype=work, device=q.device) for _ in range(2))

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a.to(dtype) @ b.to(dtype)).to(work)

    for b, h, start in itertools.product(range(B), range(Hq), range(0, S, rows)):
        tile, keys, end = (b, slice(start, start + rows), h), (b, slice(None), h // group), min(S, start + rows)
        s = product(q[tile], k[keys].T).mul_(scale)
        if causal:
            hidden = torch.arange(S, device=q.device) > torch.arange(start, end, device=q.device)[:, None]
            s.masked_fill_(hidden, float("-inf"))
        p = s.softmax(-1)
        out[tile] = product(p, v[keys])
        delta = (dout[tile].to(work) * out[tile].to(dtype).to(work)).sum(-1, keepdim=True)
        ds = (product(dout[tile], v[keys].T) - delta).mul_(p)
        dq[tile] = product(ds, k[keys]).mul_(scale)
        dk[keys] += product(ds.T, q[tile]).mul_(scale)
        dv[keys] += product(p.T, dout[tile])
    return [out, dq, dk, dv]


def call(attend: Attention, inputs: Sequence[Tensor], backward: bool) -> Callable[[], list[Tensor]]:
    """out, and dq, dk, dv with the backward."""
    q, k, v, dout = inputs

    def forward_only() -> list[Tensor]:
        with torch.no_grad():
            return [attend(q, k, v)]

    def both() -> list[Tensor]:
        out = attend(q, k, v)
        return [out, *torch.autograd.grad(out, (q, k, v), dout)]

    return both if backward else forward_only


def repeat_heads(inputs: Sequence[Tensor]) -> list[Tensor]:
    q, k, v, dout = inputs
    group = q.shape[2] // k.shape[2]
    repeated = (x.detach().repeat_interleave(group, 2).requires_grad_(x.requires_grad) for x in (k, v))
    return [q, *repeated, dout]


def check(row: Row, results: Sequence[Tensor], exact: Sequence[Tensor], similar: Sequence[Tensor]) -> None:
    """Notes on ``row`` the result that is nearest to its limit, and refuses it beyond."""
    for name, result, truth, same in zip(("out", "dq", "dk", "dv"), results, exact, similar, strict=False):
        if result.shape != truth.shape:  # repeated heads: the gradients of a group add up
            result = result.double().unflatten(2, (truth.shape[2], -1)).sum(3)
        error = largest_error(result, truth)
        allowed = 2 * largest_error(same, truth) + torch.finfo(row.case.dtype).eps * truth.abs().max().item()
        if row.error is None or row.allowed is None or error * row.allowed > row.error * allowed:
            row.error, row.allowed = error, allowed
        if not error <= allowed:
            row.note = f"wrong: {name} is {error:.1e} off, allowed {allowed:.1e}"
            return


def reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:90]


def run_case(case: Case, names: Sequence[str], clock: Clock, rounds: int, peak: float) -> list[Row]:
    inputs = case.inputs(clock.device)
    q, k, v, dout = (x.detach() for x in inputs)
    exact = reference(q, k, v, dout, case.causal, torch.float64)
    similar = reference(q, k, v, dout, case.causal, case.dtype)
    rows = {name: Row(case, name) for name in names}
    ready = {}
    for name, row in rows.items():
        try:
            mine = repeat_heads(inputs) if "KV repeated" in name else inputs
            if name == "kvops Gluon" and case.backward:
                row.note = "forward only"
                continue
            run = call(CONTENDERS[name](case.causal), mine, case.backward)
            check(row, run(), exact, similar)
        except Exception as error:  # whatever keeps a contender from running becomes its row
            row.note = reason(error)
        if not row.note:
            ready[name] = run
    del exact, similar
    if clock.device.type == "cuda":
        torch.cuda.empty_cache()
    for name, times in clock.interleaved(ready, rounds).items():
        row = rows[name]
        row.p20_ms, row.ms, row.p80_ms = times
        row.tflops = tflops(case.operations, times.p50)
        row.of_peak = row.tflops / peak
    peers = [row.ms for row in rows.values() if row.ms is not None and not row.contender.startswith("kvops")]
    for row in rows.values():
        if row.ms is not None and peers:
            row.speed_to_fastest_peer = min(peers) / row.ms
    return list(rows.values())


def table(rows: Sequence[Row]) -> str:
    cells = []
    for row in rows:
        case = row.case
        line = [case.head_dim, case.length, "causal" if case.causal else "full", PASSES[case.backward], row.contender]
        if row.ms is None:
            cells.append([*line, *("",) * 5, row.note])
            continue
        spread = f"{row.p20_ms:.3f} to {row.p80_ms:.3f}"
        ratio = "" if row.speed_to_fastest_peer is None else f"{row.speed_to_fastest_peer:.2f}"
        cells.append(
            [*line, f"{row.ms:.3f}", spread, f"{row.tflops:.2f}", f"{row.of_peak:.1%}", ratio, f"{row.error:.1e}"]
        )
    headers = ["D", "S", "mask", "pass", "contender", "ms", "p20 to p80", "TFLOP/s", "of peak", "x best peer", "error"]
    align = ["right", "right", *("left",) * 3, *("right",) * 5, "left"]
    return tabulate(cells, headers=headers, disable_numparse=True, colalign=align)


def parse(gpu: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256] if gpu else [64, 128])
    lengths = [1024, 2048, 4096, 8192, 16384] if gpu else [256, 1024]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--masks", nargs="+", choices=["full", "causal"], default=["full", "causal"])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--heads", type=int, nargs=2, metavar=("Q", "KV"), default=(32, 8) if gpu else (8, 2))
    tokens = 16384 if gpu else 1024
    parser.add_argument("--tokens", type=int, default=tokens, help="batch times length (default: %(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16" if gpu else "float32")
    names = list(CONTENDERS) if gpu else ["kvops", "SDPA flash", "SDPA math"]
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=names, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=20 if gpu else 9)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here, case by case")
    return parser.parse_args()


def main() -> None:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    arguments = parse(device.type == "cuda")
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    clock = Clock(device)
    peak = clock.matrix_peak(dtype)
    facts = setting(device) | {"matrix_peak_tflops": peak, "rounds": arguments.rounds}
    grid = itertools.product(arguments.passes, arguments.head_dims, arguments.masks, arguments.lengths)
    heads, kv_heads = arguments.heads
    cases = [
        Case(
            head_dim=head_dim,
            length=length,
            causal=mask == "causal",
            backward=which == PASSES[1],
            batch=max(1, arguments.tokens // length),
            heads=heads,
            kv_heads=kv_heads,
            dtype=dtype,
        )
        for which, head_dim, mask, length in grid
    ]
    rows: list[Row] = []
    for case in tqdm(cases, unit="case", disable=None):
        rows += run_case(case, arguments.contenders, clock, arguments.rounds, peak)
        if arguments.json:  # after each case: whoever stops the run keeps what there is
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            results = {"setting": facts, "rows": [row.facts() for row in rows]}
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    print(table(rows))
    print("\n" + ", ".join(f"{name}: {value}" for name, value in facts.items()))
    failed = [row for row in rows if row.contender == "kvops" and row.note]
    if failed:
        raise SystemExit(f"kvops failed {len(failed)} of {len(cases)} cases, the first: {failed[0].note}")


if __name__ == "__main__":
    main()
