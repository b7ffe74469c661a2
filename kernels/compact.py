"""Move the kept slots of every list to its front, in order and in place."""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvops.autotune.lookup import choose
from kvops.autotune.relaunch import launched
from kvops.kernels.device import current_device

# Slots are moved as integers, so float8 values and NaN payloads keep their bits.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(
    do_not_specialize=["stride_tb", "stride_th", "stride_lb", "stride_lh", "heads", "slots"],
    do_not_specialize_on_alignment=["tables_ptr", "lens_ptr"],
)
def move_slots_kernel(
    side_ptr,
    tables_ptr,
    lens_ptr,
    target_ptr,
    stride_block,
    stride_slot,
    stride_tb,
    stride_th,
    stride_lb,
    stride_lh,
    heads,
    slots,
    width,
    SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One list's slots of one array, BLOCK_W of their elements, to the places that ``target`` names (-1: none)."""
    list_number = tl.program_id(0).to(tl.int64)
    b = list_number // heads
    h = list_number % heads
    length = tl.load(lens_ptr + b * stride_lb + h * stride_lh)
    table_ptr = tables_ptr + b * stride_tb + h * stride_th
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    for start in range(0, length, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        target = tl.load(target_ptr + list_number * slots + slot, mask=slot < length, other=-1)
        moves = (target >= 0) & (target != slot)
        source_block = tl.load(table_ptr + slot // SIZE, mask=moves, other=0).to(tl.int64)
        target_block = tl.load(table_ptr + target // SIZE, mask=moves, other=0).to(tl.int64)
        source = source_block * stride_block + (slot % SIZE) * stride_slot
        destination = target_block * stride_block + (target % SIZE) * stride_slot
        mask = moves[:, None] & (w < width)[None, :]  # [BLOCK_N, BLOCK_W]
        moved = tl.load(side_ptr + source[:, None] + w[None, :], mask=mask, other=0)
        # A chunk is read whole before any of it is written: a target may be another thread's source. It never passes
        # the chunk's end, so later chunks are untouched.
        tl.debug_barrier()
        tl.store(side_ptr + destination[:, None] + w[None, :], moved, mask=mask)


def compact(
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    keep: Tensor,
    *,
    positions: Tensor | None = None,
    scores: Tensor | None = None,
    k_slot_scale: Tensor | None = None,
    v_slot_scale: Tensor | None = None,
) -> Tensor:
    batch, heads, slots = keep.shape
    size = k_cache.shape[1]
    kept = keep & (torch.arange(slots, device=keep.device) < seq_lens[..., None])
    count = kept.cumsum(2, dtype=torch.int32)
    target = torch.where(kept, count - 1, -1).contiguous()
    new_lens = count[..., -1] if slots else torch.zeros_like(seq_lens)
    freed = ((seq_lens + (size - 1)) // size - (new_lens + (size - 1)) // size).contiguous()
    if batch * heads * slots:
        for side in (k_cache, v_cache, positions, scores, k_slot_scale, v_slot_scale):
            if side is not None and side.numel():
                # Each array on its own: where one is refused, those before it have moved and must not move again.
                launched(partial(_move, side if side.dim() == 3 else side[..., None], block_tables, seq_lens, target))
    seq_lens.copy_(new_lens)
    return freed


def _move(side: Tensor, block_tables: Tensor, seq_lens: Tensor, target: Tensor) -> None:
    batch, heads, slots = target.shape
    itemsize = side.element_size()
    width = side.shape[2]
    config = choose("compact", current_device(), itemsize, width, slots, batch * heads)
    move_slots_kernel[(batch * heads, triton.cdiv(width, config.block_w))](
        side.view(INTEGERS[itemsize]),
        block_tables,
        seq_lens,
        target,
        *side.stride()[:2],
        *block_tables.stride()[:2],
        *seq_lens.stride(),
        heads,
        slots,
        width,
        SIZE=side.shape[1],
        BLOCK_N=config.block_n,
        BLOCK_W=config.block_w,
        num_warps=config.num_warps,
        num_stages=1,
        enable_fp_fusion=True,
    )
