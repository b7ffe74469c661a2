"""What the host knows of a pool of blocks without asking the device: upper bounds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class HostBound:
    """Upper bounds of what the device knows exactly: blocks held and the longest list of each row.

    A list that gains t tokens, in however many steps, gains at most ceil(t / block_size) blocks beyond those it held.
    Rows that may share blocks count once: together they hold at most ``together`` different blocks, and those that
    each of them took or copied since.

    Attributes:
        blocks: held by each row at the last exact reading, or bounded by a budget.
        tokens: that each row got since.
        longest: the longest list of each row.
        sharing: the rows that may share blocks with another.
    """

    def __init__(self, rows: int, lists: int, block_size: int) -> None:
        self.lists = lists
        self.block_size = block_size
        self.blocks = [0] * rows
        self.tokens = [0] * rows
        self.longest = [0] * rows
        self.sharing: set[int] = set()
        self.together = 0
        self._copied = [0] * rows
        # Of the sharing rows: those that have not written their last block yet, and those that may write earlier ones.
        self._unwritten: set[int] = set()
        self._rewound: set[int] = set()

    def _gain(self, tokens: int) -> int:
        return self.lists * -(-tokens // self.block_size)

    def row_blocks(self, row: int) -> int:
        return self.blocks[row] + self._gain(self.tokens[row])

    def _copies(self, row: int, tokens: int) -> int:
        """Shared blocks that ``tokens`` more tokens of a sharing row may write, each of which is copied first."""
        if tokens and row in self._rewound:
            return self.lists * (1 - (-(tokens - 1) // self.block_size))
        return self.lists if tokens and row in self._unwritten else 0

    def total(self, rows: Sequence[int] = (), more: int = 0) -> int:
        """Different blocks held by all rows, if ``rows`` gained ``more`` tokens each."""
        gained = dict.fromkeys(rows, more)
        alone, each, together = 0, 0, self.together
        for row in range(len(self.blocks)):
            tokens = gained.get(row, 0)
            gain = self._gain(self.tokens[row] + tokens)
            if row in self.sharing:
                each += self.blocks[row] + gain
                together += gain + self._copied[row] + self._copies(row, tokens)
            else:
                alone += self.blocks[row] + gain
        return alone + min(each, together)

    def total_if_copied(self, rows: Sequence[int], width: int) -> int:
        """Different blocks held by all rows, if ``rows`` copied at most ``width`` shared blocks of each list."""
        return self.total() + self.most_copies(rows, width)

    def most_copies(self, rows: Sequence[int], width: int) -> int:
        """Copies that ``rows`` need at most to own ``width`` blocks of each list."""
        return sum(self._most_copies(row, width) for row in self.sharing.intersection(rows))

    def copied(self, rows: Sequence[int], width: int) -> None:
        """``rows`` may have copied up to ``width`` shared blocks of each list."""
        for row in self.sharing.intersection(rows):
            self._copied[row] += self._most_copies(row, width)

    def _most_copies(self, row: int, width: int) -> int:
        return min(self.row_blocks(row), self.lists * width)

    def add(self, rows: Sequence[int], tokens: int) -> None:
        for row in rows:
            if row in self.sharing:
                self._copied[row] += self._copies(row, tokens)
                if tokens:
                    self._unwritten.discard(row)
            self.tokens[row] += tokens
            self.longest[row] += tokens

    def rewind(self, rows: Sequence[int]) -> None:
        """Tokens of ``rows`` are taken back: the next ones may go into any block."""
        self._rewound |= self.sharing.intersection(rows)

    def limit(self, row: int, blocks: int) -> None:
        """A row is known to hold at most ``blocks``."""
        most, different = min(self.row_blocks(row), blocks), self._different()
        self.blocks[row], self.tokens[row] = most, 0
        self.longest[row] = min(self.longest[row], most * self.block_size)
        if row in self.sharing:
            self._settle(different, self.sharing if most else self.sharing - {row})

    def fork(self, row: int, into: Sequence[int]) -> None:
        """The empty rows ``into`` get what ``row`` holds."""
        different = self._different() + (0 if row in self.sharing else self.row_blocks(row))
        self._settle(different, self.sharing | {row}, at_least=1)
        for new in into:
            self.blocks[new], self.tokens[new], self.longest[new] = self.blocks[row], 0, self.longest[row]
        self.sharing.update(into)
        self._unwritten.update((row, *into))

    def join(self, row: int, other: int, blocks: int) -> None:
        """``other`` gets ``blocks`` that ``row`` has, all of them full, beside its own."""
        strangers = {row, other} - self.sharing
        different = self._different() + sum(map(self.row_blocks, strangers))
        self._settle(different, self.sharing | {row, other}, at_least=1)
        self.blocks[other] += blocks

    def part(self, rows: Sequence[int]) -> None:
        """``rows`` share nothing any more."""
        self._settle(self._different(), self.sharing.difference(rows))

    def read(self, held: Sequence[int], in_use: int, shares: Sequence[int]) -> None:
        """The exact numbers: blocks held by each row, by all, and whether each row may share any."""
        self.blocks[:], self.tokens[:] = held, [0] * len(held)
        sharing = {row for row, some in enumerate(shares) if some}
        alone = sum(blocks for row, blocks in enumerate(held) if row not in sharing)
        self._settle(in_use - alone, sharing, at_least=1)
        self._unwritten |= self.sharing

    def _different(self) -> int:
        """Different blocks held by the rows that may share."""
        each = sum(map(self.row_blocks, self.sharing))
        since = sum(self._gain(self.tokens[row]) + self._copied[row] for row in self.sharing)
        return min(each, self.together + since)

    def _settle(self, different: int, sharing: Iterable[int], *, at_least: int = 2) -> None:
        """Count anew from here: the rows ``sharing`` hold at most so many different blocks."""
        self.sharing = set(sharing)
        if len(self.sharing) < at_least:  # nobody to share with
            self.sharing = set()
        for row in self.sharing:
            self.blocks[row], self.tokens[row] = self.row_blocks(row), 0
        self._copied = [0] * len(self.blocks)
        self.together = min(different, sum(self.blocks[row] for row in self.sharing))
        self._unwritten &= self.sharing
        self._rewound &= self.sharing
