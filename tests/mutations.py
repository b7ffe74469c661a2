"""Planted faults, and the tests that must notice each of them: ``make mutations``.

A tolerance is worth what it catches. Each fault is one small change of a kernel or of the eager code, of a kind that
numbers show and shapes do not. ``python tests/mutations.py`` copies the tree, plants one after the other and runs the
tests that are named with it: they must fail. ``tests/test_mutations.py`` holds the list to the sources.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent


class Mutation(NamedTuple):
    """``old``, which the file has once, becomes ``new``: then ``tests``, arguments for pytest, must fail."""

    fault: str
    file: str
    old: str
    new: str
    tests: str


def _named(file: str, *words: str) -> str:
    """The tests of ``file`` whose names have all of the words."""
    return f"tests/test_{file}.py -k '{' and '.join(words)}'"


DENSE = _named("attention", "agrees", "triton", "float32")
DENSE_EAGER = _named("attention", "agrees or joins", "not triton")
GRADIENT = _named("attention_backward", "agrees", "triton", "float32")
GRADIENT_EAGER = _named("attention_backward", "agrees or lse", "eager")
PAGED = _named("paged", "triton", "decoding_reads or drafts or windows or float8 or softcap")
PAGED_EAGER = "tests/test_paged.py tests/test_paged_eager.py -k 'eager and not triton'"
PAGED_NUMBA = _named("paged", "numba", "decoding_reads or drafts or windows or float8 or softcap or long_list")
APPEND_NUMBA = _named("paged_operators", "numba", "append")
SCORES = _named("scores", "triton", "reduction or queries_that_count or windows")
SCORES_EAGER = _named("scores", "eager", "reduction or queries_that_count or windows")
MERGE = _named("merge", "triton", "whole or float64")
MERGE_EAGER = _named("merge", "eager", "whole or float64")
VERIFY = "tests/test_verify.py tests/test_verify_distribution.py -k 'triton'"
VERIFY_EAGER = "tests/test_verify.py tests/test_verify_distribution.py -k 'not triton'"
EVICTION_NUMBA = _named("eviction", "numba")
EVICTION = _named("eviction", "triton")
EVICTION_EAGER = _named("eviction", "eager")

MUTATIONS = [
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
        _named("attention", "agrees", "triton", "float32 or float16"),
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
        _named("attention", "agrees", "triton", "nine"),
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
        _named("attention", "agrees", "triton", "softcap or everything"),
    ),
    Mutation(
        "ALiBi is signed on both sides",
        "kernels/primitives.py",
        "tl.abs(distance).to(tl.float32)",
        "distance.to(tl.float32)",
        _named("attention", "agrees", "triton", "alibi"),
    ),
    Mutation(
        "the sink's weight starts at 0",
        "kernels/flash_forward.py",
        "l = tl.full([BLOCK_M], 1.0, tl.float32)",
        "l = tl.zeros([BLOCK_M], tl.float32)",
        _named("attention", "agrees", "triton", "sinks or everything"),
    ),
    Mutation(
        "eager: a window is one key short",
        "kvops/eager/attention.py",
        "low = 0 if self.left is None else max(0, start + self.offset - self.left)",
        "low = 0 if self.left is None else max(0, start + self.offset - self.left + 1)",
        DENSE_EAGER,
    ),
    Mutation(
        "eager: tiles are joined without the weight of the first",
        "kvops/eager/attention.py",
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
    # Packed sequences
    Mutation(
        "packed: lse of the wrong rows",
        "kvops/eager/varlen.py",
        "lse[None, :, rows],\n            dlse",
        "lse[None, :, rows].flip(2),\n            dlse",
        _named("varlen", "backward_agrees", "eager", "dtype0"),
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
        "paged: the accumulator is not rescaled when the maximum rises",
        "kernels/paged_attention.py",
        "acc = dot(p.to(v.dtype), v, acc * rescale[:, None])",
        "acc = dot(p.to(v.dtype), v, acc)",
        PAGED,
    ),
    Mutation(
        "paged: partial results are joined without their maxima",
        "kernels/paged_attention.py",
        "weight = tl.exp2(part_m - shift)",
        "weight = tl.exp2(part_m - part_m)",
        _named("paged", "triton", "long or schedule or split"),
    ),
    Mutation(
        "paged: the last slot of each list is not read",
        "kernels/paged_attention.py",
        "            inside = slots < stop\n            block, offset = page_address",
        "            inside = slots < stop - 1\n            block, offset = page_address",
        PAGED,
    ),
    Mutation(
        "paged: a window one slot short",
        "kernels/paged_tiles.py",
        "oldest = query_slot - window_left",
        "oldest = query_slot - window_left + 1",
        PAGED,
    ),
    Mutation(
        "paged: drafts see the token behind them",
        "kernels/paged_tiles.py",
        "limit = tl.minimum(limit, query_slot + 1)",
        "limit = tl.minimum(limit, query_slot + 2)",
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
        "paged: appended tokens go one slot too early",
        "kernels/paged_append.py",
        "stride_lh) - count + tokens",
        "stride_lh) - count + tokens - 1",
        "tests/test_paged_operators.py -k triton",
    ),
    # Scores
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
        "window = window._replace(right=-skip_recent)",
        "window = window._replace(right=1 - skip_recent)",
        SCORES_EAGER,
    ),
    Mutation(
        "scores: the first query that counts is missed",
        "kvops/eager/scores.py",
        "first_row = max(query_start, window.first_row)",
        "first_row = max(query_start + 1, window.first_row)",
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
        "slot = torch.arange(slots)  # of equals the later one",
        "slot = torch.arange(slots).flip(0)  # of equals the later one",
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
        "kernels/cpu/paged_attention.py",
        "end = max(own + 1, 0) if causal else length",
        "end = max(own, 0) if causal else length",
        PAGED_NUMBA,
    ),
    Mutation(
        "the window is one slot too wide",
        "kernels/cpu/paged_attention.py",
        "begin = max(own - window_left, 0)",
        "begin = max(own - window_left - 1, 0)",
        PAGED_NUMBA,
    ),
    Mutation(
        "the last slot of a piece is left out",
        "kernels/cpu/paged_attention.py",
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
        "slot = call.lens[b, h] - count + t\n",
        "slot = call.lens[b, h] - count + t - 1\n",
        APPEND_NUMBA,
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
        _named("blocks", "numba"),
    ),
]


def copied(target: pathlib.Path) -> None:
    """The files of the working tree that git knows or would take up, and what stands in the place of links."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, place = ROOT / name, target / name
        if source.is_symlink() or source.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, place, follow_symlinks=False)


def killed(mutation: Mutation, tree: pathlib.Path) -> bool:
    """Whether the tests named with it fail. Any other exit, as where no test is selected, is an error."""
    file = tree / mutation.file
    source = file.read_text()
    file.write_text(source.replace(mutation.old, mutation.new))
    try:
        environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        command = f"exec {sys.executable} -m pytest -q -x -p no:cacheprovider --no-header {mutation.tests}"
        run = subprocess.run(command, shell=True, cwd=tree, env=environment, capture_output=True, text=True)
    finally:
        file.write_text(source)
    if run.returncode not in (0, 1):
        output = run.stdout[-2000:] + run.stderr[-2000:]
        raise SystemExit(f"{mutation.fault}: pytest ended with {run.returncode}\n{output}")
    return run.returncode == 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Plant faults and see that the tests named with them fail.")
    parser.add_argument("words", nargs="*", help="only faults whose description or file has one of these words")
    words = parser.parse_args().words
    chosen = [m for m in MUTATIONS if not words or any(word in m.fault or word in m.file for word in words)]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder) / "kvops"
        copied(tree)
        for mutation in chosen:
            start = time.perf_counter()
            dead = killed(mutation, tree)
            fate = f"{'killed' if dead else 'SURVIVES'} in {time.perf_counter() - start:.0f} s"
            print(f"{fate}: {mutation.fault} ({mutation.file})", flush=True)
            if not dead:
                survivors.append(mutation)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults are noticed")
    if survivors:
        raise SystemExit("Not noticed: " + "; ".join(m.fault for m in survivors))


if __name__ == "__main__":
    main()
