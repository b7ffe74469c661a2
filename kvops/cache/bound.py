"""What the host knows of a pool of blocks without reading from the device: upper bounds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class HostBound:
    """Upper bounds of numbers that only the device knows exactly: blocks held, and the longest list of each row.

    A list that gains t tokens, in any number of steps, gains at most ceil(t / block_size) blocks beyond those it held.
    Rows that may share blocks are bounded together: they hold at most ``together`` different blocks, and those that
    each of them took or copied since.

    Attributes:
        blocks: blocks held by each row at the last exact reading, or a budget that bounds them.
        tokens: tokens that each row got since.
        longest: the longest list of each row.
        sharing: rows that may share blocks with another row.
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

    def row_blocks(self, row: int) -> int:
        """Blocks that a row holds, shared ones included."""
        return self.blocks[row] + self._gain(self.tokens[row])

    def total(self, rows: Sequence[int] = (), more: int = 0) -> int:
        """Different blocks that all rows hold if ``rows`` gain ``more`` tokens each."""
        gained = dict.fromkeys(rows, more)
        unshared, one_by_one, together = 0, 0, self.together
        for row in range(len(self.blocks)):
            tokens = gained.get(row, 0)
            gain = self._gain(self.tokens[row] + tokens)
            if row in self.sharing:
                one_by_one += self.blocks[row] + gain
                together += gain + self._copied[row] + self._copies(row, tokens)
            else:
                unshared += self.blocks[row] + gain
        return unshared + min(one_by_one, together)

    def total_if_copied(self, rows: Sequence[int], width: int) -> int:
        """Different blocks that all rows hold if ``rows`` copy ``width`` shared blocks of each list."""
        return self.total() + self.most_copies(rows, width)

    def most_copies(self, rows: Sequence[int], width: int) -> int:
        """Copies that ``rows`` need at most to unshare ``width`` blocks of each list."""
        return sum(self._most_copies(row, width) for row in self.sharing.intersection(rows))

    def copied(self, rows: Sequence[int], width: int) -> None:
        """``rows`` have copied at most ``width`` shared blocks of each list."""
        for row in self.sharing.intersection(rows):
            self._copied[row] += self._most_copies(row, width)

    def add(self, rows: Sequence[int], tokens: int) -> None:
        """``rows`` have gained ``tokens`` each."""
        for row in rows:
            if row in self.sharing:
                self._copied[row] += self._copies(row, tokens)
                if tokens:
                    self._unwritten.discard(row)
            self.tokens[row] += tokens
            self.longest[row] += tokens

    def rewind(self, rows: Sequence[int]) -> None:
        """Tokens of ``rows`` have been taken back: the next ones may be written to any block."""
        self._rewound |= self.sharing.intersection(rows)

    def limit(self, row: int, blocks: int) -> None:
        """A row holds at most ``blocks``."""
        most, different = min(self.row_blocks(row), blocks), self._different()
        self.blocks[row], self.tokens[row] = most, 0
        self.longest[row] = min(self.longest[row], most * self.block_size)
        if row in self.sharing:
            self._settle(different, self.sharing if most else self.sharing - {row})

    def fork(self, row: int, into: Sequence[int]) -> None:
        """The empty rows ``into`` now share what ``row`` holds."""
        different = self._different() + (0 if row in self.sharing else self.row_blocks(row))
        self._settle(different, self.sharing | {row}, at_least=1)
        for new in into:
            self.blocks[new], self.tokens[new], self.longest[new] = self.blocks[row], 0, self.longest[row]
        self.sharing.update(into)
        self._unwritten.update((row, *into))

    def join(self, row: int, other: int, blocks: int) -> None:
        """``other`` now holds ``blocks`` of ``row``, all of them full, beside its own."""
        newly_sharing = {row, other} - self.sharing
        different = self._different() + sum(map(self.row_blocks, newly_sharing))
        self._settle(different, self.sharing | {row, other}, at_least=1)
        self.blocks[other] += blocks

    def part(self, rows: Sequence[int]) -> None:
        """``rows`` no longer share anything."""
        self._settle(self._different(), self.sharing.difference(rows))

    def read(self, held: Sequence[int], in_use: int, shares: Sequence[int]) -> None:
        """Take exact numbers: blocks held by each row and by all, and whether each row shares any."""
        self.blocks[:], self.tokens[:] = held, [0] * len(held)
        sharing = {row for row, count in enumerate(shares) if count}
        unshared = sum(blocks for row, blocks in enumerate(held) if row not in sharing)
        self._settle(in_use - unshared, sharing, at_least=1)
        self._unwritten |= self.sharing

    def _gain(self, tokens: int) -> int:
        return self.lists * -(-tokens // self.block_size)

    def _copies(self, row: int, tokens: int) -> int:
        """Shared blocks that a sharing row may have to copy before it writes ``tokens`` more tokens."""
        if tokens and row in self._rewound:
            return self.lists * (1 - (-(tokens - 1) // self.block_size))
        return self.lists if tokens and row in self._unwritten else 0

    def _most_copies(self, row: int, width: int) -> int:
        return min(self.row_blocks(row), self.lists * width)

    def _different(self) -> int:
        """Different blocks that the sharing rows hold."""
        one_by_one = sum(map(self.row_blocks, self.sharing))
        since = sum(self._gain(self.tokens[row]) + self._copied[row] for row in self.sharing)
        return min(one_by_one, self.together + since)

    def _settle(self, different: int, sharing: Iterable[int], *, at_least: int = 2) -> None:
        """From here on the rows ``sharing``, if there are ``at_least`` so many, hold at most ``different`` blocks."""
        self.sharing = set(sharing)
        if len(self.sharing) < at_least:  # a row alone shares nothing
            self.sharing = set()
        for row in self.sharing:
            self.blocks[row], self.tokens[row] = self.row_blocks(row), 0
        self._copied = [0] * len(self.blocks)
        self.together = min(different, sum(self.blocks[row] for row in self.sharing))
        self._unwritten &= self.sharing
        self._rewound &= self.sharing
