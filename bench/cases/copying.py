"""Copies of shared blocks before they are written: one block of every list."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import kvops
from bench.case import LLAMA_8B, SMOLLM, Case, Inputs, Model, Outputs, Peer, Scale
from bench.lists import BLOCK_SIZE

_ARRAYS = ("k_cache", "v_cache", "positions", "scores")


def _copy(inputs: Inputs) -> Outputs:
    k_cache, v_cache, positions, scores = (inputs[name] for name in _ARRAYS)
    kvops.copy_blocks(k_cache, v_cache, inputs["source"], inputs["target"], positions=positions, scores=scores)
    return k_cache, v_cache, positions, scores


def _indexed(inputs: Inputs) -> Callable[[], Outputs]:
    """The valid entries are selected on the device in each call."""
    arrays = tuple(inputs[name] for name in _ARRAYS)

    def call() -> Outputs:
        wanted = inputs["target"] >= 0
        source, target = inputs["source"][wanted].long(), inputs["target"][wanted].long()
        for array in arrays:
            array[target] = array[source]
        return arrays

    return call


def _forget(inputs: Inputs) -> None:
    """Fill the targets with values that no source has, so that a missing copy is noticed."""
    for name in _ARRAYS:
        inputs[name][inputs["written"]] = -1


def copy(model: Model, batch: int, layers: int) -> Case:
    """All lists of a model in which ``batch`` rows write to shared blocks; one list in four shares nothing."""
    lists = batch * layers * model.kv_heads
    counts = lists - lists // 4

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        shape = (2 * lists, BLOCK_SIZE)
        cache = (torch.randn(*shape, model.head_dim, device=device, generator=generator).to(dtype) for _ in range(2))
        order = torch.randperm(2 * lists, generator=torch.Generator().manual_seed(0)).to(device, torch.int32)
        target = order[lists:].clone()
        target[counts:] = -1
        return {
            **dict(zip(("k_cache", "v_cache"), cache, strict=True)),
            "positions": torch.arange(shape[0] * BLOCK_SIZE, dtype=torch.int32, device=device).view(shape),
            "scores": torch.rand(shape, device=device, generator=generator),
            "source": order[:lists].contiguous(),
            "target": target,
            "written": order[lists:].long(),
        }

    return Case(
        op="copy_blocks",
        model=model.name,
        shape={"batch": batch, "layers": layers, "blocks": counts},
        make_inputs=make,
        run=_copy,
        oracle=lambda inputs, dtype: tuple(
            array.to(dtype if array.dim() == 3 else array.dtype)[inputs["source"][:counts].long()]
            for array in (inputs[name] for name in _ARRAYS)
        ),
        sample=lambda inputs, outputs: tuple(None if x is None else x[inputs["written"][:counts]] for x in outputs),
        reset=_forget,
        flops=0,
        bytes=lambda size: 2 * counts * BLOCK_SIZE * (2 * model.head_dim * size + 8) + 8 * lists,
        peers=(Peer("plain torch", _indexed),),
    )


def cases(scale: Scale) -> Iterator[Case]:
    layers = 2 if scale.name == "tiny" else 0
    for model in (LLAMA_8B, SMOLLM):
        shape = scale.model(model)
        yield copy(shape, scale.batches[-1], layers or shape.layers)
