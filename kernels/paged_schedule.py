"""The balanced partition of ragged lists over programs (stream-K).

All lists form one line, in which each takes its length in units. Every program owns an equal contiguous share of the
line, regardless of where lists begin and end. A schedule is int32 [share, prefix sums of the units with a leading 0
(lists + 1), list in which each program begins (programs)]. In a batch-invariant schedule units are long and each has a
partial result of its own, so that a list is cut at the same slots in every batch.
"""

import torch
import triton
import triton.language as tl

from kvops.kernels.device import current_device

# Programs per multiprocessor. They fit with any number of registers, so all shares run at the same time.
_PROGRAMS_PER_SM = 2
# The fewest slots of a share: with fewer, a partial result would cost as much as the slots.
_MIN_SHARE = 128
# Slots per unit of a batch-invariant schedule. At head size 128 in 16 bits, with four query heads to a group, writing
# and reading one partial result per unit adds 3% to the bytes of the slots.
_INVARIANT_UNIT = 256


def schedule_unit(block_size: int, batch_invariant: bool) -> int:
    """Slots per unit of a schedule: one block, within 16 to 64."""
    return _INVARIANT_UNIT if batch_invariant else min(max(block_size, 16), 64)


@triton.jit(
    do_not_specialize=["stride_ll", "stride_lb", "stride_lh", "heads", "lists", "programs"],
    do_not_specialize_on_alignment=["seq_lens_ptr", "schedule_ptr"],
)
def paged_schedule_kernel(
    seq_lens_ptr,
    schedule_ptr,
    stride_ll,
    stride_lb,
    stride_lh,
    heads,
    lists,
    programs,
    UNIT: tl.constexpr,
    MIN_UNITS: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(0).to(tl.int64)
    seq_lens_ptr += layer * stride_ll
    schedule_ptr += layer * (lists + programs + 2)
    prefix_ptr = schedule_ptr + 1
    total = 0
    tl.store(prefix_ptr, total)
    for start in range(0, lists, BLOCK):
        index = start + tl.arange(0, BLOCK)
        cell = (index // heads).to(tl.int64) * stride_lb + (index % heads) * stride_lh
        length = tl.load(seq_lens_ptr + cell, mask=index < lists, other=0)
        units = (tl.maximum(length, 0) + UNIT - 1) // UNIT
        tl.store(prefix_ptr + 1 + index, total + tl.cumsum(units, 0), mask=index < lists)
        total += tl.sum(units, 0)
    share = tl.maximum(tl.cdiv(total, programs), MIN_UNITS)
    tl.store(schedule_ptr, share)
    tl.debug_barrier()  # other threads of this program read the prefix sums now
    for start in range(0, programs, BLOCK):
        program = start + tl.arange(0, BLOCK)
        begin = program * share
        low = tl.zeros([BLOCK], tl.int32)  # how many lists end at or before the share's begin
        high = tl.zeros([BLOCK], tl.int32) + lists
        for _ in tl.static_range(SEARCH_STEPS):
            middle = (low + high) // 2
            ends_before = tl.load(prefix_ptr + 1 + middle, mask=low < high, other=0) <= begin
            low, high = (
                tl.where((low < high) & ends_before, middle + 1, low),
                tl.where((low < high) & (ends_before == 0), middle, high),
            )
        tl.store(prefix_ptr + lists + 1 + program, low, mask=program < programs)


def paged_schedule(
    seq_lens: torch.Tensor, block_size: int, *, num_programs: int = 0, batch_invariant: bool = False
) -> torch.Tensor:
    """Launch the kernel, one program for each layer; see ``kvops.paged_schedule``."""
    num_programs = num_programs or _PROGRAMS_PER_SM * current_device().num_sms
    by_layer = seq_lens if seq_lens.dim() == 3 else seq_lens[None]
    layers, batch = by_layer.shape[:2]
    heads = by_layer.shape[2] if by_layer.dim() == 3 else 1
    lists = batch * heads
    schedule = seq_lens.new_empty(layers, 2 + lists + num_programs)
    unit = schedule_unit(block_size, batch_invariant)
    if layers:
        paged_schedule_kernel[(layers,)](
            by_layer,
            schedule,
            *by_layer.stride()[:2],
            by_layer.stride(2) if by_layer.dim() == 3 else 0,
            max(heads, 1),
            lists,
            num_programs,
            UNIT=unit,
            MIN_UNITS=triton.cdiv(_MIN_SHARE, unit),
            SEARCH_STEPS=triton.cdiv(lists.bit_length(), 4)
            * 4,  # more steps change nothing, and few values few kernels
            BLOCK=1024,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return schedule if seq_lens.dim() == 3 else schedule[0]
