"""What every way of verifying drafts shares: the softmax statistics of all rows and the race over one.

A row's chunks depend on the vocabulary only: a request's tokens never depend on what it is batched with.
"""

import triton
import triton.language as tl

from kvops.kernels.primitives import LOG2_E, exponential_from_uniform, philox_words, uniform_from_bits

# The streams of kvops/eager/philox.py.
ACCEPT = tl.constexpr(0)
RESAMPLE = tl.constexpr(1)
NO_INDEX = tl.constexpr(2147483647)


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


@triton.jit
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


@triton.jit
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
