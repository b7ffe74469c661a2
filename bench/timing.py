"""Timing that the benchmarks share: interleaved contenders, cold caches, warm clocks, quantiles, and what it ran on."""

from __future__ import annotations

import datetime
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kvops
from kvops.environment import processor, what_runs

# Far more than any last-level cache of a GPU; writing it takes so long (0.3 ms at 3 TB/s) that the host, which is ahead
# by then, has queued the launches that follow: what is timed is the GPU's work and not the host's.
_FLUSH_BYTES = 1 << 30


class Times(NamedTuple):
    """Milliseconds."""

    p20: float
    p50: float
    p80: float


class Clock:
    """Times calls on ``device``: CUDA events behind a flush of the L2 cache, or the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._scratch = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def _time(self, run: Callable[[], object]) -> Callable[[], float]:
        """Start one call; what is returned waits for its milliseconds."""
        if self._scratch is None:
            started = time.perf_counter()
            run()
            milliseconds = 1e3 * (time.perf_counter() - started)
            return lambda: milliseconds
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._scratch.zero_()
        start.record()
        run()
        end.record()

        def elapsed() -> float:
            end.synchronize()
            return start.elapsed_time(end)

        return elapsed

    def interleaved(self, contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
        """Every contender once a round, each round starting with another one; two rounds of warm-up come first."""
        names = list(contenders)
        samples: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(-2, rounds):
            first = turn % len(names) if names else 0
            for name in names[first:] + names[:first]:
                milliseconds = self._time(contenders[name])()
                if turn >= 0:
                    samples[name].append(milliseconds)
        quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        return {
            name: Times(*torch.tensor(found, dtype=torch.float64).quantile(quantiles).tolist())
            for name, found in samples.items()
        }

    def matrix_peak(self, dtype: torch.dtype, rounds: int = 20) -> float:
        """TFLOP/s of a large product of random matrices, which also warms the clocks: for a second on a GPU."""
        gpu = self.device.type == "cuda"
        size = 8192 if gpu else 1024
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        if gpu:
            until = time.perf_counter() + 1.0
            while time.perf_counter() < until:
                torch.mm(a, b, out=out)
                torch.cuda.synchronize(self.device)
        times = self.interleaved({"product": lambda: torch.mm(a, b, out=out)}, rounds)
        return tflops(2 * size**3, times["product"].p50)


def tflops(operations: float, milliseconds: float) -> float:
    return operations / milliseconds / 1e9


def largest_error(actual: Tensor, exact: Tensor) -> float:
    """The greatest absolute difference; infinite where ``actual`` has a NaN."""
    return (actual.double() - exact.double()).abs().nan_to_num(nan=float("inf")).max().item()


def setting(device: torch.device) -> dict[str, Any]:
    """What stands beside every figure: device, driver, versions, threads, commit and date."""
    facts: dict[str, Any] = {
        "runs": what_runs(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "kvops": kvops.__version__,
        "commit": _command("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "driver, power limit, clock limit": _command(
                "nvidia-smi",
                f"--id={_uuid(properties)}",
                "--query-gpu=driver_version,power.limit,clocks.max.sm",
                "--format=csv,noheader",
            ),
        }
    return facts


def _uuid(properties: Any) -> str:
    """nvidia-smi numbers GPUs in its own order, so the one in use is named by its UUID."""
    return f"GPU-{properties.uuid}"


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _command(*words: str) -> str | None:
    """The output, None where the command is missing or fails."""
    if shutil.which(words[0]) is None:
        return None
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
