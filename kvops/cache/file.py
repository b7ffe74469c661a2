"""Paged caches in safetensors files: all rows and remembered prefixes, byte for byte.

Each block is written once, in the order of the lists. Slots that no list uses are written as zeros. So equal caches
give equal files, and a file contains no freed data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvops.cache.prefix import KEY_BYTES
from kvops.extras import require

if TYPE_CHECKING:
    from kvops.cache.paged import PagedKVCache

# The only entry of the file's metadata: safetensors does not keep the order of several.
_FORMAT, _VERSION = "kvops paged cache", 2
_SCALES = ("k_scale", "v_scale")


def save(cache: PagedKVCache, path: str | os.PathLike[str]) -> None:
    """See :meth:`kvops.PagedKVCache.save`."""
    save_file = require("safetensors.torch", "save").save_file
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: expected a file in a folder that exists, got {path}")
    if path.is_dir():
        raise IsADirectoryError(f"path: expected a file, got the folder {path}")
    storage, states = cache._storage, cache._states
    keys = cache._prefixes.oldest_first()
    entries = [cache._prefixes.entries[key] for key in keys]
    none = torch.zeros(0, cache.num_layers, cache.num_kv_heads, dtype=torch.int64, device=cache.device)
    prefix_blocks = torch.stack([entry.blocks for entry in entries]).long() if entries else none
    used = _slots_used(cache)
    order, filled = _blocks_in_order(cache, used, prefix_blocks)
    number = torch.zeros(cache.num_blocks, dtype=torch.int64, device=cache.device)
    number[order] = torch.arange(len(order), device=cache.device)
    empty = torch.arange(cache.block_size, device=cache.device) >= filled[:, None]

    tensors = {
        "block_tables": torch.where(used > 0, number[cache.block_tables.long()], 0).int(),
        "seq_lens": cache.seq_lens,
        "next_positions": states.next_positions,
        "settled": states.settled,
        "compressed": torch.tensor(states.compressed, device="cpu"),
        "prefix_keys": _to_bytes(keys),
        "prefix_parents": _to_bytes(entry.parent for entry in entries),
        "prefix_blocks": number[prefix_blocks].int(),
    }
    for name, side in storage.sides.items():
        # As bytes: torch can neither index nor fill float8.
        content = side.view(torch.uint8).view(*side.shape[:2], -1)[order].masked_fill_(empty[..., None], 0)
        tensors[name] = content.view(side.dtype).view(len(order), *side.shape[1:])
    tensors |= {name: getattr(storage, name) for name in _SCALES if getattr(storage, name) is not None}

    config = {"version": _VERSION}
    for name in ("num_layers", "num_kv_heads", "num_blocks", "max_batch", "max_tokens"):
        config[name] = getattr(cache, name)
    metadata = {_FORMAT: json.dumps(config)}
    # After a crash the file is either the old one or the new one, because renaming is atomic.
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
        raise ValueError(f"path: expected a file that PagedKVCache.save wrote, got {path}: {error}") from error
    version = config.pop("version", None)
    if version != _VERSION:
        raise ValueError(f"path: expected a {_FORMAT} of version {_VERSION}, got version {version} in {path}")
    try:
        k, v = tensors["k_cache"], tensors["v_cache"]
        sizes = {"head_dim": k.shape[2], "v_head_dim": v.shape[2], "block_size": k.shape[1]}
        sizes |= {"dtype": k.dtype, "v_dtype": v.dtype}
    except (KeyError, IndexError):
        raise ValueError(f"path: expected k_cache and v_cache [blocks, slots, head_dim] in {path}") from None
    scales: dict[str, Any] = {name: tensors[name] for name in _SCALES if name in tensors}
    scales["slot_scales"] = "k_slot_scale" in tensors or "v_slot_scale" in tensors
    return {**config, **sizes, **scales, "device": device}, tensors


def restore(cache: PagedKVCache, tensors: dict[str, Tensor]) -> None:
    """Fill the empty ``cache`` with what :func:`read` returned."""
    blocks, prefixes = len(tensors["k_cache"]), len(tensors.get("prefix_keys", ()))
    if blocks > cache.num_blocks:
        raise ValueError(
            f"num_blocks: expected at least the {blocks} blocks that the file holds, got {cache.num_blocks}"
        )
    shapes = {name: (blocks, *side.shape[1:]) for name, side in cache._storage.sides.items()}
    shapes |= {"block_tables": tuple(cache.block_tables.shape), "seq_lens": tuple(cache.seq_lens.shape)}
    shapes |= dict.fromkeys(("next_positions", "settled", "compressed"), (cache.max_batch,))
    shapes |= dict.fromkeys(("prefix_keys", "prefix_parents"), (prefixes, KEY_BYTES))
    shapes |= {"prefix_blocks": (prefixes, cache.num_layers, cache.num_kv_heads)}
    for name, shape in shapes.items():
        actual = tuple(tensors[name].shape) if name in tensors else None
        if actual != shape:
            raise ValueError(f"path: expected {name} of shape {list(shape)} in the file, got {actual and list(actual)}")
    lens, tables, prefix_blocks = (tensors[name] for name in ("seq_lens", "block_tables", "prefix_blocks"))
    if not bool(((lens >= 0) & (lens <= cache.max_tokens)).all()):
        raise ValueError(f"path: expected lengths from 0 to {cache.max_tokens} in the file, got others")
    numbers = torch.cat([tables.flatten(), prefix_blocks.flatten()])
    if numbers.numel() and not bool(((numbers >= 0) & (numbers < max(blocks, 1))).all()):
        raise ValueError(f"path: expected block numbers below {blocks} in the file, got others")
    for name, side in cache._storage.sides.items():
        side[:blocks].copy_(tensors[name])
    cache._states.next_positions.copy_(tensors["next_positions"])
    cache._states.settled.copy_(tensors["settled"])
    cache._states.compressed[:] = tensors["compressed"].tolist()
    cache._pool.restore(tables, lens, prefix_blocks)
    keys, parents = _from_bytes(tensors["prefix_keys"]), _from_bytes(tensors["prefix_parents"])
    cache._prefixes.restore(keys, parents, prefix_blocks)


def _slots_used(cache: PagedKVCache) -> Tensor:
    """The number of slots in use in each block of each list: ``[layers, rows, heads, max_blocks]``."""
    start = torch.arange(cache.max_blocks, device=cache.device) * cache.block_size
    return (cache.seq_lens[..., None] - start).clamp(0, cache.block_size)


def _blocks_in_order(cache: PagedKVCache, used: Tensor, prefix_blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks of all lists and prefixes, in order of first use, and the number of slots in use in each."""
    places = torch.cat([cache.block_tables[used > 0].long(), prefix_blocks.flatten()])
    slots = torch.cat([used[used > 0].long(), torch.full_like(prefix_blocks.flatten(), cache.block_size)])
    first = torch.full((cache.num_blocks,), len(places), device=cache.device)
    first.scatter_reduce_(0, places, torch.arange(len(places), device=cache.device), "amin")
    order = first.argsort(stable=True)[: int((first < len(places)).sum())]
    return order, torch.zeros_like(first).scatter_reduce_(0, places, slots, "amax")[order]


def _to_bytes(keys: Iterable[bytes]) -> Tensor:
    return torch.tensor([list(key) for key in keys], dtype=torch.uint8, device="cpu").view(-1, KEY_BYTES)


def _from_bytes(keys: Tensor) -> list[bytes]:
    return [bytes(key) for key in keys.tolist()]
