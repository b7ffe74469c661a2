"""Timing that the benchmarks share: interleaved contenders, cold caches, warm clocks, quantiles, and what it ran on."""

from __future__ import annotations

import datetime
import os
import platform
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import kvops
from kvops.cli.environment import assemblers, processor, what_runs

# Far more than any last-level cache of a GPU; writing it takes so long (0.3 ms at 3 TB/s) that the host, which is ahead
# by then, has queued the launches that follow: what is timed is the GPU's work and not the host's.
_FLUSH_BYTES = 1 << 30
_WARM_UP_ROUNDS = 2


class Times(NamedTuple):
    """Three quantiles of what was timed, in its unit."""

    p20: float
    p50: float
    p80: float


def quantiles(samples: Sequence[float]) -> Times:
    if len(samples) == 1:
        return Times(*3 * samples)
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return Times(cuts[1], cuts[4], cuts[7])


class Clock:
    """Times calls on ``device``: CUDA events behind a flush of the L2 cache, or the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gpu = device.type == "cuda"
        self._scratch = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if self.gpu else None

    def once(self, run: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        if self._scratch is None:
            started = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - started)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._scratch.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def interleaved(
        self,
        contenders: Mapping[str, Callable[[], object]],
        rounds: int,
        *,
        seconds: float = float("inf"),
        reset: Callable[[str], object] = lambda name: None,
    ) -> dict[str, list[float]]:
        """Milliseconds by contender: every contender once a round, in an order drawn for each round (the same in every
        run), as who always follows a contender that empties the caches is slower for it.

        Two rounds of warm-up come first. When ``seconds`` are over no round begins, but five are always completed.
        ``reset`` is given the contender's name before every call and is not timed.
        """
        names, lots = list(contenders), random.Random(0)
        samples: dict[str, list[float]] = {name: [] for name in names}
        until = time.perf_counter() + seconds
        for turn in range(-_WARM_UP_ROUNDS, rounds):
            if turn >= 5 and time.perf_counter() > until:
                break
            for name in lots.sample(names, len(names)):
                reset(name)
                milliseconds = self.once(contenders[name])
                if turn >= 0:
                    samples[name].append(milliseconds)
        return samples


def captured(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """``run``, which runs once before, as the replay of a CUDA graph; raises where it cannot be captured.

    A replay writes to the outputs of the one before it.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


@dataclass(frozen=True)
class Roofline:
    """What this very device reaches at its best, measured in the same run: nobody's data sheet."""

    matrix_tflops: float
    """A large product of random matrices in the tested dtype."""
    copy_gbps: float
    """Bytes read and written by a large copy."""

    def bound_ms(self, flops: float, bytes_moved: float) -> float:
        """The time below which nobody can stay."""
        return max(flops / self.matrix_tflops / 1e9, bytes_moved / self.copy_gbps / 1e6)

    def facts(self) -> dict[str, float]:
        return asdict(self)


def measure_roofline(
    clock: Clock, dtype: torch.dtype, rounds: int = 20, pick: Callable[[Sequence[float]], float] = min
) -> Roofline:
    """From the time that ``pick`` takes of those of all rounds. Also warms the clocks of a GPU, for a second."""
    size = 8192 if clock.gpu else 1024
    a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    if clock.gpu:
        until = time.perf_counter() + 1.0
        while time.perf_counter() < until:
            torch.mm(a, b, out=out)
            torch.cuda.synchronize(clock.device)
    product = pick(clock.interleaved({"": lambda: torch.mm(a, b, out=out)}, rounds)[""])
    source = torch.randn(1 << (28 if clock.gpu else 25), device=clock.device)
    target = torch.empty_like(source)
    copy = pick(clock.interleaved({"": lambda: target.copy_(source)}, rounds)[""])
    return Roofline(tflops(2 * size**3, product), 2 * source.nbytes / copy / 1e6)


def tflops(operations: float, milliseconds: float) -> float:
    return operations / milliseconds / 1e9


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
        "commit": os.environ.get("KVOPS_COMMIT") or _commit(),  # the variable: for a copy without its repository
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "ptxas": {name: version for name, (version, _) in assemblers().items()},
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


def _commit() -> str:
    """``3a7ad66``, with ``-dirty`` where sources differ from it; what a run itself writes does not count."""
    git = ("git", "-C", str(Path(__file__).parents[1]))
    changed = _command(*git, "status", "--porcelain", "-uno", "--", ".", ":!bench/results", ":!BENCHMARKS.md")
    commit = _command(*git, "rev-parse", "--short", "HEAD")
    return "unknown" if commit is None else commit + ("-dirty" if changed else "")


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
