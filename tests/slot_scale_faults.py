"""Planted faults of the scales of slots of float8 and int8 caches (``mutations.py``)."""

from faults import Mutation, named

SLOT_SCALES = named("slot_scales", "triton", "(multiplies or float16 or beside)")

SLOT_SCALE_FAULTS = [
    Mutation(
        "paged: scores are not those of the keys with their slots' scales",
        "kernels/paged_scores.py",
        "log2_scores(s, distance, key_scale, softcap",
        "log2_scores(s, distance, list_scale, softcap",
        SLOT_SCALES,
    ),
    Mutation(
        "paged: scales of slots are those of the first slot of a block",
        "kernels/paged_tiles.py",
        "cell = block * stride_block + offset * stride_slot + head * stride_head",
        "cell = block * stride_block + head * stride_head",
        SLOT_SCALES,
    ),
    Mutation(
        "paged: float16 weights are multiplied by the bare scales of slots",
        "kernels/paged_tiles.py",
        "unit: tl.constexpr = 32768.0",
        "unit: tl.constexpr = 1.0",
        SLOT_SCALES,
    ),
    Mutation(
        "paged: infinity counts in the scale of a slot",
        "kernels/paged_append.py",
        'mask & (magnitude < float("inf"))',
        "mask & (magnitude == magnitude)",
        named("slot_scales", "triton", "append_writes"),
    ),
    Mutation(
        "compaction leaves the scales of slots where they are",
        "kernels/compact.py",
        "scores, k_slot_scale, v_slot_scale):",
        "scores, k_slot_scale):",
        named("slot_scales", "triton", "compaction"),
    ),
]
