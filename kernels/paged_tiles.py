"""Device functions of attention over paged lists: tiles of slots, and the slots that each row sees."""

import triton
import triton.language as tl

from kvops.kernels.primitives import e4m3_to_float16

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
    "schedule_ptr",
)
UNSPECIALISED = (
    "num_tokens",
    "max_blocks",
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
    "stride_lse_b",
    "stride_lse_h",
)


@triton.jit
def load_slots(cache_ptr, cell, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr, DTYPE: tl.constexpr):
    """The rows [BLOCK_N, PADDED] at the offsets ``cell`` of a cache, 0 where not ``inside``."""
    columns = tl.arange(0, PADDED)
    rows = tl.load(
        cache_ptr + cell[:, None] + columns[None, :], mask=inside[:, None] & (columns < WIDTH)[None, :], other=0
    )
    if cache_ptr.dtype.element_ty == tl.uint8:
        values = e4m3_to_float16(rows).to(DTYPE)
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
def visible_slots(
    slots, inside, block, offset, query_slot, limit, oldest, token, new_slot, positions_ptr, stride_ps_block,
    stride_ps_slot, tree_ptr, stride_mt, stride_mj, num_tokens, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """bool [BLOCK_M, BLOCK_N]: which slots the rows see."""
    seen = inside[None, :] & (slots[None, :] < limit[:, None])
    if HAS_WINDOW:
        place = slots
        if positions_ptr is not None:
            place = tl.load(positions_ptr + block * stride_ps_block + offset * stride_ps_slot, mask=inside, other=0)
        seen &= place[None, :] >= oldest[:, None]
    if tree_ptr is not None:
        new = slots - new_slot  # which of the new tokens, negative for older slots
        cell = token.to(tl.int64)[:, None] * stride_mt + new[None, :] * stride_mj
        in_tree = seen & (new >= 0)[None, :] & (new < num_tokens)[None, :]
        allowed = tl.load(tree_ptr + cell, mask=in_tree, other=0)
        seen &= (new < 0)[None, :] | (allowed != 0)
    return seen


@triton.jit
def row_limits(
    rows, length, batch, q_lens_ptr, stride_nb, query_positions_ptr, stride_qpb, stride_qpt, num_tokens, window_left,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """What bounds the sight of each row (token * GROUP + head of the group): the slot of its query, the first slot that
    it does not see any more, the oldest place in its window, its token, and the slot of the first new token."""
    count = num_tokens
    if q_lens_ptr is not None:
        count = tl.minimum(tl.load(q_lens_ptr + batch * stride_nb), num_tokens)
    token = rows // GROUP
    new_slot = length - count
    query_slot = new_slot + token
    limit = tl.zeros_like(token) + length
    if CAUSAL:
        limit = tl.minimum(limit, query_slot + 1)
    limit = tl.where(token < count, limit, 0)
    oldest = query_slot - window_left
    if HAS_WINDOW and query_positions_ptr is not None:
        position = tl.load(
            query_positions_ptr + batch * stride_qpb + token * stride_qpt, mask=token < num_tokens, other=0
        )
        oldest = position - window_left
    return query_slot, limit, oldest, token, new_slot


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
