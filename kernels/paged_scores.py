"""Scores of the slots of paged lists: attention probabilities reduced over all queries, given the final lse."""

import triton
import triton.language as tl

from kvops.kernels.flash_tiles import alibi_slope
from kvops.kernels.paged_tiles import (
    READ_AS_SCALARS,
    UNSPECIALISED,
    biased,
    cache_scale,
    load_slots,
    new_tokens,
    row_limits,
    slot_places,
    slot_scales,
    visible_slots,
)
from kvops.kernels.primitives import LOG2_E, dot, log2_scores, page_address, without_nan


@triton.jit
def _probabilities(s, seen, lse_ptrs, row_mask):
    """exp(score - lse) [rows, BLOCK_N] of log2 scores, 0 for what is not seen."""
    if row_mask is None:
        lse = tl.load(lse_ptrs)
    else:
        lse = tl.load(lse_ptrs, mask=row_mask, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse * LOG2_E)
    return tl.exp2(tl.where(seen, s - lse[:, None], float("-inf")))


@triton.jit
def _with_rows(reduced, p, REDUCE: tl.constexpr):
    """``reduced`` [BLOCK_N] along with the rows of ``p``."""
    if REDUCE == "max":
        reduced = tl.maximum(reduced, tl.max(without_nan(p), 0))
    elif REDUCE == "sumsq":
        reduced += tl.sum(p * p, 0)
    else:
        reduced += tl.sum(p, 0)
    return reduced


# Over 80 lines: 62 are the signature; one loop over lists, as in paged_attention_kernel.
@triton.jit(
    do_not_specialize=[*UNSPECIALISED, "lists", "coarse", "window_left", "score_last"],
    do_not_specialize_on_alignment=READ_AS_SCALARS,
)
def paged_scores_kernel(
    q_ptr,
    k_ptr,
    table_ptr,
    seq_lens_ptr,
    q_lens_ptr,
    positions_ptr,
    query_positions_ptr,
    tree_ptr,
    k_scale_ptr,
    slopes_ptr,
    k_slot_scale_ptr,
    bias_ptr,
    schedule_ptr,
    stash_ptr,
    lse_ptr,
    scores_ptr,
    decays_ptr,
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
    stride_pb,
    stride_ps,
    stride_ph,
    stride_qpb,
    stride_qpt,
    stride_mb,
    stride_mt,
    stride_mj,
    stride_k_scale,
    stride_k_slot_b,
    stride_k_slot_s,
    stride_k_slot_h,
    stride_slopes_b,
    stride_bias_b,
    stride_bias_h,
    stride_bias_t,
    stride_bias_s,
    stride_lse_b,
    stride_lse_h,
    stride_sb,
    stride_ss,
    stride_sh,
    num_tokens,
    max_blocks,
    bias_slots,
    lists,
    coarse,
    line,
    window_left,
    scale,
    softcap,
    decay,
    score_last,
    LIST_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_LAST: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """scores = decay * scores + the reduction of p over all rows, for every slot that a row sees: program (share, head
    of a uniform cache) owns its slots. The log2 scores come from the stash, or from Q and K once more."""
    program = tl.program_id(0)
    axis_head = tl.program_id(1).to(tl.int64)
    num_rows = num_tokens * GROUP
    share = tl.load(schedule_ptr) * coarse
    begin = program * share
    end = tl.minimum(begin + share, tl.load(schedule_ptr + 1 + lists))
    index = tl.load(schedule_ptr + 2 + lists + program * coarse)
    while begin < end:
        batch = (index // LIST_HEADS).to(tl.int64)
        head = index % LIST_HEADS + axis_head
        length = tl.load(seq_lens_ptr + batch * stride_lb + head * stride_lh)
        length = tl.minimum(length, max_blocks * BLOCK_SIZE)
        list_begin = tl.load(schedule_ptr + 1 + index)
        list_end = tl.minimum(end, tl.load(schedule_ptr + 2 + index))
        start = (begin - list_begin) * UNIT
        unit_stop = (list_end - list_begin) * UNIT
        stop = tl.minimum(length, unit_stop)
        if bias_ptr is not None:
            stop = tl.minimum(stop, bias_slots)
        list_scale = cache_scale(scale, k_ptr, k_scale_ptr, head * stride_k_scale)
        table = table_ptr + batch * stride_tb + head * stride_th
        first_token, count, with_results = new_tokens(batch, q_lens_ptr, stride_nb, num_tokens, PACKED)
        list_rows = with_results * GROUP
        first_tile = 0
        if HAS_LAST:  # rows before do not score
            first_scored = tl.maximum(count - score_last, 0) * GROUP
            first_tile = first_scored if stash_ptr is not None else first_scored // BLOCK_M * BLOCK_M
        list_decay = decay
        if decays_ptr is not None:
            list_decay = tl.load(decays_ptr + batch)
        for first in tl.range(start, stop, BLOCK_N):
            slots = first + tl.arange(0, BLOCK_N)
            inside = slots < stop
            block, offset = page_address(table, slots, inside, stride_tn, BLOCK_SIZE)
            key_places = slot_places(
                slots, inside, block, offset,
                None if positions_ptr is None else positions_ptr + head * stride_ph, stride_pb, stride_ps,
            )  # fmt: skip
            if stash_ptr is None:
                k_cell = block * stride_kb + offset * stride_ks + head * stride_kh
                k = load_slots(k_ptr, k_cell, inside, HEAD_DIM, BLOCK_D, q_ptr.dtype.element_ty)
                key_scale = slot_scales(
                    list_scale, k_slot_scale_ptr, block, offset, head, inside, stride_k_slot_b, stride_k_slot_s,
                    stride_k_slot_h,
                )  # fmt: skip
            reduced = tl.zeros([BLOCK_N], tl.float32)
            any_seen = tl.zeros([BLOCK_N], tl.int32)
            for first_row in range(first_tile, list_rows, BLOCK_M if stash_ptr is None else GROUP):
                # With the stash a step takes the heads of one token, which see the same slots, one by one: each thread
                # reduces its own slots, and no warp waits for another.
                rows = first_row + tl.arange(0, BLOCK_M if stash_ptr is None else 1)
                query_place, limit, oldest, token, new_slot = row_limits(
                    rows, length, batch, first_token, count, query_positions_ptr, stride_qpb, stride_qpt, window_left,
                    GROUP, CAUSAL,
                )  # fmt: skip
                seen = visible_slots(
                    slots, inside, key_places, limit, oldest, token, new_slot,
                    None if tree_ptr is None else tree_ptr + batch * stride_mb, stride_mt, stride_mj, num_tokens,
                    HAS_WINDOW,
                )  # fmt: skip
                place = first_token + token  # in this row of q
                lse_cell = batch * stride_lse_b + place
                if stash_ptr is not None:
                    in_line = list_begin.to(tl.int64) * UNIT + slots
                    # What is not seen may never have been written; a mask of whole units keeps the loads wide.
                    written = (slots < unit_stop) & (in_line < line)
                    for row in tl.range(first_row, first_row + GROUP, loop_unroll_factor=4):
                        cell = (axis_head * num_rows + row) * line + in_line
                        s = tl.load(stash_ptr + cell, mask=written, other=0.0)[None, :]
                        query_head = head * GROUP + row % GROUP
                        p = _probabilities(s, seen, lse_ptr + lse_cell + query_head * stride_lse_h, None)
                        reduced = _with_rows(reduced, p, REDUCE)
                        if bias_ptr is not None:  # it may hide a slot from one head alone
                            own_seen = seen & (s != float("-inf"))
                            any_seen = tl.maximum(any_seen, tl.max(own_seen.to(tl.int32), 0))
                else:
                    row_mask = rows < list_rows
                    query_head = head * GROUP + rows % GROUP
                    if HAS_LAST:
                        seen &= (rows >= first_scored)[:, None]
                    columns = tl.arange(0, BLOCK_D)
                    q = tl.load(
                        q_ptr
                        + batch * stride_qb
                        + (place.to(tl.int64) * stride_qt + query_head * stride_qh)[:, None]
                        + columns[None, :],
                        mask=row_mask[:, None] & (columns < HEAD_DIM)[None, :],
                        other=0.0,
                    )
                    s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))  # [BLOCK_M, BLOCK_N]
                    distance = query_place[:, None] - key_places[None, :]
                    slope = alibi_slope(slopes_ptr, batch, query_head[:, None], stride_slopes_b)
                    s, _ = log2_scores(s, distance, key_scale, softcap, slope, HAS_SOFTCAP, slopes_ptr is not None)
                    if bias_ptr is not None:
                        s = biased(
                            s, bias_ptr, batch, query_head, place, rows, list_rows, slots, stop,
                            stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s,
                        )  # fmt: skip
                        seen &= s != float("-inf")
                    p = _probabilities(s, seen, lse_ptr + lse_cell + query_head * stride_lse_h, row_mask)
                    reduced = _with_rows(reduced, p, REDUCE)
                if bias_ptr is None or stash_ptr is None:
                    any_seen = tl.maximum(any_seen, tl.max(seen.to(tl.int32), 0))
            cell = block * stride_sb + offset * stride_ss + head * stride_sh
            updated = inside & (any_seen > 0)
            score = tl.load(scores_ptr + cell, mask=updated, other=0.0)
            tl.store(scores_ptr + cell, list_decay * score + reduced, mask=updated)
        begin = list_end
        index += 1
