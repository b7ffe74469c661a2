"""Every benchmark case compared with float64, twice: ``python -m bench.gpu.cases --help``.

The outputs of the second call must have the bits of the first. ``--gluon`` compares the warp-specialised
kernels for Hopper with the same oracle, in a separate process: no launch uses them before they passed on this GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.case import SCALES, Case, Inputs, Outputs, Scale
from bench.cases import all_cases, select
from bench.cases.dense import options
from bench.cases.varlen import packed_lengths
from bench.gpu.compile_once import compile_once
from bench.gpu.units import FAILED, PASSED, SKIPPED, report
from bench.measure import build, compare, reason

DTYPES = ("bfloat16", "float16", "float32")
# Real heads and head sizes with several tiles and splits, as small as a check allows.
CHECK = dataclasses.replace(SCALES["full"], name="check", prompts=(1024, 4096), contexts=(4096, 32768), batches=(1, 16))


def scale_named(name: str) -> Scale:
    return CHECK if name == CHECK.name else SCALES[name]


def gluon_case(case: Case) -> Case | None:
    """A case of attention run by the Hopper kernels: forward, dense or packed, or dense backward."""
    if case.op not in ("flash_attention", "flash_attention_varlen", "flash_attention_backward"):
        return None

    def forward(inputs: Inputs) -> Outputs:
        from kvops.kernels.gluon_flash_forward import gluon_flash_forward, gluon_flash_forward_varlen

        qkv = inputs["q"], inputs["k"], inputs["v"]
        if case.op == "flash_attention":
            return gluon_flash_forward(*qkv, **options(inputs))
        return gluon_flash_forward_varlen(*qkv, *packed_lengths(inputs), **options(inputs))

    def backward(inputs: Inputs) -> Outputs:
        from kvops.kernels.gluon_flash_backward import gluon_flash_backward

        names = ("dout", "q", "k", "v", "out", "lse")
        return gluon_flash_backward(*(inputs[name] for name in names), **options(inputs))[:3]

    if case.op == "flash_attention_backward":
        return dataclasses.replace(case, op="gluon_flash_backward", run=backward)
    return dataclasses.replace(case, op="gluon_flash_forward", run=forward)


def refusal(case: Case, inputs: Inputs) -> str:
    """Why the Hopper kernels cannot run a case."""
    if case.op not in ("gluon_flash_forward", "gluon_flash_backward"):
        return ""
    if not inputs["q"].is_cuda:
        return "GPU only"
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    if case.op == "gluon_flash_forward":
        from kvops.kernels import gluon_flash_forward

        return gluon_flash_forward.launchable(q, k, v) or ""
    from kvops.kernels import gluon_flash_backward

    return gluon_flash_backward.launchable(inputs["dout"], q, k, v, softcap=inputs["softcap"]) or ""


def copies(outputs: Outputs) -> list[Tensor | None]:
    return [None if x is None else x.detach().clone() for x in outputs]


def same_bits(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (first, second)))  # -0.0 and NaN are bits too


def check(
    case: Case, device: torch.device, dtype: torch.dtype, *, exact: bool = True
) -> tuple[str, str, dict[str, Any]]:
    """(outcome, note, facts); without ``exact`` the two calls are only compared with each other."""
    inputs = build(case, device, dtype)
    refused = refusal(case, inputs)
    if refused:
        return SKIPPED, refused, {}

    def call() -> Outputs:
        if case.reset is not None:
            case.reset(inputs)
        return case.run(inputs)

    first, second = copies(call()), copies(call())
    if not all(map(same_bits, first, second)):
        return FAILED, "the second call gave other bits than the first", {}
    if not exact:
        return PASSED, "", {}
    if case.reset is not None:
        case.reset(inputs)
    with torch.no_grad():
        truth, similar = case.oracle(inputs, torch.float64), case.oracle(inputs, dtype)
    error, allowed, complaint = compare(case, inputs, tuple(second), truth, similar)
    facts = {"error": error, "allowed": allowed} if math.isfinite(error) else {}
    return (FAILED, complaint, facts) if complaint else (PASSED, "", facts)


def arguments_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.cases", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", choices=[CHECK.name, *SCALES], default=CHECK.name)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--ops", nargs="+")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="every N-th case, from the I-th")
    parser.add_argument("--gluon", action="store_true", help="attention by the Hopper kernels, and nothing else")
    parser.add_argument("--inexact", action="store_true", help="leave out the comparison with float64")
    parser.add_argument("--rows", type=Path, required=True)
    return parser.parse_args(words)


def main() -> None:
    arguments = arguments_of()
    compile_once()
    device = torch.device(arguments.device)
    cases = select(all_cases(scale_named(arguments.scale)), arguments.ops)
    if arguments.gluon:
        cases = [gluon for gluon in map(gluon_case, cases) if gluon is not None]
    share, shares = map(int, arguments.share.split("/"))
    work = [(case, name) for case in cases for name in arguments.dtypes][share::shares]
    for case, name in work:
        print(f"{case.name} {name}", flush=True)
        try:
            outcome, note, facts = check(case, device, getattr(torch, name), exact=not arguments.inexact)
            if device.type == "cuda":
                torch.cuda.synchronize()
        except torch.cuda.OutOfMemoryError as error:
            outcome, note, facts = SKIPPED, f"does not fit: {reason(error)}", {}
        except Exception as error:  # an error becomes the case's row; a lost device ends the process below
            traceback.print_exc()
            outcome, note, facts = FAILED, reason(error), {}
        if outcome != PASSED:
            print(f"  {outcome}: {note}", flush=True)
        report(arguments.rows, f"{case.name} {name}", outcome, note, **facts)
        if device.type == "cuda":
            torch.cuda.synchronize()  # raises always after an illegal access
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
