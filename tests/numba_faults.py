"""Planted faults of the CPU kernels that numba compiles."""

from faults import Mutation, named

PAGED_NUMBA = named("paged", "numba", "decoding_reads or drafts or windows or float8 or softcap or long_list")
APPEND_NUMBA = named("paged_operators", "numba", "append")
MERGE_NUMBA = named("merge", "numba", "whole or float64")
VERIFY_NUMBA = named("verify", "numba", "one_at_a_time or bad_row")
SCORES_NUMBA = named("scores", "numba", "reduction or queries_that_count or windows")
EVICTION_NUMBA = "tests/test_eviction.py tests/test_compaction.py -k numba"

NUMBA_FAULTS = [
    # Paged attention on the CPU, compiled by numba
    Mutation(
        "what was summed is not rescaled when the maximum rises",
        "kernels/cpu/paged_attention.py",
        "    if old != 1:",
        "    if False:",
        PAGED_NUMBA,
    ),
    Mutation(
        "drafts do not see themselves",
        "kernels/cpu/paged_items.py",
        "end = max(own + 1, 0) if causal else length",
        "end = max(own, 0) if causal else length",
        PAGED_NUMBA,
    ),
    Mutation(
        "the window is one slot too wide",
        "kernels/cpu/paged_items.py",
        "begin = max(own - window_left, 0)",
        "begin = max(own - window_left - 1, 0)",
        PAGED_NUMBA,
    ),
    Mutation(
        "the last slot of a piece is left out",
        "kernels/cpu/paged_items.py",
        "return max(first, begin), min(first + PIECE, end)",
        "return max(first, begin), min(first + PIECE - 1, end)",
        PAGED_NUMBA,
    ),
    Mutation(
        "pieces are joined without their weights",
        "kernels/cpu/paged_attention.py",
        "share_of_all = exp2(partial[largest_score] - largest)",
        "share_of_all = np.float32(1)",
        PAGED_NUMBA,
    ),
    Mutation(
        "the last four outputs of a share are left out",
        "kernels/cpu/linear.py",
        "len(x), rows, last - first, x",
        "len(x), rows, last - first - 4, x",
        named("cpu_kernels", "few_rows"),
    ),
    Mutation(
        "a gate below 0 lets everything through",
        "kernels/cpu/linear.py",
        "if gate >= 0 else decay",
        "if gate >= -np.inf else decay",
        named("cpu_kernels", "gate_of_a_feed"),
    ),
    Mutation(
        "a norm leaves out its weight",
        "kernels/cpu/linear.py",
        "x[r, d] * factor * weight[d]",
        "x[r, d] * factor",
        named("cpu_kernels", "norm_before"),
    ),
    Mutation(
        "numba: sums of probabilities are one long sum",
        "kernels/cpu/attention_scores.py",
        "scratch.part[j] = scratch.total[j] if call.reduce == MAX else 0",
        "scratch.part[j], scratch.total[j] = scratch.total[j], scratch.total[j] if call.reduce == MAX else 0",
        named("cpu_kernels", "long_sums"),
    ),
    Mutation(
        "numba: the gradient of a merged lse has the wrong sign",
        "kernels/cpu/merge_attention.py",
        "dlse * weight_b - change if",
        "dlse * weight_b + change if",
        named("merge", "numba", "gradient"),
    ),
    Mutation(
        "the bias of a float8 exponent is 6",
        "kernels/cpu/vector.py",
        "[2.0**120] * LANES",
        "[2.0**121] * LANES",
        PAGED_NUMBA,
    ),
    Mutation(
        "probabilities are not normalised",
        "kernels/cpu/paged_attention.py",
        "p = exp2(s[r, j] - lse)",
        "p = exp2(s[r, j])",
        PAGED_NUMBA,
    ),
    # The other operators on the CPU, compiled by numba
    Mutation(
        "numba: tokens are appended one slot too early",
        "kernels/cpu/paged_append.py",
        "slot = call.lens[sequence, h] - count + t\n",
        "slot = call.lens[sequence, h] - count + t - 1\n",
        APPEND_NUMBA,
    ),
    Mutation(
        "numba: packed tokens have the places of padded ones",
        "kernels/cpu/paged_append.py",
        "t = n - np.int64(call.starts[sequence])",
        "t = n",
        "tests/test_paged_packed.py -k 'numba and packed_tokens_go'",
    ),
    Mutation(
        "a packed sequence is as tall as the longest",
        "kernels/cpu/paged_items.py",
        "return 0, first, np.int64(call.starts[b + 1]) - first",
        "return 0, first, call.tokens",
        "tests/test_paged_packed.py -k 'numba and two_calls'",
    ),
    Mutation(
        "the token before the last ones scores, too",
        "kernels/cpu/paged_attention.py",
        "(tokens - call.last) * group - first_row",
        "(tokens - call.last - 1) * group - first_row",
        "tests/test_paged_packed.py -k 'numba and last_tokens'",
    ),
    Mutation(
        "numba: new slots keep the scores of those that were there before",
        "kernels/cpu/paged_append.py",
        "call.scores[block, offset, h] = 0",
        "call.scores[block, offset, h] += 0",
        APPEND_NUMBA,
    ),
    Mutation(
        "numba: halves of float8 are rounded up, not to even",
        "kernels/cpu/elements.py",
        "odd = (magnitude >> np.uint32(20)) & np.uint32(1)",
        "odd = np.uint32(1)",
        APPEND_NUMBA,
    ),
    Mutation(
        "numba: of equal blocks that of the last head is kept",
        "kernels/cpu/select_blocks.py",
        "for h in range(H - 1, -1, -1):",
        "for h in range(H):",
        EVICTION_NUMBA,
    ),
    Mutation(
        "numba: a head gets a block more than the budget has",
        "kernels/cpu/select_blocks.py",
        "if left > 0 and",
        "if left >= 0 and",
        EVICTION_NUMBA,
    ),
    Mutation(
        "numba: NaN is the best score",
        "kernels/cpu/select_blocks.py",
        "        return _NAN\n",
        "        return _PROTECTED\n",
        EVICTION_NUMBA,
    ),
    Mutation(
        "numba: a slot that moves by one stays where it is",
        "kernels/cpu/compact.py",
        "if slot != kept:",
        "if slot > kept + 1:",
        EVICTION_NUMBA,
    ),
    Mutation(
        "numba: the first block is never written",
        "kernels/cpu/copy_blocks.py",
        "if call.target[i] >= 0:",
        "if call.target[i] > 2:",
        named("blocks", "numba"),
    ),
    Mutation(
        "numba: the second part is weighted as the first",
        "kernels/cpu/merge_attention.py",
        "b = fma(weight_b, load(address_b + byte), zero())",
        "b = fma(weight_a, load(address_b + byte), zero())",
        MERGE_NUMBA,
    ),
    Mutation(
        "numba: bfloat16 is cut off instead of rounded",
        "kernels/cpu/vector.py",
        "builder.add(odd, _every(0x7FFF))",
        "builder.and_(odd, _every(0))",
        named("merge", "numba", "rounded"),
    ),
    Mutation(
        "numba: a later match that the draft does not fit behind wins",
        "kernels/cpu/prompt_lookup.py",
        "start + num_draft <= length",
        "start + num_draft <= length + 1",
        named("prompt_lookup", "numba", "small_texts"),
    ),
    Mutation(
        "numba: the last round of Philox is missing",
        "kernels/cpu/verification.py",
        "for _ in range(10):",
        "for _ in range(9):",
        VERIFY_NUMBA,
    ),
    Mutation(
        "numba: a refused draft can be drawn again",
        "kernels/cpu/verify_draft.py",
        "row[call.drafts[b, accepted]] = 0",
        "row[call.drafts[b, accepted]] *= 1",
        VERIFY_NUMBA,
    ),
    Mutation(
        "numba: every key but one behind the query counts",
        "kernels/cpu/attention_scores.py",
        "min(keys, place + call.right + 1)",
        "min(keys, place + call.right)",
        SCORES_NUMBA,
    ),
    Mutation(
        "numba: squares of probabilities are not squared",
        "kernels/cpu/attention_scores.py",
        "total[j] += p * p",
        "total[j] += p",
        SCORES_NUMBA,
    ),
    Mutation(
        "numba: the mean over a group is its sum",
        "kernels/cpu/attention_scores.py",
        "out[j] /= np.float32(members)",
        "out[j] /= np.float32(1)",
        SCORES_NUMBA,
    ),
]
