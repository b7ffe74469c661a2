"""What the warp-specialised forward compiles to for Hopper, without a GPU: ``python tests/gluon_facts.py [CASE]``.

``CASE`` is a part of a case's name; ``--json`` prints all of them for machines. Run it with the Python of another
environment to see another Triton's. Beside the counts that ``kvops.autotune.inspect`` reads, it looks at the order of
instructions: in the loop over the keys, the exponentials must stand between the wait that leaves P V pending and the
wait for P V, or nothing overlaps however asynchronous the products are.
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


def facts(name, head_dim, dtype, features):
    features = dict(features)
    packed = features.pop("packed", False)
    q = torch.empty(2, 1000, 8, head_dim, dtype=dtype)
    k, v = torch.empty(2, 2, 1100, 2, head_dim, dtype=dtype)
    kernels = []
    with compile_only("sm_90") as launches:
        recorded = JITFunction.run

        def run(self, *arguments, **keywords):
            kernels.append(recorded(self, *arguments, **keywords))
            return kernels[-1]

        JITFunction.run = run
        if packed:
            ends = torch.empty(3, dtype=torch.int32)
            q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
            gluon_flash_forward_varlen(q, k, v, ends, ends, 1000, 1100, **features)
        else:
            gluon_flash_forward(q, k, v, **features)
    (launch,) = launches
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernels[0].asm["cubin"])
        file.flush()
        sass = subprocess.run([_cuobjdump(), "-sass", file.name], capture_output=True, text=True, check=True).stdout
    instructions = INSTRUCTION.findall(sass)
    opcodes = Counter(opcode.split(".")[0] for opcode, _ in instructions)
    pending, overlapped, exponentials = 0, [], None
    for opcode, operands in instructions:
        if opcode == "WARPGROUP.DEPBAR.LE":
            if "0x1" in operands:
                pending += 1
                exponentials = 0
            elif exponentials is not None:
                overlapped.append(exponentials)
                exponentials = None
        elif opcode == "MUFU.EX2" and exponentials is not None:
            exponentials += 1
    return {
        "case": name,
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
        "loops": 3 if "window_left" in features else 2,
        "block_n": 64 if head_dim == 256 else 128,
        "overlapped_exponentials": overlapped,
    }


def main():
    if "--json" in sys.argv:
        print(json.dumps([facts(*case) for case in cases()]))
        return
    print(f"Triton {triton.__version__}, sm_90")
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    for case in cases():
        if only not in case[0]:
            continue
        row = facts(*case)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
