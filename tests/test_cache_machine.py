"""The paged cache against a plain Python model, in any order: no block lost, none held by more than it says, every byte
where it belongs, and what is refused changes nothing.

Every run takes the same 3,600 steps. ``KVOPS_CACHE_EXAMPLES=2000 pytest tests/test_cache_machine.py`` takes so many
sequences of 30 steps on each of the two machines, other ones every time.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from cache_helpers import CAPACITY, HEADS, LAYERS, SIZE, blocks, feed, make_cache, name_of
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import kvops
from kvops.policies import POLICIES, Cached, Compression, Knorm, Streaming

ROWS, BLOCKS = 4, 72
LISTS = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
Key = tuple[int, int, int]  # layer, row, head


class Entry(NamedTuple):
    position: int
    name: float
    score: float = 0.0


class Block:
    """Known by its identity: the lists and the remembered prefixes that hold it share it."""


class Remembered(NamedTuple):
    """The last block of a prefix in every list, and what it held when it was remembered."""

    blocks: dict[tuple[int, int], Block]
    contents: dict[tuple[int, int], list[Entry]]


class CacheMachine(RuleBasedStateMachine):
    """Sequences that join, grow, fork, are compressed, roll back, are remembered, saved and leave."""

    exact = True

    rows = st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=ROWS, unique=True)

    @initialize(data=st.data())
    def start(self, data):
        """Two sequences, and two that go on from the first: from nothing, chance seldom comes this far."""
        self.cache = make_cache("cpu", max_batch=ROWS, num_blocks=BLOCKS)
        self.cache._pool.exact = self.exact
        keys = [(layer, row, head) for layer, head in LISTS for row in range(ROWS)]
        self.lists: dict[Key, list[Entry]] = {key: [] for key in keys}
        self.held: dict[Key, list[Block]] = {key: [] for key in keys}
        self.remembered: dict[tuple[str, tuple[int, ...]], Remembered] = {}
        self.tokens: list[list[int]] = [[] for _ in range(ROWS)]
        self.next = [0] * ROWS
        self.may_roll_back = [0] * ROWS
        self.compressed = [False] * ROWS
        self.steps = 0
        for row, most in ((0, 30), (1, 14)):
            self._grow([row], data.draw(st.integers(0, most)), None)
        self._fork(0, data.draw(st.sampled_from([[2, 3], [3], []])), None)

    @staticmethod
    def of(*rows: int) -> list[Key]:
        """The lists of the rows, in the order of the tables."""
        return [(layer, row, head) for layer in range(LAYERS) for row in rows for head in range(HEADS)]

    def holders(self) -> Counter[Block]:
        prefixes = (entry.blocks.values() for entry in self.remembered.values())
        return Counter(block for held in (*self.held.values(), *prefixes) for block in held)

    def idle(self) -> int:
        """Blocks that only remembered prefixes hold."""
        return len(self.holders()) - len({block for held in self.held.values() for block in held})

    def free(self) -> int:
        return BLOCKS - len(self.holders())

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
        if enough := needed <= self.free():
            call()
        elif for_copies:
            kept, self.remembered = self.remembered, {}
            needed, copies = needs()
            if needed > self.free():
                return self.refused(needed, call)
            self.remembered = kept
            call()
        elif needed <= self.free() + self.idle():
            call()
        else:
            return self.refused(needed, call)
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

    def refused(self, needed, call) -> bool:
        with pytest.raises(kvops.OutOfBlocksError) as refusal:
            call()
        assert (refusal.value.needed, refusal.value.free, refusal.value.total) == (needed, self.free(), BLOCKS)
        assert len(self.cache._prefixes) == len(self.remembered)
        return False

    def key_of(self, prefix) -> bytes:
        salt, tokens = prefix
        return list(self.cache._prefixes._keys(tokens, salt))[-1]

    def growth(self, counts: dict[Key, int]) -> tuple[int, list[tuple[Key, int]]]:
        """Blocks that so many more tokens take, and the places to copy first."""
        ends = {key: len(self.lists[key]) + count for key, count in counts.items()}
        grow = sum(max(blocks(end) - len(self.held[key]), 0) for key, end in ends.items())
        written = {
            key: range(len(self.lists[key]) // SIZE, blocks(ends[key])) for key, count in counts.items() if count
        }
        copies = self.copies(written)
        return grow + len(copies), copies

    @rule(rows=rows, new=st.integers(0, 14), token=st.integers(0, 1), data=st.data())
    def grow(self, rows, new, token, data):
        counts = st.lists(st.integers(0, new), min_size=len(rows), max_size=len(rows))
        self._grow(rows, new, data.draw(st.none() | counts), token)

    def _grow(self, rows, new, q_lens, token=0):
        lens = dict(zip(rows, [new] * len(rows) if q_lens is None else q_lens, strict=True))
        counts = {key: lens[key[1]] for key in self.of(*rows)}
        self.steps += 1
        first = 100_000.0 * self.steps

        def call():
            return feed(self.cache, new, rows=rows, q_lens=q_lens, first=first)

        if any(len(self.lists[key]) + count > CAPACITY for key, count in counts.items()):
            with pytest.raises(ValueError, match="num_tokens: a list would hold"):
                call()
            return
        positions = []
        if not self.admitted(lambda: self.growth(counts), lambda: positions.extend(call().tolist())):
            return
        assert positions == [[self.next[row] + t for t in range(new)] for row in rows]
        for key, count in counts.items():
            places = range(self.next[key[1]], self.next[key[1]] + count)
            self.lists[key] += [Entry(position, first + name_of(*key, position)) for position in places]
            more = blocks(len(self.lists[key])) - len(self.held[key])
            self.held[key] += [Block() for _ in range(more)]
        for row, count in lens.items():
            self.next[row] += count
            self.may_roll_back[row] += count
            self.tokens[row] += [token] * count

    @rule(rows=rows, new=st.integers(0, 9))
    def prepare(self, rows, new):
        """As before a graph is replayed: blocks that will be written are copied, nothing else changes."""
        counts = dict.fromkeys(self.of(*rows), new)
        if any(len(self.lists[key]) + new > CAPACITY for key in counts):
            with pytest.raises(ValueError, match="num_tokens: a list would hold"):
                self.cache.prepare(new, rows=rows)
            return
        self.admitted(lambda: self.growth(counts), lambda: self.cache.prepare(new, rows=rows))

    @precondition(lambda self: any(self.next))
    @rule(data=st.data())
    def fork(self, data):
        row = data.draw(st.sampled_from([row for row in range(ROWS) if self.next[row]]))
        others = st.sampled_from([other for other in range(ROWS) if other != row])
        into = data.draw(st.lists(others, min_size=1, max_size=ROWS - 1, unique=True))
        self._fork(row, into, None if self.compressed[row] else data.draw(st.none() | st.integers(0, self.next[row])))

    def _fork(self, row, into, most):
        self.cache.fork(row, into, num_tokens=most)
        for layer, head in LISTS:
            entries, held = self.lists[layer, row, head][:most], self.held[layer, row, head]
            for new in into:
                self.lists[layer, new, head] = list(entries)
                self.held[layer, new, head] = held[: blocks(len(entries))]
        for new in into:
            self.next[new] = self.next[row] if most is None else most
            self.may_roll_back[new] = self.may_roll_back[row] if most is None else most
            self.compressed[new] = self.compressed[row]
            self.tokens[new] = self.tokens[row][:most]

    @precondition(lambda self: any(self.next))
    @rule(salt=st.sampled_from(["", "", "another"]), data=st.data())
    def remember(self, salt, data):
        row = data.draw(st.sampled_from([row for row in range(ROWS) if self.next[row]]))
        tokens = self.tokens[row][: data.draw(st.integers(max(self.next[row] - 9, 0), self.next[row]))]
        if self.compressed[row]:
            with pytest.raises(ValueError, match="row: expected one that has not been compressed"):
                self.cache.remember(row, tokens, salt=salt)
            return
        with pytest.raises(ValueError, match=f"tokens: expected at most the {self.next[row]} of row {row}"):
            self.cache.remember(row, [*self.tokens[row], 0], salt=salt)
        assert self.cache.remember(row, tokens, salt=salt) == len(tokens) // SIZE * SIZE
        for column in range(len(tokens) // SIZE):
            held = {(layer, head): self.held[layer, row, head][column] for layer, head in LISTS}
            place = slice(column * SIZE, (column + 1) * SIZE)
            contents = {(layer, head): self.lists[layer, row, head][place] for layer, head in LISTS}
            self.remembered.setdefault((salt, tuple(tokens[: place.stop])), Remembered(held, contents))

    @precondition(lambda self: self.remembered)
    @rule(row=st.integers(0, ROWS - 1), more=st.lists(st.integers(0, 1), max_size=9), data=st.data())
    def recall(self, row, more, data):
        salt, tokens = data.draw(st.sampled_from(sorted(self.remembered)))
        tokens = [*tokens, *more]
        prefixes = [(salt, tuple(tokens[:stop])) for stop in range(SIZE, len(tokens), SIZE)]
        found = []
        for prefix in prefixes:
            if prefix not in self.remembered:
                break
            found.append(self.remembered[prefix])
        assert self.cache.recall(row, torch.tensor(tokens), salt=salt) == len(found) * SIZE
        self.forget_row(row)
        for layer, head in LISTS:
            self.held[layer, row, head] = [entry.blocks[layer, head] for entry in found]
            self.lists[layer, row, head] = [slot for entry in found for slot in entry.contents[layer, head]]
        self.next[row] = self.may_roll_back[row] = len(found) * SIZE
        self.tokens[row] = tokens[: self.next[row]]

    @precondition(lambda self: len(self.remembered) > 5)
    @rule()
    def forget(self):
        self.cache.forget()
        self.remembered = {}

    @rule()
    def save_and_load(self):
        """Goes on with the cache of the file: it is the same, but for blocks that lists kept for tokens to come."""
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save(f"{folder}/cache")
            self.cache = kvops.PagedKVCache.load(f"{folder}/cache")
        self.cache._pool.exact = self.exact
        for key, held in self.held.items():
            del held[blocks(len(self.lists[key])) :]

    def own_all(self, rows, call) -> bool:
        """``call`` gives the rows blocks of their own; False where there are too few."""
        return self.copied(lambda: {key: range(len(self.held[key])) for key in self.of(*rows)}, call)

    def copied(self, written, call) -> bool:
        def needs():
            copies = self.copies(written())
            return len(copies), copies

        return self.admitted(needs, call, for_copies=True)

    @rule(rows=rows)
    def unshare(self, rows):
        self.own_all(rows, lambda: self.cache.unshare(rows))

    @rule(row=st.integers(0, ROWS - 1), layer=st.integers(0, LAYERS - 1), seed=st.integers(0, 99))
    def score(self, row, layer, seed):
        new = torch.rand(1, HEADS, 24, generator=torch.Generator().manual_seed(seed))
        if self.own_all([row], lambda: self.cache.set_scores(layer, new, rows=row)):
            for head in range(HEADS):
                entries = self.lists[layer, row, head]
                for i, value in enumerate(new[0, head, : len(entries)].tolist()):
                    entries[i] = entries[i]._replace(score=value)

    @rule(rows=rows, layer=st.integers(0, LAYERS - 1), seed=st.integers(0, 99))
    def attend(self, rows, layer, seed):
        q = torch.randn(len(rows), 1, HEADS, 3, generator=torch.Generator().manual_seed(seed)).mul_(1e-4)
        if not self.own_all(rows, lambda: self.cache.attend(layer, q, rows=rows, accumulate="sum", decay=0.5)):
            return
        for i, row in enumerate(rows):
            for head in range(HEADS):
                key = layer, row, head
                names = torch.tensor([[entry.name] * 3 for entry in self.lists[key]]).view(-1, 3)
                given = (names.double() @ q[i, 0, head].double() * 3**-0.5).softmax(0).tolist()
                scores = self.slots(self.cache.scores, key)
                for entry, p, score in zip(self.lists[key], given, scores, strict=True):
                    # Either term may be much larger than their sum: a policy's scores may be negative.
                    assert abs(entry.score * 0.5 + p - score) <= 1e-3 * p + 1e-6 * (1 + abs(entry.score))
                pairs = zip(self.lists[key], scores, strict=True)
                self.lists[key] = [entry._replace(score=score) for entry, score in pairs]

    @precondition(lambda self: any(self.next))
    @rule(rows=rows, protect=st.sampled_from([0, 1, 3, 5]), data=st.data())
    def evict(self, rows, protect, data):
        most = max(sum(blocks(len(self.lists[key])) for key in self.of(row)) for row in rows)
        budget = data.draw(st.integers(0, most + 1))
        scope = data.draw(st.sampled_from(["head", "sequence"]))
        least_each = data.draw(st.sampled_from([0, 0, 3, 6]))
        keywords = {"protect_last": protect, "min_per_head": least_each, "scope": scope}
        self._evict(rows, budget, keywords, lambda: self.cache.evict(budget, rows=rows, **keywords))

    def _evict(self, rows, budget, keywords, call):
        least_each, first = keywords["min_per_head"], keywords.get("protect_first", 0)
        recent = {
            key: {
                entry.position
                for entry in self.lists[key]
                if entry.position > self.lists[key][-1].position - keywords["protect_last"] or entry.position < first
            }
            for key in self.of(*rows)
        }
        for row in rows:
            lens = [(max(len(recent[key]), min(least_each, len(self.lists[key])))) for key in self.of(row)]
            if sum(map(blocks, lens)) > budget:
                with pytest.raises(ValueError, match=f"budget: .* alone take {sum(map(blocks, lens))} blocks of a row"):
                    call()
                return
        kept = self.selected(rows, budget, keywords)
        stays = {key: next((i for i, keep in enumerate(kept[key]) if not keep), len(kept[key])) for key in kept}
        lens = {key: sum(kept[key]) for key in kept}
        moved = {key: range(stays[key] // SIZE, blocks(lens[key])) for key in kept if stays[key] < lens[key]}
        if not self.copied(lambda: moved, call):
            return
        for key, keep in kept.items():
            old = self.lists[key]
            self.lists[key] = [entry for entry, stay in zip(old, keep, strict=True) if stay]
            lost = [entry.score for entry, stay in zip(old, keep, strict=True) if not stay]
            assert {entry.position for entry in self.lists[key]} >= recent[key]
            if lost:
                assert len(self.lists[key]) % SIZE == 0
                others = [entry.score for entry in self.lists[key] if entry.position not in recent[key]]
                assert min(others, default=math.inf) >= max(lost)
            del self.held[key][blocks(len(self.lists[key])) :]
        for row in rows:
            assert sum(len(self.held[key]) for key in self.of(row)) <= budget
            self.may_roll_back[row], self.compressed[row] = 0, True

    @precondition(lambda self: any(self.next))
    @rule(
        row=st.integers(0, ROWS - 1),
        new=st.integers(0, 12),
        policy=st.sampled_from(["h2o", "kv-compress", "keydiff", "knorm", "r-kv", "snapkv", "streaming", "tova"]),
        budget=st.sampled_from([{"ratio": 2}, {"ratio": 4}, {"blocks": 9}, {"tokens": 8}, {"mib": 0.001}]),
        seed=st.integers(0, 99),
    )
    def read_chunk(self, row, new, policy, budget, seed):
        """As a long prompt is read: a chunk comes in, a policy judges all keys, the row goes down to its budget."""
        self._grow([row], new, None)
        width = max(len(self.lists[key]) for key in self.of(row))
        policy = POLICIES[policy]()
        if not width or not self.own_all([row], lambda: self.cache.unshare([row])):
            return
        q = torch.randn(LAYERS, 1, min(max(new, 1), width), HEADS, 3, generator=torch.Generator().manual_seed(seed))
        for layer in range(LAYERS):
            seen = Cached(self.cache, layer, q[layer].mul_(1e-4), rows=slice(row, row + 1), width=width)
            seen.judge(policy)
            for head in range(HEADS):
                key = layer, row, head
                scores = self.slots(self.cache.scores, key)
                assert all(map(math.isfinite, scores))
                if isinstance(policy, Knorm):
                    assert scores == pytest.approx([-abs(entry.name) * 3**0.5 for entry in self.lists[key]])
                if isinstance(policy, Streaming):
                    assert scores == [entry.position - self.next[row] for entry in self.lists[key]]
                pairs = zip(self.lists[key], scores, strict=True)
                self.lists[key] = [entry._replace(score=score) for entry, score in pairs]
        compression = Compression(policy=policy, protect_first=1, protect_last=2, **budget)
        scope = "head" if policy.scope == "head" else "sequence"
        self._evict(
            [row],
            compression.budget(self.cache, self.next[row]),
            {"protect_first": 1, "protect_last": 2, "min_per_head": 0, "scope": scope},
            lambda: compression.apply(self.cache, [self.next[row]], [row]),
        )

    def selected(self, rows, budget, keywords) -> dict[Key, list[bool]]:
        """Which slots the operator keeps of each list: which blocks are moved, and so copied, follows from it."""
        cache, result = self.cache, {}
        for row in rows:
            keys = self.of(row)
            tables = torch.stack([cache.block_tables[key] for key in keys])[None]
            lens = torch.tensor([[len(self.lists[key]) for key in keys]], dtype=torch.int32)
            _, keep = kvops.select_blocks(
                cache.scores,
                tables,
                lens,
                torch.tensor([budget], dtype=torch.int32),
                positions=cache.positions,
                **keywords,
            )
            for key, kept in zip(keys, keep[0].tolist(), strict=True):
                result[key] = kept[: len(self.lists[key])]
        return {key: result[key] for key in self.of(*rows)}

    @precondition(lambda self: any(self.may_roll_back))
    @rule(data=st.data())
    def roll_back(self, data):
        row = data.draw(st.sampled_from([row for row in range(ROWS) if self.may_roll_back[row]]))
        count = data.draw(st.integers(1, self.may_roll_back[row]))
        as_tensor = data.draw(st.booleans())
        self.cache.rollback(torch.tensor([count], dtype=torch.int32) if as_tensor else count, rows=[row])
        for key in self.of(row):
            del self.lists[key][-count:]
        del self.tokens[row][-count:]
        self.next[row] -= count
        self.may_roll_back[row] -= count

    @precondition(lambda self: any(self.may_roll_back))
    @rule(data=st.data())
    def retain(self, data):
        row = data.draw(st.sampled_from([row for row in range(ROWS) if self.may_roll_back[row]]))
        keep = data.draw(st.lists(st.booleans(), min_size=1, max_size=min(9, self.may_roll_back[row])))
        written = {
            key: range((len(self.lists[key]) - len(keep)) // SIZE, blocks(len(self.lists[key]))) for key in self.of(row)
        }
        if not self.copied(lambda: written, lambda: self.cache.retain(torch.tensor([keep]), rows=[row])):
            return
        for key in self.of(row):
            last = [entry for entry, stay in zip(self.lists[key][-len(keep) :], keep, strict=True) if stay]
            self.lists[key][-len(keep) :] = last
        last = [token for token, stay in zip(self.tokens[row][-len(keep) :], keep, strict=True) if stay]
        self.tokens[row][-len(keep) :] = last
        self.next[row] -= keep.count(False)
        self.may_roll_back[row] = 0

    @rule(rows=rows)
    def leave(self, rows):
        self.cache.free(rows)
        for row in rows:
            self.forget_row(row)

    def forget_row(self, row):
        self.next[row] = self.may_roll_back[row] = 0
        self.compressed[row], self.tokens[row] = False, []
        for key in self.of(row):
            self.lists[key], self.held[key] = [], []

    def slots(self, side: torch.Tensor, key: Key) -> list:
        table = self.cache.block_tables[key][: blocks(len(self.lists[key]))].long()
        return side[table].flatten(0, 1)[: len(self.lists[key])].tolist()

    @invariant()
    def every_list_is_as_it_should_be(self):
        cache = self.cache
        assert cache.seq_lens.tolist() == [
            [[len(self.lists[layer, row, head]) for head in range(HEADS)] for row in range(ROWS)]
            for layer in range(LAYERS)
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
        assert sorted(used + pool.free[: int(pool.free_count)].tolist()) == list(range(BLOCKS))
        sharers = [0] * BLOCKS
        for block, holders in self.holders().items():
            sharers[number_of[block]] = holders - 1
        assert pool.sharers.tolist() == sharers
        stats = self.cache.stats()
        assert stats.blocks_in_use == len(used)
        in_lists = Counter(block for held in self.held.values() for block in held).values()
        assert stats.blocks_shared == sum(count > 1 for count in in_lists)
        assert stats.blocks_saved == sum(in_lists) - len(in_lists)
        assert (stats.blocks_unused, stats.tokens_remembered) == (self.idle(), len(self.remembered) * SIZE)

    @invariant()
    def the_host_never_believes_less_than_is_held(self):
        bound = self.cache._pool.bound
        holders = self.holders()
        for row in range(ROWS):
            held = [block for key in self.of(row) for block in self.held[key]]
            assert bound.row_blocks(row) >= len(held)
            assert bound.longest[row] >= max(len(self.lists[key]) for key in self.of(row))
            assert row in bound.sharing or all(holders[block] == 1 for block in held)
        assert bound.total() >= len(holders)


class BoundedCacheMachine(CacheMachine):
    """As on a GPU, where the host asks for numbers only when its bound says that a request might not fit."""

    exact = False


EXAMPLES = os.environ.get("KVOPS_CACHE_EXAMPLES")
EFFORT = settings(
    max_examples=int(EXAMPLES or 60),
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=EXAMPLES is None,
    database=None,
)
TestExactCache = CacheMachine.TestCase
TestExactCache.settings = EFFORT
TestBoundedCache = BoundedCacheMachine.TestCase
TestBoundedCache.settings = EFFORT
