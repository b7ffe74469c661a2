"""Steps that all verification operators share: softmax statistics of every row of logits, and the race over one row.

A row is cut into chunks by the size of the vocabulary alone, so the tokens of a request do not depend on its batch.
"""

from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl

from kvops.autotune.config import VerifyConfig
from kvops.kernels.primitives import LOG2_E, exponential_from_uniform, philox_words, uniform_from_bits

# The streams of kvops/eager/philox.py.
ACCEPT = tl.constexpr(0)
RESAMPLE = tl.constexpr(1)
NO_INDEX = tl.constexpr(2147483647)
# What the kernels read one number at a time, and what leads there: not worth a variant (see kvops.kernels.paged_tiles).
UNSPECIALISED = (
    "T",
    "N",
    "num_splits",
    "num_left",
    "stride_db",
    "stride_dn",
    "stride_dt",
    "stride_nb",
    "stride_nn",
)
READ_AS_SCALARS = (
    "draft_lens_ptr",
    "drafts_ptr",
    "parents_ptr",
    "temperature_ptr",
    "seed_ptr",
    "step_ptr",
    "tokens_ptr",
    "accepted_ptr",
    "count_ptr",
    "path_ptr",
    "node_ptr",
    "row_max_ptr",
    "row_sum_ptr",
    "max_ptr",
    "sum_ptr",
    "argmax_ptr",
    "accept_ptr",
    "mass_ptr",
)

# Logits, draft tokens, draft lengths (or parents), draft probabilities, temperature, seed, step: the tensors that most
# kernels of verification take first, in their order.
DraftInputs: TypeAlias = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
]


@triton.jit
def exponent_scale(temperature_ptr, batch, HAS_TEMPERATURE: tl.constexpr):
    """log2(e) / temperature of a request, kept finite, and whether it samples at all."""
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + batch)
        sampled = temperature > 0
        scale = tl.div_rn(tl.full((), LOG2_E, tl.float32), tl.where(sampled, temperature, 1.0))
        scale = tl.minimum(tl.maximum(scale, 1e-30), 1e38)
    else:
        sampled = False
        scale = tl.full((), LOG2_E, tl.float32)
    return scale, sampled


@triton.jit
def draft_length(draft_lens_ptr, batch, T, HAS_LENS: tl.constexpr):
    if HAS_LENS:
        length = tl.minimum(tl.maximum(tl.load(draft_lens_ptr + batch).to(tl.int32), 0), T)
    else:
        length = T
    return length


@triton.jit
def seed_and_step(seed_ptr, step_ptr, batch, HAS_STEP: tl.constexpr):
    """What a request's random numbers depend on, beside their stream and their place in the request."""
    step = tl.load(step_ptr + batch) if HAS_STEP else tl.full((), 0, tl.int64)
    return tl.load(seed_ptr + batch), step


@triton.jit
def acceptance_threshold(seed, step, position):
    """Uniform numbers u in (0, 1) for the drafts at ``position``: u < p accepts one with probability p."""
    bits, _, _, _ = philox_words(seed, step, position, ACCEPT, position * 0)
    return uniform_from_bits(bits)


@triton.jit
def row_weights(row_ptr, index, mask, row_max, scale):
    """Unnormalised probabilities of the entries ``index`` of a row of logits: exp((x - max) / temperature), else 0."""
    x = tl.load(row_ptr + index, mask=mask, other=float("-inf")).to(tl.float32)
    return tl.exp2((x - row_max) * scale)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=READ_AS_SCALARS)
def softmax_stats_kernel(
    logits_ptr,
    draft_lens_ptr,
    temperature_ptr,
    max_ptr,
    sum_ptr,
    argmax_ptr,
    stride_lb,
    stride_lt,
    T,
    V,
    HAS_LENS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch = row // (T + 1)
    t = row % (T + 1)
    if t > draft_length(draft_lens_ptr, batch, T, HAS_LENS):
        return
    index = split * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    x = tl.load(logits_ptr + batch * stride_lb + t * stride_lt + index, mask=index < V, other=float("-inf"))
    x = x.to(tl.float32)
    scale, _ = exponent_scale(temperature_ptr, batch, HAS_TEMPERATURE)
    # A NaN stays out of the maximum and comes back through the sum, as does +inf: that is how a row is refused.
    row_max = tl.max(tl.where(x == x, x, float("-inf")), 0)
    total = tl.sum(tl.exp2((x - tl.where(row_max == float("-inf"), 0.0, row_max)) * scale), 0)
    argmax = tl.min(tl.where(x == row_max, index, NO_INDEX), 0)
    out = row * tl.num_programs(1) + split
    tl.store(max_ptr + out, row_max)
    tl.store(sum_ptr + out, total)
    tl.store(argmax_ptr + out, argmax)


@triton.jit
def merge_stats(max_ptr, sum_ptr, argmax_ptr, offset, mask, scale, AXIS: tl.constexpr):
    """Maximum, sum and lowest argmax of the rows whose chunks lie along AXIS; a usable row has a sum > 0, not NaN."""
    chunk_max = tl.load(max_ptr + offset, mask=mask, other=float("-inf"))
    chunk_sum = tl.load(sum_ptr + offset, mask=mask, other=0.0)
    chunk_argmax = tl.load(argmax_ptr + offset, mask=mask, other=NO_INDEX)
    row_max = tl.max(chunk_max, AXIS, keep_dims=True)
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    total = tl.sum(chunk_sum * tl.exp2((chunk_max - shift) * scale), AXIS)
    argmax = tl.min(tl.where(chunk_max == row_max, chunk_argmax, NO_INDEX), AXIS)
    return tl.max(chunk_max, AXIS), total, argmax


@triton.jit
def row_stats(max_ptr, sum_ptr, argmax_ptr, row, num_splits, scale, BLOCK_S: tl.constexpr):
    """``merge_stats`` of one row."""
    splits = tl.arange(0, BLOCK_S)  # [BLOCK_S]
    return merge_stats(max_ptr, sum_ptr, argmax_ptr, row * num_splits + splits, splits < num_splits, scale, 0)


@triton.jit
def vocabulary_index(place, lane):
    """The entry at word ``lane`` of a place: 256 places cover a group of 1024 contiguous entries."""
    return place // 256 * 1024 + lane * 256 + place % 256


@triton.jit
def race_score(weight, word):
    return tl.where(weight > 0, weight / exponential_from_uniform(uniform_from_bits(word)), -1.0)


@triton.jit
def race_start(seed, step, position, LANES: tl.constexpr):
    """This program's places, their random words (numbered as race_exponentials has it), and nothing raced yet: the best
    score and entry of each place, and the sum of its weights."""
    place = tl.program_id(1) * LANES + tl.arange(0, LANES)  # [LANES]
    words = philox_words(seed, step, position, RESAMPLE, place % 256)
    nobody = tl.full((LANES,), -1.0, tl.float32)
    return place, words, nobody, tl.full((LANES,), NO_INDEX, tl.int32), tl.zeros((LANES,), tl.float32)


@triton.jit
def race_step(best, best_index, mass, weight, word, index):
    """The better of each place's best so far and weight / exponential, ties staying with the earlier, lower index; and
    the sum of its weights."""
    score = race_score(weight, word)
    better = score > best
    return tl.where(better, score, best), tl.where(better, index, best_index), mass + weight


@triton.jit
def store_winner(score_ptr, index_ptr, batch, best, best_index, mass, seed, step, position):
    """Groups of 256 places (1024 entries) race by their sums; the winner's best entry is this program's."""
    split = tl.program_id(1)
    out = batch * tl.num_programs(1) + split
    GROUPS: tl.constexpr = best.shape[0] // 256
    best = tl.reshape(best, (GROUPS, 256))
    best_index = tl.reshape(best_index, (GROUPS, 256))
    inside = tl.min(tl.where(best == tl.max(best, 1, keep_dims=True), best_index, NO_INDEX), 1)  # [GROUPS]
    word, _, _, _ = philox_words(seed, step, position, RESAMPLE, 256 + split * GROUPS + tl.arange(0, GROUPS))
    score = race_score(tl.sum(tl.reshape(mass, (GROUPS, 256)), 1), word)
    top = tl.max(score, 0)
    tl.store(score_ptr + out, top)
    tl.store(index_ptr + out, tl.min(tl.where(score == top, inside, NO_INDEX), 0))


@triton.jit
def finish_request(
    batch,
    num_accepted,
    scale,
    sampled,
    drafts_ptr,
    max_ptr,
    sum_ptr,
    argmax_ptr,
    tokens_ptr,
    accepted_ptr,
    row_max_ptr,
    row_sum_ptr,
    stride_db,
    stride_dt,
    T,
    num_splits,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Emit the accepted drafts and the argmax of the row behind them, which a race may replace; -1 if unusable."""
    row = batch * (T + 1) + num_accepted
    row_max, total, argmax = row_stats(max_ptr, sum_ptr, argmax_ptr, row, num_splits, scale, BLOCK_S)
    usable = total > 0
    following = tl.where(usable, argmax, -1).to(tl.int64)
    tl.store(accepted_ptr + batch, num_accepted)
    if HAS_TEMPERATURE:
        tl.store(row_max_ptr + batch, row_max)
        tl.store(row_sum_ptr + batch, tl.where(usable & sampled, total, 0.0))
    for start in range(0, T + 1, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        draft = tl.load(drafts_ptr + batch * stride_db + t * stride_dt, mask=t < num_accepted, other=-1)
        emitted = tl.where(t == num_accepted, following, draft)
        tl.store(tokens_ptr + batch * (T + 1) + t, emitted, mask=t <= T)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=READ_AS_SCALARS)
def emit_kernel(score_ptr, index_ptr, row_sum_ptr, accepted_ptr, tokens_ptr, T, num_splits, BLOCK_S: tl.constexpr):
    """The winner of the race; where the residual vanished in rounding, the argmax that stands there stays."""
    batch = tl.program_id(0).to(tl.int64)
    if tl.load(row_sum_ptr + batch) == 0:
        return
    splits = tl.arange(0, BLOCK_S)
    score = tl.load(score_ptr + batch * num_splits + splits, mask=splits < num_splits, other=-1.0)
    index = tl.load(index_ptr + batch * num_splits + splits, mask=splits < num_splits, other=NO_INDEX)
    best = tl.max(score, 0)
    if best > 0:
        winner = tl.min(tl.where(score == best, index, NO_INDEX), 0)
        tl.store(tokens_ptr + batch * (T + 1) + tl.load(accepted_ptr + batch), winner.to(tl.int64))


def softmax_stats(
    target_logits: torch.Tensor, draft_lens: torch.Tensor | None, temperature: torch.Tensor | None, config: VerifyConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch ``softmax_stats_kernel`` over the rows of ``target_logits`` ``[B, rows, V]``.

    Returns the maximum (float32), the sum of exponentials (float32) and the lowest argmax (int32) of each chunk, each
    ``[B * rows, chunks]``.
    """
    B, rows, V = target_logits.shape
    chunks = triton.cdiv(V, config.block)
    chunk_max, chunk_sum = target_logits.new_empty((2, B * rows, chunks), dtype=torch.float32).unbind()
    chunk_argmax = target_logits.new_empty((B * rows, chunks), dtype=torch.int32)
    softmax_stats_kernel[(B * rows, chunks)](
        target_logits,
        draft_lens,
        temperature,
        chunk_max,
        chunk_sum,
        chunk_argmax,
        *target_logits.stride()[:2],
        rows - 1,
        V,
        HAS_LENS=draft_lens is not None,
        HAS_TEMPERATURE=temperature is not None,
        BLOCK=config.block,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    return chunk_max, chunk_sum, chunk_argmax


def draw_by_race(
    kernel: Any,
    tensors: tuple[torch.Tensor | None, ...],
    numbers: tuple[int, ...],
    flags: dict[str, bool],
    row_sum: torch.Tensor,
    num_accepted: torch.Tensor,
    tokens: torch.Tensor,
    config: VerifyConfig,
) -> None:
    """Draw the token behind the accepted drafts of each sampled request, and write it into ``tokens`` ``[B, rows]``.

    ``kernel`` races over splits of the vocabulary. It takes ``tensors``, the buffers of the splits' winners, and
    ``numbers``, of which the last is the size of the vocabulary. A request with ``row_sum`` 0 is greedy.
    """
    B, rows = tokens.shape
    splits = triton.cdiv(numbers[-1], config.race_block)
    score = row_sum.new_empty((B, splits))
    index = row_sum.new_empty((B, splits), dtype=torch.int32)
    kernel[(B, splits)](
        *tensors,
        score,
        index,
        *numbers,
        LANES=config.race_block // 4,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
        **flags,
    )
    emit_kernel[(B,)](
        score, index, row_sum, num_accepted, tokens, rows - 1, splits,
        BLOCK_S=triton.next_power_of_2(splits), num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
