"""A Triton kernel of your own under the autotune store of kvops, in the ten lines between the rules.

In this folder::

    TRITON_INTERPRET=1 python tune_your_kernel.py      # run it here; on a GPU without the variable
    python -m kvops.autotune prune --import tune_your_kernel --ops scale_add --output proofs   # compile, no GPU needed
    python -m kvops.autotune check scale_add --import tune_your_kernel         # run what was compiled, no GPU needed
    python -m kvops.autotune explain scale_add --import tune_your_kernel --device "NVIDIA H100 80GB HBM3"
    python -m kvops.autotune tune --import tune_your_kernel --ops scale_add    # on the GPU; launches take what it finds

``--import`` loads your module into the tuner's process. A candidate that crashes, hangs or returns wrong numbers is
rejected and does not stop the others. A changed kernel has another source hash: older records are used only until it is
tuned again.
"""

import os
import sys
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kvops import autotune


@triton.jit
def scale_add_kernel(x_ptr, y_ptr, out_ptr, factor, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < size)
    y = tl.load(y_ptr + index, mask=index < size)
    tl.store(out_ptr + index, factor * x + y, mask=index < size)


def scale_add(x: torch.Tensor, y: torch.Tensor, factor: float) -> torch.Tensor:
    """``factor * x + y`` of contiguous tensors: asks the store, launches."""
    out = torch.empty_like(x)
    # The key and the sizes, in the order of the spec.
    config = autotune.choose("scale_add", autotune.current_device(), x.element_size(), x.numel())
    grid = (triton.cdiv(x.numel(), config.block),)
    scale_add_kernel[grid](x, y, out, factor, x.numel(), BLOCK=config.block, num_warps=config.num_warps)
    return out


def workload(problem: autotune.Problem, device: str, small: bool) -> autotune.Workload:
    """One call to try candidates with, and what its outputs should be."""
    x, y = torch.randn(2, min(problem["size"], 4096) if small else problem["size"], device=device)
    return autotune.Workload(run=lambda: (scale_add(x, y, 2.0),), exact=lambda: (2 * x.double() + y.double(),))


# ----------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    block: int
    num_warps: int


autotune.register(autotune.OpSpec(
    # A configuration is lent to problems of the same key and of sizes that differ by a few doublings.
    name="scale_add", config=Config, key=("itemsize",), sizes=("size",),
    heuristic=lambda problem, device: Config(1024, 4),
    space=lambda problem, device: [Config(512, 4), Config(2048, 8), Config(4096, 8)],
    kernels=(scale_add_kernel,), workload=workload, problems=({"itemsize": 4, "size": 1 << 24},),
))  # fmt: skip
# ----------------------------------------------------------------------------------------------------------------------


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("no GPU: TRITON_INTERPRET=1 runs this kernel in Triton's interpreter; prune and explain need neither")
    x, y = torch.randn(2, 10_000, device=device)
    with autotune.watch() as choices:
        error = (scale_add(x, y, 3.0) - (3 * x + y)).abs().max().item()
    print(f"error {error:.1e} with {choices[0].config} ({choices[0].origin}: {choices[0].reason})")
