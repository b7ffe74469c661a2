"""Small calls of every kernel family that run on the machine for PTX, and what they should give: eager's results.

Called as a script in a process of its own, for the kernels must not have been imported for the interpreter::

    python tests/machine_cases.py --target sm_90 --only gluon --json rows.json

Each case calls launch functions of ``kvops.kernels`` on CPU tensors. Together they launch every kernel.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from machine_call import CASES, Call, case, identity, names_for, sites
from paged_lists import make_lists, quantise_by_slot

import kvops  # noqa: F401 - registers the operators
from kvops.autotune.machine import Machine, Options, on_machine

OPS = torch.ops.kvops


# --- dense attention ---


def _dense(dtype=torch.float16, head_dim=64, length=96, heads=2):
    q = torch.randn(1, length, heads, head_dim).to(dtype)
    k, v = torch.randn(2, 1, length, 1, head_dim).to(dtype)
    return q, k, v


@case
def flash_forward_causal():
    from kvops.kernels.flash_forward import flash_forward

    return Call(flash_forward, OPS.flash_attention, _dense(length=200), {"causal": True}, 4e-3)


@case
def flash_forward_everything():
    from kvops.kernels.flash_forward import flash_forward

    options = {"causal": True, "window_left": 50, "softcap": 20.0, "sinks": torch.randn(2).bfloat16()}
    return Call(flash_forward, OPS.flash_attention, _dense(torch.bfloat16, 128, 130), options, 3e-2)


@case
def flash_forward_float32():
    from kvops.kernels.flash_forward import flash_forward

    return Call(flash_forward, OPS.flash_attention, _dense(torch.float32, 40, 70), {"causal": True}, 1e-4)


@case
def flash_forward_packed():
    from kvops.kernels.flash_forward import flash_forward_varlen

    q, k, v = (tensor[0] for tensor in _dense())
    ends = torch.tensor([0, 33, 33, 96], dtype=torch.int32)
    args = q, k, v, ends, ends, 63, 63
    return Call(flash_forward_varlen, OPS.flash_attention_varlen, args, {"causal": True}, 4e-3)


def _backward_arguments(dtype=torch.float16, head_dim=64, length=96, **options):
    q, k, v = _dense(dtype, head_dim, length)
    out, lse = OPS.flash_attention(q, k, v, **options)
    return torch.randn_like(out), q, k, v, out, lse


@case
def flash_backward_causal():
    from kvops.kernels.flash_backward_launch import flash_backward

    args = _backward_arguments(causal=True)
    return Call(flash_backward, OPS.flash_attention_backward, args, {"causal": True}, 3e-2)


@case
def flash_backward_window():
    from kvops.kernels.flash_backward_launch import flash_backward

    options = {"causal": True, "window_left": 30}
    args = _backward_arguments(torch.bfloat16, 64, 80, **options)
    return Call(flash_backward, OPS.flash_attention_backward, args, options, 0.2)


@case
def flash_backward_bias():
    """A bias of one row of queries: its gradient is a sum over them."""
    from kvops.kernels.flash_backward_bias import flash_bias_backward

    bias = torch.randn(1, 2, 1, 70).half()
    args = *_backward_arguments(length=70, causal=True, bias=bias), bias
    return Call(flash_bias_backward, OPS.flash_attention_bias_backward, args, {"causal": True}, 3e-2)


@case
def flash_backward_packed_bias():
    """Both sequences have a matrix of their own, and there are tokens behind them."""
    from kvops.kernels.flash_backward_bias import flash_bias_backward_varlen

    dout, q, k, v, out, _ = (x[0] for x in _backward_arguments(length=80))
    ends, bias = torch.tensor([0, 33, 33, 70], dtype=torch.int32), torch.randn(2, 80, 40).half()
    out, lse = OPS.flash_attention_varlen(q, k, v, ends, ends, 40, 40, bias=bias)
    args = dout, q, k, v, out, lse, bias, ends, ends, 40, 40
    return Call(flash_bias_backward_varlen, OPS.flash_attention_varlen_bias_backward, args, {}, 3e-2)


DROPOUT = {"dropout_p": 0.3, "dropout_seed": torch.tensor([-(2**40) + 5])}


@case
def flash_forward_dropout():
    from kvops.kernels.flash_forward import flash_forward

    return Call(flash_forward, OPS.flash_attention, _dense(), {"causal": True, **DROPOUT}, 4e-3)


@case
def flash_backward_dropout():
    from kvops.kernels.flash_backward_launch import flash_backward

    options = {"causal": True, **DROPOUT}
    args = _backward_arguments(length=80, **options)
    return Call(flash_backward, OPS.flash_attention_backward, args, options, 3e-2)


@case
def flash_backward_bias_dropout():
    from kvops.kernels.flash_backward_bias import flash_bias_backward

    bias = torch.randn(2, 70, 70).half()
    args = *_backward_arguments(length=70, causal=True, bias=bias, **DROPOUT), bias
    options = {"causal": True, **DROPOUT}
    return Call(flash_bias_backward, OPS.flash_attention_bias_backward, args, options, 3e-2)


@case
def flash_delta_of_narrow_rows():
    """A row has one number for each of several threads, which all store its sum."""
    from kvops.kernels.flash_backward import prepare

    def delta(dout, q, k, v, out, lse):
        made = prepare(dout, q, k, v, out, lse, None, None, 1, 40, 40, False, -1, -1, None, 0.0, None, None)
        return made.delta.clone()

    def expected(dout, q, k, v, out, lse):
        return (out * dout).sum(-1).transpose(1, 2)

    return Call(delta, expected, _backward_arguments(torch.float32, 24, 40), {}, 1e-5)


@case
def attention_scores_causal():
    from kvops.kernels.attention_scores import attention_scores

    q, k, v = _dense()
    lse = OPS.flash_attention(q, k, v, causal=True)[1]
    return Call(attention_scores, OPS.attention_scores, (q, k, lse), {"causal": True}, 2e-2)


@case
def merge():
    from kvops.kernels.merge_attention import merge_attention

    q, k, v = _dense()
    out, lse = OPS.flash_attention(q, k, v)
    args = out, lse, out.flip(1).contiguous(), lse + 1
    return Call(merge_attention, OPS.merge_attention, args, {}, 2e-3)


@case
def merge_backward():
    from kvops.kernels.merge_attention import merge_attention_backward

    q, k, v = _dense()
    out, lse = OPS.flash_attention(q, k, v)
    args = torch.randn_like(out), out, lse, out.flip(1).contiguous(), lse + 1
    options = {"dlse": torch.randn_like(lse)}
    return Call(merge_attention_backward, OPS.merge_attention_backward, args, options, 2e-2)


# --- paged attention and the cache ---

RAGGED = [[300, 40], [129, 0], [17, 260]]


def _lists(lengths=RAGGED, head_dim=64, dtype=torch.float16):
    return make_lists(lengths, block_size=16, head_dim=head_dim, dtype=dtype)


@case
def paged_schedule():
    from kvops.kernels.paged_schedule import paged_schedule as launch

    return Call(launch, OPS.paged_schedule, (_lists().seq_lens, 16), {"num_programs": 8})


def _decode(lists, q, tolerance=3e-3, **options):
    from kvops.kernels.paged_attention import paged_attention as launch

    return Call(launch, OPS.paged_attention, (q, *lists.arguments), options, tolerance)


@case
def paged_decode():
    return _decode(_lists(), torch.randn(3, 1, 4, 64).half())


@case
def paged_decode_invariant():
    return _decode(_lists(), torch.randn(3, 1, 4, 64).half(), batch_invariant=True)


@case
def paged_decode_everything():
    lists = _lists([[150, 40], [129, 0]], 128, torch.bfloat16)
    options = {
        "positions": lists.positions,
        "query_positions": torch.full((2, 1), 700, dtype=torch.int32),
        "window_left": 400,
        "scores": lists.scores,
        "softcap": 30.0,
        "sinks": torch.randn(8),
    }
    return _decode(lists, torch.randn(2, 1, 8, 128).bfloat16(), 3e-2, **options)


@case
def paged_decode_slot_scales():
    lists = _lists()
    sides, options = [], {}
    for name, side, dtype in (("k", lists.k_cache, torch.int8), ("v", lists.v_cache, torch.float8_e5m2)):
        stored, scale = quantise_by_slot(side.float(), dtype)
        sides.append(stored)
        options[f"{name}_slot_scale"] = scale.masked_fill(side.isnan().any(-1), math.nan)
    lists = replace(lists, k_cache=sides[0], v_cache=sides[1])
    return _decode(lists, torch.randn(3, 1, 4, 64).half(), scores=lists.scores, **options)


@case
def paged_decode_float32():
    return _decode(_lists([[50, 40]], 64, torch.float32), torch.randn(1, 1, 4, 64), 1e-4)


@case
def paged_drafts_tree():
    tree = torch.tril(torch.rand(5, 5) < 0.7) | torch.eye(5, dtype=torch.bool)
    lists = _lists([[300, 40], [129, 7]])
    return _decode(lists, torch.randn(2, 5, 4, 64).half(), tree_mask=tree)


@case
def paged_chunk_scores():
    lists = _lists([[150, 90]])
    return _decode(lists, torch.randn(1, 80, 4, 64).half(), 1e-2, scores=lists.scores, score_reduce="sumsq")


@case
def paged_packed():
    """Tokens of three sequences one behind the other, of one which has none."""
    ends = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    return _decode(_lists(), torch.randn(8, 4, 64).half(), cu_seqlens_q=ends, max_seqlen_q=5)


@case
def paged_append():
    from kvops.kernels.paged_append import paged_append as launch

    lists = _lists([[300, 40], [129, 8], [17, 260]])
    new = torch.randn(3, 8, 2, 64).half()
    options = {
        "positions": lists.positions,
        "token_positions": torch.arange(24, dtype=torch.int32).reshape(3, 8),
        "scores": lists.scores,
    }
    return Call(launch, OPS.paged_append, (new, new + 1, *lists.arguments), options)


@case
def paged_append_float8():
    from kvops.kernels.paged_append import paged_append as launch

    lists = _lists([[300, 40], [129, 8], [17, 260]])
    new = torch.randn(3, 8, 2, 64).half()
    cache = torch.zeros(lists.k_cache.shape, dtype=torch.float8_e4m3fn)
    options = {"k_scale": torch.rand(2) + 0.5, "v_scale": torch.rand(2) + 0.5}
    return Call(launch, OPS.paged_append, (new, new + 1, cache, cache.clone(), *lists.arguments[2:]), options)


@case
def paged_append_slot_scales():
    from kvops.kernels.paged_append import paged_append as launch

    lists = _lists([[300, 40], [129, 8], [17, 260]])
    new = torch.randn(3, 8, 2, 64).half()
    caches = [torch.zeros(lists.k_cache.shape).to(dtype) for dtype in (torch.int8, torch.float8_e5m2)]
    options = {name: torch.zeros_like(lists.scores) for name in ("k_slot_scale", "v_slot_scale")}
    return Call(launch, OPS.paged_append, (new, new + 1, *caches, *lists.arguments[2:]), options)


def _eviction():
    tables = torch.randperm(60).reshape(2, 3, 10).int()
    lens = torch.tensor([[150, 37, 3], [0, 160, 80]], dtype=torch.int32)
    return torch.rand(60, 16), torch.arange(960, dtype=torch.int32).reshape(60, 16), tables, lens


def _select(scope, **options):
    from kvops.kernels.select_blocks import select_blocks as launch

    scores, positions, tables, lens = _eviction()
    budget = torch.tensor([6, 9], dtype=torch.int32)
    options = {"scope": scope, **({"positions": positions} if scope == "sequence" else {}), **options}
    return Call(launch, OPS.select_blocks, (scores, tables, lens, budget), options)


@case
def select_blocks_of_heads():
    return _select("head")


@case
def select_blocks_of_sequences():
    return _select("sequence", protect_first=4, protect_last=32, min_per_head=16)


def _compact(dtype, head_dim):
    from kvops.kernels.compact import compact as launch

    scores, positions, tables, lens = _eviction()
    k, v = torch.randn(2, 60, 16, head_dim).to(dtype)
    keep = torch.rand(2, 3, 160) < 0.6

    def kept(function: Callable[..., Any]) -> Callable[..., Any]:
        """What lies beyond the new lengths is not promised."""

        def call(k, v, tables, lens, keep, **options):
            freed = function(k, v, tables, lens, keep, **options)
            used = torch.arange(160) < lens[..., None]
            slots = (tables.long()[..., None] * 16 + torch.arange(16)).flatten(-2)[used]
            sides = k, v, options["positions"], options["scores"]
            found = [side.flatten(0, 1)[slots].double() for side in sides]
            for side in sides:
                side.zero_()
            return freed, lens.clone(), *found

        return call

    options = {"positions": positions, "scores": scores}
    return Call(kept(launch), kept(OPS.compact), (k, v, tables, lens, keep), options)


@case
def compact_bfloat16():
    return _compact(torch.bfloat16, 128)


@case
def compact_float32():
    return _compact(torch.float32, 80)


@case
def copy_blocks():
    from kvops.kernels.copy_blocks import copy_blocks as launch

    scores, positions, _, _ = _eviction()
    k, v = torch.randn(2, 60, 16, 128).bfloat16()
    source = torch.tensor([1, 5, 7, 9], dtype=torch.int32)
    target = torch.tensor([2, -1, 40, 41], dtype=torch.int32)
    options = {"positions": positions, "scores": scores}
    return Call(launch, OPS.copy_blocks, (k, v, source, target), options)


@case
def gluon_forward_causal():
    from kvops.kernels.gluon_flash_forward import gluon_flash_forward

    return Call(gluon_flash_forward, OPS.flash_attention, _dense(length=200), {"causal": True}, 4e-3)


@case
def gluon_forward_more_keys_than_stages():
    """Shared memory is used a second time: only then must the consumers release it."""
    from kvops.kernels.gluon_flash_forward import gluon_flash_forward

    q, k, v = torch.randn(1, 100, 1, 64).half(), *torch.randn(2, 1, 640, 1, 64).half()
    return Call(gluon_flash_forward, OPS.flash_attention, (q, k, v), {}, 4e-3)


@case
def gluon_forward_window():
    from kvops.kernels.gluon_flash_forward import gluon_flash_forward

    options = {"causal": True, "window_left": 100, "softcap": 20.0}
    return Call(gluon_flash_forward, OPS.flash_attention, _dense(torch.bfloat16, 128, 200), options, 3e-2)


@case
def gluon_forward_packed():
    from kvops.kernels.gluon_flash_forward import gluon_flash_forward_varlen

    q, k, v = (tensor[0] for tensor in _dense(length=200))
    ends = torch.tensor([0, 70, 70, 200], dtype=torch.int32)
    args = q, k, v, ends, ends, 130, 130
    return Call(gluon_flash_forward_varlen, OPS.flash_attention_varlen, args, {"causal": True}, 4e-3)


@case
def gluon_backward_causal():
    from kvops.kernels.gluon_flash_backward import gluon_flash_backward

    args = _backward_arguments(length=160, causal=True)
    return Call(gluon_flash_backward, OPS.flash_attention_backward, args, {"causal": True}, 3e-2)


import machine_drafts  # noqa: E402, F401
import machine_latents  # noqa: E402, F401 - behind these: a kernel's rows are of the first case that launches it


def run(name: str, target: str, options: Options, **context: Any) -> tuple[Machine, str]:
    """The launches of a case, and what went wrong beside faults ("" where the results are right)."""
    os.environ["KVOPS_CPU"] = "eager"
    torch.manual_seed(0)
    call = CASES[name]()
    with on_machine(target, options=options, **context) as machine:
        try:
            call.run()
        except AssertionError as error:
            return machine, str(error)
        except Exception:
            return machine, traceback.format_exc()
    return machine, ""


def row(name: str, target: str, seed: int, lockstep: str = "") -> dict[str, Any]:
    start = time.perf_counter()
    machine, error = run(name, target, Options(seed=seed, lockstep=lockstep))
    first = {execution.kernel: execution for execution in reversed(machine.executions)}
    return {
        "case": name,
        "target": target,
        "seed": seed,
        "error": error,
        "kernels": sorted(first),
        "code": {name: identity(execution) for name, execution in first.items()},
        "synchronisation": {name: [f"{s['line']} {s['instruction']}" for s in sites(e)] for name, e in first.items()},
        "faults": [f"{execution}: {fault}" for execution in machine.executions for fault in execution.faults],
        "benign": sorted({str(f) for execution in machine.executions for f in execution.found.values() if f.benign}),
        "instructions": sum(execution.instructions for execution in machine.executions),
        "seconds": round(time.perf_counter() - start, 2),
        "run_seconds": round(sum(execution.seconds for execution in machine.executions), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="sm_80")
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--skip", default="", help="beginnings of cases' names, by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lockstep", default="", help="warp, warpgroup or program")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in names_for(arguments.target, arguments.only, arguments.skip.split(",") if arguments.skip else ()):
        rows.append(told := row(name, arguments.target, arguments.seed, arguments.lockstep))
        state = "WRONG" if told["error"] or told["faults"] else "right"
        print(f"{told['target']} {name}: {state}, {told['seconds']} s, {told['run_seconds']} s of it on the machine")
        for line in filter(None, [told["error"][-1500:], *told["faults"]]):
            print("   ", line)
        sys.stdout.flush()
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
