"""Grids, strides and constants of the launches of paged attention, computed once for calls with equal shapes, strides,
dtypes and options (see ``kvops.prepared``)."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import triton

from kvops.autotune.config import PagedAttentionConfig
from kvops.kernels.dense import slope_stride
from kvops.kernels.paged import (
    bias_numbers,
    in_every_row,
    list_strides,
    padded,
    positional,
    scale_stride,
    slot_scale_strides,
    slot_strides,
    strides,
)
from kvops.kernels.paged_attention_kernel import paged_attention_kernel, paged_merge_kernel
from kvops.kernels.paged_schedule import schedule_unit
from kvops.kernels.paged_scores import paged_scores_kernel

# The largest buffer of scores between the first and the third launch, in bytes. Beyond it the third launch computes the
# scores again from Q and K.
MAX_STASH = 256 << 20
# Partial results that paged_merge_kernel loads at once.
_MERGED_AT_ONCE = 16


@dataclass(frozen=True, eq=False, slots=True)
class PagedPlan:
    """The launches for one configuration and number of shares.

    ``partial`` and ``stash`` are sizes of buffers in float32 elements; 0 means none. ``*numbers`` are the arguments of
    a kernel after its tensors, constexprs included, in the order of its parameters: a keyword adds 0.1 µs to a launch.
    """

    config: PagedAttentionConfig
    shares: int
    grid: tuple[int, ...]
    merge_grid: tuple[int] | None
    scores_grid: tuple[int, int]
    partial: int
    stash: int
    numbers: tuple[Any, ...]
    merge_numbers: tuple[Any, ...]
    scores_numbers: tuple[Any, ...]
    merge_warps: int
    scores_warps: int


class PagedKind:
    """What the launches of paged attention need of their arguments, except data.

    The heads of a uniform cache share the schedule of their sequence; they are an axis of the grid (``axis_heads``).
    """

    kernel: ClassVar[Any] = paged_attention_kernel  # whose parameters ``PagedPlan.numbers`` fill
    # Rows of a list up to which a batch-invariant call cuts it, even if they fill several row tiles.
    most_invariant_rows: ClassVar[int] = 0

    # Over 80 lines: 26 are the signature, 49 the table of the kernels' numbers.
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
        k_slot_scale: torch.Tensor | None = None,
        v_slot_scale: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
        score_reduce: str = "sum",
        score_decay: float = 1.0,
        schedule: torch.Tensor | None = None,
        batch_invariant: bool = False,
        cu_seqlens_q: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        out: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        score_last: int = -1,
        score_decays: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        self.packed = cu_seqlens_q is not None
        if cu_seqlens_q is not None:
            q, query_positions, out = in_every_row(cu_seqlens_q, q, query_positions, out)
            q_lens = cu_seqlens_q
        batch, tokens, query_heads, self.head_dim = q.shape
        self.num_tokens = tokens if max_seqlen_q is None else max_seqlen_q
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
        self.units = self.lists * triton.cdiv(self.max_blocks * self.block_size, self.unit)
        self.out_shape = (batch, tokens, query_heads, self.value_dim)[self.packed :]
        self.lse_shape = (batch, query_heads, tokens)[self.packed :]
        self.empty = 0 in (batch, self.num_tokens, *self.lse_shape)
        self.as_bytes = torch.float8_e4m3fn in (k_cache.dtype, v_cache.dtype)
        self.block_d, self.block_dv = padded(self.head_dim), padded(self.value_dim)
        # What the configuration is chosen by.
        varying = (0, 0) if batch_invariant else (self.lists * self.axis_heads, self.max_blocks * self.block_size)
        width = max(self.block_d, self.block_dv)
        # Where K and V differ, by the narrower one: its tiles are no larger, and proven with both sides converted.
        narrower = min(k_cache.element_size(), v_cache.element_size())
        self.problem = width, q.element_size(), narrower, self.block_size, self.rows, *varying

        if window_left >= 2**31 - 1 - self.num_tokens:  # it hides nothing, and places less it leave int32
            window_left = -1
        self.window_left = window_left
        self.scored = scores is not None
        if tree_mask is not None:
            tree_mask = tree_mask.expand(batch, -1, -1)
        self.by_place = window_left >= 0 or alibi_slopes is not None  # positions count
        row = 0 if self.packed else query_heads * tokens  # what separates two rows of results, times their width
        out_strides = row * self.value_dim, query_heads * self.value_dim, self.value_dim
        self.numbers: dict[str, Any] = {  # by the kernels' parameter names
            **strides("stride_q", "bth", q.stride()[:3]),
            **strides("stride_k", "bsh", slot_strides(k_cache[..., 0])),
            **strides("stride_v", "bsh", slot_strides(v_cache[..., 0])),
            **strides("stride_t", "bhn", (*list_strides(block_tables, k_cache), block_tables.stride(-1))),
            **strides("stride_l", "bh", list_strides(seq_lens, k_cache)),
            "stride_nb": 0 if q_lens is None else q_lens.stride(0),
            **strides("stride_p", "bsh", slot_strides(positions if self.by_place else None)),
            **strides(
                "stride_qp", "bt", query_positions.stride() if self.by_place and query_positions is not None else (0, 0)
            ),
            **strides("stride_m", "btj", (0, 0, 0) if tree_mask is None else tree_mask.stride()),
            **strides("stride_s", "bsh", slot_strides(scores)),
            "stride_k_scale": scale_stride(k_scale),
            "stride_v_scale": scale_stride(v_scale),
            **slot_scale_strides("k", k_slot_scale),
            **slot_scale_strides("v", v_slot_scale),
            "stride_sinks": 0 if sinks is None else sinks.stride(0),
            "stride_slopes_b": slope_stride(alibi_slopes),
            **bias_numbers(bias, batch, query_heads, tokens),
            **strides("stride_o", "bth", out_strides if out is None else out.stride()[:3]),
            **strides("stride_lse_", "bh", (row, tokens)),
            "num_tokens": self.num_tokens,
            "max_blocks": self.max_blocks,
            "lists": self.lists,
            "window_left": window_left,
            "scale": self.head_dim**-0.5 if scale is None else scale,
            "softcap": softcap,
            "decay": score_decay,
            "score_last": min(score_last, 2**31 - 1),
            "HEADS": self.heads,
            "LIST_HEADS": self.list_heads,
            "AXIS_HEADS": self.axis_heads,
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "VALUE_DIM": self.value_dim,
            "BLOCK_SIZE": self.block_size,
            "UNIT": self.unit,
            "CAUSAL": causal and tree_mask is None,
            "HAS_WINDOW": window_left >= 0,
            "HAS_SOFTCAP": softcap > 0,
            "PACKED": self.packed,
            "INVARIANT": batch_invariant,
            "HAS_LAST": score_last >= 0,
            "REDUCE": score_reduce,
            "BLOCK_D": self.block_d,
            "BLOCK_DV": self.block_dv,
            "BLOCK_P": _MERGED_AT_ONCE,
        }
        self._plan: PagedPlan | None = None

    def plan(self, config: PagedAttentionConfig, shares: int) -> PagedPlan:
        plan = self._plan
        if plan is None or plan.config is not config or plan.shares != shares:
            plan = self._plan = self._new_plan(config, shares)
        return plan

    def results(self, q: torch.Tensor, out: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tensor that kernels write, what the operator returns for it (nothing for a given ``out``), and lse."""
        lse = q.new_empty(*self.lse_shape, dtype=torch.float32)  # sizes one by one: a tuple takes 0.5 µs more
        if out is None:
            out = result = q.new_empty(*self.out_shape)
            if self.packed:
                out.zero_()
        else:
            result = q.new_empty(0)
        if self.packed:  # no program has the tokens of no sequence
            lse.fill_(float("-inf"))
        return out, result, lse

    def partial_size(self, places: int) -> int:
        """float32 elements of so many partial results: of a row the weighted sum of V, its maximum and its sum."""
        return self.axis_heads * places * self.rows * (self.value_dim + 2)

    def tile(self, config: PagedAttentionConfig) -> PagedAttentionConfig:
        """The configuration with the tile for these arguments.

        A tile of bias needs registers as the scores do: beside windows and ALiBi whole tiles spill (sm_80). Those of
        wider heads are small, and half of one makes ptxas allot so few registers that it spills (sm_90). With scales of
        slots the wide tiles of narrow heads spill beside scores (sm_90, sm_120).
        """
        width = max(self.block_d, self.block_dv)
        slot_scales = any(self.numbers[f"stride_{side}_slot_b"] is not None for side in "kv")
        if (self.numbers["bias_slots"] is not None and width <= 128) or (slot_scales and width <= 64):
            return replace(config, block_n=max(16, config.block_n // 2))
        return config

    def _new_plan(self, config: PagedAttentionConfig, shares: int) -> PagedPlan:
        tile = self.tile(config)
        row_tiles = triton.cdiv(self.rows, tile.block_m)
        all_heads = self.lists * self.axis_heads
        split = row_tiles == 1 or row_tiles * all_heads < shares
        if self.invariant:
            split = row_tiles == 1 or self.rows <= self.most_invariant_rows
        # Row tiles and heads multiply the number of programs, so each program takes that many shares.
        coarse = min(shares, row_tiles * self.axis_heads)
        programs = triton.cdiv(shares, coarse) if split else all_heads
        # One pass over the slots serves all row tiles of the scores: only heads multiply the programs there.
        scores_coarse = min(shares, self.axis_heads)
        # The slots of all lists, padded to units, form a line. The most units that it can have: by the tables, and for
        # scores by the pool, as lists with scores own their blocks.
        line = min(self.units, triton.cdiv(self.num_blocks * self.block_size, self.unit) + self.lists) * self.unit
        stash = self.axis_heads * self.rows * line if self.scored and row_tiles == 1 else 0
        places = max(self.units, 1) if self.invariant else programs + self.lists  # a kernel cannot take an empty buffer
        numbers = self.numbers | {
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "SPLIT": split,
            "coarse": coarse,
            "programs": programs,
            "line": line,
            "places": places,
        }
        stash = stash if 4 * stash <= MAX_STASH else 0
        return PagedPlan(
            config,
            shares,
            grid=(programs * row_tiles, self.axis_heads) if split else (programs * row_tiles,),
            merge_grid=(all_heads * self.rows,) if split else None,
            scores_grid=(triton.cdiv(shares, scores_coarse), self.axis_heads),
            partial=self.partial_size(places) if split else 0,
            stash=stash,
            numbers=positional(self.kernel, "stride_qb", numbers),
            merge_numbers=positional(paged_merge_kernel, "stride_nb", numbers),
            scores_numbers=positional(paged_scores_kernel, "stride_qb", numbers | {"coarse": scores_coarse}),
            merge_warps=4 if self.block_dv >= 64 else 1,
            # From the stash a thread reads slots of its own; more threads than slots would read them twice.
            scores_warps=min(tile.num_warps, max(tile.block_n // 32, 1)) if stash else tile.num_warps,
        )
