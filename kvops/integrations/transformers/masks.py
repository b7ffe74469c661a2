"""Masks of transformers models, as arguments of kvops' operators: a causal flag, windows and cumulative lengths.

transformers describes a mask by a function of two indices and lets the attention implementation build what it needs.
kvops recognises the parts of the function; padding and packing become cumulative lengths. What has no such form (gaps
between the tokens of a row, blocks of image tokens, chunks, functions of the caller) becomes a bool tensor
``[B, 1, T, S]``, the bias of :func:`kvops.flash_attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from kvops.integrations.transformers.placeholders import NotATensorError, Placeholder

ELSEWHERE = "set attn_implementation to 'sdpa', 'eager' or 'flex_attention' for this model"


class QueryOffset(int):
    """The position of the first query of a pass, as a cache tells transformers. :func:`make_mask` gets it back, and
    tells the cache by it where the padding of the pass is.

    Attributes:
        tell: called with the :class:`Source` of a mask.
    """

    tell: Callable[[Source], None]

    @classmethod
    def of(cls, position: int, tell: Callable[[Source], None]) -> QueryOffset:
        offset = cls(position)
        offset.tell = tell
        return offset

    def __add__(self, other: Any) -> QueryOffset:
        return QueryOffset.of(int(self) + int(other), self.tell)


@dataclass(frozen=True)
class Packing:
    """Padded rows as packed sequences, without moving a token.

    ``[B, T]`` queries and ``[B, S]`` keys are flattened and cut into sequences. Padding becomes sequences that have
    queries only or keys only. So nothing is copied, and no shape depends on the values of the mask.

    Attributes:
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as :func:`kvops.flash_attention_varlen` takes them.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True)
class Source:
    """The arguments that a mask was made from, to make a slice of it."""

    batch: int
    q_offset: int | Tensor
    kv_offset: int
    padding: Tensor | None  # bool [B, positions], False where a token is padding
    device: torch.device | str

    def real_queries(self, q_length: int) -> Tensor | None:
        """bool ``[B, T]``, False for queries that are padding; None without padding."""
        if self.padding is None:
            return None
        first = int(self.q_offset)
        real = self.padding[:, first : first + q_length]
        return torch.nn.functional.pad(real, (0, q_length - real.shape[1]))


@dataclass(frozen=True, eq=False)
class Mask(Placeholder):
    """The mask that the mask function returns and the attention function gets, in place of a tensor ``[B, 1, T, S]``.

    Attributes:
        causal, window_left, window_right: as :func:`kvops.flash_attention` takes them.
        packing: cumulative lengths. None if each row is one whole sequence, or if a cache that stores no padding holds
            the keys: :meth:`packed` is for models that read them from there.
        q_length, kv_length: T and S. Attention with other lengths is refused.
        source: the arguments that the mask was made from. None for packed sequences, which cannot be sliced.
        bias: what attention adds to the scores, or bool ``[B or 1, H or 1, T, S]`` with True where a query sees a key.
            It says all of the mask, ``causal`` and windows included. None for masks without such a tensor.
        chunk: queries see only their own chunk of so many tokens. Only for a cache that attends by itself.

    Slicing queries and keys gives another mask (``mask[:, :, -1:, :]``). Any other use as a tensor raises
    :class:`~kvops.integrations.transformers.placeholders.NotATensorError`.

    With a static cache, ``generate`` makes the masks and passes them to the model, which passes them to the mask
    function again. On the way they are asked for ``ndim`` (2 would mean a padding mask) and ``contiguous``.
    """

    causal: bool
    window_left: int
    window_right: int
    packing: Packing | None
    q_length: int
    kv_length: int
    source: Source | None = None
    bias: Tensor | None = None
    chunk: int | None = None
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
            self.refuse(f"one that takes mask[{_as_written(parts)}]")
        parts += (slice(None),) * (4 - len(parts))
        if parts[:2] != (slice(None),) * 2:
            self.refuse(f"one that takes mask[{_as_written(parts)}]")
        queries, keys = parts[2].indices(self.q_length), parts[3].indices(self.kv_length)
        if (queries, keys) == ((0, self.q_length, 1), (0, self.kv_length, 1)):
            return self
        if self.source is None and self.bias is None:
            self.refuse(f"one that takes mask[{_as_written(parts)}] of packed sequences")
        q_length, kv_length = max(queries[1] - queries[0], 0), max(keys[1] - keys[0], 0)
        bias = None if self.bias is None else self.bias[:, :, slice(*queries), slice(*keys)]
        if self.source is None:
            return replace(self, q_length=q_length, kv_length=kv_length, bias=bias)
        source = replace(
            self.source, q_offset=self.source.q_offset + queries[0], kv_offset=self.source.kv_offset + keys[0]
        )
        part = replace(self, q_length=q_length, kv_length=kv_length, source=source, bias=bias)
        return part if bias is not None else part.formed()

    def seen(self) -> Tensor:
        """bool ``[B, 1, T, S]``: which keys each query sees, of a mask that has a ``source``."""
        if self.source is None:
            self.refuse("a position bias beside packed sequences")
        windows = self.window_left, self.window_right
        return _seen(self.source, self.q_length, self.kv_length, self.causal, *windows)

    def real_queries(self) -> Tensor | None:
        """bool ``[B, T]``, False for queries that are padding; None without padding."""
        return None if self.source is None else self.source.real_queries(self.q_length)

    def packed(self) -> Mask:
        """This mask with its packing, where a cache was expected to attend without it."""
        if self.source is None or not isinstance(self.source.q_offset, QueryOffset):
            return self
        if self.chunk is not None and self.kv_length > self.chunk:
            raise ValueError(
                f"past_key_values: expected a model that does not compute with keys in chunks: {ELSEWHERE}"
            )
        return replace(self, source=replace(self.source, q_offset=int(self.source.q_offset))).formed()

    def formed(self) -> Mask:
        """This mask with what its ``source`` asks for: a packing, or a bias where rows have gaps."""
        source, lengths = self.source, (self.q_length, self.kv_length)
        if source is None:
            return self
        if source.padding is not None and not isinstance(source.q_offset, QueryOffset):
            real = source.padding[:, source.kv_offset : source.kv_offset + self.kv_length]
            if not torch.compiler.is_compiling() and _has_gaps(real):
                return replace(self, packing=None, bias=self.seen())
        windowed = max(self.window_left, self.window_right) >= 0
        return replace(self, packing=_pack_rows_if_needed(source, *lengths, self.causal, windowed))

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


def _as_written(index: tuple[Any, ...]) -> str:
    """An index as it is written in a program."""
    parts = []
    for part in index:
        if isinstance(part, slice):
            start, stop = ("" if end is None else str(end) for end in (part.start, part.stop))
            parts.append(f"{start}:{stop}" + ("" if part.step is None else f":{part.step}"))
        else:
            parts.append(str(part) if isinstance(part, int) or part is None else type(part).__name__)
    return ", ".join(parts)


@dataclass
class _Pattern:
    """The parts of a mask function that the operators can express."""

    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    chunk: int | None = None
    sequence_ids: Tensor | None = None


def _captured(function: Any, name: str) -> Any:
    """The value of the variable ``name`` in the closure of ``function``."""
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _narrower(limit: int, other: int) -> int:
    return other if limit < 0 else min(limit, other)


def _adds_nothing(function: Callable[..., Any]) -> bool:
    """Whether a function lets no query see any key, as the blocks of image tokens do in a text without images."""
    if not function.__qualname__.startswith("blockwise_overlay."):
        return False
    return bool((_captured(function, "block_sequence_ids") < 0).all())


def _read(function: Callable[..., Any], pattern: _Pattern) -> bool:
    """Add the conditions of one of transformers' mask functions to ``pattern``. False if it has no place for them."""
    name = function.__qualname__.split(".")[0]
    if name == "causal_mask_function":
        pattern.causal = True
    elif name == "bidirectional_mask_function":
        pass
    elif name == "and_masks":
        return all(_read(part, pattern) for part in _captured(function, "mask_functions"))
    elif name == "or_masks":
        parts = [part for part in _captured(function, "mask_functions") if not _adds_nothing(part)]
        return len(parts) == 1 and _read(parts[0], pattern)
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
        return _read(_captured(function, "mask_function"), pattern)  # distances within a sequence do not change
    else:
        return False
    return True


def _read_traced(
    function: Callable[..., Any], pattern: _Pattern, config: Any, local_size: int | None, custom: bool
) -> bool:
    """:func:`_read` within ``torch.compile``, which gives no access to the closure of a function.

    The function's name is known, and transformers passes the size of a window or chunk (``local_size``) and whether
    the caller added a function (``custom``).
    """
    name = function.__name__
    pattern.causal = getattr(config, "is_causal", True) and name != "bidirectional_mask_function"
    if name in ("causal_mask_function", "bidirectional_mask_function"):
        return True
    if custom or name != "and_mask":
        return False
    if local_size is not None and local_size == getattr(config, "attention_chunk_size", None):
        pattern.chunk = local_size
    if local_size is not None and pattern.causal:
        pattern.window_left = local_size - 1
    elif local_size is not None:
        pattern.window_left = pattern.window_right = local_size
    return True


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

    Query t has position ``q_offset + t`` and key j position ``kv_offset + j``. ``attention_mask`` is bool
    ``[B, positions]``, False for padding. ``config``, ``local_size`` and ``use_vmap`` describe ``mask_function`` within
    ``torch.compile``.
    """
    if isinstance(attention_mask, Mask):
        return attention_mask
    pattern = _Pattern()
    traced = torch.compiler.is_compiling()
    known = True
    if mask_function is None:
        pattern.causal = True
    elif traced:
        known = _read_traced(mask_function, pattern, config, local_size, use_vmap)
        if known and attention_mask is None and q_length == kv_length and mask_function.__name__ == "and_mask":
            pattern.sequence_ids = _sequence_ids(mask_function, batch_size, q_length, device)
    else:
        known = _read(mask_function, pattern)
    held = isinstance(q_offset, QueryOffset)  # a cache attends: it knows chunks
    if not known or (pattern.chunk is not None and kv_offset + kv_length > pattern.chunk and not held):
        from transformers.masking_utils import sdpa_mask

        whole = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "use_vmap": use_vmap}
        source = None
        if isinstance(q_offset, QueryOffset):
            q_offset.tell(Source(batch_size, q_offset, kv_offset, attention_mask, device))
            q_offset = int(q_offset)
            source = Source(batch_size, q_offset, kv_offset, attention_mask, device)
        places = q_length, kv_length, q_offset, kv_offset
        bias = sdpa_mask(batch_size, *places, mask_function, attention_mask, device=device, **whole)  # type: ignore[arg-type]
        return Mask(False, -1, -1, None, q_length, kv_length, source, bias=bias)
    windows = pattern.window_left, pattern.window_right
    if pattern.sequence_ids is not None:
        return Mask(pattern.causal, *windows, _pack_sequences(pattern.sequence_ids), q_length, kv_length)
    stop = kv_offset + kv_length
    if attention_mask is not None and not traced and attention_mask.shape[1] >= stop:
        attention_mask = None if attention_mask[:, kv_offset:stop].all() else attention_mask
    source = Source(batch_size, q_offset, kv_offset, attention_mask, device)
    if isinstance(q_offset, QueryOffset):
        q_offset.tell(source)
    return Mask(
        pattern.causal, *windows, None, q_length, kv_length, source, chunk=pattern.chunk if held else None
    ).formed()


def _sequence_ids(function: Callable[..., Any], batch: int, length: int, device: torch.device | str) -> Tensor:
    """int64 ``[B, S]``: a new number begins where ``function`` hides the previous token, as a new sequence does."""
    rows, tokens = torch.arange(batch, device=device)[:, None], torch.arange(length, device=device)[None]
    follows = function(rows, torch.zeros_like(rows), tokens[:, 1:], tokens[:, :-1])
    return torch.nn.functional.pad((~follows).long().cumsum(1), (1, 0))


def _has_gaps(real: Tensor) -> bool:
    """Whether bool ``[B, S]`` has padding between the tokens of a row. Reads the mask."""
    first, end = _ends(real)
    return not bool((real.sum(1) == end - first).all())


def _ends(real: Tensor) -> tuple[Tensor, Tensor]:
    """int64 ``[B]``: the first token of each row, and the place behind its last one; equal in a row of padding."""
    place = torch.arange(real.shape[1], device=real.device)
    first = torch.where(real, place, real.shape[1]).amin(1)
    end = torch.where(real, place + 1, 0).amax(1)
    return torch.minimum(first, end), end


def _seen(source: Source, q_length: int, kv_length: int, causal: bool, window_left: int, window_right: int) -> Tensor:
    """bool ``[B, 1, T, S]``: which keys each query sees."""
    query = torch.arange(q_length, device=source.device)[:, None] + source.q_offset
    key = torch.arange(kv_length, device=source.device) + source.kv_offset
    seen = torch.ones(q_length, kv_length, dtype=torch.bool, device=source.device)
    if causal:
        seen = seen & (key <= query)
    if window_left >= 0:
        seen = seen & (key >= query - window_left)
    if window_right >= 0:
        seen = seen & (key <= query + window_right)
    if source.padding is None:
        return seen.expand(source.batch, 1, -1, -1)
    real = source.padding[:, source.kv_offset : source.kv_offset + kv_length]
    real = torch.nn.functional.pad(real, (0, kv_length - real.shape[1]))  # slots that nothing is written to yet
    return seen & real[:, None, None]


def _pack_rows_if_needed(source: Source, q_length: int, kv_length: int, causal: bool, windowed: bool) -> Packing | None:
    """None if every row of queries and keys is one whole sequence."""
    real, q_offset, kv_offset = source.padding, source.q_offset, source.kv_offset
    if isinstance(q_offset, QueryOffset):
        return None
    if real is not None:
        real = real[:, kv_offset : kv_offset + kv_length]
    elif not isinstance(q_offset, Tensor) and (not causal or kv_offset + kv_length == q_offset + q_length):
        return None
    return _pack_rows(source, real, q_length, kv_length, causal, windowed)


def _pack_sequences(sequence_ids: Tensor) -> Packing:
    """Packing of rows with several sequences. ``sequence_ids`` is int ``[B, S]``, another number in each sequence."""
    batch, length = sequence_ids.shape
    new = torch.ones(batch, length, dtype=torch.bool, device=sequence_ids.device)
    new[:, 1:] = sequence_ids.diff(dim=1) != 0
    if torch.compiler.is_compiling():
        # No shape may depend on the number of sequences: there are as many as tokens, and the last ones are empty.
        tokens = torch.arange(batch * length, device=sequence_ids.device)
        starts = torch.where(new.flatten(), tokens, batch * length).sort().values
        longest = length
    else:
        starts = new.flatten().nonzero().flatten()
        longest = 0  # set below
    cu_seqlens = torch.nn.functional.pad(starts, (0, 1), value=batch * length).to(torch.int32)
    if not longest:
        longest = int(cu_seqlens.diff().max())
    return Packing(cu_seqlens, cu_seqlens, longest, longest)


def _pack_rows(
    source: Source, real: Tensor | None, q_length: int, kv_length: int, causal: bool, windowed: bool
) -> Packing:
    """Packing of rows with one sequence, padding before and after it, and unused slots of a static cache."""
    batch, device, q_offset, kv_offset = source.batch, source.device, source.q_offset, source.kv_offset
    first = torch.zeros(batch, dtype=torch.int64, device=device)
    end = torch.full((batch,), kv_length, dtype=torch.int64, device=device)
    if real is not None:
        first, end = _ends(real)
        if torch.compiler.is_compiling():  # outside, rows with gaps do not come here
            gapless = (real.sum(1) == end - first).all()
            torch._assert_async(gapless, "attention_mask: expected padding at the ends of each row only")
    if causal:  # slots after the last query are not written yet
        end = torch.minimum(end, torch.as_tensor(q_offset + q_length - kv_offset, device=end.device))
        first = torch.minimum(first, end)
    shift = kv_offset - q_offset
    first_query = (first + shift).clamp(0, q_length)
    end_query = torch.maximum((end + shift).clamp(0, q_length), first_query)
    if not causal and not windowed:  # in cross-attention all queries are real
        first_query, end_query = torch.zeros_like(first_query), torch.full_like(end_query, q_length)

    # Five sequences for each row: queries, then keys of the padding before it, the sequence, and the padding behind it.
    rows = torch.arange(batch, device=end.device)
    cu_q = (rows * q_length)[:, None] + torch.stack([first_query, first_query, end_query, end_query, end_query], 1)
    cu_k = (rows * kv_length)[:, None] + torch.stack([torch.zeros_like(first), first, end, end, end], 1)
    cu_q[:, 3:] = ((rows + 1) * q_length)[:, None]
    cu_k[:, 4] = (rows + 1) * kv_length
    cu_seqlens_q, cu_seqlens_k = (torch.nn.functional.pad(cu.flatten(), (1, 0)).to(torch.int32) for cu in (cu_q, cu_k))
    return Packing(cu_seqlens_q, cu_seqlens_k, q_length, kv_length)
