"""The launches of the Gluon kernels in ``compile_cases.py``, or of their twins where Triton has no Gluon."""

from functools import partial

import torch

from kvops.autotune.inspect import CompileCase

FLASH_MASKS = {"full": {}, "causal": {"causal": True}, "window": {"causal": True, "window_left": 1024}}


def gluon_flash_forward_or_its_twin(head_dim, dtype, **features):
    from kvops.kernels.flash_forward import flash_forward
    from kvops.kernels.gluon_flash_forward import gluon_flash_forward, launchable

    q = torch.empty(2, 1000, 8, head_dim, dtype=dtype)
    k, v = torch.empty(2, 2, 1100, 2, head_dim, dtype=dtype)
    launch = gluon_flash_forward if launchable(q, k, v) is None else flash_forward
    launch(q, k, v, **features)


def gluon_flash_forward_packed_or_its_twin(head_dim, dtype, **features):
    from kvops.kernels.flash_forward import flash_forward_varlen
    from kvops.kernels.gluon_flash_forward import gluon_flash_forward_varlen, launchable

    q = torch.empty(2000, 8, head_dim, dtype=dtype)
    k, v = torch.empty(2, 2200, 2, head_dim, dtype=dtype)
    ends = torch.empty(3, dtype=torch.int32)
    launch = gluon_flash_forward_varlen if launchable(q, k, v) is None else flash_forward_varlen
    launch(q, k, v, ends, ends, 1000, 1100, **features)


SOFTCAP, SINKS = {"causal": True, "softcap": 30.0}, {"causal": True, "sinks": torch.empty(8)}
GLUON_FORWARD = [
    *((name, gluon_flash_forward_or_its_twin, torch.bfloat16, features) for name, features in FLASH_MASKS.items()),
    ("causal-fp16", gluon_flash_forward_or_its_twin, torch.float16, FLASH_MASKS["causal"]),
    ("sinks", gluon_flash_forward_or_its_twin, torch.bfloat16, SINKS),
    ("softcap", gluon_flash_forward_or_its_twin, torch.bfloat16, SOFTCAP),
    ("packed-causal", gluon_flash_forward_packed_or_its_twin, torch.bfloat16, FLASH_MASKS["causal"]),
    ("packed-window", gluon_flash_forward_packed_or_its_twin, torch.bfloat16, FLASH_MASKS["window"]),
]
GLUON_CASES = [
    CompileCase(f"gluon-forward-d{head_dim}-{name}", partial(launch, head_dim, dtype, **features), targets=("sm_90",))
    for head_dim in (64, 128, 256)
    for name, launch, dtype, features in GLUON_FORWARD
    if head_dim < 256 or name not in ("sinks", "softcap")
]


GLUON_BACKWARD = ("gluon_flash_backward_keys_kernel", "gluon_flash_backward_queries_kernel")


def gluon_flash_backward_or_its_twin(head_dim, dtype, kv_heads=2, **features):
    from kvops.kernels.flash_backward_launch import flash_backward
    from kvops.kernels.gluon_flash_backward import gluon_flash_backward, launchable

    q = torch.empty(2, 1000, 8, head_dim, dtype=dtype)
    k, v = torch.empty(2, 2, 1100, kv_heads, head_dim, dtype=dtype)
    launch = gluon_flash_backward if launchable(q, q, k, v) is None else flash_backward
    launch(q, q, k, v, q, torch.empty(2, 8, 1000), **features)


GLUON_BACKWARD_FEATURES = {**FLASH_MASKS, "causal-ungrouped": {"causal": True, "kv_heads": 8}}
GLUON_CASES += [
    CompileCase(
        f"gluon-backward-d{head_dim}-{name}",
        partial(gluon_flash_backward_or_its_twin, head_dim, dtype, **features),
        matrix=GLUON_BACKWARD,
        warpgroup=GLUON_BACKWARD,
        targets=("sm_90",),
    )
    for head_dim, name, dtype, features in (
        *((d, name, torch.bfloat16, features) for d in (64, 128) for name, features in GLUON_BACKWARD_FEATURES.items()),
        (128, "left-fp16", torch.float16, {"window_left": 1024}),
    )
]
