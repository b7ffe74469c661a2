"""Column reductions of the softmax on the CPU: a tile of keys stays in the cache, and all queries that see it are read.

p = exp(s - lse) is computed again and reduced at once, so the matrix is never in memory. A tile of keys is one item of
work: the bits do not depend on the number of threads.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import float32, float64, int32, int64, uint8

from kvops.kernels.cpu.arguments import Binding, unpack
from kvops.kernels.cpu.elements import FORMATS, LOG2_E, exp2, larger, padded, widen
from kvops.kernels.cpu.jit import inner, jit
from kvops.kernels.cpu.threads import run_shares, worth
from kvops.kernels.cpu.vector import NOTHING, address_of, multiply_add
from kvops.prepared import prepared

KEYS = 64  # of a tile
ROWS = 32  # queries of a tile
_FAR = 1 << 40  # a limit beyond every distance
SUM, SUM_OF_SQUARES, MAX, MEAN = range(4)
_REDUCE = {"sum": SUM, "sumsq": SUM_OF_SQUARES, "max": MAX, "mean": MEAN}


class Call(NamedTuple):
    """Packed sequences are the rows of one; what is not given has size 0."""

    q: uint8[:, :, :, :]  # [B, Sq, Hq, D]
    k: uint8[:, :, :, :]  # [B, Sk, Hkv, D]
    lse: float32[:, :, :]  # [B, Hq, Sq]
    slopes: float32[:, :]  # [B, Hq]
    cu_seqlens_q: int32[:]  # [sequences + 1], of packed sequences
    cu_seqlens_k: int32[:]
    scores: float32[:, :, :]  # [B, Hkv, Sk]
    element: int64
    head_dim: int64
    left: int64  # how many keys before and after its own place a query sees
    right: int64
    query_start: int64
    reduce: int64
    group: int64
    scale: float64
    softcap: float64


class Sequence(NamedTuple):
    """Where the queries and keys of a sequence stand, and the first query that counts."""

    number: int64
    batch: int64
    first_q: int64
    queries: int64
    first_k: int64
    keys: int64
    start: int64


class Scratch(NamedTuple):
    row: float32[::1]  # [D], in whole vectors
    queries: float32[:, ::1]  # [ROWS, D]
    keys: float32[:, ::1]  # [D, KEYS]
    key_rows: int64[::1]  # [D], their addresses
    s: float32[:, ::1]  # [ROWS, KEYS]
    part: float32[::1]  # [KEYS], of a tile of queries
    total: float64[::1]  # [KEYS], of one head: long sums lose nothing


@inner
def _sequence(call, b):
    if call.cu_seqlens_q.size:
        first_q, first_k = np.int64(call.cu_seqlens_q[b]), np.int64(call.cu_seqlens_k[b])
        queries, keys = call.cu_seqlens_q[b + 1] - first_q, call.cu_seqlens_k[b + 1] - first_k
        batch = 0
    else:
        first_q, first_k, queries, keys, batch = 0, 0, call.q.shape[1], call.k.shape[1], b
    start = call.query_start if call.query_start >= 0 else max(0, call.query_start + queries)
    return Sequence(b, batch, first_q, queries, first_k, keys, start)


@jit
def _address(x, row):
    return address_of(x) + row * x.strides[0]


@inner
def _score(call, scratch, sequence, head, first, rows):
    """s = the products of ``rows`` queries from ``first`` on with the keys of the tile."""
    q = call.q[sequence.batch, sequence.first_q + first : sequence.first_q + first + rows, head]
    for r in range(rows):
        widen(_address(q, r), call.element, call.head_dim, _address(scratch.queries, r))
    scratch.s[:] = 0
    multiply_add(scratch.queries, rows, call.head_dim, scratch.key_rows, KEYS, scratch.s, NOTHING)


@jit
def _logarithms(s, scale, softcap, slope, place, lse):
    """Make a query's row of products log2 of p. ``place`` is how far the query is behind the tile's first key.

    The lse is taken off before the change of base: both are large where their difference, and with it p, is not.
    """
    if softcap > 0:
        for j in range(KEYS):
            s[j] = softcap * np.tanh(s[j] * (scale / softcap))
        scale = np.float32(1)
    if slope != 0:
        for j in range(KEYS):
            s[j] = s[j] * scale - slope * np.float32(abs(place - j))
        scale = np.float32(1)
    for j in range(KEYS):
        s[j] = (s[j] * scale - lse) * np.float32(LOG2_E)


@jit
def _reduce(reduce, s, total):
    """Take log2 of p of some keys into ``total``; a maximum is one of logarithms."""
    for j in range(len(s)):
        s[j] = np.float32(128) if s[j] > 128 else s[j]  # 2 ** 128 is infinite
    if reduce == MAX:
        for j in range(len(s)):
            total[j] = larger(s[j], total[j])
    elif reduce == SUM:
        for j in range(len(s)):
            total[j] += exp2(s[j])
    else:
        for j in range(len(s)):
            p = exp2(s[j])
            total[j] += p * p


@inner
def _reduce_head(call, scratch, sequence, head, first_key, keys):
    """The queries of one head that see some key of the tile, into ``total``."""
    scratch.total[:] = -np.inf if call.reduce == MAX else 0
    offset = sequence.keys - sequence.queries
    slope = call.slopes[min(sequence.number, len(call.slopes) - 1), head] if call.slopes.size else np.float32(0)
    scale, softcap = np.float32(call.scale), np.float32(call.softcap)
    begin = max(sequence.start, first_key - offset - call.right)
    end = min(sequence.queries, first_key + keys - offset + call.left)
    for first in range(begin, end, ROWS):
        rows = min(ROWS, end - first)
        _score(call, scratch, sequence, head, first, rows)
        for j in range(KEYS):
            scratch.part[j] = scratch.total[j] if call.reduce == MAX else 0
        for r in range(rows):
            lse = call.lse[sequence.batch, head, sequence.first_q + first + r]
            if np.isinf(lse):  # a query that sees no key
                continue
            place = first + r + offset - first_key
            _logarithms(scratch.s[r], scale, softcap, slope, place, lse)
            low, high = max(0, place - call.left), min(keys, place + call.right + 1)
            if low < high:
                _reduce(call.reduce, scratch.s[r, low:high], scratch.part[low:high])
        for j in range(keys):
            scratch.total[j] = scratch.part[j] if call.reduce == MAX else scratch.total[j] + scratch.part[j]
    if call.reduce == MAX:
        for j in range(keys):
            scratch.total[j] = exp2(np.float32(scratch.total[j]))


@inner
def _score_tile(call, scratch, sequence, h, first_key):
    """The scores of one tile of keys of one KV head."""
    keys = min(KEYS, sequence.keys - first_key)
    members = call.q.shape[2] // call.k.shape[2]
    k = call.k[sequence.batch, sequence.first_k + first_key : sequence.first_k + first_key + keys, h]
    for j in range(keys):
        widen(_address(k, j), call.element, call.head_dim, address_of(scratch.row))
        for d in range(call.head_dim):
            scratch.keys[d, j] = scratch.row[d]
    out = call.scores[sequence.batch, h, sequence.first_k + first_key : sequence.first_k + first_key + keys]
    for member in range(members):
        _reduce_head(call, scratch, sequence, h * members + member, first_key, keys)
        for j in range(keys):
            if member == 0:
                out[j] = scratch.total[j]
            elif call.group == MAX:
                out[j] = larger(scratch.total[j], out[j])
            else:
                out[j] += scratch.total[j]
    if call.group == MEAN:
        for j in range(keys):
            out[j] /= np.float32(members)


@inner
def _scores_share(share, shares, call):
    width = padded(call.head_dim)
    scratch = Scratch(
        np.empty(width, np.float32),
        np.zeros((ROWS, width), np.float32),
        np.zeros((call.head_dim, KEYS), np.float32),
        np.empty(call.head_dim, np.int64),
        np.empty((ROWS, KEYS), np.float32),
        np.empty(KEYS, np.float32),
        np.empty(KEYS, np.float64),
    )
    for d in range(call.head_dim):
        scratch.key_rows[d] = address_of(scratch.keys) + d * scratch.keys.strides[0]
    item = 0
    for b in range(max(len(call.cu_seqlens_q) - 1, 0) if call.cu_seqlens_q.size else call.q.shape[0]):
        sequence = _sequence(call, b)
        for first_key in range(0, sequence.keys, KEYS):
            for h in range(call.k.shape[2]):
                if item % shares == share:
                    _score_tile(call, scratch, sequence, h, first_key)
                item += 1


@jit
def _attention_scores(addresses, table, threads):
    call = unpack(Call, addresses, table)
    if call.scores.size == 0:
        return True
    if call.cu_seqlens_q.size:  # keys of no sequence
        call.scores[:] = 0
    queries = call.q.shape[1] if call.query_start >= 0 else min(call.q.shape[1], -call.query_start)
    products = call.q.shape[0] * queries * call.q.shape[2] * call.k.shape[1] * call.head_dim
    return run_shares(_scores_share, (call,), worth(threads, products))


def _bind(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    *,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    query_start: int = 0,
    skip_recent: int = 0,
    reduce: str = "sum",
    group: str = "sum",
) -> Binding:
    right = 0 if causal else window_right
    right = min(right, _FAR) if right >= 0 else _FAR
    slopes = None if alibi_slopes is None else alibi_slopes.float()
    if q.dim() == 3:
        q, k, lse = (x.unsqueeze(0) for x in (q, k, lse))
    return Binding(
        _attention_scores,
        Call,
        q=q,
        k=k,
        lse=lse,
        slopes=slopes if slopes is None or slopes.dim() == 2 else slopes[None],
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        scores=torch.empty(k.shape[0], k.shape[2], k.shape[1], dtype=torch.float32),
        element=FORMATS[q.dtype],
        head_dim=q.shape[3],
        left=min(window_left, _FAR) if window_left >= 0 else _FAR,
        right=-min(skip_recent, _FAR) if skip_recent else right,
        query_start=query_start,
        reduce=_REDUCE[reduce],
        group=_REDUCE[group],
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        softcap=softcap,
    )


def _bind_dense(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, **options: Any) -> Binding:
    return _bind(q, k, lse, None, None, **options)


def _bind_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Any,
) -> Binding:
    return _bind(q, k, lse, cu_seqlens_q, cu_seqlens_k, **options)


def _slopes(alibi_slopes: torch.Tensor | None) -> torch.Tensor | None:
    return None if alibi_slopes is None else alibi_slopes.float()


@prepared(_bind_dense)
def attention_scores(
    binding: Binding,
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    *,
    alibi_slopes: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """See :func:`kvops.attention_scores`."""
    scores = torch.empty(k.shape[0], k.shape[2], k.shape[1], dtype=torch.float32)
    binding(q, k, lse, _slopes(alibi_slopes), None, None, scores)
    return scores


@prepared(_bind_packed)
def attention_scores_varlen(
    binding: Binding,
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    alibi_slopes: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """See :func:`kvops.attention_scores_varlen`."""
    scores = torch.empty(k.shape[1], k.shape[0], dtype=torch.float32)
    binding(q, k, lse, _slopes(alibi_slopes), cu_seqlens_q, cu_seqlens_k, scores)
    return scores
