"""Context parallelism: attention over a sequence whose tokens are spread over the processes of a group.

Every process of a ``torch.distributed`` group holds a shard of the sequence: queries, keys and values of its own
tokens. :func:`ring_attention` passes keys and values around and merges the results; :func:`gather_attention`
collects all keys and values first, which takes their memory and has ALiBi. Both are differentiable. Each process gets
the rows of its own tokens.

With a causal mask the first tokens have little to attend to and the last have much, so each process takes two chunks
of the sequence, one from each end (:func:`shard`): all then do the same work.

This module is imported on request: ``import kvops.parallel``.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from kvops import checks
from kvops.ops.attention import flash_attention, flash_attention_backward
from kvops.ops.merge import merge_attention
from kvops.ops.varlen import flash_attention_varlen, flash_attention_varlen_backward

__all__ = ["gather_attention", "ring_attention", "shard", "unshard"]


def _group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    whole = group or dist.group.WORLD
    if whole is None:
        raise RuntimeError("group: expected torch.distributed to be initialised: call init_process_group() first")
    return whole


def _order(size: int) -> list[int]:
    """The order of chunks over the processes, two for each."""
    return [chunk for rank in range(size) for chunk in (rank, 2 * size - 1 - rank)]


def shard(x: Tensor, group: dist.ProcessGroup | None = None, *, dim: int = 1) -> Tensor:
    """This process's part of ``x``: two chunks, one from each end. ``x`` is the same on all processes of ``group``.

    Of 2 P chunks along ``dim`` the process of rank r gets number r and number 2 P - 1 - r. Shard token numbers and
    positions the same way. Raises ValueError if the size does not divide into 2 P chunks: pad the sequence at its end.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if x.shape[dim] % (2 * size):
        raise ValueError(
            f"x: expected a multiple of {2 * size} along dimension {dim}, two chunks for each of {size} processes, "
            f"got {x.shape[dim]}"
        )
    chunks = x.chunk(2 * size, dim)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]), dim)


def unshard(x: Tensor, group: dist.ProcessGroup | None = None, *, dim: int = 1) -> Tensor:
    """The inverse of :func:`shard`, on every process of ``group``; differentiable."""
    size = dist.get_world_size(group)
    mesh = DeviceMesh.from_group(_group(group), x.device.type)
    parts = DTensor.from_local(x, mesh, [Shard(dim)], run_check=False).redistribute(placements=[Replicate()])
    # Every process has a gradient for the whole. The owner's gradient is their sum.
    chunks = parts.to_local(grad_placements=[Partial()]).chunk(2 * size, dim)
    places = {chunk: place for place, chunk in enumerate(_order(size))}
    return torch.cat([chunks[places[chunk]] for chunk in range(2 * size)], dim)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.expect_tensor(name, x)
        checks.expect_rank(name, x, "[batch, seqlen, heads, head_dim]")
        if x.shape[1] != q.shape[1]:
            raise ValueError(f"{name}: expected the {q.shape[1]} tokens that q has on this process, got {x.shape[1]}")
        if x.shape[1] % 2:
            raise ValueError(f"{name}: expected two chunks of tokens, as shard() gives them, got {x.shape[1]} tokens")


def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    causal: bool = True,
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the whole sequence, keys and values collected from all processes.

    Args:
        q: ``[B, S / P, Hq, D]``, this process's :func:`shard`.
        k, v: ``[B, S / P, Hkv, D]`` and ``[..., Dv]``, likewise.
        group: of P processes; None for all.
        causal, window_left, window_right, scale, softcap, sinks, alibi_slopes: as in :func:`kvops.flash_attention`;
            ``alibi_slopes`` only with ``causal``.

    Returns:
        out ``[B, S / P, Hq, Dv]`` and lse ``[B, Hq, S / P]`` of this process's tokens. The gradients of k and v are
        summed over the processes; that of sinks is this process's part.

    Each process needs the memory of all keys and values (as in the training of Llama 3: Grattafiori et al. 2024,
    section 3.3).
    """
    _check(q, k, v)
    if alibi_slopes is not None and not causal:
        raise ValueError(
            "alibi_slopes: expected None without causal, got a tensor: chunks of queries have no position of their own"
        )
    checks.expect_at_least("window_left", window_left, -1)
    checks.expect_at_least("window_right", window_right, -1)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks, "alibi_slopes": alibi_slopes}
    keys, values = unshard(k, group), unshard(v, group)
    if not causal and window_left < 0 and window_right < 0:
        return flash_attention(q, keys, values, **options)
    size, rank, half = dist.get_world_size(group), dist.get_rank(group), q.shape[1] // 2
    limit = 0 if causal else window_right
    parts = []
    for chunk, rows in ((rank, q[:, :half]), (2 * size - 1 - rank, q[:, half:])):
        end = (chunk + 1) * half
        first = 0 if window_left < 0 else max(0, end - half - window_left)
        last = keys.shape[1] if limit < 0 else min(keys.shape[1], end + limit)
        # The operator takes the last row and the last key to stand at the same position.
        options["window_left"] = window_left if window_left < 0 else window_left + last - end
        options["window_right"] = -1 if limit < 0 else limit - (last - end)
        seen = slice(first, last)
        parts.append(flash_attention(rows, keys[:, seen], values[:, seen], causal=causal, **options))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 2)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    causal: bool = True,
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    cu_seqlens: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the whole sequence, or over packed documents; keys and values travel from process to process.

    Args:
        q: ``[B, S / P, Hq, D]``, this process's :func:`shard`; with ``cu_seqlens`` ``[T / P, Hq, D]``, the shard along
            dimension 0 of T packed tokens.
        k, v: ``[B, S / P, Hkv, D]`` and ``[..., Dv]``, likewise.
        group: of P processes; None for all.
        causal, window_left, window_right, scale, softcap, sinks: as in :func:`kvops.flash_attention`.
        cu_seqlens: the cumulative lengths of the documents of all T tokens, with a leading 0, the same on every
            process; tokens after the last document belong to none. A list of ints or a tensor on the CPU, because the
            host plans the work with them. Documents may begin and end anywhere.

    Returns:
        out ``[B, S / P, Hq, Dv]`` and lse ``[B, Hq, S / P]`` of this process's tokens (``[T / P, Hq, Dv]`` and
        ``[Hq, T / P]`` with ``cu_seqlens``). The gradients of k and v are complete; that of sinks is this process's
        part.

    Raises:
        ValueError, TypeError: as :func:`kvops.flash_attention` and :func:`kvops.flash_attention_varlen`; ValueError for
            shards of different lengths and ``cu_seqlens`` on another device than the CPU.

    No process holds more than two shards of keys and values. The next shard travels during attention to the current
    one. Keys that no row of a process sees, because of a window or of a document's end, are not computed with, and
    shards stop travelling when no process needs them any more. Parts are merged in float32
    (:func:`kvops.merge_attention`). Work is balanced for long documents and for documents shorter than a chunk; a
    window or a document of a few chunks leaves some processes with less.

    Liu et al. 2023, "Ring Attention with Blockwise Transformers" (arXiv:2310.01889); balanced as in Brandon et al.
    2023, "Striped Attention" (arXiv:2311.09431), by chunks instead of stripes.
    """
    documents = None
    if cu_seqlens is not None:
        for name, x in (("q", q), ("k", k), ("v", v)):
            checks.expect_tensor(name, x)
            checks.expect_rank(name, x, "[tokens, heads, head_dim]")
        documents = _documents(cu_seqlens, len(q) * dist.get_world_size(group))
        q, k, v = q[None], k[None], v[None]
    _check(q, k, v)
    checks.expect_at_least("window_left", window_left, -1)
    checks.expect_at_least("window_right", window_right, -1)
    mask = _Mask(causal, window_left, 0 if causal else window_right, documents)
    out, lse = _Ring.apply(q, k, v, sinks, group, {"scale": scale, "softcap": softcap}, mask)
    return (out, lse) if documents is None else (out[0], lse[0])


def _documents(cu_seqlens: Sequence[int] | Tensor, total: int) -> tuple[int, ...]:
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.device.type != "cpu":
        raise ValueError(
            "cu_seqlens: expected a list of ints or a tensor on the CPU, because the host plans the work with them, "
            f"got one on {cu_seqlens.device}; take cu_seqlens.tolist() once for all layers"
        )
    ends = checks.ints("cu_seqlens", cu_seqlens)
    if not ends or ends[0] != 0:
        raise ValueError(f"cu_seqlens: expected a leading 0, got {ends[:1]}")
    if any(end < start for start, end in pairwise(ends)) or ends[-1] > total:
        raise ValueError(
            f"cu_seqlens: expected ends in ascending order, of at most the {total} tokens of all processes, "
            f"got {checks.shown(ends)}"
        )
    return tuple(ends)


class _Mask(NamedTuple):
    """Which keys a query sees: -1 for a window without limit, and the ends of documents, None for one of all tokens."""

    causal: bool
    window_left: int
    window_right: int
    documents: tuple[int, ...] | None

    @property
    def is_plain(self) -> bool:
        return self.window_left < 0 and (self.causal or self.window_right < 0) and self.documents is None


class _Cell(NamedTuple):
    """Rows of q and columns of k and v on this process that one call of an operator takes."""

    rows: slice
    columns: slice
    own: bool = False  # rows beside their own keys: they get the sinks here
    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    documents: tuple[int, ...] | None = None  # ends of the documents in these rows and columns


@lru_cache(maxsize=256)
def _cells(mask: _Mask, step: int, rank: int, size: int, chunk: int) -> tuple[_Cell, ...]:
    """The work with the shard that arrives at ``step``. ``chunk`` is the number of tokens in each of its two chunks."""
    everything, first, second = slice(0, 2 * chunk), slice(0, chunk), slice(chunk, 2 * chunk)
    if mask.is_plain:
        if step == 0 or not mask.causal:
            return (_Cell(everything, everything, step == 0, mask.causal),)
        # A shard from an earlier rank holds a first chunk that all of this process's tokens see and a second one that
        # none sees; of a later rank's shard, this process's second chunk sees everything and its first nothing.
        return (_Cell(everything, first) if step <= rank else _Cell(second, everything),)
    source = (rank - step) % size
    cells = []
    for rows, of_queries in zip((first, second), _order(size)[2 * rank :], strict=False):
        for columns, of_keys in zip((first, second), _order(size)[2 * source :], strict=False):
            if of_queries == of_keys:
                cells.append(_own_cell(mask, rows, of_queries * chunk, chunk))
            else:
                cells += _cell(mask, rows.start, of_queries * chunk, columns.start, of_keys * chunk, chunk)
    return tuple(sorted(cells, key=lambda cell: not cell.own))


def _own_cell(mask: _Mask, rows: slice, start: int, chunk: int) -> _Cell:
    """A chunk that begins at token ``start`` beside itself."""
    documents = None
    if mask.documents is not None:
        inside = {min(max(end - start, 0), chunk) for end in mask.documents}
        documents = tuple(sorted({0} | inside))
        documents = None if documents == (0, chunk) else documents
    window_right = -1 if mask.causal else mask.window_right
    return _Cell(rows, rows, True, mask.causal, mask.window_left, window_right, documents)


def _cell(mask: _Mask, row: int, queries: int, column: int, keys: int, chunk: int) -> list[_Cell]:
    """The part of a chunk of queries that sees part of another chunk, of keys. ``queries`` and ``keys`` are the tokens
    that the chunks begin with, ``row`` and ``column`` their places on this process."""
    before = keys < queries
    if mask.causal and not before:
        return []
    low, high = min(queries, keys), max(queries, keys)
    # Of all documents only the one that holds the last token of the lower chunk can reach into the higher one.
    begin, end = _document(mask.documents, low + chunk - 1)
    lower, higher = (max(begin, low), low + chunk), (high, min(end, high + chunk))
    (q_start, q_end), (k_start, k_end) = (higher, lower) if before else (lower, higher)
    limit = mask.window_left if before else mask.window_right
    if limit >= 0:  # what the window hides from all rows, and from all keys
        if before:
            q_end, k_start = min(q_end, k_end + limit), max(k_start, q_start - limit)
        else:
            k_end, q_start = min(k_end, q_end + limit), max(q_start, k_start - limit)
    if q_end <= q_start or k_end <= k_start:
        return []
    cell = _Cell(
        slice(row + q_start - queries, row + q_end - queries), slice(column + k_start - keys, column + k_end - keys)
    )
    if limit < 0 or limit >= max(q_end - k_start, k_end - q_start) - 1:
        return [cell]
    # The operator takes the last row and the last key to stand at the same position.
    if before:
        return [cell._replace(window_left=limit - (q_end - k_end))]
    return [cell._replace(window_right=limit - (k_end - q_end))]


def _document(documents: tuple[int, ...] | None, token: int) -> tuple[int, int]:
    """Where the document of a token begins and ends; nowhere for a token of none."""
    if documents is None:
        return 0, sys.maxsize
    place = bisect_right(documents, token)
    return (documents[place - 1], documents[place]) if place < len(documents) else (token + 1, token + 1)


@lru_cache(maxsize=256)
def _steps(mask: _Mask, size: int, chunk: int) -> int:
    """How many shards a process sees, its own among them, until no process needs another one."""
    return max(step for step in range(size) if any(_cells(mask, step, rank, size, chunk) for rank in range(size))) + 1


def _packed(cell: _Cell, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """The arguments of the packed operators."""
    ends = cell.documents or ()
    longest = max((end - start for start, end in pairwise(ends)), default=0)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
    return cu_seqlens, cu_seqlens, longest, longest


def _attend(
    cell: _Cell, q: Tensor, held: list[Tensor], sinks: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    options = {**options, **_mask_of(cell), "sinks": sinks if cell.own else None}
    q, k, v = q[:, cell.rows], *(x[:, cell.columns] for x in held)
    if cell.documents is None:
        return flash_attention(q, k, v, **options)
    out, lse = flash_attention_varlen(q[0], k[0], v[0], *_packed(cell, q.device), **options)
    return out[None], lse[None]


def _attend_backward(
    cell: _Cell,
    results: tuple[Tensor, Tensor, Tensor, Tensor],
    q: Tensor,
    held: list[Tensor],
    sinks: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, ...]:
    """dq, dk, dv and dsinks of dout, dlse, out and lse."""
    (dout, out), (dlse, lse) = (x[:, cell.rows] for x in results[::2]), (x[:, :, cell.rows] for x in results[1::2])
    options = {**options, **_mask_of(cell), "sinks": sinks if cell.own else None}
    q, k, v = q[:, cell.rows], *(x[:, cell.columns] for x in held)
    if cell.documents is None:
        return flash_attention_backward(dout, q, k, v, out, lse, dlse=dlse, **options)
    *gradients, dsinks = flash_attention_varlen_backward(
        dout[0], q[0], k[0], v[0], out[0], lse[0], *_packed(cell, q.device), dlse=dlse[0], **options
    )
    return *(x[None] for x in gradients), dsinks


def _mask_of(cell: _Cell) -> dict[str, Any]:
    return {"causal": cell.causal, "window_left": cell.window_left, "window_right": cell.window_right}


class _Exchange:
    """Tensors on their way to the process ``hops`` ahead while those of the process as far behind arrive."""

    def __init__(self, tensors: list[Tensor], group: dist.ProcessGroup | None, hops: int = 1) -> None:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        world = _group(group)
        towards = dist.get_global_rank(world, (rank + hops) % size)
        behind = dist.get_global_rank(world, (rank - hops) % size)
        self.sent = [tensor.contiguous() for tensor in tensors]
        self.arriving = [torch.empty_like(tensor) for tensor in self.sent]
        operations = [dist.P2POp(dist.isend, tensor, towards, group) for tensor in self.sent]
        operations += [dist.P2POp(dist.irecv, tensor, behind, group) for tensor in self.arriving]
        self.work = dist.batch_isend_irecv(operations)

    def wait(self) -> list[Tensor]:
        for work in self.work:
            work.wait()
        return self.arriving


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        group: dist.ProcessGroup | None,
        options: dict[str, Any],
        mask: _Mask,
    ) -> tuple[Tensor, Tensor]:
        size, rank, chunk = dist.get_world_size(group), dist.get_rank(group), q.shape[1] // 2
        steps = _steps(mask, size, chunk)
        held = [k, v]
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float32, device=q.device)
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=torch.float32, device=q.device)
        for step in range(steps):
            exchange = _Exchange(held, group) if step + 1 < steps else None
            for cell in _cells(mask, step, rank, size, chunk):
                rows = cell.rows
                part, part_lse = _attend(cell, q, held, sinks, options)
                part = part.float()
                if not cell.own:  # a row's own keys come first
                    part, part_lse = merge_attention(out[:, rows], lse[:, :, rows], part, part_lse)
                out[:, rows], lse[:, :, rows] = part, part_lse
            if exchange is not None:
                held = exchange.wait()
        out = out.to(v.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.group, ctx.options, ctx.mask = group, options, mask
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, sinks, out, lse = ctx.saved_tensors
        group = ctx.group
        size, rank, chunk = dist.get_world_size(group), dist.get_rank(group), q.shape[1] // 2
        steps = _steps(ctx.mask, size, chunk)
        results = dout.contiguous(), dlse.contiguous(), out, lse
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        held = [k, v]
        # The gradients of the shard held here. They travel with it, and from its last place back to its owner.
        gradients = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in held]
        dsinks = None if sinks is None else torch.zeros_like(sinks)
        for step in range(steps):
            exchange = _Exchange(held, group) if step + 1 < steps else None
            for cell in _cells(ctx.mask, step, rank, size, chunk):
                part_dq, *parts, part_dsinks = _attend_backward(cell, results, q, held, sinks, ctx.options)
                dq[:, cell.rows] += part_dq
                for gradient, part in zip(gradients, parts, strict=True):
                    gradient[:, cell.columns] += part
                if dsinks is not None and cell.own:
                    dsinks += part_dsinks
            if exchange is not None:
                gradients = _Exchange(gradients, group).wait()
                held = exchange.wait()
        if steps > 1:
            gradients = _Exchange(gradients, group, 1 - steps).wait()
        dk, dv = gradients
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None, None, None
