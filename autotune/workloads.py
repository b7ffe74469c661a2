"""One call of each kernel family for any of its problems, with which pruner and tuner try configurations.

``small`` shrinks the sizes to what a reference on the CPU can afford and what compiling needs; the key stays.
References are the eager operators on the same inputs in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvops.autotune.config import WINDOW
from kvops.autotune.spec import Problem, Workload
from kvops.eager import attention as eager_attention
from kvops.eager import eviction as eager_eviction
from kvops.eager import paged as eager_paged
from kvops.eager import scores as eager_scores
from kvops.eager import varlen as eager_varlen
from kvops.eager import verify as eager_verify
from kvops.eager import verify_tree as eager_verify_tree

if TYPE_CHECKING:
    from kvops.kernels.flash_backward import Backward

_DTYPES = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32}
_GROUP = 4  # query heads per KV head, as in most models


def _random(*shape: int, itemsize: int, device: str, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(_DTYPES[itemsize])


def _double(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.double().cpu() if tensor.is_floating_point() else tensor.cpu() for tensor in tensors)


def _dense(problem: Problem, device: str, small: bool) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    heads, seqlen_q, seqlen_k = problem["heads"], problem["seqlen_q"], problem["seqlen_k"]
    if small:
        heads, seqlen_q, seqlen_k = min(heads, 4), min(seqlen_q, 256), min(seqlen_k, 256)
    group = _GROUP if heads % _GROUP == 0 else 1
    width, itemsize = problem["width"], problem["itemsize"]
    q = _random(1, seqlen_q, heads, width, itemsize=itemsize, device=device, seed=1)
    k = _random(1, seqlen_k, heads // group, width, itemsize=itemsize, device=device, seed=2)
    v = _random(1, seqlen_k, heads // group, width, itemsize=itemsize, device=device, seed=3)
    options: dict[str, Any] = {"causal": problem["mask"] != 0}
    if problem["mask"] == WINDOW:
        options["window_left"] = 64 if small else 1024
    return (q, k, v), options


def flash_forward(problem: Problem, device: str, small: bool) -> Workload:
    from kvops.kernels.flash_forward import flash_forward as launch

    tensors, options = _dense(problem, device, small)
    return Workload(
        run=lambda: launch(*tensors, **options),
        exact=lambda: eager_attention.flash_attention(*_double(tensors), **options),
    )


def gluon_flash_forward(problem: Problem, device: str, small: bool) -> Workload:
    from kvops.kernels.gluon_flash_forward import gluon_flash_forward as launch

    tensors, options = _dense(problem, device, small)
    return Workload(
        run=lambda: launch(*tensors, **options),
        exact=lambda: eager_attention.flash_attention(*_double(tensors), **options),
    )


def gluon_flash_forward_varlen(problem: Problem, device: str, small: bool) -> Workload:
    """The dense problem as one sequence for timing, comparable with the twin; three sequences of different lengths for
    the check against the reference."""
    from kvops.kernels.gluon_flash_forward import gluon_flash_forward_varlen as launch

    (q, k, v), options = _dense(problem, device, small)
    lengths = []
    for tensor in (q, k):
        longest = tensor.shape[1]
        cuts = [0, longest // 5, longest // 5 + longest // 3, longest] if small else [0, longest]
        lengths.append(torch.tensor(cuts, dtype=torch.int32, device=device))
    tensors = q[0], k[0], v[0], *lengths

    def on(function: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return function(*tensors, q.shape[1], k.shape[1], **options)

    return Workload(
        run=lambda: on(launch, tensors),
        exact=lambda: on(eager_varlen.flash_attention_varlen, _double(tensors)),
    )


def _backward(
    problem: Problem, device: str, small: bool
) -> tuple[Callable[[], Backward], Callable[[], tuple[Tensor, ...]]]:
    """The inputs of both kernels, prepared by the first call, and the gradients (dq, dk, dv) in float64."""
    (q, k, v), options = _dense(problem, device, small)
    dout = _random(*q.shape, itemsize=problem["itemsize"], device=device, seed=4)
    if device == "cpu":
        out, lse = eager_attention.flash_attention(q, k, v, **options)[:2]
    else:
        from kvops.kernels.flash_forward import flash_forward as forward

        out, lse = forward(q, k, v, **options)
    tensors = dout, q, k, v, out, lse

    @cache
    def prepared() -> Backward:
        from kvops.kernels.flash_backward import prepare

        window = options["causal"], options.get("window_left", -1), -1
        return prepare(*tensors, None, None, q.shape[0], q.shape[1], k.shape[1], *window, None, 0.0, None, None)

    return prepared, lambda: eager_attention.flash_attention_backward(*_double(tensors), **options)[:3]


def flash_backward_keys(problem: Problem, device: str, small: bool) -> Workload:
    """The kernel for dK and dV, or its twin."""
    from kvops.kernels.flash_backward_launch import launch_keys

    prepared, exact = _backward(problem, device, small)

    def run() -> tuple[Tensor, ...]:
        call = prepared()
        gradients = torch.empty_like(call.k), torch.empty_like(call.v)
        launch_keys(call, *gradients)
        return gradients

    return Workload(run, exact=lambda: exact()[1:])


def flash_backward_queries(problem: Problem, device: str, small: bool) -> Workload:
    """The kernel for dQ, or its twin."""
    from kvops.kernels.flash_backward_launch import launch_queries

    prepared, exact = _backward(problem, device, small)

    def run() -> tuple[Tensor, ...]:
        call = prepared()
        gradient = torch.empty_like(call.q)
        launch_queries(call, gradient)
        return (gradient,)

    return Workload(run, exact=lambda: exact()[:1])


def attention_scores(problem: Problem, device: str, small: bool) -> Workload:
    from kvops.kernels.attention_scores import attention_scores as launch

    (q, k, _), options = _dense(problem, device, small)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), 3.0, device=device)
    return Workload(
        run=lambda: (launch(q, k, lse, **options),),
        exact=lambda: (eager_scores.attention_scores(*_double((q, k, lse)), **options),),
    )


def _cache(problem: Problem, device: str, small: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """K and V pools, tables and ragged lengths (half to all of the capacity), and the number of lists."""
    lists, capacity, size = problem["lists"], problem["capacity"], problem["block_size"]
    if small:
        lists, capacity = min(lists, 16), min(capacity, 32 * size)
    blocks = capacity // size
    shape = lists * blocks, size, problem["width"]
    k = _random(*shape, itemsize=problem["cache_itemsize"], device=device, seed=1)
    v = _random(*shape, itemsize=problem["cache_itemsize"], device=device, seed=2)
    generator = torch.Generator(device).manual_seed(3)
    tables = torch.randperm(lists * blocks, generator=generator, device=device).to(torch.int32)
    lens = torch.linspace(capacity / 2, capacity, lists, device=device).to(torch.int32)
    heads = 8 if lists % 8 == 0 else 1
    return k, v, tables.view(lists // heads, heads, blocks), lens.view(lists // heads, heads), heads


def paged_attention(problem: Problem, device: str, small: bool) -> Workload:
    from kvops.kernels.paged_attention import paged_attention as launch

    k, v, tables, lens, heads = _cache(problem, device, small)
    rows = problem["rows"]
    group = rows if rows < 2 * _GROUP else _GROUP
    q = _random(
        lens.shape[0],
        max(1, rows // group),
        group * heads,
        problem["width"],
        itemsize=problem["itemsize"],
        device=device,
        seed=4,
    )
    return Workload(
        run=lambda: launch(q, k, v, tables, lens),
        exact=lambda: eager_paged.paged_attention(*_double((q, k, v, tables, lens))),
    )


def paged_latent_attention(problem: Problem, device: str, small: bool) -> Workload:
    from kvops.kernels.paged_latent_attention import paged_latent_attention as launch

    width, itemsize, rows = problem["width"], problem["itemsize"], problem["rows"]
    wide = {**problem, "width": width + 64, "cache_itemsize": itemsize}
    cache, _, tables, lens, _ = _cache(wide, device, small)
    lists = tables.view(-1, 1, tables.shape[-1]), lens.view(-1, 1)  # one list a sequence
    heads = min(rows, 128)
    shape = lens.numel(), max(1, rows // heads), heads, width + 64
    q = _random(*shape, itemsize=itemsize, device=device, seed=4)
    options: dict[str, Any] = {"value_dim": width, "scale": 192**-0.5}
    return Workload(
        run=lambda: launch(q, cache, *lists, **options),
        exact=lambda: eager_paged.paged_latent_attention(*_double((q, cache, *lists)), **options),
    )


def paged_append(problem: Problem, device: str, small: bool) -> Workload:
    from kvops.kernels.paged_append import paged_append as launch

    tokens = min(problem["tokens"], 64) if small else problem["tokens"]
    cache = {
        **problem,
        "capacity": max(64, tokens + -tokens % 16),
        "block_size": 16,
        "cache_itemsize": problem["itemsize"],
    }
    k, v, tables, lens, heads = _cache(cache, device, small)
    lens = lens.fill_(tokens)  # lengths include the new tokens
    new_k, new_v = (
        _random(lens.shape[0], tokens, heads, problem["width"], itemsize=problem["itemsize"], device=device, seed=seed)
        for seed in (4, 5)
    )

    def run() -> tuple[Tensor, ...]:
        launch(new_k, new_v, k, v, tables, lens)
        return k, v

    def exact() -> tuple[Tensor, ...]:
        copied_k, copied_v = k.cpu().clone(), v.cpu().clone()
        eager_paged.paged_append(new_k.cpu(), new_v.cpu(), copied_k, copied_v, tables.cpu(), lens.cpu())
        return copied_k, copied_v

    return Workload(run, exact)


def select_blocks(problem: Problem, device: str, small: bool) -> Workload:
    from kvops.kernels.select_blocks import select_blocks as launch

    cache = {**problem, "capacity": problem["slots"], "block_size": 16, "cache_itemsize": 4, "width": 1}
    scores, _, tables, lens, _ = _cache(cache, device, small)
    scores = scores[..., 0]
    budget = lens.sum(1, dtype=torch.int32) // 64
    options: dict[str, Any] = {"protect_first": 4, "protect_last": 32, "scope": "sequence"}
    return Workload(
        run=lambda: launch(scores, tables, lens, budget, **options),
        exact=lambda: eager_eviction.select_blocks(*_on_cpu(scores, tables, lens, budget), **options),
    )


def _on_cpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.cpu() for tensor in tensors)


def compact(problem: Problem, device: str, small: bool) -> Workload:
    from kvops.kernels.compact import compact as launch

    cache = {**problem, "capacity": problem["slots"], "block_size": 16, "cache_itemsize": problem["itemsize"]}
    k, v, tables, lens, _ = _cache(cache, device, small)
    keep = _random(*lens.shape, tables.shape[-1] * 16, itemsize=4, device=device, seed=5) > 0.5

    def on(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """On copies, since the operator works in place and calls must be equal. Every candidate pays for the copies."""
        k, v, tables, lens, keep = (tensor.clone() for tensor in tensors)
        freed = function(k, v, tables, lens, keep)
        slot = torch.arange(keep.shape[-1], device=lens.device)
        used = (slot < lens[..., None]).view(*tables.shape, 16)
        kept = [torch.where(used[..., None], side[tables.long()].float(), 0.0) for side in (k, v)]
        return freed, lens, *kept

    tensors = k, v, tables, lens, keep
    return Workload(run=lambda: on(launch, tensors), exact=lambda: on(eager_eviction.compact, _on_cpu(*tensors)))


def verify(problem: Problem, device: str, small: bool) -> Workload:
    from kvops.kernels.verify_draft import verify_draft as launch_draft
    from kvops.kernels.verify_tree import verify_tree as launch_tree

    batch = 2 if small else 16
    logits = _random(batch, 6, problem["vocab"], itemsize=problem["itemsize"], device=device, seed=1)
    drafts = logits[:, :-1].argmax(-1)
    # A chain with one sibling: the second draft is offered after the first is refused.
    parents = torch.tensor([-1, 0, 0, 1, 3, 4], dtype=torch.int32, device=device).expand(batch, -1).contiguous()
    nodes = torch.cat([drafts[:, :1], drafts], 1)
    seed = torch.arange(batch, device=device)
    temperature = torch.full((batch,), 0.7, device=device)

    def on(draft: Callable[..., Any], tree: Callable[..., Any], move: Callable[..., Any]) -> tuple[Tensor, ...]:
        arguments = move(logits, drafts, nodes, parents, temperature, seed)
        logits_, drafts_, nodes_, parents_, temperature_, seed_ = arguments
        options = {"temperature": temperature_, "seed": seed_, "step": seed_}
        tokens, accepted = draft(logits_, drafts_, **options)
        path, tree_tokens, tree_accepted = tree(logits_, nodes_, parents_, **options)
        columns = torch.arange(6, device=tokens.device)
        return (
            tokens.masked_fill(columns > accepted[:, None], -1),
            accepted,
            path.masked_fill(columns > tree_accepted[:, None], -1),
            tree_tokens.masked_fill(columns > tree_accepted[:, None], -1),
            tree_accepted,
        )

    return Workload(
        run=lambda: on(launch_draft, launch_tree, lambda *tensors: tensors),
        exact=lambda: on(eager_verify.verify_draft, eager_verify_tree.verify_tree, _on_cpu),
    )


def prompt_lookup(problem: Problem, device: str, small: bool) -> Workload:
    from kvops.kernels.prompt_lookup import prompt_lookup as launch

    batch = 2 if small else 16
    generator = torch.Generator(device).manual_seed(1)
    tokens = torch.randint(0, 50, (batch, problem["length"]), generator=generator, device=device)
    lens = torch.full((batch,), problem["length"], dtype=torch.int32, device=device)

    def on(function: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor) -> tuple[Tensor, ...]:
        draft, count = function(*tensors, num_draft=8)
        return draft.masked_fill(torch.arange(8, device=draft.device) >= count[:, None], -1), count

    return Workload(
        run=lambda: on(launch, tokens, lens),
        exact=lambda: on(eager_verify.prompt_lookup, *_on_cpu(tokens, lens)),
    )
