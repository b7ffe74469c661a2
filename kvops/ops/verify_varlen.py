"""Draft verification of packed requests: an operator for drafts; trees are padded on the device."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvops import checks
from kvops.eager import verify as eager
from kvops.ops.dense import check_ends
from kvops.ops.registry import caller, register
from kvops.ops.verify import check_draft_data, check_sampling, draw_seed
from kvops.ops.verify_tree import verify_tree
from kvops.packed import padded, starts_and_lengths, verify_padded


def _check_packed(target_logits: Tensor, draft_tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    checks.expect_tensor("target_logits", target_logits)
    checks.expect_rank("target_logits", target_logits, "[rows, vocab]")
    checks.expect_tensor("draft_tokens", draft_tokens)
    checks.expect_rank("draft_tokens", draft_tokens, "[tokens]")
    checks.expect_dtype("cu_seqlens", cu_seqlens, torch.int32)
    checks.expect_rank("cu_seqlens", cu_seqlens, "[batch + 1]")
    checks.expect_at_least("cu_seqlens.shape[0] (batch + 1)", cu_seqlens.shape[0], 1)
    checks.expect_same_device("cu_seqlens", cu_seqlens, "target_logits", target_logits)
    checks.expect_same_device("draft_tokens", draft_tokens, "target_logits", target_logits)
    checks.expect_at_least("max_seqlen", max_seqlen, 0)


def _check_lengths(draft_tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    """Check the values of cumulative lengths. Synchronises."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0:
        raise ValueError(f"cu_seqlens: expected a leading 0, got {ends[0]}")
    check_ends("", "draft_tokens", draft_tokens.shape[0], ends, max_seqlen)


def _check_draft_varlen(
    target_logits: Tensor,
    draft_tokens: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    draft_probs: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    method: str = "token",
) -> None:
    checks.expect_choice("method", method, ("token", "block"))
    _check_packed(target_logits, draft_tokens, cu_seqlens, max_seqlen)
    batch, N, (rows, V) = cu_seqlens.shape[0] - 1, draft_tokens.shape[0], target_logits.shape
    if rows != N + batch:
        raise ValueError(
            f"target_logits: expected {N + batch} rows, one for each of {N} drafts and one more for each of {batch} "
            f"requests, got {rows}"
        )
    checks.expect_dtype("target_logits", target_logits, *checks.FLOAT_DTYPES)
    checks.expect_last_contiguous("target_logits", target_logits)
    checks.expect_at_least("target_logits.shape[1] (vocab)", V, 1)
    checks.expect_dtype("draft_tokens", draft_tokens, torch.int64)
    if draft_probs is not None:
        checks.expect_dtype("draft_probs", draft_probs, torch.float32)
        checks.expect_shape("draft_probs", draft_probs, "[tokens, vocab]", N, V)
        checks.expect_last_contiguous("draft_probs", draft_probs)
        checks.expect_same_device("draft_probs", draft_probs, "target_logits", target_logits)
    check_sampling(cu_seqlens[1:], temperature, seed, step)


def _check_draft_varlen_data(
    target_logits: Tensor,
    draft_tokens: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    draft_probs: Tensor | None = None,
    temperature: Tensor | None = None,
    **others: object,
) -> None:
    _check_lengths(draft_tokens, cu_seqlens, max_seqlen)
    if checks.debug():
        arguments = target_logits, draft_tokens, cu_seqlens, max_seqlen
        verify_padded(check_draft_data, *arguments, draft_probs=draft_probs, temperature=temperature)


def _fake_draft_varlen(
    target_logits: Tensor, draft_tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int, **options: object
) -> tuple[Tensor, Tensor]:
    B = cu_seqlens.shape[0] - 1
    return draft_tokens.new_empty((B, max_seqlen + 1)), draft_tokens.new_empty(B, dtype=torch.int32)


_verify_draft_varlen = caller(
    register(
        "verify_draft_varlen(Tensor target_logits, Tensor draft_tokens, Tensor cu_seqlens, SymInt max_seqlen, *, "
        "Tensor? draft_probs=None, Tensor? temperature=None, Tensor? seed=None, Tensor? step=None, "
        "str method='token') -> (Tensor, Tensor)",
        check=_check_draft_varlen,
        check_data=_check_draft_varlen_data,
        fake=_fake_draft_varlen,
        eager=eager.verify_draft_varlen,
        kernel="kvops.kernels.verify_draft:verify_draft_varlen",
        cpu="kvops.kernels.cpu.verify_draft:verify_draft_varlen",
    )
)


def verify_draft_varlen(
    target_logits: Tensor,
    draft_tokens: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    draft_probs: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    method: Literal["token", "block"] = "token",
) -> tuple[Tensor, Tensor]:
    """:func:`verify_draft` for packed requests: drafts of different lengths without padding.

    Request b has the drafts ``draft_tokens[cu_seqlens[b] : cu_seqlens[b + 1]]`` and as many rows of logits and one
    more: its first row is number ``cu_seqlens[b] + b``. The tokens are those of :func:`verify_draft`. The CPU kernel
    reads rows where they lie. On a GPU they are gathered into padded ones first, without synchronising the host: that
    writes and reads ``B * (max_seqlen + 1)`` rows once.

    Args:
        target_logits: float16, bfloat16 or float32 ``[N + B, V]`` for N drafts of B requests, the last dimension
            contiguous.
        draft_tokens: int64 or int32 ``[N]`` (the operator itself takes int64).
        cu_seqlens: int32 ``[B + 1]``, the cumulative number of drafts, with a leading 0. Drafts after the last of them
            belong to no request.
        max_seqlen: the most drafts of a request, or more.
        draft_probs: float32 ``[N, V]``.
        temperature, seed, step, method: as in :func:`verify_draft`.

    Returns:
        ``tokens`` ``[B, max_seqlen + 1]`` in the dtype of ``draft_tokens``, and ``num_accepted`` int32 ``[B]``, as
        :func:`verify_draft` returns them.

    Raises:
        ValueError, TypeError: as :func:`verify_draft`. ValueError for invalid ``cu_seqlens``, on the CPU, and elsewhere
            with ``KVOPS_DEBUG=1``.
    """
    tokens, num_accepted = _verify_draft_varlen(
        target_logits,
        checks.expect_tokens("draft_tokens", draft_tokens),
        cu_seqlens,
        max_seqlen,
        draft_probs=draft_probs,
        temperature=temperature,
        seed=draw_seed(temperature, seed),
        step=step,
        method=method,
    )
    return tokens.to(draft_tokens.dtype), num_accepted


def verify_tree_varlen(
    target_logits: Tensor,
    draft_tokens: Tensor,
    parents: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    draft_probs: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    step: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`verify_tree` for packed requests: trees of different sizes without padding.

    The nodes of request b are ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``, the root first. Rows are gathered into padded
    ones first, without synchronising the host: that writes and reads ``B * max_seqlen`` rows once.

    Args:
        target_logits: float16, bfloat16 or float32 ``[N, V]`` for N nodes of B requests.
        draft_tokens: int64 or int32 ``[N]``.
        parents: int32 ``[N]``: numbers of nodes within their own request, as in :func:`verify_tree`.
        cu_seqlens: int32 ``[B + 1]``, the cumulative number of nodes, with a leading 0. Nodes after the last of them
            belong to no request. A request without nodes emits nothing.
        max_seqlen: the most nodes of a request, at least 1, or more.
        draft_probs: float32 ``[N, V]``.
        temperature, seed, step: as in :func:`verify_tree`.

    Returns:
        ``path`` int32 ``[B, max_seqlen]``, ``tokens`` ``[B, max_seqlen]`` in the dtype of ``draft_tokens``, and
        ``num_accepted`` int32 ``[B]``, as :func:`verify_tree` returns them.

    Raises:
        ValueError, TypeError: as :func:`verify_tree`. ValueError for invalid ``cu_seqlens``, on the CPU, and elsewhere
            with ``KVOPS_DEBUG=1``.
    """
    _check_packed(target_logits, draft_tokens, cu_seqlens, max_seqlen)
    if checks.may_look(cu_seqlens):
        _check_lengths(draft_tokens, cu_seqlens, max_seqlen)
    N, V = target_logits.shape
    checks.expect_at_least("max_seqlen", max_seqlen, 1)
    checks.expect_shape("draft_tokens", draft_tokens, "[nodes]", N)
    checks.expect_dtype("parents", parents, torch.int32)
    checks.expect_shape("parents", parents, "[nodes]", N)
    checks.expect_same_device("parents", parents, "target_logits", target_logits)
    if draft_probs is not None:
        checks.expect_tensor("draft_probs", draft_probs)
        checks.expect_shape("draft_probs", draft_probs, "[nodes, vocab]", N, V)
        checks.expect_same_device("draft_probs", draft_probs, "target_logits", target_logits)
    starts, lens = starts_and_lengths(cu_seqlens)
    beyond = torch.arange(max_seqlen, device=lens.device) >= lens[:, None]
    path, tokens, accepted = verify_tree(
        padded(target_logits, starts, max_seqlen),
        padded(draft_tokens, starts, max_seqlen),
        padded(parents, starts, max_seqlen).masked_fill(beyond, -1),
        draft_probs=None if draft_probs is None else padded(draft_probs, starts, max_seqlen),
        temperature=temperature,
        seed=seed,
        step=step,
    )
    nobody = (lens == 0)[:, None]
    return path.masked_fill(nobody, -1), tokens.masked_fill(nobody, -1), accepted
