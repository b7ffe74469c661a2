"""Dense and packed attention with flash-attn's names and layouts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvops import checks
from kvops.integrations.flash_attn.lengths import Lengths
from kvops.integrations.flash_attn.pages import attend_to_pages, attend_to_rows, rows_of_pages, sees_no_later_slots
from kvops.ops.attention import flash_attention
from kvops.ops.dense import check_lengths, check_lengths_data
from kvops.ops.paged import paged_attention
from kvops.ops.varlen import flash_attention_varlen

Result = Tensor | tuple[Tensor, Tensor, None]


def options_of(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    # Attention to pages has no dropout and takes no option for it.
    dropout = {"dropout_p": dropout_p} if dropout_p else {}
    return dropout | {
        "scale": softmax_scale,
        "causal": causal,
        "window_left": window_size[0],
        "window_right": window_size[1],
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }


def last_contiguous(x: Tensor) -> Tensor:
    """As in flash-attn: a copy if the last dimension is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _result(out: Tensor, lse: Tensor, return_attn_probs: bool) -> Result:
    return (out, lse, None) if return_attn_probs else out


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    attention_chunk: int = 0,
) -> Result:
    """q ``[B, Sq, Hq, D]``, k and v ``[B, Sk, Hkv, D]`` -> ``[B, Sq, Hq, D]``; see :func:`kvops.flash_attention`.

    With ``attention_chunk`` queries see only keys of their own chunk of so many positions: the chunks are packed
    sequences. With ``return_attn_probs`` it also returns lse, float32 ``[B, Hq, Sq]``, and None.
    """
    options = options_of(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    q, k, v = map(last_contiguous, (q, k, v))
    if attention_chunk:
        out, lse = attend_to_rows(q, k, v, None, None, options, attention_chunk=attention_chunk)
        return _result(out, lse, return_attn_probs)
    return _result(*flash_attention(q, k, v, **options), return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` of q ``[B, Sq, Hq, D]`` and kv ``[B, Sk, 2, Hkv, D]``."""
    options = options_of(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    checks.expect_shape("kv", kv, "[batch, seqlen, 2, heads, head_dim]", None, None, 2, None, None)
    q, kv = map(last_contiguous, (q, kv))
    return _result(*flash_attention(q, *kv.unbind(2), **options), return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` of qkv ``[B, S, 3, H, D]``."""
    options = options_of(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    checks.expect_shape("qkv", qkv, "[batch, seqlen, 3, heads, head_dim]", None, None, 3, None, None)
    return _result(*flash_attention(*last_contiguous(qkv).unbind(2), **options), return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    leftpad_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    attention_chunk: int = 0,
) -> Result:
    """q ``[Tq, Hq, D]``, k and v ``[Tk, Hkv, D]`` -> ``[Tq, Hq, D]``; see :func:`kvops.flash_attention_varlen`.

    Args:
        block_table: int32 ``[B, max_blocks]``. Then k and v are pages ``[num_blocks, page_size, Hkv, D]``, and
            ``cu_seqlens_k`` or ``seqused_k`` has the lengths of the sequences. Where gradients, dropout or ALiBi are
            asked for, the pages of each sequence are copied; otherwise they are read in place.
        leftpad_k: int32 ``[B]``, the keys at the beginning of each sequence that are not part of it; without a
            ``block_table``.
        seqused_q, seqused_k: int32 ``[B]``, how many queries and keys of each sequence are used. The output of other
            queries is 0.
        attention_chunk: queries see the keys of their own chunk of so many positions; 0 for no chunks.

    With ``return_attn_probs`` it also returns lse, float32 ``[Hq, Tq]``, and None.
    """
    options = options_of(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    q = last_contiguous(q)
    check_lengths(q, k, *lengths.arguments)
    if block_table is None:
        k, v = map(last_contiguous, (k, v))
        parts = {"leftpad_k": leftpad_k, "seqused_q": seqused_q, "seqused_k": seqused_k}
        lengths = lengths.cut(**parts, attention_chunk=attention_chunk)
        options["alibi_slopes"] = lengths.slopes(alibi_slopes)
        return _result(*flash_attention_varlen(q, k, v, *lengths.arguments, **options), return_attn_probs)
    if leftpad_k is not None:
        raise ValueError("leftpad_k: expected None along with a block_table, as in flash-attn: leave out whole pages")
    checks.expect_rank("k", k, "[num_blocks, page_size, heads, head_dim]")
    checks.expect_rank("block_table", block_table, "[batch, max_blocks]")
    seq_lens = cu_seqlens_k.diff() if seqused_k is None else seqused_k
    if checks.may_look(cu_seqlens_q):
        room = block_table.shape[1] * k.shape[1]
        check_lengths_data(len(q), block_table.numel() * k.shape[1], *lengths.arguments)
        checks.expect_data("block_table", "room for the keys of every sequence", seq_lens <= room)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    plain = not attention_chunk and seqused_q is None and sees_no_later_slots(options, max_seqlen_q)
    copied = differentiable or "dropout_p" in options or (alibi_slopes is not None and not plain)
    attend = _packed_over_rows if copied else _packed_over_pages
    out, lse = attend(q, k, v, block_table, lengths, seq_lens, seqused_q, options, attention_chunk)
    return _result(out, lse, return_attn_probs)


def _packed_over_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    lengths: Lengths,
    seq_lens: Tensor,
    q_lens: Tensor | None,
    options: dict[str, Any],
    attention_chunk: int,
) -> tuple[Tensor, Tensor]:
    """Packed queries and copies of the pages of each sequence, with gradients."""
    k, v = rows_of_pages(k, v, block_table)
    rows = Lengths.of_rows(len(k), 0, k.shape[1], q.device)
    lengths = Lengths(lengths.cu_seqlens_q, rows.cu_seqlens_k, lengths.max_seqlen_q, k.shape[1])
    lengths = lengths.cut(seqused_q=q_lens, seqused_k=seq_lens, attention_chunk=attention_chunk)
    options = options | {"alibi_slopes": lengths.slopes(options["alibi_slopes"])}
    return flash_attention_varlen(q, k.flatten(0, 1), v.flatten(0, 1), *lengths.arguments, **options)


def _packed_over_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    lengths: Lengths,
    seq_lens: Tensor,
    q_lens: Tensor | None,
    options: dict[str, Any],
    attention_chunk: int,
) -> tuple[Tensor, Tensor]:
    """Packed queries and pages in place; the queries of each sequence in a row of their own where chunks, right windows
    or unused queries are to be cut off."""
    cu_seqlens = lengths.cu_seqlens_q
    if q_lens is None and not attention_chunk and sees_no_later_slots(options, lengths.max_seqlen_q):
        plain = {name: value for name, value in options.items() if name != "window_right"}
        plain |= {"cu_seqlens_q": cu_seqlens, "max_seqlen_q": lengths.max_seqlen_q}
        return paged_attention(q, k, v, block_table, seq_lens, **plain)
    q_lens = cu_seqlens.diff() if q_lens is None else q_lens
    token = torch.arange(lengths.max_seqlen_q if len(q) else 0, device=q.device)
    place = (cu_seqlens[:-1, None] + token).clamp(max=max(len(q) - 1, 0))
    out, lse = attend_to_pages(q[place], k, v, block_table, seq_lens, q_lens, options, attention_chunk=attention_chunk)
    packed_out, packed_lse = q.new_zeros(*q.shape[:2], out.shape[-1]), lse.new_full((q.shape[1], len(q)), -torch.inf)
    real = token < q_lens[:, None]
    packed_out[place[real]] = out[real]
    packed_lse[:, place[real]] = lse.transpose(0, 1)[:, real]
    return packed_out, packed_lse


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_varlen_func` of q ``[Tq, Hq, D]`` and kv ``[Tk, 2, Hkv, D]``."""
    options = options_of(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    checks.expect_shape("kv", kv, "[tokens, 2, heads, head_dim]", None, 2, None, None)
    q, kv = map(last_contiguous, (q, kv))
    k, v = kv.unbind(1)
    out, lse = flash_attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)
    return _result(out, lse, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_varlen_func` of qkv ``[T, 3, H, D]``."""
    options = options_of(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    checks.expect_shape("qkv", qkv, "[tokens, 3, heads, head_dim]", None, 3, None, None)
    q, k, v = last_contiguous(qkv).unbind(1)
    out, lse = flash_attention_varlen(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
    return _result(out, lse, return_attn_probs)
