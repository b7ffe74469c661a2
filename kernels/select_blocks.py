"""Selection of the slots to keep: keys, each head's share of the budget, and the best slots of each list.

Every score becomes an int32 key of the same order; the rest is integer counting. One program serves one list, and one
program shares the budget among the heads of a sequence.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvops.autotune.config import SelectBlocksConfig
from kvops.autotune.lookup import choose
from kvops.kernels.device import current_device
from kvops.kernels.radix import (
    ABSENT,
    PROTECTED,
    ordered_keys,
    ordered_values,
    radix_select,
    radix_sort_descending,
)

# Integers and pointers that Triton need not compile again for: see kvops.kernels.paged_tiles.
_INTEGERS = (
    "stride_tb",
    "stride_th",
    "stride_lb",
    "stride_lh",
    "stride_budget",
    "heads",
    "slots",
    "blocks",
    "candidates",
    "bits",
    "protect_first",
    "protect_last",
    "min_per_head",
)
_POINTERS = ("tables_ptr", "lens_ptr", "least_ptr", "most_ptr", "budget_ptr", "shares_ptr", "new_lens_ptr", "cut_ptr")


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_POINTERS)
def slot_keys_kernel(
    scores_ptr,
    positions_ptr,
    tables_ptr,
    lens_ptr,
    keys_ptr,
    least_ptr,
    most_ptr,
    stride_s,
    stride_p,
    stride_tb,
    stride_th,
    stride_lb,
    stride_lh,
    heads,
    slots,
    protect_first,
    protect_last,
    min_per_head,
    SIZE: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The keys of one list in list order, and the fewest and the most blocks that it may keep."""
    list_number = tl.program_id(0).to(tl.int64)
    b = list_number // heads
    h = list_number % heads
    length = tl.load(lens_ptr + b * stride_lb + h * stride_lh)
    table_ptr = tables_ptr + b * stride_tb + h * stride_th
    keys_ptr += list_number * slots
    last = (length - 1).to(tl.int64)
    if HAS_POSITIONS:
        final = tl.maximum(length - 1, 0)
        final_block = tl.load(table_ptr + final // SIZE, mask=length > 0, other=0).to(tl.int64)
        last = tl.load(positions_ptr + final_block * stride_p + final % SIZE, mask=length > 0, other=0).to(tl.int64)
    protected_count = 0
    for start in range(0, length, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        present = slot < length
        block = tl.load(table_ptr + slot // SIZE, mask=present, other=0).to(tl.int64)
        key = ordered_keys(tl.load(scores_ptr + block * stride_s + slot % SIZE, mask=present, other=0.0))  # [BLOCK]
        place = slot
        if HAS_POSITIONS:
            place = tl.load(positions_ptr + block * stride_p + slot % SIZE, mask=present, other=0)
        recent = (place > last - protect_last) & (protect_last > 0)
        protected = ((place < protect_first) | recent) & present
        tl.store(keys_ptr + slot, tl.where(protected, PROTECTED, key), mask=present)
        protected_count += tl.sum(protected.to(tl.int32), 0)
    floor = tl.maximum(protected_count, tl.minimum(length, min_per_head))
    tl.store(least_ptr + list_number, tl.cdiv(floor, SIZE))
    tl.store(most_ptr + list_number, tl.cdiv(length, SIZE))


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_POINTERS)
def even_shares_kernel(least_ptr, most_ptr, budget_ptr, shares_ptr, stride_budget, heads, bits, HEADS: tl.constexpr):
    """The same share for all heads of one sequence, within what each must and can keep."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HEADS)
    head = h < heads
    least = tl.load(least_ptr + b * heads + h, mask=head, other=0)  # [HEADS]
    most = tl.load(most_ptr + b * heads + h, mask=head, other=0)
    budget = tl.maximum(tl.load(budget_ptr + b * stride_budget), 0)
    level = budget * 0
    for i in range(bits):
        higher = level + (1 << (bits - 1 - i))
        total = tl.sum(tl.minimum(tl.maximum(least, higher), most), 0)
        level = tl.where(total <= budget, higher, level)
    shares = tl.minimum(tl.maximum(least, level), most)
    more = ((level >= least) & (level < most)).to(tl.int32)
    left = budget - tl.sum(shares, 0)
    shares += tl.where(tl.cumsum(more, 0) <= left, more, 0)
    tl.store(shares_ptr + b * heads + h, shares, mask=head)


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_POINTERS)
def sort_keys_kernel(keys_ptr, lens_ptr, stride_buffer, stride_lb, stride_lh, heads, slots, BLOCK: tl.constexpr):
    """The keys of one list in descending order, from buffer 0 to buffer 2."""
    list_number = tl.program_id(0).to(tl.int64)
    length = tl.load(lens_ptr + (list_number // heads) * stride_lb + (list_number % heads) * stride_lh)
    radix_sort_descending(keys_ptr + list_number * slots, stride_buffer, length, BLOCK)


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_POINTERS)
def block_worth_kernel(
    sorted_ptr,
    lens_ptr,
    least_ptr,
    most_ptr,
    worth_ptr,
    stride_lb,
    stride_lh,
    heads,
    slots,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What each candidate block of one list is worth, as a key: the sum of its scores."""
    list_number = tl.program_id(0).to(tl.int64)
    b = list_number // heads
    h = list_number % heads
    length = tl.load(lens_ptr + b * stride_lb + h * stride_lh)
    least = tl.load(least_ptr + list_number)
    most = tl.load(most_ptr + list_number)
    sorted_ptr += list_number * slots
    # Slots that the last block lacks count as the list's lowest score or 0, so that worth never rises along a list.
    lowest = tl.load(sorted_ptr + length - 1, mask=length > 0, other=0)
    padding = tl.minimum(ordered_values(lowest), 0.0)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(SIZE):
        slot = block * SIZE + i
        value = ordered_values(tl.load(sorted_ptr + slot, mask=slot < length, other=0))
        total += tl.where(slot < length, value, padding) * (1.0 / SIZE)
    candidate = (block >= least) & (block < most)
    blocks = slots // SIZE
    tl.store(
        worth_ptr + (b * blocks + block) * heads + h,
        tl.where(candidate, ordered_keys(total), ABSENT),
        mask=block < blocks,
    )


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_POINTERS)
def compete_kernel(
    worth_ptr,
    least_ptr,
    most_ptr,
    budget_ptr,
    cut_ptr,
    stride_budget,
    heads,
    candidates,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where to cut the candidates of all heads of one sequence: the threshold and the last candidate taken at it."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HEADS)
    least = tl.load(least_ptr + b * heads + h, mask=h < heads, other=0)
    most = tl.load(most_ptr + b * heads + h, mask=h < heads, other=0)
    budget = tl.load(budget_ptr + b * stride_budget)
    room = tl.maximum(tl.minimum(budget - tl.sum(least, 0), tl.sum(most - least, 0)), 0)
    worth_ptr += b * candidates
    threshold, ties, _ = radix_select(worth_ptr, candidates, room, BLOCK)
    final = room * 0 - 1
    seen = room * 0
    for start in range(0, candidates, BLOCK):
        candidate = start + tl.arange(0, BLOCK)
        worth = tl.load(worth_ptr + candidate, mask=candidate < candidates, other=ABSENT)
        equal = ((worth == threshold) & (candidate < candidates)).to(tl.int32)
        taken = (equal > 0) & (seen + tl.cumsum(equal, 0) <= ties)
        final = tl.maximum(final, tl.max(tl.where(taken, candidate, -1), 0))
        seen += tl.sum(equal, 0)
    tl.store(cut_ptr + 2 * b, threshold)
    tl.store(cut_ptr + 2 * b + 1, final)


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_POINTERS)
def competed_shares_kernel(
    worth_ptr, least_ptr, cut_ptr, shares_ptr, heads, blocks, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Count the blocks of each head that stand above the cut."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    head = h < heads
    threshold = tl.load(cut_ptr + 2 * b)
    final = tl.load(cut_ptr + 2 * b + 1)
    worth_ptr += b * blocks * heads
    counts = tl.zeros([BLOCK, BLOCK_H], tl.int32)
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        candidate = block[:, None] * heads + h[None, :]  # [BLOCK, BLOCK_H]
        within = (block < blocks)[:, None] & head[None, :]
        worth = tl.load(worth_ptr + candidate, mask=within, other=ABSENT)
        taken = (worth > threshold) | ((worth == threshold) & (candidate <= final))
        counts += (taken & within).to(tl.int32)
    shares = tl.load(least_ptr + b * heads + h, mask=head, other=0) + tl.sum(counts, 0)
    tl.store(shares_ptr + b * heads + h, shares, mask=head)


@triton.jit(do_not_specialize=_INTEGERS, do_not_specialize_on_alignment=_POINTERS)
def keep_best_kernel(
    keys_ptr,
    lens_ptr,
    shares_ptr,
    new_lens_ptr,
    keep_ptr,
    stride_lb,
    stride_lh,
    heads,
    slots,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mark the best slots of one list, as many as its blocks hold; of equal keys the later ones."""
    list_number = tl.program_id(0).to(tl.int64)
    length = tl.load(lens_ptr + (list_number // heads) * stride_lb + (list_number % heads) * stride_lh)
    new_length = tl.minimum(length, tl.load(shares_ptr + list_number) * SIZE)
    keys_ptr += list_number * slots
    threshold, ties, equal_total = radix_select(keys_ptr, length, new_length, BLOCK)
    seen = length * 0
    for start in range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        key = tl.load(keys_ptr + slot, mask=slot < length, other=ABSENT)
        equal = ((key == threshold) & (slot < length)).to(tl.int32)
        late = seen + tl.cumsum(equal, 0) > equal_total - ties
        kept = (slot < length) & ((key > threshold) | ((equal > 0) & late))
        tl.store(keep_ptr + list_number * slots + slot, kept.to(tl.int8), mask=slot < slots)
        seen += tl.sum(equal, 0)
    tl.store(new_lens_ptr + list_number, new_length)


def select_blocks(
    scores: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    budget: Tensor,
    *,
    positions: Tensor | None = None,
    protect_first: int = 0,
    protect_last: int = 0,
    min_per_head: int = 0,
    scope: str = "head",
) -> tuple[Tensor, Tensor]:
    batch, heads, blocks = block_tables.shape
    size = scores.shape[1]
    slots = blocks * size
    device = scores.device
    new_lens = torch.empty(batch, heads, dtype=torch.int32, device=device)
    keep = torch.empty(batch, heads, slots, dtype=torch.bool, device=device)
    if batch * heads == 0 or slots == 0:
        return new_lens.zero_(), keep
    config = choose("select_blocks", current_device(), slots, batch * heads)
    # Sorting needs two more buffers: the keys in list order are read again afterwards.
    keys = torch.empty(1 if scope == "head" else 3, batch, heads, slots, dtype=torch.int32, device=device)
    least, most, shares = torch.empty(3, batch, heads, dtype=torch.int32, device=device)
    largest = torch.iinfo(torch.int32).max
    length_strides = seq_lens.stride()
    slot_keys_kernel[(batch * heads,)](
        scores,
        positions,
        block_tables,
        seq_lens,
        keys,
        least,
        most,
        scores.stride(0),
        0 if positions is None else positions.stride(0),
        *block_tables.stride()[:2],
        *length_strides,
        heads,
        slots,
        min(protect_first, largest) if protect_first else -largest - 1,  # positions may be negative
        min(protect_last, largest),
        min(min_per_head, largest),
        SIZE=size,
        HAS_POSITIONS=positions is not None,
        BLOCK=config.block,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    if scope == "head":
        even_shares_kernel[(batch,)](
            least,
            most,
            budget,
            shares,
            budget.stride(0),
            heads,
            blocks.bit_length(),
            HEADS=triton.next_power_of_2(heads),
            enable_fp_fusion=True,
        )
    else:
        _compete(keys, seq_lens, least, most, budget, shares, size, config)
    keep_best_kernel[(batch * heads,)](
        keys,
        seq_lens,
        shares,
        new_lens,
        keep.view(torch.int8),
        *length_strides,
        heads,
        slots,
        SIZE=size,
        BLOCK=config.block,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    return new_lens, keep


def _compete(
    keys: Tensor,
    seq_lens: Tensor,
    least: Tensor,
    most: Tensor,
    budget: Tensor,
    shares: Tensor,
    size: int,
    config: SelectBlocksConfig,
) -> None:
    """Write ``shares`` ``[batch, heads]``: the blocks of each head when the heads of a sequence share one budget.

    ``keys`` ``[3, batch, heads, slots]`` holds the keys in list order, and two buffers that sorting overwrites.
    """
    _, batch, heads, slots = keys.shape
    blocks = slots // size
    worth = torch.empty(batch, blocks, heads, dtype=torch.int32, device=keys.device)
    cut = torch.empty(batch, 2, dtype=torch.int32, device=keys.device)
    sort_keys_kernel[(batch * heads,)](
        keys,
        seq_lens,
        keys.stride(0),
        *seq_lens.stride(),
        heads,
        slots,
        BLOCK=config.sort_block,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    block_worth_kernel[(batch * heads, triton.cdiv(blocks, config.worth_block))](
        keys[2],
        seq_lens,
        least,
        most,
        worth,
        *seq_lens.stride(),
        heads,
        slots,
        SIZE=size,
        BLOCK=config.worth_block,
        enable_fp_fusion=True,
    )
    compete_kernel[(batch,)](
        worth,
        least,
        most,
        budget,
        cut,
        budget.stride(0),
        heads,
        blocks * heads,
        HEADS=triton.next_power_of_2(heads),
        BLOCK=config.block,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    competed_shares_kernel[(batch, triton.cdiv(heads, 32))](
        worth, least, cut, shares, heads, blocks, BLOCK=64, BLOCK_H=32, enable_fp_fusion=True
    )
