"""The paged cache against a plain Python model, operations in any order.

Checked after every step: no block is lost, each is held by as many lists as its count says, every byte is where it
belongs. A refused operation changes nothing, and a loaded cache is in the state of the saved one. Shapes are drawn:
1 or 2 layers and heads, 1 to 4 rows, blocks of 1 to 32 slots, pools that run out.

Every run takes the same 3,600 steps. ``KVOPS_CACHE_EXAMPLES=2000 pytest tests/test_cache_machine.py`` takes that many
sequences of 30 steps on each of the two machines, different ones every time.
"""

from __future__ import annotations

import math
import os
import tempfile

import hypothesis.strategies as st
import pytest
import torch
from cache_helpers import feed, name_of, whole_state
from cache_model import TOO_LONG, Block, CacheModel, Entry, Key, Remembered
from hypothesis import HealthCheck, settings
from hypothesis.stateful import precondition, rule

import kvops
from kvops.policies import POLICIES, Cached, Compression, Knorm, Streaming


class CacheMachine(CacheModel):
    """Sequences that join, grow, fork, are compressed, roll back, are remembered, saved and leave."""

    @rule(new=st.integers(0, 14) | st.just(35), token=st.integers(0, 1), data=st.data())
    def grow(self, new, token, data):
        rows = self.draw_rows(data)
        counts = st.lists(st.integers(0, new), min_size=len(rows), max_size=len(rows))
        self._grow(rows, new, data.draw(st.none() | counts), token)

    def _grow(self, rows, new, q_lens, token=0):
        lens = dict(zip(rows, [new] * len(rows) if q_lens is None else q_lens, strict=True))
        counts = {key: lens[key[1]] for key in self.of(*rows)}
        self.steps += 1
        first = 100_000.0 * self.steps

        def call():
            return feed(self.cache, new, rows=rows, q_lens=q_lens, first=first)

        if any(len(self.lists[key]) + count > self.capacity for key, count in counts.items()):
            with self.refusing(ValueError, TOO_LONG):
                call()
            return
        positions = []
        if not self.admitted(lambda: self.growth(counts), lambda: positions.extend(call().tolist())):
            return
        assert positions == [[self.next[row] + t for t in range(new)] for row in rows]
        for key, count in counts.items():
            places = range(self.next[key[1]], self.next[key[1]] + count)
            self.lists[key] += [Entry(position, first + name_of(*key, position)) for position in places]
            more = self.blocks(len(self.lists[key])) - len(self.held[key])
            self.held[key] += [Block() for _ in range(more)]
        for row, count in lens.items():
            self.next[row] += count
            self.may_roll_back[row] += count
            self.tokens[row] += [token] * count

    @rule(new=st.integers(0, 9), evicts=st.sampled_from([False, False, True]), data=st.data())
    def prepare(self, new, evicts, data):
        """As before a graph is replayed: blocks that will be written are copied, nothing else changes."""
        rows = self.draw_rows(data)
        counts = dict.fromkeys(self.of(*rows), new)

        def call():
            self.cache.prepare(new, rows=rows, evicts=evicts)

        if any(len(self.lists[key]) + new > self.capacity for key in counts):
            with self.refusing(ValueError, TOO_LONG):
                call()
            return
        if self.admitted(lambda: self.growth(counts, copy_all=evicts), call, for_copies=evicts) and evicts:
            for row in rows:
                self.compressed[row] = True

    @precondition(lambda self: any(self.next) and len(self.rows) > 1)
    @rule(data=st.data())
    def fork(self, data):
        row = data.draw(st.sampled_from([row for row in self.rows if self.next[row]]))
        others = st.sampled_from([other for other in self.rows if other != row])
        into = data.draw(st.lists(others, min_size=1, max_size=len(self.rows) - 1, unique=True))
        self._fork(row, into, None if self.compressed[row] else data.draw(st.none() | st.integers(0, self.next[row])))

    def _fork(self, row, into, most):
        self.cache.fork(row, into, num_tokens=most)
        for layer, head in self.places:
            entries, held = self.lists[layer, row, head][:most], self.held[layer, row, head]
            for new in into:
                self.lists[layer, new, head] = list(entries)
                self.held[layer, new, head] = held[: self.blocks(len(entries))]
        for new in into:
            self.next[new] = self.next[row] if most is None else most
            self.may_roll_back[new] = self.may_roll_back[row] if most is None else most
            self.compressed[new] = self.compressed[row]
            self.tokens[new] = self.tokens[row][:most]

    @rule(data=st.data())
    def reorder(self, data):
        order = data.draw(st.lists(st.sampled_from(self.rows), min_size=len(self.rows), max_size=len(self.rows)))
        self.cache.reorder(order)
        for layer, head in self.places:
            lists = [self.lists[layer, row, head] for row in order]
            held = [self.held[layer, row, head] for row in order]
            for row, (entries, blocks) in enumerate(zip(lists, held, strict=True)):
                repeated = order[row] in order[:row]  # a fork, which gets no blocks for tokens to come
                self.lists[layer, row, head] = list(entries)
                self.held[layer, row, head] = blocks[: self.blocks(len(entries)) if repeated else None]
        for state in (self.next, self.may_roll_back, self.compressed, self.tokens):
            state[:] = [list(state[row]) if state is self.tokens else state[row] for row in order]

    @precondition(lambda self: any(self.next))
    @rule(salt=st.sampled_from(["", "", "another"]), data=st.data())
    def remember(self, salt, data):
        row = data.draw(st.sampled_from([row for row in self.rows if self.next[row]]))
        tokens = self.tokens[row][: data.draw(st.integers(max(self.next[row] - 9, 0), self.next[row]))]
        if self.compressed[row]:
            with self.refusing(ValueError, "row: expected one that has not been compressed"):
                self.cache.remember(row, tokens, salt=salt)
            return
        with self.refusing(ValueError, f"tokens: expected at most the {self.next[row]} of row {row}"):
            self.cache.remember(row, [*self.tokens[row], 0], salt=salt)
        assert self.cache.remember(row, tokens, salt=salt) == len(tokens) // self.size * self.size
        for column in range(len(tokens) // self.size):
            held = {(layer, head): self.held[layer, row, head][column] for layer, head in self.places}
            place = slice(column * self.size, (column + 1) * self.size)
            contents = {(layer, head): self.lists[layer, row, head][place] for layer, head in self.places}
            self.remembered.setdefault((salt, tuple(tokens[: place.stop])), Remembered(held, contents))

    @precondition(lambda self: self.remembered)
    @rule(more=st.lists(st.integers(0, 1), max_size=9), data=st.data())
    def recall(self, more, data):
        row = data.draw(st.sampled_from(self.rows))
        salt, tokens = data.draw(st.sampled_from(sorted(self.remembered)))
        tokens = [*tokens, *more]
        prefixes = [(salt, tuple(tokens[:stop])) for stop in range(self.size, len(tokens), self.size)]
        found = []
        for prefix in prefixes:
            if prefix not in self.remembered:
                break
            found.append(self.remembered[prefix])
        assert self.cache.recall(row, torch.tensor(tokens), salt=salt) == len(found) * self.size
        self.forget_row(row)
        for layer, head in self.places:
            self.held[layer, row, head] = [entry.blocks[layer, head] for entry in found]
            self.lists[layer, row, head] = [slot for entry in found for slot in entry.contents[layer, head]]
        self.next[row] = self.may_roll_back[row] = len(found) * self.size
        self.tokens[row] = tokens[: self.next[row]]

    @precondition(lambda self: len(self.remembered) > 5)
    @rule()
    def forget(self):
        self.cache.forget()
        self.remembered = {}

    @rule()
    def save_and_load(self):
        """Goes on with the cache of the file: it is the same, but for blocks that lists kept for tokens to come."""
        before = whole_state(self.cache)
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save(f"{folder}/cache")
            assert whole_state(self.cache) == before
            self.cache = kvops.PagedKVCache.load(f"{folder}/cache")
        assert whole_state(self.cache) == before
        self.cache._pool.exact = self.exact
        for key, held in self.held.items():
            del held[self.blocks(len(self.lists[key])) :]

    @rule(data=st.data())
    def unshare(self, data):
        rows = self.draw_rows(data)
        self.own_all(rows, lambda: self.cache.unshare(rows))

    @rule(seed=st.integers(0, 99), data=st.data())
    def score(self, seed, data):
        row, layer = data.draw(st.sampled_from(self.rows)), data.draw(st.integers(0, self.layers - 1))
        width = min(24, self.capacity)
        new = torch.rand(1, self.heads, width, generator=torch.Generator().manual_seed(seed))
        if self.own_all([row], lambda: self.cache.set_scores(layer, new, rows=row)):
            for head in range(self.heads):
                entries = self.lists[layer, row, head]
                for i, value in enumerate(new[0, head, : len(entries)].tolist()):
                    entries[i] = entries[i]._replace(score=value)

    @rule(seed=st.integers(0, 99), data=st.data())
    def attend(self, seed, data):
        rows, layer = self.draw_rows(data), data.draw(st.integers(0, self.layers - 1))
        q = torch.randn(len(rows), 1, self.heads, 3, generator=torch.Generator().manual_seed(seed)).mul_(1e-4)
        with self.refusing(ValueError, "sinks: expected shape"):
            self.cache.attend(layer, q, rows=rows, accumulate="sum", sinks=torch.zeros(self.heads + 1))
        if not self.own_all(rows, lambda: self.cache.attend(layer, q, rows=rows, accumulate="sum", decay=0.5)):
            return
        for i, row in enumerate(rows):
            for head in range(self.heads):
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
    @rule(protect=st.sampled_from([0, 1, 3, 5]), data=st.data())
    def evict(self, protect, data):
        rows = self.draw_rows(data)
        most = max(sum(self.blocks(len(self.lists[key])) for key in self.of(row)) for row in rows)
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
            least = sum(map(self.blocks, lens))
            if least > budget:
                with self.refusing(ValueError, f"budget: .* alone take {least} blocks of a row"):
                    call()
                return
        kept = self.selected(rows, budget, keywords)
        stays = {key: next((i for i, keep in enumerate(kept[key]) if not keep), len(kept[key])) for key in kept}
        lens = {key: sum(kept[key]) for key in kept}
        moved = {key: range(stays[key] // self.size, self.blocks(lens[key])) for key in kept if stays[key] < lens[key]}
        if not self.copied(lambda: moved, call):
            return
        for key, keep in kept.items():
            old = self.lists[key]
            self.lists[key] = [entry for entry, stay in zip(old, keep, strict=True) if stay]
            lost = [entry.score for entry, stay in zip(old, keep, strict=True) if not stay]
            assert {entry.position for entry in self.lists[key]} >= recent[key]
            if lost:
                assert len(self.lists[key]) % self.size == 0
                others = [entry.score for entry in self.lists[key] if entry.position not in recent[key]]
                assert min(others, default=math.inf) >= max(lost)
            del self.held[key][self.blocks(len(self.lists[key])) :]
        for row in rows:
            assert sum(len(self.held[key]) for key in self.of(row)) <= budget
            self.may_roll_back[row], self.compressed[row] = 0, True

    @precondition(lambda self: any(self.next))
    @rule(
        new=st.integers(0, 12),
        policy=st.sampled_from(["h2o", "kv-compress", "keydiff", "knorm", "r-kv", "snapkv", "streaming", "tova"]),
        budget=st.sampled_from([{"ratio": 2}, {"ratio": 4}, {"blocks": 9}, {"tokens": 8}, {"mib": 0.001}]),
        seed=st.integers(0, 99),
        data=st.data(),
    )
    def read_chunk(self, new, policy, budget, seed, data):
        """As a long prompt is read: a chunk comes in, a policy judges all keys, the row goes down to its budget."""
        row = data.draw(st.sampled_from(self.rows))
        self._grow([row], new, None)
        width = max(len(self.lists[key]) for key in self.of(row))
        policy = POLICIES[policy]()
        if not width or not self.own_all([row], lambda: self.cache.unshare([row])):
            return
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(self.layers, 1, min(max(new, 1), width), self.heads, 3, generator=generator)
        for layer in range(self.layers):
            seen = Cached(self.cache, layer, q[layer].mul_(1e-4), rows=slice(row, row + 1), width=width)
            seen.judge(policy)
            for head in range(self.heads):
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
        row = data.draw(st.sampled_from([row for row in self.rows if self.may_roll_back[row]]))
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
        row = data.draw(st.sampled_from([row for row in self.rows if self.may_roll_back[row]]))
        keep = data.draw(st.lists(st.booleans(), min_size=1, max_size=min(9, self.may_roll_back[row])))
        written = {
            key: range((len(self.lists[key]) - len(keep)) // self.size, self.blocks(len(self.lists[key])))
            for key in self.of(row)
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

    @rule(data=st.data())
    def leave(self, data):
        rows = self.draw_rows(data)
        self.cache.free(rows)
        for row in rows:
            self.forget_row(row)


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
