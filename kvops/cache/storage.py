"""The arrays of a paged cache: keys, values, their scales, positions and scores of every block, and access to them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kvops import checks
from kvops.cache import huge_pages
from kvops.cache.config import CacheConfig
from kvops.cache.inference import writable
from kvops.ops.blocks import copy_blocks
from kvops.ops.eviction import compact
from kvops.ops.paged import paged_append


class BlockStorage:
    """The contents of blocks. Callers pass tables; the lists that blocks belong to are not known here.

    Attributes:
        k_cache, v_cache: ``[num_blocks, block_size, head_dim]`` and ``[..., v_head_dim]``.
        positions: int32 ``[num_blocks, block_size]``.
        scores: float32 ``[num_blocks, block_size]``.
        k_scale, v_scale: float32 ``[num_layers, num_kv_heads]``, or None.
        k_slot_scale, v_slot_scale: float32 ``[num_blocks, block_size]``, or None.
    """

    def __init__(
        self, config: CacheConfig, k_scale: float | Tensor | None, v_scale: float | Tensor | None, slot_scales: bool
    ) -> None:
        slots, device = (config.num_blocks, config.block_size), config.device
        self.k_cache = huge_pages.empty((*slots, config.head_dim), config.dtype, device)
        self.v_cache = huge_pages.empty((*slots, config.v_head_dim), config.v_dtype, device)
        self.positions = torch.zeros(slots, dtype=torch.int32, device=device)
        self.k_scale = _scale("k_scale", k_scale, config.dtype, config)
        self.v_scale = _scale("v_scale", v_scale, config.v_dtype, config)
        self.k_slot_scale, self.v_slot_scale = _slot_scales(self.k_scale, self.v_scale, config, slot_scales)
        # One more block than the pool has: set_scores() writes ignored entries there.
        self._scores = torch.zeros(slots[0] + 1, slots[1], dtype=torch.float32, device=device)
        self.scores = self._scores[:-1]

    def __getstate__(self) -> dict[str, Any]:
        """The state without the view, which pickle would store as a separate tensor."""
        return {**self.__dict__, "scores": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(writable(state))
        self.scores = self._scores[:-1]

    @property
    def sides(self) -> dict[str, Tensor]:
        """The arrays with a value for each slot of each block, by name."""
        sides = {"k_cache": self.k_cache, "v_cache": self.v_cache, "positions": self.positions, "scores": self.scores}
        return sides | {name: scale for name, scale in self.slot_scales.items() if scale is not None}

    @property
    def slot_scales(self) -> dict[str, Tensor | None]:
        """The scales of slots, as keywords of the operators."""
        return {"k_slot_scale": self.k_slot_scale, "v_slot_scale": self.v_slot_scale}

    @property
    def bytes_per_block(self) -> int:
        """Bytes of keys and values in a block, with the scales of their slots."""
        sides = (self.k_cache, self.v_cache, self.k_slot_scale, self.v_slot_scale)
        return sum(math.prod(side.shape[1:]) * side.element_size() for side in sides if side is not None)

    @property
    def side_bytes_per_block(self) -> int:
        """Bytes of positions and scores in a block."""
        return sum(math.prod(side.shape[1:]) * side.element_size() for side in (self.positions, self.scores))

    def scales(self, layer: int) -> dict[str, Any]:
        """The scales of one layer, as keywords of the operators."""
        k_scale, v_scale = self.k_scale, self.v_scale
        return {
            "k_scale": None if k_scale is None else k_scale[layer],
            "v_scale": None if v_scale is None else v_scale[layer],
            **self.slot_scales,
        }

    def reach(self, query_positions: Tensor, window_left: int, chunk: int) -> dict[str, Any]:
        """How far back queries see, in original positions, as keywords of ``paged_attention``."""
        positions = self.positions
        if chunk:  # two positions are of one chunk if no chunk begins between them
            window_left, positions, query_positions = 0, positions // chunk, query_positions // chunk
        return {"window_left": window_left, "positions": positions, "query_positions": query_positions}

    def append(
        self, layer: int, k: Tensor, v: Tensor, lists: tuple[Tensor, Tensor], positions: Tensor, q_lens: Tensor | None
    ) -> None:
        """Write keys, values and positions of the newest tokens of one layer's ``lists`` (tables and lengths)."""
        paged_append(
            k,
            v,
            self.k_cache,
            self.v_cache,
            *lists,
            q_lens=q_lens,
            positions=self.positions,
            token_positions=positions,
            scores=self.scores,
            **self.scales(layer),
        )

    def set_scores(self, tables: Tensor, lens: Tensor, scores: Tensor) -> None:
        """Store ``scores`` ``[B', Hkv, S]`` of the first S slots of each list, except past a list's length."""
        num_blocks, size = self.scores.shape
        slot = torch.arange(scores.shape[-1], device=scores.device)
        block = tables[..., slot // size].long()
        flat = torch.where(slot < lens[..., None], block, num_blocks) * size + slot % size
        self._scores.view(-1).scatter_(0, flat.flatten(), scores.to(torch.float32).flatten())

    def compact(self, tables: Tensor, lens: Tensor, keep: Tensor) -> None:
        """Move the slots that ``keep`` marks to the front of each list, and write the new lengths into ``lens``."""
        sides = {"positions": self.positions, "scores": self.scores, **self.slot_scales}
        compact(self.k_cache, self.v_cache, tables, lens, keep, **sides)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy whole blocks, int32 ``[N]``; a negative target copies nothing."""
        sides = {"positions": self.positions, "scores": self.scores, **self.slot_scales}
        copy_blocks(self.k_cache, self.v_cache, source, target, **sides)

    def read(self, blocks: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of the first ``length`` slots of ``blocks``: keys, values and positions."""
        k, v, positions = (
            # As bytes: torch cannot index float8.
            side.view(torch.uint8)[blocks.long()].view(side.dtype).flatten(0, 1)[:length]
            for side in (self.k_cache, self.v_cache, self.positions)
        )
        return k, v, positions


def _slot_scales(
    k_scale: Tensor | None, v_scale: Tensor | None, config: CacheConfig, slot_scales: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Room for the scales of slots of the sides of float8 and int8: float32 ``[num_blocks, block_size]`` each."""
    if not slot_scales:
        return None, None
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            raise ValueError(f"{name}: expected None with slot_scales=True, as each slot has one scale, got both")
    quantised = [dtype in checks.QUANTISED_DTYPES for dtype in (config.dtype, config.v_dtype)]
    if not any(quantised):
        raise ValueError(f"slot_scales: expected only with a side of float8 or int8, got a cache of {config.dtype}")
    slots = config.num_blocks, config.block_size
    k_slot_scale, v_slot_scale = (torch.zeros(slots, device=config.device) if side else None for side in quantised)
    return k_slot_scale, v_slot_scale


def _scale(name: str, scale: float | Tensor | None, dtype: torch.dtype, config: CacheConfig) -> Tensor | None:
    """float32 ``[num_layers, num_kv_heads]``, never the caller's tensor; None without a scale."""
    if scale is None:
        return None
    if dtype not in checks.QUANTISED_DTYPES:
        raise ValueError(f"{name}: expected only for a side of float8 or int8, got one of {dtype}")
    if not isinstance(scale, Tensor):
        if not checks.holds(name, scale, lambda number: 0 < number < math.inf):
            raise ValueError(f"{name}: expected a finite number above 0, got {scale}")
        scale = torch.tensor(scale, dtype=torch.float32, device=config.device)
    checks.expect_dtype(name, scale, torch.float32)
    lists = config.num_layers, config.num_kv_heads
    if scale.ndim:
        checks.expect_shape(name, scale, "[num_layers, num_kv_heads]", *lists)
    checks.expect_data(name, "finite numbers above 0", (scale > 0) & (scale < math.inf))
    scale = scale.detach().to(config.device).expand(lists)
    return scale.clone(memory_format=torch.contiguous_format)
