"""The balanced partition of ragged lists on the CPU, the same as the eager code makes: attention needs none here."""

from typing import NamedTuple

import torch
from numba import int32, int64

from kvops.kernels.cpu.arguments import Binding, unpack
from kvops.kernels.cpu.jit import jit
from kvops.prepared import prepared

_PROGRAMS = 8  # in place of a GPU's
_MIN_SHARE = 128  # slots
_INVARIANT_UNIT = 256


class Call(NamedTuple):
    lens: int32[:, :, :]  # [L, B, Hkv]
    # [L, 2 + lists + programs]: the share of a program, the prefix sums of the lists' units with a leading 0, and the
    # list in which each program begins
    schedule: int32[:, :]
    unit: int64  # slots


@jit
def _paged_schedule(addresses, table, threads):
    call = unpack(Call, addresses, table)
    L, B, Hkv = call.lens.shape
    lists = B * Hkv
    programs = call.schedule.shape[1] - 2 - lists
    for layer in range(L):
        row = call.schedule[layer]
        ends = row[1 : lists + 2]
        ends[0] = 0
        for i in range(lists):
            ends[i + 1] = ends[i] - (-max(call.lens[layer, i // Hkv, i % Hkv], 0) // call.unit)
        row[0] = max(-(-ends[lists] // programs), -(-_MIN_SHARE // call.unit))
        begun = 0
        for program in range(programs):
            while begun < lists and ends[begun + 1] <= program * row[0]:
                begun += 1
            row[lists + 2 + program] = begun
    return True


def _empty(seq_lens: torch.Tensor, num_programs: int) -> torch.Tensor:
    layers = seq_lens.shape[:1] if seq_lens.dim() == 3 else ()
    lists = seq_lens.shape[len(layers) :].numel()
    return torch.empty(*layers, 2 + lists + (num_programs or _PROGRAMS), dtype=torch.int32)


def _bind(seq_lens: torch.Tensor, block_size: int, *, num_programs: int = 0, batch_invariant: bool = False) -> Binding:
    schedule = _empty(seq_lens, num_programs)
    if seq_lens.dim() < 3:
        schedule = schedule[None]
    for _ in range(3 - seq_lens.dim()):
        seq_lens = seq_lens[None]
    unit = _INVARIANT_UNIT if batch_invariant else min(max(block_size, 16), 64)
    return Binding(_paged_schedule, Call, lens=seq_lens, schedule=schedule, unit=unit)


@prepared(_bind)
def paged_schedule(
    binding: Binding, seq_lens: torch.Tensor, block_size: int, *, num_programs: int = 0, batch_invariant: bool = False
) -> torch.Tensor:
    """See :func:`kvops.paged_schedule`."""
    schedule = _empty(seq_lens, num_programs)
    binding(seq_lens, schedule)
    return schedule
