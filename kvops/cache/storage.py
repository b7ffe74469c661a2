"""What a paged cache is made of: the pool's tensors, its lists of blocks, and the rows and layers that methods name."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvops import checks
from kvops.cache.pool import BlockPool, OutOfBlocksError, writable
from kvops.cache.prefix import PrefixIndex
from kvops.cache.stats import CacheStats
from kvops.ops.blocks import copy_blocks
from kvops.ops.paged import paged_schedule
from kvops.ops.registry import backend

_T = TypeVar("_T")

Rows = slice | int | Sequence[int] | Tensor

# Row numbers: a range where an index by a slice will do.
Numbers = range | tuple[int, ...]
# Tables and lengths, one of each for every layer.
_Views = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
# Selections of rows whose indices, views and schedules are kept.
_MAX_SELECTIONS = 64


class CacheStorage:
    """The part of :class:`~kvops.PagedKVCache` that holds; what is done with it stands there, arguments included."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_blocks: int,
        max_batch: int,
        max_tokens: int,
        block_size: int = 16,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
    ) -> None:
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        sizes = {
            "num_layers": num_layers,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "v_head_dim": v_head_dim,
            "num_blocks": num_blocks,
            "max_batch": max_batch,
            "max_tokens": max_tokens,
            "block_size": block_size,
        }
        for name, value in sizes.items():
            checks.expect_int(name, value, 1)
        dtypes = (*checks.FLOAT_DTYPES, torch.float8_e4m3fn)
        if dtype not in dtypes:
            raise TypeError(f"dtype: expected one of {', '.join(map(str, dtypes))}, got {dtype}")
        if num_blocks >= 2**31:
            raise ValueError(f"num_blocks: expected less than 2**31 (tables are int32), got {num_blocks}")
        self.num_layers, self.num_kv_heads, self.num_blocks = num_layers, num_kv_heads, num_blocks
        self.max_batch, self.max_tokens, self.block_size = max_batch, max_tokens, block_size
        self.max_blocks = -(-max_tokens // block_size)
        self.device = device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            self.device = device = torch.device("cuda", torch.cuda.current_device())

        # Tensors made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.k_cache = torch.empty(num_blocks, block_size, head_dim, dtype=dtype, device=device)
            self.v_cache = torch.empty(num_blocks, block_size, v_head_dim, dtype=dtype, device=device)
            self.positions = torch.zeros(num_blocks, block_size, dtype=torch.int32, device=device)
            self.k_scale, self.v_scale = self._scale("k_scale", k_scale), self._scale("v_scale", v_scale)
            # One block more than the pool has takes what set_scores must not write anywhere.
            self._scores = torch.zeros(num_blocks + 1, block_size, dtype=torch.float32, device=device)
            self.scores = self._scores[:num_blocks]
            lists = (num_layers, max_batch, num_kv_heads)
            self._pool = BlockPool(lists, num_blocks, max_tokens, block_size, device)
            self.next_positions = torch.zeros(max_batch, dtype=torch.int32, device=device)
            # Positions from which on tokens can be rolled back: evict() and keep() may have taken older ones.
            self._settled = torch.zeros_like(self.next_positions)
        self.block_tables, self.seq_lens = self._pool.tables, self._pool.lens
        self._prefixes = PrefixIndex(self._pool)
        self.compressed = [False] * max_batch
        self._indices: dict[tuple[int, ...], Tensor] = {}
        # Tables and lengths of every layer, and their schedules, by selection of rows: a step asks for them often.
        self._views: dict[range, _Views] = {}
        self._gathered: dict[tuple[int, ...], _Views] = {}  # rows picked by number: copies, true for one step
        self._schedules: dict[tuple[Numbers, bool], tuple[Tensor, ...]] = {}

    def __repr__(self) -> str:
        lists = f"{self.num_layers} layers, {self.num_kv_heads} KV heads of {self.k_cache.shape[-1]}"
        rows = f"{self.max_batch} rows of up to {self.max_tokens} tokens"
        blocks = f"{self.num_blocks} blocks of {self.block_size}"
        return f"PagedKVCache({lists}, {rows}, {blocks}, {self.k_cache.dtype}, {self.device})"

    def __getstate__(self) -> dict[str, Any]:
        """Without views into other tensors: pickled, they would be tensors of their own."""
        views: dict[str, Any] = {"block_tables": None, "seq_lens": None, "scores": None}
        return {**self.__dict__, **views, "_indices": {}, "_views": {}, "_gathered": {}, "_schedules": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(writable(state))
        self.block_tables, self.seq_lens = self._pool.tables, self._pool.lens
        self.scores = self._scores[: self.num_blocks]

    @property
    def bytes_per_block(self) -> int:
        """Bytes of keys and values in a block."""
        slot = (self.k_cache.shape[-1] + self.v_cache.shape[-1]) * self.k_cache.element_size()
        return self.block_size * slot

    def blocks_for(self, tokens: int) -> int:
        """Blocks that one row of ``tokens`` tokens takes with nothing evicted, over all layers and heads."""
        return self.num_layers * self.num_kv_heads * -(-tokens // self.block_size)

    def gather(self, layer: int, row: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of one list in order: k ``[len, D]``, v ``[len, Dv]``, positions int32 ``[len]``. Synchronises.

        IndexError for a layer, row or head that is not there.
        """
        length = int(self.seq_lens[layer, row, head])
        blocks = self.block_tables[layer, row, head, : -(-length // self.block_size)].long()
        k, v, positions = (
            # As bytes: indexing knows no float8.
            side.view(torch.uint8)[blocks].view(side.dtype).flatten(0, 1)[:length]
            for side in (self.k_cache, self.v_cache, self.positions)
        )
        return k, v, positions

    def stats(self) -> CacheStats:
        """Blocks, bytes and lengths at this moment. Synchronises."""
        side = self.positions.element_size() + self.scores.element_size()
        holders = self._pool.holders()
        return CacheStats(
            blocks_total=self.num_blocks,
            blocks_in_use=self._pool.blocks_in_use(),
            block_size=self.block_size,
            bytes_per_block=self.bytes_per_block,
            side_bytes_per_block=self.block_size * side,
            blocks_shared=int((holders > 1).sum()),
            blocks_saved=int((holders - 1).clamp(min=0).sum()),
            blocks_unused=self._pool.blocks_in_use() - int((holders > 0).sum()),
            tokens_remembered=len(self._prefixes) * self.block_size,
            tokens_seen=self.next_positions.cpu().clone(),
            lengths=self.seq_lens.cpu().clone(),
        )

    def unshare(self, rows: Rows = slice(None)) -> None:
        """Give ``rows`` copies of their own of all blocks that they share.

        Raises :class:`OutOfBlocksError`, before anything is changed, when the pool is too small for that.
        """
        index, numbers = self._resolve(rows)
        if self._pool.shares(numbers):
            held = self._pool.held[:, index]
            self._own(index, numbers, torch.zeros_like(held), held, self.max_blocks)
            self._pool.bound.part(numbers)

    def _scale(self, name: str, scale: float | Tensor | None) -> Tensor | None:
        """float32 ``[num_layers, num_kv_heads]`` of what may be one number."""
        if scale is None:
            return None
        if self.k_cache.dtype != torch.float8_e4m3fn:
            raise ValueError(f"{name}: expected only with dtype float8_e4m3fn, got a cache of {self.k_cache.dtype}")
        if not isinstance(scale, Tensor):
            if not checks.holds(name, scale, lambda number: 0 < number < float("inf")):
                raise ValueError(f"{name}: expected a finite number above 0, got {scale}")
            scale = torch.tensor(scale, dtype=torch.float32)
        checks.expect_dtype(name, scale, torch.float32)
        if scale.ndim:
            checks.expect_shape(name, scale, "[num_layers, num_kv_heads]", self.num_layers, self.num_kv_heads)
        checks.expect_data(name, "finite numbers above 0", (scale > 0) & (scale < float("inf")))
        scale = scale.detach().to(self.device).expand(self.num_layers, self.num_kv_heads)
        return scale.clone(memory_format=torch.contiguous_format)

    def _one(self, name: str, row: int) -> int:
        """``row``, in range."""
        checks.expect_int(name, row, 0)
        if row >= self.max_batch:
            raise ValueError(f"{name}: expected a row number in 0..{self.max_batch - 1}, got {row}")
        return operator.index(row)

    def _resolve(self, rows: Rows) -> tuple[slice | Tensor, Numbers]:
        """``rows`` as an index for tensors (a slice where possible, which copies nothing) and as numbers."""
        if isinstance(rows, slice):
            covered = range(*rows.indices(self.max_batch))
            if covered.step > 0:
                return rows, covered
            rows = covered
        if isinstance(rows, Tensor):
            rows = rows.tolist()
        named = tuple(rows) if isinstance(rows, Iterable) else (rows,)
        if any(isinstance(row, bool) for row in named):  # a mask would be taken for rows 1 and 0
            raise TypeError(f"rows: expected row numbers, got {checks.shown(named)}; of a mask: mask.nonzero()[:, 0]")
        try:
            numbers = tuple(map(operator.index, named))
        except TypeError:
            raise TypeError(f"rows: expected a slice, a row number or several, got {checks.shown(rows)}") from None
        if len(set(numbers)) != len(numbers) or any(not 0 <= row < self.max_batch for row in numbers):
            raise ValueError(
                f"rows: expected different row numbers in 0..{self.max_batch - 1}, got {checks.shown(list(numbers))}"
            )
        if numbers and numbers == tuple(range(numbers[0], numbers[-1] + 1)):
            return slice(numbers[0], numbers[-1] + 1), range(numbers[0], numbers[-1] + 1)
        if numbers not in self._indices:
            _make_room(self._indices)
            self._indices[numbers] = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        return self._indices[numbers], numbers

    def _layer(self, layer: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """Block tables ``[B', Hkv, max_blocks]`` and lengths ``[B', Hkv]`` of one layer."""
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer: expected a number in 0..{self.num_layers - 1}, got {layer}")
        index, numbers = self._resolve(rows)
        kept: dict = self._views if isinstance(numbers, range) else self._gathered
        if numbers not in kept:
            _make_room(kept)
            kept[numbers] = tuple(self.block_tables[:, index]), tuple(self.seq_lens[:, index])
        tables, lens = kept[numbers]
        return tables[layer], lens[layer]

    def _schedule(self, layer: int, rows: Rows) -> Tensor | None:
        """The layer's part of the schedule of this step, which is made once for all layers; the CPU needs none."""
        if backend(self.device) == "eager":
            return None
        index, numbers = self._resolve(rows)
        key = numbers, self._pool.capturing()  # what a graph computes is there only when it is replayed
        if key not in self._schedules:
            self._schedules[key] = tuple(paged_schedule(self.seq_lens[:, index], self.block_size))
        return self._schedules[key][layer]

    def _changed(self) -> None:
        """Lengths or tables change: forget what was derived from them."""
        self._schedules.clear()
        self._gathered.clear()

    def _copy(self, blocks: tuple[Tensor, Tensor] | None) -> None:
        """Copy blocks that were shared, source and target, before they are written."""
        if blocks is not None:
            self._changed()
            copy_blocks(self.k_cache, self.v_cache, *blocks, positions=self.positions, scores=self.scores)

    def _making_room(self, request: Callable[[], _T], fits: Callable[[], bool] | None = None) -> _T:
        """Run ``request``, which raises before it changes anything, giving up remembered prefixes where it needs room.

        Prefixes that rows use are given up only for copies of shared blocks, and only if the request ``fits`` then."""
        while True:
            try:
                return request()
            except OutOfBlocksError as error:
                shortage = error.needed - error.free
                if self._prefixes.give_up(shortage, in_use=False):
                    continue
                if fits is None or not fits() or not self._prefixes.give_up(shortage, in_use=True):
                    raise

    def _own(self, index: slice | Tensor, numbers: Sequence[int], first: Tensor, stop: Tensor, width: int) -> None:
        """Copy the shared blocks from the ``first`` to before ``stop`` of each list, at most ``width``."""
        blocks = self._making_room(
            lambda: self._pool.own(index, numbers, first, stop, width),
            lambda: self._pool.fits_without_prefixes(index, first, stop, width),
        )
        self._copy(blocks)

    def _expect_rows(self, name: str, value: Tensor, batch: int) -> None:
        """One row of tokens for each of the cache's that are meant."""
        checks.expect_tensor(name, value)
        checks.expect_rank(name, value, "[rows, tokens, heads, head_dim]")
        if value.shape[0] != batch:
            raise ValueError(f"{name}: expected {batch} rows, as many as `rows` names, got {value.shape[0]}")

    def _expect_per_row(self, name: str, value: Tensor, batch: int) -> None:
        checks.expect_tensor(name, value)
        checks.expect_dtype(name, value, torch.int32)
        checks.expect_shape(name, value, "[rows]", batch)
        self._expect_here(name, value)

    def _expect_tokens(self, name: str, value: int) -> None:
        """No list has more tokens than max_tokens; int32 lengths would wrap around at much larger numbers."""
        checks.expect_int(name, value, 0)
        if value > self.max_tokens:
            raise ValueError(f"{name}: expected at most max_tokens = {self.max_tokens}, got {value}")

    def _expect_here(self, name: str, value: Tensor) -> None:
        if value.device != self.device:
            raise ValueError(f"{name}: expected the device of the cache, {self.device}, got {value.device}")


def _make_room(kept: dict) -> None:
    if len(kept) >= _MAX_SELECTIONS:
        kept.clear()
