"""What a transformers model may see, in the words of the operators: a causal flag, a window and lengths.

transformers describes a mask as a function of two indices and leaves it to the attention implementation to build what
it needs. Here nothing is built: the function is taken apart, and padding and packing become cumulative lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from kvops.integrations.transformers.placeholders import NotATensorError, Placeholder

ELSEWHERE = "set attn_implementation to 'sdpa', 'eager' or 'flex_attention' for this model"


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
class _Source:
    """What a mask was made from, so that a part of it can be made again."""

    batch: int
    q_offset: int | Tensor
    kv_offset: int
    padding: Tensor | None  # bool [B, positions], False where a token is padding
    device: torch.device | str


@dataclass(frozen=True, eq=False)
class Mask(Placeholder):
    """What the mask function hands to the attention function in the place of a tensor ``[B, 1, T, S]``.

    Attributes:
        causal, window_left, window_right: as :func:`kvops.flash_attention` takes them.
        packing: cumulative lengths where rows have padding or several sequences, None where every query row and key
            row is one whole sequence.
        q_length, kv_length: T and S. Attention with other lengths is refused.
        source: None for packed sequences, of which no part can be taken.

    Slices of queries and keys are masks again (``mask[:, :, -1:, :]``); any other use as a tensor raises.

    ``generate`` makes the masks of a static cache itself and hands them to the model, whose mask function gets them
    back: ``ndim`` (anything but the 2 of a padding mask) and ``contiguous`` are what they are asked for on the way.
    """

    causal: bool
    window_left: int
    window_right: int
    packing: Packing | None
    q_length: int
    kv_length: int
    source: _Source | None = None
    ndim: ClassVar[int] = 4

    def contiguous(self) -> Mask:
        return self

    def refuse(self, use: str) -> NoReturn:
        raise NotATensorError(
            "attention_mask: expected a model that passes its mask on to transformers' attention interface, got "
            f"{use}: {ELSEWHERE}"
        )

    def __getitem__(self, index: Any) -> Mask:
        parts = index if isinstance(index, tuple) else (index,)
        if len(parts) > 4 or any(not isinstance(part, slice) or part.step not in (None, 1) for part in parts):
            self.refuse(f"one that takes mask[{index}]")
        parts += (slice(None),) * (4 - len(parts))
        if parts[:2] != (slice(None),) * 2:
            self.refuse(f"one that takes mask[{index}]")
        queries, keys = parts[2].indices(self.q_length), parts[3].indices(self.kv_length)
        if (queries, keys) == ((0, self.q_length, 1), (0, self.kv_length, 1)):
            return self
        if self.source is None:
            self.refuse(f"one that takes mask[{index}] of packed sequences")
        q_length, kv_length = max(queries[1] - queries[0], 0), max(keys[1] - keys[0], 0)
        source = replace(
            self.source, q_offset=self.source.q_offset + queries[0], kv_offset=self.source.kv_offset + keys[0]
        )
        windowed = max(self.window_left, self.window_right) >= 0
        packing = _pack_rows_if_needed(source, q_length, kv_length, self.causal, windowed)
        return replace(self, packing=packing, q_length=q_length, kv_length=kv_length, source=source)

    def expect_lengths(self, batch: int, q_length: int, kv_length: int) -> None:
        """Raise ValueError for queries and keys that the mask was not made for."""
        if (q_length, kv_length) != (self.q_length, self.kv_length):
            raise ValueError(
                f"attention_mask: expected the {self.q_length} queries and {self.kv_length} keys that the mask was "
                f"made for, got {q_length} queries and {kv_length} keys, as the model adds or drops some afterwards: "
                f"{ELSEWHERE}"
            )
        if self.packing is not None and self.source is not None and batch != self.source.batch:
            raise ValueError(
                f"attention_mask: expected the {self.source.batch} rows that the mask was made for, got {batch}: "
                f"{ELSEWHERE}"
            )


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


def _refuse_pattern(name: str) -> NoReturn:
    raise ValueError(
        "mask_function: expected causal or bidirectional attention with windows, padding and packed sequences, "
        f"got {name}, which kvops cannot express: {ELSEWHERE}"
    )


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
        _refuse_pattern(name)


def _read_traced(
    function: Callable[..., Any], pattern: _Pattern, config: Any, local_size: int | None, custom: bool
) -> None:
    """Do what :func:`_read` does within ``torch.compile``, which cannot look into functions made while it traces.

    It knows their names, though, and transformers passes on the size of a window or chunk (``local_size``) and whether
    a caller added a function of its own (``custom``).
    """
    name = function.__name__
    pattern.causal = getattr(config, "is_causal", True) and name != "bidirectional_mask_function"
    if name in ("causal_mask_function", "bidirectional_mask_function"):
        return
    if custom or name != "and_mask":
        _refuse_pattern(name)
    if local_size is not None and local_size == getattr(config, "attention_chunk_size", None):
        pattern.chunk = local_size
    if local_size is not None and pattern.causal:
        pattern.window_left = local_size - 1
    elif local_size is not None:
        pattern.window_left = pattern.window_right = local_size


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | Mask | None = None,
    device: torch.device | str = "cpu",
    config: Any = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Mask:
    """The mask function that :func:`kvops.integrations.transformers.enable` registers.

    Query t stands at position ``q_offset + t`` and key j at ``kv_offset + j``; ``attention_mask`` is bool
    ``[B, positions]``, False where a token is padding. ``config``, ``local_size`` and ``use_vmap`` describe
    ``mask_function`` where it cannot be looked into.

    Raises ValueError for a pattern that the operators cannot express.
    """
    if isinstance(attention_mask, Mask):
        return attention_mask
    pattern = _Pattern()
    traced = torch.compiler.is_compiling()
    if mask_function is None:
        pattern.causal = True
    elif traced:
        _read_traced(mask_function, pattern, config, local_size, use_vmap)
        if attention_mask is None and q_length == kv_length and mask_function.__name__ == "and_mask":
            pattern.sequence_ids = _sequence_ids(mask_function, batch_size, q_length, device)
    else:
        _read(mask_function, pattern)
    if pattern.chunk is not None and kv_offset + kv_length > pattern.chunk:
        raise ValueError(
            f"mask_function: expected at most {pattern.chunk} tokens of chunked attention (one chunk), "
            f"got {kv_offset + kv_length}: {ELSEWHERE}"
        )
    windows = pattern.window_left, pattern.window_right
    if pattern.sequence_ids is not None:
        return Mask(pattern.causal, *windows, _pack_sequences(pattern.sequence_ids), q_length, kv_length)
    stop = kv_offset + kv_length
    if attention_mask is not None and not traced and attention_mask.shape[1] >= stop:
        attention_mask = None if attention_mask[:, kv_offset:stop].all() else attention_mask
    source = _Source(batch_size, q_offset, kv_offset, attention_mask, device)
    packing = _pack_rows_if_needed(source, q_length, kv_length, pattern.causal, max(windows) >= 0)
    return Mask(pattern.causal, *windows, packing, q_length, kv_length, source)


def _sequence_ids(function: Callable[..., Any], batch: int, length: int, device: torch.device | str) -> Tensor:
    """int64 ``[B, S]``, a new number where ``function`` hides a token's predecessor: there a new sequence begins."""
    rows, tokens = torch.arange(batch, device=device)[:, None], torch.arange(length, device=device)[None]
    follows = function(rows, torch.zeros_like(rows), tokens[:, 1:], tokens[:, :-1])
    return torch.nn.functional.pad((~follows).long().cumsum(1), (1, 0))


def _pack_rows_if_needed(
    source: _Source, q_length: int, kv_length: int, causal: bool, windowed: bool
) -> Packing | None:
    """None where every row of queries and keys is one whole sequence."""
    real, q_offset, kv_offset = source.padding, source.q_offset, source.kv_offset
    if real is not None:
        real = real[:, kv_offset : kv_offset + kv_length]
    elif not isinstance(q_offset, Tensor) and (not causal or kv_offset + kv_length == q_offset + q_length):
        return None
    return _pack_rows(source, real, q_length, kv_length, causal, windowed)


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
    source: _Source, real: Tensor | None, q_length: int, kv_length: int, causal: bool, windowed: bool
) -> Packing:
    """Rows of one sequence each, with padding before and after it and room that a static cache has not used yet."""
    batch, device, q_offset, kv_offset = source.batch, source.device, source.q_offset, source.kv_offset
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
    if not causal and not windowed:  # maybe the queries of another sequence than the keys': all of them see all keys
        first_query, end_query = torch.zeros_like(first_query), torch.full_like(end_query, q_length)

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
