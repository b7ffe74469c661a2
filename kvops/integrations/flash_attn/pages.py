"""Attention to the keys of a cache: in place where :func:`kvops.paged_attention` can, else to its rows, packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvops import checks
from kvops.integrations.flash_attn.lengths import Lengths
from kvops.ops.paged import paged_attention
from kvops.ops.varlen import flash_attention_varlen


def attend_to_pages(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    q_lens: Tensor | None,
    options: dict[str, Any],
    *,
    leftpad: Tensor | None = None,
    attention_chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """q ``[B, T, Hq, D]``, its last tokens in the cache -> out ``[B, T, Hq, Dv]`` and lse ``[B, Hq, T]``.

    Args:
        block_table: int32 ``[B, max_blocks]`` into ``k_cache`` and ``v_cache``.
        seq_lens: int32 ``[B]``, the slots in use, including the new tokens.
        q_lens: int32 ``[B]``, how many of the T tokens are real, if not all are.
        options: as :func:`kvops.flash_attention` takes them.
        leftpad: int32 ``[B]``, how many slots at the beginning of each row are not part of it.
        attention_chunk: queries see the slots of their own chunk of so many, counted from ``leftpad``; 0 for no chunks.
    """
    plain = leftpad is None and not attention_chunk and sees_no_later_slots(options, q.shape[1])
    if options["alibi_slopes"] is not None and not plain:
        k, v = rows_of_pages(k_cache, v_cache, block_table)
        return attend_to_rows(q, k, v, seq_lens, q_lens, options, leftpad, attention_chunk)
    options = dict(options)
    right = options.pop("window_right")
    if plain:
        return paged_attention(q, k_cache, v_cache, block_table, seq_lens, q_lens=q_lens, **options)
    num_tokens = q.shape[1]
    own = (seq_lens if q_lens is None else seq_lens - q_lens)[:, None] - (num_tokens if q_lens is None else 0)
    own = own + torch.arange(num_tokens, device=q.device)  # [B, T], the slot of each query
    first = torch.zeros_like(seq_lens) if leftpad is None else leftpad
    chunk = (own - first[:, None]) // attention_chunk if attention_chunk else None
    if not options["causal"] and num_tokens > 1 and (right >= 0 or chunk is not None):
        # What a query sees after its own slot: those are among the new tokens.
        seen = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=q.device)
        seen = seen if right < 0 else seen.tril(right)
        options["tree_mask"] = seen if chunk is None else seen & (chunk[:, :, None] == chunk[:, None])
    if leftpad is not None or chunk is not None:
        # The first slot that a query sees, as the position from which a window of no length reaches to it.
        oldest = first[:, None].expand_as(own)
        if options["window_left"] >= 0:
            oldest = torch.maximum(oldest, own - options["window_left"])
        if chunk is not None:
            oldest = torch.maximum(oldest, first[:, None] + chunk * attention_chunk)
        options |= {"window_left": 0, "query_positions": oldest.to(torch.int32).contiguous()}
        options["positions"] = _slots_in_rows(k_cache, block_table, seq_lens)
    return paged_attention(q, k_cache, v_cache, block_table, seq_lens, q_lens=q_lens, **options)


def sees_no_later_slots(options: dict[str, Any], num_tokens: int) -> bool:
    """Whether a window to the right of ``num_tokens`` queries hides nothing that causality does not hide."""
    return options["window_right"] < 0 or options["causal"] or num_tokens == 1


def rows_of_pages(k_cache: Tensor, v_cache: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of the pages of each sequence, one after the other: ``[B, S, Hkv, ·]``."""
    pages = block_table.long()
    return k_cache[pages].flatten(1, 2), v_cache[pages].flatten(1, 2)


def attend_to_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_lens: Tensor | None,
    q_lens: Tensor | None,
    options: dict[str, Any],
    leftpad: Tensor | None = None,
    attention_chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """:func:`attend_to_pages` of rows k, v ``[B, S, Hkv, ·]``, as packed sequences: with gradients and ALiBi."""
    batch, num_tokens = q.shape[:2]
    lengths = Lengths.of_rows(batch, num_tokens, k.shape[1], q.device).cut(
        leftpad_k=leftpad, seqused_q=q_lens, seqused_k=seq_lens, attention_chunk=attention_chunk
    )
    options = options | {"alibi_slopes": lengths.slopes(options["alibi_slopes"])}
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out, lse = flash_attention_varlen(q, k, v, *lengths.arguments, **options)
    return out.unflatten(0, (batch, num_tokens)), lse.unflatten(1, (batch, num_tokens)).transpose(0, 1)


def _slots_in_rows(k_cache: Tensor, block_table: Tensor, seq_lens: Tensor) -> Tensor:
    """int32 ``[num_blocks, page_size]``: the place of each slot in the sequences that use it."""
    num_blocks, page_size = k_cache.shape[:2]
    slot = torch.arange(page_size, dtype=torch.int32, device=k_cache.device)
    columns = block_table.shape[1]
    if columns == 1:
        return slot.expand(num_blocks, page_size)
    column = torch.arange(columns, dtype=torch.int32, device=k_cache.device).expand(len(block_table), -1)
    used = column * page_size < seq_lens[:, None]
    place = torch.zeros(num_blocks + 1, dtype=torch.int32, device=k_cache.device)
    place[torch.where(used, block_table, num_blocks).long()] = column
    if checks.may_look(seq_lens):
        alike = ~used | (place[torch.where(used, block_table, num_blocks).long()] == column)
        checks.expect_data(
            "block_table", "pages that sequences share at the same place in each, with attention_chunk", alike
        )
    return place[:-1, None] * page_size + slot
