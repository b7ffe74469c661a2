"""The kernels behind ``kvops.kernels.paged_attention``: partial results of shares of ragged lists, and their merge."""

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
    visible_range,
    visible_slots,
    weight_unit,
)
from kvops.kernels.primitives import LARGEST, LN_2, LOG2_E, dot, log2_scores, online_softmax_step, page_address


# Over 80 lines: 76 are the signature; one loop over lists holds a tile of queries and its sums.
@triton.jit(
    do_not_specialize=[*UNSPECIALISED, "lists", "coarse", "programs", "places", "window_left"],
    do_not_specialize_on_alignment=READ_AS_SCALARS,
)
def paged_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
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
    v_scale_ptr,
    v_slot_scale_ptr,
    sinks_ptr,
    schedule_ptr,
    stash_ptr,
    partial_ptr,
    out_ptr,
    lse_ptr,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
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
    stride_v_scale,
    stride_k_slot_b,
    stride_k_slot_s,
    stride_k_slot_h,
    stride_v_slot_b,
    stride_v_slot_s,
    stride_v_slot_h,
    stride_sinks,
    stride_slopes_b,
    stride_bias_b,
    stride_bias_h,
    stride_bias_t,
    stride_bias_s,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_lse_b,
    stride_lse_h,
    num_tokens,
    max_blocks,
    bias_slots,
    lists,
    coarse,
    programs,
    line,
    places,
    window_left,
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
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    INVARIANT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """SPLIT: program (share, row tile, head of a uniform cache) writes partial results. Otherwise program (list, row
    tile) writes out and lse. ``programs`` counts the shares or lists. Row tiles are on the grid's first axis, too, as
    the others end at 65,535. LIST_HEADS is the number of heads with lists of their own: HEADS, or 1 if they share."""
    program = tl.program_id(0) % programs
    rows = tl.program_id(0) // programs * BLOCK_M + tl.arange(0, BLOCK_M)
    num_rows = num_tokens * GROUP
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
    while begin < end:
        batch = (index // LIST_HEADS).to(tl.int64)
        head = index % LIST_HEADS + axis_head
        length = tl.load(seq_lens_ptr + batch * stride_lb + head * stride_lh)
        length = tl.minimum(length, max_blocks * BLOCK_SIZE)
        if SPLIT:
            list_begin = tl.load(schedule_ptr + 1 + index)
            list_end = tl.load(schedule_ptr + 2 + index)
            part_end = tl.minimum(end, list_end)
            if INVARIANT:
                part_end = tl.minimum(part_end, begin + 1)
            start = (begin - list_begin) * UNIT
            unit_stop = (part_end - list_begin) * UNIT
            stop = tl.minimum(length, unit_stop)
        else:
            list_end = 1
            part_end = 1
            unit_stop = length
            start = 0
            stop = length

        first_token, count, with_results = new_tokens(batch, q_lens_ptr, stride_nb, num_tokens, PACKED)
        query_place, limit, oldest, token, new_slot = row_limits(
            rows, length, batch, first_token, count, query_positions_ptr, stride_qpb, stride_qpt, window_left, GROUP,
            CAUSAL,
        )  # fmt: skip
        row_mask = rows < with_results * GROUP
        place = first_token + token  # in this row of q
        start, stop = visible_range(limit, oldest, start, stop, HAS_WINDOW, query_positions_ptr is not None, BLOCK_SIZE)
        if bias_ptr is not None:
            stop = tl.minimum(stop, bias_slots)
        query_head = head * GROUP + rows % GROUP
        columns = tl.arange(0, BLOCK_D)
        q = tl.load(  # [BLOCK_M, BLOCK_D]
            q_ptr
            + batch * stride_qb
            + (place.to(tl.int64) * stride_qt + query_head * stride_qh)[:, None]
            + columns[None, :],
            mask=row_mask[:, None] & (columns < HEAD_DIM)[None, :],
            other=0.0,
        )
        list_scale = cache_scale(scale, k_ptr, k_scale_ptr, head * stride_k_scale)
        slope = alibi_slope(slopes_ptr, batch, query_head[:, None], stride_slopes_b)
        table = table_ptr + batch * stride_tb + head * stride_th

        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        for first in tl.range(start, stop, BLOCK_N):
            slots = first + tl.arange(0, BLOCK_N)
            inside = slots < stop
            block, offset = page_address(table, slots, inside, stride_tn, BLOCK_SIZE)
            k_cell = block * stride_kb + offset * stride_ks + head * stride_kh
            k = load_slots(k_ptr, k_cell, inside, HEAD_DIM, BLOCK_D, q.dtype)  # [BLOCK_N, BLOCK_D]
            s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))  # [BLOCK_M, BLOCK_N]
            key_places = slot_places(
                slots, inside, block, offset,
                None if positions_ptr is None else positions_ptr + head * stride_ph, stride_pb, stride_ps,
            )  # fmt: skip
            distance = query_place[:, None] - key_places[None, :]
            key_scale = slot_scales(
                list_scale, k_slot_scale_ptr, block, offset, head, inside, stride_k_slot_b, stride_k_slot_s,
                stride_k_slot_h,
            )  # fmt: skip
            s, _ = log2_scores(s, distance, key_scale, softcap, slope, HAS_SOFTCAP, slopes_ptr is not None)
            if bias_ptr is not None:
                s = biased(
                    s, bias_ptr, batch, query_head, place, rows, with_results * GROUP, slots, stop,
                    stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s,
                )  # fmt: skip
            seen = visible_slots(
                slots, inside, key_places, limit, oldest, token, new_slot,
                None if tree_ptr is None else tree_ptr + batch * stride_mb, stride_mt, stride_mj, num_tokens,
                HAS_WINDOW,
            )  # fmt: skip
            s = tl.where(seen, s, float("-inf"))
            if stash_ptr is not None:
                in_line = tl.load(schedule_ptr + 1 + index).to(tl.int64) * UNIT + slots  # of all lists
                cell = (axis_head * num_rows + rows)[:, None] * line + in_line[None, :]
                written = (slots < unit_stop) & (in_line < line)  # whole units: the stores stay wide
                tl.store(stash_ptr + cell, s, mask=row_mask[:, None] & written[None, :])
            p, rescale, m, l = online_softmax_step(s, m, l)
            v_cell = block * stride_vb + offset * stride_vs + head * stride_vh
            v = load_slots(v_ptr, v_cell, inside, VALUE_DIM, BLOCK_DV, q.dtype)  # [BLOCK_N, BLOCK_DV]
            if v_slot_scale_ptr is not None:
                p *= slot_scales(
                    weight_unit(v_ptr), v_slot_scale_ptr, block, offset, head, inside, stride_v_slot_b, stride_v_slot_s,
                    stride_v_slot_h,
                )  # fmt: skip
            acc = dot(p.to(v.dtype), v, acc * rescale[:, None])  # [BLOCK_M, BLOCK_DV]
        if v_slot_scale_ptr is not None:
            acc = acc / weight_unit(v_ptr)

        value_columns = tl.arange(0, BLOCK_DV)
        if SPLIT:
            partial_m_ptr, partial_l_ptr = _beside_sums(partial_ptr, places, num_rows, HEADS // LIST_HEADS, VALUE_DIM)
            if INVARIANT:
                # Each unit of the line has a place; an empty list has none.
                part = begin
                row_mask &= (part_end > begin) & (begin < places)
            else:
                # A share's end and a list's end each move the sum on: no two results share a place.
                part = program + index
            cell = (axis_head * places + part) * num_rows + rows
            tl.store(partial_m_ptr + cell, m, mask=row_mask)
            tl.store(partial_l_ptr + cell, l, mask=row_mask)
            mask = row_mask[:, None] & (value_columns < VALUE_DIM)[None, :]
            tl.store(partial_ptr + cell[:, None] * VALUE_DIM + value_columns[None, :], acc, mask=mask)
        else:
            weight, lse = _normalise(m, l, sinks_ptr, query_head * stride_sinks)
            acc = acc * (weight * cache_scale(1.0, v_ptr, v_scale_ptr, head * stride_v_scale))[:, None]
            out_row = batch * stride_ob + place.to(tl.int64) * stride_ot + query_head * stride_oh
            mask = row_mask[:, None] & (value_columns < VALUE_DIM)[None, :]
            tl.store(out_ptr + out_row[:, None] + value_columns[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
            lse_cell = batch * stride_lse_b + query_head * stride_lse_h + place
            tl.store(lse_ptr + lse_cell, lse, mask=row_mask)
        begin = part_end
        if INVARIANT:
            index += (begin == list_end).to(tl.int32)
        else:
            index += 1


@triton.jit
def _beside_sums(partial_ptr, places, num_rows, AXIS_HEADS: tl.constexpr, VALUE_DIM: tl.constexpr):
    """Where m and l of the partial results stand: behind acc, in the same buffer."""
    count = tl.cast(places, tl.int64) * num_rows * AXIS_HEADS
    partial_m_ptr = partial_ptr + count * VALUE_DIM
    return partial_m_ptr, partial_m_ptr + count


@triton.jit
def _normalise(m, l, sinks_ptr, sink_offset):
    """What to multiply acc by, and lse; both for rows that may see nothing. A sink joins a row that sees a key."""
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + sink_offset).to(tl.float32) * LOG2_E
        # Finite, as neither infinity can be subtracted from itself: a sink may be one, and m is -inf in an empty row.
        highest = tl.minimum(tl.maximum(tl.maximum(m, sink), -LARGEST), LARGEST)
        weight = tl.exp2(m - highest)
        total = l * weight + tl.exp2(sink - highest)
    else:
        highest = m
        weight = 1.0
        total = l
    empty = l == 0.0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), (highest + tl.log2(total)) * LN_2)
    return weight / total, lse


# Over 80 lines: 29 are the signature.
@triton.jit(
    do_not_specialize=[*UNSPECIALISED, "coarse", "places"], do_not_specialize_on_alignment=[*READ_AS_SCALARS, "v_ptr"]
)
def paged_merge_kernel(
    partial_ptr,
    schedule_ptr,
    q_lens_ptr,
    sinks_ptr,
    v_ptr,
    v_scale_ptr,
    out_ptr,
    lse_ptr,
    stride_nb,
    stride_sinks,
    stride_v_scale,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_lse_b,
    stride_lse_h,
    num_tokens,
    coarse,
    places,
    LIST_HEADS: tl.constexpr,
    AXIS_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PACKED: tl.constexpr,
    INVARIANT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Merge the partial results of one row (token, query head) of one list."""
    pid = tl.program_id(0)
    num_rows = num_tokens * GROUP
    row = pid % num_rows
    axis_head = (pid // num_rows % AXIS_HEADS).to(tl.int64)
    index = pid // num_rows // AXIS_HEADS
    token = row // GROUP
    batch = (index // LIST_HEADS).to(tl.int64)
    head = index % LIST_HEADS + axis_head
    query_head = head * GROUP + row % GROUP
    first_token = 0
    if PACKED:
        first_token, _, with_results = new_tokens(batch, q_lens_ptr, stride_nb, num_tokens, PACKED)
        if token >= with_results:
            return

    partial_m_ptr, partial_l_ptr = _beside_sums(partial_ptr, places, num_rows, AXIS_HEADS, VALUE_DIM)
    begin = tl.load(schedule_ptr + 1 + index)
    end = tl.load(schedule_ptr + 2 + index)
    if INVARIANT:
        part = begin
        parts_end = tl.minimum(end, places)
    else:
        share = tl.load(schedule_ptr) * coarse
        part = begin // share + index
        parts_end = tl.where(end > begin, (end - 1) // share + index + 1, part)
    columns = tl.arange(0, BLOCK_DV)
    # Each of BLOCK_P lines merges every BLOCK_P-th partial result by itself; the lines meet behind the loop.
    m = tl.full([BLOCK_P], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_P], tl.float32)
    acc = tl.zeros([BLOCK_P, BLOCK_DV], tl.float32)
    for first in range(part, parts_end, BLOCK_P):
        parts = first + tl.arange(0, BLOCK_P)
        inside = parts < parts_end
        place = (axis_head * places + parts) * num_rows + row
        part_m = tl.load(partial_m_ptr + place, mask=inside, other=float("-inf"))  # [BLOCK_P]
        part_l = tl.load(partial_l_ptr + place, mask=inside, other=0.0)
        part_acc = tl.load(  # [BLOCK_P, BLOCK_DV]
            partial_ptr + place[:, None] * VALUE_DIM + columns[None, :],
            mask=inside[:, None] & (columns < VALUE_DIM)[None, :],
            other=0.0,
        )
        m_new = tl.maximum(m, part_m)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        rescale = tl.exp2(m - shift)
        weight = tl.exp2(part_m - shift)
        l = l * rescale + part_l * weight
        acc = acc * rescale[:, None] + part_acc * weight[:, None]
        m = m_new

    highest = tl.max(m, 0)
    weight = tl.exp2(m - tl.where(highest == float("-inf"), 0.0, highest))  # [BLOCK_P]
    m = tl.full([1], 0.0, tl.float32) + highest
    l = tl.full([1], 0.0, tl.float32) + tl.sum(l * weight, 0)
    acc = tl.sum(acc * weight[:, None], 0)
    weight, lse = _normalise(m, l, sinks_ptr, query_head * stride_sinks)
    acc = acc * (weight * cache_scale(1.0, v_ptr, v_scale_ptr, head * stride_v_scale))
    token_place = first_token + token
    out_row = batch * stride_ob + token_place.to(tl.int64) * stride_ot + query_head * stride_oh
    tl.store(out_ptr + out_row + columns, acc.to(out_ptr.dtype.element_ty), mask=columns < VALUE_DIM)
    lse_cell = batch * stride_lse_b + query_head * stride_lse_h + token_place
    tl.store(lse_ptr + lse_cell + tl.arange(0, 1), lse)
