"""Prompt lookup: one pass computes the length of the match at every position; the best one is then copied."""

import torch
import triton
import triton.language as tl

from kvops.autotune.lookup import choose
from kvops.kernels.device import current_device

_UNSPECIALISED = ("stride_tb", "L", "num_draft", "num_splits")
_POINTERS = ("tokens_ptr", "lens_ptr", "best_ptr", "draft_ptr", "draft_lens_ptr")


@triton.jit(do_not_specialize=_UNSPECIALISED, do_not_specialize_on_alignment=_POINTERS)
def match_kernel(
    tokens_ptr,
    lens_ptr,
    best_ptr,
    stride_tb,
    L,
    num_draft,
    MAX_NGRAM: tl.constexpr,
    MIN_NGRAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best key of BLOCK positions: (length of the match << 32) + rank of where the text after it begins; 0 for
    none. Later positions rank higher while num_draft tokens follow, the others lower the later they are."""
    batch = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    length = tl.minimum(tl.load(lens_ptr + batch).to(tl.int32), L)
    text_ptr = tokens_ptr + batch * stride_tb
    start = 1 + split * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    matched = tl.zeros((BLOCK,), tl.int32)
    # A tile past the end costs nothing: all its loads are masked.
    running = start < length
    for back in range(1, MAX_NGRAM + 1):
        running = running & (start >= back)
        suffix = tl.load(text_ptr + length - back, mask=length >= back, other=0)
        earlier = tl.load(text_ptr + start - back, mask=running, other=0)
        running = running & (earlier == suffix)
        matched += running.to(tl.int32)
    start = start.to(tl.int64)
    rank = tl.where(start + num_draft <= length, L + start, L - start)
    key = tl.where(matched >= MIN_NGRAM, (matched.to(tl.int64) << 32) + rank, 0)
    tl.store(best_ptr + batch * tl.num_programs(1) + split, tl.max(key, 0))


@triton.jit(do_not_specialize=_UNSPECIALISED, do_not_specialize_on_alignment=_POINTERS)
def draft_kernel(
    tokens_ptr,
    lens_ptr,
    best_ptr,
    draft_ptr,
    draft_lens_ptr,
    stride_tb,
    L,
    num_draft,
    num_splits,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.load(lens_ptr + batch).to(tl.int32), L)
    best = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, num_splits, BLOCK):
        split = first + tl.arange(0, BLOCK)  # [BLOCK]
        best = tl.maximum(best, tl.load(best_ptr + batch * num_splits + split, mask=split < num_splits, other=0))
    best = tl.max(best, 0)
    rank = best & 0xFFFFFFFF
    start = tl.where(best == 0, 0, tl.where(rank > L, rank - L, L - rank)).to(tl.int32)
    count = tl.where(start > 0, tl.minimum(length - start, num_draft), 0)
    tl.store(draft_lens_ptr + batch, count)
    for first in range(0, num_draft, BLOCK):
        i = first + tl.arange(0, BLOCK)
        token = tl.load(tokens_ptr + batch * stride_tb + start + i, mask=i < count, other=-1)
        tl.store(draft_ptr + batch * num_draft + i, token, mask=i < num_draft)


def prompt_lookup(
    tokens: torch.Tensor, lens: torch.Tensor, *, num_draft: int, max_ngram: int = 3, min_ngram: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    B, L = tokens.shape
    draft_tokens = tokens.new_empty((B, num_draft))
    draft_lens = tokens.new_empty(B, dtype=torch.int32)
    if B == 0:
        return draft_tokens, draft_lens
    lens = lens.contiguous()
    config = choose("prompt_lookup", current_device(), L)
    splits = triton.cdiv(max(L - 1, 1), config.block)
    best = tokens.new_empty((B, splits))
    match_kernel[(B, splits)](
        tokens,
        lens,
        best,
        tokens.stride(0),
        L,
        num_draft,
        MAX_NGRAM=max_ngram,
        MIN_NGRAM=min_ngram,
        BLOCK=config.block,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    draft_kernel[(B,)](
        tokens,
        lens,
        best,
        draft_tokens,
        draft_lens,
        tokens.stride(0),
        L,
        num_draft,
        splits,
        BLOCK=64,
        num_warps=1,
        enable_fp_fusion=True,
    )
    return draft_tokens, draft_lens
