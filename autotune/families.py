"""The kernel families of kvops: keys, sizes, spaces, validity, reasons and realistic problems.

Spaces are small on purpose: every candidate is compiled for every target by ``prune``. They hold what the published
kernels use and what compiled without spills somewhere; ties are decided in their order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from kvops.autotune.config import (
    CAUSAL,
    FULL,
    HAVE_TMA,
    WINDOW,
    AttentionConfig,
    CompactConfig,
    LookupConfig,
    PagedAppendConfig,
    PagedAttentionConfig,
    SelectBlocksConfig,
    VerifyConfig,
    attention_scores_config,
    compact_config,
    flash_backward_keys_config,
    flash_backward_queries_config,
    flash_forward_config,
    lookup_config,
    paged_append_config,
    paged_attention_config,
    select_blocks_config,
    verify_config,
)
from kvops.autotune.devices import DeviceFacts
from kvops.autotune.spec import Config, OpSpec, Problem

_MAX_WARPS = 16
_MAX_STAGES = 8


# --- what cannot run ------------------------------------------------------------------------------------------------


def _refuse_launch(config: Config, device: DeviceFacts, *powers_of_two: str) -> str | None:
    """What holds for every kernel: block sizes that Triton takes, and warps and stages that a GPU has."""
    for name in powers_of_two:
        value = getattr(config, name)
        if value < 1 or value & (value - 1):
            return f"needs {name} to be a power of two, it is {value}"
    warps, stages = config.num_warps, getattr(config, "num_stages", 1)
    if not 1 <= warps <= _MAX_WARPS or warps & (warps - 1):
        return f"needs 1 to {_MAX_WARPS} warps, a power of two, it has {warps}"
    if not 1 <= stages <= _MAX_STAGES:
        return f"needs 1 to {_MAX_STAGES} stages, it has {stages}"
    return None


def refuse_shared(needed: int, device: DeviceFacts) -> str | None:
    """``needed`` is a lower bound: what the compiler adds to it, the feasibility tables know."""
    if needed > device.shared_memory:
        return f"needs {needed} bytes of shared memory or more, {device.name} has {device.shared_memory}"
    return None


def _refuse_dense(config: AttentionConfig, problem: Problem, device: DeviceFacts, *, walks_keys: bool) -> str | None:
    """The tile that stays is read once, those of the loop are buffered: one less than there are stages."""
    reason = _refuse_launch(config, device, "block_m", "block_n")
    if reason is not None:
        return reason
    if min(config.block_m, config.block_n) < 16:
        return f"needs tiles of at least 16 x 16, it has {config.block_m} x {config.block_n}"
    stays, moves = (config.block_m, config.block_n) if walks_keys else (config.block_n, config.block_m)
    row = problem["width"] * problem["itemsize"]
    # Accumulators of more than 255 registers a thread of 32 bits each cannot be held at all.
    if stays * problem["width"] > 200 * 32 * config.num_warps * (1 if device.nvidia else 4):
        return f"needs more registers than {config.num_warps} warps have for {stays} x {problem['width']} sums"
    return refuse_shared(stays * row + 2 * max(config.num_stages - 1, 0) * moves * row, device)


def _refuse_paged(config: PagedAttentionConfig, problem: Problem, device: DeviceFacts) -> str | None:
    reason = _refuse_launch(config, device, "block_m", "block_n")
    if reason is not None:
        return reason
    if min(config.block_m, config.block_n) < 16:
        return f"needs tiles of at least 16 x 16, it has {config.block_m} x {config.block_n}"
    if config.block_m > max(16, 2 * problem["rows"]):
        return f"wastes most of its {config.block_m} rows on {problem['rows']}"
    # The block table takes stages of the pipeline, too: two tiles of slots are in flight with five stages.
    tiles = (config.num_stages - 1) // 2 if device.nvidia else config.num_stages - 1
    return refuse_shared(2 * tiles * config.block_n * problem["width"] * problem["cache_itemsize"], device)


# --- why the heuristic chooses what it chooses ----------------------------------------------------------------------


def _bound(flops: float, bytes_moved: float, device: DeviceFacts) -> str:
    """By the roofline: what a launch of so many operations and bytes is limited by on this device."""
    intensity = flops / max(bytes_moved, 1)
    if not device.bandwidth or not device.matrix_tflops:
        return f"{intensity:.0f} operations a byte"
    ridge = 1000 * device.matrix_tflops / device.bandwidth
    limit = "the matrix units" if intensity > ridge else "memory"
    return f"{intensity:.0f} operations a byte (ridge {ridge:.0f}): bound by {limit}"


def dense_bound(products: int, problem: Problem, device: DeviceFacts) -> str:
    """What limits so many matrix products a pair of query and key."""
    pairs = problem["heads"] * problem["seqlen_q"] * problem["seqlen_k"] / (2 if problem["mask"] == CAUSAL else 1)
    moved = problem["heads"] * (problem["seqlen_q"] + problem["seqlen_k"]) * 2 * problem["width"] * problem["itemsize"]
    return _bound(2 * products * pairs * problem["width"], moved, device)


def _why_dense(products: int, problem: Problem, device: DeviceFacts, config: AttentionConfig) -> str:
    bound = dense_bound(products, problem, device)
    if problem["itemsize"] == 4:
        return f"{bound}; float32 products take ordinary registers, so the tile is what they hold"
    return f"{bound}; the largest tile that compiled without spills, {config.block_m} x {config.block_n}"


def _why_paged(problem: Problem, device: DeviceFacts, config: PagedAttentionConfig) -> str:
    slots = problem["lists"] * problem["capacity"]
    slot_bytes = 2 * problem["width"] * problem["cache_itemsize"]
    bound = _bound(4 * slots * problem["rows"] * problem["width"], slots * slot_bytes, device)
    return f"{bound}; a tile holds {config.block_n * slot_bytes // 1024} KiB of K and V, {config.num_stages} stages"


def _why_streaming(what: str, problem: Problem, device: DeviceFacts, config: Config) -> str:
    return f"bound by memory: {what}, {config.num_warps} warps"


# --- numerics -------------------------------------------------------------------------------------------------------


def _all_but(*names: str) -> Callable[[Config], Hashable]:
    """Every field counts but these: stages and descriptors change when and how data arrives, not the order of a sum."""

    def numerics(config: Config) -> Hashable:
        return tuple(value for name, value in dataclasses.asdict(config).items() if name not in names)

    return numerics


def _bits_never_change(config: Config) -> Hashable:
    """Integers and copies: every configuration gives the same."""
    return None


# --- dense attention ------------------------------------------------------------------------------------------------

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
# In float32 a product is a sum of ordinary multiplications, unrolled: larger tiles spill and take minutes to compile.
_FLOAT32_TILES = ((16, 32, 8, 1), (16, 16, 4, 1))
# A window bounds the keys: two tiles are enough to try.
_WINDOW_TILES = 2
# For fewer queries than a tile has rows, and for heads wider than 256.
_NARROW_TILES = ((64, 16, 4, 1), (32, 64, 4, 2), (16, 128, 4, 2), (16, 64, 4, 2), (16, 32, 4, 1), (16, 16, 8, 1))


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
        # AMD's shared memory holds no copy of what is in flight: a stage less does the same there.
        config = AttentionConfig(block_m, block_n, warps, stages if device.nvidia else max(1, stages - 1))
        yield replace(config, descriptors=descriptors and problem["itemsize"] == 2 and device.arch in HAVE_TMA)


def with_window(problem: Problem) -> Problem:
    """A full mask's loops are among a causal one's."""
    return {**problem, "mask": WINDOW if problem["mask"] == WINDOW else CAUSAL}


def dense_problems() -> tuple[Problem, ...]:
    """Prefill and training of models that people run: heads x batch, lengths, 128 before 64 and 256."""
    found = []
    for width, heads in ((128, 32), (64, 32), (256, 16)):
        for mask in (CAUSAL, WINDOW, FULL):
            for length in (4096, 1024, 16384):
                found.append(_dense_problem(width, 2, mask, heads, length, length))
    found.append(_dense_problem(128, 2, CAUSAL, 32, 128, 8192))
    found += [_dense_problem(width, 4, CAUSAL, 16, 1024, 1024) for width in (64, 128)]
    return tuple(found)


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
) -> OpSpec:
    return OpSpec(
        name=name,
        config=AttentionConfig,
        key=DENSE_KEY,
        sizes=DENSE_SIZES,
        heuristic=heuristic,
        reason=partial(_why_dense, products),
        space=partial(_dense_space, tiles, descriptors),
        refuse=partial(_refuse_dense, walks_keys=walks_keys),
        numerics=_all_but("num_stages", "descriptors"),
        kernels=(kernel,),
        workload=f"kvops.autotune.workloads:{name}",
        problems=dense_problems(),
        proof_key=with_window,
        operators=operators,
    )


_ATTENTION = ("flash_attention", "flash_attention_varlen")
_BACKWARD = ("flash_attention_backward", "flash_attention_varlen_backward")

# --- the paged cache ------------------------------------------------------------------------------------------------


def _paged_space(problem: Problem, device: DeviceFacts) -> Iterable[PagedAttentionConfig]:
    rows = 16
    while rows < min(problem["rows"], 64):
        rows *= 2
    stages = ((5, 4), (3, 4), (5, 8)) if device.nvidia else ((2, 4), (1, 4), (2, 8))
    slot_bytes = 2 * problem["width"] * max(2, problem["cache_itemsize"])
    default = min(128, max(16, (32768 if device.nvidia else 16384) // slot_bytes))
    for block_n in (default, 2 * default, default // 2):
        if 16 <= block_n <= 128:
            for num_stages, warps in stages if block_n == default else stages[:1]:
                yield PagedAttentionConfig(rows, block_n, warps, num_stages)
    if rows > 16:
        yield PagedAttentionConfig(rows // 2, default, 4, 3 if device.nvidia else 2)
    yield PagedAttentionConfig(16, 16, 4, 1)


def _paged_problem(width: int, cache_itemsize: int, block_size: int, rows: int, lists: int, capacity: int) -> Problem:
    return {
        "width": width,
        "itemsize": 2,
        "cache_itemsize": cache_itemsize,
        "block_size": block_size,
        "rows": rows,
        "lists": lists,
        "capacity": capacity,
    }


_PAGED_PROBLEMS = (
    # Decoding of 8 sequences with 8 lists each, group 4: Llama 8B and its like; then drafts, then other head sizes.
    _paged_problem(128, 2, 16, 4, 64, 8192),
    _paged_problem(128, 2, 16, 4, 8, 8192),
    _paged_problem(128, 2, 16, 4, 512, 8192),
    _paged_problem(128, 2, 16, 32, 64, 8192),
    _paged_problem(128, 2, 16, 2048, 64, 8192),
    _paged_problem(128, 1, 16, 4, 64, 8192),
    _paged_problem(64, 2, 16, 3, 64, 8192),
    _paged_problem(64, 1, 16, 3, 64, 8192),
    _paged_problem(256, 2, 16, 4, 64, 8192),
    {**_paged_problem(64, 4, 16, 3, 64, 2048), "itemsize": 4},
)


def _append_space(problem: Problem, device: DeviceFacts) -> Iterable[PagedAppendConfig]:
    for block_t in (1, 4, 16, 32):
        if block_t * problem["width"] <= 8192:
            for warps in (1, 4) if block_t < 16 else (4, 8):
                yield PagedAppendConfig(block_t, warps)


_APPEND_PROBLEMS: tuple[Problem, ...] = tuple(
    {"width": width, "itemsize": 2, "tokens": tokens, "lists": lists}
    for width in (128, 64, 256)
    for tokens, lists in ((1, 64), (1, 512), (512, 64))
)

# --- eviction, drafts -----------------------------------------------------------------------------------------------


def _select_space(problem: Problem, device: DeviceFacts) -> Iterable[SelectBlocksConfig]:
    for block, sort_block, warps in ((1024, 512, 8), (2048, 512, 8), (1024, 256, 4), (512, 256, 4)):
        yield SelectBlocksConfig(block, sort_block, 128, warps)


def _compact_space(problem: Problem, device: DeviceFacts) -> Iterable[CompactConfig]:
    for block_n, row_bytes, warps in ((128, 128, 4), (64, 128, 4), (256, 64, 4), (128, 64, 4), (64, 256, 8)):
        yield CompactConfig(block_n, max(1, row_bytes // problem["itemsize"]), warps)


def _refuse_compact(config: CompactConfig, problem: Problem, device: DeviceFacts) -> str | None:
    reason = _refuse_launch(config, device, "block_n", "block_w")
    if reason is None and config.block_n * config.block_w * problem["itemsize"] > 128 * 32 * 4 * config.num_warps:
        return (
            f"needs more registers than {config.num_warps} warps have for {config.block_n} x {config.block_w} elements"
        )
    return reason


def _verify_space(problem: Problem, device: DeviceFacts) -> Iterable[VerifyConfig]:
    for block, race_block, warps in (
        (4096, 4096, 8),
        (2048, 2048, 4),
        (4096, 2048, 8),
        (8192, 4096, 16),
        (1024, 1024, 4),
    ):
        if block < 2 * problem["vocab"]:
            yield VerifyConfig(block, race_block, warps)


def _refuse_verify(config: VerifyConfig, problem: Problem, device: DeviceFacts) -> str | None:
    reason = _refuse_launch(config, device, "block", "race_block")
    if reason is None and config.race_block < 1024:
        return f"needs a race_block of at least 1024, it is {config.race_block}"
    if reason is None and problem["vocab"] > 65536 * config.block:
        return f"needs no more than 65536 programs to a row of logits, block is {config.block}"
    return reason


def _lookup_space(problem: Problem, device: DeviceFacts) -> Iterable[LookupConfig]:
    for block, warps in ((2048, 4), (1024, 4), (4096, 8), (512, 2)):
        if block < 4 * max(problem["length"], 16):
            yield LookupConfig(block, warps)


def _refuse_blocks(*names: str) -> Callable[[Config, Problem, DeviceFacts], str | None]:
    def refuse(config: Config, problem: Problem, device: DeviceFacts) -> str | None:
        return _refuse_launch(config, device, *names)

    return refuse


FAMILIES: tuple[OpSpec, ...] = (
    _dense(
        "flash_forward",
        "kvops.kernels.flash_forward:flash_forward_kernel",
        lambda p, d: flash_forward_config(p["width"], p["itemsize"], p["seqlen_q"], d.arch),
        _FORWARD_TILES,
        2,
        _ATTENTION,
        walks_keys=True,
        descriptors=True,
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
    ),
    _dense(
        "attention_scores",
        "kvops.kernels.attention_scores:attention_scores_kernel",
        lambda p, d: attention_scores_config(p["width"], p["itemsize"], d.arch),
        _SCORES_TILES,
        1,
        ("attention_scores", "attention_scores_varlen"),
        walks_keys=False,
    ),
    OpSpec(
        name="paged_attention",
        config=PagedAttentionConfig,
        key=("width", "itemsize", "cache_itemsize"),
        sizes=("block_size", "rows", "lists", "capacity"),
        heuristic=lambda p, d: paged_attention_config(
            p["width"], p["itemsize"], p["rows"], d.arch, cache_itemsize=p["cache_itemsize"]
        ),
        reason=_why_paged,
        space=_paged_space,
        refuse=_refuse_paged,
        numerics=_all_but("num_stages"),
        kernels=(
            "kvops.kernels.paged_attention:paged_attention_kernel",
            "kvops.kernels.paged_scores:paged_scores_kernel",
        ),
        workload="kvops.autotune.workloads:paged_attention",
        problems=_PAGED_PROBLEMS,
        operators=("paged_attention",),
    ),
    OpSpec(
        name="paged_append",
        config=PagedAppendConfig,
        key=("width", "itemsize"),
        sizes=("tokens", "lists"),
        heuristic=lambda p, d: paged_append_config(p["width"], p["tokens"]),
        reason=partial(_why_streaming, "up to 4096 elements of K and of V to a program"),
        space=_append_space,
        refuse=_refuse_blocks("block_t"),
        numerics=_bits_never_change,
        kernels=("kvops.kernels.paged_append:paged_append_kernel",),
        workload="kvops.autotune.workloads:paged_append",
        problems=_APPEND_PROBLEMS,
        operators=("paged_append",),
    ),
    OpSpec(
        name="select_blocks",
        config=SelectBlocksConfig,
        key=(),
        sizes=("slots", "lists"),
        heuristic=lambda p, d: select_blocks_config(),
        reason=partial(_why_streaming, "1024 slots to a step"),
        space=_select_space,
        refuse=_refuse_blocks("block", "sort_block", "worth_block"),
        numerics=_bits_never_change,
        kernels=(
            "kvops.kernels.select_blocks:slot_keys_kernel",
            "kvops.kernels.select_blocks:sort_keys_kernel",
            "kvops.kernels.select_blocks:block_worth_kernel",
            "kvops.kernels.select_blocks:keep_best_kernel",
        ),
        workload="kvops.autotune.workloads:select_blocks",
        problems=({"slots": 8192, "lists": 256}, {"slots": 2048, "lists": 90}, {"slots": 32768, "lists": 64}),
        operators=("select_blocks",),
    ),
    OpSpec(
        name="compact",
        config=CompactConfig,
        key=("itemsize",),
        sizes=("width", "slots", "lists"),
        heuristic=lambda p, d: compact_config(p["width"], p["itemsize"]),
        reason=partial(_why_streaming, "rows of 128 bytes and tiles of 16 KiB to a program"),
        space=_compact_space,
        refuse=_refuse_compact,
        numerics=_bits_never_change,
        kernels=("kvops.kernels.compact:move_slots_kernel",),
        workload="kvops.autotune.workloads:compact",
        problems=tuple(
            {"itemsize": itemsize, "width": width, "slots": 8192, "lists": 64}
            for itemsize, width in ((2, 128), (2, 64), (1, 128), (4, 1), (2, 256))
        ),
        operators=("compact",),
    ),
    OpSpec(
        name="verify",
        config=VerifyConfig,
        # Neither the batch nor the drafts: a row's sum is rounded the same whatever it is batched with.
        key=("itemsize",),
        sizes=("vocab",),
        heuristic=lambda p, d: verify_config(p["vocab"], p["itemsize"], d.arch),
        reason=partial(_why_streaming, "one tile of logits to a program"),
        space=_verify_space,
        refuse=_refuse_verify,
        kernels=(
            "kvops.kernels.verification:softmax_stats_kernel",
            "kvops.kernels.verify_draft:race_kernel",
            "kvops.kernels.verify_tree:tree_race_kernel",
        ),
        workload="kvops.autotune.workloads:verify",
        problems=tuple(
            {"itemsize": itemsize, "vocab": vocab} for itemsize in (2, 4) for vocab in (128256, 49152, 262144)
        ),
        operators=("verify_draft", "verify_tree"),
        # A vocabulary is a model's: half or twice of it is already another.
        max_distance=1.0,
    ),
    OpSpec(
        name="prompt_lookup",
        config=LookupConfig,
        key=(),
        sizes=("length",),
        heuristic=lambda p, d: lookup_config(max(p["length"], 1), d.arch),
        reason=partial(_why_streaming, "up to 2048 positions of the text to a program"),
        space=_lookup_space,
        refuse=_refuse_blocks("block"),
        numerics=_bits_never_change,
        kernels=("kvops.kernels.prompt_lookup:match_kernel",),
        workload="kvops.autotune.workloads:prompt_lookup",
        problems=({"length": 4096}, {"length": 32768}, {"length": 512}),
        operators=("prompt_lookup",),
    ),
)
