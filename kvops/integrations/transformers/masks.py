"""What a transformers model may see, in the words of the operators: a causal flag, a window and lengths.

transformers describes a mask as a function of two indices and leaves it to the attention implementation to build what
it needs. Here nothing is built: the function is taken apart, and padding and packing become cumulative lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

_ELSEWHERE = "set attn_implementation to 'sdpa', 'eager' or 'flex_attention' for this model"


@dataclass(frozen=True)
class Packing:
    """Rows of padded tokens as sequences that lie one behind the other, gaps between them included.

    ``[B, T]`` queries and ``[B, S]`` keys, flattened, are cut into sequences in place: padding becomes sequences that
    have queries or keys only, so nothing is copied and no shape depends on what the mask says.

    Attributes:
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as :func:`kvops.flash_attention_varlen` takes them.
        first_query, num_queries: int32 ``[B]``, where the real queries of each row begin and how many there are; None
            for packed sequences.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    first_query: Tensor | None = None
    num_queries: Tensor | None = None


@dataclass(frozen=True)
class Mask:
    """What the mask function hands to the attention function in the place of a tensor.

    ``generate`` makes the masks of a static cache itself and hands them to the model, whose mask function gets them
    back: ``ndim`` (anything but the 2 of a padding mask) and ``contiguous`` are what they are asked for on the way.
    """

    causal: bool
    window_left: int
    window_right: int
    packing: Packing | None
    ndim: ClassVar[int] = 4

    def contiguous(self) -> Mask:
        return self


@dataclass
class _Pattern:
    """The parts of a mask function that the operators can express."""

    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    chunk: int | None = None
    sequence_ids: Tensor | None = None


def _captured(function: Any, name: str) -> Any:
    """What a function made inside another one remembers under ``name``."""
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _narrower(limit: int, other: int) -> int:
    return other if limit < 0 else min(limit, other)


def _read(function: Callable[..., Any], pattern: _Pattern) -> None:
    """Add what one of transformers' mask functions asks for to ``pattern``."""
    name = function.__qualname__.split(".")[0]
    if name == "causal_mask_function":
        pattern.causal = True
    elif name == "bidirectional_mask_function":
        pass
    elif name == "and_masks":
        for part in _captured(function, "mask_functions"):
            _read(part, pattern)
    elif name == "sliding_window_overlay":
        pattern.window_left = _narrower(pattern.window_left, _captured(function, "sliding_window") - 1)
    elif name == "sliding_window_bidirectional_overlay":
        width = _captured(function, "sliding_window")
        pattern.window_left = _narrower(pattern.window_left, width)
        pattern.window_right = _narrower(pattern.window_right, width)
    elif name == "chunked_overlay":
        pattern.chunk = _captured(function, "chunk_size")
    elif name == "packed_sequence_mask_function":
        pattern.sequence_ids = _captured(function, "packed_sequence_mask")
    elif name == "remap_positions_for_packed_sequence":
        _read(_captured(function, "mask_function"), pattern)  # distances within a sequence stay what they are
    else:
        raise ValueError(
            f"mask_function: expected causal or bidirectional attention with windows, padding and packed sequences, "
            f"got {name}, which kvops cannot express: {_ELSEWHERE}"
        )


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | Mask | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Mask:
    """The mask function that :func:`kvops.integrations.transformers.enable` registers.

    Query t stands at position ``q_offset + t`` and key j at ``kv_offset + j``; ``attention_mask`` is bool
    ``[B, positions]``, False where a token is padding.

    Raises ValueError for a pattern that the operators cannot express.
    """
    if isinstance(attention_mask, Mask):
        return attention_mask
    pattern = _Pattern()
    if mask_function is None:
        pattern.causal = True
    else:
        _read(mask_function, pattern)
    if pattern.chunk is not None and kv_offset + kv_length > pattern.chunk:
        raise ValueError(
            f"mask_function: expected at most {pattern.chunk} tokens of chunked attention (one chunk), "
            f"got {kv_offset + kv_length}: {_ELSEWHERE}"
        )
    packing = None
    if pattern.sequence_ids is not None:
        packing = _pack_sequences(pattern.sequence_ids)
    else:
        if attention_mask is not None:
            attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length]
            if attention_mask.shape[1] == kv_length and not torch.compiler.is_compiling() and attention_mask.all():
                attention_mask = None
        full = not isinstance(q_offset, Tensor) and (not pattern.causal or kv_offset + kv_length == q_offset + q_length)
        if attention_mask is not None or not full:
            packing = _pack_rows(
                batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, pattern.causal, device
            )
    return Mask(pattern.causal, pattern.window_left, pattern.window_right, packing)


def _pack_sequences(sequence_ids: Tensor) -> Packing:
    """Rows of several sequences: int [B, S], a new number where a new sequence begins."""
    batch, length = sequence_ids.shape
    new = torch.ones(batch, length, dtype=torch.bool, device=sequence_ids.device)
    new[:, 1:] = sequence_ids.diff(dim=1) != 0
    if torch.compiler.is_compiling():
        # Nothing may depend on the number of sequences: as many as there are tokens, most of them empty, at the end.
        tokens = torch.arange(batch * length, device=sequence_ids.device)
        starts = torch.where(new.flatten(), tokens, batch * length).sort().values
        longest = length
    else:
        starts = new.flatten().nonzero().flatten()
        longest = 0  # known below
    cu_seqlens = torch.nn.functional.pad(starts, (0, 1), value=batch * length).to(torch.int32)
    if not longest:
        longest = int(cu_seqlens.diff().max())
    return Packing(cu_seqlens, cu_seqlens, longest, longest)


def _pack_rows(
    batch: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    real: Tensor | None,
    causal: bool,
    device: torch.device | str,
) -> Packing:
    """Rows of one sequence each, with padding before and after it and room that a static cache has not used yet."""
    first = torch.zeros(batch, dtype=torch.int64, device=device)
    end = torch.full((batch,), kv_length, dtype=torch.int64, device=device)
    if real is not None:
        place = torch.arange(real.shape[1], device=real.device)
        first = torch.where(real, place, real.shape[1]).amin(1)
        end = torch.where(real, place + 1, 0).amax(1)
        first = torch.minimum(first, end)  # a row of padding alone
        gapless = real.sum(1) == end - first
        if torch.compiler.is_compiling():
            torch._assert_async(gapless.all(), "attention_mask: expected padding at the ends of each row only")
        elif not gapless.all():
            row = int((~gapless).nonzero()[0])
            raise ValueError(
                "attention_mask: expected padding at the left or right end of each row only, got padding between the "
                f"tokens of row {row}: pad prompts on the left to generate from them (tokenizer.padding_side = 'left')"
            )
    if causal:  # whatever lies behind the last query has not been written yet
        end = torch.minimum(end, torch.as_tensor(q_offset + q_length - kv_offset, device=end.device))
        first = torch.minimum(first, end)
    shift = kv_offset - q_offset
    first_query = (first + shift).clamp(0, q_length)
    end_query = torch.maximum((end + shift).clamp(0, q_length), first_query)

    # Five sequences to a row: padding before it (queries, then keys), the sequence itself, and padding behind it.
    rows = torch.arange(batch, device=end.device)
    cu_q = (rows * q_length)[:, None] + torch.stack([first_query, first_query, end_query, end_query, end_query], 1)
    cu_k = (rows * kv_length)[:, None] + torch.stack([torch.zeros_like(first), first, end, end, end], 1)
    cu_q[:, 3:] = ((rows + 1) * q_length)[:, None]
    cu_k[:, 4] = (rows + 1) * kv_length
    cu_seqlens_q, cu_seqlens_k = (torch.nn.functional.pad(cu.flatten(), (1, 0)).to(torch.int32) for cu in (cu_q, cu_k))
    return Packing(
        cu_seqlens_q,
        cu_seqlens_k,
        q_length,
        kv_length,
        first_query.to(torch.int32),
        (end_query - first_query).to(torch.int32),
    )
