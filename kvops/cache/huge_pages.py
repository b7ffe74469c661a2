"""Memory for large CPU tensors in huge pages.

With pages of 4 KiB every block of a cache begins with a miss of the TLB, and memory is handed out 4 KiB at a time,
which makes the first write to a cache slow.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_PAGE = 2 << 20  # bytes of a huge page on x86-64, and on AArch64 with base pages of 4 KiB
_POSSIBLE = hasattr(mmap, "MADV_HUGEPAGE")  # Linux


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``; on Linux a CPU tensor of at least one huge page begins at such a page and asks for more of them.

    The kernel gives them as the memory is first written, where it has any. The memory goes back with the tensor.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not _POSSIBLE or size < _PAGE:
        return torch.empty(*shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without huge pages; of too little memory torch tells better
        return torch.empty(*shape, dtype=dtype, device=device)
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=-start % _PAGE).view(dtype).view(*shape)
