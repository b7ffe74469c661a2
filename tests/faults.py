"""Planted faults of kernels and of the eager code (``mutations.py``). ``numba_faults.py`` has those of CPU kernels."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """Replace ``old``, which occurs once in the file, by ``new``. Then ``tests``, arguments of pytest, must fail."""

    fault: str
    file: str
    old: str
    new: str
    tests: str


def named(file: str, *words: str) -> str:
    """The tests of ``file`` whose names have all of the words."""
    return f"tests/test_{file}.py -k '{' and '.join(words)}'"


DENSE = named("attention", "agrees", "triton", "float32")
DENSE_EAGER = named("attention", "agrees or joins", "not triton")
GRADIENT = named("attention_backward", "agrees", "triton", "float32")
GRADIENT_EAGER = named("attention_backward", "agrees or lse", "eager")
PAGED = named("paged", "triton", "decoding_reads or drafts or windows or float8 or softcap")
PACKED = "tests/test_paged_packed.py -k 'triton and (two_calls or last_tokens or alibi_slopes)'"
PAGED_EAGER = "tests/test_paged.py tests/test_paged_eager.py -k 'eager and not triton'"
LATENTS = named("paged_latent", "triton", "decoding_reads or row_tiles")
SCORES = named("scores", "triton", "reduction or queries_that_count or windows")
SCORES_EAGER = named("scores", "eager", "reduction or queries_that_count or windows")
MERGE = named("merge", "triton", "whole or float64")
MERGE_EAGER = named("merge", "eager", "whole or float64")
VERIFY = "tests/test_verify.py tests/test_verify_block.py tests/test_verify_distribution.py -k 'triton'"
VERIFY_EAGER = (
    "tests/test_verify.py tests/test_verify_block.py tests/test_verify_distribution.py -k 'not triton and not numba'"
)
EVICTION = "tests/test_eviction.py tests/test_compaction.py -k triton"
EVICTION_EAGER = "tests/test_eviction.py tests/test_compaction.py -k eager"

FAULTS = [
    # Dense attention, forward
    Mutation(
        "the scale is five millionths too large",
        "kernels/primitives.py",
        "scores = dots * (scale * LOG2_E)",
        "scores = dots * (scale * LOG2_E * 1.000005)",
        DENSE,
    ),
    Mutation(
        "what was accumulated is not rescaled when the maximum rises",
        "kernels/flash_forward.py",
        "acc = dot(p.to(v.dtype), v, acc * rescale[:, None])",
        "acc = dot(p.to(v.dtype), v, acc)",
        DENSE,
    ),
    Mutation(
        "probabilities are rounded to float16",
        "kernels/flash_forward.py",
        "acc = dot(p.to(v.dtype), v, acc * rescale[:, None])",
        "acc = dot(p.to(tl.float16).to(v.dtype), v, acc * rescale[:, None])",
        DENSE,
    ),
    Mutation(
        "the accumulator is kept in float16",
        "kernels/flash_forward.py",
        "acc = dot(p.to(v.dtype), v, acc * rescale[:, None])",
        "acc = dot(p.to(v.dtype), v, acc * rescale[:, None]).to(tl.float16).to(tl.float32)",
        named("attention", "agrees", "triton", "float32 or float16"),
    ),
    Mutation(
        "a window is one key short",
        "kernels/flash_tiles.py",
        "seen &= distance <= left",
        "seen &= distance < left",
        DENSE,
    ),
    Mutation(
        "a query sees one key of the future",
        "kernels/flash_tiles.py",
        "seen &= distance >= -right",
        "seen &= distance >= -right - 1",
        DENSE,
    ),
    Mutation(
        "the block with the last keys is missed",
        "kernels/flash_tiles.py",
        "    end = length\n    full_start = 0",
        "    end = length // BLOCK * BLOCK\n    full_start = 0",
        DENSE,
    ),
    Mutation(
        "query heads are mapped to KV heads in turn, not in groups",
        "kernels/flash_forward.py",
        "k_ptr += batch * stride_kb + head // GROUP * stride_kh + first_k * stride_kn",
        "k_ptr += batch * stride_kb + head % (heads // GROUP) * stride_kh + first_k * stride_kn",
        named("attention", "agrees", "triton", "nine"),
    ),
    Mutation(
        "lse lacks the maximum's factor",
        "kernels/flash_forward.py",
        "lse = (m + tl.log2(total)) * LN_2",
        "lse = m * LN_2 + tl.log2(total)",
        DENSE,
    ),
    Mutation(
        "the softcap's series has a wrong coefficient",
        "kernels/primitives.py",
        "small = x * (1.0 + x2 * (-1.0 / 3.0 + x2",
        "small = x * (1.0 + x2 * (-0.3 + x2",
        named("attention", "agrees", "triton", "softcap or everything"),
    ),
    Mutation(
        "ALiBi is signed on both sides",
        "kernels/primitives.py",
        "tl.abs(distance).to(tl.float32)",
        "distance.to(tl.float32)",
        named("attention", "agrees", "triton", "alibi"),
    ),
    Mutation(
        "the sink's weight starts at 0",
        "kernels/flash_forward.py",
        "l = tl.full([BLOCK_M], 1.0, tl.float32)",
        "l = tl.zeros([BLOCK_M], tl.float32)",
        named("attention", "agrees", "triton", "sinks or everything"),
    ),
    Mutation(
        "eager: a window is one key short",
        "kvops/eager/window.py",
        "low = 0 if self.left is None else max(0, start + self.offset - self.left)",
        "low = 0 if self.left is None else max(0, start + self.offset - self.left + 1)",
        DENSE_EAGER,
    ),
    Mutation(
        "eager: tiles are joined without the weight of the first",
        "kvops/eager/softmax.py",
        "return torch.mul(out_a, weight_a[..., None])",
        "return torch.mul(out_a, 1.0)",
        DENSE_EAGER,
    ),
    Mutation(
        "eager: the derivative of the softcap is lost",
        "kvops/eager/attention.py",
        "ds.mul_(1 - capped * capped)",
        "ds.mul_(1 - capped)",
        GRADIENT_EAGER,
    ),
    Mutation(
        "eager: zeros for a row of NaN beside few keys",
        "kvops/eager/attention.py",
        "return keys < _LANES and bool((lse == 0).any())",
        "return False",
        named("nan", "eager", "flash_attention_shows"),
    ),
    # Packed sequences
    Mutation(
        "packed: lse of the wrong rows",
        "kvops/eager/varlen.py",
        "out[None, rows], lse[None, :, rows]",
        "out[None, rows], lse[None, :, rows].flip(2)",
        named("varlen", "backward_agrees", "eager", "dtype0"),
    ),
    # Dense attention, backward
    Mutation(
        "dK misses the scale's last bits",
        "kernels/flash_backward_keys.py",
        "left, dk * scale, HEAD_DIM",
        "left, dk * (scale * 1.00001), HEAD_DIM",
        GRADIENT,
    ),
    Mutation(
        "delta is left out of dS",
        "kernels/flash_tiles.py",
        "ds = p * (dp - tl.expand_dims(delta, AXIS))",
        "ds = p * dp",
        GRADIENT,
    ),
    Mutation(
        "dK sums over all heads of a group but the last",
        "kernels/flash_backward_keys.py",
        "for member in tl.range(0, GROUP):",
        "for member in tl.range(0, GROUP - (GROUP > 1)):",
        GRADIENT,
    ),
    Mutation(
        "dS is rounded to bfloat16",
        "kernels/flash_backward_queries.py",
        "dq = dot(ds.to(k.dtype), k, dq)",
        "dq = dot(ds.to(tl.bfloat16).to(k.dtype), k, dq)",
        GRADIENT,
    ),
    Mutation(
        "eager: the gradient through lse has the wrong sign",
        "kvops/eager/attention.py",
        "delta = delta - dlse",
        "delta = delta + dlse",
        GRADIENT_EAGER,
    ),
    # Union of two attentions
    Mutation(
        "union: the weights come from lse rounded to bfloat16",
        "kernels/merge_attention.py",
        "weight_a, weight_b, lse = union_weights(lse_a, lse_b)",
        "weight_a, weight_b, lse = union_weights(lse_a.to(tl.bfloat16).to(tl.float32), lse_b)",
        MERGE,
    ),
    Mutation(
        "union, eager: the gradient of the weights lacks one of them",
        "kvops/eager/merge.py",
        ".sum(-1).transpose(-2, -1) * weight_a * weight_b",
        ".sum(-1).transpose(-2, -1) * weight_a",
        MERGE_EAGER,
    ),
    # The paged cache
    Mutation(
        "paged: a row whose scores are all NaN is taken for an empty one",
        "kernels/paged_attention_kernel.py",
        "empty = l == 0.0",
        "empty = (l > 0.0) == 0",
        named("nan", "triton", "paged_attention_shows"),
    ),
    Mutation(
        "paged: the accumulator is not rescaled when the maximum rises",
        "kernels/paged_attention_kernel.py",
        "acc = dot(p.to(v.dtype), v, acc * rescale[:, None])",
        "acc = dot(p.to(v.dtype), v, acc)",
        PAGED,
    ),
    Mutation(
        "paged: partial results are joined without their maxima",
        "kernels/paged_attention_kernel.py",
        "weight = tl.exp2(part_m - shift)",
        "weight = tl.exp2(part_m - part_m)",
        named("paged", "triton", "long or schedule or split"),
    ),
    Mutation(
        "paged: the last slot of each list is not read",
        "kernels/paged_attention_kernel.py",
        "            inside = slots < stop\n            block, offset = page_address",
        "            inside = slots < stop - 1\n            block, offset = page_address",
        PAGED,
    ),
    Mutation(
        "paged: a window one slot short",
        "kernels/paged_tiles.py",
        "return query_place, limit, query_place - window_left, token",
        "return query_place, limit, query_place - window_left + 1, token",
        PAGED,
    ),
    Mutation(
        "paged: drafts see the token behind them",
        "kernels/paged_tiles.py",
        "limit = tl.minimum(limit, query_place + 1)",
        "limit = tl.minimum(limit, query_place + 2)",
        PAGED,
    ),
    Mutation(
        "paged: packed tokens of a sequence are those of the next",
        "kernels/paged_tiles.py",
        "first = tl.load(q_lens_ptr + batch * stride_nb)",
        "first = tl.load(q_lens_ptr + (batch + 1) * stride_nb)",
        PACKED,
    ),
    Mutation(
        "paged: rows of a packed sequence reach into the next",
        "kernels/paged_tiles.py",
        "with_results = tl.minimum(count, num_tokens)",
        "with_results = num_tokens",
        PACKED,
    ),
    Mutation(
        "paged: the token before the last ones scores, too",
        "kernels/paged_scores.py",
        "first_scored = tl.maximum(count - score_last, 0)",
        "first_scored = tl.maximum(count - score_last - 1, 0)",
        PACKED,
    ),
    Mutation(
        "paged: ALiBi by slots where positions are given",
        "kernels/paged_attention_kernel.py",
        "distance = query_place[:, None] - key_places[None, :]",
        "distance = new_slot + token[:, None] - slots[None, :]",
        PACKED,
    ),
    Mutation(
        "paged, eager: packed scores decay by the sequence before",
        "kvops/eager/paged.py",
        "score_decays[b]",
        "score_decays[b - 1]",
        "tests/test_paged_packed.py -k 'eager and last_tokens'",
    ),
    Mutation(
        "paged: int8 is cut off towards 0",
        "kernels/primitives.py",
        "(x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)",
        "x.to(tl.int8)",
        named("paged_operators", "triton", "nearest_even"),
    ),
    Mutation(
        "paged: e5m2 is written with the bias of e4m3",
        "kernels/paged_append.py",
        "rows, 2, 15, 57344.0",
        "rows, 2, 7, 57344.0",
        named("paged_operators", "triton", "nearest_even"),
    ),
    Mutation(
        "paged: only keys are asked whether they are e4m3",
        "kernels/paged_plan.py",
        "torch.float8_e4m3fn in (k_cache.dtype, v_cache.dtype)",
        "torch.float8_e4m3fn in (k_cache.dtype, k_cache.dtype)",
        PAGED,
    ),
    Mutation(
        "paged: float8's factor is off by two",
        "kernels/paged_tiles.py",
        "scale = scale * 256.0",
        "scale = scale * 128.0",
        PAGED,
    ),
    Mutation(
        "paged, eager: keys' scales belong to the next head",
        "kvops/eager/paged.py",
        "rows *= k_scale.expand(heads)[h]",
        "rows *= k_scale.expand(heads)[h - 1]",
        PAGED_EAGER,
    ),
    Mutation(
        "paged, eager: a window one slot short",
        "kvops/eager/paged.py",
        "low = max(0, before + first - self.window_left)",
        "low = max(0, before + first - self.window_left + 1)",
        PAGED_EAGER,
    ),
    Mutation(
        "paged, eager: drafts see the token behind them",
        "kvops/eager/paged.py",
        "seen = slot <= query if self.causal",
        "seen = slot <= query + 1 if self.causal",
        PAGED_EAGER,
    ),
    Mutation(
        "paged, eager: what a tile gives the scores takes the place of what others gave",
        "kvops/eager/paged.py",
        'values += (p.square() if self.reduce == "sumsq" else p).sum(0)',
        'values.copy_((p.square() if self.reduce == "sumsq" else p).sum(0))',
        PAGED_EAGER,
    ),
    Mutation(
        "latents: the rotary columns of the keys are left out",
        "kernels/paged_latent_attention.py",
        "s = dot(q_rope, tl.trans(rope), s)",
        "s = dot(q_rope, tl.trans(rope) * 0, s)",
        LATENTS,
    ),
    Mutation(
        "latents: the accumulator is not rescaled when the maximum rises",
        "kernels/paged_latent_attention.py",
        "acc = dot(p.to(latent.dtype), latent, acc * rescale[:, None])",
        "acc = dot(p.to(latent.dtype), latent, acc)",
        LATENTS,
    ),
    Mutation(
        "latents: the partial results of a row tile stand where those of the first one do",
        "kernels/paged_latent_attention.py",
        "part = (axis_head * places + part) * num_rows + first_row",
        "part = (axis_head * places + part) * num_rows",
        LATENTS,
    ),
    Mutation(
        "latents: packed tokens are read from the beginning of q",
        "kernels/paged_latent_attention.py",
        "place = (first_token + tl.where(seeing, token, 0))",
        "place = tl.where(seeing, token, 0)",
        named("paged_latent", "triton", "packed"),
    ),
    Mutation(
        "latents: the scale of the cache is left out of the values",
        "kernels/paged_latent_attention.py",
        "weight = weight * cache_scale(1.0, cache_ptr, k_scale_ptr, head * stride_k_scale)",
        "weight = weight * 1.0",
        named("paged_latent", "triton", "8_bits"),
    ),
    Mutation(
        "paged: appended tokens go one slot too early",
        "kernels/paged_append.py",
        "stride_lh) - count + tokens",
        "stride_lh) - count + tokens - 1",
        "tests/test_paged_operators.py -k triton",
    ),
    # Scores
    Mutation(
        "a maximum of probabilities leaves NaN out",
        "kernels/primitives.py",
        'return tl.where(x == x, x, float("inf"))',
        "return x",
        named("nan", "triton", "scores"),
    ),
    Mutation(
        "scores: squares are not squared",
        "kernels/attention_scores.py",
        "total += tl.sum(tl.exp2(2.0 * s), 1)",
        "total += tl.sum(tl.exp2(s), 1)",
        SCORES,
    ),
    Mutation(
        "scores: the mean over a group is a sum",
        "kernels/attention_scores.py",
        "result = result / GROUP",
        "result = result * 1.0",
        SCORES,
    ),
    Mutation(
        "scores: the nearest key counts one step too early",
        "kvops/eager/scores.py",
        "visible = visible._replace(right=-skip_recent)",
        "visible = visible._replace(right=1 - skip_recent)",
        SCORES_EAGER,
    ),
    Mutation(
        "scores: the first query that counts is missed",
        "kvops/eager/scores.py",
        "first_row = max(query_start, visible.first_row)",
        "first_row = max(query_start + 1, visible.first_row)",
        SCORES_EAGER,
    ),
    # Eviction
    Mutation(
        "eviction: one recent token fewer is protected",
        "kernels/select_blocks.py",
        "recent = (place > last - protect_last) & (protect_last > 0)",
        "recent = (place > last - protect_last + 1) & (protect_last > 0)",
        EVICTION,
    ),
    Mutation(
        "eviction: of equal scores the earlier slot is kept",
        "kvops/eager/eviction.py",
        "keys = preferences(x, slot + len(slot)",
        "keys = preferences(x, slot.flip(0) + len(slot)",
        EVICTION_EAGER,
    ),
    Mutation(
        "eviction: kept slots are moved past one place",
        "kernels/compact.py",
        "target = torch.where(kept, count - 1, -1).contiguous()",
        "target = torch.where(kept, count - 1, -1).roll(1, 2).contiguous()",
        EVICTION,
    ),
    # Verification of drafts
    Mutation(
        "drafts: a refused draft may be drawn again",
        "kvops/eager/verify.py",
        "weight[refused, draft[refused, at]] = 0.0",
        "weight[refused, draft[refused, at]] += 0.0",
        VERIFY_EAGER,
    ),
    Mutation(
        "drafts: the acceptance threshold ignores the drafter's probability",
        "kvops/eager/verify.py",
        "threshold = threshold * probs.gather(2, draft[..., None])[..., 0]",
        "threshold = threshold * 1.0",
        VERIFY_EAGER,
    ),
    Mutation(
        "drafts: the residual is not normalised",
        "kernels/verify_draft.py",
        "p = weight / total\n            if HAS_RATIO",
        "p = weight\n            if HAS_RATIO",
        VERIFY,
    ),
    Mutation(
        "drafts: the draft after the first refusal counts",
        "kernels/verify_draft.py",
        "refused = tl.min(tl.where(offered & accept, length, t), 0)",
        "refused = tl.min(tl.where(offered & accept, length, t + 1), 0)",
        VERIFY,
    ),
    # Rotary positions
    Mutation(
        "rotary: the angle turns backwards",
        "kvops/rotary.py",
        "first * cos - second * sin, second * cos + first * sin",
        "first * cos + second * sin, second * cos - first * sin",
        "tests/test_nn.py -k 'written_out and eager'",
    ),
]
