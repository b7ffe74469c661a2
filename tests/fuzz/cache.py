"""Random programs over ``PagedKVCache``. After every step its whole state is compared with plain Python lists.

Blocks are not part of the model. They are counted from the tables after every step: each is free, or held by as many
lists and remembered prefixes as it says. A call that is refused for want of blocks must really lack them.
"""

from __future__ import annotations

import itertools
import math
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from eviction_lists import Lists, expected_choice

import kvops
from fuzz.inputs import often

OPERATIONS = (
    "extend", "extend", "extend", "attend", "score", "evict", "keep", "rollback", "retain", "fork", "fork", "remember",
    "recall", "forget", "free", "unshare", "prepare", "save", "pickle",
)  # fmt: skip
Key = tuple[int, int, int]  # layer, row, head
Entry = tuple[int, float, float]  # position, name, score


@dataclass(frozen=True)
class Case:
    seed: int = 0
    layers: int = 1
    heads: int = 1
    rows: int = 1
    size: int = 1
    capacity: int = 1  # tokens of a list
    blocks: int = 1
    exact: bool = True
    program: tuple[tuple[Any, ...], ...] = ()  # the name of an operation and three numbers, whatever they mean to it


def draw(r: Random) -> Case:
    layers, heads, rows = r.choice((1, 1, 2, 3)), r.choice((1, 1, 2, 3)), r.choice((1, 2, 3, 4))
    size = r.choice((1, 2, 3, 4, 4, 8, 16, 32))
    capacity = r.choice((size, 3 * size, 10 * size, 60))
    whole = layers * heads * rows * -(-capacity // size)
    return Case(
        seed=r.randrange(2**31),
        layers=layers,
        heads=heads,
        rows=rows,
        size=size,
        capacity=capacity,
        blocks=often(r, r.randint(1, max(whole, 1)), whole, 2 * whole),
        exact=r.random() < 0.5,
        program=tuple(
            (r.choice(OPERATIONS), r.randrange(1000), r.randrange(1000), r.randrange(1000))
            for _ in range(r.choice((5, 12, 30)))
        ),
    )


def check(case: Case) -> None:
    model = Model(case)
    model.compare()
    for operation, *numbers in case.program:
        if operation in OPERATIONS:
            getattr(model, operation)(*numbers)
            model.compare()


class Model:
    def __init__(self, case: Case) -> None:
        self.case = case
        self.capacity = case.capacity
        self.cache = kvops.PagedKVCache(
            **{"num_layers": case.layers, "num_kv_heads": case.heads, "head_dim": 2, "v_head_dim": 1},
            **{"num_blocks": case.blocks, "max_batch": case.rows, "max_tokens": case.capacity},
            block_size=case.size,
        )
        self.cache._pool.exact = case.exact
        self.pairs = list(itertools.product(range(case.layers), range(case.heads)))
        self.lists: dict[Key, list[Entry]] = {key: [] for key in self.of(range(case.rows))}
        self.tokens: list[list[int]] = [[] for _ in range(case.rows)]
        self.next, self.settled = [0] * case.rows, [0] * case.rows
        self.compressed = [False] * case.rows
        self.remembered: dict[tuple[str, tuple[int, ...]], list[dict[tuple[int, int], list[Entry]]]] = {}
        self.complete = True  # whether the cache still has all of them
        self.names = itertools.count(1)

    def drawn_rows(self, code: int) -> tuple[list[int], Any]:
        """Row numbers, and one of the ways to name them."""
        r = Random(code)
        rows = r.sample(range(self.case.rows), r.randint(1, self.case.rows))
        if r.random() < 0.4:
            first = r.randrange(self.case.rows)
            rows = list(range(first, r.randint(first + 1, self.case.rows)))
            return rows, slice(rows[0], rows[-1] + 1)
        if len(rows) == 1 and r.random() < 0.5:
            return rows, rows[0]
        return rows, r.choice((rows, tuple(rows), torch.tensor(rows)))

    def of(self, rows: Sequence[int]) -> list[Key]:
        return [(layer, row, h) for layer, h in self.pairs for row in rows]

    def shortest(self, row: int) -> int:
        return min(len(self.lists[key]) for key in self.of([row]))

    def attempt(
        self, call: Callable[[], Any], *, wrong: bool = False, growth: int = 0, written: Sequence[Key] = ()
    ) -> Any:
        """The result of ``call``; None where it is refused, as it must be if what it asks for is ``wrong``, and may
        be where the pool has not the ``growth`` and copies of all shared blocks of the lists ``written``."""
        needed = growth + self.shared_blocks(written)
        room = self.room()
        remembered = len(self.cache._prefixes)
        result, error = None, None
        try:
            result = call()
        except (kvops.OutOfBlocksError, ValueError) as refusal:
            error = refusal
        if isinstance(error, kvops.OutOfBlocksError):
            assert not wrong, f"OutOfBlocksError in place of ValueError: {error}"
            assert needed > room, f"refused with room for {room} of at most {needed} blocks: {error}"
            free = self.case.blocks - self.cache.stats().blocks_in_use
            assert (error.free, error.total) == (free, self.case.blocks), str(error)
            assert error.needed > error.free, str(error)
            assert len(self.cache._prefixes) == remembered, "a refused call gave prefixes up"
            return None
        if error is not None:
            assert wrong, f"refused: {error}"
            return None
        assert not wrong, "accepted without an error"
        self.complete &= len(self.cache._prefixes) >= remembered
        return result

    def holders(self) -> Counter[int]:
        """How many lists and remembered prefixes hold each block."""
        pool = self.cache._pool
        count: Counter[int] = Counter()
        for key in self.lists:
            count.update(pool.tables[key][: int(pool.held[key])].tolist())
        for entry in self.cache._prefixes.entries.values():
            count.update(entry.blocks.flatten().tolist())
        return count

    def room(self) -> int:
        """Blocks that are free, or would be without remembered prefixes."""
        pool = self.cache._pool
        in_lists = {block for key in self.lists for block in pool.tables[key][: int(pool.held[key])].tolist()}
        return self.case.blocks - len(in_lists)

    def shared_blocks(self, keys: Sequence[Key]) -> int:
        pool, holders = self.cache._pool, self.holders()
        return sum(holders[block] > 1 for key in keys for block in pool.tables[key][: int(pool.held[key])].tolist())

    def growth(self, counts: dict[Key, int]) -> int:
        size, held = self.case.size, self.cache._pool.held
        return sum(max(-(-(len(self.lists[key]) + n) // size) - int(held[key]), 0) for key, n in counts.items())

    def extend(self, code: int, new: int, ragged: int) -> None:
        rows, named = self.drawn_rows(code)
        new %= self.case.size * 2 + 5
        r = Random(ragged)
        lens = [r.randint(0, new) for _ in rows] if r.random() < 0.4 else [new] * len(rows)
        q_lens = None if lens == [new] * len(rows) else torch.tensor(lens, dtype=torch.int32)
        counts = {key: lens[rows.index(key[1])] for key in self.of(rows)}
        wrong = any(len(self.lists[key]) + n > self.capacity for key, n in counts.items())
        growth, written = self.growth(counts), [key for key, n in counts.items() if n]
        positions = self.attempt(
            lambda: self.cache.extend(new, q_lens=q_lens, rows=named), wrong=wrong, growth=growth, written=written
        )
        if positions is None:
            return
        alike = r.random() < 0.6
        for place, row in enumerate(rows):
            at = range(self.next[row], self.next[row] + lens[place])
            assert positions[place, : lens[place]].tolist() == list(at), "positions"
            self.tokens[row] += [0 if alike else next(self.names) for _ in at]
        for layer in range(self.case.layers):
            k = torch.full((len(rows), new, self.case.heads, 2), math.nan)
            for place, row in enumerate(rows):
                for h in range(self.case.heads):
                    for t in range(lens[place]):
                        name = float(next(self.names))
                        k[place, t, h] = name
                        self.lists[layer, row, h].append((self.next[row] + t, name, 0.0))
            self.cache.append(layer, k, -k[..., :1], positions, q_lens=q_lens, rows=named)
        for place, row in enumerate(rows):
            self.next[row] += lens[place]

    def prepare(self, code: int, new: int, _: int) -> None:
        rows, named = self.drawn_rows(code)
        new %= self.case.size + 2
        counts = dict.fromkeys(self.of(rows), new)
        wrong = any(len(self.lists[key]) + new > self.capacity for key in counts)
        self.attempt(
            lambda: self.cache.prepare(new, rows=named), wrong=wrong, growth=self.growth(counts), written=[*counts]
        )

    def attend(self, code: int, layer: int, how: int) -> None:
        rows, named = self.drawn_rows(code)
        layer %= self.case.layers
        r = Random(how)
        T, group = r.randint(1, 3), r.randint(1, 2)
        accumulate, decay = r.choice((None, "sum", "sumsq", "max")), r.choice((1.0, 0.5))
        window = r.choice((-1, -1, 0, 3))
        g = torch.Generator().manual_seed(how)
        # Names grow to thousands: small queries keep many of them in sight.
        q = torch.randn(len(rows), T, self.case.heads * group, 2, generator=g) * 1e-3
        out = self.attempt(
            lambda: self.cache.attend(layer, q, rows=named, accumulate=accumulate, decay=decay, window_left=window),
            written=self.of(rows) if accumulate else [],
        )
        if out is None:
            return
        for place, row in enumerate(rows):
            for head in range(self.case.heads * group):
                entries = self.lists[layer, row, head // group]
                for t in range(T):
                    right = self._attention(entries, q[place, t, head], t - T + 1, self.next[row] - T + t, window)
                    found = float(out[place, t, head, 0])
                    value = -sum(p * entry[1] for p, entry in zip(right, entries, strict=True))
                    largest = max((abs(entry[1]) for entry in entries), default=0.0)
                    assert abs(found - value) <= 1e-4 * largest, f"attend: {found}, expected {value}"
            if accumulate:
                for h in range(self.case.heads):
                    self._accumulate(layer, row, h, q[place], group, window, accumulate, decay)

    @staticmethod
    def _attention(entries: list[Entry], q: torch.Tensor, behind: int, position: int, window: int) -> list[float]:
        """The probability of each entry; ``behind`` is at most 0: how far before the last slot the query stands."""
        last = len(entries) - 1 + behind
        seen = [slot <= last and (window < 0 or position - entry[0] <= window) for slot, entry in enumerate(entries)]
        x, y = q.tolist()
        scores = [(x + y) * entry[1] * 2**-0.5 for entry in entries]
        top = max((s for s, see in zip(scores, seen, strict=True) if see), default=0.0)
        weights = [math.exp(s - top) if see else 0.0 for s, see in zip(scores, seen, strict=True)]
        total = sum(weights)
        return [w / total if total else 0.0 for w in weights]

    def _accumulate(
        self, layer: int, row: int, h: int, q: torch.Tensor, group: int, window: int, reduce: str, decay: float
    ) -> None:
        entries, T = self.lists[layer, row, h], q.shape[0]
        columns: list[list[float]] = [[] for _ in entries]
        seen = [False] * len(entries)
        for t in range(T):
            last, position = len(entries) - T + t, self.next[row] - T + t
            for slot, entry in enumerate(entries):
                seen[slot] |= slot <= last and (window < 0 or position - entry[0] <= window)
            for head in range(h * group, (h + 1) * group):
                for column, p in zip(
                    columns, self._attention(entries, q[t, head], t - T + 1, position, window), strict=True
                ):
                    column.append(p)
        found = self.slots(self.cache.scores, (layer, row, h))
        for slot, (position, name, score) in enumerate(entries):
            if not seen[slot]:
                continue
            column = columns[slot]
            more = max(column) if reduce == "max" else sum(p * p if reduce == "sumsq" else p for p in column)
            right = decay * score + more
            assert abs(found[slot] - right) <= 1e-3 * more + 1e-5 * (1 + abs(score)), f"score {found[slot]}, {right}"
            entries[slot] = position, name, found[slot]

    def score(self, code: int, layer: int, seed: int) -> None:
        rows, named = self.drawn_rows(code)
        layer %= self.case.layers
        width = seed % (self.capacity + 1)
        new = torch.rand(len(rows), self.case.heads, width, generator=torch.Generator().manual_seed(seed))
        if seed % 3 == 0:
            new = (new * 3).round()
        done = self.attempt(lambda: self.cache.set_scores(layer, new, rows=named) or True, written=self.of(rows))
        if done:
            for place, row in enumerate(rows):
                for h in range(self.case.heads):
                    entries = self.lists[layer, row, h]
                    for i, value in enumerate(new[place, h].tolist()[: len(entries)]):
                        entries[i] = (*entries[i][:2], value)

    def evict(self, code: int, budget: int, how: int) -> None:
        rows, named = self.drawn_rows(code)
        r = Random(how)
        budget %= len(self.pairs) * -(-self.capacity // self.case.size) + 2
        keywords = {
            "protect_first": r.choice((0, 0, 1, 3)),
            "protect_last": r.choice((0, 0, 1, 5)),
            "min_per_head": r.choice((0, 0, 2)),
            "scope": r.choice(("head", "sequence")),
        }
        ascending = all(a[0] < b[0] for key in self.of(rows) for a, b in itertools.pairwise(self.lists[key]))
        if not ascending:  # after retain(), where protection by position means nothing
            keywords |= {"protect_first": 0, "protect_last": 0}
        kept = self._choice(rows, budget, keywords, ascending)
        over = any(
            sum(-(-sum(kept[layer, row, h]) // self.case.size) for layer, h in self.pairs) > budget for row in rows
        )
        done = self.attempt(
            lambda: self.cache.evict(budget, rows=named, **keywords) or True, wrong=over, written=self.of(rows)
        )
        if done:
            self._take(rows, kept)

    def _take(self, rows: list[int], kept: dict[Key, list[bool]]) -> None:
        for row in rows:
            if any(not all(marks) for key, marks in kept.items() if key[1] == row):
                self.settled[row] = self.next[row]
            self.compressed[row] = True
        for key, marks in kept.items():
            self.lists[key] = [entry for entry, stays in zip(self.lists[key], marks, strict=True) if stays]

    def _choice(
        self, rows: list[int], budget: int, keywords: dict[str, Any], by_position: bool
    ) -> dict[Key, list[bool]]:
        """What the definition of select_blocks keeps, over lists laid out again."""
        size, width, kept = self.case.size, -(-self.capacity // self.case.size), {}
        for row in rows:
            keys = [(layer, row, h) for layer, h in self.pairs]
            scores = torch.zeros(len(keys) * width, size)
            positions = torch.zeros(len(keys) * width, size, dtype=torch.int32)
            tables = torch.arange(len(keys) * width, dtype=torch.int32).view(1, len(keys), width)
            for n, key in enumerate(keys):
                for i, (position, _, score) in enumerate(self.lists[key]):
                    scores[n * width + i // size, i % size] = score
                    positions[n * width + i // size, i % size] = position
            lens = torch.tensor([[len(self.lists[key]) for key in keys]], dtype=torch.int32)
            _, keep = expected_choice(
                Lists(scores, positions, tables, lens, size), torch.tensor([budget]), positions=by_position, **keywords
            )
            for key, marks in zip(keys, keep[0].tolist(), strict=True):
                kept[key] = marks[: len(self.lists[key])]
        return kept

    def keep(self, code: int, layer: int, seed: int) -> None:
        rows, named = self.drawn_rows(code)
        layer, width = layer % self.case.layers, seed % (self.capacity + 1)
        marks = torch.rand(len(rows), self.case.heads, width, generator=torch.Generator().manual_seed(seed)) < 0.7
        done = self.attempt(lambda: self.cache.keep(layer, marks, rows=named) or True, written=self.of(rows))
        if done:
            kept = {}
            for place, row in enumerate(rows):
                for h in range(self.case.heads):
                    length = len(self.lists[layer, row, h])
                    kept[layer, row, h] = [*marks[place, h].tolist(), *[True] * length][:length]
            self._take(rows, kept)

    def rollback(self, code: int, count: int, how: int) -> None:
        rows, named = self.drawn_rows(code)
        most = min(min(self.next[row] - self.settled[row], self.shortest(row)) for row in rows)
        count %= most + 3 if how % 3 == 0 and self.case.exact else most + 1  # looked at where the numbers are exact
        number = torch.full((len(rows),), count, dtype=torch.int32) if how % 2 else count
        if self.attempt(lambda: self.cache.rollback(number, rows=named) or True, wrong=count > most) and count:
            for key in self.of(rows):
                del self.lists[key][-count:]
            for row in rows:
                del self.tokens[row][-count:]
                self.next[row] -= count

    def retain(self, code: int, width: int, seed: int) -> None:
        rows, named = self.drawn_rows(code)
        most = min(min(self.next[row] - self.settled[row], self.shortest(row)) for row in rows)
        width %= most + 2 if seed % 4 == 0 and self.case.exact else most + 1
        keep = torch.rand(len(rows), width, generator=torch.Generator().manual_seed(seed)) < 0.6
        done = self.attempt(
            lambda: self.cache.retain(keep, rows=named) or True, wrong=width > most, written=self.of(rows)
        )
        if not done or not width:
            return
        for place, row in enumerate(rows):
            marks = keep[place].tolist()

            def stays(items: list, marks: list[bool] = marks) -> list:
                return [item for item, stay in zip(items[-width:], marks, strict=True) if stay]

            for key in self.of([row]):
                self.lists[key][-width:] = stays(self.lists[key])
            self.tokens[row][-width:] = stays(self.tokens[row][-width:])
            self.next[row] -= marks.count(False)

    def fork(self, row: int, code: int, most: int) -> None:
        row %= self.case.rows
        into, named = self.drawn_rows(code)
        count = None if most % 2 else most % (self.next[row] + 1 + self.case.exact)
        wrong = row in into or (count is not None and (self.compressed[row] or count > self.next[row]))
        if not self.attempt(lambda: self.cache.fork(row, named, num_tokens=count) or True, wrong=wrong):
            return
        for new in into:
            for layer, h in self.pairs:
                self.lists[layer, new, h] = self.lists[layer, row, h][:count]
            self.tokens[new] = self.tokens[row][:count]
            self.next[new] = self.next[row] if count is None else count
            self.settled[new], self.compressed[new] = self.settled[row], self.compressed[row]

    def remember(self, row: int, count: int, salt: int) -> None:
        row %= self.case.rows
        count %= self.next[row] + 2
        tokens, name, size = [*self.tokens[row], 7][:count], "ab"[salt % 2], self.case.size
        wrong = self.compressed[row] or count > self.next[row]
        found = self.attempt(lambda: self.cache.remember(row, tokens, salt=name), wrong=wrong)
        if found is None:
            return
        assert found == count // size * size, f"remembered {found} of {count} tokens"
        for end in range(size, count + 1, size):
            contents = {pair: self.lists[pair[0], row, pair[1]][end - size : end] for pair in self.pairs}
            self.remembered.setdefault((name, tuple(tokens[:end])), []).append(contents)

    def recall(self, row: int, which: int, more: int) -> None:
        row %= self.case.rows
        size = self.case.size
        salt, tokens = "a", (0,) * (which % (self.capacity + 1))
        if self.remembered and which % 4:
            salt, tokens = sorted(self.remembered)[which % len(self.remembered)]
        tokens = (*tokens, *[0] * (more % 3))
        if len(tokens) > self.capacity:
            return
        ends = itertools.takewhile(lambda end: (salt, tokens[:end]) in self.remembered, range(size, len(tokens), size))
        longest = max(ends, default=0)
        found = self.cache.recall(row, tokens if more % 2 else torch.tensor(tokens, dtype=torch.int64), salt=salt)
        given_up = not self.complete and found < longest and found % size == 0
        assert found == longest or given_up, f"recalled {found} tokens of {longest}"
        self.forget_row(row)
        self.tokens[row], self.next[row] = list(tokens[:found]), found
        for end in range(size, found + 1, size):
            held = {(layer, h): self.read((layer, row, h), range(end - size, end)) for layer, h in self.pairs}
            assert held in self.remembered[salt, tokens[:end]], "what is recalled is not what was remembered"
            for (layer, h), entries in held.items():
                self.lists[layer, row, h] += entries

    def forget(self, *_: int) -> None:
        self.cache.forget()
        self.remembered, self.complete = {}, True

    def forget_row(self, row: int) -> None:
        self.tokens[row], self.compressed[row] = [], False
        self.next[row] = self.settled[row] = 0
        for key in self.of([row]):
            self.lists[key] = []

    def free(self, code: int, *_: int) -> None:
        rows, named = self.drawn_rows(code)
        self.cache.free(named)
        for row in rows:
            self.forget_row(row)

    def unshare(self, code: int, *_: int) -> None:
        rows, named = self.drawn_rows(code)
        if self.attempt(lambda: self.cache.unshare(named) or True, written=self.of(rows)):
            pool, holders = self.cache._pool, self.holders()
            own = [block for key in self.of(rows) for block in pool.tables[key][: int(pool.held[key])].tolist()]
            assert all(holders[block] == 1 for block in own), "blocks shared after unshare"

    def save(self, *_: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save(f"{folder}/cache")
            self.cache = kvops.PagedKVCache.load(f"{folder}/cache")
        self.cache._pool.exact = self.case.exact

    def pickle(self, *_: int) -> None:
        self.cache = pickle.loads(pickle.dumps(self.cache))

    def slots(self, side: torch.Tensor, key: Key) -> list[Any]:
        length, size = int(self.cache.seq_lens[key]), self.case.size
        return side[self.cache.block_tables[key][: -(-length // size)].long()].flatten(0, 1)[:length].tolist()

    def read(self, key: Key, slots: range) -> list[Entry]:
        sides = (self.slots(side, key) for side in (self.cache.positions, self.cache.k_cache, self.cache.scores))
        positions, k, scores = (side[slots.start : slots.stop] for side in sides)
        return [(p, name[0], score) for p, name, score in zip(positions, k, scores, strict=True)]

    def compare(self) -> None:
        """The whole state: rows, lists, blocks, and what the host believes of them."""
        cache, pool, case = self.cache, self.cache._pool, self.case
        assert cache.next_positions.tolist() == self.next, "next_positions"
        assert cache.compressed == self.compressed, "compressed"
        assert cache._states.settled.tolist() == self.settled, "where rollback must stop"
        for key, entries in self.lists.items():
            assert int(cache.seq_lens[key]) == len(entries), f"the length of {key}"
            assert self.slots(cache.positions, key) == [entry[0] for entry in entries], f"positions of {key}"
            assert self.slots(cache.k_cache, key) == [[entry[1]] * 2 for entry in entries], f"keys of {key}"
            assert self.slots(cache.v_cache, key) == [[-entry[1]] for entry in entries], f"values of {key}"
            assert self.slots(cache.scores, key) == [entry[2] for entry in entries], f"scores of {key}"
            assert int(pool.held[key]) * case.size >= len(entries), f"blocks held by {key}"
        holders = self.holders()
        free = pool.free[: int(pool.free_count)].tolist()
        assert sorted([*holders, *free]) == list(range(case.blocks)), "blocks lost, or free and held"
        assert pool.sharers.tolist() == [max(holders[block] - 1, 0) for block in range(case.blocks)], "sharers"
        for row in range(case.rows):
            own = [block for key in self.of([row]) for block in pool.tables[key][: int(pool.held[key])].tolist()]
            assert pool.bound.row_blocks(row) >= len(own), "the host believes a row holds less"
            assert pool.bound.longest[row] >= max(len(self.lists[key]) for key in self.of([row])), "the longest list"
            assert row in pool.bound.sharing or all(holders[block] == 1 for block in own), "who shares"
        assert pool.bound.total() >= len(holders), "the host believes that less is held"
        stats = cache.stats()
        assert stats.blocks_in_use == len(holders), "stats"
        assert stats.tokens_remembered == len(cache._prefixes) * case.size, "stats"
