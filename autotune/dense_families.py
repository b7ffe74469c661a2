"""Kernel families of dense attention: forward, the two backward kernels, and attention scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from kvops.autotune.architectures import has_tma
from kvops.autotune.config import (
    CAUSAL,
    FULL,
    WINDOW,
    AttentionConfig,
    attention_scores_config,
    flash_backward_keys_config,
    flash_backward_queries_config,
    flash_forward_config,
)
from kvops.autotune.devices import DeviceFacts
from kvops.autotune.family_parts import all_fields_but, refuse_launch, refuse_shared, roofline_bound
from kvops.autotune.spec import OpSpec, Problem

DENSE_KEY = ("width", "itemsize", "mask")
DENSE_SIZES = ("heads", "seqlen_q", "seqlen_k")
_Tiles = dict[int, tuple[tuple[int, int, int, int], ...]]
_FORWARD_TILES: _Tiles = {  # (block_m, block_n, warps, stages)
    64: ((128, 128, 8, 2), (128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
    128: ((128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 3)),
    256: ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (128, 32, 8, 2)),
}
_KEYS_TILES: _Tiles = {
    64: ((64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 4, 2), (32, 64, 8, 1)),
    128: ((32, 128, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1), (32, 64, 8, 2)),
    256: ((32, 32, 8, 1), (32, 64, 8, 1), (16, 32, 8, 1)),
}
_QUERIES_TILES: _Tiles = {
    64: ((128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 4, 2), (64, 32, 8, 1)),
    128: ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1), (128, 64, 8, 3)),
    256: ((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1)),
}
_SCORES_TILES: _Tiles = {
    64: ((64, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 2)),
    128: ((64, 128, 8, 2), (64, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3)),
    256: ((64, 64, 8, 1), (64, 64, 8, 2), (32, 64, 8, 2)),
}
# In float32 a product is an unrolled sum of ordinary multiplications: larger tiles spill and take minutes to compile.
_FLOAT32_TILES = ((16, 32, 8, 1), (16, 16, 4, 1))
# A window bounds the number of keys, so two tiles are enough.
_WINDOW_TILES = 2
# For fewer queries than a tile has rows, and for heads wider than 256.
_NARROW_TILES = ((64, 16, 4, 1), (32, 64, 4, 2), (16, 128, 4, 2), (16, 64, 4, 2), (16, 32, 4, 1), (16, 16, 8, 1))


def _refuse_dense(
    config: AttentionConfig, problem: Problem, device: DeviceFacts, *, walks_keys: bool, gradient: bool
) -> str | None:
    """One tile stays in shared memory; the tiles of the loop are buffered ``num_stages - 1`` times."""
    reason = refuse_launch(config, device, "block_m", "block_n")
    if reason is not None:
        return reason
    if min(config.block_m, config.block_n) < 16:
        return f"needs tiles of at least 16 x 16, it has {config.block_m} x {config.block_n}"
    stays, moves = (config.block_m, config.block_n) if walks_keys else (config.block_n, config.block_m)
    row = problem["width"] * problem["itemsize"]
    # A thread has at most 255 registers of 32 bits for its share of the accumulators.
    if stays * problem["width"] > 200 * 32 * config.num_warps * (1 if device.nvidia else 4):
        return f"needs more registers than {config.num_warps} warps have for {stays} x {problem['width']} sums"
    needed = stays * row + 2 * max(config.num_stages - 1, 0) * moves * row
    if gradient and problem["itemsize"] == 4 and device.nvidia:
        # Ordinary multiplications read both operands from shared memory: tiles of q, dout, k and v.
        needed = max(needed, 2 * (stays + moves) * row)
    return refuse_shared(needed, device)


def dense_bound(products: int, problem: Problem, device: DeviceFacts) -> str:
    """The limit of a kernel with this number of matrix products per pair of query and key."""
    pairs = problem["heads"] * problem["seqlen_q"] * problem["seqlen_k"] / (2 if problem["mask"] == CAUSAL else 1)
    moved = problem["heads"] * (problem["seqlen_q"] + problem["seqlen_k"]) * 2 * problem["width"] * problem["itemsize"]
    return roofline_bound(2 * products * pairs * problem["width"], moved, device)


def _why_dense(products: int, problem: Problem, device: DeviceFacts, config: AttentionConfig) -> str:
    bound = dense_bound(products, problem, device)
    if problem["itemsize"] == 4:
        return f"{bound}; float32 products use ordinary registers, which limit the tile"
    return f"{bound}; the largest tile that compiled without spills, {config.block_m} x {config.block_n}"


def _dense_space(tiles: _Tiles, descriptors: bool, problem: Problem, device: DeviceFacts) -> Iterable[AttentionConfig]:
    if problem["itemsize"] == 4 or problem["width"] > 256:
        chosen: Sequence[tuple[int, int, int, int]] = _FLOAT32_TILES if problem["itemsize"] == 4 else _NARROW_TILES
    else:
        chosen = tiles[max(64, problem["width"])]
        if problem["mask"] == WINDOW:
            chosen = chosen[:_WINDOW_TILES]
        if problem["seqlen_q"] < 64:
            chosen = [*_NARROW_TILES, *chosen]
    for block_m, block_n, warps, stages in chosen:
        # On AMD the tile in flight is in registers, not in shared memory: one stage less does the same.
        config = AttentionConfig(block_m, block_n, warps, stages if device.nvidia else max(1, stages - 1))
        yield replace(config, descriptors=descriptors and problem["itemsize"] == 2 and has_tma(device.arch))


def with_window(problem: Problem) -> Problem:
    """The problem that stands for this one in the tables: a causal mask has all loops of a full one."""
    return {**problem, "mask": WINDOW if problem["mask"] == WINDOW else CAUSAL}


def dense_problems() -> tuple[Problem, ...]:
    """Prefill and training in the shapes of common models; a head size of 128 comes before 64 and 256."""
    problems = []
    for width, heads in ((128, 32), (64, 32), (256, 16)):
        for mask in (CAUSAL, WINDOW, FULL):
            for length in (4096, 1024, 16384):
                problems.append(_dense_problem(width, 2, mask, heads, length, length))
    problems.append(_dense_problem(128, 2, CAUSAL, 32, 128, 8192))
    problems += [_dense_problem(width, 4, CAUSAL, 16, 1024, 1024) for width in (64, 128)]
    return tuple(problems)


def _corners(*keys: tuple[int, int, int], lengths: tuple[int, ...] = (1024,)) -> tuple[Problem, ...]:
    """Rarer problems, (width, itemsize, mask): heads of 512, float32 with a window, prompts shorter than a tile. A
    proof of wider heads stands for narrower ones with the same configuration."""
    return tuple(_dense_problem(*key, 16, length, 1024) for key in keys for length in lengths)


def _dense_problem(width: int, itemsize: int, mask: int, heads: int, seqlen_q: int, seqlen_k: int) -> Problem:
    return dict(zip((*DENSE_KEY, *DENSE_SIZES), (width, itemsize, mask, heads, seqlen_q, seqlen_k), strict=True))


def _dense(
    name: str,
    kernel: str,
    heuristic: Callable[[Problem, DeviceFacts], AttentionConfig],
    tiles: _Tiles,
    products: int,
    operators: tuple[str, ...],
    *,
    walks_keys: bool,
    descriptors: bool = False,
    corners: tuple[Problem, ...] = (),
) -> OpSpec:
    return OpSpec(
        name=name,
        config=AttentionConfig,
        key=DENSE_KEY,
        sizes=DENSE_SIZES,
        heuristic=heuristic,
        reason=partial(_why_dense, products),
        space=partial(_dense_space, tiles, descriptors),
        refuse=partial(_refuse_dense, walks_keys=walks_keys, gradient=products > 2),
        numerics=all_fields_but("num_stages", "descriptors"),
        kernels=(kernel,),
        workload=f"kvops.autotune.workloads:{name}",
        problems=dense_problems(),
        corners=corners,
        proof_key=with_window,
        operators=operators,
    )


_WIDE = tuple((512, 2, mask) for mask in (CAUSAL, WINDOW))
_WIDE_FLOAT32 = tuple((width, 4, mask) for width in (256, 512) for mask in (CAUSAL, WINDOW))
_FLOAT32 = (128, 4, WINDOW)
_ATTENTION = ("flash_attention", "flash_attention_varlen")
_BACKWARD = ("flash_attention_backward", "flash_attention_varlen_backward")

DENSE_FAMILIES: tuple[OpSpec, ...] = (
    _dense(
        "flash_forward",
        "kvops.kernels.flash_forward:flash_forward_kernel",
        lambda p, d: flash_forward_config(p["width"], p["itemsize"], p["seqlen_q"], d.arch),
        _FORWARD_TILES,
        2,
        _ATTENTION,
        walks_keys=True,
        descriptors=True,
        corners=(
            *_corners(*_WIDE, *_WIDE_FLOAT32, _FLOAT32, lengths=(1024, 16)),
            *_corners((256, 2, WINDOW), lengths=(32, 16)),
        ),
    ),
    _dense(
        "flash_backward_keys",
        "kvops.kernels.flash_backward_keys:flash_backward_keys_kernel",
        lambda p, d: flash_backward_keys_config(p["width"], p["itemsize"], d.arch),
        _KEYS_TILES,
        4,
        _BACKWARD,
        walks_keys=False,
        descriptors=True,
        corners=_corners(*_WIDE, *_WIDE_FLOAT32, (64, 4, WINDOW), _FLOAT32),
    ),
    _dense(
        "flash_backward_queries",
        "kvops.kernels.flash_backward_queries:flash_backward_queries_kernel",
        lambda p, d: flash_backward_queries_config(p["width"], p["itemsize"], p["seqlen_q"], d.arch),
        _QUERIES_TILES,
        3,
        _BACKWARD,
        walks_keys=True,
        descriptors=True,
        corners=(
            *_corners(*_WIDE, *_WIDE_FLOAT32, _FLOAT32),
            *_corners(_FLOAT32, (256, 2, CAUSAL), (256, 2, WINDOW), lengths=(16,)),
            *_corners((64, 2, WINDOW), (128, 2, WINDOW), lengths=(32, 16)),
        ),
    ),
    _dense(
        "attention_scores",
        "kvops.kernels.attention_scores:attention_scores_kernel",
        lambda p, d: attention_scores_config(p["width"], p["itemsize"], d.arch),
        _SCORES_TILES,
        1,
        ("attention_scores", "attention_scores_varlen"),
        walks_keys=False,
        corners=_corners(*_WIDE, *_WIDE_FLOAT32, _FLOAT32),
    ),
)
