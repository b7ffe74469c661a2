"""Draft verification: one read of the logits for the softmax statistics, then a race over one row of each request.

1. ``softmax_stats_kernel``: (rows, chunks) programs; the maximum, its lowest index and the sum of exponentials of a
   chunk.
2. ``accept_kernel``: one program per request merges the chunks, accepts drafts from the first on, and writes the tokens
   of greedy requests. Block verification has kernels of its own for this step (``verify_block``).
3. ``race_kernel``: (requests, splits) programs; the exponential race over the row at which a sampled request stopped.
4. ``emit_kernel``: one program per request merges the splits of the race.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from kvops.autotune.lookup import choose
from kvops.kernels.device import current_device
from kvops.kernels.verification import (
    READ_AS_SCALARS,
    UNSPECIALISED,
    acceptance_threshold,
    draft_length,
    draw_by_race,
    exponent_scale,
    finish_request,
    merge_stats,
    race_start,
    race_step,
    row_weights,
    seed_and_step,
    softmax_stats,
    store_winner,
    vocabulary_index,
)
from kvops.kernels.verify_block import accept_block
from kvops.packed import verify_padded


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=READ_AS_SCALARS)
def accept_kernel(
    logits_ptr,
    drafts_ptr,
    draft_lens_ptr,
    probs_ptr,
    temperature_ptr,
    seed_ptr,
    step_ptr,
    max_ptr,
    sum_ptr,
    argmax_ptr,
    tokens_ptr,
    accepted_ptr,
    row_max_ptr,
    row_sum_ptr,
    stride_lb,
    stride_lt,
    stride_db,
    stride_dt,
    stride_pb,
    stride_pt,
    T,
    V,
    num_splits,
    HAS_LENS: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_STEP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    length = draft_length(draft_lens_ptr, batch, T, HAS_LENS)
    scale, sampled = exponent_scale(temperature_ptr, batch, HAS_TEMPERATURE)
    splits = tl.arange(0, BLOCK_S)  # [BLOCK_S]
    stats_row = batch * (T + 1)
    num_accepted = length
    for start in range(0, length, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        offset = (stats_row + t)[:, None] * num_splits + splits[None, :]  # [BLOCK_T, BLOCK_S]
        mask = (t < length)[:, None] & (splits < num_splits)[None, :]
        row_max, total, argmax = merge_stats(max_ptr, sum_ptr, argmax_ptr, offset, mask, scale, 1)
        draft = tl.load(drafts_ptr + batch * stride_db + t * stride_dt, mask=t < length, other=-1)
        offered = (draft >= 0) & (draft < V) & (total > 0)
        accept = draft == argmax
        if HAS_TEMPERATURE:
            seed, step = seed_and_step(seed_ptr, step_ptr, batch, HAS_STEP)
            threshold = acceptance_threshold(seed, step, t)
            if HAS_PROBS:
                threshold *= tl.load(probs_ptr + batch * stride_pb + t * stride_pt + draft, mask=offered, other=0.0)
            rows_ptr = logits_ptr + batch * stride_lb + t * stride_lt
            weight = row_weights(rows_ptr, draft, offered, tl.where(offered, row_max, 0.0), scale)
            # u < p / q, with p = weight / total
            accept = tl.where(sampled, threshold * total < weight, accept)
        refused = tl.min(tl.where(offered & accept, length, t), 0)
        num_accepted = tl.minimum(num_accepted, refused)

    finish_request(
        batch, num_accepted, scale, sampled, drafts_ptr, max_ptr, sum_ptr, argmax_ptr, tokens_ptr, accepted_ptr,
        row_max_ptr, row_sum_ptr, stride_db, stride_dt, T, num_splits, HAS_TEMPERATURE, BLOCK_T, BLOCK_S,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=READ_AS_SCALARS)
def race_kernel(
    logits_ptr,
    drafts_ptr,
    draft_lens_ptr,
    probs_ptr,
    temperature_ptr,
    seed_ptr,
    step_ptr,
    accepted_ptr,
    row_max_ptr,
    row_sum_ptr,
    ratio_ptr,
    score_ptr,
    index_ptr,
    stride_lb,
    stride_lt,
    stride_db,
    stride_dt,
    stride_pb,
    stride_pt,
    T,
    V,
    HAS_LENS: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    HAS_STEP: tl.constexpr,
    HAS_RATIO: tl.constexpr,
    LANES: tl.constexpr,
):
    """The winner among the groups of 4 * LANES vocabulary entries, and its score."""
    batch = tl.program_id(0).to(tl.int64)
    total = tl.load(row_sum_ptr + batch)
    if total == 0:
        return
    scale, _ = exponent_scale(temperature_ptr, batch, True)
    row_max = tl.load(row_max_ptr + batch)
    t = tl.load(accepted_ptr + batch)
    # A draft that was offered and refused leaves the residual; anything else leaves the row as it is.
    refused = t < draft_length(draft_lens_ptr, batch, T, HAS_LENS)
    draft = tl.load(drafts_ptr + batch * stride_db + t * stride_dt, mask=refused, other=-1)
    refused = refused & (draft >= 0) & (draft < V)
    seed, step = seed_and_step(seed_ptr, step_ptr, batch, HAS_STEP)
    place, words, best, best_index, mass = race_start(seed, step, t, LANES)
    for lane in tl.static_range(4):
        index = vocabulary_index(place, lane)
        weight = row_weights(logits_ptr + batch * stride_lb + t * stride_lt, index, index < V, row_max, scale)
        if HAS_PROBS:
            q = tl.load(probs_ptr + batch * stride_pb + t * stride_pt + index, mask=refused & (index < V), other=0.0)
            p = weight / total
            if HAS_RATIO:  # block verification: what the accepted drafts leave of the target's distribution
                p *= tl.load(ratio_ptr + batch)
            weight = tl.where(refused, tl.where(p > q, p - q, 0.0), weight)
        else:
            weight = tl.where(refused & (index == draft), 0.0, weight)
        best, best_index, mass = race_step(best, best_index, mass, weight, words[lane], index)
    store_winner(score_ptr, index_ptr, batch, best, best_index, mass, seed, step, t)


def verify_draft(
    target_logits: torch.Tensor,
    draft_tokens: torch.Tensor,
    *,
    draft_lens: torch.Tensor | None = None,
    draft_probs: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    method: str = "token",
) -> tuple[torch.Tensor, torch.Tensor]:
    B, rows, V = target_logits.shape
    T = rows - 1
    tokens = draft_tokens.new_empty((B, rows))
    num_accepted = draft_tokens.new_empty(B, dtype=torch.int32)
    if B == 0:
        return tokens, num_accepted
    # The kernels read arguments with one element per request by index: any other stride becomes 1.
    draft_lens, temperature, seed, step = (
        None if value is None else value.contiguous() for value in (draft_lens, temperature, seed, step)
    )
    if temperature is None:
        draft_probs = None  # greedy requests draw nothing
    config = choose("verify", current_device(), target_logits.element_size(), V)
    stats = softmax_stats(target_logits, draft_lens, temperature, config)
    splits = stats[0].shape[1]
    BLOCK_S = triton.next_power_of_2(splits)
    BLOCK_T = min(triton.next_power_of_2(rows), max(1, 1024 // BLOCK_S))
    row_max, row_sum = target_logits.new_empty((2, B), dtype=torch.float32).unbind()
    inputs = target_logits, draft_tokens, draft_lens, draft_probs, temperature, seed, step
    results = tokens, num_accepted, row_max, row_sum
    prob_strides = (0, 0) if draft_probs is None else draft_probs.stride()[:2]
    strides = *target_logits.stride()[:2], *draft_tokens.stride(), *prob_strides
    flags = {"HAS_LENS": draft_lens is not None, "HAS_PROBS": draft_probs is not None, "HAS_STEP": step is not None}

    ratio = None
    if method == "block" and temperature is not None and seed is not None:
        ratio = accept_block(inputs, stats, results, config, BLOCK_T, BLOCK_S)
    else:
        accept_kernel[(B,)](
            *inputs,
            *stats,
            *results,
            *strides,
            T,
            V,
            splits,
            HAS_TEMPERATURE=temperature is not None,
            BLOCK_T=BLOCK_T,
            BLOCK_S=BLOCK_S,
            num_warps=4,
            enable_fp_fusion=True,
            **flags,
        )
    if temperature is not None:
        tensors = *inputs, num_accepted, row_max, row_sum, ratio
        flags["HAS_RATIO"] = ratio is not None
        draw_by_race(race_kernel, tensors, (*strides, T, V), flags, row_sum, num_accepted, tokens, config)
    return tokens, num_accepted


verify_draft_varlen = partial(verify_padded, verify_draft)
