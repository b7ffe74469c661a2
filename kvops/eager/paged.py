"""Paged append, attention and schedule on the CPU.

Attention reads K and V from memory once: a list whose blocks lie side by side in the pool is used in place, scattered
blocks are gathered by tiles that stay in the cache of a core. Scores are held as a matrix for one tile of query rows
and a bounded group of lists at a time, so memory grows linearly with the lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kvops.eager.paged_rows import (
    MIN_ROWS,
    Piece,
    Rows,
    clip,
    cut,
    multiply_keys,
    multiply_values,
    read_slots,
    write_slots,
)

# Scores held at once, in elements: 4 MiB in float32.
_MAX_SCORES = 1 << 20
# Lists up to this many slots are gathered together and served by one batched product.
_SHORT = 512

# A share of a schedule is not cut below this many slots.
_MIN_SHARE = 128
# What stands for the number of programs where there is no GPU.
CPU_PROGRAMS = 8

_FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max


def schedule_unit(block_size: int) -> int:
    """Slots per unit of a schedule: one block, where its size is reasonable."""
    return min(max(block_size, 16), 64)


def paged_schedule(seq_lens: Tensor, block_size: int, *, num_programs: int = 0) -> Tensor:
    """See :func:`kvops.paged_schedule`. A row holds the share of a program, the prefix sums of the lists' units with a
    leading 0, and the list in which each program begins."""
    num_programs = num_programs or CPU_PROGRAMS
    lens = seq_lens.flatten(1) if seq_lens.dim() == 3 else seq_lens.flatten()[None]  # [L, lists]
    unit = schedule_unit(block_size)
    units = (lens.clamp(min=0) + unit - 1) // unit
    prefix = torch.zeros(lens.shape[0], lens.shape[1] + 1, dtype=torch.int32, device=lens.device)
    prefix[:, 1:] = torch.cumsum(units, 1)
    share = ((prefix[:, -1:] + num_programs - 1) // num_programs).clamp(min=-(-_MIN_SHARE // unit))
    begin = torch.arange(num_programs, dtype=torch.int32, device=lens.device) * share
    first = torch.searchsorted(prefix[:, 1:].contiguous(), begin, right=True, out_int32=True)
    schedule = torch.cat([share, prefix, first], 1)
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
    heads = None
    if k_cache.dim() == 4:
        block_tables, seq_lens = block_tables[:, None].expand(B, Hkv, -1), seq_lens[:, None].expand(B, Hkv)
        heads = torch.arange(Hkv, device=k.device).repeat(B * T)
    token = torch.arange(T, device=k.device)[:, None]
    count = T if q_lens is None else q_lens.clamp(max=T)[:, None, None]
    slot = seq_lens[:, None] - count + token  # [B, T, Hkv]
    written = (slot >= 0) & (slot < block_tables.shape[2] * block_size)
    if q_lens is not None:
        written &= token < count
    rows = None if bool(written.all()) else written.flatten().nonzero().flatten()
    if rows is not None:
        if len(rows) == 0:
            return
        slot = slot.masked_fill(~written, 0)
    block = block_tables.gather(2, (slot // block_size).transpose(1, 2).long()).transpose(1, 2).flatten().long()
    offset = (slot % block_size).flatten()

    def pick(values: Tensor) -> Tensor:
        return values if rows is None else values[rows]

    block, offset = pick(block), pick(offset)
    heads = None if heads is None else pick(heads)
    for cache, new, scale in ((k_cache, k, k_scale), (v_cache, v, v_scale)):
        if cache.dtype == torch.float8_e4m3fn:
            new = new.float() if scale is None else new.float() / scale.reshape(-1, 1)
            new = new.clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(cache.dtype)
        values = new.reshape(B * T * Hkv, -1)
        write_slots(cache, block, offset, heads, values if rows is None else values[rows])
    if positions is not None and token_positions is not None:
        values = pick(token_positions[:, :, None].expand(B, T, Hkv).reshape(-1))
        write_slots(positions, block, offset, heads if positions.dim() == 3 else None, values)
    if scores is not None:
        write_slots(scores, block, offset, heads, scores.new_zeros(len(block)))


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
) -> tuple[Tensor, Tensor]:
    """See :func:`kvops.paged_attention`. The cores share each product, so the balance of ``schedule`` is not needed."""
    B, T, Hq, _ = q.shape
    Dv = v_cache.shape[-1]
    call = _Attention(q, k_cache, v_cache, block_tables, seq_lens, q_lens, sinks, k_scale, scale)
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
    """Lists that are served together, over the slots that any of their queries may see."""

    def __init__(self, call: _Attention, members: list[int]) -> None:
        self.members = members
        self.everything = len(members) == len(call.lens)
        self.index = torch.tensor(members)
        spans = [call.span(member, 0, call.num_tokens) for member in members]
        self.starts = [start for start, _ in spans]
        self.stops = [stop for _, stop in spans]
        self.width = max(stop - start for start, stop in spans)
        self.tables = self.pick(call.tables)
        self.heads = self.index[:, None] % call.num_kv_heads
        # Long lists take a product each, short ones are gathered and multiplied in one batch.
        self.pieces: list[list[Piece]] | None = None
        if self.width > _SHORT:
            in_place = call.keys.in_place and call.values.in_place
            self.pieces = [
                cut(table, start, stop, call.block_size, in_place)
                for table, (start, stop) in zip(self.tables, spans, strict=True)
            ]

    def pick(self, per_list: Tensor) -> Tensor:
        return per_list if self.everything else per_list[self.index]


class _Attention:
    """One call. A *list* is the blocks of one (sequence, KV head); lists are numbered ``sequence * Hkv + head``."""

    causal: bool
    window_left: int
    softcap: float
    tree_mask: Tensor | None
    positions: Tensor | None = None
    query_positions: Tensor | None = None
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
        scaled = q.to(dtype) * (D**-0.5 if scale is None else scale)
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

    def groups(self) -> Iterator[list[int]]:
        """Which lists are served together: as many of like length as the bound on the scores allows."""
        widths = {}
        for index in range(len(self.lens)):
            start, stop = self.span(index, 0, self.num_tokens)
            if start < stop:
                widths[index] = stop - start
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
                yield members[:size]
                members = members[size:]

    def tile_tokens(self, slots: int) -> int:
        """Query tokens whose scores over so many slots are held at once."""
        return max(1, min(self.num_tokens, max(MIN_ROWS, _MAX_SCORES // slots) // self.group))

    def run(self) -> tuple[Tensor, Tensor]:
        """out [lists, T, group, Dv], lse [lists, T, group]."""
        lists, T, G, _ = self.q.shape
        out = self.q.new_zeros(lists, T, G, self.values.cache.shape[-1])
        lse = self.q.new_full((lists, T, G), -math.inf)
        for members in self.groups():
            group = _Group(self, members)
            rows = slice(None) if group.everything else group.index
            scores = _ScoreSums(self, group) if self.scores is not None else None
            step = self.tile_tokens(group.width)
            for first in range(0, T, step):
                last = min(first + step, T)
                tile = self.tile(group, first, last, scores)
                if tile is not None:
                    out[rows, first:last], lse[rows, first:last] = tile
            if scores is not None:
                scores.write()
        return out, lse

    def tile(self, group: _Group, first: int, last: int, scores: _ScoreSums | None) -> tuple[Tensor, Tensor] | None:
        """Attention of the tokens ``first`` to ``last``: out [n, t, group, Dv], lse [n, t, group]."""
        spans = [self.span(member, first, last) for member in group.members]
        # Column 0 is slot starts[i] + skip of list i.
        skip = min((span[0] - start for span, start in zip(spans, group.starts, strict=True) if span[1]), default=0)
        origins = [start + skip for start in group.starts]
        widths = [max(0, span[1] - origin) for span, origin in zip(spans, origins, strict=True)]
        width = max(widths)
        if width == 0:
            return None
        n, t, G, rows = len(group.members), last - first, self.group, (last - first) * self.group
        q = group.pick(self.q)[:, first:last].reshape(n, rows, -1)

        if group.pieces is None:
            block, offset = self.address(group, origins, group.stops, width)
            s = torch.bmm(q, self.keys.gather(block, offset, group.heads).mT)
        else:
            s = q.new_empty(n, rows, width)
            for i in range(n):
                for piece in clip(group.pieces[i], origins[i], origins[i] + widths[i]):
                    k = self.keys.matrix(group.members[i] % self.num_kv_heads, group.tables[i], piece)
                    multiply_keys(q[i], k, s[i, :, piece.start - origins[i] : piece.stop - origins[i]])
        if self.softcap:
            s.div_(self.softcap).tanh_().mul_(self.softcap)
        exact = all(span[0] == origin or not span[1] for span, origin in zip(spans, origins, strict=True))
        visible, column = self.visible(group, first, last, origins, widths, exact)
        if visible is not None:
            s.view(n, t, G, width)[..., column:].masked_fill_(~visible[:, :, None], -math.inf)

        maximum = s.amax(-1, keepdim=True)
        sink = None
        if self.sinks is not None:  # a sink joins the rows that see a key
            sink = self.sinks[group.heads[:, 0]].expand(n, t, G).reshape(n, rows, 1)
            sink = sink.masked_fill(maximum == -math.inf, -math.inf)
            maximum = torch.maximum(maximum, sink)
        if visible is not None:
            maximum.masked_fill_(maximum == -math.inf, 0.0)
        p = s.sub_(maximum).exp_()
        total = p.sum(-1, keepdim=True)  # 0 only in a row that sees nothing
        if sink is not None:
            total += torch.exp(sink - maximum)
        lse = (maximum + total.log()).view(n, t, G)
        if visible is not None:
            total.masked_fill_(total == 0, 1.0)

        if group.pieces is None:
            out = torch.bmm(p, self.values.gather(block, offset, group.heads))
        else:
            out = q.new_zeros(n, rows, self.values.cache.shape[-1])
            for i in range(n):
                for piece in clip(group.pieces[i], origins[i], origins[i] + widths[i]):
                    v = self.values.matrix(group.members[i] % self.num_kv_heads, group.tables[i], piece)
                    multiply_values(p[i, :, piece.start - origins[i] : piece.stop - origins[i]], v, out[i])
        out = out.div_(total).view(n, t, G, -1)
        if scores is not None:
            scores.add(p.div_(total), skip, visible, column)
        return out, lse

    def address(self, group: _Group, origins: list[int], stops: list[int], width: int) -> tuple[Tensor, Tensor]:
        """Block and offset [n, width] of the slots from ``origins`` on; past a list's end its last slot repeats."""
        slot = torch.tensor(origins)[:, None] + torch.arange(width)
        slot = torch.minimum(slot, torch.tensor(stops)[:, None] - 1)
        return group.tables.gather(1, slot // self.block_size).long(), slot % self.block_size

    def visible(
        self, group: _Group, first: int, last: int, origins: list[int], widths: list[int], exact: bool
    ) -> tuple[Tensor | None, int]:
        """bool [n, tokens or 1, columns] and its first column; the columns before it are seen by every row. None: all
        are. ``exact`` tells that no list's window begins after its column 0."""
        width = max(widths)
        if last - first == 1 and exact and self.tree_mask is None and self.query_positions is None:
            if min(widths) == width:
                return None, 0
            return (torch.arange(width) < torch.tensor(widths)[:, None])[:, None], 0
        lens = torch.tensor([self.lens[member] for member in group.members])
        counts = torch.tensor([self.counts[member] for member in group.members])
        token = torch.arange(first, last)
        query = (lens - counts)[:, None] + token  # the slot of each query
        causal = self.causal and self.tree_mask is None
        limit = query + 1 if causal else lens[:, None].expand_as(query)
        limit = limit.masked_fill(token >= counts[:, None], 0)
        origin = torch.tensor(origins)
        column = 0
        if self.window_left < 0 and self.tree_mask is None:
            column = min(width, max(0, int((limit - origin[:, None]).min())))
        slot = origin[:, None] + torch.arange(column, width)
        visible = slot[:, None] < limit[:, :, None]
        if self.query_positions is not None and self.positions is not None:
            block, offset = self.address(group, origins, group.stops, width)
            head = group.heads if self.positions.dim() == 3 else None
            position = read_slots(self.positions, block, offset, head)
            oldest = self.query_positions[group.index // self.num_kv_heads, first:last] - self.window_left
            visible &= position[:, None] >= oldest[:, :, None]
        elif self.window_left >= 0:
            visible &= slot[:, None] >= (query - self.window_left)[:, :, None]
        if self.tree_mask is not None:
            tree = self.tree_mask.expand(len(self.lens) // self.num_kv_heads, -1, -1)
            tree = tree[group.index // self.num_kv_heads, first:last]
            new = (slot - (lens - counts)[:, None])[:, None].expand_as(visible)
            visible &= (new < 0) | tree.gather(2, new.clamp(0, self.num_tokens - 1))
        return visible, column


class _ScoreSums:
    """Column reductions of the probabilities of one group of lists, over all its tiles of queries."""

    def __init__(self, call: _Attention, group: _Group) -> None:
        self.call, self.group = call, group
        shape = len(group.members), group.width
        self.reduced = torch.zeros(shape, dtype=call.q.dtype)
        self.seen = torch.zeros(shape, dtype=torch.bool)

    def add(self, p: Tensor, skip: int, visible: Tensor | None, column: int) -> None:
        """p [n, rows, columns], exact probabilities; column 0 is the group's slot ``skip``."""
        columns = slice(skip, skip + p.shape[2])
        if self.call.score_reduce == "max":
            torch.maximum(self.reduced[:, columns], p.amax(1), out=self.reduced[:, columns])
        else:
            self.reduced[:, columns] += (p.square_() if self.call.score_reduce == "sumsq" else p).sum(1)
        if visible is None:
            self.seen[:, columns] = True
        else:
            self.seen[:, skip : skip + column] = True
            self.seen[:, skip + column : columns.stop] |= visible.any(1)

    def write(self) -> None:
        call, group = self.call, self.group
        if call.scores is None:
            return
        block, offset = call.address(group, group.starts, group.stops, group.width)
        head = group.heads if call.scores.dim() == 3 else None
        # Past a list's end its last slot repeats, and with it the value that is written.
        last = torch.tensor(group.stops)[:, None] - torch.tensor(group.starts)[:, None] - 1
        column = torch.minimum(torch.arange(group.width), last)
        old = read_slots(call.scores, block, offset, head)
        new = call.score_decay * old + self.reduced.gather(1, column).to(old.dtype)
        new = torch.where(self.seen.gather(1, column), new, old)
        heads = None if head is None else head.expand_as(block).flatten()
        write_slots(call.scores, block.flatten(), offset.flatten(), heads, new.flatten())
