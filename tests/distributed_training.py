"""What the processes of tests/test_torch_features.py train; processes of their own, so in a module of its own."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from kvops.nn import Attention

WORLD = 2


def make_layers() -> torch.nn.Sequential:
    torch.manual_seed(5)
    return torch.nn.Sequential(*(Attention(24, 6, num_kv_heads=2, rope=100.0, window=4, sinks=True) for _ in range(2)))


def batch() -> torch.Tensor:
    return torch.randn(WORLD, 7, 24, generator=torch.Generator().manual_seed(6))


def loss_of(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def train(rank: int, port: int, folder: Path) -> None:
    """Gradients by wrapper and parameter, of this process's half of the batch averaged over the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    mesh, results = init_device_mesh("cpu", (WORLD,)), {}
    for kind in ("ddp", "fsdp"):
        model = make_layers()
        if kind == "ddp":
            model = DistributedDataParallel(model)
        else:
            for layer in model:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        loss_of(model, batch()[rank : rank + 1]).backward()
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.full_tensor() if kind == "fsdp" else parameter.grad
            results[kind, name.removeprefix("module.")] = gradient
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
