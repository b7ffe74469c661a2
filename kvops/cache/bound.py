"""Upper bounds of a pool's use, which the host knows without reading from the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class HostBound:
    """Upper bounds of the blocks held and of the longest list of each row. Only the device has the exact numbers.

    A list that gains t tokens, in any number of steps, gains at most ceil(t / block_size) blocks beyond those it held.
    Rows that may share blocks have a common bound: at most ``together`` different blocks, plus those that each row took
    or copied since.

    Attributes:
        blocks: blocks held by each row at the last exact reading, or a budget that bounds them.
        tokens: tokens that each row got since then.
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
        # Sharing rows that have not written their last block yet, and sharing rows that may write earlier blocks.
        self._unwritten: set[int] = set()
        self._rewound: set[int] = set()

    def row_blocks(self, row: int) -> int:
        """Blocks that a row holds, including shared ones."""
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
        """Record that ``rows`` have copied at most ``width`` shared blocks of each list."""
        for row in self.sharing.intersection(rows):
            self._copied[row] += self._most_copies(row, width)

    def add(self, rows: Sequence[int], tokens: int) -> None:
        """Record that ``rows`` have gained ``tokens`` each."""
        for row in rows:
            if row in self.sharing:
                self._copied[row] += self._copies(row, tokens)
                if tokens:
                    self._unwritten.discard(row)
            self.tokens[row] += tokens
            self.longest[row] += tokens

    def rewind(self, rows: Sequence[int]) -> None:
        """Record that tokens of ``rows`` were rolled back: new tokens may be written to any block."""
        self._rewound |= self.sharing.intersection(rows)

    def limit(self, row: int, blocks: int) -> None:
        """Record that a row holds at most ``blocks``."""
        most, different = min(self.row_blocks(row), blocks), self._different()
        self.blocks[row], self.tokens[row] = most, 0
        self.longest[row] = min(self.longest[row], most * self.block_size)
        if row in self.sharing:
            self._settle(different, self.sharing if most else self.sharing - {row})

    def fork(self, row: int, into: Sequence[int]) -> None:
        """Record that the empty rows ``into`` share all blocks of ``row``."""
        different = self._different() + (0 if row in self.sharing else self.row_blocks(row))
        self._settle(different, self.sharing | {row}, at_least=1)
        for new in into:
            self.blocks[new], self.tokens[new], self.longest[new] = self.blocks[row], 0, self.longest[row]
        self.sharing.update(into)
        self._unwritten.update((row, *into))

    def permute(self, rows: Sequence[int]) -> None:
        """Record that row i holds what row ``rows[i]`` held, each of them once; the other rows stay."""
        before = [*rows, *range(len(rows), len(self.blocks))]
        for numbers in (self.blocks, self.tokens, self.longest, self._copied):
            numbers[:] = [numbers[row] for row in before]
        self.sharing, self._unwritten, self._rewound = (
            {row for row, old in enumerate(before) if old in marked}
            for marked in (self.sharing, self._unwritten, self._rewound)
        )

    def join(self, row: int, other: int, blocks: int) -> None:
        """Record that ``other`` holds ``blocks`` full blocks of ``row`` in addition to its own."""
        newly_sharing = {row, other} - self.sharing
        different = self._different() + sum(map(self.row_blocks, newly_sharing))
        self._settle(different, self.sharing | {row, other}, at_least=1)
        self.blocks[other] += blocks

    def part(self, rows: Sequence[int]) -> None:
        """Record that ``rows`` no longer share blocks."""
        self._settle(self._different(), self.sharing.difference(rows))

    def read(self, held: Sequence[int], in_use: int, shares: Sequence[int]) -> None:
        """Replace the bounds by exact numbers: the blocks of each row and of all rows, and which rows share blocks."""
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
        """Set the bound of the rows ``sharing`` to ``different`` blocks, if there are ``at_least`` as many rows."""
        self.sharing = set(sharing)
        if len(self.sharing) < at_least:  # a single row shares nothing
            self.sharing = set()
        for row in self.sharing:
            self.blocks[row], self.tokens[row] = self.row_blocks(row), 0
        self._copied = [0] * len(self.blocks)
        self.together = min(different, sum(self.blocks[row] for row in self.sharing))
        self._unwritten &= self.sharing
        self._rewound &= self.sharing
