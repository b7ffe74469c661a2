"""All kernel families of kvops, and those of the paged cache, of eviction and of drafts: keys, sizes, spaces, validity,
reasons and typical problems.

Spaces are small on purpose, because ``prune`` compiles every configuration for every target. They hold configurations
that published kernels use and that compiled without spills on some target. Of equally fast ones the first wins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from kvops.autotune.config import (
    LARGEST_PAGED_TILE,
    CompactConfig,
    LookupConfig,
    PagedAppendConfig,
    PagedAttentionConfig,
    SelectBlocksConfig,
    VerifyConfig,
    compact_config,
    latent_attention_config,
    lookup_config,
    paged_append_config,
    paged_attention_config,
    select_blocks_config,
    verify_config,
)
from kvops.autotune.dense_families import DENSE_FAMILIES
from kvops.autotune.devices import DeviceFacts
from kvops.autotune.family_parts import all_fields_but, bits_never_change, refuse_launch, refuse_shared, roofline_bound
from kvops.autotune.spec import Config, OpSpec, Problem


def _refuse_tiles(config: PagedAttentionConfig, problem: Problem, device: DeviceFacts) -> str | None:
    reason = refuse_launch(config, device, "block_m", "block_n")
    if reason is not None:
        return reason
    if min(config.block_m, config.block_n) < 16:
        return f"needs tiles of at least 16 x 16, it has {config.block_m} x {config.block_n}"
    if config.block_m > max(16, 2 * problem["rows"]):
        return f"wastes most of its {config.block_m} rows on {problem['rows']}"
    return None


def _refuse_paged(config: PagedAttentionConfig, problem: Problem, device: DeviceFacts) -> str | None:
    reason = _refuse_tiles(config, problem, device)
    if reason is not None:
        return reason
    # The block table takes stages of the pipeline as well: five stages hold two tiles of slots.
    tiles = (config.num_stages - 1) // 2 if device.nvidia else config.num_stages - 1
    needed = 2 * tiles * config.block_n * problem["width"] * problem["cache_itemsize"]
    if device.nvidia:
        # Queries and probabilities reach the matrix units through shared memory.
        needed += config.block_m * (problem["width"] + config.block_n) * problem["itemsize"]
    return refuse_shared(needed, device)


def _why_paged(problem: Problem, device: DeviceFacts, config: PagedAttentionConfig) -> str:
    slots = problem["lists"] * problem["capacity"]
    slot_bytes = 2 * problem["width"] * problem["cache_itemsize"]
    bound = roofline_bound(4 * slots * problem["rows"] * problem["width"], slots * slot_bytes, device)
    return f"{bound}; a tile holds {config.block_n * slot_bytes // 1024} KiB of K and V, {config.num_stages} stages"


def _why_streaming(what: str, problem: Problem, device: DeviceFacts, config: Config) -> str:
    return f"bound by memory: {what}, {config.num_warps} warps"


def _paged_space(problem: Problem, device: DeviceFacts) -> Iterable[PagedAttentionConfig]:
    rows = 16
    while rows < min(problem["rows"], LARGEST_PAGED_TILE if problem["width"] <= 128 else 32):
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
    # Decoding of 8 sequences with 8 lists each and group 4, as in Llama 8B; then drafts, then other head sizes.
    _paged_problem(128, 2, 16, 4, 64, 8192),
    _paged_problem(128, 2, 16, 4, 8, 8192),
    _paged_problem(128, 2, 16, 4, 512, 8192),
    _paged_problem(128, 2, 16, 32, 64, 8192),
    _paged_problem(128, 2, 16, 2048, 64, 8192),
    _paged_problem(128, 1, 16, 4, 64, 8192),
    _paged_problem(64, 2, 16, 3, 64, 8192),
    _paged_problem(64, 1, 16, 3, 64, 8192),
    _paged_problem(256, 2, 16, 4, 64, 8192),
    _paged_problem(256, 2, 16, 64, 64, 8192),
    _paged_problem(512, 2, 16, 4, 64, 8192),
    _paged_problem(512, 2, 16, 64, 64, 8192),
    {**_paged_problem(64, 4, 16, 3, 64, 2048), "itemsize": 4},
    {**_paged_problem(128, 4, 16, 4, 64, 2048), "itemsize": 4},
    {**_paged_problem(128, 4, 16, 64, 64, 2048), "itemsize": 4},
)
# Drafts: more rows than decoding has. Their larger tiles are proven alone. Then rarer caches: float8 with heads of 256
# and 512, float32 with wide heads, and queries in float32 over a float8 cache.
_PAGED_CORNERS: tuple[Problem, ...] = (
    *(
        _paged_problem(width, cache_itemsize, 16, rows, 64, 8192)
        for width, cache_itemsize in ((64, 2), (64, 1), (128, 1), (256, 1))
        for rows in (32, 64)
    ),
    *(_paged_problem(width, 1, 16, rows, 64, 8192) for width, rows in ((256, 4), (512, 4), (512, 64))),
    *({**_paged_problem(width, 4, 16, 4, 64, 2048), "itemsize": 4} for width in (256, 512)),
    *(
        {**_paged_problem(width, 1, 16, rows, 64, 2048), "itemsize": 4}
        for width, rows in ((16, 4), (32, 4), (64, 4), (64, 64), (128, 4), (128, 64), (256, 4), (512, 4))
    ),
)


# Columns behind a latent, at most.
_ROTARY = 64


def _latent_space(problem: Problem, device: DeviceFacts) -> Iterable[PagedAttentionConfig]:
    yield PagedAttentionConfig(16, 16, 4, 5 if device.nvidia else 1)
    if problem["itemsize"] == 4:
        return
    yield PagedAttentionConfig(16, 32, 4, 3 if device.nvidia else 1)
    if device.nvidia and problem["rows"] > 16:
        yield PagedAttentionConfig(32, 32, 8, 3)
    if device.arch == "sm_90" and problem["rows"] > 32:
        yield PagedAttentionConfig(64, 16, 8, 5)


def _refuse_latent(config: PagedAttentionConfig, problem: Problem, device: DeviceFacts) -> str | None:
    reason = _refuse_tiles(config, problem, device)
    if reason is not None:
        return reason
    tiles = max(1, (config.num_stages - 1) // 2) if device.nvidia else 1
    return refuse_shared(tiles * config.block_n * (problem["width"] + _ROTARY) * problem["itemsize"], device)


def _why_latent(problem: Problem, device: DeviceFacts, config: PagedAttentionConfig) -> str:
    slots, columns = problem["lists"] * problem["capacity"], problem["width"] + _ROTARY
    slot_bytes = columns * problem["itemsize"]
    bound = roofline_bound(2 * slots * problem["rows"] * (columns + problem["width"]), slots * slot_bytes, device)
    tile = config.block_n * slot_bytes // 1024
    return f"{bound}; {config.block_m} rows share a tile of {tile} KiB, {config.num_stages} stages"


# Decoding of 64 sequences in DeepSeek-V3's shape: 16 heads of 128 on each of eight GPUs, then all; then float32.
_LATENT_PROBLEMS: tuple[Problem, ...] = tuple(
    {"width": 512, "itemsize": itemsize, "block_size": 64, "rows": rows, "lists": 64, "capacity": 8192}
    for itemsize, rows in ((2, 16), (2, 32), (2, 128), (4, 16))
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
# Each number of tokens in a program at the widest head that has it, which stands for narrower ones.
_APPEND_CORNERS: tuple[Problem, ...] = tuple(
    {"width": width, "itemsize": itemsize, "tokens": tokens, "lists": 64}
    for itemsize, width, tokens in (
        *((itemsize, 512, tokens) for itemsize in (2, 4) for tokens in (1, 2, 4, 8)),
        *((4, 256, 2), (4, 256, 16), (4, 128, 4), (4, 128, 32), (4, 64, 8), (4, 64, 64)),
        *((4, 32, 16), (4, 32, 128), (4, 16, 32), (4, 16, 256)),
    )
)


def _select_space(problem: Problem, device: DeviceFacts) -> Iterable[SelectBlocksConfig]:
    for block, sort_block, warps in ((1024, 512, 8), (2048, 512, 8), (1024, 256, 4), (512, 256, 4)):
        yield SelectBlocksConfig(block, sort_block, 128, warps)


def _compact_space(problem: Problem, device: DeviceFacts) -> Iterable[CompactConfig]:
    for block_n, row_bytes, warps in ((128, 128, 4), (64, 128, 4), (256, 64, 4), (128, 64, 4), (64, 256, 8)):
        yield CompactConfig(block_n, max(1, row_bytes // problem["itemsize"]), warps)


def _refuse_compact(config: CompactConfig, problem: Problem, device: DeviceFacts) -> str | None:
    reason = refuse_launch(config, device, "block_n", "block_w")
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
    reason = refuse_launch(config, device, "block", "race_block")
    if reason is None and config.race_block < 1024:
        return f"needs a race_block of at least 1024, it is {config.race_block}"
    smallest = min(config.block, config.race_block)
    if reason is None and problem["vocab"] > 65535 * smallest:  # the second axis of a grid
        return f"needs no more than 65535 programs per row of logits, a block has {smallest}"
    return reason


def _lookup_space(problem: Problem, device: DeviceFacts) -> Iterable[LookupConfig]:
    for block, warps in ((2048, 4), (1024, 4), (4096, 8), (512, 2)):
        if block < 4 * max(problem["length"], 16):
            yield LookupConfig(block, warps)


def _refuse_blocks(*names: str) -> Callable[[Config, Problem, DeviceFacts], str | None]:
    def refuse(config: Config, problem: Problem, device: DeviceFacts) -> str | None:
        return refuse_launch(config, device, *names)

    return refuse


FAMILIES: tuple[OpSpec, ...] = (
    *DENSE_FAMILIES,
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
        numerics=all_fields_but("num_stages"),
        kernels=(
            "kvops.kernels.paged_attention_kernel:paged_attention_kernel",
            "kvops.kernels.paged_scores:paged_scores_kernel",
        ),
        workload="kvops.autotune.workloads:paged_attention",
        problems=_PAGED_PROBLEMS,
        corners=_PAGED_CORNERS,
        operators=("paged_attention",),
    ),
    OpSpec(
        name="paged_latent_attention",
        config=PagedAttentionConfig,
        key=("width", "itemsize"),
        sizes=("block_size", "rows", "lists", "capacity"),
        heuristic=lambda p, d: latent_attention_config(p["itemsize"], p["rows"], d.arch),
        reason=_why_latent,
        space=_latent_space,
        refuse=_refuse_latent,
        numerics=all_fields_but("num_stages"),
        kernels=("kvops.kernels.paged_latent_attention:paged_latent_kernel",),
        workload="kvops.autotune.workloads:paged_latent_attention",
        problems=_LATENT_PROBLEMS,
        operators=("paged_latent_attention",),
    ),
    OpSpec(
        name="paged_append",
        config=PagedAppendConfig,
        key=("width", "itemsize"),
        sizes=("tokens", "lists"),
        heuristic=lambda p, d: paged_append_config(p["width"], p["tokens"]),
        reason=partial(_why_streaming, "up to 4096 elements of K and of V per program"),
        space=_append_space,
        refuse=_refuse_blocks("block_t"),
        numerics=bits_never_change,
        kernels=("kvops.kernels.paged_append:paged_append_kernel",),
        workload="kvops.autotune.workloads:paged_append",
        problems=_APPEND_PROBLEMS,
        corners=_APPEND_CORNERS,
        operators=("paged_append",),
    ),
    OpSpec(
        name="select_blocks",
        config=SelectBlocksConfig,
        key=(),
        sizes=("slots", "lists"),
        heuristic=lambda p, d: select_blocks_config(),
        reason=partial(_why_streaming, "1024 slots per step"),
        space=_select_space,
        refuse=_refuse_blocks("block", "sort_block", "worth_block"),
        numerics=bits_never_change,
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
        reason=partial(_why_streaming, "rows of 128 bytes and tiles of 16 KiB per program"),
        space=_compact_space,
        refuse=_refuse_compact,
        numerics=bits_never_change,
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
        # Without the batch and the number of drafts: the rounding of a row's sum must not depend on its batch.
        key=("itemsize",),
        sizes=("vocab",),
        heuristic=lambda p, d: verify_config(p["vocab"], p["itemsize"], d.arch),
        reason=partial(_why_streaming, "one tile of logits per program"),
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
        corners=tuple({"itemsize": itemsize, "vocab": vocab} for itemsize in (2, 4) for vocab in (64, 100, 200, 400)),
        operators=("verify_draft", "verify_tree"),
        # Each model has its vocabulary: half or twice the size is another problem.
        max_distance=1.0,
    ),
    OpSpec(
        name="prompt_lookup",
        config=LookupConfig,
        key=(),
        sizes=("length",),
        heuristic=lambda p, d: lookup_config(max(p["length"], 1), d.arch),
        reason=partial(_why_streaming, "up to 2048 positions of the text per program"),
        space=_lookup_space,
        refuse=_refuse_blocks("block"),
        numerics=bits_never_change,
        kernels=("kvops.kernels.prompt_lookup:match_kernel",),
        workload="kvops.autotune.workloads:prompt_lookup",
        problems=({"length": 4096}, {"length": 32768}, {"length": 512}),
        corners=({"length": 100},),
        operators=("prompt_lookup",),
    ),
)
