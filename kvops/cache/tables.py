"""Conversion of the page tables of other engines, and views of their caches as ragged ones. No page is copied.

A page of FlashInfer or vLLM holds all KV heads. :func:`kvops.paged_attention` and :func:`kvops.paged_append` take such
caches in place, as views ``[num_pages, page_size, Hkv, D]`` of any strides:

==========================================  ================================================  ==================
memory                                      k_cache, v_cache                                  which is
==========================================  ================================================  ==================
``kv [pages, 2, page_size, Hkv, D]``        ``kv[:, 0], kv[:, 1]``                            FlashInfer NHD
``kv [pages, 2, Hkv, page_size, D]``        ``kv[:, 0].transpose(1, 2)``, same of ``[:, 1]``  FlashInfer HND
``kv [2, pages, page_size, Hkv, D]``        ``kv[0], kv[1]``                                  vLLM
``kv [pages, page_size, Hkv, D + Dv]``      ``kv[..., :D], kv[..., D:]``                      vLLM, K and V fused
==========================================  ================================================  ==================

vLLM's ``block_table [B, max_blocks]`` and ``seq_lens [B]`` need no conversion. :func:`to_flashinfer` and
:func:`from_flashinfer` convert FlashInfer's three arrays, :func:`slot_mapping` computes vLLM's slot mapping, and
:class:`HeadBlocks` gives every head of such a cache its own table and length, so that each head can be compressed in
place. Lengths and page counts that do not fit raise ValueError in functions that synchronise anyway, and in all of them
with ``KVOPS_DEBUG=1``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvops import checks

_INT32 = 2**31


def to_flashinfer(block_tables: Tensor, seq_lens: Tensor, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """FlashInfer's ``kv_indptr``, ``kv_indices`` and ``kv_last_page_len`` of uniform tables.

    Args:
        block_tables: int32 ``[B, max_blocks]``, pages that hold all heads. Per-head tables are refused: join them with
            :meth:`HeadBlocks.join`, or, for ragged heads, flatten both arguments and attend to B * Hkv sequences of
            one head (``k_cache[:, :, None]``).
        seq_lens: int32 ``[B]``.
        page_size: slots in a page.

    Returns: int32 ``[B + 1]``, ``[pages in use]`` and ``[B]``. An empty sequence has no pages and a last length of 0.
    Synchronises, because the host needs the number of pages.
    """
    checks.expect_int("page_size", page_size, 1)
    _expect_uniform(block_tables, seq_lens)
    _expect_inside(block_tables, seq_lens, page_size)  # this function synchronises anyway
    pages = (seq_lens + (page_size - 1)) // page_size
    used = torch.arange(block_tables.shape[1], device=block_tables.device) < pages[:, None]
    indptr = torch.nn.functional.pad(pages.cumsum(0, dtype=torch.int32), (1, 0))
    return indptr, block_tables[used], seq_lens - (pages - 1).clamp(min=0) * page_size


def from_flashinfer(
    kv_indptr: Tensor, kv_indices: Tensor, kv_last_page_len: Tensor, page_size: int, *, max_blocks: int | None = None
) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`to_flashinfer`: block tables int32 ``[B, max_blocks]`` and lengths int32 ``[B]``.

    Args:
        kv_indptr, kv_indices, kv_last_page_len: int32 ``[B + 1]``, ``[at least kv_indptr[-1]]`` and ``[B]``.
        page_size: slots in a page.
        max_blocks: columns of the tables; None for the pages of the longest sequence, which synchronises.
    """
    checks.expect_int("page_size", page_size, 1)
    for name, value in (("kv_indptr", kv_indptr), ("kv_indices", kv_indices), ("kv_last_page_len", kv_last_page_len)):
        checks.expect_tensor(name, value)
        checks.expect_dtype(name, value, torch.int32)
        checks.expect_rank(name, value, "[numbers]")
        checks.expect_same_device(name, value, "kv_indptr", kv_indptr)
    checks.expect_shape("kv_indptr", kv_indptr, "[B + 1]", kv_last_page_len.shape[0] + 1)
    pages = kv_indptr.diff()
    synchronises = max_blocks is None
    if max_blocks is None:
        max_blocks = int(pages.amax()) if pages.numel() else 0
    checks.expect_int("max_blocks", max_blocks, 0)
    if synchronises or checks.debug():
        named = (kv_indptr[1:] >= kv_indptr[:-1]) & (kv_indptr[:-1] >= 0) & (kv_indptr[1:] <= kv_indices.shape[0])
        checks.expect_data(
            "kv_indptr", f"ascending numbers from 0 to {kv_indices.shape[0]}, those of kv_indices", named
        )
        checks.expect_data(
            "max_blocks", f"at least the pages of every sequence ({max_blocks} are too few)", pages <= max_blocks
        )
        filled = (kv_last_page_len >= 0) & (kv_last_page_len <= page_size)
        checks.expect_data("kv_last_page_len", f"numbers from 0 to page_size = {page_size}", filled)
    column = torch.arange(max_blocks, device=kv_indptr.device)
    place = kv_indptr[:-1, None] + column
    used = column < pages[:, None]
    if kv_indices.shape[0] == 0:
        tables = torch.zeros_like(place, dtype=torch.int32)
    else:
        tables = torch.where(used, kv_indices[place.clamp(max=kv_indices.shape[0] - 1)], 0)
    return tables, (pages - 1).clamp(min=0) * page_size + kv_last_page_len * (pages > 0)


def slot_mapping(
    block_tables: Tensor, seq_lens: Tensor, page_size: int, num_tokens: int, *, q_lens: Tensor | None = None
) -> Tensor:
    """vLLM's slots for the newest tokens: int64 ``[B, num_tokens]``, ``page * page_size + slot``, -1 for padding.

    Args:
        block_tables, seq_lens: int32 ``[B, max_blocks]`` and ``[B]``, lengths that include the new tokens.
        page_size: slots in a page.
        num_tokens: T, the new tokens of each sequence.
        q_lens: int32 ``[B]``, the number of new tokens of each sequence if it is not T.
    """
    checks.expect_int("page_size", page_size, 1)
    checks.expect_int("num_tokens", num_tokens, 0)
    _expect_uniform(block_tables, seq_lens)
    if checks.debug():
        _expect_inside(block_tables, seq_lens, page_size)
    if q_lens is not None:
        checks.expect_tensor("q_lens", q_lens)
        checks.expect_dtype("q_lens", q_lens, torch.int32)
        checks.expect_shape("q_lens", q_lens, "[B]", seq_lens.shape[0])
        if checks.debug():
            within = (q_lens >= 0) & (q_lens <= num_tokens)
            checks.expect_data("q_lens", f"numbers from 0 to num_tokens = {num_tokens}", within)
    if block_tables.shape[1] == 0:  # all sequences are empty
        return torch.full((len(seq_lens), num_tokens), -1, dtype=torch.int64, device=seq_lens.device)
    token = torch.arange(num_tokens, device=seq_lens.device)
    count = torch.full_like(seq_lens, num_tokens) if q_lens is None else q_lens
    slot = (seq_lens - count)[:, None] + token
    new = (token < count[:, None]) & (slot >= 0)
    slot = slot.clamp(min=0, max=block_tables.shape[1] * page_size - 1)
    page = block_tables.long().gather(1, slot // page_size)
    return torch.where(new, page * page_size + slot % page_size, -1)


@dataclass(frozen=True)
class HeadBlocks:
    """Views of a cache whose pages hold all heads, as a pool of blocks of one head each.

    Block ``page * page_step + head * head_step`` of the views is the part of ``page`` that belongs to ``head``. All
    operators on blocks work on the views: append, attend and, after :meth:`split`, evict per head in another engine's
    memory.

    Attributes:
        k_cache, v_cache: views ``[num_blocks, page_size, D]`` and ``[..., Dv]``. Where heads come before slots in
            memory (HND) there is one block for each page and head. Where slots come first (NHD) blocks overlap, and
            side arrays (positions, scores) are ``page_size`` times larger than the part in use.
        num_kv_heads: heads of a page.
        page_step, head_step: block numbers from one page and from one head to the next.
    """

    k_cache: Tensor
    v_cache: Tensor
    num_kv_heads: int
    page_step: int
    head_step: int

    @classmethod
    def of(cls, k_cache: Tensor, v_cache: Tensor) -> HeadBlocks:
        """Views of ``[num_pages, page_size, Hkv, D]`` and ``[..., Dv]``. All strides but the last are free.

        Raises ValueError for another shape, a last dimension that is not contiguous, and keys and values in which the
        strides of pages and heads have different ratios.
        """
        layout = "[num_pages, page_size, Hkv, D]"
        checks.expect_tensor("k_cache", k_cache)
        checks.expect_tensor("v_cache", v_cache)
        checks.expect_rank("k_cache", k_cache, layout)
        checks.expect_shape("v_cache", v_cache, layout, *k_cache.shape[:3], None)
        steps = []
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            checks.expect_last_contiguous(name, cache)
            steps.append(_steps(cache))
        (page_step, head_step, _), others = steps[0], steps[1][:2]
        if others != (page_step, head_step):
            raise ValueError(
                f"v_cache: expected pages {page_step} and heads {head_step} blocks apart, as in k_cache, got "
                f"{others[0]} and {others[1]} (strides {list(v_cache.stride())})"
            )
        pages, page_size, heads = k_cache.shape[:3]
        blocks = (pages - 1) * page_step + (heads - 1) * head_step + 1 if pages and heads else 0
        if blocks >= _INT32:
            raise ValueError(f"k_cache: expected fewer than 2**31 blocks (tables are int32), got {blocks}")
        k, v = (
            cache.as_strided((blocks, page_size, cache.shape[3]), (unit, cache.stride(1), 1))
            for cache, (_, _, unit) in zip((k_cache, v_cache), steps, strict=True)
        )
        return cls(k, v, heads, page_step, head_step)

    def split(self, block_tables: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Tables ``[B, Hkv, max_blocks]`` and lengths ``[B, Hkv]`` of heads, from ``[B, max_blocks]`` and ``[B]``."""
        _expect_uniform(block_tables, seq_lens)
        head = torch.arange(self.num_kv_heads, dtype=torch.int32, device=block_tables.device)[:, None]
        used = torch.arange(block_tables.shape[1], device=block_tables.device) * self.page_size < seq_lens[:, None]
        pages = torch.where(used, block_tables, 0)[:, None]
        return pages * self.page_step + head * self.head_step, seq_lens[:, None].repeat(1, self.num_kv_heads)

    def join(self, block_tables: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`split`: tables ``[B, max_blocks]`` and lengths ``[B]``. Synchronises.

        Raises ValueError if the heads of a sequence have different lengths (after an eviction per head) or blocks of
        different pages, which a view cannot express.
        """
        checks.expect_dtype("block_tables", block_tables, torch.int32)
        checks.expect_dtype("seq_lens", seq_lens, torch.int32)
        checks.expect_shape("seq_lens", seq_lens, "[B, Hkv]", None, self.num_kv_heads)
        checks.expect_shape("block_tables", block_tables, "[B, Hkv, max_blocks]", *seq_lens.shape, None)
        ragged = (seq_lens != seq_lens[:, :1]).any(1).nonzero().flatten().tolist()
        if ragged:
            lengths = seq_lens[ragged[0]].tolist()
            raise ValueError(
                f"seq_lens: expected heads of one length, got {min(lengths)} to {max(lengths)} slots in sequence "
                f"{ragged[0]}: pages cannot hold ragged heads; attend with kvops.paged_attention, or give every head a "
                "sequence of its own (to_flashinfer of both arguments flattened, with pages of one head)"
            )
        lens = seq_lens[:, 0].clone()  # contiguous() of one head is a view
        head = torch.arange(self.num_kv_heads, device=block_tables.device)[:, None] * self.head_step
        used = torch.arange(block_tables.shape[2], device=block_tables.device) * self.page_size < lens[:, None]
        offset = torch.where(used[:, None], block_tables - head, 0)
        pages = offset[:, 0] // self.page_step
        if bool((offset != (pages * self.page_step)[:, None]).any()):
            raise ValueError(
                "block_tables: expected the heads of a sequence in the same pages, as HeadBlocks.split() puts them, "
                "got blocks of different pages"
            )
        return pages.to(torch.int32), lens

    @property
    def page_size(self) -> int:
        return self.k_cache.shape[1]


def _steps(cache: Tensor) -> tuple[int, int, int]:
    """Blocks from one page and from one head to the next, and elements from one block to the next."""
    page, head = cache.stride(0), cache.stride(2)
    if cache.shape[2] == 1:  # the stride of a single head is arbitrary
        head = page
    if cache.shape[0] == 1:
        page = head * cache.shape[2]
    unit = math.gcd(page, head)
    return page // unit, head // unit, unit


def _expect_inside(block_tables: Tensor, seq_lens: Tensor, page_size: int) -> None:
    room = block_tables.shape[1] * page_size
    inside = (seq_lens >= 0) & (seq_lens <= room)
    checks.expect_data("seq_lens", f"numbers from 0 to {room}, what the pages of a table hold", inside)


def _expect_uniform(block_tables: Tensor, seq_lens: Tensor) -> None:
    checks.expect_tensor("block_tables", block_tables)
    checks.expect_tensor("seq_lens", seq_lens)
    checks.expect_dtype("block_tables", block_tables, torch.int32)
    checks.expect_dtype("seq_lens", seq_lens, torch.int32)
    if block_tables.ndim == 3:
        raise ValueError(
            f"block_tables: expected [B, max_blocks], pages that hold all heads, got {list(block_tables.shape)}, "
            "a list for each head; HeadBlocks.join() gives pages of heads of one length, flattening both arguments "
            "gives sequences of one head"
        )
    checks.expect_rank("block_tables", block_tables, "[B, max_blocks]")
    checks.expect_shape("seq_lens", seq_lens, "[B]", block_tables.shape[0])
    checks.expect_same_device("seq_lens", seq_lens, "block_tables", block_tables)
