"""The launches that are compiled for GPUs on machines without one: realistic calls of every kernel family.

Each case calls a LAUNCH function of ``kvops.kernels``, imported inside the case, with CPU tensors inside
``kvops.autotune.inspect.compile_only``: kernels compile and nothing runs, so outputs hold garbage. Keep the list short
(1 to 2 s a changed kernel and target), but with every constexpr branch that ships. For example::

    def attention_float16_head_dim_128():
        from kvops.kernels.attention import flash_forward

        q = torch.empty(1, 1024, 8, 128, dtype=torch.float16)
        k, v = torch.empty(2, 1, 1024, 2, 128, dtype=torch.float16)
        flash_forward(q, k, v, causal=True)

    CASES += [CompileCase("attention-fp16-d128", attention_float16_head_dim_128, matrix=("flash_forward_kernel",))]

``matrix`` names the kernels that must use the GPU's matrix instructions. ``python -m kvops.autotune inspect --cases
tests/compile_cases.py`` prints what was compiled; ``tests/test_compile.py`` holds it to the limits of each target.
"""

import sys
from functools import partial
from pathlib import Path

import torch

from kvops.autotune.inspect import CompileCase

sys.path.insert(0, str(Path(__file__).parent))
from gluon_compile_cases import FLASH_MASKS, GLUON_CASES

CASES: list[CompileCase] = [*GLUON_CASES]
# One GPU of each kind, for what differs little among others.
SOME = ("sm_80", "sm_90", "gfx942")


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


def verify_draft_block():
    from kvops.kernels.verify_draft import verify_draft

    logits = torch.empty(4, 6, 128256, dtype=torch.bfloat16)
    drafts = torch.empty(4, 5, dtype=torch.int64)
    seed = torch.empty(4, dtype=torch.int64)
    for probs in (None, torch.empty(4, 5, 128256)):
        verify_draft(logits, drafts, draft_probs=probs, temperature=torch.empty(4), seed=seed, method="block")


def verify_tree_all():
    from kvops.kernels.verify_tree import verify_tree

    logits = torch.empty(4, 16, 128256, dtype=torch.bfloat16)
    drafts = torch.empty(4, 16, dtype=torch.int64)
    parents = torch.empty(4, 16, dtype=torch.int32)
    seed = torch.empty(4, dtype=torch.int64)
    verify_tree(logits, drafts, parents)
    for probs in (None, torch.empty(4, 16, 128256)):
        verify_tree(logits, drafts, parents, draft_probs=probs, temperature=torch.empty(4), seed=seed, step=seed)


def prompt_lookup_int64():
    from kvops.kernels.prompt_lookup import prompt_lookup

    prompt_lookup(torch.empty(4, 8192, dtype=torch.int64), torch.empty(4, dtype=torch.int32), num_draft=8)


CASES += [
    CompileCase("verify-draft-greedy-bf16", verify_draft_greedy),
    CompileCase("verify-draft-sampled-bf16", verify_draft_sampled),
    CompileCase("verify-draft-block-bf16", verify_draft_block),
    CompileCase("verify-tree-bf16", verify_tree_all),
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


def copy_blocks_bf16():
    from kvops.kernels.copy_blocks import copy_blocks

    cache = torch.empty(1024, 16, 128, dtype=torch.bfloat16)
    sides = torch.empty(1024, 16, dtype=torch.int32), torch.empty(1024, 16)
    entries = torch.empty(64, dtype=torch.int32)
    copy_blocks(cache, cache, entries, entries, positions=sides[0], scores=sides[1])


CASES += [
    CompileCase("select-blocks", select_blocks_30_layers),
    CompileCase("compact", compact_bf16_and_float8),
    CompileCase("copy-blocks", copy_blocks_bf16),
]


def _ragged_cache(dtype: torch.dtype, head_dim: int, heads: int = 8):
    cache = torch.empty(4096, 16, head_dim, dtype=dtype)
    tables, lens = torch.empty(4, heads, 512, dtype=torch.int32), torch.empty(4, heads, dtype=torch.int32)
    sides = torch.empty(4096, 16, dtype=torch.int32), torch.empty(4096, 16)
    return cache, tables, lens, sides


def paged_attention(*args, **options):
    from kvops.kernels.paged_attention import paged_attention

    paged_attention(*args, **options)


def paged_append_bf16_and_bytes():
    from kvops.kernels.paged_append import paged_append

    new = torch.empty(4, 8, 8, 128, dtype=torch.bfloat16)
    cache, tables, lens, sides = _ragged_cache(torch.bfloat16, 128)
    places = torch.empty(4, 8, dtype=torch.int32)
    paged_append(new, new, cache, cache, tables, lens, positions=sides[0], token_positions=places, scores=sides[1])
    cache = _ragged_cache(torch.float8_e4m3fn, 128)[0]
    paged_append(new, new, cache, cache, tables, lens, k_scale=torch.empty(8), v_scale=torch.empty(8))
    k_cache, v_cache = cache.view(torch.int8), cache.view(torch.float8_e5m2)
    paged_append(new, new, k_cache, v_cache, tables, lens, k_scale=torch.empty(8), v_scale=torch.empty(8))


def paged_attention_decode_bf16():
    q = torch.empty(4, 1, 32, 128, dtype=torch.bfloat16)
    cache, tables, lens, sides = _ragged_cache(torch.bfloat16, 128)
    paged_attention(q, cache, cache, tables, lens)
    paged_attention(q, cache, cache, tables, lens, batch_invariant=True)
    options = {"positions": sides[0], "query_positions": torch.empty(4, 1, dtype=torch.int32), "window_left": 1024}
    paged_attention(q, cache, cache, tables, lens, scores=sides[1], softcap=30.0, sinks=torch.empty(32), **options)


def paged_attention_drafts_bf16():
    q = torch.empty(4, 16, 32, 128, dtype=torch.bfloat16)
    cache, tables, lens, sides = _ragged_cache(torch.bfloat16, 128)
    tree = torch.empty(16, 16, dtype=torch.bool)
    paged_attention(q, cache, cache, tables, lens, tree_mask=tree, scores=sides[1], score_reduce="max")


def paged_attention_chunk_bf16():
    q = torch.empty(4, 512, 32, 128, dtype=torch.bfloat16)
    cache, tables, lens, sides = _ragged_cache(torch.bfloat16, 128)
    paged_attention(q, cache, cache, tables, lens, window_left=4096, scores=sides[1], score_reduce="sumsq")


def paged_attention_uniform_float8():
    q = torch.empty(4, 1, 32, 128, dtype=torch.bfloat16)
    cache = torch.empty(1024, 16, 8, 128, dtype=torch.float8_e4m3fn)
    tables, lens = torch.empty(4, 512, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    paged_attention(q, cache, cache, tables, lens, k_scale=torch.empty(8), v_scale=torch.empty(8))


def paged_attention_of_two_formats():
    q = torch.empty(4, 1, 32, 128, dtype=torch.bfloat16)
    cache, tables, lens, _ = _ragged_cache(torch.int8, 128)
    scales = {"k_scale": torch.empty(8), "v_scale": torch.empty(8)}
    paged_attention(q, cache, cache.view(torch.float8_e5m2), tables, lens, **scales)
    paged_attention(q.half(), cache.view(torch.float8_e5m2), cache, tables, lens, **scales)
    wide = _ragged_cache(torch.bfloat16, 128)[0]
    paged_attention(q, cache, wide, tables, lens, k_scale=torch.empty(8))


def paged_attention_float32_head_dim_64():
    cache, tables, lens, _ = _ragged_cache(torch.float32, 64, heads=3)
    for num_tokens in (1, 64):
        paged_attention(torch.empty(4, num_tokens, 9, 64), cache, cache, tables, lens)


def paged_attention_head_dim_256():
    q = torch.empty(4, 1, 32, 256, dtype=torch.float16)
    cache, tables, lens, _ = _ragged_cache(torch.float16, 256)
    paged_attention(q, cache, cache, tables, lens)


def paged_attention_packed_bf16():
    from kvops.kernels.paged_append import paged_append

    q, new = torch.empty(2048, 32, 128, dtype=torch.bfloat16), torch.empty(2048, 8, 128, dtype=torch.bfloat16)
    cache, tables, lens, sides = _ragged_cache(torch.bfloat16, 128)
    packed = {"cu_seqlens_q": torch.empty(5, dtype=torch.int32)}
    paged_append(new, new, cache, cache, tables, lens, max_seqlen_q=512, **packed)
    for most in (1, 512):  # decoding, and beside it chunks of prefill
        paged_attention(q, cache, cache, tables, lens, max_seqlen_q=most, out=q, **packed)
    options = packed | {"scores": sides[1], "score_last": 32, "score_decays": torch.empty(4)}
    paged_attention(q, cache, cache, tables, lens, max_seqlen_q=512, **options)


def paged_attention_alibi_bf16():
    q, slopes = torch.empty(4, 1, 32, 128, dtype=torch.bfloat16), torch.empty(32)
    cache, tables, lens, sides = _ragged_cache(torch.bfloat16, 128)
    paged_attention(q, cache, cache, tables, lens, alibi_slopes=slopes)
    q = torch.empty(4, 512, 32, 128, dtype=torch.bfloat16)
    paged_attention(q, cache, cache, tables, lens, alibi_slopes=slopes, scores=sides[1])


def paged_slot_scales_int8():
    from kvops.kernels.paged_append import paged_append

    q, new = torch.empty(4, 1, 32, 128, dtype=torch.bfloat16), torch.empty(4, 8, 8, 128, dtype=torch.bfloat16)
    cache, tables, lens, sides = _ragged_cache(torch.int8, 128)
    scales = {"k_slot_scale": sides[1], "v_slot_scale": torch.empty_like(sides[1])}
    paged_append(new, new, cache, cache, tables, lens, **scales)
    paged_attention(q, cache, cache, tables, lens, **scales)
    options = {"positions": sides[0], "query_positions": torch.empty(4, 1, dtype=torch.int32), "window_left": 1024}
    paged_attention(q, cache, cache, tables, lens, scores=sides[1], softcap=30.0, **options, **scales)
    q = torch.empty(4, 512, 32, 128, dtype=torch.bfloat16)
    paged_attention(q, cache, cache, tables, lens, scores=sides[1], **scales)


def paged_slot_scales_head_dim_64():
    cache, tables, lens, sides = _ragged_cache(torch.int8, 64)
    scales = {"k_slot_scale": sides[1], "v_slot_scale": torch.empty_like(sides[1])}
    q = torch.empty(4, 512, 32, 64, dtype=torch.bfloat16)
    paged_attention(q, cache, cache, tables, lens, scores=sides[1], **scales)


def paged_slot_scales_float8():
    from kvops.kernels.paged_append import paged_append

    q, new = torch.empty(4, 1, 32, 128, dtype=torch.float16), torch.empty(4, 1, 8, 128, dtype=torch.float16)
    k_cache = torch.empty(1024, 16, 8, 128, dtype=torch.float8_e4m3fn)
    tables, lens = torch.empty(4, 512, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    scales = {name: torch.empty(1024, 16, 8) for name in ("k_slot_scale", "v_slot_scale")}
    v_cache = k_cache.view(torch.float8_e5m2)
    paged_append(new, new, k_cache, v_cache, tables, lens, **scales)
    paged_attention(q, k_cache, v_cache, tables, lens, **scales)


def paged_attention_bias(head_dim, dtype=torch.bfloat16):
    cache, tables, lens, sides = _ragged_cache(torch.bfloat16, head_dim)
    for num_tokens, scores in ((1, None), (1, sides[1]), (512, None), (512, sides[1])):
        q = torch.empty(4, num_tokens, 32, head_dim, dtype=torch.bfloat16)
        bias = torch.empty(4, 1, num_tokens, 8192, dtype=dtype)
        window = 1024 if dtype == torch.bool else -1
        paged_attention(q, cache, cache, tables, lens, bias=bias, scores=scores, window_left=window)


def paged_latents(heads, batch=4, dtype=torch.bfloat16, **options):
    from kvops.kernels.paged_latent_attention import paged_latent_attention

    q, cache = torch.empty(batch, 1, heads, 576, dtype=dtype), torch.empty(1024, 64, 1, 576, dtype=dtype)
    tables, lens = torch.empty(batch, 128, dtype=torch.int32), torch.empty(batch, dtype=torch.int32)
    if "cache_scale" in options:
        cache = torch.empty(cache.shape, dtype=torch.int8)
    if options.pop("packed", False):
        q = q[:, 0]
        options |= {"cu_seqlens_q": torch.empty(batch + 1, dtype=torch.int32), "max_seqlen_q": 1}
    paged_latent_attention(q, cache, tables, lens, value_dim=512, scale=0.1, **options)


_PAGED, _LATENT = ("paged_attention_kernel",), ("paged_latent_kernel",)
CASES += [
    CompileCase("paged-append", paged_append_bf16_and_bytes),
    CompileCase("paged-decode-bf16-d128", paged_attention_decode_bf16, matrix=_PAGED),
    CompileCase("paged-drafts-bf16-d128", paged_attention_drafts_bf16, matrix=_PAGED),
    CompileCase("paged-chunk-bf16-d128", paged_attention_chunk_bf16, matrix=(*_PAGED, "paged_scores_kernel")),
    CompileCase("paged-uniform-fp8-d128", paged_attention_uniform_float8, matrix=_PAGED),
    CompileCase("paged-int8-e5m2-d128", paged_attention_of_two_formats, matrix=_PAGED),
    CompileCase("paged-decode-fp32-d64", paged_attention_float32_head_dim_64),
    CompileCase("paged-decode-fp16-d256", paged_attention_head_dim_256, matrix=_PAGED),
    CompileCase("paged-packed-bf16-d128", paged_attention_packed_bf16, matrix=(*_PAGED, "paged_scores_kernel")),
    CompileCase("paged-alibi-bf16-d128", paged_attention_alibi_bf16, matrix=(*_PAGED, "paged_scores_kernel")),
    CompileCase("paged-slot-scales-int8", paged_slot_scales_int8, matrix=_PAGED),
    CompileCase("paged-slot-scales-int8-d64", paged_slot_scales_head_dim_64, matrix=_PAGED),
    CompileCase("paged-slot-scales-fp8", paged_slot_scales_float8, matrix=_PAGED),
    CompileCase("paged-bias-d64", partial(paged_attention_bias, 64), matrix=_PAGED, targets=SOME),
    CompileCase("paged-bias-d128", partial(paged_attention_bias, 128), matrix=_PAGED),
    CompileCase("paged-bias-d256", partial(paged_attention_bias, 256), matrix=_PAGED, targets=SOME),
    CompileCase("paged-bias-d128-mask", partial(paged_attention_bias, 128, torch.bool), matrix=_PAGED, targets=SOME),
    CompileCase("paged-latents-bf16-16", partial(paged_latents, 16, softcap=30.0), matrix=_LATENT),
    CompileCase("paged-latents-bf16-128", partial(paged_latents, 128), matrix=_LATENT, warpgroup=_LATENT),
    CompileCase("paged-latents-fp16-128-whole", partial(paged_latents, 128, 512, torch.float16), matrix=_LATENT),
    CompileCase(
        "paged-latents-bf16-128-invariant",
        partial(paged_latents, 128, packed=True, batch_invariant=True),
        matrix=_LATENT,
        warpgroup=_LATENT,
    ),
    CompileCase("paged-latents-int8-16", partial(paged_latents, 16, cache_scale=torch.empty(1)), matrix=_LATENT),
    CompileCase("paged-latents-int8-128", partial(paged_latents, 128, cache_scale=torch.empty(1)), matrix=_LATENT),
    CompileCase("paged-latents-fp32-16", partial(paged_latents, 16, dtype=torch.float32)),
]


def dense_attention(dtype, head_dim, training=True, scores=True, **options):
    from kvops.kernels.attention_scores import attention_scores
    from kvops.kernels.flash_backward_launch import flash_backward
    from kvops.kernels.flash_forward import flash_forward

    q = torch.empty(2, 4096, 16, head_dim, dtype=dtype)
    k, v = torch.empty(2, 2, 4096, 4, head_dim, dtype=dtype)
    out, lse = flash_forward(q, k, v, **options)
    if training:
        flash_backward(out, q, k, v, out, lse, **options)
    if scores:
        options.pop("sinks", None)
        attention_scores(q, k, lse, **options)


def flash_attention_with_everything():
    sinks, slopes = torch.empty(16, dtype=torch.bfloat16), torch.empty(16)
    options = {"causal": True, "window_left": 1024, "softcap": 30.0, "sinks": sinks, "alibi_slopes": slopes}
    dense_attention(torch.bfloat16, 64, **options)


def flash_backward_wide_values():
    from kvops.kernels.flash_backward_launch import flash_backward

    q, out = torch.empty(2, 1024, 8, 64, dtype=torch.bfloat16), torch.empty(2, 1024, 8, 128, dtype=torch.bfloat16)
    k, v = (torch.empty(2, 1024, 4, width, dtype=torch.bfloat16) for width in (64, 128))
    flash_backward(out, q, k, v, out, torch.empty(2, 8, 1024), causal=True)


def flash_attention_bias(head_dim, dtype=torch.bfloat16, **options):
    from kvops.kernels.flash_backward_bias import flash_bias_backward

    bias = torch.empty(16, 4096, 4096, dtype=dtype)
    dense_attention(torch.bfloat16, head_dim, scores=False, bias=bias, **options)
    if dtype == torch.bool:
        return
    q = torch.empty(2, 4096, 16, head_dim, dtype=torch.bfloat16)
    k, v = torch.empty(2, 2, 4096, 4, head_dim, dtype=torch.bfloat16)
    flash_bias_backward(q, q, k, v, q, torch.empty(2, 16, 4096), bias, **options)


DROPOUT = {"dropout_p": 0.1, "dropout_seed": torch.empty(1, dtype=torch.int64)}
FLASH_KERNELS = ("flash_forward_kernel", "flash_backward_keys_kernel", "flash_backward_queries_kernel")
BIAS_KERNELS = (*FLASH_KERNELS, "flash_backward_bias_kernel")
SCORES_KERNELS = (*FLASH_KERNELS, "attention_scores_kernel")

CASES += [
    CompileCase("flash-fp16-d128", partial(dense_attention, torch.float16, 128, causal=True), matrix=SCORES_KERNELS),
    CompileCase("flash-bf16-d64-everything", flash_attention_with_everything, matrix=FLASH_KERNELS),
    CompileCase("flash-fp32-d64", partial(dense_attention, torch.float32, 64, causal=True)),
    CompileCase("flash-backward-bf16-d64-values-of-128", flash_backward_wide_values, matrix=FLASH_KERNELS[1:]),
    CompileCase("flash-bias-d64", partial(flash_attention_bias, 64), matrix=BIAS_KERNELS, targets=SOME),
    CompileCase("flash-bias-d128-causal", partial(flash_attention_bias, 128, causal=True), matrix=BIAS_KERNELS),
    CompileCase("flash-bias-d256", partial(flash_attention_bias, 256), matrix=BIAS_KERNELS, targets=SOME),
    CompileCase(
        "flash-bias-d128-mask", partial(flash_attention_bias, 128, torch.bool), matrix=FLASH_KERNELS, targets=SOME
    ),
    CompileCase(
        "flash-dropout-bias-d128",
        partial(flash_attention_bias, 128, causal=True, **DROPOUT),
        matrix=BIAS_KERNELS,
        targets=SOME,
    ),
]
CASES += [
    CompileCase(
        f"flash-dropout-{name}",
        partial(dense_attention, dtype, head_dim, scores=False, causal="causal" in name, **DROPOUT),
        matrix=() if dtype == torch.float32 else FLASH_KERNELS,
        targets=() if "causal" in name else SOME,
    )
    for name, dtype, head_dim in (
        ("fp16-d64", torch.float16, 64),
        ("d128-causal", torch.bfloat16, 128),
        ("d256", torch.bfloat16, 256),
        ("fp32-d64", torch.float32, 64),
    )
]

# Every default configuration under every kind of mask; no mask at all compiles to a part of what a causal one does, and
# only Hopper asks more of it. For dK and dV at head_dim 256 no tile with the 64 keys that a Hopper product takes is
# free of spills when causal (3.7.1, stores: 16 x 64 17 in three stages, 22 in two, 76 in one; 32 x 64 53; 16 x 128
# 384): it multiplies with Ampere's instructions.
CASES += [
    CompileCase(
        f"flash-bf16-d{head_dim}-{mask}",
        partial(dense_attention, torch.bfloat16, head_dim, scores=False, **options),
        matrix=FLASH_KERNELS,
        warpgroup=tuple(name for name in FLASH_KERNELS if head_dim <= 128 or name != "flash_backward_keys_kernel"),
        targets=("sm_90",) if mask == "full" else (),
    )
    for head_dim in (64, 128, 256)
    for mask, options in FLASH_MASKS.items()
]


def flash_attention_packed(dtype=torch.float16, head_dim=64, biased=False, **options):
    from kvops.kernels.attention_scores import attention_scores_varlen
    from kvops.kernels.flash_backward_bias import flash_bias_backward_varlen
    from kvops.kernels.flash_backward_launch import flash_backward_varlen
    from kvops.kernels.flash_forward import flash_forward_varlen

    q = torch.empty(8192, 16, head_dim, dtype=dtype)
    k, v = torch.empty(2, 8192, 4, head_dim, dtype=dtype)
    lengths = (torch.empty(9, dtype=torch.int32), torch.empty(9, dtype=torch.int32), 4096, 4096)
    bias = torch.empty(16, 8192, 4096, dtype=dtype) if biased else None
    out, lse = flash_forward_varlen(q, k, v, *lengths, causal=True, bias=bias, **options)
    flash_backward_varlen(out, q, k, v, out, lse, *lengths, causal=True, bias=bias, **options)
    if biased:
        flash_bias_backward_varlen(out, q, k, v, out, lse, bias, *lengths, causal=True)
    elif not options:
        attention_scores_varlen(q, k, lse, *lengths, causal=True)


_packed_bf16 = partial(flash_attention_packed, torch.bfloat16, 128)
CASES += [
    CompileCase("flash-packed-fp16-d64", flash_attention_packed, matrix=FLASH_KERNELS),
    CompileCase("flash-packed-bias-d128", partial(_packed_bf16, biased=True), matrix=BIAS_KERNELS, targets=SOME),
    CompileCase("flash-packed-dropout-d128", partial(_packed_bf16, **DROPOUT), matrix=FLASH_KERNELS, targets=SOME),
]


def merge_attention_bf16():
    from kvops.kernels.merge_attention import merge_attention, merge_attention_backward

    out, lse = torch.empty(2, 4096, 16, 128, dtype=torch.bfloat16), torch.empty(2, 16, 4096)
    merge_attention(out, lse, out, lse)
    merge_attention_backward(out, out, lse, out, lse, dlse=lse)


CASES += [CompileCase("merge-attention", merge_attention_bf16)]
