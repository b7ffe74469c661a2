"""Random problems of every operator, compiled for a random GPU with the configurations that a launch there would take.

No launch may need more shared memory than its GPU has, or spill more than ``SPILLS`` says. It compiles real kernels
(seconds a case) and so is no area of ``make fuzz``: ``make fuzz-compile MINUTES=60``, without a GPU. The tables of
``autotune/configs`` cover typical problems; this draws from all that operators accept.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

import torch

from fuzz.core import sweep, to_json
from kvops.autotune import lookup
from kvops.autotune.devices import KNOWN_DEVICES
from kvops.autotune.store import Store

# Spill instructions (stores and loads) of a kernel: in 16 bits with heads of at most 256, and of others. Typical
# problems spill nothing (``tests/test_feasible_problems.py``); known to spill are chunks in float32 with heads of 128
# (sm_86, 462 stores) and of 512 (179), and V wider than K beside a window and a tree (sm_120, 70).
SPILLS, SPILLS_OF_OTHERS = 80, 1024
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BYTES = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "int8": torch.int8}


@dataclass(frozen=True)
class Case:
    target: str = "sm_90"
    op: str = "paged_append"
    dtype: str = "bfloat16"
    k_cache: str = ""  # of BYTES; as the queries by default
    v_cache: str = ""  # as the K cache by default; only with one of BYTES
    head_dim: int = 64
    value_dim: int = 0  # 0: as head_dim
    group: int = 1
    tokens: int = 1
    keys: int = 1024
    block_size: int = 16
    causal: bool = False
    window: bool = False
    softcap: bool = False
    sinks: bool = False
    alibi: bool = False
    scores: bool = False
    tree: bool = False
    positions: bool = False
    uniform: bool = False
    invariant: bool = False


def draw(r: Random) -> Case:
    head_dim = r.choice((16, 32, 40, 64, 64, 80, 96, 128, 128, 128, 192, 256, 256, 512))
    return Case(
        target=r.choice(sorted({device.arch for device in KNOWN_DEVICES.values()})),
        op=r.choice(sorted(CALLS)),
        dtype=r.choice(("bfloat16", "bfloat16", "float16", "float32")),
        k_cache=r.choice(("", "", "", "", *BYTES)),
        v_cache=r.choice(("", "", "", *BYTES)),
        head_dim=head_dim,
        value_dim=r.choice((0, 0, 0, 64, 128)),
        group=r.choice((1, 2, 4, 8, 16)),
        tokens=r.choice((1, 1, 2, 5, 8, 16, 40, 64, 500)),
        keys=r.choice((100, 1024, 1024)),
        block_size=r.choice((1, 8, 16, 16, 16, 64)),
        **{
            name: r.random() < chance
            for name, chance in (
                *(("causal", 0.6), ("window", 0.3), ("softcap", 0.2), ("sinks", 0.2), ("alibi", 0.2)),
                *(("scores", 0.4), ("tree", 0.2), ("positions", 0.3), ("uniform", 0.2), ("invariant", 0.1)),
            )
        },
    )


def _empty(case: Case, *shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=DTYPES[case.dtype])


def _dense(case: Case) -> tuple[tuple[torch.Tensor, ...], dict]:
    heads, width = 2 * case.group, case.value_dim or case.head_dim
    q = _empty(case, 1, case.tokens, heads, case.head_dim)
    k, v = _empty(case, 1, case.keys, 2, case.head_dim), _empty(case, 1, case.keys, 2, width)
    options = {
        "causal": case.causal,
        "window_left": 100 if case.window else -1,
        "softcap": 30.0 if case.softcap else 0.0,
        "alibi_slopes": torch.empty(heads) if case.alibi else None,
    }
    return (q, k, v), options


def _sinks(case: Case) -> torch.Tensor | None:
    return torch.empty(2 * case.group) if case.sinks else None


def _lengths(case: Case) -> tuple:
    ends = torch.empty(2, dtype=torch.int32)
    return ends, ends, case.tokens, case.keys


def forward(case: Case) -> None:
    from kvops.kernels.flash_forward import flash_forward

    tensors, options = _dense(case)
    flash_forward(*tensors, **options, sinks=_sinks(case))


def forward_varlen(case: Case) -> None:
    from kvops.kernels.flash_forward import flash_forward_varlen

    tensors, options = _dense(case)
    flash_forward_varlen(*(tensor[0] for tensor in tensors), *_lengths(case), **options, sinks=_sinks(case))


def _results(case: Case, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    heads = 2 * case.group
    return _empty(case, 1, case.tokens, heads, v.shape[-1]), torch.empty(1, heads, case.tokens)


def backward(case: Case) -> None:
    from kvops.kernels.flash_backward_launch import flash_backward

    (q, k, v), options = _dense(case)
    out, lse = _results(case, v)
    flash_backward(out, q, k, v, out, lse, **options)


def backward_varlen(case: Case) -> None:
    from kvops.kernels.flash_backward_launch import flash_backward_varlen

    tensors, options = _dense(case)
    out, lse = _results(case, tensors[2])
    q, k, v = (tensor[0] for tensor in tensors)
    flash_backward_varlen(out[0], q, k, v, out[0], lse[0], *_lengths(case), **options)


def scores(case: Case) -> None:
    from kvops.kernels.attention_scores import attention_scores

    (q, k, v), options = _dense(case)
    attention_scores(q, k, _results(case, v)[1], **options)


def gluon_forward(case: Case) -> None:
    from kvops.kernels.gluon_flash_forward import gluon_flash_forward, launchable

    (q, k, v), options = _dense(case)
    if launchable(q, k, v, alibi_slopes=options["alibi_slopes"]) is None:
        gluon_flash_forward(q, k, v, **options, sinks=_sinks(case))


def gluon_backward(case: Case) -> None:
    from kvops.kernels.gluon_flash_backward import gluon_flash_backward, launchable

    (q, k, v), options = _dense(case)
    out, lse = _results(case, v)
    softcap, slopes = options["softcap"], options["alibi_slopes"]
    if launchable(out, q, k, v, softcap=softcap, alibi_slopes=slopes) is None:
        gluon_flash_backward(out, q, k, v, out, lse, **options)


def _cache(case: Case) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    k_dtype = BYTES.get(case.k_cache, DTYPES[case.dtype])
    dtypes = k_dtype, BYTES.get(case.v_cache, k_dtype) if case.k_cache else k_dtype
    shape = (64, case.block_size, 2) if case.uniform else (64, case.block_size)
    widths = case.head_dim, case.value_dim or case.head_dim
    caches = (torch.empty(*shape, width, dtype=dtype) for width, dtype in zip(widths, dtypes, strict=True))
    lists = (4,) if case.uniform else (4, 2)
    lens = torch.empty(lists, dtype=torch.int32)
    return (*caches, torch.empty(*lists, 16, dtype=torch.int32), lens), shape


def paged(case: Case) -> None:
    from kvops.kernels.paged_attention import paged_attention

    cache, shape = _cache(case)
    side = torch.empty(shape, dtype=torch.int32)
    options = {
        "causal": case.causal,
        "window_left": 100 if case.window else -1,
        "softcap": 30.0 if case.softcap else 0.0,
        "sinks": _sinks(case),
        "scores": torch.empty(shape) if case.scores else None,
        "batch_invariant": case.invariant,
        "positions": side if case.positions else None,
        "query_positions": torch.empty(4, case.tokens, dtype=torch.int32) if case.positions else None,
        "tree_mask": torch.empty(4, case.tokens, case.tokens, dtype=torch.bool) if case.tree else None,
    }
    paged_attention(_empty(case, 4, case.tokens, 2 * case.group, case.head_dim), *cache, **options)


def latents(case: Case) -> None:
    from kvops.kernels.paged_latent_attention import paged_latent_attention

    cache = replace(case, k_cache="", head_dim=case.head_dim + 64)
    (slots, _, *lists), _ = _cache(cache)
    q = _empty(case, 4, case.tokens, 2 * case.group, case.head_dim + 64)
    options = {"causal": case.causal, "softcap": 30.0 if case.softcap else 0.0}
    paged_latent_attention(q, slots, *lists, value_dim=case.head_dim, scale=0.1, **options)


def append(case: Case) -> None:
    from kvops.kernels.paged_append import paged_append

    cache, shape = _cache(case)
    k, v = (_empty(case, 4, case.tokens, 2, side.shape[-1]) for side in cache[:2])
    paged_append(k, v, *cache, scores=torch.empty(shape) if case.scores else None)


CALLS: dict[str, Callable[[Case], None]] = {
    **{"flash_attention": forward, "flash_attention_varlen": forward_varlen, "flash_attention_backward": backward},
    **{"flash_attention_varlen_backward": backward_varlen, "attention_scores": scores, "paged_attention": paged},
    **{
        "paged_latent_attention": latents,
        "paged_append": append,
        "gluon_forward": gluon_forward,
        "gluon_backward": gluon_backward,
    },
}


def refused(case: Case) -> bool:
    """Gradients of float32 heads above 256 take 128 KiB of shared memory: where there is less, they are refused."""
    from kvops.autotune.inspect import TARGETS

    widest = case.dtype == "float32" and max(case.head_dim, case.value_dim) > 256
    target = TARGETS[case.target]
    return widest and "backward" in case.op and target.backend == "cuda" and target.shared_memory < 131_072


def check(case: Case) -> None:
    from kvops.autotune.inspect import TARGETS, compile_only

    if refused(case):
        return
    with lookup.using(Store([])), compile_only(case.target) as launches:
        CALLS[case.op](case)
    small = case.dtype != "float32" and max(case.head_dim, case.value_dim) <= 256
    limit = SPILLS if small else SPILLS_OF_OTHERS
    for launch in launches:
        memory = TARGETS[case.target].shared_memory
        where = f"{launch.kernel} ({launch.num_warps} warps, {launch.num_stages} stages, {launch.constants})"
        assert launch.shared_memory <= memory, f"{where}: {launch.shared_memory} bytes of shared memory of {memory}"
        assert launch.spills <= limit, f"{where} has {launch.spills} spill instructions, at most {limit} are accepted"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz.compiling", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="of a run to repeat; another one every time by default")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # kernels are imported later, for GPUs
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    result = sweep(sys.modules[__name__], seed, seconds=60 * options.minutes, shrink_seconds=60)
    for failure in result.failures:
        print(f"\nFAILS: {failure.error}\ncase: {to_json(failure.case)}\n", flush=True)
    print(f"{result.cases} cases in {result.seconds:.0f} s, {len(result.failures)} kinds of failures")
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
