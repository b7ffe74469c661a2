"""Device functions of attention over paged lists: tiles of slots, and the slots that each row sees."""

import triton
import triton.language as tl

from kvops.kernels.flash_tiles import add_bias
from kvops.kernels.primitives import as_uint8_pointer, e4m3_to_float16, e5m2_to_float16, int8_to_float32

# Triton compiles a kernel again for integers that are 1 or multiples of 16, and for pointers that are aligned to 16
# bytes. Nothing gets faster where a pointer is read one number at a time, or a stride leads to such a number: an engine
# would only meet new variants, each a second or two, as batches and slices of layers change.
READ_AS_SCALARS = (
    "table_ptr",
    "seq_lens_ptr",
    "q_lens_ptr",
    "query_positions_ptr",
    "token_positions_ptr",
    "tree_ptr",
    "k_scale_ptr",
    "v_scale_ptr",
    "sinks_ptr",
    "slopes_ptr",
    "decays_ptr",
    "schedule_ptr",
)
UNSPECIALISED = (
    "num_tokens",
    "max_blocks",
    "bias_slots",
    "stride_tb",
    "stride_th",
    "stride_lb",
    "stride_lh",
    "stride_nb",
    "stride_qpb",
    "stride_qpt",
    "stride_mb",
    "stride_mt",
    "stride_mj",
    "stride_k_scale",
    "stride_v_scale",
    "stride_sinks",
    "stride_slopes_b",
    "stride_lse_b",
    "stride_lse_h",
)


@triton.jit
def load_slots(cache_ptr, cell, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr, DTYPE: tl.constexpr):
    """The rows [BLOCK_N, PADDED] at the offsets ``cell`` of a cache, 0 where not ``inside``. The type of the pointer
    tells the format; uint8 is float8 e4m3, whose rows are divided by 256."""
    columns = tl.arange(0, PADDED)
    rows = tl.load(
        as_uint8_pointer(cache_ptr) + cell[:, None] + columns[None, :],
        mask=inside[:, None] & (columns < WIDTH)[None, :],
        other=0,
    )
    if cache_ptr.dtype.element_ty == tl.uint8:
        values = e4m3_to_float16(rows).to(DTYPE)
    elif cache_ptr.dtype.element_ty == tl.float8e5:
        values = e5m2_to_float16(rows).to(DTYPE)
    elif cache_ptr.dtype.element_ty == tl.int8:
        values = int8_to_float32(rows).to(DTYPE)
    else:
        values = rows
    return values


@triton.jit
def cache_scale(scale, cache_ptr, scale_ptr, offset):
    """``scale`` times what makes the cache's values of what ``load_slots`` returns."""
    if cache_ptr.dtype.element_ty == tl.uint8:
        scale = scale * 256.0
    if scale_ptr is not None:
        scale = scale * tl.load(scale_ptr + offset)
    return scale


@triton.jit
def slot_scales(scale, scale_ptr, block, offset, head, inside, stride_block, stride_slot, stride_head):
    """``scale`` times the scale of each slot, [1, BLOCK_N]; ``scale`` itself where slots have none of their own."""
    if scale_ptr is not None:
        cell = block * stride_block + offset * stride_slot + head * stride_head
        scale = scale * tl.load(scale_ptr + cell, mask=inside, other=0.0)[None, :]
    return scale


@triton.jit
def weight_unit(cache_ptr):
    """A power of two by which weights are multiplied along with the scale of a slot. The product is then about half of
    the weight times the slot's largest value. A scale alone can be 1 / 57,344 of that value, and float16 would keep
    little of its product with a weight."""
    if cache_ptr.dtype.element_ty == tl.uint8:
        unit: tl.constexpr = 256.0  # of values that are divided by 256
    elif cache_ptr.dtype.element_ty == tl.float8e5:
        unit: tl.constexpr = 32768.0
    else:
        unit: tl.constexpr = 64.0  # int8
    return unit


@triton.jit
def slot_places(slots, inside, block, offset, positions_ptr, stride_ps_block, stride_ps_slot):
    """Where the slots are, for windows and ALiBi: their original positions if given, or else their numbers."""
    places = slots
    if positions_ptr is not None:
        places = tl.load(positions_ptr + block * stride_ps_block + offset * stride_ps_slot, mask=inside, other=0)
    return places


@triton.jit
def visible_slots(
    slots, inside, places, limit, oldest, token, new_slot, tree_ptr, stride_mt, stride_mj, num_tokens,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """bool [BLOCK_M, BLOCK_N]: which slots the rows see."""
    seen = inside[None, :] & (slots[None, :] < limit[:, None])
    if HAS_WINDOW:
        seen &= places[None, :] >= oldest[:, None]
    if tree_ptr is not None:
        new = slots - new_slot  # which of the new tokens, negative for older slots
        cell = token.to(tl.int64)[:, None] * stride_mt + new[None, :] * stride_mj
        in_tree = seen & (new >= 0)[None, :] & (new < num_tokens)[None, :]
        allowed = tl.load(tree_ptr + cell, mask=in_tree, other=0)
        seen &= (new < 0)[None, :] | (allowed != 0)
    return seen


@triton.jit
def biased(
    s, bias_ptr, batch, query_head, place, rows, num_rows, slots, stop, stride_b, stride_h, stride_t, stride_s
):  # fmt: skip
    """Log2 scores [BLOCK_M, BLOCK_N] plus the bias of the rows (see ``add_bias``): of the query heads [BLOCK_M] and the
    tokens at ``place`` [BLOCK_M] in this row of q. Only slots before ``stop`` have one."""
    row = batch * stride_b + query_head * stride_h + place.to(tl.int64) * stride_t
    return add_bias(s, bias_ptr + row[:, None], rows[:, None], slots[None, :], 0, stride_s, num_rows, stop)


@triton.jit
def new_tokens(batch, q_lens_ptr, stride_nb, num_tokens, PACKED: tl.constexpr):
    """The new tokens of a sequence: where they begin among those of its row of q, how many are real, and how many have
    results. PACKED: ``q_lens_ptr`` tells where each sequence begins, and where the last one ends."""
    first = 0
    count = num_tokens
    with_results = num_tokens
    if PACKED:
        first = tl.load(q_lens_ptr + batch * stride_nb)
        count = tl.load(q_lens_ptr + (batch + 1) * stride_nb) - first
        with_results = tl.minimum(count, num_tokens)
    elif q_lens_ptr is not None:
        count = tl.minimum(tl.load(q_lens_ptr + batch * stride_nb), num_tokens)
    return first, count, with_results


@triton.jit
def row_limits(
    rows, length, batch, first_token, count, query_positions_ptr, stride_qpb, stride_qpt, window_left,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """What bounds the sight of each row (token * GROUP + head of the group): the place of its query (its slot, or its
    original position), the first slot that it does not see any more, the oldest place in its window, its token, and the
    slot of the first new token."""
    token = rows // GROUP
    new_slot = length - count
    query_place = new_slot + token
    limit = tl.zeros_like(token) + length
    if CAUSAL:
        limit = tl.minimum(limit, query_place + 1)
    limit = tl.where(token < count, limit, 0)
    if query_positions_ptr is not None:
        query_place = tl.load(
            query_positions_ptr + batch * stride_qpb + (first_token + token) * stride_qpt, mask=token < count, other=0
        )
    return query_place, limit, query_place - window_left, token, new_slot


@triton.jit
def visible_range(
    limit, oldest, start, stop, HAS_WINDOW: tl.constexpr, BY_POSITION: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """The part of the slots from ``start`` to ``stop`` that any of the rows may see; a window begins at a block."""
    stop = tl.minimum(stop, tl.max(limit, 0))
    if HAS_WINDOW and not BY_POSITION:
        first = tl.min(tl.where(limit > 0, oldest, stop), 0)
        start = tl.maximum(start, tl.maximum(first, 0) // BLOCK_SIZE * BLOCK_SIZE)
    return start, stop
