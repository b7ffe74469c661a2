"""A small paged cache and tokens whose keys and values name where they belong."""

import torch

import kvops

LAYERS, ROWS, HEADS, SIZE, BLOCKS, CAPACITY = 2, 3, 2, 4, 64, 40


def make_cache(device, **changes) -> kvops.PagedKVCache:
    sizes = {
        "num_layers": LAYERS,
        "num_kv_heads": HEADS,
        "head_dim": 3,
        "v_head_dim": 2,
        "num_blocks": BLOCKS,
        "max_batch": ROWS,
        "max_tokens": CAPACITY,
        "block_size": SIZE,
        "device": device,
    }
    return kvops.PagedKVCache(**{**sizes, **changes})


def blocks(tokens: int) -> int:
    return -(-tokens // SIZE)


def name_of(layer: int, row: int, head: int, position: int) -> float:
    return ((layer * 8 + row) * 8 + head) * 1000 + position


def feed(cache, new: int, *, rows=slice(None), q_lens=None, first: float = 0.0):
    """Extend ``rows`` by ``new`` tokens and append keys and values that name layer, row, head and position."""
    numbers = list(range(cache.max_batch))[rows] if isinstance(rows, slice) else list(rows)
    device = cache.k_cache.device
    lens = None if q_lens is None else torch.tensor(q_lens, dtype=torch.int32, device=device)
    positions = cache.extend(new, q_lens=lens, rows=rows)
    heads = torch.arange(cache.num_kv_heads, device=device)
    row = torch.tensor(numbers, device=device)[:, None, None]
    widths = cache.k_cache.shape[-1], cache.v_cache.shape[-1]
    wide = [side.dtype for side in (cache.k_cache, cache.v_cache) if side.dtype.itemsize > 1]
    dtype = wide[0] if wide else torch.float32
    for layer in range(cache.num_layers):
        name = first + name_of(layer, row, heads, positions[..., None]).to(dtype)  # [rows, new, heads]
        k, v = (side[..., None].repeat(1, 1, 1, width) for side, width in zip((name, -name), widths, strict=True))
        cache.append(layer, k, v, positions, q_lens=lens, rows=rows)
    return positions


def slots_of(cache, side, layer, row, head):
    length = int(cache.seq_lens[layer, row, head])
    table = cache.block_tables[layer, row, head, : -(-length // cache.block_size)].long()
    return side[table].flatten(0, 1)[:length].tolist()


def raw_state(cache) -> dict:
    """Everything a cache holds, block numbers and bytes included: equal before and after an operation that is refused.

    The host's bounds are left out: a refusal may read exact numbers into them.
    """
    pool, prefixes = cache._pool, cache._prefixes
    tensors = {
        **cache._storage.sides,
        "next_positions": cache.next_positions,
        "settled": cache._states.settled,
        **{name: getattr(pool, name) for name in ("tables", "lens", "held", "sharers", "free", "free_count")},
    }
    return {
        **{name: _bytes(tensor) for name, tensor in tensors.items()},
        "compressed": list(cache.compressed),
        "prefixes": [
            (key, entry.parent, entry.depth, entry.used, entry.children, entry.blocks.tolist())
            for key, entry in prefixes.entries.items()
        ],
    }


def whole_state(cache) -> dict:
    """Everything that decides what a cache does next: equal for a cache and the one loaded from its file.

    Blocks are numbered in the order in which lists and prefixes go through them. Blocks that a list kept for tokens to
    come are left out, as they are in a file.
    """
    number: dict[int, int] = {}

    def numbered(blocks: torch.Tensor) -> list[int]:
        return [number.setdefault(block, len(number)) for block in blocks.flatten().tolist()]

    def contents(blocks: torch.Tensor, length: int) -> list[bytes]:
        # As bytes: indexing knows no float8.
        parts = (side.view(torch.uint8)[blocks.flatten().long()].flatten(0, 1)[:length] for side in sides(cache))
        return [_bytes(part) for part in parts]

    lists, prefixes = {}, []
    for place in torch.cartesian_prod(*(torch.arange(size) for size in cache.seq_lens.shape)).tolist():
        length = int(cache.seq_lens[tuple(place)])
        table = cache.block_tables[tuple(place)][: -(-length // cache.block_size)]
        lists[tuple(place)] = (length, numbered(table), contents(table, length))
    for key in cache._prefixes.oldest_first():
        entry = cache._prefixes.entries[key]
        held = contents(entry.blocks, entry.blocks.numel() * cache.block_size)
        prefixes.append((key, entry.parent, entry.depth, entry.children, numbered(entry.blocks), held))
    sizes = "num_layers num_kv_heads num_blocks max_batch max_tokens max_blocks block_size device"
    return {
        **{name: getattr(cache, name) for name in sizes.split()},
        "sides": [(side.dtype, side.shape) for side in sides(cache)],
        "scales": [None if scale is None else scale.tolist() for scale in (cache.k_scale, cache.v_scale)],
        "lists": lists,
        "prefixes": prefixes,
        "next_positions": cache.next_positions.tolist(),
        "settled": cache._states.settled.tolist(),
        "compressed": list(cache.compressed),
    }


def sides(cache) -> tuple[torch.Tensor, ...]:
    """What a block holds: keys, values, positions, scores and scales of slots."""
    return tuple(cache._storage.sides.values())


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
