"""A step of an engine over the paged cache: most requests decode, one reads a chunk of its prompt, without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate

import torch
import torch.nn.functional as F

import kvops
from bench import truth
from bench.case import LLAMA_8B, Case, Inputs, Model, Outputs, Peer, Scale
from bench.lists import BLOCK_SIZE, lengths, make_lists, sampled, slots

_CACHE = ("k_cache", "v_cache", "block_tables", "seq_lens")


def _attend(inputs: Inputs) -> Outputs:
    ends, longest = inputs["cu_seqlens_q"], max(inputs["q_lens"])
    cache = (inputs[name] for name in _CACHE)
    return kvops.paged_attention(inputs["q"], *cache, cu_seqlens_q=ends, max_seqlen_q=longest)


def _rows(inputs: Inputs, b: int) -> slice:
    start = sum(inputs["q_lens"][:b])
    return slice(start, start + inputs["q_lens"][b])


def _sample(inputs: Inputs, outputs: Outputs) -> Outputs:
    """out and lse of the compared lists, one behind another."""
    group = inputs["q"].shape[1] // inputs["seq_lens"].shape[1]
    out, lse = (*outputs, None)[:2]
    parts = [(_rows(inputs, b), slice(h * group, (h + 1) * group)) for b, h in sampled(inputs)]
    return (
        None if out is None else torch.cat([out[rows, heads].flatten() for rows, heads in parts]),
        None if lse is None else torch.cat([lse[heads, rows].flatten() for rows, heads in parts]),
    )


def _truth(inputs: Inputs, dtype: torch.dtype) -> Outputs:
    group = inputs["q"].shape[1] // inputs["seq_lens"].shape[1]
    parts = []
    for b, h in sampled(inputs):
        where = slots(inputs, b, h)
        k, v = (inputs[name].flatten(0, 1)[where] for name in ("k_cache", "v_cache"))
        parts.append(
            truth.attention(inputs["q"][_rows(inputs, b), h * group : (h + 1) * group], k, v, dtype, causal=True)
        )
    return tuple(torch.cat([part[name].flatten() for part in parts]) for name in ("out", "lse"))


def _one_by_one(inputs: Inputs) -> Callable[[], Outputs]:
    """Gather the lists of each request, pad them, and attend: one call of SDPA for each."""
    lens, tables = inputs["seq_lens"], inputs["block_tables"].long()
    offset = torch.arange(BLOCK_SIZE, device=tables.device)
    longest = [int(row.max()) for row in lens]

    def call() -> Outputs:
        out = torch.empty_like(inputs["q"])
        for b, T in enumerate(inputs["q_lens"]):
            places = (tables[b, :, : -(-longest[b] // BLOCK_SIZE), None] * BLOCK_SIZE + offset).flatten(1)
            k, v = (inputs[name].flatten(0, 1)[places][None] for name in ("k_cache", "v_cache"))
            query = lens[b, :, None, None] - T + torch.arange(T, device=lens.device)[:, None]  # [Hkv, T, 1]
            seen = torch.arange(places.shape[1], device=lens.device) <= query
            q = inputs["q"][_rows(inputs, b)].transpose(0, 1)[None]
            mask = seen.repeat_interleave(q.shape[1] // k.shape[1], 0)
            out[_rows(inputs, b)] = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1)
        return (out,)

    return call


def mixed(model: Model, batch: int, context: int, chunk: int) -> Case:
    """``batch`` - 1 requests decode a token each, and one reads ``chunk`` tokens."""
    q_lens = [*[1] * (batch - 1), chunk]
    lens = lengths(batch, model.kv_heads, context, ragged=True)
    lens[-1].clamp_(min=chunk)
    D, rows = model.head_dim, sum(q_lens) * model.heads
    seen = sum(truth.pairs(q_lens[b], int(length), True) for b, row in enumerate(lens) for length in row)

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        q = torch.randn(sum(q_lens), model.heads, D, device=device, generator=generator).to(dtype)
        ends = torch.tensor([0, *accumulate(q_lens)], dtype=torch.int32, device=device)
        return make_lists(lens, D, device, dtype, generator) | {"q": q, "q_lens": q_lens, "cu_seqlens_q": ends}

    return Case(
        op="paged_attention",
        model=model.name,
        shape={
            "batch": batch,
            "context": context,
            "lengths": "ragged",
            "packed": f"{batch - 1} decode + 1 reads {chunk}",
        },
        make_inputs=make,
        run=_attend,
        oracle=_truth,
        sample=_sample,
        flops=4 * seen * model.group * D,
        bytes=lambda size: 2 * (int(lens.sum()) + rows) * D * size + 4 * rows,
        peers=(Peer("gather + SDPA, each request", _one_by_one),),
    )


def cases(scale: Scale) -> Iterator[Case]:
    context = scale.contexts[0]
    yield mixed(scale.model(LLAMA_8B, cached=True), scale.batches[-1], context, context // 4)
