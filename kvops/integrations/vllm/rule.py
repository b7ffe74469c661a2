"""How many pages a request keeps: a function of the number of its computed tokens alone.

vLLM's scheduler gives pages away and takes them back; the worker moves keys and values about. Both follow this rule, so
they need not talk to each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """Of each ``chunk`` pages of a request, ``keep`` stay once all their tokens are ``protect_last`` tokens back.

    A request's pages stand in columns, page c with the tokens from ``c * block_size`` on. A chunk that is compacted
    leaves the first ``keep`` of its columns filled and the others empty. What the columns hold after that is decided
    by scores: all heads of all earlier chunks compete for the room that is left.

    Attributes:
        keep, chunk: pages; ``1 <= keep <= chunk``.
        block_size: tokens of a page.
        protect_last: so many newest tokens are in no chunk that is compacted.
    """

    keep: int
    chunk: int
    block_size: int
    protect_last: int

    @classmethod
    def for_ratio(cls, ratio: float, chunk: int, block_size: int, protect_last: int) -> Rule:
        """The rule that keeps at most 1 / ``ratio`` of ``chunk`` pages, which are more where ``ratio`` is larger."""
        chunk = max(chunk, math.ceil(ratio))
        return cls(int(chunk / ratio), chunk, block_size, protect_last)

    def done(self, computed: int) -> int:
        """How many chunks are compacted when ``computed`` tokens are in the cache."""
        return max(0, computed - self.protect_last) // (self.chunk * self.block_size)

    def columns(self, tokens: int) -> int:
        """Columns of ``tokens`` tokens, whether filled or emptied."""
        return -(-tokens // self.block_size)

    def emptied(self, chunk: int) -> range:
        """The columns of chunk ``chunk`` that hold nothing once it is compacted."""
        return range(chunk * self.chunk + self.keep, (chunk + 1) * self.chunk)

    def kept(self, chunks: int) -> list[int]:
        """The columns that stay of the first ``chunks`` chunks."""
        return [chunk * self.chunk + column for chunk in range(chunks) for column in range(self.keep)]

    def held(self, computed: int, tokens: int) -> int:
        """Pages of a request that has ``computed`` tokens in the cache and room for ``tokens``."""
        return self.columns(tokens) - self.done(computed) * (self.chunk - self.keep)

    def peak(self, tokens: int, in_flight: int) -> int:
        """The most pages that a request holds at once on its way to ``tokens`` tokens.

        Args:
            tokens: of the request when it ends.
            in_flight: the most tokens that are given room before their chunk can be compacted, which is what the steps
                under way may compute.
        """
        if tokens <= 0:
            return 0
        span = self.chunk * self.block_size
        # Just before a chunk is compacted, a request holds the most: more from chunk to chunk until its tokens end.
        last = max(0, tokens - in_flight - self.protect_last) // span
        computed = (
            min(chunks * span + self.protect_last + span - 1, tokens - 1)
            for chunks in range(max(0, last - 1), last + 2)
        )
        return max(self.held(before, min(before + in_flight, tokens)) for before in computed)
