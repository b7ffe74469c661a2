"""What all layers of a step share: its queries as rectangles, and which slots each request reads and writes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Requests whose numbers of query tokens differ by more are not attended to together: padded rows take time as well.
_MOST_PADDED = 1.25


@dataclass(frozen=True)
class Rectangle:
    """Requests of a step whose queries are attended to in one call: vLLM packs tokens, kvops has ``[B, T]``.

    Attributes:
        rows: which requests, a slice where they stand together.
        tokens: where their query tokens stand among those of the step: a slice where nothing is padded, or else int64
            ``[B * T]``, which names any token for padding.
        real: int64 ``[tokens]``, the places in ``[B * T]`` that are not padding; None where all are real.
        q_lens: int32 ``[B]``, where something is padded.
        shape: B, T.
    """

    rows: slice | Tensor
    tokens: slice | Tensor
    real: Tensor | None
    q_lens: Tensor | None
    shape: tuple[int, int]

    def pack(self, packed: Tensor) -> Tensor:
        """``[tokens of the step, ...]`` -> ``[B, T, ...]``."""
        return packed[self.tokens].unflatten(0, self.shape)

    def last(self, q: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """The last ``count`` (at most T) real tokens of each row of ``q`` ``[B, T, ...]``, and how many are real."""
        if self.q_lens is None:
            return q[:, -count:], None
        first = (self.q_lens - count).clamp(min=0)[:, None]
        place = first + torch.arange(count, device=q.device)
        return q[torch.arange(len(q), device=q.device)[:, None], place], self.q_lens.clamp(max=count)

    def unpack(self, values: Tensor, packed: Tensor) -> None:
        """Write ``[B, T, ...]`` to where its tokens stand in ``packed``."""
        flat = values.flatten(0, 1)
        if isinstance(self.tokens, slice):
            packed[self.tokens] = flat
        else:
            packed.index_copy_(0, self.tokens[self.real], flat[self.real])


def rectangles(starts: Sequence[int], device: torch.device | str = "cpu") -> Iterator[Rectangle]:
    """Cut the packed queries of a step into as few rectangles as padding allows.

    Args:
        starts: where the tokens of each request begin, and where those of the last one end.
        device: of the indices.
    """
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    order = sorted((row for row, length in enumerate(lengths) if length), key=lengths.__getitem__)
    while order:
        most = lengths[order[0]] * _MOST_PADDED
        size = sum(lengths[row] <= most for row in order)
        rows, order = order[:size], order[size:]
        yield _rectangle(rows, starts, [lengths[row] for row in rows], device)


def _rectangle(rows: list[int], starts: Sequence[int], lengths: list[int], device: Any) -> Rectangle:
    B, T = len(rows), max(lengths)
    together = rows[-1] - rows[0] == B - 1  # sorting is stable: rows of one length ascend
    if together and min(lengths) == T:
        tokens = slice(starts[rows[0]], starts[rows[0]] + B * T)
        return Rectangle(slice(rows[0], rows[-1] + 1), tokens, None, None, (B, T))
    # Made on the host: its lengths are known there, and no kernel has to wait for them.
    token = torch.arange(T)
    count = torch.tensor(lengths)
    inside = token < count[:, None]
    place = torch.tensor([starts[row] for row in rows])[:, None] + torch.where(inside, token, 0)
    return Rectangle(
        torch.tensor(rows, device=device),
        place.flatten().to(device),
        inside.flatten().nonzero()[:, 0].to(device),
        count.int().to(device),
        (B, T),
    )


@dataclass(frozen=True)
class Group:
    """A rectangle with the lists that its queries read.

    Attributes:
        rectangle: the queries.
        tables: int32 ``[B, max_blocks]`` pages, or ``[L, B, Hkv, max_blocks]`` cells of a compressed cache.
        lens: int32 ``[B]`` or ``[L, B, Hkv]``, slots of each list, those of the new tokens included.
    """

    rectangle: Rectangle
    tables: Tensor
    lens: Tensor

    @classmethod
    def of(cls, rectangle: Rectangle, tables: Tensor, lens: Tensor, dim: int) -> Group:
        """The rows of ``rectangle`` of the tables and lengths of a step; ``dim`` is that of the requests."""
        rows = rectangle.rows
        if isinstance(rows, Tensor):
            return cls(rectangle, tables.index_select(dim, rows), lens.index_select(dim, rows))
        start, size = rows.start, rows.stop - rows.start
        return cls(rectangle, tables.narrow(dim, start, size), lens.narrow(dim, start, size))


@dataclass(frozen=True)
class Slots:
    """Where new keys and values go: every token as a list of its own, whose last slot is the token's.

    vLLM gives each token a page and a slot in it. A page that is being filled has all heads in their own places, in a
    compressed cache too, so that this is all that writing needs.
    """

    pages: Tensor  # int32 [tokens, 1]
    lens: Tensor  # int32 [tokens], 0 for padding, which goes nowhere

    @classmethod
    def of(cls, slot_mapping: Tensor, page_size: int) -> Slots:
        """From vLLM's int64 ``[tokens]``: ``page * page_size + slot``, -1 for padding."""
        pages = torch.div(slot_mapping, page_size, rounding_mode="floor").int()
        lens = torch.where(slot_mapping >= 0, slot_mapping % page_size + 1, 0).int()
        return cls(pages[:, None], lens)


@dataclass(frozen=True)
class Request:
    """A request of a step: its first page, and its tokens before the step and after it."""

    first_page: int
    computed: int
    tokens: int


@dataclass(frozen=True)
class Step:
    """The attention metadata of one step.

    Attributes:
        num_tokens: real tokens of the step; what follows them is padding.
        slots: where they are written.
        groups: what attends, in as few calls as possible.
        layers: the compressed layers (typed loosely: their module stands above this one), or None.
        positions: int32 ``[num_tokens, 1]``, of compressed layers.
        requests: one for each row, of compressed layers and where ``check`` is given.
        check: of layers that are not compressed, compares their attention; or None.
    """

    num_tokens: int
    slots: Slots
    groups: list[Group]
    layers: Any = None
    positions: Tensor | None = None
    requests: tuple[Request, ...] = ()
    check: Any = None
