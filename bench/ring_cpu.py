"""Context parallelism on this CPU: ring attention in several processes beside SDPA that gathers all keys and values.

    python -m bench.ring_cpu --json bench/results/cpu/ring.json

Each process has one thread and its part of one sequence. Every contender computes causal attention and its gradients
for all tokens: kvops by ``ring_attention`` over two chunks for each process, one from each end; SDPA over one chunk for
each process, its keys and values gathered by ``torch.distributed`` (whose last process has the most to do). One process
with all tokens and as many threads is the third. Results are compared with that one before anything is timed. A round
takes as long as its slowest process; contenders take turns, and ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

import kvops
from bench import results, table
from bench.timing import setting
from kvops.cli.console import positive, quiet_without_reader
from kvops.parallel import ring_attention, shard

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
CASES: tuple[dict[str, Any], ...] = (
    {"tokens": 4096, "mask": "causal"},
    {"tokens": 8192, "mask": "causal"},
    {"tokens": 8192, "mask": "window of 1024"},
    {"tokens": 8192, "mask": "8 documents"},
)
RING, GATHERED, ALONE = "ring_attention", "gathered SDPA", "one process"


def _inputs(tokens: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, [1, tokens, heads, head_dim], the same on every process."""
    generator = torch.Generator().manual_seed(0)
    heads = HEADS, KV_HEADS, KV_HEADS, HEADS
    return [torch.randn(1, tokens, count, HEAD_DIM, generator=generator) for count in heads]


def _options(case: dict[str, Any]) -> dict[str, Any]:
    return {"causal": True, "window_left": 1023 if "window" in case["mask"] else -1}


def _ends(case: dict[str, Any]) -> list[int] | None:
    return list(range(0, case["tokens"] + 1, case["tokens"] // 8)) if "documents" in case["mask"] else None


def _step(attend: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The output and the gradients of q, k and v."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    out = attend(q, k, v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])


def _ring(case: dict[str, Any]) -> Callable[[], tuple[Tensor, ...]]:
    tensors, ends = [shard(x) for x in _inputs(case["tokens"])], _ends(case)
    if ends is None:
        return lambda: _step(lambda q, k, v: ring_attention(q, k, v, **_options(case))[0], tensors)
    tensors = [x[0] for x in tensors]
    return lambda: _step(lambda q, k, v: ring_attention(q, k, v, cu_seqlens=ends, **_options(case))[0], tensors)


def _gathered(case: dict[str, Any]) -> Callable[[], tuple[Tensor, ...]]:
    """With a mask, except where causality alone hides keys behind the rows of this process."""
    size, rank, tokens = dist.get_world_size(), dist.get_rank(), case["tokens"]
    tensors = [x.chunk(size, 1)[rank].contiguous() for x in _inputs(tokens)]
    rows = torch.arange(tokens).chunk(size)[rank][:, None]
    last = int(rows[-1]) + 1
    columns = torch.arange(last)
    seen = columns <= rows
    if "window" in case["mask"]:
        seen &= columns >= rows - 1023
    if "documents" in case["mask"]:
        seen &= columns // (tokens // 8) == rows // (tokens // 8)

    mesh = DeviceMesh("cpu", list(range(size)))

    def whole(x: Tensor) -> Tensor:
        return DTensor.from_local(x, mesh, [Shard(1)], run_check=False).full_tensor(grad_placements=[Partial()])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (whole(x)[:, :last].transpose(1, 2) for x in (k, v))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, seen, enable_gqa=True)
        return out.transpose(1, 2)

    return lambda: _step(attend, tensors)


def _alone(case: dict[str, Any]) -> Callable[[], tuple[Tensor, ...]]:
    tensors, ends = _inputs(case["tokens"]), _ends(case)
    if ends is None:
        return lambda: _step(lambda q, k, v: kvops.flash_attention(q, k, v, **_options(case))[0], tensors)
    cu_seqlens, longest = torch.tensor(ends, dtype=torch.int32), case["tokens"] // 8
    packed = cu_seqlens, cu_seqlens, longest, longest

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kvops.flash_attention_varlen(q[0], k[0], v[0], *packed, **_options(case))[0][None]

    return lambda: _step(attend, tensors)


def _compare(case: dict[str, Any], calls: dict[str, Callable[[], tuple[Tensor, ...]]]) -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    whole = _alone(case)()
    for name, ours in ((RING, [shard(x) for x in whole]), (GATHERED, [x.chunk(size, 1)[rank] for x in whole])):
        for got, expected in zip(calls[name](), ours, strict=True):
            torch.testing.assert_close(got.view(expected.shape), expected, rtol=1e-4, atol=1e-4)


def _run(rank: int, size: int, port: int, rounds: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    rows = []
    for case in CASES:
        calls = {RING: _ring(case), GATHERED: _gathered(case)}
        _compare(case, calls)
        seconds: dict[str, list[float]] = {name: [] for name in (*calls, ALONE)}
        for _ in range(rounds):
            for name, call in calls.items():
                dist.barrier()
                started = time.perf_counter()
                call()
                dist.barrier()
                seconds[name].append(time.perf_counter() - started)
            if rank == 0:
                torch.set_num_threads(size)
                alone = _alone(case)
                started = time.perf_counter()
                alone()
                seconds[ALONE].append(time.perf_counter() - started)
                torch.set_num_threads(1)
        if rank == 0:
            others = {
                name: statistics.median(b / a for a, b in zip(seconds[RING], seconds[name], strict=True))
                for name in (GATHERED, ALONE)
            }
            rows.append(
                case
                | {"seconds": round(statistics.median(seconds[RING]), 2)}
                | {f"x {name}": round(ratio, 2) for name, ratio in others.items()}
            )
            print(".", end="", file=sys.stderr, flush=True)
    if rank == 0:
        print(file=sys.stderr)
        torch.save(rows, path)
    dist.destroy_process_group()


@quiet_without_reader
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=positive, default=2)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--json", type=Path, metavar="PATH")
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with TemporaryDirectory() as folder:
        found = Path(folder, "rows.pt")
        given = arguments.processes, port, arguments.rounds, str(found)
        torch.multiprocessing.start_processes(_run, given, nprocs=arguments.processes, start_method="spawn")
        rows = torch.load(found)
    facts = setting(torch.device("cpu")) | {
        "threads": 1, "processes": arguments.processes, "rounds": arguments.rounds, "dtype": "float32",
        "heads": f"{HEADS} of {HEAD_DIM} for queries, {KV_HEADS} for keys", "passes": "forward and backward",
    }  # fmt: skip
    if arguments.json:
        results.save(arguments.json, "ring", facts, rows)
    print(table.render([[*map(str, row.values())] for row in rows], list(rows[0]), "simple", left=2))
    print(table.setting_text(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
