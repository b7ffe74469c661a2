"""Several processes for a test, forked from one that has imported torch: that takes seconds and is done once."""

import multiprocessing
import socket
from collections.abc import Callable
from pathlib import Path

import torch.multiprocessing

PRELOADED = ["torch.distributed.fsdp", "kvops.generation.generate", "kvops.models.tensor_parallel", "kvops.parallel"]


def start(function: Callable[[int, int, Path], None], folder: Path, count: int) -> None:
    """Run ``function(rank, port, folder)`` in ``count`` processes; the port is a free one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(function, (port, folder), nprocs=count, start_method="forkserver")
