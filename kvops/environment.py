"""What a result was got on: the words that stand beside every figure."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from kvops.ops.registry import backend

_BACKENDS = {"eager": "eager PyTorch", "triton": "Triton kernels", "triton-interpreter": "Triton's interpreter"}


def processor() -> str:
    """The CPU's name."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def what_runs(device: torch.device) -> str:
    """One line: what serves the operators for tensors on ``device``, and what that device is."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor()}, {torch.get_num_threads()} threads"
    return f"{_BACKENDS[backend(device)]} on {name} (torch {torch.__version__})"
