"""Launch configurations of the kernels: one frozen dataclass and one choosing function for each kernel family.

A configuration is chosen from plain numbers (head size, dtype width, group size ...) and never from device data, so the
choice costs a dictionary look-up and is the same on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvops.autotune.architectures import family, has_tma

# Kinds of masks of dense attention by the loops that they need. A bound on the left, or on both sides, is a window.
FULL, CAUSAL, WINDOW = 0, 1, 2


@dataclass(frozen=True)
class VerifyConfig:
    """Draft verification: the part of a row of logits that a program reads.

    Attributes:
        block: vocabulary entries per program of the softmax statistics, a power of two.
        race_block: vocabulary entries per program of the resampling, a power of two from 1024 on.
        num_warps: of both kernels.
    """

    block: int
    race_block: int
    num_warps: int


def verify_config(vocab: int, itemsize: int, arch: str) -> VerifyConfig:
    """Chosen from the vocabulary alone, not from the batch, so that the rounding of a row's sum does not depend on it.

    One tile per program, with at least 16 bytes per thread in flight: 4096 entries over 8 warps.
    """
    arch = family(arch)
    block = min(4096, max(64, 1 << (vocab - 1).bit_length()))
    # With 8 warps on sm_120 a thread has 80 registers, and the kernel for trees spills one.
    wide = 16 if arch == "sm_120" else 8
    return VerifyConfig(block, race_block=min(4096, max(1024, block)), num_warps=wide if block == 4096 else 4)


@dataclass(frozen=True)
class LookupConfig:
    """Prompt lookup: ``block`` positions of the text per program."""

    block: int
    num_warps: int


def lookup_config(length: int, arch: str) -> LookupConfig:
    # Two sizes only: a text that grows meets no new kernel.
    return LookupConfig(block=256 if length <= 256 else 2048, num_warps=4)


@dataclass(frozen=True)
class AttentionConfig:
    """The tile of a dense attention kernel: BLOCK_M queries against BLOCK_N keys.

    ``descriptors``: what the loop walks comes through tensor descriptors (TMA) where the tensors allow it, else through
    pointers, with the same bits. The column reductions have none.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


def _clip_tile(config: AttentionConfig, num_queries: int) -> AttentionConfig:
    """Reduce a tile to the number of queries, but not below 16, the smallest matrix product."""
    block_m = config.block_m
    while block_m > 16 and block_m // 2 >= num_queries:
        block_m //= 2
    if block_m == config.block_m:
        return config
    return replace(config, block_m=block_m, num_warps=min(4, config.num_warps))


def flash_forward_config(head_dim: int, itemsize: int, num_queries: int, arch: str) -> AttentionConfig:
    """``head_dim`` is the larger of the padded head sizes of Q and V, ``itemsize`` the bytes of an element.

    Here and below: the largest tiles that compile without spills by Triton 3.7.1. They are not timed yet.
    """
    arch = family(arch)
    if arch == "interpreter":
        config = AttentionConfig(32, 32, 4, 1)
    elif itemsize == 4:
        # float32 products run on the ordinary units, so registers limit the tile.
        config = AttentionConfig(32, 32 if head_dim <= 128 else 16, 8, 1)
    elif head_dim <= 64:
        config = AttentionConfig(128, 64, 4 if arch == "sm_90" else 8, 3 if arch.startswith("sm_") else 1)
    elif head_dim <= 128:
        if arch == "sm_90":
            config = AttentionConfig(128, 128, 8, 2)
        elif arch == "sm_120":
            config = AttentionConfig(128, 32, 8, 3)  # 128 x 64 spills with a window; this uses 184 registers
        else:
            config = AttentionConfig(128, 64, 8, 2) if arch.startswith("sm_") else AttentionConfig(128, 32, 8, 1)
    elif head_dim <= 256 and arch == "sm_90":
        config = AttentionConfig(128, 64, 8, 2)
    elif head_dim <= 256 and arch == "sm_100":
        # 128 rows spill with a window: x 64 by Triton 3.6, 3.7.1, 3.9: 2, 16, 81 stores; x 32 by 3.9: 13.
        config = AttentionConfig(64, 64, 8, 2)
    else:
        config = AttentionConfig(64, 32, 8, 1) if head_dim <= 256 else AttentionConfig(32, 16, 8, 1)
    # sm_90, 128 x 128: 490 instructions per tile through descriptors, 538 through pointers, and no spills with a
    # window.
    return replace(_clip_tile(config, num_queries), descriptors=itemsize == 2 and has_tma(arch))


def _narrow_tile(arch: str) -> AttentionConfig:
    """The smallest tile, for heads so wide that it fills the registers."""
    return AttentionConfig(16, 16, 8 if arch.startswith("sm_") else 4, 1)


def flash_backward_keys_config(head_dim: int, itemsize: int, arch: str) -> AttentionConfig:
    """For the gradients of K and V: a program owns BLOCK_N keys and loops over the queries."""
    arch = family(arch)
    if arch == "interpreter":
        return AttentionConfig(32, 32, 4, 1)
    if itemsize == 4:
        # At 128, 8 warps have 80 registers per thread and spill 2 stores (sm_90); 4 warps use 168.
        warps = 4 if head_dim > 64 and arch.startswith("sm_") else 8
        return AttentionConfig(16, 32, warps, 1) if head_dim <= 128 else _narrow_tile(arch)
    if head_dim > 256:
        config = _narrow_tile(arch)
    elif head_dim > 128:
        config = AttentionConfig(32 if arch.startswith("sm_") else 16, 32, 8, 1)
    elif arch == "sm_90":
        config = AttentionConfig(64 if head_dim <= 64 else 32, 128, 8, 2)
    elif arch == "sm_100":
        # 64 x 128 spills at 128 (3.9: 7 stores); this uses 158 registers.
        config = AttentionConfig(64, 128 if head_dim <= 64 else 64, 8, 1)
    elif arch == "gfx950" and head_dim > 64:
        config = AttentionConfig(16, 64, 8, 1)  # 32 x 64 spills 10 registers with a window; this uses 128
    else:
        config = AttentionConfig(64 if arch.startswith("sm_") and head_dim > 64 else 32, 64, 8, 1)
    return replace(config, descriptors=has_tma(arch))


def flash_backward_queries_config(head_dim: int, itemsize: int, num_queries: int, arch: str) -> AttentionConfig:
    """For the gradient of Q: a program owns BLOCK_M queries and loops over the keys."""
    arch = family(arch)
    if arch == "interpreter":
        config = AttentionConfig(32, 32, 4, 1)
    elif itemsize == 4:
        config = AttentionConfig(32, 16, 8, 1) if head_dim <= 128 else _narrow_tile(arch)
    elif head_dim > 256:
        config = _narrow_tile(arch)
    elif head_dim > 128 and arch == "sm_90":
        # The products of Hopper have 64 rows.
        config = AttentionConfig(64, 32, 8, 2)
    elif head_dim > 128:
        config = AttentionConfig(32, 32 if arch.startswith("sm_") else 16, 8, 1)
    else:
        config = AttentionConfig(128, 64, 8, 2) if arch in ("sm_90", "sm_100") else AttentionConfig(64, 32, 8, 1)
    # sm_90, 128 x 64: 201 registers at 128 and 130 at 64; through pointers 226 and 174.
    return replace(_clip_tile(config, num_queries), descriptors=itemsize == 2 and has_tma(arch))


def attention_scores_config(head_dim: int, itemsize: int, arch: str) -> AttentionConfig:
    """A program owns BLOCK_N keys and loops over the queries. One product per tile leaves room for large tiles."""
    arch = family(arch)
    if arch == "interpreter":
        return AttentionConfig(32, 32, 4, 1)
    if itemsize == 4 or head_dim > 256:
        return AttentionConfig(32 if head_dim <= 128 else 16, 32, 8, 1)
    if arch == "sm_100":
        return AttentionConfig(64, 64, 8, 2 if head_dim <= 128 else 1)
    return AttentionConfig(64, 128, 8, 2) if head_dim <= 128 else AttentionConfig(64, 64, 8, 1)


@dataclass(frozen=True)
class SelectBlocksConfig:
    """Tiles of the phases of ``select_blocks``.

    Attributes:
        block: slots per step where keys are computed and counted.
        sort_block: slots per step of sorting, which keeps 16 counts per slot in registers.
        worth_block: blocks per program where blocks are valued.
        num_warps: of all phases.
    """

    block: int
    sort_block: int
    worth_block: int
    num_warps: int


def select_blocks_config() -> SelectBlocksConfig:
    return SelectBlocksConfig(block=1024, sort_block=512, worth_block=128, num_warps=8)


@dataclass(frozen=True)
class CompactConfig:
    """Each step reads ``block_n`` slots by ``block_w`` elements, then writes them to their new places."""

    block_n: int
    block_w: int
    num_warps: int


def compact_config(width: int, itemsize: int) -> CompactConfig:
    """For slots of ``width`` elements: rows of at most 128 bytes per program, tiles of at most 16 KiB."""
    block_w = 1
    while block_w < width and 2 * block_w * itemsize <= 128:
        block_w *= 2
    return CompactConfig(block_n=min(512, 16384 // (block_w * itemsize)), block_w=block_w, num_warps=4)


@dataclass(frozen=True)
class GluonFlashForwardConfig:
    """The warp-specialised flash attention forward for Hopper.

    Attributes:
        block_rows: queries of each of the two consumers, a multiple of 64.
        block_n: keys per tile.
        stages: key (and value) tiles in shared memory at a time, at least 2.
        consumer_registers, producer_registers: per thread, multiples of 8; two consumers and the producer share 504.
        persistent: one program for each multiprocessor loops over the work items, so that the next tiles load while the
            last output is stored; otherwise one program for each block of queries.
        section_bytes: heads run in groups whose keys and values have this size together and stay in the L2 cache.
    """

    block_rows: int
    block_n: int
    stages: int
    consumer_registers: int
    producer_registers: int
    persistent: bool = True
    section_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        if self.stages < 2:
            # A value tile is released after the next one has arrived.
            raise ValueError(f"stages: expected at least 2, got {self.stages}")


def gluon_flash_forward_config(width: int) -> GluonFlashForwardConfig:
    """Chosen from the padded head size alone, 64, 128 or 256: tiles that fit and do not spill by Triton 3.7.

    Packed causal sequences at 256 (with 3.6 also windows) keep one scalar in memory, stored and read once per program.
    3.9 keeps scalars in memory for some masks, mostly at 256; the unmasked loop uses none of them.
    """
    if width <= 64:
        return GluonFlashForwardConfig(64, 128, stages=3, consumer_registers=216, producer_registers=72)
    if width <= 128:
        return GluonFlashForwardConfig(64, 128, stages=2, consumer_registers=240, producer_registers=24)
    return GluonFlashForwardConfig(64, 64, stages=2, consumer_registers=240, producer_registers=24)


@dataclass(frozen=True)
class GluonFlashBackwardConfig:
    """One of the two warp-specialised kernels of the flash attention backward for Hopper.

    Attributes:
        block_m: queries per tile, or per consumer in the kernel for dQ.
        block_n: keys per tile, or per consumer in the kernel for dK and dV.
        stages: tiles of the loop in shared memory at a time.
        consumer_registers, producer_registers: per thread, multiples of 8; two consumers and the producer share 504.
        section_bytes: heads run in groups whose tensors of the loop have this size together and stay in the L2 cache.
    """

    block_m: int
    block_n: int
    stages: int
    consumer_registers: int = 240
    producer_registers: int = 24
    section_bytes: int = 16 << 20


def gluon_flash_backward_keys_config(width: int) -> GluonFlashBackwardConfig:
    """Chosen from the padded head size alone, 64 or 128: with Triton 3.7 and 3.9 the tiles never spill.

    3.6 keeps one number in memory at 128 with grouped heads and a mask; the loop over the tiles does not use it.
    """
    return GluonFlashBackwardConfig(64, 64, stages=3 if width <= 64 else 2)


def gluon_flash_backward_queries_config(width: int) -> GluonFlashBackwardConfig:
    """Chosen from the padded head size alone, 64 or 128: the tiles never spill."""
    return GluonFlashBackwardConfig(64, 128, stages=3 if width <= 64 else 2)


@dataclass(frozen=True)
class PagedAttentionConfig:
    """A program has BLOCK_M rows (query heads of a group x tokens) and loops over tiles of BLOCK_N slots."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


LARGEST_PAGED_TILE = 64
"""Query rows: with more of them, a batch-invariant call has no partial results."""


def paged_attention_config(
    head_dim: int, itemsize: int, rows: int, arch: str, *, cache_itemsize: int | None = None
) -> PagedAttentionConfig:
    """``head_dim`` is the larger of the padded head sizes of K and V, ``rows`` the group's query heads times tokens,
    ``cache_itemsize`` that of a cache in another dtype than the queries.

    Decoding is bound by memory and needs bytes in flight, so a tile holds 32 KiB of K and V for every head size and
    dtype (16 KiB where a program has 64 KiB of shared memory). The pipeline reads the table first and then the slots:
    five stages keep two tiles of slots in flight, three keep one.
    """
    arch = family(arch)
    # Wider heads leave registers and shared memory for 32 rows.
    most = LARGEST_PAGED_TILE if head_dim <= 128 else 32
    block_m = 16
    while block_m < min(rows, most):
        block_m *= 2
    if arch == "interpreter":
        return PagedAttentionConfig(block_m, 32, 4, 1)
    nvidia = arch.startswith("sm_")
    stage = 32768 if nvidia else 16384
    slot_bytes = 2 * head_dim * itemsize
    block_n = min(128, max(16, stage // slot_bytes))
    if block_m == 64 and arch != "sm_90":
        block_n = min(block_n, 32)  # on other targets 64 x 64 scores need too many registers
    if itemsize == 4 and block_m > 16:
        # float32 products run on the ordinary units, so registers limit the tile.
        block_m, block_n = 32 if head_dim <= 128 else 16, min(block_n, 32)
    if cache_itemsize == 1 and (head_dim >= 128 or arch.startswith("sm_8")):
        # A float8 tile is in registers twice, as loaded and as converted: 64 slots of 128 spill on sm_100, and 128
        # slots of 64 on sm_80.
        block_n = min(block_n, max(16, 4096 // head_dim))
    if not nvidia and head_dim > 256 and itemsize == 4 and cache_itemsize != 1:
        return PagedAttentionConfig(16, 16, 4, 1)  # two stages take 65 KiB, gfx942 has 64; 8 warps spill
    num_stages = 2
    if nvidia:
        num_stages = 5 if block_n * slot_bytes <= stage else 3
    # 64 x 128 sums spill with 4 warps where masks and scores come on top, and 32 x 128 products of float32.
    many = 4096 if itemsize == 4 and block_m > 16 else 8192
    if cache_itemsize == 1 and nvidia:
        # By Triton 3.7.1, without these limits: 14 spills (heads of 256), 27 (512), 88 to 2218 (float32).
        if head_dim >= 256:
            many, num_stages = 4096, min(num_stages, 5 if head_dim == 256 else 3)
        if itemsize == 4:
            block_n, num_stages = min(block_n, max(16, 2048 // head_dim)), 1
    return PagedAttentionConfig(block_m, block_n, 8 if block_m * max(block_n, head_dim) >= many else 4, num_stages)


def latent_attention_config(itemsize: int, rows: int, arch: str) -> PagedAttentionConfig:
    """For slots of up to 512 columns and 64 behind them; narrower ones take the same tiles, proven for the widest.

    A row's sums fill 2 KiB of registers: 64 rows in 8 warps on Hopper, whose products have 64 rows, and 32 elsewhere.
    """
    arch = family(arch)
    nvidia = arch.startswith("sm_")
    most = 64 if arch in ("sm_90", "interpreter") else 32
    block_m = 16
    while block_m < min(rows, most if itemsize == 2 else 16):
        block_m *= 2
    if arch == "interpreter":
        return PagedAttentionConfig(block_m, 32, 4, 1)
    if not nvidia:
        return PagedAttentionConfig(16, 16, 4, 1)
    if itemsize == 4:
        return PagedAttentionConfig(16, 16, 8, 1)
    if block_m == 64:
        return PagedAttentionConfig(64, 32, 8, 3)
    # Two tiles of slots in flight beside the queries, within the 99 KiB of sm_86 and sm_120.
    return PagedAttentionConfig(block_m, 32 if block_m == 16 else 16, 8, 5)


@dataclass(frozen=True)
class PagedAppendConfig:
    """``block_t`` tokens of one head per program."""

    block_t: int
    num_warps: int


def paged_append_config(head_dim: int, num_tokens: int) -> PagedAppendConfig:
    """``head_dim`` is the larger of the padded head sizes; a program moves up to 4096 elements of each of K and V."""
    block_t = 1
    while block_t < min(num_tokens, max(1, 4096 // head_dim)):
        block_t *= 2
    return PagedAppendConfig(block_t, num_warps=4 if block_t * head_dim >= 1024 else 1)
