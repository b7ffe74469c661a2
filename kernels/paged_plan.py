"""What the launches of paged attention follow from: worked out once for all calls alike (see ``prepared``)."""

from dataclasses import dataclass

import torch
import triton

from kvops.autotune.config import PagedAttentionConfig
from kvops.kernels.paged import list_strides, padded, slot_strides
from kvops.kernels.paged_schedule import schedule_unit


@dataclass(frozen=True, eq=False, slots=True)
class PagedPlan:
    """For one configuration and number of shares: grids, buffers (float32 elements, 0 without), and what the kernels
    take behind their tensors, constexprs included: in order, for a keyword costs a launch 0.1 µs."""

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


class PagedKind:
    """What all calls alike share. The heads of a uniform cache share the schedule of the sequences and are an axis of
    the grid."""

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
        row_tiles = triton.cdiv(self.rows, config.block_m)
        split = row_tiles == 1 or (row_tiles * self.lists * self.axis_heads < shares and not self.invariant)
        # Row tiles and heads multiply the programs, so each takes as many shares at once.
        coarse = min(shares, row_tiles * self.axis_heads)
        # One pass over the slots serves all row tiles of the scores: the heads alone multiply the programs there.
        scores_coarse = min(shares, self.axis_heads)
        programs = triton.cdiv(shares, coarse)
        # The most units that the line of all lists can have: those of their tables, and where they own their blocks,
        # the pool's.
        units = self.lists * triton.cdiv(self.max_blocks * self.block_size, self.unit)
        if self.scored:
            units = min(units, triton.cdiv(self.num_blocks * self.block_size, self.unit) + self.lists)
        line = units * self.unit
        places = max(units, 1) if self.invariant else programs + self.lists  # an empty buffer would be none
        all_heads = self.lists * self.axis_heads

        _, num_tokens, query_heads, value_dim = self.out_shape
        lse_strides = query_heads * num_tokens, num_tokens
        out_strides = num_tokens * query_heads * value_dim, query_heads * value_dim, value_dim, *lse_strides
        # Constexprs that the first and the last kernel have in common, in their order.
        heads = self.list_heads, self.group
        masks = self.causal, self.window_left >= 0, self.softcap > 0
        tile = config.block_m, config.block_n, self.block_d
        return PagedPlan(
            config,
            shares,
            grid=(programs, row_tiles, self.axis_heads) if split else (all_heads, row_tiles),
            merge_grid=(all_heads * self.rows,) if split else None,
            scores_grid=(triton.cdiv(shares, scores_coarse), self.axis_heads),
            partial=self.axis_heads * places * self.rows * (value_dim + 2) if split else 0,
            stash=self.axis_heads * self.rows * line if self.scored and row_tiles == 1 else 0,
            numbers=(
                *self.q_strides,
                *self.k_strides,
                *self.v_strides,
                *self.list_strides,
                self.k_scale_stride,
                self.v_scale_stride,
                self.sinks_stride,
                *out_strides,
                num_tokens,
                self.max_blocks,
                self.lists,
                coarse,
                line,
                places,
                self.window_left,
                self.scale,
                self.softcap,
                self.heads,
                *heads,
                self.head_dim,
                value_dim,
                self.block_size,
                self.unit,
                *masks,
                split,
                self.invariant,
                *tile,
                self.block_dv,
            ),
            merge_numbers=(
                self.sinks_stride,
                self.v_scale_stride,
                *out_strides,
                num_tokens,
                coarse,
                places,
                self.list_heads,
                self.axis_heads,
                self.group,
                value_dim,
                self.invariant,
                16,
                self.block_dv,
            ),
            scores_numbers=(
                *self.q_strides,
                *self.k_strides,
                *self.list_strides,
                self.k_scale_stride,
                *lse_strides,
                *self.scores_strides,
                num_tokens,
                self.max_blocks,
                self.lists,
                scores_coarse,
                line,
                self.window_left,
                self.scale,
                self.softcap,
                self.score_decay,
                *heads,
                self.head_dim,
                self.block_size,
                self.unit,
                *masks,
                self.score_reduce,
                *tile,
            ),
            merge_warps=4 if self.block_dv >= 64 else 1,
        )
