"""Paged append, attention and schedule on the CPU.

Attention reads K and V from memory once: a list whose blocks lie side by side in the pool is used in place, scattered
blocks are gathered by tiles that stay in the cache of a core. Scores are held as a matrix for one tile of query rows
and a bounded group of lists at a time, so memory grows linearly with the lengths. Few rows without windows, trees or
softcaps, which is decoding, are served by ``paged_decode``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kvops.eager.attention import default_scale
from kvops.eager.paged_decode import Alike, ScoreFold, alike, attend_tiles, few
from kvops.eager.paged_rows import (
    MIN_ROWS,
    Piece,
    Rows,
    by_block,
    clip,
    cut,
    fold_scores,
    multiply_keys,
    multiply_values,
    read_blocks,
    write_slots,
)

# Scores held at once, in elements: 4 MiB in float32.
_MAX_SCORES = 1 << 20
# Consecutive blocks are read in place rather than gathered where lists have so many slots in the mean.
_LONG = 1024
# Lists up to this many slots are gathered together and served by one batched product.
_SHORT = 512

# A share of a schedule is not cut below this many slots.
_MIN_SHARE = 128
# Slots per unit of a batch-invariant schedule.
_INVARIANT_UNIT = 256
# What stands for the number of programs where there is no GPU.
CPU_PROGRAMS = 8

_FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max


def _divided(x: Tensor, by: int | Tensor) -> Tensor:
    """``x / by``, neither of them negative, rounded up."""
    return torch.div(x + (by - 1), by, rounding_mode="trunc")


def schedule_ends(lens: Tensor, block_size: int, batch_invariant: bool) -> tuple[Tensor, int]:
    """Where each list of ``lens`` [L, lists] ends in the line of all: int64 [L, lists] in units, and the slots of a
    unit: about a block, or the slots that a batch-invariant call gives a partial result of their own."""
    unit = _INVARIANT_UNIT if batch_invariant else min(max(block_size, 16), 64)
    return _divided(lens.clamp(min=0), unit).cumsum(1), unit


def paged_schedule(
    seq_lens: Tensor, block_size: int, *, num_programs: int = 0, batch_invariant: bool = False
) -> Tensor:
    """See :func:`kvops.paged_schedule`. A row holds the share of a program, the prefix sums of the lists' units with a
    leading 0, and the list in which each program begins."""
    num_programs = num_programs or CPU_PROGRAMS
    lens = seq_lens.flatten(1) if seq_lens.dim() == 3 else seq_lens.flatten()[None]  # [L, lists]
    ends, unit = schedule_ends(lens, block_size, batch_invariant)
    zero = ends.new_zeros(len(lens), num_programs + 2)
    total = ends[:, -1:] if ends.shape[1] else zero[:, :1]
    share = _divided(total, num_programs).clamp_(min=-(-_MIN_SHARE // unit))
    # Program p begins behind all lists that end up to p * share. To count them by the first program that they are
    # behind of takes a quarter of the time of searching for each program's beginning.
    ended = zero[:, 1:].scatter_(1, _divided(ends, share), 1, reduce="add")
    schedule = torch.cat([share, zero[:, :1], ends, ended[:, :-1].cumsum(1)], 1).to(torch.int32)
    return schedule if seq_lens.dim() == 3 else schedule[0]


def paged_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    q_lens: Tensor | None = None,
    positions: Tensor | None = None,
    token_positions: Tensor | None = None,
    scores: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """See :func:`kvops.paged_append`."""
    B, T, Hkv, _ = k.shape
    block_size = k_cache.shape[1]
    if B * T * Hkv == 0:
        return
    uniform = k_cache.dim() == 4
    if uniform:
        block_tables, seq_lens = block_tables[:, None].expand(B, Hkv, -1), seq_lens[:, None].expand(B, Hkv)
    count = T if q_lens is None else q_lens.clamp(max=T)[:, None, None]
    slot = seq_lens.long()[:, None] - count  # [B, T, Hkv]
    if T > 1:
        slot = slot + torch.arange(T, device=k.device)[:, None]
    capacity = block_tables.shape[2] * block_size
    rows = None  # which of the B * T * Hkv rows are written, if not all
    lens = seq_lens.flatten().tolist()
    if q_lens is not None or min(lens) < T or max(lens) > capacity:
        written = (slot >= 0) & (slot < capacity) & (torch.arange(T, device=k.device)[:, None] < count)
        rows = written.flatten().nonzero().flatten()
        if len(rows) == 0:
            return
        slot = slot.masked_fill_(~written, 0)
    page = torch.div(slot, block_size, rounding_mode="trunc")
    block = block_tables.gather(2, page.mT).mT
    slot = torch.add(slot, block - page, alpha=block_size).flatten()  # from now on counted through the pool
    head = torch.arange(Hkv, device=k.device).repeat(B * T) if uniform else None
    if rows is not None:
        slot, head = slot[rows], None if head is None else head[rows]

    def write(cache: Tensor, values: Tensor, by_head: bool) -> None:
        write_slots(cache, slot, values if rows is None else values[rows], head if by_head else None)

    for cache, new, scale in ((k_cache, k, k_scale), (v_cache, v, v_scale)):
        if cache.dtype == torch.float8_e4m3fn:
            new = new.float() if scale is None else new.float() / scale.reshape(-1, 1)
            new = new.clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(cache.dtype)
        write(cache, new.flatten(0, 2), uniform)
    if positions is not None and token_positions is not None:
        values = token_positions[:, :, None].expand(B, T, Hkv).reshape(-1)
        write(positions, values, positions.dim() == 3)
    if scores is not None:
        write(scores, scores.new_zeros(B * T * Hkv), uniform)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    q_lens: Tensor | None = None,
    causal: bool = True,
    window_left: int = -1,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    tree_mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    scores: Tensor | None = None,
    score_reduce: str = "sum",
    score_decay: float = 1.0,
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """See :func:`kvops.paged_attention`. The cores share each product, so the balance of ``schedule`` is not needed.

    Batch-invariant calls serve each list alone and from copies: every product then has a shape and an alignment that
    follow from the list itself, and sums in the same order.
    """
    B, T, Hq, _ = q.shape
    Dv = v_cache.shape[-1]
    call = _Attention(q, k_cache, v_cache, block_tables, seq_lens, q_lens, sinks, k_scale, scale)
    call.batch_invariant = batch_invariant
    call.causal, call.window_left, call.softcap, call.tree_mask = causal, window_left, softcap, tree_mask
    if window_left >= 0:
        call.positions, call.query_positions = positions, query_positions
    call.scores, call.score_reduce, call.score_decay = scores, score_reduce, score_decay

    # [B, Hkv, T, group, Dv] and [B, Hkv, T, group]
    out, lse = (result.view(B, call.num_kv_heads, T, call.group, *result.shape[3:]) for result in call.run())
    if v_scale is not None:
        out = out * v_scale.expand(call.num_kv_heads).view(-1, 1, 1, 1)
    lse = lse.permute(0, 1, 3, 2).reshape(B, Hq, T)
    return out.transpose(1, 2).reshape(B, T, Hq, Dv).to(q.dtype), lse.contiguous()


class _Group:
    """Lists that are served together, over the blocks that any of their queries may see.

    Column 0 of the group is the first slot of a block, slot ``starts[i]`` of list i; the list's slots end before
    ``stops[i]``. ``blocks`` [n, columns / block_size] repeats a list's last block past its end.
    """

    def __init__(self, call: _Attention, members: list[int], spans: dict[int, tuple[int, int]]) -> None:
        size = call.block_size
        self.members = members
        self.everything = len(members) == len(call.lens) and not call.batch_invariant
        firsts = [spans[member][0] // size for member in members]
        counts = [-(-spans[member][1] // size) - first for member, first in zip(members, firsts, strict=True)]
        self.starts = [first * size for first in firsts]
        self.stops = [spans[member][1] for member in members]
        # Whether every list begins at its column 0: none is inside a window that begins later.
        self.aligned = all(spans[member][0] == start for member, start in zip(members, self.starts, strict=True))
        most = max(counts)
        self.width = most * size
        self.index = torch.tensor(members)
        tables = self.pick(call.tables)
        self.inside: Tensor | None = None  # which entries of ``blocks`` are the list's own
        if min(counts) < most:
            self.inside = torch.arange(most) < torch.tensor(counts)[:, None]
        if not any(firsts) and self.inside is None:
            self.blocks = tables[:, :most]
        else:
            first, count = torch.tensor(firsts)[:, None], torch.tensor(counts)[:, None]
            self.blocks = tables.gather(1, first + torch.minimum(torch.arange(most), count - 1))
        # Long lists take a product each, short ones are gathered and multiplied in one batch.
        self.pieces: list[list[Piece]] | None = None
        if max(stop - start for stop, start in zip(self.stops, self.starts, strict=True)) > _SHORT:
            in_place = call.keys.in_place and call.values.in_place and not call.batch_invariant
            self.pieces = cut(self.blocks, self.starts, self.stops, size, in_place)

    def pick(self, per_list: Tensor) -> Tensor:
        return per_list if self.everything else per_list[self.index]


class _Attention:
    """One call. A *list* is the blocks of one (sequence, KV head); lists are numbered ``sequence * Hkv + head``."""

    batch_invariant: bool
    causal: bool
    window_left: int
    softcap: float
    tree_mask: Tensor | None
    positions: Tensor | None = None
    query_positions: Tensor | None = None
    leading: Alike | None = None  # what all lists have side by side
    scores: Tensor | None
    score_reduce: str
    score_decay: float

    def __init__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        q_lens: Tensor | None,
        sinks: Tensor | None,
        k_scale: Tensor | None,
        scale: float | None,
    ) -> None:
        B, T, Hq, D = q.shape
        Hkv = k_cache.shape[2] if k_cache.dim() == 4 else block_tables.shape[1]
        if k_cache.dim() == 4:
            block_tables, seq_lens = block_tables[:, None].expand(B, Hkv, -1), seq_lens[:, None].expand(B, Hkv)
        self.num_tokens, self.num_kv_heads, self.group = T, Hkv, Hq // Hkv
        self.block_size = k_cache.shape[1]
        self.tables = block_tables.reshape(B * Hkv, block_tables.shape[-1])
        capacity = self.tables.shape[1] * self.block_size
        self.lens = [min(length, capacity) for length in seq_lens.reshape(-1).tolist()]
        counts = [T] * B if q_lens is None else [min(count, T) for count in q_lens.tolist()]
        self.counts = [count for count in counts for _ in range(Hkv)]
        dtype = torch.promote_types(q.dtype, torch.float32)
        self.keys, self.values = Rows(k_cache, dtype), Rows(v_cache, dtype)
        # A contiguous copy: torch's kernel reads rows of consecutive numbers, see kvops.eager.attention.cast.
        scaled = q.to(dtype, memory_format=torch.contiguous_format, copy=True)
        scaled *= default_scale(scale, D)
        if k_scale is not None:
            scaled *= k_scale.expand(Hkv).repeat_interleave(self.group)[:, None]
        # [lists, T, group, D]
        self.q = scaled.view(B, T, Hkv, self.group, D).transpose(1, 2).reshape(B * Hkv, T, self.group, D)
        self.sinks = None if sinks is None else sinks.to(dtype).view(Hkv, 1, self.group)

    def span(self, index: int, first: int, last: int) -> tuple[int, int]:
        """The slots of a list that its tokens ``first`` to ``last`` may see."""
        length, count = self.lens[index], self.counts[index]
        last = min(last, count)
        if first >= last or length <= 0:
            return 0, 0
        start, stop = 0, length
        if self.causal and self.tree_mask is None:
            stop = max(0, length - count + last)
        if self.window_left >= 0 and self.query_positions is None:
            start = max(0, length - count + first - self.window_left)
        return min(start, stop), stop

    def groups(self) -> Iterator[_Group]:
        """Which lists are served together: as many of like length as the bound on the scores allows."""
        spans = {index: self.span(index, 0, self.num_tokens) for index in range(len(self.lens))}
        widths = {index: stop - start for index, (start, stop) in spans.items() if start < stop}
        if self.batch_invariant:
            for index in widths:
                yield _Group(self, [index], spans)
            return
        for members in (
            [index for index, width in widths.items() if width <= _SHORT],
            [index for index, width in widths.items() if width > _SHORT],
        ):
            if not members:
                continue
            longest = max(widths[index] for index in members)
            if len(members) * self.tile_tokens(longest) * self.group * longest > _MAX_SCORES:
                members.sort(key=lambda index: -widths[index])
            while members:
                longest = max(widths[index] for index in members)
                size = max(1, _MAX_SCORES // (self.tile_tokens(longest) * self.group * longest))
                yield _Group(self, members[:size], spans)
                members = members[size:]

    def tile_tokens(self, slots: int) -> int:
        """Query tokens whose scores over so many slots are held at once."""
        return max(1, min(self.num_tokens, max(MIN_ROWS, _MAX_SCORES // slots) // self.group))

    def run(self) -> tuple[Tensor, Tensor]:
        """out [lists, T, group, Dv], lse [lists, T, group]."""
        lists, T, G, _ = self.q.shape
        in_tiles = self.run_tiles() if self.in_tiles() else None
        if in_tiles is not None:
            return in_tiles
        out = lse = None
        for group in self.groups():
            scores = _ScoreSums(self, group) if self.scores is not None else None
            step = self.tile_tokens(group.width)
            for first in range(0, T, step):
                last = min(first + step, T)
                tile = self.tile(group, first, last, scores)
                if tile is None:
                    continue
                if group.everything and last - first == T:
                    out, lse = tile
                    continue
                if out is None or lse is None:
                    out = self.q.new_zeros(lists, T, G, self.values.cache.shape[-1])
                    lse = self.q.new_full((lists, T, G), -math.inf)
                rows = slice(None) if group.everything else group.index
                out[rows, first:last], lse[rows, first:last] = tile
            if scores is not None:
                scores.write()
        if out is None or lse is None:
            out = self.q.new_zeros(lists, T, G, self.values.cache.shape[-1])
            lse = self.q.new_full((lists, T, G), -math.inf)
        return out, lse

    def in_tiles(self) -> bool:
        """Whether ``paged_decode`` serves the call: few rows, which see their lists from the first slot on.

        Not where softcaps, other sizes of V or long lists that are consecutive, but not all alike, are better served
        here.
        """
        if self.num_tokens * self.group >= MIN_ROWS or self.batch_invariant or self.softcap:
            return False
        if self.window_left >= 0 or self.tree_mask is not None:
            return False
        if self.keys.cache.shape[-1] != self.values.cache.shape[-1]:
            return False
        lists, total = len(self.lens), sum(self.lens)
        if not (self.keys.in_place and self.values.in_place) or total < max(_LONG * lists, 1):
            return True
        if not self.keys.by_head:
            self.leading = alike(self.tables, self.least(), total, self.block_size)
            if self.leading is not None:
                return True
        if few(lists) or max(self.lens) * lists > 2 * total:  # half of a batch in place would be padding
            return True
        blocks = self.tables[:, : max(0, min(self.lens)) // self.block_size]
        return int((blocks[:, 1:] - blocks[:, :-1] == 1).sum()) < blocks.numel() // 2

    def least(self) -> int:
        """The slots that every token of every list sees."""
        if min(self.counts) < self.num_tokens:
            return 0
        return min(self.lens) - (self.num_tokens - 1 if self.causal else 0)

    def run_tiles(self) -> tuple[Tensor, Tensor] | None:
        """The same for few rows: see :func:`attend_tiles`."""
        T, lists = self.num_tokens, len(self.lens)
        stops = [length if count else 0 for length, count in zip(self.lens, self.counts, strict=True)]
        limits = None
        if (T > 1 and self.causal) or min(self.counts, default=T) < T or min(self.lens, default=1) <= 0:
            lens, counts = torch.tensor(self.lens)[:, None], torch.tensor(self.counts)[:, None]
            token = torch.arange(T)
            limits = lens - counts + token + 1 if self.causal else lens.expand(lists, T)
            limits = limits.masked_fill(token >= counts, 0)
        fold = None if self.scores is None else ScoreFold(self.scores, self.score_reduce, self.score_decay)
        sinks = None if self.sinks is None else self.sinks.repeat(lists // self.num_kv_heads, 1, 1)
        return attend_tiles(
            self.q, self.keys, self.values, self.tables, stops, limits, leading=self.leading, sinks=sinks, fold=fold
        )

    def tile(self, group: _Group, first: int, last: int, scores: _ScoreSums | None) -> tuple[Tensor, Tensor] | None:
        """Attention of the tokens ``first`` to ``last``: out [n, t, group, Dv], lse [n, t, group]."""
        n, t, G, rows = len(group.members), last - first, self.group, (last - first) * self.group
        if t == self.num_tokens:
            spans = list(zip(group.starts, group.stops, strict=True))
        else:
            spans = [self.span(member, first, last) for member in group.members]
        skip = 0  # columns of the group before this tile's column 0
        if group.pieces is not None and t < self.num_tokens:
            skip = min((span[0] - start for span, start in zip(spans, group.starts, strict=True) if span[1]), default=0)
            skip = max(0, skip // self.block_size * self.block_size)
        widths = [max(0, span[1] - start - skip) for span, start in zip(spans, group.starts, strict=True)]
        if not any(widths):
            return None
        width = group.width if group.pieces is None else max(widths)
        q = group.pick(self.q)
        q = (q if t == self.num_tokens else q[:, first:last]).reshape(n, rows, -1)

        if group.pieces is None:
            s = torch.bmm(q, self.keys.blocks(group.blocks, group.index).mT)
        else:
            s = q.new_empty(n, rows, width)
            each = list(zip(q.unbind(), s.unbind(), strict=True))
            for i, k, columns in self.matrices(self.keys, group, group.pieces, skip, widths):
                multiply_keys(each[i][0], k, each[i][1][:, columns])
        if self.softcap:
            s.div_(self.softcap).tanh_().mul_(self.softcap)
        hidden, column = self.hidden(group, first, last, skip, widths, width)
        if hidden is not None:
            s.view(n, t, G, width)[..., column:].masked_fill_(hidden[:, :, None], -math.inf)
        # One token that sees a whole list has no empty row.
        may_be_empty = hidden is not None and not self.plain(group)

        maximum = s.amax(-1, keepdim=True)
        sink = None
        if self.sinks is not None:  # a sink joins the rows that see a key
            heads = torch.tensor([member % self.num_kv_heads for member in group.members])
            sink = self.sinks[heads].expand(n, t, G).reshape(n, rows, 1)
            sink = sink.masked_fill(maximum == -math.inf, -math.inf)
            maximum = torch.maximum(maximum, sink).clamp_(max=torch.finfo(sink.dtype).max)  # a sink may be inf
        if may_be_empty:
            maximum.masked_fill_(maximum == -math.inf, 0.0)
        p = s.sub_(maximum).exp_()
        total = p.sum(-1, keepdim=True)  # 0 only in a row that sees nothing
        if sink is not None:
            total += torch.exp(sink - maximum)
        lse = total.log().add_(maximum).view(n, t, G)
        if may_be_empty:
            total.masked_fill_(total == 0, 1.0)

        if group.pieces is None:
            v = self.values.blocks(group.blocks, group.index)
            if min(widths) < width:  # what stands past a list's end may be no number at all
                if min(widths) == max(widths):
                    v[:, widths[0] :].zero_()
                else:
                    for one, own in zip(v.unbind(), widths, strict=True):
                        one[own:].zero_()
            out = torch.bmm(p, v)
        else:
            out = q.new_zeros(n, rows, self.values.cache.shape[-1])
            each = list(zip(p.unbind(), out.unbind(), strict=True))
            for i, v, columns in self.matrices(self.values, group, group.pieces, skip, widths):
                multiply_values(each[i][0][:, columns], v, each[i][1])
        out = out.div_(total).view(n, t, G, -1)
        if scores is not None:
            scores.add(p.div_(total), skip, hidden, column)
        return out, lse

    def matrices(
        self, rows: Rows, group: _Group, pieces: list[list[Piece]], skip: int, widths: list[int]
    ) -> Iterator[tuple[int, Tensor, slice]]:
        """The pieces of the lists i from column ``skip`` on, with the tile's columns that they stand for."""
        blocks = group.blocks.unbind()
        for i, width in enumerate(widths):
            head = group.members[i] % self.num_kv_heads
            for piece in clip(pieces[i], skip, skip + width):
                yield i, rows.matrix(head, blocks[i], piece), slice(piece.start - skip, piece.stop - skip)

    def plain(self, group: _Group) -> bool:
        """Whether there is one token, which sees its lists whole."""
        return self.num_tokens == 1 and group.aligned and self.tree_mask is None and self.query_positions is None

    def hidden(
        self, group: _Group, first: int, last: int, skip: int, widths: list[int], width: int
    ) -> tuple[Tensor | None, int]:
        """Which slots the rows do not see: bool [n, tokens or 1, columns], and its first column; the columns before it
        are seen by every row. None: all are."""
        if self.plain(group):
            column = min(widths)
            if column == width:
                return None, 0
            return (torch.arange(column, width) >= torch.tensor(widths)[:, None])[:, None], column
        lens = torch.tensor([self.lens[member] for member in group.members])
        counts = torch.tensor([self.counts[member] for member in group.members])
        token = torch.arange(first, last)
        query = (lens - counts)[:, None] + token  # the slot of each query
        causal = self.causal and self.tree_mask is None
        limit = query + 1 if causal else lens[:, None].expand_as(query)
        limit = limit.masked_fill(token >= counts[:, None], 0)
        origin = torch.tensor(group.starts) + skip
        column = 0
        if self.window_left < 0 and self.tree_mask is None:
            column = min(width, max(0, int((limit - origin[:, None]).min())))
        slot = origin[:, None] + torch.arange(column, width)
        hidden = slot[:, None] >= limit[:, :, None]
        reach = min(self.window_left, 1 << 32)  # further than two int32 lie apart
        if self.query_positions is not None and self.positions is not None:
            by_head = self.positions.dim() == 3
            position = read_blocks(*by_block(self.positions, group.blocks, group.index, by_head=by_head)).flatten(1)
            newest = self.query_positions[group.index // self.num_kv_heads, first:last].long()
            oldest = newest - reach
            hidden |= position[:, None, skip + column : skip + width] < oldest[:, :, None]
        elif self.window_left >= 0:
            hidden |= slot[:, None] < (query - reach)[:, :, None]
        if self.tree_mask is not None:
            tree = self.tree_mask.expand(len(self.lens) // self.num_kv_heads, -1, -1)
            tree = tree[group.index // self.num_kv_heads, first:last]
            new = (slot - (lens - counts)[:, None])[:, None].expand_as(hidden)
            hidden |= (new >= 0) & ~tree.gather(2, new.clamp(0, self.num_tokens - 1))
        return hidden, column


class _ScoreSums:
    """Column reductions of the probabilities of one group of lists, over all its tiles of queries."""

    def __init__(self, call: _Attention, group: _Group) -> None:
        self.call, self.group = call, group
        shape = len(group.members), group.width
        self.reduced = torch.zeros(shape, dtype=call.q.dtype)
        self.seen = torch.zeros(shape, dtype=torch.bool)

    def add(self, p: Tensor, skip: int, hidden: Tensor | None, column: int) -> None:
        """p [n, rows, columns], exact probabilities, from the group's column ``skip`` on."""
        columns = slice(skip, skip + p.shape[2])
        reduced = self.reduced[:, columns]
        if self.call.score_reduce == "max":
            torch.maximum(reduced, p.amax(1), out=reduced)
        else:
            reduced += (p.square_() if self.call.score_reduce == "sumsq" else p).sum(1)
        if hidden is None:
            self.seen[:, columns] = True
        else:
            self.seen[:, skip : skip + column] = True
            self.seen[:, skip + column : columns.stop] |= ~hidden.all(1)

    def write(self) -> None:
        scores, group = self.call.scores, self.group
        if scores is None:
            return
        decay = self.call.score_decay
        fold_scores(scores, decay, group.blocks, group.inside, group.index, self.reduced, self.seen)
