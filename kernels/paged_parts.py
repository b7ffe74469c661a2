"""Batch-invariant paged attention in parts of the batch, where the partial results of all of it would take too much.

A sequence has the same bits in any batch, so it has them in any part of one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kvops.autotune.config import LARGEST_PAGED_TILE
from kvops.kernels.paged_plan import PagedKind

# The largest buffer of batch-invariant partial results, in bytes, unless one sequence alone needs more.
MAX_PARTIAL = 256 << 20

Launch = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class PartedKind:
    """What a call in parts needs of its arguments, except data: rows of the batch with the kind of their launch."""

    whole: PagedKind
    parts: tuple[tuple[slice, PagedKind], ...]


def parted(kind: type[PagedKind]) -> Callable[..., PagedKind | PartedKind]:
    """What prepares a launch: a ``kind`` of its arguments, or one for each part."""
    return partial(_in_parts, kind)


def _in_parts(kind: type[PagedKind], *args: Any, **given: Any) -> PagedKind | PartedKind:
    whole = kind(*args, **given)
    batch, size = args[-1].shape[0], 4 * whole.partial_size(whole.units)
    cut = whole.invariant and whole.rows <= max(LARGEST_PAGED_TILE, whole.most_invariant_rows)
    if not cut or size <= MAX_PARTIAL or batch == 1:
        return whole
    step = max(1, MAX_PARTIAL * batch // size)
    parts = []
    for first in range(0, batch, step):
        rows = slice(first, min(first + step, batch))
        own_args, own = _of_rows(rows, args, given)
        parts.append((rows, kind(*own_args, **own)))
    return PartedKind(whole, tuple(parts))


def launch_in_parts(
    launch: Launch, kind: PartedKind, *args: Any, out: torch.Tensor | None, **given: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch for each part. A ``schedule`` of the whole batch is not used."""
    q, packed = args[0], kind.whole.packed
    result = q.new_zeros(kind.whole.out_shape) if out is None else q.new_empty(0)
    lse = q.new_full(kind.whole.lse_shape, float("-inf"), dtype=torch.float32)
    given["out"] = result if out is None else out
    for rows, part in kind.parts:
        own_args, own = _of_rows(rows, args, given)
        _, own_lse = launch(part, *own_args, **own)
        if packed:  # -inf for the tokens of other parts
            torch.maximum(lse, own_lse, out=lse)
        else:
            lse[rows] = own_lse
    return result, lse


def _of_rows(rows: slice, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of paged attention for some sequences of the batch: q, caches, tables and lengths, then the others.
    Packed tokens stay where they are."""
    q, *caches, block_tables, seq_lens = args
    own: dict[str, Any] = {**given, "schedule": None}
    packed = given.get("cu_seqlens_q") is not None
    if packed:
        own["cu_seqlens_q"] = given["cu_seqlens_q"][rows.start : rows.stop + 1]
    for name in ("q_lens", "score_decays", *(() if packed else ("query_positions", "out"))):
        if given.get(name) is not None:
            own[name] = given[name][rows]
    for name, rank in (("tree_mask", 3), ("alibi_slopes", 2), ("bias", 4)):
        if given.get(name) is not None and given[name].dim() == rank and given[name].shape[0] > 1:
            own[name] = given[name][rows]
    return (q if packed else q[rows], *caches, block_tables[rows], seq_lens[rows]), own
