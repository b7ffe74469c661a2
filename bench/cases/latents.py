"""Multi-head latent attention over a paged cache, in the shape of DeepSeek-V3: a slot is key and value at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import kvops
from bench.case import Case, Inputs, Outputs, Peer, Scale
from bench.lists import BLOCK_SIZE, gathered_slots, lengths, make_lists, sampled, slots

_MODEL = "DeepSeek-V3"
_HEADS, _VALUE_DIM, _ROTARY = 128, 512, 64
_SCALE = (128 + 64) ** -0.5  # of the heads before the absorption
_WORKSPACE = 128 << 20
# The page size that FlashMLA requires.
_FLASH_MLA_PAGE = 64


def _attend(inputs: Inputs) -> Outputs:
    tensors = (inputs[name] for name in ("q", "cache", "block_tables", "seq_lens"))
    return kvops.paged_latent_attention(*tensors, value_dim=inputs["value_dim"], scale=_SCALE)


def _sample(inputs: Inputs, outputs: Outputs) -> Outputs:
    """out [lists, T, heads, value_dim] and lse [lists, heads, T] of some sequences."""
    batch = [b for b, _ in sampled(inputs)]
    return tuple(None if value is None else value[batch] for value in (*outputs, None)[:2])


def _truth(inputs: Inputs, dtype: torch.dtype) -> Outputs:
    work = torch.promote_types(dtype, torch.float32)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a.to(dtype) @ b.to(dtype)).to(work)

    parts = []
    for b, h in sampled(inputs):
        slot = inputs["cache"].flatten(0, 1)[slots(inputs, b, h)]  # [slots, D]
        q = inputs["q"][b].transpose(0, 1)  # [heads, T, D]
        new = torch.arange(q.shape[1], device=q.device)
        hidden = torch.arange(len(slot), device=q.device) > (len(slot) - q.shape[1] + new)[:, None]
        s = (product(q, slot.T) * _SCALE).masked_fill(hidden, -math.inf)
        parts.append((product(s.softmax(-1), slot[:, : inputs["value_dim"]]).transpose(0, 1), s.logsumexp(-1)))
    return tuple(torch.stack(part) for part in zip(*parts, strict=True))


def _seen(inputs: Inputs, length: int) -> Tensor:
    """bool [B, 1, T, length]: which slots each token sees."""
    lens, T = inputs["seq_lens"][..., None, None], inputs["q"].shape[1]
    new = torch.arange(T, device=lens.device)[:, None]
    return torch.arange(length, device=lens.device) <= lens - T + new


def _gathered(inputs: Inputs) -> Callable[[], Outputs]:
    """The usual way without a kernel: gather the lists, pad them, and attend with the values' columns beside them."""

    def call() -> Outputs:
        places, _ = gathered_slots(inputs)
        slot = inputs["cache"].flatten(0, 1)[places]  # [B, 1, slots, D]
        q = inputs["q"].transpose(1, 2)  # [B, heads, T, D]
        heads = q.shape[1]
        mask = _seen(inputs, places.shape[2])
        k, v = slot.expand(-1, heads, -1, -1), slot[..., : inputs["value_dim"]].expand(-1, heads, -1, -1)
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=_SCALE)
        return (out.transpose(1, 2),)

    return call


def _flashinfer(inputs: Inputs) -> Callable[[], Outputs]:
    import flashinfer

    q, cache, V = inputs["q"], inputs["cache"], inputs["value_dim"]
    batch, tokens, heads, D = q.shape
    lens, tables = inputs["seq_lens"][:, 0], inputs["block_tables"][:, 0]
    used = (lens + BLOCK_SIZE - 1) // BLOCK_SIZE
    indices = tables[torch.arange(tables.shape[1], device=q.device) < used[:, None]]
    indptr = F.pad(used.cumsum(0), (1, 0)).int()
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * tokens
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(torch.empty(_WORKSPACE, dtype=torch.int8, device=q.device))
    wrapper.plan(starts, indptr, indices, lens, heads, V, D - V, BLOCK_SIZE, tokens > 1, _SCALE, q.dtype, cache.dtype)
    packed = q.flatten(0, 1)

    def call() -> Outputs:
        out = wrapper.run(packed[..., :V], packed[..., V:], cache[..., :V], cache[..., V:])
        return (out.unflatten(0, (batch, tokens)),)

    return call


def _flash_mla(inputs: Inputs) -> Callable[[], Outputs]:
    """The same lists in pages of its own size, copied outside the timing."""
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    q, V = inputs["q"], inputs["value_dim"]
    places, filled = gathered_slots(inputs)
    pages = -(-places.shape[2] // _FLASH_MLA_PAGE)
    padding = pages * _FLASH_MLA_PAGE - places.shape[2]
    slot = inputs["cache"].flatten(0, 1)[places] * filled[..., None]
    cache = F.pad(slot, (0, 0, 0, padding)).reshape(-1, _FLASH_MLA_PAGE, 1, q.shape[-1]).contiguous()
    table = torch.arange(len(q) * pages, dtype=torch.int32, device=q.device).view(len(q), pages)
    lens = inputs["seq_lens"][:, 0]
    metadata, splits = get_mla_metadata(lens, q.shape[1] * q.shape[2], 1)
    options = {"softmax_scale": _SCALE, "causal": True}
    return lambda: flash_mla_with_kvcache(q, cache, table, lens, V, metadata, splits, **options)


def decoding(batch: int, context: int, heads: int, value_dim: int, rotary: int, tokens: int = 1) -> Case:
    """``heads`` of the model, as many as one GPU of a group has, over lists of up to ``context``."""
    lens = lengths(batch, 1, context, ragged=True).clamp(min=tokens)
    D, rows, seen = value_dim + rotary, batch * tokens * heads, 0
    for length in lens.flatten().tolist():
        seen += tokens * length - tokens * (tokens - 1) // 2

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        inputs = make_lists(lens, D, device, dtype, generator)
        inputs["cache"] = inputs.pop("k_cache")
        del inputs["v_cache"]
        q = torch.randn(batch, tokens, heads, D, device=device, generator=generator).to(dtype)
        return inputs | {"q": q, "value_dim": value_dim}

    slots_read = int(lens.sum())
    return Case(
        op="paged_latent_attention",
        model=_MODEL,
        shape={"batch": batch, "context": context, "heads": heads} | ({"tokens": tokens} if tokens > 1 else {}),
        make_inputs=make,
        run=_attend,
        oracle=_truth,
        sample=_sample,
        flops=2 * seen * heads * (D + value_dim),
        bytes=lambda size: (slots_read * D + rows * (D + value_dim)) * size + 4 * rows,
        peers=(
            Peer("gather + SDPA", _gathered),
            Peer("FlashInfer", _flashinfer, "flashinfer-python"),
            Peer("FlashMLA", _flash_mla, "flash-mla"),
        ),
    )


def cases(scale: Scale) -> Iterator[Case]:
    if scale.name == "tiny":
        yield decoding(2, 40, 4, 16, 8)
        yield decoding(2, 40, 4, 16, 8, tokens=3)
        return
    for batch in scale.batches:
        for context in scale.contexts[:2]:
            yield decoding(batch, context, 16, _VALUE_DIM, _ROTARY)  # one of eight GPUs
    if scale.name == "full":
        yield decoding(scale.batches[-1], scale.contexts[0], _HEADS, _VALUE_DIM, _ROTARY)
        yield decoding(scale.batches[-1], scale.contexts[0], _HEADS, _VALUE_DIM, _ROTARY, tokens=2)
