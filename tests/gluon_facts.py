"""What the warp-specialised kernels compile to for Hopper, without a GPU: ``python tests/gluon_facts.py [CASE]``.

``CASE`` is a part of a case's name. ``--backward`` in front shows the backward's kernels instead of the forward's,
``--json`` prints all for machines. Run it with the Python of another environment to see another Triton's. Beside the
counts that ``kvops.autotune.inspect`` reads, it looks at the order of instructions: in the loop over the tiles, the
exponentials must stand between the wait that leaves a product pending and the next wait, or nothing overlaps however
asynchronous the products are.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter

import torch
import triton
from triton.runtime.jit import JITFunction

from kvops.autotune.inspect import _cuobjdump, compile_only
from kvops.kernels.gluon_flash_backward import gluon_flash_backward
from kvops.kernels.gluon_flash_forward import gluon_flash_forward, gluon_flash_forward_varlen

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9.]*)([^;]*);", re.MULTILINE)

FEATURES = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_left": 500},
}


def cases():
    for head_dim in (64, 128, 256):
        for name, features in FEATURES.items():
            yield f"d{head_dim}-{name}", head_dim, torch.bfloat16, features
    for head_dim in (64, 128, 256):
        yield f"d{head_dim}-causal-fp16", head_dim, torch.float16, {"causal": True}
    for head_dim in (64, 128):
        yield f"d{head_dim}-sinks", head_dim, torch.bfloat16, {"causal": True, "sinks": torch.zeros(8)}
        yield f"d{head_dim}-softcap", head_dim, torch.bfloat16, {"causal": True, "softcap": 30.0}
    for head_dim in (64, 128, 256):
        for name in ("causal", "window"):
            yield f"d{head_dim}-packed-{name}", head_dim, torch.bfloat16, {**FEATURES[name], "packed": True}


def backward_cases():
    for head_dim in (64, 128):
        for name, features in FEATURES.items():
            yield f"d{head_dim}-{name}", head_dim, torch.bfloat16, features
    yield "d128-left-fp16", 128, torch.float16, {"window_left": 500}


def facts(name, head_dim, dtype, features):
    features = dict(features)
    launch, tensors = gluon_flash_forward, inputs(head_dim, dtype)
    if features.pop("packed", False):
        ends = torch.empty(3, dtype=torch.int32)
        launch = gluon_flash_forward_varlen
        tensors = *(tensor.flatten(0, 1) for tensor in tensors), ends, ends, 1000, 1100
    (launched,), (kernel,) = compiled(launch, *tensors, **features)
    return {
        "case": name,
        **facts_of(launched, kernel),
        "loops": 3 if "window_left" in features else 2,
        "block_n": 64 if head_dim == 256 else 128,
    }


def backward_facts(name, head_dim, dtype, features):
    q, k, v = inputs(head_dim, dtype)
    launches, kernels = compiled(gluon_flash_backward, q, q, k, v, q, torch.empty(2, 8, 1000), **features)
    return [
        {"case": f"{name}-{launch.kernel}", **facts_of(launch, kernel)}
        for launch, kernel in zip(launches, kernels, strict=True)
        if launch.kernel.startswith("gluon")
    ]


def inputs(head_dim, dtype):
    return (
        torch.empty(2, 1000, 8, head_dim, dtype=dtype),
        *torch.empty(2, 2, 1100, 2, head_dim, dtype=dtype),
    )


def compiled(launch, *arguments, **features):
    """What a launch function launched, and the compiled kernels."""
    kernels = []
    with compile_only("sm_90") as launches:
        recorded = JITFunction.run

        def run(self, *arguments, **keywords):
            kernels.append(recorded(self, *arguments, **keywords))
            return kernels[-1]

        JITFunction.run = run
        launch(*arguments, **features)
    return launches, kernels


def facts_of(launch, kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass = subprocess.run([_cuobjdump(), "-sass", file.name], capture_output=True, text=True, check=True).stdout
    instructions = INSTRUCTION.findall(sass)
    opcodes = Counter(opcode.split(".")[0] for opcode, _ in instructions)
    pending, overlapped, exponentials = 0, [], None
    for opcode, operands in instructions:
        if opcode == "WARPGROUP.DEPBAR.LE":
            if exponentials is not None:
                overlapped.append(exponentials)
            leaves_one = "0x1" in operands
            pending += leaves_one
            exponentials = 0 if leaves_one else None
        elif opcode == "MUFU.EX2" and exponentials is not None:
            exponentials += 1
    return {
        "registers": launch.registers,
        "spills": launch.spills,
        "stack": launch.stack,
        "shared_memory": launch.shared_memory,
        "HGMMA": opcodes["HGMMA"],
        "HMMA": opcodes["HMMA"],
        "UTMALDG": opcodes["UTMALDG"],
        "UTMASTG": opcodes["UTMASTG"],
        "BAR": opcodes["BAR"],
        "waits": sum(opcode == "WARPGROUP.DEPBAR.LE" for opcode, _ in instructions),
        "pending": pending,
        "overlapped_exponentials": overlapped,
    }


def main():
    if "--backward" in sys.argv:
        rows = (row for case in backward_cases() for row in backward_facts(*case))
    else:
        rows = (facts(*case) for case in cases())
    if "--json" in sys.argv:
        print(json.dumps(list(rows)))
        return
    print(f"Triton {triton.__version__}, sm_90")
    only = sys.argv[-1] if len(sys.argv) > 1 and not sys.argv[-1].startswith("--") else ""
    for row in rows:
        if only not in row["case"]:
            continue
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
