"""Attention written out for the benchmarks' checks: tile by tile, every step in the dtype asked for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Elements of a tile of the matrix of queries times keys.
_TILE_ELEMENTS = 1 << 24


def visible(rows: Tensor, num_queries: int, num_keys: int, causal: bool, window: int) -> Tensor:
    """bool [rows, keys]: which keys the queries of these numbers see; aligned to the bottom right."""
    position = rows[:, None] + num_keys - num_queries
    key = torch.arange(num_keys, device=rows.device)
    mask = torch.ones(len(rows), num_keys, dtype=torch.bool, device=rows.device)
    if causal:
        mask &= key <= position
    if window >= 0:
        mask &= key >= position - window
    return mask


def pairs(num_queries: int, num_keys: int, causal: bool = False, window: int = -1) -> int:
    """How many (query, key) pairs a mask lets through, without making it."""
    total = 0
    for position in range(num_keys - num_queries, num_keys):
        last = min(position, num_keys - 1) if causal else num_keys - 1
        first = max(0, position - window) if window >= 0 else 0
        total += max(0, last - first + 1)
    return total


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dtype: torch.dtype,
    *,
    causal: bool = False,
    window: int = -1,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    dout: Tensor | None = None,
    score_from: int | None = None,
    score_reduce: str = "sum",
) -> dict[str, Tensor]:
    """One KV head: q [Sq, group, D], k and v [Sk, D], bias [group, Sq, Sk] -> out [Sq, group, D], lse [group, Sq].

    Operands in ``dtype``, softmax and results in at least float32. With ``dout`` [Sq, group, D] also dq, dk, dv
    and dbias; with ``score_from`` also scores [Sk], p of the queries from there on, reduced over them and added over
    the group; the other queries are left out then.
    """
    work = torch.promote_types(dtype, torch.float32)
    num_queries, group, D = q.shape
    num_keys, scale = k.shape[0], D**-0.5
    out, dq = (torch.zeros(num_queries, group, D, dtype=work, device=q.device) for _ in range(2))
    lse = torch.empty(group, num_queries, dtype=work, device=q.device)
    dk, dv = (torch.zeros(num_keys, D, dtype=work, device=q.device) for _ in range(2))
    scores = torch.zeros(group, num_keys, dtype=work, device=q.device)
    dbias = torch.empty(group, num_queries if dout is not None else 0, num_keys, dtype=work, device=q.device)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a.to(dtype) @ b.to(dtype)).to(work)

    step = max(1, _TILE_ELEMENTS // max(1, num_keys))
    for start in range(score_from or 0, num_queries, step):
        rows = torch.arange(start, min(num_queries, start + step), device=q.device)
        seen = visible(rows, num_queries, num_keys, causal, window)
        for h in range(group):
            s = product(q[rows, h], k.T) * scale
            t = torch.tanh(s / softcap) if softcap else None
            s = s if t is None else softcap * t
            s = s if bias is None else s + bias[h, rows].to(work)
            s = s.masked_fill(~seen, -math.inf)
            lse[h, rows] = s.logsumexp(-1)
            p = s.softmax(-1).masked_fill(~seen, 0.0)
            out[rows, h] = product(p, v)
            if score_from is not None:
                if score_reduce == "sumsq":
                    p = p * p
                scores[h] = torch.maximum(scores[h], p.amax(0)) if score_reduce == "max" else scores[h] + p.sum(0)
            elif dout is not None:
                gradient = dout[rows, h]
                delta = (gradient.to(work) * out[rows, h].to(dtype).to(work)).sum(-1, keepdim=True)
                ds = (product(gradient, v.T) - delta) * p
                dbias[h, rows] = ds
                ds = ds if t is None else ds * (1 - t * t)
                dq[rows, h] = product(ds, k) * scale
                dk += product(ds.T, q[rows, h]) * scale
                dv += product(p.T, gradient)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "dbias": dbias, "scores": scores.sum(0)}
