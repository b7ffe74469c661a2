"""How many pages a request keeps: a function of the number of its computed tokens alone.

vLLM's scheduler gives pages away and takes them back; the worker moves keys and values about. Both follow this rule, so
they need not talk to each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvops.integrations.vllm.options import Options


@dataclass(frozen=True)
class Rule:
    """A request holds its share, 1 / ``ratio`` of its pages, and at most ``slack + chunk`` pages more.

    A request's pages stand in columns, page c with the tokens from ``c * block_size`` on. Columns whose tokens are all
    ``protect_last`` tokens back are *old*. They are compacted ``chunk`` at a time: what they hold moves into the
    columns that stay, and the others are empty. All slots of all old columns compete for the room each time.

    Whether a column stays does not depend on when it is compacted. So the columns that stay of a longer request begin
    with those of a shorter one.

    Attributes:
        ratio: how many times smaller a long request becomes, above 1. The share counts protected tokens too.
        slack: pages on top of the share.
        chunk: so many old columns are compacted together.
        block_size: tokens of a page.
        protect_first: the columns of so many first tokens stay, and the first column in any case.
        protect_last: so many newest tokens are in no column that is compacted.
    """

    ratio: float
    slack: int
    chunk: int
    block_size: int
    protect_first: int
    protect_last: int

    @classmethod
    def of(cls, options: Options, block_size: int) -> Rule:
        return cls(options.ratio, options.slack, options.chunk, block_size, options.protect_first, options.protect_last)

    def columns(self, tokens: int) -> int:
        """Columns of ``tokens`` tokens, whether filled or emptied."""
        return -(-tokens // self.block_size)

    def keep(self, old: int) -> int:
        """How many of ``old`` columns stay when they are compacted."""
        recent, least = self.columns(self.protect_last), max(1, self.columns(self.protect_first))
        share = int((old + recent) / self.ratio) + self.slack - recent
        return min(old, max(least, share))

    def old(self, computed: int) -> int:
        """How many columns are compacted when ``computed`` tokens are in the cache; 0 while all of them would stay."""
        old = max(0, computed - self.protect_last) // (self.chunk * self.block_size) * self.chunk
        return old if self.keep(old) < old else 0

    def stays(self, column: int) -> bool:
        """Whether a column is filled after it was compacted."""
        return self.keep(column + 1) > self.keep(column)

    def emptied(self, before: int, after: int) -> list[int]:
        """The columns that become empty when ``after`` columns are compacted in place of ``before``."""
        return [column for column in range(before, after) if not self.stays(column)]

    def held(self, computed: int, tokens: int) -> int:
        """Pages of a request that has ``computed`` tokens in the cache and room for ``tokens``."""
        old = self.old(computed)
        return self.columns(tokens) - old + self.keep(old)

    def peak(self, tokens: int, in_flight: int) -> int:
        """The most pages that a request holds at once on its way to ``tokens`` tokens.

        Args:
            tokens: of the request when it ends.
            in_flight: the most tokens that are given room before columns can be compacted, which is what the steps
                under way may compute.
        """
        if tokens <= 0:
            return 0
        span = self.chunk * self.block_size
        # Just before columns are compacted, a request holds the most: more from time to time until its tokens end.
        last = max(0, tokens - in_flight - self.protect_last) // span
        computed = (
            min(times * span + self.protect_last + span - 1, tokens - 1) for times in range(max(0, last - 1), last + 2)
        )
        return max(self.held(before, min(before + in_flight, tokens)) for before in computed)
