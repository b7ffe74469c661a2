"""Attention over a paged cache of latents (multi-head latent attention): each slot is read once, as key and as value.

The launches, shares and partial results are those of ``kvops.kernels.paged_attention``. A tile of slots is loaded in
two parts, the latent and the rotary columns behind it. Both give the scores, and the latent is multiplied again with
the probabilities: no second read, and no padding of 576 columns to 1,024. Row tiles of a share follow each other in the
grid, so that they run together and find its slots in the second level cache.
"""

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from kvops.autotune.config import PagedAttentionConfig
from kvops.autotune.lookup import choose
from kvops.kernels.device import current_device
from kvops.kernels.paged import as_bytes, padded

# Private there, as renaming them would change every hash of the kernels that are proven.
from kvops.kernels.paged_attention_kernel import _beside_sums, _normalise, paged_merge_kernel
from kvops.kernels.paged_parts import PartedKind, launch_in_parts, parted
from kvops.kernels.paged_plan import PagedKind
from kvops.kernels.paged_schedule import paged_schedule
from kvops.kernels.paged_tiles import (
    READ_AS_SCALARS,
    UNSPECIALISED,
    cache_scale,
    load_slots,
    new_tokens,
    row_limits,
    visible_range,
)
from kvops.kernels.primitives import dot, log2_scores, online_softmax_step, page_address
from kvops.prepared import prepared


# Over 80 lines: 46 are the signature; one loop over lists holds a tile of queries and its sums.
@triton.jit(
    do_not_specialize=[*UNSPECIALISED, "lists", "coarse", "places"],
    do_not_specialize_on_alignment=READ_AS_SCALARS,
)
def paged_latent_kernel(
    q_ptr,
    cache_ptr,
    table_ptr,
    seq_lens_ptr,
    q_lens_ptr,
    k_scale_ptr,
    schedule_ptr,
    partial_ptr,
    out_ptr,
    lse_ptr,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_tb,
    stride_th,
    stride_tn,
    stride_lb,
    stride_lh,
    stride_nb,
    stride_k_scale,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_lse_b,
    stride_lse_h,
    num_tokens,
    max_blocks,
    lists,
    coarse,
    places,
    scale,
    softcap,
    HEADS: tl.constexpr,
    LIST_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    INVARIANT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """SPLIT: program (share, row tile, head of a uniform cache) writes partial results. Otherwise program (list, row
    tile) writes out and lse. LIST_HEADS is the number of heads with lists of their own: HEADS, or 1 if they share."""
    num_rows = num_tokens * GROUP
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    program = tl.program_id(0) // row_tiles
    first_row = tl.program_id(0) % row_tiles * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    if SPLIT:
        axis_head = tl.program_id(1).to(tl.int64)
        share = tl.load(schedule_ptr) * coarse
        begin = program * share
        end = tl.minimum(begin + share, tl.load(schedule_ptr + 1 + lists))
        index = tl.load(schedule_ptr + 2 + lists + program * coarse)
    else:
        index = program // (HEADS // LIST_HEADS)
        axis_head = program.to(tl.int64) % (HEADS // LIST_HEADS)
        begin = 0
        end = 1
    latent_columns = tl.arange(0, BLOCK_DV)
    rope_columns = tl.arange(0, BLOCK_R)
    while begin < end:
        batch = (index // LIST_HEADS).to(tl.int64)
        head = index % LIST_HEADS + axis_head
        length = tl.load(seq_lens_ptr + batch * stride_lb + head * stride_lh)
        length = tl.minimum(length, max_blocks * BLOCK_SIZE)
        part_end = end
        start = 0
        stop = length
        list_end = 1
        if SPLIT:
            list_begin = tl.load(schedule_ptr + 1 + index)
            list_end = tl.load(schedule_ptr + 2 + index)
            part_end = tl.minimum(end, list_end)
            if INVARIANT:
                part_end = tl.minimum(part_end, begin + 1)
            start = (begin - list_begin) * UNIT
            stop = tl.minimum(length, (part_end - list_begin) * UNIT)

        first_token, count, with_results = new_tokens(batch, q_lens_ptr, stride_nb, num_tokens, PACKED)
        _query_place, limit, oldest, token, _new_slot = row_limits(
            rows, length, batch, first_token, count, None, 0, 0, -1, GROUP, CAUSAL
        )
        row_mask = rows < with_results * GROUP
        start, stop = visible_range(limit, oldest, start, stop, False, False, BLOCK_SIZE)
        # Rows that see nothing are not read. Addresses that hang on the list are computed for each; others the compiler
        # would keep in registers over the loop, and 64 rows would spill.
        seeing = limit > 0
        place = (first_token + tl.where(seeing, token, 0)).to(tl.int64) * stride_qt
        place += (head * GROUP + tl.where(seeing, rows % GROUP, 0)) * stride_qh
        q_row = q_ptr + batch * stride_qb + place[:, None]
        q_latent = tl.load(  # [BLOCK_M, BLOCK_DV]
            q_row + latent_columns[None, :], mask=seeing[:, None] & (latent_columns < VALUE_DIM)[None, :], other=0.0
        )
        q_rope = tl.load(  # [BLOCK_M, BLOCK_R]
            q_row + VALUE_DIM + rope_columns[None, :],
            mask=seeing[:, None] & (rope_columns < HEAD_DIM - VALUE_DIM)[None, :],
            other=0.0,
        )
        list_scale = cache_scale(scale, cache_ptr, k_scale_ptr, head * stride_k_scale)
        table = table_ptr + batch * stride_tb + head * stride_th

        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        for first in tl.range(start, stop, BLOCK_N):
            slots = first + tl.arange(0, BLOCK_N)
            inside = slots < stop
            block, offset = page_address(table, slots, inside, stride_tn, BLOCK_SIZE)
            cell = block * stride_kb + offset * stride_ks + head * stride_kh
            latent = load_slots(cache_ptr, cell, inside, VALUE_DIM, BLOCK_DV, q_latent.dtype)  # [BLOCK_N, BLOCK_DV]
            rope = load_slots(cache_ptr + VALUE_DIM, cell, inside, HEAD_DIM - VALUE_DIM, BLOCK_R, q_rope.dtype)
            s = dot(q_latent, tl.trans(latent), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))  # [BLOCK_M, BLOCK_N]
            s = dot(q_rope, tl.trans(rope), s)
            s, _ = log2_scores(s, 0, list_scale, softcap, 0.0, HAS_SOFTCAP, False)
            s = tl.where(inside[None, :] & (slots[None, :] < limit[:, None]), s, float("-inf"))
            p, rescale, m, l = online_softmax_step(s, m, l)
            acc = dot(p.to(latent.dtype), latent, acc * rescale[:, None])  # [BLOCK_M, BLOCK_DV]

        mask = row_mask[:, None] & (latent_columns < VALUE_DIM)[None, :]
        if SPLIT:
            partial_m_ptr, partial_l_ptr = _beside_sums(partial_ptr, places, num_rows, HEADS // LIST_HEADS, VALUE_DIM)
            if INVARIANT:
                # Each unit of the line has a place; an empty list has none.
                part = begin
                row_mask &= (part_end > begin) & (begin < places)
                mask &= row_mask[:, None]
            else:
                # A share's end and a list's end each move the sum on: no two results share a place.
                part = program + index
            # The tile has one address and constant offsets: an address for each row would stay in registers over the
            # loop.
            part = (axis_head * places + part) * num_rows + first_row
            own_rows = tl.arange(0, BLOCK_M)
            tl.store(partial_m_ptr + part + own_rows, m, mask=row_mask)
            tl.store(partial_l_ptr + part + own_rows, l, mask=row_mask)
            cells = own_rows[:, None] * VALUE_DIM + latent_columns[None, :]
            tl.store(partial_ptr + part * VALUE_DIM + cells, acc, mask=mask)
        else:
            query_head = head * GROUP + rows % GROUP
            weight, lse = _normalise(m, l, None, 0)
            weight = weight * cache_scale(1.0, cache_ptr, k_scale_ptr, head * stride_k_scale)
            place = (first_token + token).to(tl.int64)  # in this row of q
            out_row = batch * stride_ob + place * stride_ot + query_head * stride_oh
            out = (acc * weight[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + out_row[:, None] + latent_columns[None, :], out, mask=mask)
            tl.store(lse_ptr + batch * stride_lse_b + query_head * stride_lse_h + place, lse, mask=row_mask)
        begin = part_end
        if INVARIANT:
            index += (begin == list_end).to(tl.int32)
        else:
            index += 1


class LatentKind(PagedKind):
    """What the launches need of their arguments, except data."""

    kernel = paged_latent_kernel
    # All 128 heads of DeepSeek-V3 read one list, in two row tiles.
    most_invariant_rows = 512

    def __init__(
        self,
        q: torch.Tensor,
        cache: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        value_dim: int,
        cache_scale: torch.Tensor | None = None,
        **options: Any,
    ) -> None:
        options |= {"k_scale": cache_scale, "v_scale": cache_scale}
        super().__init__(q, cache, cache[..., :value_dim], block_tables, seq_lens, **options)
        varying = (0, 0) if self.invariant else (self.lists * self.axis_heads, self.max_blocks * self.block_size)
        self.problem = self.block_dv, q.element_size(), self.block_size, self.rows, *varying
        self.numbers["BLOCK_R"] = padded(self.head_dim - value_dim)
        self.quantised = cache.element_size() == 1

    def tile(self, config: PagedAttentionConfig) -> PagedAttentionConfig:
        """64 rows have no registers left to convert a cache of 8 bits: they spill 62 (sm_90)."""
        return replace(config, block_m=min(config.block_m, 32)) if self.quantised else config


@prepared(parted(LatentKind))
def paged_latent_attention(
    kind: PagedKind | PartedKind,
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    q_lens: torch.Tensor | None = None,
    schedule: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    cache_scale: torch.Tensor | None = None,
    **numbers: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernels; see ``kvops.paged_latent_attention``. ``kind`` has the arguments that are not tensors."""
    if isinstance(kind, PartedKind):
        return launch_in_parts(
            paged_latent_attention.__wrapped__,  # type: ignore[attr-defined]
            kind,
            *(q, cache, block_tables, seq_lens),
            q_lens=q_lens,
            cu_seqlens_q=cu_seqlens_q,
            out=out,
            cache_scale=cache_scale,
        )
    out, result, lse = kind.results(q, out)
    if kind.packed:
        q_lens = cu_seqlens_q
    if kind.empty:
        return result, lse
    if schedule is None:
        schedule = paged_schedule(seq_lens, kind.block_size, batch_invariant=kind.invariant)
    slots = as_bytes(cache) if kind.as_bytes else cache
    config = choose("paged_latent_attention", current_device(), *kind.problem)
    plan = kind.plan(config, schedule.shape[0] - kind.lists - 2)
    partial = q.new_empty(plan.partial, dtype=torch.float32) if plan.partial else None
    paged_latent_kernel[plan.grid](
        q,
        slots,
        block_tables,
        seq_lens,
        q_lens,
        cache_scale,
        schedule,
        partial,
        out,
        lse,
        *plan.numbers,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    if plan.merge_grid is not None:
        paged_merge_kernel[plan.merge_grid](
            partial,
            schedule,
            cu_seqlens_q,
            None,
            slots,
            cache_scale,
            out,
            lse,
            *plan.merge_numbers,
            num_warps=plan.merge_warps,
            enable_fp_fusion=True,
        )
    return result, lse
