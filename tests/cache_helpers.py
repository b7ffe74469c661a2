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
    dtype = torch.float32 if cache.k_cache.dtype.itemsize == 1 else cache.k_cache.dtype
    for layer in range(cache.num_layers):
        name = first + name_of(layer, row, heads, positions[..., None]).to(dtype)  # [rows, new, heads]
        k, v = (side[..., None].repeat(1, 1, 1, width) for side, width in zip((name, -name), widths, strict=True))
        cache.append(layer, k, v, positions, q_lens=lens, rows=rows)
    return positions


def slots_of(cache, side, layer, row, head):
    length = int(cache.seq_lens[layer, row, head])
    table = cache.block_tables[layer, row, head, : -(-length // cache.block_size)].long()
    return side[table].flatten(0, 1)[:length].tolist()
