"""Attention of few query rows over ragged lists: all lists of a call together, in tiles of like size.

A list is cut into tiles of some hundred slots and the tiles of all lists stand in one line, so the work grows with the
sum of the lengths, however unequal they are, and the number of calls to torch hardly grows at all. Tiles are gathered
by chunks that stay in the caches and handed to torch's CPU flash attention as one batch; what the tiles of a list give
is merged by their lse, as on a GPU. What a prompt left side by side in the pool, alike for all lists, is not gathered
but read where it is. Few lists are sooner served one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from kvops.eager.attention import union_weights
from kvops.eager.paged_rows import Rows, fold_scores
from kvops.private_torch import flash_attention as _flash

# Slots in a tile, about: a batch is fast from here on, and a list's last tile wastes half of it.
_TILE = 128
# Lists that are served sooner one by one than in tiles, and the slots that are gathered of each: more want all cores.
_FEW, _FEW_SLOTS = 4, 4096
# Elements of K and of V gathered at once: 2 MiB each in float32. Smaller chunks cost calls, larger ones leave the
# caches.
_CHUNK = 1 << 19
# Elements of K up to which padding costs less than cutting lists into tiles and merging them: 512 KiB in float32.
_PAD = 1 << 17
# Slots of a list from which it pays to look whether they lie side by side.
_LONG = 1024
# Lists of which a fifth would be padding are not cut while there are enough of them for the cores.
_WASTE = 1.25
# Where a mask adds this no probability is left; unlike -inf it gives no NaN in a tile of which a row sees nothing.
_HIDDEN = -1e30


@dataclass
class ScoreFold:
    """What to do with the probabilities: see :func:`kvops.paged_attention`."""

    scores: Tensor
    reduce: str
    decay: float

    def reduced(self, p: Tensor) -> Tensor:
        """[n, rows, slots] -> [n, slots]; may overwrite ``p``."""
        if self.reduce == "max":
            return p.amax(1)
        return (p.square_() if self.reduce == "sumsq" else p).sum(1)


class Alike(NamedTuple):
    """The leading ``blocks`` of every list lie side by side: of the first list from block ``first`` on, of the next
    ``step`` blocks behind."""

    blocks: int
    first: int
    step: int


def few(lists: int) -> bool:
    """Whether so few lists are served here sooner than anywhere else, whatever their lengths."""
    return lists <= _FEW


def whole(stops: list[int], width: int) -> bool:
    """Whether lists of so many slots are served sooner as one batch, padded to the longest, than cut into tiles; width
    of a row of K or V."""
    lists, longest = len(stops), max(stops)
    return longest * lists * width <= _PAD or (
        longest * lists <= _WASTE * sum(stops) and longest * width <= _CHUNK // torch.get_num_threads()
    )


def alike(tables: Tensor, least: int, total: int, block_size: int) -> Alike | None:
    """What lies side by side in every list; None where that is too little to pay: below ``_LONG`` slots of a list
    (twice that of few lists) or half of the ``total``. ``least``: the slots of the shortest list."""
    lists, most = tables.shape[0], least // block_size
    enough = 2 * _LONG if few(lists) else _LONG
    if least < enough or 2 * least * lists < total:
        return None
    leading = tables[:, :most]
    beside = (leading[:, 1:] - leading[:, :-1] == 1).all(0).tolist()
    blocks = beside.index(False) + 1 if False in beside else most
    if blocks * block_size < enough or 2 * blocks * block_size * lists < total:
        return None
    first = leading[:, 0].tolist()
    step = first[1] - first[0] if lists > 1 else 0
    if step < 0 or any(after - before != step for before, after in pairwise(first)):
        return None
    return Alike(blocks, first[0], step)


class _Part:
    """Slots of all lists in ``n`` pieces of ``size`` slots, those of ``blocks`` [n, m] of the pool.

    ``own`` [n, m] are the blocks that do not stand there a second time and ``garbage`` the slots past a list's end,
    counted through all pieces; None where all are and there are none.
    """

    blocks: Tensor
    size: int
    own: Tensor | None = None
    garbage: Tensor | None = None
    logits: Tensor | None = None  # [n, rows, size], kept for fold()

    def lists(self) -> Tensor:
        """[n]: the list of each piece."""
        return torch.arange(self.blocks.shape[0])

    def of_lists(self, values: Tensor) -> Tensor:
        """[lists, ...] -> [n, ...]"""
        return values

    def fold(self, fold: ScoreFold, shift: Tensor) -> None:
        """Add the probabilities to the scores of their slots. Overwrites the logits; shift [lists, rows]: the lse."""
        if self.logits is None:
            return
        reduced = fold.reduced(self.logits.sub_(self.of_lists(shift)[..., None]).exp_())
        seen = torch.ones_like(reduced, dtype=torch.bool)
        if self.garbage is not None:
            seen.view(-1).index_fill_(0, self.garbage, False)
        fold_scores(fold.scores, fold.decay, self.blocks, self.own, self.lists(), reduced, seen)


class _Run(_Part):
    """What is :func:`alike` in all lists, read where it is."""

    def __init__(self, keys: Rows, values: Rows, tables: Tensor, leading: Alike) -> None:
        self.keys, self.values, self.leading = keys, values, leading
        self.blocks = tables[:, : leading.blocks]
        self.size = leading.blocks * keys.block_size

    def attend(self, q: Tensor, scored: bool) -> tuple[Tensor, Tensor]:
        """q [lists, rows, D] -> out [lists, rows, D] and lse [lists, rows]."""
        _, first, step = self.leading
        lists = q.shape[0]
        k, v = (rows.alike(first, step, lists, self.size) for rows in (self.keys, self.values))
        if scored:
            self.logits = torch.bmm(q, k.mT)
        threads = torch.get_num_threads()
        parts = 1 if lists % threads == 0 else math.gcd(self.size, threads)
        k, v = (x.unflatten(1, (parts, -1)) for x in (k, v))  # [lists, parts, slots, D]: work for every core
        out, lse = _flash(q[:, None].expand(-1, parts, -1, -1), k, v, 0.0, False, scale=1.0)
        return _merge(out.unbind(1), lse.unbind(1))


class _Each:
    """Few lists, one after the other: of each exactly what is seen, so that nothing is padded or masked for another.
    What a long list begins with side by side is read where it is."""

    def __init__(self, keys: Rows, values: Rows, tables: Tensor, stops: list[int], limits: Tensor | None) -> None:
        """limits: see :func:`attend_tiles`."""
        self.keys, self.values, self.limits, self.stops = keys, values, limits, stops
        size = keys.block_size
        self.blocks = [tables[i : i + 1, : -(-stop // size)] for i, stop in enumerate(stops)]
        self.runs: list[_Run | None] = []
        for i, stop in enumerate(stops):
            leading = None
            if keys.in_place and values.in_place and not keys.by_head:
                leading = alike(self.blocks[i], stop if limits is None else int(limits[i].min()), stop, size)
            self.runs.append(None if leading is None else _Run(keys, values, self.blocks[i], leading))
        self.begins = [0 if run is None else run.size for run in self.runs]  # the first slot that is gathered
        self.logits: list[Tensor] = []

    @property
    def longest(self) -> int:
        """The most slots that are gathered of a list."""
        return max(stop - begin for begin, stop in zip(self.begins, self.stops, strict=True))

    def attend(self, q: Tensor, scored: bool) -> tuple[Tensor, Tensor]:
        """q [lists, T, group, D] -> out [lists, rows, D], lse [lists, rows]."""
        lists, T, G, D = q.shape
        rows = q.reshape(lists, 1, T * G, D).unbind()
        outs, lses = zip(*[self.attend_one(i, rows[i], T, scored) for i in range(lists)], strict=True)
        return torch.cat(outs), torch.cat(lses)

    def attend_one(self, i: int, q: Tensor, num_tokens: int, scored: bool) -> tuple[Tensor, Tensor]:
        """q [1, rows, D] -> out [1, rows, D], lse [1, rows]."""
        begin, stop, run = self.begins[i], self.stops[i], self.runs[i]
        if stop <= 0:
            self.logits.append(q.new_empty(q.shape[1], 0))
            return torch.zeros_like(q), q.new_full(q.shape[:2], _HIDDEN)
        found, logits = [], []
        if run is not None:
            found.append(run.attend(q, scored))
            if run.logits is not None:
                logits.append(run.logits[0])
        if begin < stop:
            blocks = self.blocks[i] if run is None else self.blocks[i][:, run.leading.blocks :]
            own = torch.tensor([i]) if self.keys.by_head else None
            k = self.keys.blocks(blocks, own).narrow(1, 0, stop - begin)
            v = self.values.blocks(blocks, own).narrow(1, 0, stop - begin)
            mask = None
            if self.limits is not None:
                hidden = torch.arange(begin, stop) >= self.limits[i, :, None]
                mask = q.new_zeros(num_tokens, stop - begin).masked_fill_(hidden, _HIDDEN)
                mask = mask.repeat_interleave(q.shape[1] // num_tokens, 0)[None, None]
            out, lse = _flash(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), 0.0, False, attn_mask=mask, scale=1.0)
            found.append((out.squeeze(1), lse.squeeze(1)))
            if scored:
                seen = q[0] @ k[0].mT
                logits.append(seen if mask is None else seen.add_(mask[0, 0]))
        if scored:
            self.logits.append(torch.cat(logits, 1))
        return _merge(*zip(*found, strict=True))

    def fold(self, fold: ScoreFold, shift: Tensor) -> None:
        """See :meth:`_Part.fold`."""
        for i, (blocks, logits, stop) in enumerate(zip(self.blocks, self.logits, self.stops, strict=True)):
            if stop <= 0:
                continue
            reduced = logits.new_zeros(1, blocks.shape[1] * self.keys.block_size)
            reduced[0, :stop] = fold.reduced(logits.sub_(shift[i, :, None]).exp_()[None])[0]
            inside = torch.arange(reduced.shape[1])[None] < stop
            fold_scores(fold.scores, fold.decay, blocks, None, torch.tensor([i]), reduced, inside)


def _merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The union of attentions over different keys: outs [lists, rows, D], lses [lists, rows]."""
    if len(outs) == 1:
        return outs[0], lses[0]
    lse = torch.stack(tuple(lses))
    return (torch.stack(tuple(outs)) * lse.softmax(0)[..., None]).sum(0), lse.logsumexp(0)


class _Tiles(_Part):
    """The tiles of all lists in one line.

    ``blocks`` repeats a list's last block past its end; an empty list's tile holds block 0. ``list`` [n] is the list of
    each tile and ``first`` [n] its first slot there; None where every list is one tile.
    """

    def __init__(self, tables: Tensor, stops: list[int], block_size: int, width: int) -> None:
        """stops: the slots of each list that any row sees, from the first on; width of a row of K or V."""
        lists, longest = len(stops), max(stops)
        blocks = -(-longest // block_size) if whole(stops, width) else max(1, _TILE // block_size)
        self.size = blocks * block_size
        self.list: Tensor | None = None
        self.first: Tensor | None = None
        column = torch.arange(blocks)[None]  # of the table
        stop = torch.tensor(stops)
        self.count, left = lists, stop  # slots of the list from the tile's first on
        if self.size < longest:
            counts = ((stop + (self.size - 1)) // self.size).clamp_(min=1)
            self.list = torch.repeat_interleave(counts)
            self.count = self.list.shape[0]
            self._starts = counts.cumsum(0) - counts
            place = torch.arange(self.count) - self._starts[self.list]
            self.first = place * self.size
            column = (place * blocks)[:, None] + column
            stop = stop[self.list]
            left = stop - self.first
        if self.list is None and min(stops) > self.size - block_size:
            self.blocks = tables[:, :blocks]
        else:
            last = ((stop - 1) // block_size)[:, None]
            self.own = column <= last
            places = torch.minimum(column, last.clamp(min=0))
            self.blocks = tables.gather(1, places) if self.list is None else tables[self.list[:, None], places]
            if min(stops) <= 0:
                self.blocks = self.blocks.masked_fill(last < 0, 0)
        if self.list is not None or min(stops) < self.size:
            self.garbage = (torch.arange(self.size) >= left[:, None]).view(-1).nonzero().view(-1)

    def lists(self) -> Tensor:
        return torch.arange(self.count) if self.list is None else self.list

    def of_lists(self, values: Tensor) -> Tensor:
        """[lists, ...] -> [n, ...]"""
        return values if self.list is None else values.index_select(0, self.list)

    def attend(self, q: Tensor, keys: Rows, values: Rows, limits: Tensor | None, scored: bool) -> tuple[Tensor, Tensor]:
        """q [lists, T, group, D]; limits: see :func:`attend_tiles` -> out [lists, rows, D], lse [lists, rows]."""
        if scored:
            self.logits = q.new_empty(self.count, q.shape[1] * q.shape[2], self.size)
        return self.merge(*_Work(q, keys, values, self, limits).run(self.logits))

    def sum(self, values: Tensor) -> Tensor:
        """[n, ...] -> [lists, ...], in the order of the tiles."""
        flat = embedding_bag(torch.arange(self.count), values.flatten(1), self._starts, mode="sum")
        return flat.unflatten(1, values.shape[1:])

    def merge(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Of what the tiles gave, out [n, rows, D] and lse [n, rows]: the same for the lists. Overwrites both."""
        if self.list is None:
            return out, lse
        maximum = lse.new_full((self._starts.shape[0], lse.shape[1]), -torch.inf)
        maximum.scatter_reduce_(0, self.list[:, None].expand_as(lse), lse, "amax")
        weight = lse.sub_(self.of_lists(maximum)).exp_()
        total = self.sum(weight)
        return self.sum(out.mul_(weight[..., None])).div_(total[..., None]), total.log_().add_(maximum)


class _Work:
    """One call over its tiles, some of them at a time."""

    def __init__(self, q: Tensor, keys: Rows, values: Rows, tiles: _Tiles, limits: Tensor | None) -> None:
        """q [lists, T, group, D]; limits: see :func:`attend_tiles`."""
        lists, self.num_tokens, self.group, D = q.shape
        self.keys, self.values, self.tiles = keys, values, tiles
        self.q = tiles.of_lists(q.reshape(lists, 1, -1, D))  # [n, 1, rows, D]
        self.seen: Tensor | None = None  # [n, T, 1]: the slots of the tile that each token sees
        if limits is not None:
            seen = tiles.of_lists(limits)
            self.seen = (seen if tiles.first is None else seen - tiles.first[:, None])[..., None]

    def run(self, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        """out [n, rows, D] and lse [n, rows]; ``scores`` [n, rows, size] takes the logits."""
        tiles, n = self.tiles, self.tiles.count
        step = max(1, _CHUNK // (tiles.size * self.q.shape[-1]))
        if n <= step:
            return self.some(self.q, tiles.blocks, tiles.garbage, self.seen, tiles.list, None, None, scores)
        step = -(-n // -(-n // step))  # chunks of like size
        edges = torch.arange(0, n + step, step) * tiles.size
        bounds = None if tiles.garbage is None else torch.searchsorted(tiles.garbage, edges).tolist()
        out, lse = torch.empty_like(self.q[:, 0]), self.q.new_empty(n, self.q.shape[2])
        # The same memory for all chunks: fresh pages cost more than the copy.
        rooms = self.keys.room(step * tiles.size), self.values.room(step * tiles.size)
        lists = tiles.lists()
        for number, start in enumerate(range(0, n, step)):
            chunk, past = slice(start, min(start + step, n)), None
            if tiles.garbage is not None and bounds is not None:
                past = tiles.garbage[bounds[number] : bounds[number + 1]] - start * tiles.size
            seen, logits = (None if x is None else x[chunk] for x in (self.seen, scores))
            out[chunk], lse[chunk] = self.some(
                self.q[chunk], tiles.blocks[chunk], past, seen, lists[chunk], *rooms, logits
            )
        return out, lse

    def some(
        self,
        q: Tensor,
        blocks: Tensor,
        past: Tensor | None,
        seen: Tensor | None,
        lists: Tensor | None,
        k_room: Tensor | None,
        v_room: Tensor | None,
        scores: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The same for some tiles; ``past``: their garbage."""
        n, D = q.shape[0], q.shape[-1]
        k, v = self.keys.blocks(blocks, lists, k_room), self.values.blocks(blocks, lists, v_room)  # [n, size, D]
        size, mask = k.shape[1], None
        if past is not None:
            for rest in (k, v):  # it may be no number at all
                rest.view(-1, D).index_fill_(0, past, 0.0)
        if seen is not None:
            mask = q.new_zeros(n, self.num_tokens, size).masked_fill_(torch.arange(size) >= seen, _HIDDEN)
            mask = mask.repeat_interleave(self.group, 1)[:, None]
        elif past is not None:
            mask = q.new_zeros(n, 1, 1, size)
            mask.view(-1).index_fill_(0, past, _HIDDEN)
        out, lse = _flash(q, k[:, None], v[:, None], 0.0, False, attn_mask=mask, scale=1.0)
        if scores is not None:
            torch.bmm(q[:, 0], k.mT, out=scores)
            if mask is not None:
                scores += mask[:, 0]
        return out[:, 0], lse[:, 0]


def attend_tiles(
    q: Tensor,
    keys: Rows,
    values: Rows,
    tables: Tensor,
    stops: list[int],
    limits: Tensor | None,
    *,
    leading: Alike | None,
    sinks: Tensor | None,
    fold: ScoreFold | None,
) -> tuple[Tensor, Tensor] | None:
    """q [lists, T, group, D], scaled; tables [lists, max_blocks]; stops: the slots of each list that some token sees,
    from the first on; limits int64 [lists, T]: those that each token sees, None where they all see the list's stop and
    no list is empty; leading: what is :func:`alike` and seen by every token; sinks [lists, 1, group]
    -> out [lists, T, group, D], lse [lists, T, group]. None, and no scores folded, where a NaN may come of a key that
    its row does not see."""
    lists, T, G, D = q.shape
    if lists * T == 0 or max(stops) <= 0:
        return torch.zeros_like(q), q.new_full((lists, T, G), -torch.inf)
    scored = fold is not None
    parts: list[_Part | _Each] = []
    found: list[tuple[Tensor, Tensor]] = []
    rest = limits
    if leading is not None:
        run = _Run(keys, values, tables, leading)
        parts.append(run)
        found.append(run.attend(q.reshape(lists, T * G, D), scored))
        tables, stops = tables[:, leading.blocks :], [stop - run.size for stop in stops]
        rest = None if limits is None else limits - run.size
    if max(stops) > 0:
        each = None
        if few(lists) and (lists == 1 or not whole(stops, D)):
            each = _Each(keys, values, tables, stops, rest)
        if each is not None and each.longest <= _FEW_SLOTS:
            parts.append(each)
            found.append(each.attend(q, scored))
        else:
            tiles = _Tiles(tables, stops, keys.block_size, D)
            parts.append(tiles)
            found.append(tiles.attend(q, keys, values, rest, scored))
    out, lse = _merge(*zip(*found, strict=True))
    if limits is not None and lse.isnan().any():  # NaN and _HIDDEN are NaN
        return None
    if sinks is not None:
        weight, _, lse = union_weights(lse, sinks.expand(lists, T, G).flatten(1))
        out = out * weight[..., None]
    empty = None
    if limits is not None:
        empty = (limits <= 0).repeat_interleave(G, 1)  # [lists, rows]
        out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)

    if fold is not None:
        shift = lse if empty is None else lse.masked_fill(empty, torch.inf)
        for part in parts:
            part.fold(fold, shift)
    return out.reshape(lists, T, G, D), lse.reshape(lists, T, G)
