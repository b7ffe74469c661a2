"""What all layers of a step share: its packed queries, and which slots each request reads and writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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

    @classmethod
    def room(cls, tokens: int, device: torch.device) -> Slots:
        """Room for the slots of ``tokens`` tokens."""
        return cls(*(torch.zeros(*shape, dtype=torch.int32, device=device) for shape in ((tokens, 1), (tokens,))))

    def filled(self, slots: Slots) -> Slots:
        """``slots``, written into the first entries of these."""
        n = len(slots.lens)
        return Slots(self.pages[:n].copy_(slots.pages), self.lens[:n].copy_(slots.lens))


@dataclass(frozen=True)
class Request:
    """A request of a step: its number (0 where there is none), and its tokens before the step and after it."""

    number: int
    computed: int
    tokens: int


def requests_of(numbers: Tensor, new: Tensor, total: Tensor) -> tuple[Request, ...]:
    """The requests of a step with ``new`` tokens of ``total`` each, int ``[B]``."""
    rows = zip(numbers.tolist(), new.tolist(), total.tolist(), strict=True)
    return tuple(Request(number, after - added, after) for number, added, after in rows)


@dataclass(frozen=True)
class Step:
    """The attention metadata of one step.

    Attributes:
        num_tokens: real tokens of the step; what follows them is padding.
        slots: where they are written.
        starts: int32 ``[B + 1]``, where the tokens of each request begin, and where those of the last one end.
        longest: the most tokens of a request.
        tables: what each request reads: int32 ``[B, max_blocks]`` pages, or ``[L, B, Hkv, max_blocks]`` cells of a
            compressed cache.
        lens: int32 ``[B]`` or ``[L, B, Hkv]``, slots of each list, those of the new tokens included.
        layers: the compressed layers (typed loosely: their module stands above this one), or None.
        positions: int32 ``[num_tokens, 1]``, of compressed layers.
        decays: float32 ``[B]``, of compressed layers: what remains of the scores that a request's slots have.
        requests: one for each row, where attention is compared.
        check: of layers that are not compressed, compares their attention; or None.
    """

    num_tokens: int
    slots: Slots
    starts: Tensor
    longest: int
    tables: Tensor
    lens: Tensor
    layers: Any = None
    positions: Tensor | None = None
    decays: Tensor | None = None
    requests: tuple[Request, ...] = ()
    check: Any = None

    @property
    def packed(self) -> dict[str, Any]:
        """How operators find the tokens of each request."""
        return {"cu_seqlens_q": self.starts, "max_seqlen_q": self.longest}
