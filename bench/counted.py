"""``python -m bench counted``: what the compiled kernels do, counted on a CPU without a GPU; nothing is measured.

The machine of ``kvops.autotune.machine`` runs the PTX of a case of every operator, at model shapes scaled down, and
counts: bytes of global memory over the least bytes (``Case.bytes``), the bytes of the 32-byte sectors that its warps
touch, bank conflicts of shared memory, instructions by pipe, and the work of matrix instructions over the least work.
Decoding is counted beside ``triton_unified_attention`` of vLLM, where vLLM is installed.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.case import LLAMA_8B, SCALES, Case, Inputs, Outputs, UnavailableError
from bench.cases import copying, dense, eviction, latents, lookup, merging, paged, scores, verification
from bench.measure import KVOPS
from bench.table import render
from kvops.cli.console import table

DTYPE = torch.float16
# Small enough for a CPU, large enough that the ends of loops do not govern: two KV heads of a model with 8.
SCALE = replace(SCALES["cpu"], max_kv_heads=2, max_cached_heads=2, max_head_dim=128, max_vocab=4096)
PEER = "vLLM triton_unified_attention"
# What vLLM cuts a list into when it decodes few requests.
_SEGMENTS = 16
# What launch functions are told: few, as the inputs are small.
_SMS = 8


def cases() -> Iterator[Case]:
    model = SCALE.model(LLAMA_8B)
    small = replace(model, head_dim=64)
    windowed = replace(small, window=64)
    for spread in ("equal", "heavy-tailed"):
        for reduce in ("", "sum"):
            yield paged.attention(model, 8, 1024, spread=spread, reduce=reduce)
    yield paged.attention(model, 4, 512, tokens=4)
    yield latents.decoding(4, 512, 16, 128, 64)
    yield paged.append(model, 4, 256)
    yield paged.schedule(replace(model, layers=4), 8, 1024)
    yield dense.forward(small, 1, 256)
    yield dense.forward(windowed, 1, 256)
    yield dense.backward(small, 1, 256)
    yield dense.bias_backward(replace(small, heads=2), 128)
    yield scores.scores(small, 1, 256)
    yield merging.merge(model, 1, 64)
    yield merging.merge(model, 1, 64, backward=True)
    yield eviction.select(model, 2, 512, scope="head")
    yield eviction.select(model, 2, 512, scope="sequence")
    yield eviction.compact(model, 2, 256)
    yield copying.copy(model, 2, 1)
    yield verification.chain(model, 2, 4)
    yield verification.chain(model, 2, 4, sampled=True)
    yield verification.tree(model, 2, 6)
    yield lookup.lookup(2, 1024, 4096)


@contextmanager
def _kernels() -> Iterator[None]:
    """Inside, operators send CPU tensors to the kernels, which were imported to be compiled."""
    for path in sorted((Path(__file__).parent.parent / "kernels").glob("[!_]*.py")):
        importlib.import_module(f"kvops.kernels.{path.stem}")
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def unified_attention(inputs: Inputs) -> Callable[[], Outputs]:
    """Decoding by vLLM's kernel: every list is a sequence with one KV head, as its lists have one length for all heads.

    Its package says that there is no Triton on a machine without a GPU; ours is given to it.
    """
    import triton

    if inputs["reduce"] or inputs["q"].shape[1] > 1:
        raise UnavailableError("gives no scores" if inputs["reduce"] else "counted with one token alone")
    import vllm.triton_utils

    vllm.triton_utils.triton, vllm.triton_utils.tl = triton, triton.language
    vllm.triton_utils.HAS_TRITON = True
    attend = importlib.import_module("vllm.v1.attention.ops.triton_unified_attention").unified_attention
    batch, heads = inputs["seq_lens"].shape
    q = inputs["q"].flatten(0, 1).unflatten(1, (heads, -1)).flatten(0, 1).contiguous()  # [lists, group, D]
    lists, group, head_dim = q.shape
    out = torch.zeros_like(q)
    k, v = (inputs[name][:, :, None] for name in ("k_cache", "v_cache"))
    starts, lens = torch.arange(lists + 1, dtype=torch.int32), inputs["seq_lens"].flatten()
    tables = inputs["block_tables"].flatten(0, 1)
    partial = torch.zeros(lists, group, _SEGMENTS, head_dim)
    most, total = torch.zeros(2, lists, group, _SEGMENTS)

    def call() -> Outputs:
        attend(
            *(q, k, v, out, starts, 1, lens, int(lens.max()), head_dim**-0.5, True, (-1, -1), tables, 0.0),
            *(None, None, None),
            seq_threshold_3D=lists,
            num_par_softmax_segments=_SEGMENTS,
            softmax_segm_output=partial,
            softmax_segm_max=most,
            softmax_segm_expsum=total,
        )
        return (out.view(batch, 1, heads * group, head_dim),)

    return call


def count(case: Case, target: str, peer: bool = False) -> dict[str, Any]:
    """One row. ValueError where a peer's results are not kvops' own."""
    from kvops.autotune.machine import Options, on_machine
    from kvops.autotune.machine.counts import Counter

    def made() -> Inputs:
        return case.make_inputs(torch.device("cpu"), DTYPE, torch.Generator().manual_seed(0))

    inputs = made()
    call = unified_attention(inputs) if peer else lambda: case.run(inputs)
    counter = Counter()
    options = Options(check=False, counter=counter)
    with _kernels(), on_machine(target, options=options, num_sms=_SMS, track_empty=False) as machine:
        outputs = call()
    if peer:
        torch.testing.assert_close(outputs[0], case.run(made())[0], rtol=0, atol=4e-3)
    needed, pairs = case.bytes(DTYPE.itemsize), case.flops / (4 * inputs["q"].shape[-1]) if case.flops else 0
    return {
        "op": case.op,
        "case": case.name,
        "contender": PEER if peer else KVOPS,
        "target": target,
        "kernels": sorted({execution.kernel for execution in machine.executions}),
        "needed_bytes": needed,
        "moved_bytes": counter.global_bytes,
        "sector_bytes": 32 * counter.sectors,
        "needed_work": case.flops,
        "matrix_work": counter.matrix_operations,
        "wavefronts": counter.wavefronts,
        "fewest_wavefronts": counter.fewest_wavefronts,
        "loop_conflicts": {place: ways for place, ways in sorted(counter.loop_conflicts.items()) if ways > 1},
        "worst_conflict": max(counter.conflicts.values(), default=1),
        "instructions": counter.instructions,
        "instructions_per_pair": round(32 * counter.instructions / pairs, 2) if pairs else None,
        "pipes": dict(sorted(counter.pipes.items())),
    }


def pages(result: results.Result) -> str:
    """The section of BENCHMARKS.md: a table for each target, and the loops in which banks conflict."""
    parts = [
        "Counted on a CPU, by running the compiled PTX; nothing is measured, and this says nothing about time. Bytes "
        "and sectors of 32 bytes are over the least bytes of the operator; what a cache would keep is counted each "
        "time a warp asks for it. Matrix work is over the least work, wavefronts are over those without bank conflicts."
    ]
    for target in sorted({row["target"] for row in result["rows"]}):
        rows = [row for row in result["rows"] if row["target"] == target]
        parts.append(f"#### {target}")
        parts.append(render([cells(row) for row in rows], HEADERS, "pipe", left=2))
    return "\n\n".join(parts)


HEADERS = (
    "counted", "contender", "bytes", "sectors", "matrix work", "wavefronts", "worst bank in a loop",
    "instructions",
)  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table: ratios to what is needed, and warp instructions."""
    return [
        row["case"].replace("Llama-3.1-8B/", ""),
        row["contender"],
        f"{row['moved_bytes'] / row['needed_bytes']:.2f}",
        f"{row['sector_bytes'] / row['needed_bytes']:.2f}",
        f"{row['matrix_work'] / row['needed_work']:.2f}" if row["matrix_work"] else "",
        f"{row['wavefronts'] / row['fewest_wavefronts']:.2f}" if row["fewest_wavefronts"] else "",
        str(max(row["loop_conflicts"].values(), default=1)) if row["fewest_wavefronts"] else "",
        f"{row['instructions']:,}",
    ]


def run(target: str, path: Path | None = None, only: str = "", vllm: Path | None = None) -> list[dict[str, Any]]:
    """Count every case whose name contains ``only``, print the table and write the rows to ``path``.

    ``vllm``: the site-packages of an environment with vLLM, searched after this one.
    """
    if vllm is not None:
        sys.path.append(str(vllm))
    rows = []
    for case in cases():
        if only not in case.name:
            continue
        rows.append(count(case, target))
        if case.op == "paged_attention":
            try:
                rows.append(count(case, target, peer=True))
            except (ImportError, UnavailableError) as error:
                print(f"{case.name}: {PEER} left out: {error}", file=sys.stderr)
        print(table([cells(row) for row in rows[-1:]], HEADERS), flush=True, file=sys.stderr)
    print(table([cells(row) for row in rows], HEADERS))
    if path:
        setting = {"triton": version("triton"), "dtype": str(DTYPE).removeprefix("torch."), "multiprocessors": _SMS}
        results.save(path, "counted", setting, rows)
    return rows
