"""Argument checks that the operators over dense and packed tensors share."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kvops import checks

DENSE = "[batch, seqlen, heads, head_dim]"
PACKED = "[total_tokens, heads, head_dim]"


def check_tokens(name: str, tensor: Tensor, layout: str, q: Tensor) -> None:
    """A tensor of tokens in the layout, dtype and device of ``q``."""
    checks.expect_rank(name, tensor, layout)
    checks.expect_dtype(name, tensor, *checks.FLOAT_DTYPES)
    checks.expect_same_dtype(name, tensor, "q", q)
    checks.expect_same_device(name, tensor, "q", q)
    checks.expect_last_contiguous(name, tensor)


def check_queries_and_keys(q: Tensor, k: Tensor, layout: str) -> None:
    check_tokens("q", q, layout, q)
    check_tokens("k", k, layout, q)
    checks.expect_at_least("q.shape[-1] (head_dim)", q.shape[-1], 1)
    if layout == DENSE:
        checks.expect_shape("k", k, layout, q.shape[0], None, None, q.shape[3])
    else:
        checks.expect_shape("k", k, layout, None, None, q.shape[2])
    checks.expect_head_ratio("q", q.shape[-2], "k", k.shape[-2])


def check_values(v: Tensor, k: Tensor, q: Tensor, layout: str) -> None:
    check_tokens("v", v, layout, q)
    checks.expect_shape("v", v, layout, *k.shape[:-1], None)
    checks.expect_at_least("v.shape[-1] (head_dim)", v.shape[-1], 1)


def check_rows(name: str, tensor: Tensor, q: Tensor) -> None:
    """float32 [batch, heads, seqlen], or [heads, total_tokens] beside packed queries: an lse or its gradient."""
    checks.expect_dtype(name, tensor, torch.float32)
    if q.dim() == 4:
        checks.expect_shape(name, tensor, "[batch, heads, seqlen]", q.shape[0], q.shape[2], q.shape[1])
    else:
        checks.expect_shape(name, tensor, "[heads, total_tokens]", q.shape[1], q.shape[0])
    checks.expect_same_device(name, tensor, "q", q)
    checks.expect_last_contiguous(name, tensor)


def check_scores(scale: float | None, softcap: float) -> None:
    """Check the scale and the cap of the scores."""
    if scale is not None:
        checks.expect_finite("scale", scale)
    checks.expect_at_least("softcap", softcap, 0.0)
    checks.expect_finite("softcap", softcap)


def check_options(
    q: Tensor,
    batch: int,
    *,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> None:
    """Check the options of attention. The dispatcher passes only those that differ from their defaults."""
    checks.expect_at_least("window_left", window_left, -1)
    checks.expect_at_least("window_right", window_right, -1)
    check_scores(scale, softcap)
    heads = q.shape[-2]
    if sinks is not None:
        checks.expect_dtype("sinks", sinks, *checks.FLOAT_DTYPES)
        checks.expect_shape("sinks", sinks, "[heads]", heads)
        checks.expect_same_device("sinks", sinks, "q", q)
        checks.expect_last_contiguous("sinks", sinks)
    check_slopes(alibi_slopes, batch, q)
    check_dropout(dropout_p, dropout_seed, q)


def check_dropout(dropout_p: float, dropout_seed: Tensor | None, q: Tensor) -> None:
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected a probability from 0 to below 1, got {dropout_p}")
    if dropout_seed is not None:
        checks.expect_tensor("dropout_seed", dropout_seed)
        checks.expect_dtype("dropout_seed", dropout_seed, torch.int64)
        checks.expect_shape("dropout_seed", dropout_seed, "[1]", 1)
        checks.expect_same_device("dropout_seed", dropout_seed, "q", q)
    elif dropout_p > 0:
        raise ValueError(
            f"dropout_seed: expected an int64 tensor [1] along with dropout_p = {dropout_p}, got None: draw one with "
            "torch.randint, as kvops.flash_attention does"
        )


def seed_for(dropout_p: float, dropout_seed: Tensor | None, q: Tensor) -> Tensor | None:
    """The seed of a call: ``dropout_seed``, or one from the random number generator of q's device if dropout needs
    one. Nothing waits for the device."""
    if dropout_seed is None and isinstance(q, Tensor) and 0 < dropout_p < 1:
        return torch.randint(-(2**63), 2**63 - 1, (1,), device=q.device)
    return dropout_seed


def check_slopes(alibi_slopes: Tensor | None, batch: int, q: Tensor) -> None:
    if alibi_slopes is None:
        return
    heads = q.shape[-2]
    checks.expect_dtype("alibi_slopes", alibi_slopes, *checks.FLOAT_DTYPES)
    if alibi_slopes.dim() == 2:
        checks.expect_shape("alibi_slopes", alibi_slopes, "[batch, heads]", batch, heads)
    else:
        checks.expect_shape("alibi_slopes", alibi_slopes, "[heads]", heads)
    checks.expect_same_device("alibi_slopes", alibi_slopes, "q", q)
    checks.expect_last_contiguous("alibi_slopes", alibi_slopes)


def check_bias(bias: Tensor, q: Tensor, num_keys: int) -> None:
    """A float bias or a bool mask that broadcasts to [batch, heads, seqlen_q, seqlen_k], or beside packed queries to
    [heads, total_q, max_seqlen_k]; any strides."""
    checks.expect_tensor("bias", bias)
    checks.expect_dtype("bias", bias, torch.bool, *checks.FLOAT_DTYPES)
    if q.dim() == 4:
        names, sizes = "[batch, heads, seqlen_q, seqlen_k]", [q.shape[0], q.shape[2], q.shape[1], num_keys]
    else:
        names, sizes = "[heads, total_q, max_seqlen_k]", [q.shape[1], q.shape[0], num_keys]
    own = list(bias.shape)
    if len(own) > len(sizes) or any(
        size not in (1, whole) for size, whole in zip(reversed(own), reversed(sizes), strict=False)
    ):
        raise ValueError(f"bias: expected a shape that broadcasts to {names} = {sizes}, got {own}")
    checks.expect_same_device("bias", bias, "q", q)


def check_lengths(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> None:
    """Check the cumulative lengths of packed sequences, except for their values: see :func:`check_lengths_data`."""
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        checks.expect_rank(name, cu_seqlens, "[batch + 1]")
        checks.expect_dtype(name, cu_seqlens, torch.int32)
        checks.expect_same_device(name, cu_seqlens, "q", q)
        checks.expect_last_contiguous(name, cu_seqlens)
        checks.expect_at_least(f"{name}.shape[0] (batch + 1)", cu_seqlens.shape[0], 1)
    checks.expect_shape("cu_seqlens_k", cu_seqlens_k, "[batch + 1]", cu_seqlens_q.shape[0])
    checks.expect_at_least("max_seqlen_q", max_seqlen_q, 0)
    checks.expect_at_least("max_seqlen_k", max_seqlen_k, 0)


def check_lengths_data(
    tokens_q: int, tokens_k: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> None:
    """Check the values of cumulative lengths. Synchronises."""
    for side, tokens, cu_seqlens, longest in (
        ("q", tokens_q, cu_seqlens_q, max_seqlen_q),
        ("k", tokens_k, cu_seqlens_k, max_seqlen_k),
    ):
        ends = cu_seqlens.tolist()
        if ends[0] != 0:
            raise ValueError(f"cu_seqlens_{side}: expected a leading 0, got {ends[0]}")
        check_ends(f"_{side}", side, tokens, ends, longest)


def check_ends(suffix: str, tokens_name: str, tokens: int, ends: list[int], longest: int) -> None:
    """Check where packed sequences begin and end: ``cu_seqlens<suffix>`` as a list."""
    for sequence, (start, end) in enumerate(pairwise(ends)):
        if not 0 <= end - start <= longest:
            raise ValueError(
                f"cu_seqlens{suffix}: expected lengths from 0 to max_seqlen{suffix} = {longest}, got {end - start} of "
                f"sequence {sequence} (from {start} to {end})"
            )
    if ends[-1] > tokens:
        raise ValueError(
            f"cu_seqlens{suffix}: expected ends within the {tokens} tokens of {tokens_name}, got {ends[-1]}"
        )
