"""The benchmarks' own runs, for the GPU run: ``run`` one operator, or ``compile`` what the cases launch.

Compiling launches every case with shorter prompts and contexts: the kernels are the same, as only whether a length can
be divided by 16 is compiled in. Triton's cache on disk then has them for the timed run.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from bench import results
from bench.__main__ import main as bench_main
from bench.case import SCALES
from bench.cases import all_cases
from bench.gpu.units import FAILED, PASSED, report
from bench.measure import KVOPS, build, reason


def compile_share(device: torch.device, share: int, shares: int, rows: Path) -> None:
    full = SCALES["full"]
    short = dataclasses.replace(full, prompts=(1024,) * len(full.prompts), contexts=(4096,) * len(full.contexts))
    cases = {case.name: case for case in _unique(short)}
    for case in list(cases.values())[share::shares]:
        try:
            inputs = build(case, device, torch.bfloat16)
            if case.reset is not None:
                case.reset(inputs)
            case.run(inputs)
            torch.cuda.synchronize()
        except Exception as error:  # the timed run will say it again, and better
            report(rows, case.name, FAILED, reason(error))
            torch.cuda.synchronize()
        else:
            report(rows, case.name, PASSED)
        torch.cuda.empty_cache()
