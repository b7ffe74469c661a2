"""The device of a result, and a line that describes it."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from kvops.ops.registry import backend

_BACKENDS = {
    "eager": "eager PyTorch",
    "numba": "CPU kernels",
    "triton": "Triton kernels",
    "triton-interpreter": "Triton's interpreter",
}


def processor() -> str:
    """The CPU's name."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def chosen_device(name: str | None) -> torch.device:
    """The device for a command's ``--device``; None for a GPU if there is one, otherwise the CPU. Raises ValueError for
    a device that does not exist."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:  # not a device of torch
        device = None
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= gpus):
        raise ValueError(f"--device: expected a device that is here, got {name}; next step: --device cpu")
    return device


def assemblers() -> dict[str, tuple[str, str]]:
    """Version and path of each ptxas with which Triton assembles kernels for NVIDIA: its own, or what
    ``TRITON_PTXAS_PATH`` and ``TRITON_PTXAS_BLACKWELL_PATH`` (sm_100 and later) name. Empty without Triton."""
    try:
        from triton import knobs
    except ImportError:
        return {}
    tools = {name: getattr(knobs.nvidia, name, None) for name in ("ptxas", "ptxas_blackwell")}
    return {name: (tool.version, tool.path) for name, tool in tools.items() if tool is not None}


def what_runs(device: torch.device) -> str:
    """One line with the backend for tensors on ``device`` and the name of the device."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor()}, {torch.get_num_threads()} threads"
    return f"{_BACKENDS[backend(device)]} on {name} (torch {torch.__version__})"
