"""Ragged lists of a paged cache for the benchmarks: random lengths, a shuffled pool, and lists gathered again."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.case import Inputs
from kvops.cache import huge_pages

BLOCK_SIZE = 16


def lengths(batch: int, heads: int, context: int, *, ragged: bool) -> Tensor:
    """int32 ``[batch, heads]``, the same at every call: all ``context``, or from an eighth of it to all (mean a half).

    Heads that compete for a budget end up so far apart.
    """
    if not ragged:
        return torch.full((batch, heads), context, dtype=torch.int32)
    generator = torch.Generator().manual_seed(batch * 1000003 + heads)
    share = torch.rand(batch, heads, generator=generator) * 0.875 + 0.125
    return (share * context).ceil().to(torch.int32)


def heavy_tailed(batch: int, heads: int, mean: int, longest: int = 16) -> Tensor:
    """int32 ``[batch, heads]``, the same at every call: Pareto's lengths, the longest ``longest`` times the mean.

    They sum to what ``batch * heads`` equal lists of ``mean`` hold. Too few lists for that get a shorter longest one.
    """
    lists = batch * heads
    longest = min(longest, max(1, lists // 2))
    quantile = (torch.arange(lists, dtype=torch.float64) + 0.5) / lists
    low, high = 0.0, 8.0  # the exponent that gives the longest list its length
    for _ in range(50):
        middle = (low + high) / 2
        share = quantile**-middle
        low, high = (middle, high) if share.max() < longest * share.mean() else (low, middle)
    share = quantile**-high
    lens = (share * (mean / share.mean())).round().clamp(min=1).to(torch.int32)
    lens[0] += mean * lists - lens.sum()  # what rounding took or gave
    order = torch.randperm(lists, generator=torch.Generator().manual_seed(0))
    return lens[order].view(batch, heads)


def make_lists(
    lens: Tensor, head_dim: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Inputs:
    """k_cache, v_cache, block_tables, seq_lens, positions and scores; blocks lie in the pool in random order."""
    used = (lens + BLOCK_SIZE - 1) // BLOCK_SIZE
    max_blocks, num_blocks = int(used.max()), int(used.sum())
    tables = torch.zeros(*lens.shape, max_blocks, dtype=torch.int32)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    tables[torch.arange(max_blocks) < used[..., None]] = order

    def cache() -> Tensor:
        shape = (num_blocks, BLOCK_SIZE, head_dim)
        return in_huge_pages(torch.randn(shape, device=device, generator=generator).to(dtype))

    return {
        "k_cache": cache(),
        "v_cache": cache(),
        "block_tables": tables.to(device),
        "seq_lens": lens.to(device, copy=True),  # compaction shortens them
        "positions": torch.arange(num_blocks * BLOCK_SIZE, dtype=torch.int32, device=device).view(-1, BLOCK_SIZE),
        "scores": torch.rand(num_blocks, BLOCK_SIZE, device=device, generator=generator),
    }


def in_huge_pages(x: Tensor) -> Tensor:
    """A copy where a :class:`kvops.PagedKVCache` has its keys and values, for every contender alike."""
    return huge_pages.empty(x.shape, x.dtype, x.device).copy_(x)


def sampled(inputs: Inputs) -> list[tuple[int, int]]:
    """The (sequence, KV head) lists that are compared: the first, the last, the longest and the shortest."""
    lens = inputs["seq_lens"]
    heads = lens.shape[1]
    places = {0, lens.numel() - 1, int(lens.flatten().argmax()), int(lens.flatten().argmin())}
    return [(place // heads, place % heads) for place in sorted(places)]


def slots(inputs: Inputs, batch: int, head: int, length: int | None = None) -> Tensor:
    """int64: where the slots of one list lie in the flattened pool, in the order of the list."""
    length = int(inputs["seq_lens"][batch, head]) if length is None else length
    slot = torch.arange(length, device=inputs["block_tables"].device)
    return inputs["block_tables"][batch, head].long()[slot // BLOCK_SIZE] * BLOCK_SIZE + slot % BLOCK_SIZE


def gathered_slots(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """int64 and bool ``[B, Hkv, slots]``: every list's places in the flattened pool, and which of them are filled."""
    tables = inputs["block_tables"].long()
    offset = torch.arange(BLOCK_SIZE, device=tables.device)
    places = (tables[..., None] * BLOCK_SIZE + offset).flatten(2)
    return places, torch.arange(places.shape[2], device=tables.device) < inputs["seq_lens"][..., None]
