"""Column reductions of the softmax: schemas, checks, fakes and the public functions."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kvops import checks
from kvops.eager import scores as eager
from kvops.eager import varlen as eager_varlen
from kvops.ops.dense import (
    DENSE,
    PACKED,
    check_lengths,
    check_lengths_data,
    check_options,
    check_queries_and_keys,
    check_rows,
)
from kvops.ops.registry import caller, register

_OPTIONS = (
    "bool causal=False, int window_left=-1, int window_right=-1, float? scale=None, float softcap=0.0, "
    'Tensor? alibi_slopes=None, int query_start=0, int skip_recent=0, str reduce="sum", str group="sum"'
)


def _check_scores(q: Tensor, k: Tensor, lse: Tensor, **options: Any) -> None:
    check_queries_and_keys(q, k, DENSE)
    _check_scoring(q, lse, q.shape[0], **options)


def _check_scoring(
    q: Tensor,
    lse: Tensor,
    batch: int,
    *,
    query_start: int = 0,
    skip_recent: int = 0,
    reduce: str = "sum",
    group: str = "sum",
    **options: Any,
) -> None:
    check_rows("lse", lse, q)
    check_options(q, batch, **options)
    checks.expect_at_least("skip_recent", skip_recent, 0)
    checks.expect_choice("reduce", reduce, ("sum", "sumsq", "max"))
    checks.expect_choice("group", group, ("sum", "mean", "max"))


def _fake_scores(q: Tensor, k: Tensor, lse: Tensor, **options: object) -> Tensor:
    return q.new_empty(k.shape[0], k.shape[2], k.shape[1], dtype=torch.float32)


_scores_op = caller(
    register(
        f"attention_scores(Tensor q, Tensor k, Tensor lse, *, {_OPTIONS}) -> Tensor",
        check=_check_scores,
        fake=_fake_scores,
        eager=eager.attention_scores,
        kernel="kvops.kernels.attention_scores:attention_scores",
        cpu="kvops.kernels.cpu.attention_scores:attention_scores",
        autocast=("q", "k"),
    )
)


def _check_varlen(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Any,
) -> None:
    check_queries_and_keys(q, k, PACKED)
    check_lengths(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    _check_scoring(q, lse, cu_seqlens_q.shape[0] - 1, **options)


def _check_varlen_data(q: Tensor, k: Tensor, lse: Tensor, *lengths: Any, **options: Any) -> None:
    check_lengths_data(len(q), len(k), *lengths)


def _fake_varlen(q: Tensor, k: Tensor, *rest: object, **options: object) -> Tensor:
    return q.new_empty(k.shape[1], k.shape[0], dtype=torch.float32)


_varlen_op = caller(
    register(
        "attention_scores_varlen(Tensor q, Tensor k, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
        f"SymInt max_seqlen_q, SymInt max_seqlen_k, *, {_OPTIONS}) -> Tensor",
        check=_check_varlen,
        check_data=_check_varlen_data,
        fake=_fake_varlen,
        eager=eager_varlen.attention_scores_varlen,
        kernel="kvops.kernels.attention_scores:attention_scores_varlen",
        cpu="kvops.kernels.cpu.attention_scores:attention_scores_varlen",
        autocast=("q", "k"),
    )
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
    reduce: Literal["sum", "sumsq", "max"] = "sum",
    group: Literal["sum", "mean", "max"] = "sum",
) -> Tensor:
    """The attention that each key receives: the softmax reduced over its queries, without the matrix in memory.

    The probability of a key is ``exp(score - lse)``, with lse from :func:`kvops.flash_attention` called with the same
    options; sinks are in lse already. No gradient.

    Args:
        q: ``[B, Sq, Hq, D]``.
        k: ``[B, Sk, Hkv, D]``.
        lse: ``[B, Hq, Sq]``, float32.
        causal, window_left, window_right, scale, softcap, alibi_slopes: as in the forward.
        query_start: the first query that counts; a negative number counts from the end, so -w means the last w.
        skip_recent: n > 0: a key counts only for queries at least n positions after it.
        reduce: over the queries, ``"sum"`` of p, ``"sumsq"`` of p squared or ``"max"`` of p.
        group: over the query heads of a group, ``"sum"``, ``"mean"`` or ``"max"``. Where p is NaN, so is the score, or
            +inf with a maximum on a GPU.

    Returns:
        float32 ``[B, Hkv, Sk]``, 0 for a key that no query sees.

    Raises:
        ValueError: shapes, strides, devices or values that do not fit.
        TypeError: dtypes that do not fit.
        RuntimeError: an input requires a gradient.

    Sums over all queries are the scores of H2O (Zhang et al., 2023, arXiv:2306.14048), over the last w those of SnapKV
    (Li et al., 2024, arXiv:2404.14469), squares those of KV-Compress (Rehg, 2024, arXiv:2410.00161).
    """
    return _scores_op(
        q,
        k,
        lse,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        query_start=query_start,
        skip_recent=skip_recent,
        reduce=reduce,
        group=group,
    )


def attention_scores_varlen(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    query_start: int = 0,
    skip_recent: int = 0,
    reduce: Literal["sum", "sumsq", "max"] = "sum",
    group: Literal["sum", "mean", "max"] = "sum",
) -> Tensor:
    """:func:`attention_scores` over packed sequences.

    Args:
        q: ``[Tq, Hq, D]``.
        k: ``[Tk, Hkv, D]``.
        lse: ``[Hq, Tq]``, float32.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as in :func:`kvops.flash_attention_varlen`.
        query_start: the first query of each sequence that counts; -w is the last w of each sequence.
        causal, window_left, window_right, scale, softcap, alibi_slopes, skip_recent, reduce, group: as in
            :func:`attention_scores`.

    Returns:
        float32 ``[Hkv, Tk]``, 0 for a key that no query sees.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`attention_scores`.
    """
    return _varlen_op(
        q,
        k,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        query_start=query_start,
        skip_recent=skip_recent,
        reduce=reduce,
        group=group,
    )
