"""Copy whole blocks. Only the device knows how many entries of the list of copies are real."""

import triton
import triton.language as tl
from torch import Tensor

from kvops.autotune.config import compact_config
from kvops.kernels.compact import INTEGERS


@triton.jit(
    do_not_specialize=["stride_source", "stride_target"],
    do_not_specialize_on_alignment=["source_ptr", "target_ptr"],
)
def copy_blocks_kernel(
    side_ptr,
    source_ptr,
    target_ptr,
    stride_block,
    stride_slot,
    stride_source,
    stride_target,
    width,
    SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One entry's block of one array, BLOCK_W elements of each of its slots."""
    entry = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + entry * stride_target).to(tl.int64)
    if target >= 0:
        source = tl.load(source_ptr + entry * stride_source).to(tl.int64)
        w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
        for start in range(0, SIZE, BLOCK_N):
            slot = start + tl.arange(0, BLOCK_N)
            cell = slot.to(tl.int64)[:, None] * stride_slot + w[None, :]
            mask = (slot < SIZE)[:, None] & (w < width)[None, :]  # [BLOCK_N, BLOCK_W]
            values = tl.load(side_ptr + source * stride_block + cell, mask=mask)
            tl.store(side_ptr + target * stride_block + cell, values, mask=mask)


def copy_blocks(
    k_cache: Tensor,
    v_cache: Tensor,
    source: Tensor,
    target: Tensor,
    *,
    positions: Tensor | None = None,
    scores: Tensor | None = None,
    k_slot_scale: Tensor | None = None,
    v_slot_scale: Tensor | None = None,
) -> None:
    """Launch the kernel, once for each array; see ``kvops.copy_blocks``."""
    for side in (k_cache, v_cache, positions, scores, k_slot_scale, v_slot_scale):
        if side is not None and side.numel() and source.numel():
            _copy(side if side.dim() == 3 else side[..., None], source, target)


def _copy(side: Tensor, source: Tensor, target: Tensor) -> None:
    itemsize = side.element_size()
    size, width = side.shape[1:]
    config = compact_config(width, itemsize)
    copy_blocks_kernel[(source.shape[0], triton.cdiv(width, config.block_w))](
        side.view(INTEGERS[itemsize]),
        source,
        target,
        *side.stride()[:2],
        source.stride(0),
        target.stride(0),
        width,
        SIZE=size,
        BLOCK_N=min(config.block_n, triton.next_power_of_2(size)),
        BLOCK_W=config.block_w,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
