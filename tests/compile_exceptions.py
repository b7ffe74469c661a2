"""What the launches of ``compile_cases.py`` are known to spill, and why."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class KnownException:
    """How many spill instructions ``triton`` (empty: any) may make of ``kernel`` in ``case`` on ``target``, and why."""

    triton: str
    target: str
    case: str
    kernel: str
    reason: str
    spills: int

    def covers(self, triton: str, target: str, case: str, problem: str) -> bool:
        if (target, case) != (self.target, self.case) or self.triton not in ("", triton):
            return False
        if not problem.startswith(f"{self.kernel} ("):
            return False
        spilled = re.search(r": (\d+) spill stores, (\d+) spill loads", problem)
        return bool(spilled) and sum(map(int, spilled.groups())) <= self.spills


_FLASH_ON_SM_120 = (
    "flash-bf16-d64-window flash-bf16-d64-causal flash-bf16-d64-everything flash-bf16-d128-window flash-fp16-d128 "
    "flash-bf16-d128-causal flash-bf16-d256-window flash-bf16-d256-causal"
)
# What one version of Triton alone spills: by kernel and reason, target and instructions, the cases.
_BY_3_6 = {
    ("flash_forward_kernel", "set-up around the descriptors"): {
        ("sm_100", 2): "flash-bf16-d64-window",
        ("sm_100", 4): "flash-bf16-d256-causal",
        ("sm_120", 4): "flash-bf16-d256-window flash-bf16-d256-causal",
        ("sm_120", 12): "flash-bf16-d64-window flash-bf16-d64-causal flash-bf16-d64-everything flash-packed-fp16-d64 "
        "flash-bf16-d128-window flash-bf16-d128-causal flash-fp16-d128",
    },
    ("flash_backward_keys_kernel", "set-up around the descriptors"): {("sm_120", 2): _FLASH_ON_SM_120},
    ("flash_backward_queries_kernel", "set-up around the descriptors"): {("sm_120", 4): _FLASH_ON_SM_120},
    ("flash_backward_keys_kernel", "how it allots registers"): {
        ("sm_90", 8): "flash-bf16-d128-causal flash-fp16-d128",
        ("sm_90", 12): "flash-packed-fp16-d64",
        ("gfx950", 10): "flash-bf16-d64-everything",
    },
    ("gluon_flash_backward_keys_kernel", "a number that is kept for the loop over tiles"): {
        ("sm_90", 2): "gluon-backward-d128-causal gluon-backward-d128-window",
    },
    ("gluon_flash_forward_kernel", "the number of the program"): {("sm_90", 3): "gluon-forward-d256-packed-window"},
    ("paged_schedule_kernel", "a number, in what runs once a step"): {
        (target, 2): "paged-decode-bf16-d128 paged-decode-fp16-d256 paged-drafts-bf16-d128 paged-chunk-bf16-d128"
        for target in ("sm_90", "sm_100")
    },
    ("paged_attention_kernel", "how it allots registers"): {("sm_80", 32): "paged-drafts-bf16-d128"},
}
_BY_3_8 = {
    ("flash_backward_bias_kernel", "ptxas prefers 168 registers"): {
        (target, 9): "flash-bias-d64" for target in ("sm_80", "sm_90")
    },
    ("flash_backward_keys_kernel", "how it allots registers"): {("sm_90", 6): "flash-fp32-d64"},
    ("gluon_flash_forward_kernel", "the number of the program"): {
        ("sm_90", 3): "gluon-forward-d128-softcap gluon-forward-d256-packed-window",
    },
    ("paged_attention_kernel", "how it allots registers"): {
        ("sm_80", 6): "paged-decode-fp32-d64",
        ("sm_90", 2): "paged-bias-d128-mask",
        ("sm_100", 2): "paged-alibi-bf16-d128 paged-decode-fp32-d64",
    },
    ("paged_latent_kernel", "how it allots registers"): {
        ("sm_90", 36): "paged-latents-bf16-128 paged-latents-bf16-128-invariant paged-latents-fp16-128-whole",
        ("gfx950", 10): "paged-latents-fp32-16",
    },
    ("paged_merge_kernel", "a number, in what runs once"): {("sm_90", 2): "paged-latents-bf16-128-invariant"},
    ("paged_schedule_kernel", "a number, in what runs once a step"): {("sm_100", 2): "paged-latents-fp16-128-whole"},
    ("attention_scores_kernel", "how it allots registers"): {("sm_120", 2): "flash-bf16-d64-everything"},
    ("offer_kernel", "how it allots registers"): {("sm_80", 4): "verify-tree-bf16"},
    ("tree_race_kernel", "how it allots registers"): {("sm_120", 2): "verify-tree-bf16"},
}
_BY_3_9 = {
    ("attention_scores_kernel", "how it allots registers"): {
        ("sm_80", 2): "flash-fp32-d64",
        ("sm_120", 2): "flash-bf16-d64-everything",
    },
    ("flash_backward_bias_kernel", "how it allots registers"): {("sm_90", 12): "flash-bias-d256"},
    ("gluon_flash_forward_kernel", "arguments, all of which it reads at the start"): {
        ("sm_90", 17): "gluon-forward-d128-softcap",
        ("sm_90", 49): "gluon-forward-d256-causal gluon-forward-d256-causal-fp16 gluon-forward-d256-full "
        "gluon-forward-d256-packed-causal gluon-forward-d256-window",
        ("sm_90", 61): "gluon-forward-d256-packed-window",
    },
    ("paged_attention_kernel", "how it allots registers"): {
        ("sm_80", 2): "paged-bias-d128-mask",
        ("sm_80", 8): "paged-decode-fp32-d64",
    },
    ("paged_latent_kernel", "how it allots registers"): {
        ("sm_90", 38): "paged-latents-fp16-128-whole",
        ("sm_90", 97): "paged-latents-bf16-128 paged-latents-bf16-128-invariant",
        ("gfx950", 6): "paged-latents-fp32-16",
    },
    ("paged_schedule_kernel", "a number, in what runs once a step"): {
        ("sm_90", 2): "paged-decode-fp32-d64 paged-latents-bf16-128 paged-latents-bf16-128-invariant "
        "paged-latents-bf16-16 paged-latents-fp32-16 paged-latents-int8-128 paged-latents-int8-16 "
        "paged-slot-scales-fp8 paged-uniform-fp8-d128",
    },
    ("sort_keys_kernel", "a number, in what runs once"): {("sm_90", 5): "select-blocks"},
    ("tree_race_kernel", "how it allots registers"): {("sm_120", 2): "verify-tree-bf16"},
}
KNOWN_EXCEPTIONS = (
    KnownException(
        "",
        "sm_90",
        "gluon-forward-d256-packed-causal",
        "gluon_flash_forward_kernel",
        "the number of the program is kept for the producer: once, outside of the loops over tiles",
        spills=3,
    ),
    KnownException(
        "",
        "sm_80",
        "flash-bias-d64",
        "flash_backward_bias_kernel",
        "ptxas prefers 168 registers, with which three programs fit, and spills two numbers for it",
        spills=6,
    ),
)
KNOWN_EXCEPTIONS += tuple(
    KnownException(version, target, case, kernel, reason, spills)
    for version, found in (("3.6.0", _BY_3_6), ("3.8.0", _BY_3_8), ("3.9.0", _BY_3_9))
    for (kernel, reason), places in found.items()
    for (target, spills), cases in places.items()
    for case in cases.split()
)


def unexpected_problems(rows, exceptions: tuple[KnownException, ...] = KNOWN_EXCEPTIONS) -> list[str]:
    """What ``inspect --json`` reports that no known exception covers."""
    return [
        f"{row['target']} {row['case']}: {problem}"
        for row in rows
        for problem in row["problems"]
        if not any(known.covers(row["triton"], row["target"], row["case"], problem) for known in exceptions)
    ]
