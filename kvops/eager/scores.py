"""Column reductions of the softmax on the CPU: tile by tile, never the matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvops.eager.attention import cast, compute_dtype, default_scale, group_slopes, grouped, score_tile
from kvops.eager.window import Window


def attention_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    query_start: int = 0,
    skip_recent: int = 0,
    reduce: str = "sum",
    group: str = "sum",
    **window: Any,
) -> Tensor:
    """See :func:`kvops.attention_scores`."""
    B, Sq, Hq, D = q.shape
    Sk, Hkv = k.shape[1:3]
    dtype = compute_dtype(q.dtype)
    visible = Window.of(Sq, Sk, **window)
    if skip_recent > 0:
        # A key that must stand so far behind the query is a window that ends before the query.
        visible = visible._replace(right=-skip_recent)
    slopes = group_slopes(alibi_slopes, Hkv, dtype)
    # A maximum is taken of log p, and one exponential at the end is enough.
    total = torch.full((B, Hkv, Hq // Hkv, Sk), -torch.inf if reduce == "max" else 0.0, dtype=dtype)
    if query_start < 0:
        query_start = max(0, query_start + Sq)
    first_row = max(query_start, visible.first_row)
    q, k = (cast(x, dtype).transpose(1, 2) for x in (q, k))
    lse = grouped(lse.to(dtype).masked_fill(lse == -torch.inf, torch.inf), Hkv)[..., None]  # [B, Hkv, G, Sq, 1]
    for tile in visible.tiles(first_row, B * Hq) if B * Hq > 0 else ():
        log_p, _ = score_tile(q, k, visible, tile, default_scale(scale, D), softcap, slopes)
        log_p.sub_(lse[:, :, :, tile.rows])
        part = total[..., tile.keys]
        if reduce == "max":
            torch.maximum(part, log_p.amax(3), out=part)
        elif reduce == "sumsq":
            part += log_p.mul_(2.0).exp_().sum(3)
        else:
            part += log_p.exp_().sum(3)
    if reduce == "max":
        total.exp_()
    if group == "max":
        return total.amax(2) if total.numel() else total.sum(2)
    return total.sum(2) if group == "sum" else total.mean(2)
