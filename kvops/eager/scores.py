"""Column reductions of the softmax on the CPU: tile by tile, never the matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from kvops.eager.attention import (
    Window,
    compute_dtype,
    default_scale,
    group_queries,
    group_slopes,
    score_tile,
    tile_sizes,
)


def attention_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    query_start: int = 0,
    skip_recent: int = 0,
    reduce: str = "sum",
    group: str = "sum",
) -> Tensor:
    B, Sq, Hq, D = q.shape
    Sk, Hkv = k.shape[1:3]
    dtype = compute_dtype(q.dtype)
    window = Window.of(Sq, Sk, causal, window_left, window_right)
    if skip_recent > 0:
        # A key that must stand so far behind the query is a window that ends before the query.
        window = window._replace(right=-skip_recent)
    slopes = group_slopes(alibi_slopes, Hkv, dtype)
    scale = default_scale(scale, D)
    # A maximum is taken of log p, and one exponential at the end is enough.
    total = torch.full((B, Hkv, Hq // Hkv, Sk), float("-inf") if reduce == "max" else 0.0, dtype=dtype, device=q.device)
    if query_start < 0:
        query_start = max(0, query_start + Sq)
    if B > 0 and Hq > 0:
        qg, k = group_queries(q, Hkv), k.transpose(1, 2)
        lse = lse.to(dtype).masked_fill(lse == float("-inf"), float("inf"))
        lse = lse.unflatten(1, (Hkv, Hq // Hkv)).unsqueeze(-1)  # [B, Hkv, G, Sq, 1]
        first_row = max(query_start, window.first_row)
        rows, columns = tile_sizes(B, Hq, Sq - first_row)
        for start in range(first_row, Sq, rows):
            end = min(Sq, start + rows)
            tile = qg[:, :, :, start:end].to(dtype)
            first, last = window.keys(start, end)
            for low in range(first, last, columns):
                high = min(last, low + columns)
                log_p, _ = score_tile(tile, k[:, :, low:high].to(dtype), window, start, low, scale, softcap, slopes)
                log_p.sub_(lse[:, :, :, start:end])
                part = total[..., low:high]
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
