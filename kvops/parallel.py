"""Context parallelism: attention over a sequence whose tokens are spread over the processes of a group.

Every process of a ``torch.distributed`` group holds a shard of the sequence: queries, keys and values of its own
tokens. :func:`ring_attention` passes keys and values around and merges the results; :func:`gather_attention`
collects all keys and values first, which takes their memory and supports every mask. Both are differentiable. Each
process gets the rows of its own tokens.

With a causal mask the first tokens have little to attend to and the last have much, so each process takes two chunks
of the sequence, one from each end (:func:`shard`): all then do the same work.

This module is imported on request: ``import kvops.parallel``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from kvops import checks
from kvops.ops.attention import flash_attention, flash_attention_backward
from kvops.ops.merge import merge_attention

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
        causal, window_left, scale, softcap, sinks, alibi_slopes: as in :func:`kvops.flash_attention`; without
            ``causal`` a window is refused.

    Returns:
        out ``[B, S / P, Hq, Dv]`` and lse ``[B, Hq, S / P]`` of this process's tokens. The gradients of k and v are
        summed over the processes; that of sinks is this process's part.

    Each process needs the memory of all keys and values (as in the training of Llama 3: Grattafiori et al. 2024,
    section 3.3).
    """
    _check(q, k, v)
    if window_left >= 0 and not causal:
        raise ValueError(f"window_left: expected -1 without causal, got {window_left}")
    options: dict[str, Any] = {
        "window_left": window_left,
        "scale": scale,
        "softcap": softcap,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
    }
    keys, values = unshard(k, group), unshard(v, group)
    if not causal:
        return flash_attention(q, keys, values, **options)
    size, rank, half = dist.get_world_size(group), dist.get_rank(group), q.shape[1] // 2
    parts = []
    for chunk, rows in ((rank, q[:, :half]), (2 * size - 1 - rank, q[:, half:])):
        seen = (chunk + 1) * half  # causal masks are aligned to the last key
        parts.append(flash_attention(rows, keys[:, :seen], values[:, :seen], causal=True, **options))
    (first, first_lse), (second, second_lse) = parts
    return torch.cat((first, second), 1), torch.cat((first_lse, second_lse), 2)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the whole sequence; keys and values travel from process to process.

    Args:
        q: ``[B, S / P, Hq, D]``, this process's :func:`shard`.
        k, v: ``[B, S / P, Hkv, D]`` and ``[..., Dv]``, likewise.
        group: of P processes; None for all.
        causal, scale, softcap, sinks: as in :func:`kvops.flash_attention`. Windows: :func:`gather_attention`.

    Returns:
        out ``[B, S / P, Hq, Dv]`` and lse ``[B, Hq, S / P]`` of this process's tokens. The gradients of k and v are
        complete; that of sinks is this process's part.

    No process holds more than two shards of keys and values. The next shard travels during attention to the current
    one. Parts are merged in float32 (:func:`kvops.merge_attention`).

    Liu et al. 2023, "Ring Attention with Blockwise Transformers" (arXiv:2310.01889); balanced as in Brandon et al.
    2023, "Striped Attention" (arXiv:2311.09431), by chunks instead of stripes.
    """
    _check(q, k, v)
    out, lse = _Ring.apply(q, k, v, sinks, group, {"scale": scale, "softcap": softcap}, causal)
    return out, lse


def _visible(step: int, rank: int, causal: bool, half: int) -> tuple[slice, slice, bool]:
    """The work for the shard that arrives at ``step``: rows of q, columns of k and v, and whether it is causal.

    A shard from an earlier rank holds a first chunk that all of this process's tokens see and a second one that none
    sees; of a later rank's shard, this process's second chunk sees everything and its first nothing.
    """
    everything = slice(None)
    if step == 0 or not causal:
        return everything, everything, causal
    if step <= rank:
        return everything, slice(0, half), False
    return slice(half, None), everything, False


class _Exchange:
    """Tensors on their way to the next process while those of the previous one arrive."""

    def __init__(self, tensors: list[Tensor], group: dist.ProcessGroup | None) -> None:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        world = _group(group)
        towards = dist.get_global_rank(world, (rank + 1) % size)
        behind = dist.get_global_rank(world, (rank - 1) % size)
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
        options: dict[str, float | None],
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        size, rank, half = dist.get_world_size(group), dist.get_rank(group), q.shape[1] // 2
        held = [k, v]
        out = lse = torch.empty(0)
        for step in range(size):
            exchange = _Exchange(held, group) if step + 1 < size else None
            rows, columns, diagonal = _visible(step, rank, causal, half)
            part, part_lse = flash_attention(
                q[:, rows],
                *(x[:, columns] for x in held),
                causal=diagonal,
                sinks=sinks if step == 0 else None,
                **options,  # type: ignore[arg-type]
            )
            if step == 0:
                out, lse = part.float(), part_lse
            else:
                out[:, rows], lse[:, :, rows] = merge_attention(out[:, rows], lse[:, :, rows], part.float(), part_lse)
            if exchange is not None:
                held = exchange.wait()
        out = out.to(v.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.group, ctx.options, ctx.causal = group, options, causal
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, sinks, out, lse = ctx.saved_tensors
        group = ctx.group
        size, rank, half = dist.get_world_size(group), dist.get_rank(group), q.shape[1] // 2
        dout, dlse = dout.contiguous(), dlse.contiguous()
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        held = [k, v]
        # The gradients of the shard held here. They travel with it, and one more step to its owner.
        gradients = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in held]
        dsinks = None
        for step in range(size):
            exchange = _Exchange(held, group) if step + 1 < size else None
            rows, columns, diagonal = _visible(step, rank, ctx.causal, half)
            keys, values = (x[:, columns] for x in held)
            part_dq, part_dk, part_dv, part_dsinks = flash_attention_backward(
                dout[:, rows],
                q[:, rows],
                keys,
                values,
                out[:, rows],
                lse[:, :, rows],
                causal=diagonal,
                sinks=sinks if step == 0 else None,
                dlse=dlse[:, :, rows],
                **ctx.options,
            )
            if step == 0 and sinks is not None:
                dsinks = part_dsinks
            dq[:, rows] += part_dq
            for gradient, part in zip(gradients, (part_dk, part_dv), strict=True):
                gradient[:, columns] += part
            if size > 1:
                gradients = _Exchange(gradients, group).wait()
            if exchange is not None:
                held = exchange.wait()
        dk, dv = gradients
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None, None, None
