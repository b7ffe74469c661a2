"""Block verification: the drafts of a request are accepted together (Sun et al., arXiv 2403.10444, algorithm 2).

Three kernels replace ``accept_kernel`` of ``verify_draft``:

1. ``path_kernel``: one program per request multiplies p / q along its drafts and caps the product at 1: ``path[i]``,
   the paper's p_i. It counts the drafts that may be accepted. Without draft probabilities it also writes the residual
   mass of each position.
2. ``left_kernel``: (requests x drafts, splits) programs, with draft probabilities only: the residual mass of each
   position, sum max(path p - q, 0), in chunks of the vocabulary.
3. ``stop_kernel``: one program per request finds the last position whose test passes, and writes the tokens.
"""

import torch
import triton
import triton.language as tl

from kvops.autotune.config import VerifyConfig
from kvops.kernels.verification import (
    READ_AS_SCALARS,
    UNSPECIALISED,
    DraftInputs,
    acceptance_threshold,
    draft_length,
    exponent_scale,
    finish_request,
    row_stats,
    row_weights,
    seed_and_step,
)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=READ_AS_SCALARS)
def path_kernel(
    logits_ptr,
    drafts_ptr,
    draft_lens_ptr,
    probs_ptr,
    temperature_ptr,
    max_ptr,
    sum_ptr,
    argmax_ptr,
    row_max_ptr,
    row_sum_ptr,
    path_ptr,
    left_ptr,
    count_ptr,
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
    BLOCK_S: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    scale, sampled = exponent_scale(temperature_ptr, batch, True)
    path = tl.full((), 1.0, tl.float32)
    counting = tl.full((), 1, tl.int32)
    count = tl.full((), 0, tl.int32)
    tl.store(path_ptr + batch * (T + 1), path)
    for t in range(0, draft_length(draft_lens_ptr, batch, T, HAS_LENS)):
        row = batch * (T + 1) + t
        row_max, total, argmax = row_stats(max_ptr, sum_ptr, argmax_ptr, row, num_splits, scale, BLOCK_S)
        draft = tl.load(drafts_ptr + batch * stride_db + t * stride_dt)
        offered = (counting != 0) & (draft >= 0) & (draft < V) & (total > 0)
        # Spelt out: by row_weights it takes more registers (sm_120).
        x = tl.load(logits_ptr + batch * stride_lb + t * stride_lt + draft, mask=offered, other=float("-inf"))
        p = tl.exp2((x.to(tl.float32) - tl.where(offered, row_max, 0.0)) * scale) / tl.where(offered, total, 1.0)
        tl.store(row_max_ptr + row, row_max)
        tl.store(row_sum_ptr + row, total)
        if HAS_PROBS:
            q = tl.load(probs_ptr + batch * stride_pb + t * stride_pt + draft, mask=offered, other=1.0)
            path = tl.where(p > 0, tl.minimum(path * p / q, 1.0), 0.0)
        else:
            tl.store(left_ptr + row, path * (1.0 - p))
            path *= p
        tl.store(path_ptr + row + 1, path)
        # A greedy request counts the drafts that are the argmax: those it accepts.
        counting = (offered & (sampled | (draft == argmax))).to(tl.int32)
        count += counting
    tl.store(count_ptr + batch, count)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=READ_AS_SCALARS)
def left_kernel(
    logits_ptr,
    probs_ptr,
    temperature_ptr,
    row_max_ptr,
    row_sum_ptr,
    path_ptr,
    count_ptr,
    left_ptr,
    stride_lb,
    stride_lt,
    stride_pb,
    stride_pt,
    T,
    V,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64) // T
    t = tl.program_id(0) % T
    scale, sampled = exponent_scale(temperature_ptr, batch, True)
    if (t == 0) | (t >= tl.load(count_ptr + batch)) | (sampled == 0):
        return
    row = batch * (T + 1) + t
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = index < V
    row_ptr = logits_ptr + batch * stride_lb + t * stride_lt
    p = row_weights(row_ptr, index, inside, tl.load(row_max_ptr + row), scale) / tl.load(row_sum_ptr + row)
    p *= tl.load(path_ptr + row)
    q = tl.load(probs_ptr + batch * stride_pb + t * stride_pt + index, mask=inside, other=0.0)
    tl.store(left_ptr + row * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.where(p > q, p - q, 0.0), 0))


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=READ_AS_SCALARS)
def stop_kernel(
    drafts_ptr,
    temperature_ptr,
    seed_ptr,
    step_ptr,
    max_ptr,
    sum_ptr,
    argmax_ptr,
    path_ptr,
    left_ptr,
    count_ptr,
    tokens_ptr,
    accepted_ptr,
    row_max_ptr,
    row_sum_ptr,
    ratio_ptr,
    stride_db,
    stride_dt,
    T,
    num_splits,
    num_left,
    HAS_STEP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    scale, sampled = exponent_scale(temperature_ptr, batch, True)
    count = tl.load(count_ptr + batch)
    seed, step = seed_and_step(seed_ptr, step_ptr, batch, HAS_STEP)
    splits = tl.arange(0, BLOCK_S)  # [BLOCK_S]
    stop = tl.full((), 0, tl.int32)
    for i in range(1, count + 1):
        row = batch * (T + 1) + i
        path = tl.load(path_ptr + row)
        u = acceptance_threshold(seed, step, i - 1)
        left = tl.sum(tl.load(left_ptr + row * num_left + splits, mask=(splits < num_left) & (i < count), other=0.0), 0)
        passes = tl.where(i < count, u * (left + (1.0 - path)) < left, u < path)
        stop = tl.where(passes, i, stop)
    num_accepted = tl.where(sampled, stop, count)
    tl.store(ratio_ptr + batch, tl.load(path_ptr + batch * (T + 1) + num_accepted))
    finish_request(
        batch, num_accepted, scale, sampled, drafts_ptr, max_ptr, sum_ptr, argmax_ptr, tokens_ptr, accepted_ptr,
        row_max_ptr, row_sum_ptr, stride_db, stride_dt, T, num_splits, True, BLOCK_T, BLOCK_S,
    )  # fmt: skip


# Over 80 lines: three launches with their arguments.
def accept_block(
    inputs: DraftInputs,
    stats: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    results: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    config: VerifyConfig,
    BLOCK_T: int,
    BLOCK_S: int,
) -> torch.Tensor:
    """Fill ``results`` (tokens, num_accepted, row_max, row_sum) from the chunks' ``stats``, as ``accept_kernel`` does.

    ``inputs`` are the first seven arguments of ``accept_kernel``, with ``temperature`` and ``seed``. Returns float32
    ``[B]``: the factor of the target's probabilities in the residual to draw from.
    """
    target_logits, draft_tokens, draft_lens, draft_probs, temperature, seed, step = inputs
    B, rows, V = target_logits.shape
    T = rows - 1
    splits = stats[0].shape[1]
    new = target_logits.new_empty
    row_max, row_sum, path = new((3, B, rows), dtype=torch.float32).unbind()
    num_left = 1 if draft_probs is None else splits
    left = new((B * rows, num_left), dtype=torch.float32)
    count, ratio = new(B, dtype=torch.int32), new(B, dtype=torch.float32)
    prob_strides = (0, 0) if draft_probs is None else draft_probs.stride()[:2]
    path_kernel[(B,)](
        *inputs[:5],
        *stats,
        row_max,
        row_sum,
        path,
        left,
        count,
        *target_logits.stride()[:2],
        *draft_tokens.stride(),
        *prob_strides,
        T,
        V,
        splits,
        HAS_LENS=draft_lens is not None,
        HAS_PROBS=draft_probs is not None,
        BLOCK_S=BLOCK_S,
        num_warps=1,
        enable_fp_fusion=True,
    )
    if draft_probs is not None and T > 1:
        left_kernel[(B * T, splits)](
            target_logits,
            draft_probs,
            temperature,
            row_max,
            row_sum,
            path,
            count,
            left,
            *target_logits.stride()[:2],
            *prob_strides,
            T,
            V,
            BLOCK=config.block,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )
    stop_kernel[(B,)](
        draft_tokens,
        temperature,
        seed,
        step,
        *stats,
        path,
        left,
        count,
        *results,
        ratio,
        *draft_tokens.stride(),
        T,
        splits,
        num_left,
        HAS_STEP=step is not None,
        BLOCK_T=BLOCK_T,
        BLOCK_S=BLOCK_S,
        num_warps=1,
        enable_fp_fusion=True,
    )
    return ratio
