"""Attention over a paged cache of latents (multi-head latent attention): schema, checks, fake, public function."""

from __future__ import annotations

import torch
from torch import Tensor

from kvops import checks
from kvops.eager import paged as eager
from kvops.ops.dense import check_scores
from kvops.ops.paged_checks import (
    check_given_schedule,
    check_lists,
    check_out,
    check_packed,
    check_packed_queries,
    check_q_lens,
    check_scale,
    check_schedule_data,
    scale_tensor,
)
from kvops.ops.registry import caller, register

# The widest tiles that the kernel is proven for; DeepSeek's latents have 512 columns and 64 behind them.
_MOST_VALUES, _MOST_ROTARY = 512, 64


def _check(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    value_dim: int,
    scale: float,
    q_lens: Tensor | None = None,
    causal: bool = True,
    softcap: float = 0.0,
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    out: Tensor | None = None,
    cache_scale: Tensor | None = None,
) -> None:
    batch, _ = check_packed("q", q, "query_heads, head_dim", q_lens, cu_seqlens_q, max_seqlen_q)
    checks.expect_dtype("q", q, *checks.FLOAT_DTYPES)
    checks.expect_last_contiguous("q", q)
    query_heads, head_dim = q.shape[-2:]
    heads = check_lists("cache", cache, block_tables, seq_lens, reference_name="q", reference=q, batch=batch)
    checks.expect_dtype("cache", cache, *checks.FLOAT_DTYPES, *checks.QUANTISED_DTYPES)
    if cache.dtype not in checks.QUANTISED_DTYPES:
        checks.expect_same_dtype("q", q, "cache", cache)
    check_scale("cache_scale", cache_scale, "cache", cache, heads, "q", q)
    checks.expect_last_contiguous("cache", cache)
    checks.expect_same_device("cache", cache, "q", q)
    checks.expect_head_ratio("q", query_heads, "cache" if cache.dim() == 4 else "block_tables", heads)
    checks.expect_int("value_dim", value_dim, 1)
    checks.expect_between("value_dim", value_dim, 1, _MOST_VALUES)
    if not 1 <= head_dim - value_dim <= _MOST_ROTARY:
        raise ValueError(
            f"value_dim: expected 1 to {_MOST_ROTARY} columns of the cache behind those of the values, got {value_dim} "
            f"of {head_dim} columns; use paged_attention for keys and values of two tensors"
        )
    check_scores(scale, softcap)
    check_q_lens(q_lens, "q", q)
    check_out(out, q, value_dim)
    if schedule is not None:
        check_given_schedule(schedule, batch if cache.dim() == 4 else batch * heads, "q", q)
    if checks.debug() and checks.has_data(seq_lens):
        checks.expect_inside(block_tables, seq_lens, *cache.shape[:2])
        if schedule is not None:
            check_schedule_data(schedule, seq_lens, cache.shape[1], batch_invariant)


def _fake(
    q: Tensor, *args: Tensor, value_dim: int, out: Tensor | None = None, **kwargs: object
) -> tuple[Tensor, Tensor]:
    *batch, tokens, query_heads, _ = q.shape
    result = q.new_empty(*batch, tokens, query_heads, value_dim) if out is None else q.new_empty(0)
    return result, q.new_empty(*batch, query_heads, tokens, dtype=torch.float32)


_attention = register(
    "paged_latent_attention(Tensor q, Tensor cache, Tensor block_tables, Tensor seq_lens, *, int value_dim, "
    "float scale, Tensor? q_lens=None, bool causal=True, float softcap=0.0, Tensor? schedule=None, "
    "bool batch_invariant=False, Tensor? cu_seqlens_q=None, SymInt? max_seqlen_q=None, Tensor(a!)? out=None, "
    "Tensor? cache_scale=None) "
    "-> (Tensor out, Tensor lse)",
    check=_check,
    check_data=check_packed_queries,
    data="cu_seqlens_q",
    fake=_fake,
    eager=eager.paged_latent_attention,
    kernel="kvops.kernels.paged_latent_attention:paged_latent_attention",
    cpu="kvops.kernels.cpu.paged_latent_attention:paged_latent_attention",
    autocast=("q",),
    autocast_like=("cache",),
)
_call = caller(_attention)


# Over 80 lines: a signature, its documentation and one call.
def paged_latent_attention(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    value_dim: int,
    scale: float,
    q_lens: Tensor | None = None,
    causal: bool = True,
    softcap: float = 0.0,
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    out: Tensor | None = None,
    cache_scale: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over a paged cache whose values are the first columns of its keys: multi-head latent attention (MLA).

    A slot has a latent of ``value_dim`` columns and a rotary part of the other ``D - value_dim``. The whole slot is the
    key and its latent is the value, so each slot is read once. The queries are absorbed: the part of a query head that
    meets the latent has been multiplied by the head's up-projection of keys, and ``out`` is still to be multiplied by
    its up-projection of values. Everything else is as in :func:`paged_attention`: T = 1 is decoding, lengths include
    the T tokens, ``cu_seqlens_q`` packs the tokens of all sequences, and :func:`paged_append` writes a slot through two
    views of the cache.

    Args:
        q: ``[B, T, Hq, D]``, or packed ``[tokens, Hq, D]``; float16, bfloat16 or float32; the columns in the order of
            the cache's. Query head h reads list ``h // (Hq // Hkv)``; MLA has one list a sequence, Hkv = 1.
        cache: ``[num_blocks, block_size, D]`` with one head's slots to a block, or ``[num_blocks, block_size, Hkv, D]``
            with any strides; the dtype of ``q``, or float8_e4m3fn, float8_e5m2 or int8.
        block_tables: int32 ``[B, Hkv, max_blocks]`` (``[B, max_blocks]`` for a 4-D cache). Entries past a length are
            never read.
        seq_lens: int32 ``[B, Hkv]`` (``[B]``).
        value_dim: the columns of the latent, up to 512; 1 to 64 columns must be behind them. Powers of two are not
            padded.
        scale: of the scores. There is no default: it follows from the head size before the absorption,
            ``(128 + 64) ** -0.5`` in DeepSeek-V3, and not from ``D``.
        q_lens: int32 ``[B]``, how many of the T tokens are real; they come first. Not with ``cu_seqlens_q``.
        causal: False lets every token see the whole list.
        softcap: c > 0 replaces a scaled score s by ``c * tanh(s / c)``.
        schedule: :func:`paged_schedule` of these ``seq_lens`` and this ``batch_invariant``. None computes it in this
            call.
        batch_invariant: a sequence's results then have the same bits in any batch, for the same T and the same device.
            Every 256 slots have a partial result of their own, which is about as large as they are. Calls whose
            partial results need more than 256 MiB run in parts of the batch, without the ``schedule`` of the whole.
            Lists are not cut for more than 512 query rows (T times the heads of a list).
        cu_seqlens_q: int32 ``[B + 1]``, where the packed tokens of each sequence begin, and where the last ones end.
        max_seqlen_q: along with ``cu_seqlens_q``: the most new tokens of a sequence, or more.
        out: written and returned; the shape and dtype of the result, its last dimension contiguous.
        cache_scale: of a float8 or int8 ``cache``, a float or float32 ``[Hkv]``: the slots are ``cache_scale * cache``.

    Returns:
        out ``[B, T, Hq, value_dim]`` or ``[tokens, Hq, value_dim]`` in the dtype of ``q``, lse float32 ``[B, Hq, T]``
        or ``[Hq, tokens]``, natural logarithm. Rows from ``q_lens`` on, and rows that see nothing, have out 0 and lse
        -inf. Packed tokens of no sequence have out 0 and lse -inf; a given ``out`` keeps what it has there.

    Raises:
        ValueError: wrong rank, shape, device, strides, head ratio or value; one of two arguments that belong together;
            on the CPU, and elsewhere with ``KVOPS_DEBUG=1``, invalid ``cu_seqlens_q``, and table entries and lengths
            out of range.
        TypeError: wrong dtype.
        RuntimeError: an input requires a gradient.

    MLA is of DeepSeek-V2 (DeepSeek-AI, 2024).
    """
    result, lse = _call(
        q,
        cache,
        block_tables,
        seq_lens,
        value_dim=value_dim,
        scale=scale,
        q_lens=q_lens,
        causal=causal,
        softcap=softcap,
        schedule=schedule,
        batch_invariant=batch_invariant,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        out=out,
        cache_scale=scale_tensor("cache_scale", cache_scale, "q", q),
    )
    return (result if out is None else out), lse
