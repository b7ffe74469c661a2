"""Tensor parallelism of the reference model: every process of a device mesh holds some of the heads.

Shoeybi et al. 2019, "Megatron-LM" (arXiv:1909.08053), on torch's DTensor. The weights of queries, keys, values and the
first half of the feed-forward layer are split by rows. The weights that follow them are split by columns. Two
all-reduces in each layer restore the residual stream. A cache made for the model holds the KV heads of this process
only: lengths, scores and eviction are local, and a head competes for the budget with the other heads of its process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from kvops.models.config import LlamaConfig
from kvops.models.llama import Llama, LlamaLayer

_BY_ROWS = (
    *("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight"),
    *("q_proj.bias", "k_proj.bias", "v_proj.bias"),
)
_BY_COLUMNS = ("o_proj.weight", "down_proj.weight")


def tensor_parallel(config: LlamaConfig, weights: Mapping[str, Tensor], mesh: DeviceMesh) -> Llama:
    """The part of a model that belongs to this process of a one-dimensional ``mesh``.

    ``weights`` are those of the whole model, as :class:`~kvops.models.llama.Llama` takes them: the same on every
    process, on the mesh's device type. The ``config`` of the returned model counts the heads of this process. Hidden
    states and logits are complete and the same on every process. The model can be trained: each process has the
    gradients of its part of the split weights, and all have the same gradients of norms and embeddings.

    Raises:
        ValueError: ``num_kv_heads``, ``num_heads`` or ``intermediate_size`` does not divide by the processes.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh: expected one dimension, got {mesh.ndim}: pass mesh[name]")
    size = mesh.size()
    for name in ("num_kv_heads", "num_heads", "intermediate_size"):
        if getattr(config, name) % size:
            raise ValueError(f"{name}: expected a multiple of the mesh's {size} processes, got {getattr(config, name)}")
    local = replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=config.num_kv_heads // size,
        intermediate_size=config.intermediate_size // size,
    )
    model = Llama(local, {name: _part(name, weight, mesh) for name, weight in weights.items()})
    for layer in model.modules():
        if isinstance(layer, LlamaLayer):
            for entry in (layer.qkv, layer.gate_up):
                entry.register_forward_pre_hook(_enter(mesh))
            for end in (layer.out, layer.down):
                end.register_forward_hook(_leave(mesh))
    return model


def _part(name: str, weight: Tensor, mesh: DeviceMesh) -> Tensor:
    if name.endswith(_BY_ROWS):
        placement: Placement = Shard(0)
    elif name.endswith(_BY_COLUMNS):
        placement = Shard(1)
    else:
        return weight
    # Every process has the whole weight already: nothing is sent.
    return distribute_tensor(weight, mesh, [placement], src_data_rank=None).to_local()


def _enter(mesh: DeviceMesh) -> Any:
    """Hook before weights split by rows: every process has the same input, and its gradients are summed."""

    def hook(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        whole = DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)
        return whole.to_local(grad_placements=[Partial()])

    return hook


def _leave(mesh: DeviceMesh) -> Any:
    """Hook after weights split by columns: the outputs of all processes are summed."""

    def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        part = DTensor.from_local(output, mesh, [Partial()], run_check=False)
        return part.redistribute(placements=[Replicate()]).to_local()

    return hook
