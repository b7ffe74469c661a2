"""A paged cache in a safetensors file: what its rows and its remembered prefixes hold, byte for byte.

Blocks are written once, however many share them, in the order in which the lists go through them; slots that no list
uses are zeros. So equal caches give equal files, and nothing that was freed can be found in one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvops.cache.prefix import KEY_BYTES
from kvops.cache.storage import CacheStorage
from kvops.extras import require

# The only entry of the file's metadata: safetensors writes several in any order.
_FORMAT, _VERSION = "kvops paged cache", 2
# Arrays with a value for every slot of every block.
_SIDES = ("k_cache", "v_cache", "positions", "scores")
_SCALES = ("k_scale", "v_scale")


def save(cache: CacheStorage, path: str | os.PathLike[str]) -> None:
    """See :meth:`kvops.PagedKVCache.save`."""
    save_file = require("safetensors.torch", "save").save_file
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: expected a file in a folder that exists, got {path}")
    if path.is_dir():
        raise IsADirectoryError(f"path: expected a file, got the folder {path}")
    device, size = cache.device, cache.block_size
    keys = cache._prefixes.oldest_first()
    entries = [cache._prefixes.entries[key] for key in keys]
    none = torch.zeros(0, cache.num_layers, cache.num_kv_heads, dtype=torch.int64, device=device)
    prefix_blocks = torch.stack([entry.blocks for entry in entries]).long() if entries else none

    # Where blocks stand, in order, and how many of their slots are used there.
    columns = torch.arange(cache.max_blocks, device=device)
    used = (cache.seq_lens[..., None] - columns * size).clamp(0, size)
    standing = torch.cat([cache.block_tables[used > 0].long(), prefix_blocks.flatten()])
    slots = torch.cat([used[used > 0].long(), torch.full_like(prefix_blocks.flatten(), size)])
    first = torch.full((cache.num_blocks,), len(standing), device=device)
    first.scatter_reduce_(0, standing, torch.arange(len(standing), device=device), "amin")
    order = first.argsort(stable=True)[: int((first < len(standing)).sum())]
    number = torch.zeros_like(first).scatter_(0, order, torch.arange(len(order), device=device))
    filled = torch.zeros_like(first).scatter_reduce_(0, standing, slots, "amax")[order]
    empty = torch.arange(size, device=device) >= filled[:, None]

    tensors = {
        "block_tables": torch.where(used > 0, number[cache.block_tables.long()], 0).int(),
        "seq_lens": cache.seq_lens,
        "next_positions": cache.next_positions,
        "settled": cache._settled,
        "compressed": torch.tensor(cache.compressed),
        "prefix_keys": _to_bytes(keys),
        "prefix_parents": _to_bytes(entry.parent for entry in entries),
        "prefix_blocks": number[prefix_blocks].int(),
    }
    for name in _SIDES:
        side = getattr(cache, name)
        # As bytes: torch neither indexes nor fills float8.
        content = side.view(torch.uint8).view(len(side), size, -1)[order].masked_fill_(empty[..., None], 0)
        tensors[name] = content.view(side.dtype).view(len(order), *side.shape[1:])
    tensors |= {name: getattr(cache, name) for name in _SCALES if getattr(cache, name) is not None}

    config = {
        "version": _VERSION,
        "num_layers": cache.num_layers,
        "num_kv_heads": cache.num_kv_heads,
        "num_blocks": cache.num_blocks,
        "max_batch": cache.max_batch,
        "max_tokens": cache.max_tokens,
    }
    metadata = {_FORMAT: json.dumps(config)}
    # A file of that name is either the old or the new one, also if the machine stops half-way.
    part = path.with_name(path.name + ".part")
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, part, metadata)
    os.replace(part, path)


def read(path: str | os.PathLike[str], device: torch.device | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments that build the cache of a file, and its tensors on ``device``."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: expected a file that PagedKVCache.save wrote, but there is none at {path}")
    files = require("safetensors", "save")
    try:
        with files.safe_open(path, framework="pt", device=str(device)) as file:
            config = json.loads((file.metadata() or {}).get(_FORMAT, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()} if config else {}  # noqa: SIM118
    except files.SafetensorError as error:
        raise ValueError(f"path: expected a file that PagedKVCache.save wrote, {path} is none: {error}") from error
    version = config.pop("version", None)
    if version != _VERSION:
        raise ValueError(f"path: expected a {_FORMAT} of version {_VERSION}, got version {version} in {path}")
    k, v = tensors["k_cache"], tensors["v_cache"]
    sizes = {"head_dim": k.shape[2], "v_head_dim": v.shape[2], "block_size": k.shape[1], "dtype": k.dtype}
    scales = {name: tensors[name] for name in _SCALES if name in tensors}
    return {**config, **sizes, **scales, "device": device}, tensors


def restore(cache: CacheStorage, tensors: dict[str, Tensor]) -> None:
    """Fill the empty ``cache`` with what :func:`read` returned."""
    blocks, capacity = len(tensors["k_cache"]), cache.max_tokens
    if blocks > cache.num_blocks:
        raise ValueError(
            f"num_blocks: expected at least the {blocks} blocks that the file holds, got {cache.num_blocks}"
        )
    lens, tables, prefixes = (tensors[name] for name in ("seq_lens", "block_tables", "prefix_blocks"))
    within = (lens >= 0) & (lens <= capacity)
    numbers = torch.cat([tables.flatten(), prefixes.flatten()])
    if lens.shape != cache.seq_lens.shape or tables.shape != cache.block_tables.shape or not bool(within.all()):
        raise ValueError(f"path: expected lengths of {list(cache.seq_lens.shape)} lists up to {capacity}, got others")
    if numbers.numel() and not bool(((numbers >= 0) & (numbers < max(blocks, 1))).all()):
        raise ValueError(f"path: expected block numbers below {blocks}, got others")
    for name in _SIDES:
        getattr(cache, name)[:blocks].copy_(tensors[name])
    cache.next_positions.copy_(tensors["next_positions"])
    cache._settled.copy_(tensors["settled"])
    cache.compressed[:] = tensors["compressed"].tolist()
    cache._pool.restore(tables, lens, prefixes)
    keys, parents = _from_bytes(tensors["prefix_keys"]), _from_bytes(tensors["prefix_parents"])
    cache._prefixes.restore(keys, parents, prefixes)


def _to_bytes(keys: Iterable[bytes]) -> Tensor:
    return torch.tensor([list(key) for key in keys], dtype=torch.uint8).view(-1, KEY_BYTES)


def _from_bytes(keys: Tensor) -> list[bytes]:
    return [bytes(key) for key in keys.tolist()]
