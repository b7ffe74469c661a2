"""A plain Python model of the paged cache for the machines of test_cache_machine: lists, blocks and invariants."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from cache_helpers import make_cache, raw_state
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

import kvops

Key = tuple[int, int, int]  # layer, row, head


# Two messages of one refusal: more new tokens than a list can ever hold, and more than it still has room for.
TOO_LONG = "num_tokens: (a list would hold|expected at most max_tokens)"


class Entry(NamedTuple):
    position: int
    name: float
    score: float = 0.0


class Block:
    """A block, compared by identity. Lists and remembered prefixes that share a block hold the same object."""


class Remembered(NamedTuple):
    """The last block of a prefix in every list, and what it held when it was remembered."""

    blocks: dict[tuple[int, int], Block]
    contents: dict[tuple[int, int], list[Entry]]


class CacheModel(RuleBasedStateMachine):
    """Lists of entries, and the blocks that hold them. ``CacheMachine`` has the rules, which keep the invariants."""

    exact = True

    @initialize(
        layers=st.integers(1, 2),
        heads=st.integers(1, 2),
        rows=st.sampled_from([4, 3, 2, 1]),
        size=st.sampled_from([4, 1, 2, 3, 8, 16, 32]),
        capacity=st.sampled_from([40, 38, 33, 25, 7]),
        share=st.sampled_from([0.45, 0.3, 0.7, 1.0]),
        data=st.data(),
    )
    def start(self, layers, heads, rows, size, capacity, share, data):
        """Begin with two sequences and two forks of the first: random rules seldom build them from nothing."""
        self.layers, self.heads, self.size, self.capacity = layers, heads, size, capacity
        self.rows = range(rows)
        self.places = [(layer, head) for layer in range(layers) for head in range(heads)]
        self.num_blocks = max(1, int(share * layers * heads * rows * self.blocks(capacity)))
        self.cache = make_cache(
            "cpu",
            num_layers=layers,
            num_kv_heads=heads,
            num_blocks=self.num_blocks,
            max_batch=rows,
            max_tokens=capacity,
            block_size=size,
        )
        self.cache._pool.exact = self.exact
        keys = self.of(*self.rows)
        self.lists: dict[Key, list[Entry]] = {key: [] for key in keys}
        self.held: dict[Key, list[Block]] = {key: [] for key in keys}
        self.remembered: dict[tuple[str, tuple[int, ...]], Remembered] = {}
        self.tokens: list[list[int]] = [[] for _ in self.rows]
        self.next = [0] * rows
        self.may_roll_back = [0] * rows
        self.compressed = [False] * rows
        self.steps = 0
        for row, most in zip(self.rows, (30, 14), strict=False):
            self._grow([row], data.draw(st.integers(0, most)), None)
        forks = [fork for fork in ([2, 3], [3, 1], [3], []) if set(fork) <= set(self.rows)]
        self._fork(0, data.draw(st.sampled_from(forks)), None)

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def draw_rows(self, data) -> list[int]:
        return data.draw(st.lists(st.sampled_from(self.rows), min_size=1, max_size=len(self.rows), unique=True))

    def of(self, *rows: int) -> list[Key]:
        """The lists of the rows, in the order of the tables."""
        return [(layer, row, head) for layer in range(self.layers) for row in rows for head in range(self.heads)]

    @contextmanager
    def refusing(self, error, message):
        """The operation raises, and nothing has changed."""
        before = raw_state(self.cache)
        with pytest.raises(error, match=message) as refusal:
            yield refusal
        assert raw_state(self.cache) == before

    def holders(self) -> Counter[Block]:
        prefixes = (entry.blocks.values() for entry in self.remembered.values())
        return Counter(block for held in (*self.held.values(), *prefixes) for block in held)

    def idle(self) -> int:
        """Blocks that only remembered prefixes hold."""
        return len(self.holders()) - len({block for held in self.held.values() for block in held})

    def free(self) -> int:
        return self.num_blocks - len(self.holders())

    def copies(self, written: dict[Key, range]) -> list[tuple[Key, int]]:
        """The places whose block must be copied before all of them are written: those that others hold too."""
        holders = self.holders()
        places = [(key, column) for key, columns in written.items() for column in columns]
        places = [(key, column) for key, column in places if column < len(self.held[key])]
        writers: dict[Block, list[tuple[Key, int]]] = {}
        for key, column in places:
            writers.setdefault(self.held[key][column], []).append((key, column))
        return [
            place
            for block, those in writers.items()
            if holders[block] > 1
            for place in (those[1:] if len(those) == holders[block] else those)
        ]

    def admitted(self, needs, call, *, for_copies=False) -> bool:
        """``call``, which needs as many blocks as ``needs`` says and copies those at the places that it says.

        Remembered prefixes are given up for that where they must be, those that rows use for copies only, and none
        otherwise; where it would not help, the call is refused.
        """
        needed, copies = needs()
        enough = needed <= self.free()
        if needed > self.free() + self.idle() and not (for_copies and self.fits_without_prefixes(needs)):
            with self.refusing(kvops.OutOfBlocksError, "but") as refusal:
                call()
            error = refusal.value
            assert (error.needed, error.free, error.total) == (needed, self.free(), self.num_blocks)
            return False
        call()
        index = self.cache._prefixes
        left = {prefix: entry for prefix, entry in self.remembered.items() if self.key_of(prefix) in index.entries}
        assert len(index) == len(left)
        assert (left == self.remembered) == enough
        self.remembered = left
        needed, copies = needs()
        assert needed <= self.free()
        for key, column in copies:
            self.held[key][column] = Block()
        return True

    def fits_without_prefixes(self, needs) -> bool:
        kept, self.remembered = self.remembered, {}
        fits = needs()[0] <= self.free()
        self.remembered = kept
        return fits

    def key_of(self, prefix) -> bytes:
        salt, tokens = prefix
        return list(self.cache._prefixes._keys(tokens, salt))[-1]

    def growth(self, counts: dict[Key, int], *, copy_all: bool = False) -> tuple[int, list[tuple[Key, int]]]:
        """Blocks that so many more tokens take, and the places to copy first."""
        ends = {key: len(self.lists[key]) + count for key, count in counts.items()}
        grow = sum(max(self.blocks(end) - len(self.held[key]), 0) for key, end in ends.items())
        written = {
            key: range(len(self.lists[key]) // self.size, self.blocks(ends[key]))
            for key, count in counts.items()
            if count
        }
        copies = self.copies({key: range(len(self.held[key])) for key in counts} if copy_all else written)
        return grow + len(copies), copies

    def own_all(self, rows, call) -> bool:
        """``call`` gives the rows blocks of their own; False where there are too few."""
        return self.copied(lambda: {key: range(len(self.held[key])) for key in self.of(*rows)}, call)

    def copied(self, written, call) -> bool:
        def needs():
            copies = self.copies(written())
            return len(copies), copies

        return self.admitted(needs, call, for_copies=True)

    def forget_row(self, row):
        self.next[row] = self.may_roll_back[row] = 0
        self.compressed[row], self.tokens[row] = False, []
        for key in self.of(row):
            self.lists[key], self.held[key] = [], []

    def slots(self, side: torch.Tensor, key: Key) -> list:
        table = self.cache.block_tables[key][: self.blocks(len(self.lists[key]))].long()
        return side[table].flatten(0, 1)[: len(self.lists[key])].tolist()

    @invariant()
    def every_list_is_as_it_should_be(self):
        cache = self.cache
        assert cache.seq_lens.tolist() == [
            [[len(self.lists[layer, row, head]) for head in range(self.heads)] for row in self.rows]
            for layer in range(self.layers)
        ]
        for key, entries in self.lists.items():
            assert self.slots(cache.positions, key) == [entry.position for entry in entries]
            assert self.slots(cache.k_cache, key) == [[entry.name] * 3 for entry in entries]
            assert self.slots(cache.v_cache, key) == [[-entry.name] * 2 for entry in entries]
            assert self.slots(cache.scores, key) == [entry.score for entry in entries]
        assert cache.next_positions.tolist() == self.next
        assert cache.compressed == self.compressed

    @invariant()
    def every_block_is_free_or_held_by_as_many_as_it_says(self):
        pool = self.cache._pool
        number_of: dict[Block, int] = {}
        for key, held in self.held.items():
            assert int(pool.held[key]) == len(held)
            for block, number in zip(held, pool.tables[key].tolist(), strict=False):
                assert number_of.setdefault(block, number) == number
        for prefix, entry in self.remembered.items():
            numbers = self.cache._prefixes.entries[self.key_of(prefix)].blocks
            for place, block in entry.blocks.items():
                assert number_of.setdefault(block, int(numbers[place])) == int(numbers[place])
        used = list(number_of.values())
        assert sorted(used + pool.free[: int(pool.free_count)].tolist()) == list(range(self.num_blocks))
        sharers = [0] * self.num_blocks
        for block, holders in self.holders().items():
            sharers[number_of[block]] = holders - 1
        assert pool.sharers.tolist() == sharers
        stats = self.cache.stats()
        assert stats.blocks_in_use == len(used)
        in_lists = Counter(block for held in self.held.values() for block in held).values()
        assert stats.blocks_shared == sum(count > 1 for count in in_lists)
        assert stats.blocks_saved == sum(in_lists) - len(in_lists)
        assert (stats.blocks_unused, stats.tokens_remembered) == (self.idle(), len(self.remembered) * self.size)

    @invariant()
    def the_host_never_believes_less_than_is_held(self):
        bound = self.cache._pool.bound
        holders = self.holders()
        for row in self.rows:
            held = [block for key in self.of(row) for block in self.held[key]]
            assert bound.row_blocks(row) >= len(held)
            assert bound.longest[row] >= max(len(self.lists[key]) for key in self.of(row))
            assert row in bound.sharing or all(holders[block] == 1 for block in held)
        assert bound.total() >= len(holders)
