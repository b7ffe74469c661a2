"""The device of a result, and a line that describes it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
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


def usable_cpus() -> float:
    """How many CPUs' time this process may take: that of the cores it may run on, or what its container is allowed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = Path("/proc/self/cgroup")
    return min([cores, *_quotas(own.read_text(), Path("/sys/fs/cgroup"))]) if own.exists() else cores


def _quotas(groups: str, root: Path) -> Iterator[float]:
    """The limits of control groups, of version 1 and 2, in CPUs: those of a process's ``groups`` and all above them."""
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "cpu" if controllers else root
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        group = top / path.lstrip("/")
        for folder in filter(lambda folder: folder.is_relative_to(top), (group, *group.parents)):
            files = [folder / name for name in names]
            if all(file.is_file() for file in files):
                quota, period = " ".join(file.read_text() for file in files).split()
                if quota not in ("max", "-1"):
                    yield int(quota) / int(period)


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
