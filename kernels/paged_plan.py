"""Grids, strides and constants of the launches of paged attention, computed once for calls with equal shapes, strides,
dtypes and options (see ``kvops.prepared``)."""

from dataclasses import dataclass

import torch
import triton

from kvops.autotune.config import PagedAttentionConfig
from kvops.kernels.paged import list_strides, padded, slot_strides
from kvops.kernels.paged_schedule import schedule_unit


@dataclass(frozen=True, eq=False, slots=True)
class PagedPlan:
    """The launches for one configuration and number of shares.

    ``partial`` and ``stash`` are sizes of buffers in float32 elements; 0 means none. ``*numbers`` are the arguments of
    a kernel after its tensors, constexprs included, by position: a keyword adds 0.1 µs to a launch.
    """

    config: PagedAttentionConfig
    shares: int
    grid: tuple[int, ...]
    merge_grid: tuple[int] | None
    scores_grid: tuple[int, int]
    partial: int
    stash: int
    numbers: tuple[float, ...]
    merge_numbers: tuple[int, ...]
    scores_numbers: tuple[float | str, ...]
    merge_warps: int


@dataclass(frozen=True, slots=True)
class _Parts:
    """How programs divide the work.

    With ``split`` a program takes ``coarse`` shares of the schedule and writes partial results into ``places``;
    otherwise it takes one list. The slots of all lists, padded to units, form a line of ``line`` slots.
    """

    split: bool
    row_tiles: int
    coarse: int
    scores_coarse: int
    programs: int
    line: int
    places: int


class PagedKind:
    """What the launches of paged attention need of their arguments, except data.

    The heads of a uniform cache share the schedule of their sequence; they are an axis of the grid (``axis_heads``).
    """

    def __init__(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        q_lens: torch.Tensor | None = None,
        causal: bool = True,
        window_left: int = -1,
        positions: torch.Tensor | None = None,
        query_positions: torch.Tensor | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        tree_mask: torch.Tensor | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
        score_reduce: str = "sum",
        score_decay: float = 1.0,
        schedule: torch.Tensor | None = None,
        batch_invariant: bool = False,
    ) -> None:
        batch, self.num_tokens, query_heads, self.head_dim = q.shape
        self.value_dim = v_cache.shape[-1]
        self.num_blocks, self.block_size = k_cache.shape[:2]
        self.max_blocks = block_tables.shape[-1]
        uniform = k_cache.dim() == 4
        self.heads = k_cache.shape[2] if uniform else block_tables.shape[1]
        self.list_heads, self.axis_heads = (1, self.heads) if uniform else (self.heads, 1)
        self.lists = batch * self.list_heads
        self.group = query_heads // self.heads
        self.rows = self.num_tokens * self.group
        self.invariant = batch_invariant
        self.unit = schedule_unit(self.block_size, batch_invariant)
        self.out_shape = batch, self.num_tokens, query_heads, self.value_dim
        self.lse_shape = batch, query_heads, self.num_tokens
        self.empty = 0 in self.lse_shape
        self.float8 = k_cache.dtype == torch.float8_e4m3fn
        self.block_d, self.block_dv = padded(self.head_dim), padded(self.value_dim)
        # What the configuration is chosen by.
        varying = (0, 0) if batch_invariant else (self.lists * self.axis_heads, self.max_blocks * self.block_size)
        width = max(self.block_d, self.block_dv)
        self.problem = width, q.element_size(), k_cache.element_size(), self.block_size, self.rows, *varying

        if window_left >= 2**31 - 1 - self.num_tokens:  # it hides nothing, and places less it leave int32
            window_left = -1
        self.window_left = window_left
        self.causal = causal and tree_mask is None
        self.scored = scores is not None
        self.score_decay, self.score_reduce = score_decay, score_reduce
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.softcap = softcap
        if tree_mask is not None:
            tree_mask = tree_mask.expand(batch, -1, -1)
        self.q_strides = q.stride()[:3]
        self.k_strides, self.v_strides = slot_strides(k_cache[..., 0]), slot_strides(v_cache[..., 0])
        lists = *list_strides(block_tables, k_cache), block_tables.stride(-1), *list_strides(seq_lens, k_cache)
        self.list_strides = (
            *lists,
            0 if q_lens is None else q_lens.stride(0),
            *slot_strides(positions if window_left >= 0 else None),
            *((0, 0) if window_left < 0 or query_positions is None else query_positions.stride()),
            *((0, 0, 0) if tree_mask is None else tree_mask.stride()),
        )
        self.k_scale_stride, self.v_scale_stride = (
            0 if value is None or value.dim() == 0 else value.stride(0) for value in (k_scale, v_scale)
        )
        self.sinks_stride = 0 if sinks is None else sinks.stride(0)
        self.scores_strides = slot_strides(scores)
        self._plan: PagedPlan | None = None

    def plan(self, config: PagedAttentionConfig, shares: int) -> PagedPlan:
        plan = self._plan
        if plan is None or plan.config is not config or plan.shares != shares:
            plan = self._plan = self._new_plan(config, shares)
        return plan

    def _new_plan(self, config: PagedAttentionConfig, shares: int) -> PagedPlan:
        parts = self._divide(config, shares)
        all_heads = self.lists * self.axis_heads
        sums = self.value_dim + 2  # a row's weighted sum of V, its maximum and its sum of exponentials
        return PagedPlan(
            config,
            shares,
            grid=(parts.programs, parts.row_tiles, self.axis_heads) if parts.split else (all_heads, parts.row_tiles),
            merge_grid=(all_heads * self.rows,) if parts.split else None,
            scores_grid=(triton.cdiv(shares, parts.scores_coarse), self.axis_heads),
            partial=self.axis_heads * parts.places * self.rows * sums if parts.split else 0,
            stash=self.axis_heads * self.rows * parts.line if self.scored and parts.row_tiles == 1 else 0,
            numbers=self._attention_numbers(config, parts),
            merge_numbers=self._merge_numbers(parts),
            scores_numbers=self._scores_numbers(config, parts),
            merge_warps=4 if self.block_dv >= 64 else 1,
        )

    def _divide(self, config: PagedAttentionConfig, shares: int) -> _Parts:
        row_tiles = triton.cdiv(self.rows, config.block_m)
        # Row tiles and heads multiply the number of programs, so each program takes that many shares.
        coarse = min(shares, row_tiles * self.axis_heads)
        programs = triton.cdiv(shares, coarse)
        # The most units that all lists can have: by their tables, and by the pool where the lists own their blocks.
        units = self.lists * triton.cdiv(self.max_blocks * self.block_size, self.unit)
        if self.scored:
            units = min(units, triton.cdiv(self.num_blocks * self.block_size, self.unit) + self.lists)
        return _Parts(
            split=row_tiles == 1 or (row_tiles * self.lists * self.axis_heads < shares and not self.invariant),
            row_tiles=row_tiles,
            coarse=coarse,
            # One pass over the slots serves all row tiles of the scores: only heads multiply the programs there.
            scores_coarse=min(shares, self.axis_heads),
            programs=programs,
            line=units * self.unit,
            places=max(units, 1) if self.invariant else programs + self.lists,  # a kernel cannot take an empty buffer
        )

    @property
    def _lse_strides(self) -> tuple[int, int]:
        _, query_heads, num_tokens = self.lse_shape
        return query_heads * num_tokens, num_tokens

    @property
    def _out_strides(self) -> tuple[int, ...]:
        """Strides of ``out`` and of ``lse``, both contiguous."""
        _, num_tokens, query_heads, value_dim = self.out_shape
        return num_tokens * query_heads * value_dim, query_heads * value_dim, value_dim, *self._lse_strides

    @property
    def _masks(self) -> tuple[bool, bool, bool]:
        return self.causal, self.window_left >= 0, self.softcap > 0

    def _attention_numbers(self, config: PagedAttentionConfig, parts: _Parts) -> tuple[float, ...]:
        return (
            *self.q_strides,
            *self.k_strides,
            *self.v_strides,
            *self.list_strides,
            self.k_scale_stride,
            self.v_scale_stride,
            self.sinks_stride,
            *self._out_strides,
            self.num_tokens,
            self.max_blocks,
            self.lists,
            parts.coarse,
            parts.line,
            parts.places,
            self.window_left,
            self.scale,
            self.softcap,
            self.heads,
            self.list_heads,
            self.group,
            self.head_dim,
            self.value_dim,
            self.block_size,
            self.unit,
            *self._masks,
            parts.split,
            self.invariant,
            config.block_m,
            config.block_n,
            self.block_d,
            self.block_dv,
        )

    def _merge_numbers(self, parts: _Parts) -> tuple[int, ...]:
        return (
            self.sinks_stride,
            self.v_scale_stride,
            *self._out_strides,
            self.num_tokens,
            parts.coarse,
            parts.places,
            self.list_heads,
            self.axis_heads,
            self.group,
            self.value_dim,
            self.invariant,
            16,
            self.block_dv,
        )

    def _scores_numbers(self, config: PagedAttentionConfig, parts: _Parts) -> tuple[float | str, ...]:
        return (
            *self.q_strides,
            *self.k_strides,
            *self.list_strides,
            self.k_scale_stride,
            *self._lse_strides,
            *self.scores_strides,
            self.num_tokens,
            self.max_blocks,
            self.lists,
            parts.scores_coarse,
            parts.line,
            self.window_left,
            self.scale,
            self.softcap,
            self.score_decay,
            self.list_heads,
            self.group,
            self.head_dim,
            self.block_size,
            self.unit,
            *self._masks,
            self.score_reduce,
            config.block_m,
            config.block_n,
            self.block_d,
        )
