"""Rows that continue from other rows: they share blocks until one of them writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvops import checks
from kvops.cache.rows import Rows

if TYPE_CHECKING:
    from kvops.cache.paged import PagedKVCache


def fork(cache: PagedKVCache, row: int, into: Rows, num_tokens: int | None) -> None:
    """See :meth:`kvops.PagedKVCache.fork`."""
    selector, pool, states = cache._selector, cache._pool, cache._states
    source = selector.one("row", row)
    selection = selector.select(into)
    if source in selection.numbers:
        raise ValueError(f"into: expected rows other than {source} itself, got {list(selection.numbers)}")
    lens, position = pool.lens[:, source], states.next_positions[source].clone()
    if num_tokens is not None:
        selector.expect_tokens(num_tokens)
        if states.compressed[source]:
            raise ValueError(f"num_tokens: expected None, as row {source} is compressed, got {num_tokens}")
        if selector.checks_data() and num_tokens > int(position):
            raise ValueError(f"num_tokens: expected at most the {int(position)} of row {source}, got {num_tokens}")
        lens, position = lens.clamp(max=num_tokens), position.clamp(max=num_tokens)
    cache.free(into)
    pool.fork(source, selection.index, selection.numbers, lens)
    states.fork(source, selection, position)


def reorder(cache: PagedKVCache, order: Sequence[int] | Tensor) -> None:
    """See :meth:`kvops.PagedKVCache.reorder`."""
    sources = _row_numbers(cache, order)
    if len(sources) != cache.max_batch:
        raise ValueError(f"order: expected a row for each of the {cache.max_batch} rows, got {len(sources)}")
    # Rows that nobody continues from take the second and further copies of the others.
    spare = sorted(set(range(cache.max_batch)).difference(sources), reverse=True)
    copies: dict[int, list[int]] = {}
    places = []  # where each row's new content is
    for source in sources:
        place = source
        if source in copies:
            place = spare.pop()
            copies[source].append(place)
        copies.setdefault(source, [])
        places.append(place)
    for source, into in copies.items():
        if into:
            cache.fork(source, into)
    if places != list(range(cache.max_batch)):
        index = torch.tensor(places, device=cache.device)
        cache._selector.changed()
        cache._pool.permute(index, places)
        cache._states.take(cache._states, index, places)


def with_rows(cache: PagedKVCache, order: Sequence[int] | Tensor, num_blocks: int | None) -> PagedKVCache:
    """See :meth:`kvops.PagedKVCache.with_rows`."""
    sources = _row_numbers(cache, order)
    checks.expect_at_least("order (rows)", len(sources), 1)
    checks.expect_at_least("num_blocks", num_blocks or cache.num_blocks, cache.num_blocks)
    sizes: dict[str, Any] = {name: getattr(cache, name) for name in ("num_layers", "num_kv_heads", "block_size")}
    sizes |= {name: getattr(cache, name) for name in ("max_tokens", "device", "k_scale", "v_scale")}
    new = type(cache)(
        **sizes,
        head_dim=cache.k_cache.shape[2],
        v_head_dim=cache.v_cache.shape[2],
        dtype=cache.k_cache.dtype,
        v_dtype=cache.v_cache.dtype,
        num_blocks=num_blocks or cache.num_blocks,
        max_batch=len(sources),
        slot_scales=cache.k_slot_scale is not None or cache.v_slot_scale is not None,
    )
    for name, side in cache._storage.sides.items():
        new._storage.sides[name][: cache.num_blocks].copy_(side)
    index = torch.tensor(sources, device=cache.device)
    no_prefixes = torch.zeros(0, dtype=torch.int32, device=cache.device)
    new._pool.restore(cache.block_tables[:, index], cache.seq_lens[:, index], no_prefixes)
    new._states.take(cache._states, index, sources)
    return new


def _row_numbers(cache: PagedKVCache, order: Sequence[int] | Tensor) -> list[int]:
    return [cache._selector.one("order", row) for row in (order.tolist() if isinstance(order, Tensor) else order)]
