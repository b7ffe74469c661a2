"""A Triton kernel of your own under the autotune store of kvops: everything between the two lines.

python -m kvops.autotune prune --import tune_your_kernel --ops scale_add --output proofs   # no GPU needed
python -m kvops.autotune explain scale_add --import tune_your_kernel --device "NVIDIA H100 80GB HBM3"
python -m kvops.autotune tune --import tune_your_kernel --ops scale_add                    # on the GPU
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kvops import autotune
from kvops.kernels.device import current_device


@triton.jit
def scale_add_kernel(x_ptr, y_ptr, out_ptr, factor, size, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = (tl.load(pointer + index, mask=index < size, other=0.0) for pointer in (x_ptr, y_ptr))
    tl.store(out_ptr + index, factor * x + y, mask=index < size)


# ----------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    block: int
    num_warps: int


def scale_add(x: torch.Tensor, y: torch.Tensor, factor: float) -> torch.Tensor:
    out = torch.empty_like(x)
    config = autotune.choose("scale_add", current_device(), x.element_size(), x.numel())
    grid = (triton.cdiv(x.numel(), config.block),)
    scale_add_kernel[grid](x, y, out, factor, x.numel(), BLOCK=config.block, num_warps=config.num_warps)
    return out


def workload(problem: dict[str, int], device: str, small: bool) -> autotune.Workload:
    x, y = torch.randn(2, min(problem["size"], 4096) if small else problem["size"], device=device)
    return autotune.Workload(run=lambda: (scale_add(x, y, 2.0),), exact=lambda: (2 * x.double() + y.double(),))


autotune.register(
    autotune.OpSpec(
        name="scale_add",
        config=Config,
        key=("itemsize",),  # must be equal for a configuration to be borrowed
        sizes=("size",),  # may differ by a bounded factor
        heuristic=lambda problem, device: Config(1024, 4),
        space=lambda problem, device: [Config(512, 4), Config(2048, 8), Config(4096, 8)],
        kernels=(scale_add_kernel,),
        workload=workload,
        problems=({"itemsize": 4, "size": 1 << 24},),
    )
)
# ----------------------------------------------------------------------------------------------------------------------
