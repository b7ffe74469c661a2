"""Eviction: selecting slots for a budget, and compaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import kvops
from bench.case import LLAMA_8B, SMOLLM, Case, Inputs, Model, Outputs, Peer, Scale
from bench.lists import BLOCK_SIZE, gathered_slots, lengths, make_lists, sampled, slots


def _lens(model: Model, batch: int, context: int, *, ragged: bool, layers: int) -> Tensor:
    """All (layer, head) pairs of a sequence side by side, as one call serves a whole model."""
    return lengths(batch, layers * model.kv_heads, context, ragged=ragged)


def _select(inputs: Inputs) -> Outputs:
    return kvops.select_blocks(
        *(inputs[name] for name in ("scores", "block_tables", "seq_lens", "budget")), scope=inputs["scope"]
    )


def _select_truth(inputs: Inputs, dtype: torch.dtype) -> Outputs:
    """The kept slots, in order of preference: one list at a time, on the CPU, in Python."""
    scores, budget = inputs["scores"].flatten().double().cpu(), inputs["budget"].tolist()
    lens, tables = inputs["seq_lens"].cpu(), inputs["block_tables"].cpu()
    B, H = lens.shape
    keep = torch.zeros(B, H, tables.shape[2] * BLOCK_SIZE, dtype=torch.bool)
    local = {"seq_lens": lens, "block_tables": tables}
    for b in range(B):
        # Best first; of equals the later slot.
        order, worth = [], []
        for h in range(H):
            values = scores[slots(local, b, h)]
            best = values.flip(0).argsort(descending=True, stable=True)
            order.append(len(values) - 1 - best)
            ranked = values[order[-1]]
            worth.append(
                [ranked[start : start + BLOCK_SIZE].sum().item() for start in range(0, len(values), BLOCK_SIZE)]
            )
        for h, share in enumerate(_shares(worth, budget[b], inputs["scope"])):
            keep[b, h, order[h][: share * BLOCK_SIZE]] = True
    device = inputs["scores"].device
    return keep.sum(2, dtype=torch.int32).to(device), keep.to(device)


def _shares(worth: list[list[float]], budget: int, scope: str) -> list[int]:
    """Blocks of each head of one sequence, given what each head's next best blocks are worth."""
    shares = [0] * len(worth)
    if scope == "sequence":
        every = ((-value, block, head) for head, values in enumerate(worth) for block, value in enumerate(values))
        for _, _, head in sorted(every)[:budget]:
            shares[head] += 1
        return shares
    while budget and any(share < len(values) for share, values in zip(shares, worth, strict=True)):
        for head, values in enumerate(worth):
            if budget and shares[head] < len(values):
                shares[head] += 1
                budget -= 1
    return shares


def _select_plain(inputs: Inputs) -> Callable[[], Outputs]:
    """topk, as eviction is written without ragged lists: every head of a sequence its share, or all heads together.

    It returns no lengths, uses the first sequence's budget for all, and does not order equal scores or NaN.
    """
    budget, heads = inputs["budget"], inputs["seq_lens"].shape[1]

    def call() -> Outputs:
        places, filled = gathered_slots(inputs)
        found = inputs["scores"].flatten()[places].masked_fill(~filled, float("-inf"))
        keep = torch.zeros_like(filled)
        if inputs["scope"] == "head":
            kept = min(int(budget[0]) // heads * BLOCK_SIZE, found.shape[2])
            keep.scatter_(2, found.topk(kept, 2).indices, True)
            return None, keep & filled
        ranked, order = found.sort(2, descending=True)
        worth = ranked.masked_fill(~filled, 0.0).unflatten(2, (-1, BLOCK_SIZE)).sum(3)
        used = (inputs["seq_lens"][..., None] + BLOCK_SIZE - 1) // BLOCK_SIZE
        worth = worth.masked_fill(torch.arange(worth.shape[2], device=worth.device) >= used, float("-inf"))
        best = worth.flatten(1).topk(min(int(budget[0]), worth.flatten(1).shape[1]), 1).indices
        taken = torch.zeros_like(worth, dtype=torch.bool).flatten(1).scatter_(1, best, True).view(worth.shape)
        keep.scatter_(2, order, taken.repeat_interleave(BLOCK_SIZE, 2))
        return None, keep & filled

    return call


def select(model: Model, batch: int, context: int, *, scope: str, keep: int = 8, layers: int = 1) -> Case:
    """One ``keep``-th of the blocks stays. Heads have equal lengths, as after a prompt."""
    lens = _lens(model, batch, context, ragged=False, layers=layers)
    total, lists = int(lens.sum()), lens.numel()
    blocks = -(-context // BLOCK_SIZE)

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        inputs = make_lists(lens, 1, device, dtype, generator)
        budget = max(1, blocks // keep) * lens.shape[1]
        return inputs | {"scope": scope, "budget": torch.full((batch,), budget, dtype=torch.int32, device=device)}

    return Case(
        op="select_blocks",
        model=model.name,
        shape={"batch": batch, "context": context, "lists": lists, "scope": f"scope {scope}"},
        make_inputs=make,
        run=_select,
        oracle=_select_truth,
        flops=0,
        bytes=lambda size: 4 * total + 4 * lists * blocks + lists * blocks * BLOCK_SIZE + 8 * lists,
        peers=(Peer("plain torch", _select_plain),),
    )


def _compact(inputs: Inputs) -> Outputs:
    arguments = (inputs[name] for name in ("k_cache", "v_cache", "block_tables", "seq_lens", "keep"))
    freed = kvops.compact(*arguments, scores=inputs["scores"])
    return freed, inputs["seq_lens"], inputs["k_cache"], inputs["v_cache"], inputs["scores"]


def _compact_truth(inputs: Inputs, dtype: torch.dtype) -> Outputs:
    """Moves one list at a time, from copies of the caches."""
    filled = gathered_slots(inputs)[1]
    kept = (inputs["keep"] & filled).sum(2, dtype=torch.int32)
    blocks = [(lens + BLOCK_SIZE - 1) // BLOCK_SIZE for lens in (inputs["seq_lens"], kept)]
    moved: list[Tensor] = []
    for name in ("k_cache", "v_cache", "scores"):
        rows = inputs[name].flatten(0, 1)
        lists = [
            rows[slots(inputs, b, h)[inputs["keep"][b, h, : inputs["seq_lens"][b, h]]]] for b, h in inputs["compared"]
        ]
        moved.append(torch.cat(lists).to(dtype if name != "scores" else torch.float32))
    return blocks[0] - blocks[1], kept, *moved


def _compact_sample(inputs: Inputs, outputs: Outputs) -> Outputs:
    freed, lens, *caches = outputs
    picked = [
        None
        if cache is None
        else torch.cat([cache.flatten(0, 1)[slots(inputs, b, h, inputs["kept"][b][h])] for b, h in inputs["compared"]])
        for cache in caches
    ]
    return freed, lens, *picked


def _compact_plain(inputs: Inputs) -> Callable[[], Outputs]:
    """Gather what is kept, list by list in one indexing, and write it to the front."""

    def call() -> Outputs:
        places, filled = gathered_slots(inputs)
        kept = inputs["keep"] & filled
        new_lens = kept.sum(2, dtype=torch.int32)
        target = places.gather(2, (kept.cumsum(2) - 1).clamp(min=0))[kept]
        source = places[kept]
        for name in ("k_cache", "v_cache", "scores"):
            rows = inputs[name].flatten(0, 1)
            rows[target] = rows[source]
        used = [(lens + BLOCK_SIZE - 1) // BLOCK_SIZE for lens in (inputs["seq_lens"], new_lens)]
        inputs["seq_lens"].copy_(new_lens)
        return used[0] - used[1], inputs["seq_lens"], inputs["k_cache"], inputs["v_cache"], inputs["scores"]

    return call


def _restore(inputs: Inputs) -> None:
    for name, original in inputs["originals"].items():
        inputs[name].copy_(original)


def compact(model: Model, batch: int, context: int, *, keep: int = 8) -> Case:
    """A random ``keep``-th of the slots stays, of every list."""
    lens = _lens(model, batch, context, ragged=True, layers=1)
    total, lists, D = int(lens.sum()), lens.numel(), model.head_dim
    capacity = -(-int(lens.max()) // BLOCK_SIZE) * BLOCK_SIZE
    chosen = torch.rand(*lens.shape, capacity, generator=torch.Generator().manual_seed(0)) < 1 / keep
    chosen &= torch.arange(capacity) < lens[..., None]
    kept = chosen.sum(2)
    # Slots that are already in place are not moved.
    moved = int((chosen & (chosen.cumsum(2) - 1 != torch.arange(capacity))).sum())

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        inputs = make_lists(lens, D, device, dtype, generator)
        inputs |= {"keep": chosen.to(device), "kept": kept.tolist(), "compared": sampled(inputs)}
        names = ("k_cache", "v_cache", "scores", "seq_lens")
        return inputs | {"originals": {name: inputs[name].clone() for name in names}}

    return Case(
        op="compact",
        model=model.name,
        shape={"batch": batch, "context": context, "kept": f"1 in {keep}"},
        make_inputs=make,
        run=_compact,
        oracle=_compact_truth,
        sample=_compact_sample,
        reset=_restore,
        flops=0,
        bytes=lambda size: 2 * moved * (2 * D * size + 4) + total + 4 * lists * (capacity // BLOCK_SIZE) + 12 * lists,
        peers=(Peer("plain torch", _compact_plain),),
    )


def cases(scale: Scale) -> Iterator[Case]:
    llama, smollm = scale.model(LLAMA_8B), scale.model(SMOLLM)
    for context in scale.contexts:
        for scope in ("head", "sequence"):
            yield select(llama, scale.batches[0], context, scope=scope)
    yield select(smollm, scale.batches[-1], scale.contexts[0], scope="sequence")
    # All layers at once: the heads of a whole model compete.
    layers = SMOLLM.layers if scale.name != "tiny" else 2
    yield select(smollm, 1, scale.contexts[0], scope="sequence", layers=layers)
    for context in scale.contexts:
        yield compact(llama, scale.batches[0], context)
    yield compact(llama, scale.batches[-1], scale.contexts[0])
    yield compact(smollm, scale.batches[-1], scale.contexts[0], keep=2)
