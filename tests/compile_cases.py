"""The launches that are compiled for GPUs on machines without one: realistic calls of every kernel family.

Each case calls a LAUNCH function of ``kvops.kernels`` with CPU tensors inside ``kvops.autotune.inspect.compile_only``:
the kernels compile and nothing runs, so outputs hold garbage and a case must not look at them. Import the launch
function inside the case. Keep the list short (a kernel costs 1 to 2 s for each target): one dtype and head size unless
another compiles differently, but every constexpr branch that ships. For example::

    def attention_float16_head_dim_128():
        from kvops.kernels.attention import flash_forward

        q = torch.empty(1, 1024, 8, 128, dtype=torch.float16)
        k, v = torch.empty(2, 1, 1024, 2, 128, dtype=torch.float16)
        flash_forward(q, k, v, causal=True)

    CASES += [CompileCase("attention-fp16-d128", attention_float16_head_dim_128, matrix=("flash_forward_kernel",))]

``matrix`` names the kernels that must use the GPU's matrix instructions. ``python -m kvops.autotune inspect --cases
tests/compile_cases.py`` prints what was compiled; ``tests/test_compile.py`` holds it to the limits of each target.
"""

import torch

from kvops.autotune.inspect import CompileCase

CASES: list[CompileCase] = []


def verify_draft_greedy():
    from kvops.kernels.verify_draft import verify_draft

    logits = torch.empty(4, 6, 128256, dtype=torch.bfloat16)
    verify_draft(logits, torch.empty(4, 5, dtype=torch.int64))


def verify_draft_sampled():
    from kvops.kernels.verify_draft import verify_draft

    logits = torch.empty(4, 6, 128256, dtype=torch.bfloat16)
    drafts = torch.empty(4, 5, dtype=torch.int64)
    lens = torch.empty(4, dtype=torch.int32)
    seed = torch.empty(4, dtype=torch.int64)
    probs = torch.empty(4, 5, 128256)
    verify_draft(logits, drafts, draft_lens=lens, temperature=torch.empty(4), seed=seed, step=seed)
    verify_draft(logits, drafts, draft_lens=lens, draft_probs=probs, temperature=torch.empty(4), seed=seed, step=seed)


def prompt_lookup_int64():
    from kvops.kernels.prompt_lookup import prompt_lookup

    prompt_lookup(torch.empty(4, 8192, dtype=torch.int64), torch.empty(4, dtype=torch.int32), num_draft=8)


CASES += [
    CompileCase("verify-draft-greedy-bf16", verify_draft_greedy),
    CompileCase("verify-draft-sampled-bf16", verify_draft_sampled),
    CompileCase("prompt-lookup", prompt_lookup_int64),
]


def select_blocks_30_layers():
    from kvops.kernels.select_blocks import select_blocks

    lists = 4, 90
    scores, positions = torch.empty(1024, 16), torch.empty(1024, 16, dtype=torch.int32)
    tables, lens = torch.empty(*lists, 128, dtype=torch.int32), torch.empty(lists, dtype=torch.int32)
    budget = torch.empty(4, dtype=torch.int32)
    select_blocks(scores, tables, lens, budget, scope="head")
    protection = {"protect_first": 4, "protect_last": 32, "min_per_head": 16}
    select_blocks(scores, tables, lens, budget, positions=positions, scope="sequence", **protection)


def compact_bf16_and_float8():
    from kvops.kernels.compact import compact

    tables, lens = torch.empty(4, 90, 128, dtype=torch.int32), torch.empty(4, 90, dtype=torch.int32)
    keep = torch.empty(4, 90, 2048, dtype=torch.bool)
    sides = torch.empty(1024, 16, dtype=torch.int32), torch.empty(1024, 16)
    cache = torch.empty(1024, 16, 128, dtype=torch.bfloat16)
    compact(cache, cache, tables, lens, keep, positions=sides[0], scores=sides[1])
    cache = torch.empty(1024, 16, 80, dtype=torch.float8_e4m3fn)
    compact(cache, cache, tables, lens, keep)


CASES += [
    CompileCase("select-blocks", select_blocks_30_layers),
    CompileCase("compact", compact_bf16_and_float8),
]
