"""Verification of trees of drafts on the CPU: every request walks down its tree and reads the rows that it comes to."""

from typing import NamedTuple

import numpy as np
import torch
from numba import float32, int32, int64, uint8

from kvops.kernels.cpu.arguments import Binding, unpack
from kvops.kernels.cpu.elements import FORMATS, padded
from kvops.kernels.cpu.jit import inner, jit
from kvops.kernels.cpu.threads import run_shares, worth
from kvops.kernels.cpu.vector import address_of
from kvops.kernels.cpu.verification import ACCEPT, exponent_scale, philox, race, read_row, soften, subtract, uniform
from kvops.prepared import prepared


class Call(NamedTuple):
    """The arguments of one call; what is not given has size 0."""

    logits: uint8[:, :, :]  # [B, N, V] bytes
    drafts: int64[:, :]  # [B, N]
    parents: int32[:, :]  # [B, N]
    probs: float32[:, :, :]  # [B, N, V]
    temperature: float32[:]  # [B]
    seed: int64[:]
    step: int64[:]
    path: int32[:, :]  # [B, N]
    tokens: int64[:, :]  # [B, N]
    num_accepted: int32[:]  # [B]
    element: int64
    vocabulary: int64


@inner
def _offer(call, b, child, token, weights, mass, seed, step):
    """Whether the node takes this child, and what its weights sum up to then: a refused child's share goes out of what
    is left."""
    threshold = uniform(philox(0, child - 1, ACCEPT, seed, step)[0])  # as verify_draft numbers the drafts of a chain
    if call.probs.size:
        threshold *= call.probs[b, child, token]
    if threshold * mass < weights[token]:
        return True, mass
    if call.probs.size:
        return False, subtract(weights, np.float32(1) / mass, call.probs[b, child])
    mass -= weights[token]
    weights[token] = 0
    return False, mass


@inner
def _walk(call, b, weights):
    """``weights`` of sum ``mass`` is what the node still has to give: the target's distribution less what the node's
    refused children have been offered."""
    sampled = call.temperature.size > 0 and call.temperature[b] > 0
    scale = exponent_scale(call.temperature[b]) if sampled else np.float32(1)
    seed = call.seed[b] if call.seed.size else 0
    step = call.step[b] if call.step.size else 0
    call.path[b], call.tokens[b] = -1, -1
    node, depth, child, mass = 0, 0, 0, np.float32(0)
    while True:
        call.path[b, depth] = node
        largest, argmax, usable = read_row(address_of(call.logits[b, node]), call.element, weights)
        if not usable:
            break
        if sampled:
            mass = soften(weights, largest, scale)
        taken = False
        while not taken and child + 1 < call.drafts.shape[1]:
            child += 1
            token = call.drafts[b, child]
            if call.parents[b, child] != node or token < 0 or token >= call.vocabulary:
                continue
            if sampled:
                taken, mass = _offer(call, b, child, token, weights, mass, seed, step)
            else:
                taken = token == argmax
        if not taken:
            call.tokens[b, depth] = race(weights, node, seed, step, argmax) if sampled else argmax
            break
        call.tokens[b, depth] = call.drafts[b, child]
        node, depth = child, depth + 1
    call.num_accepted[b] = depth


@inner
def _walk_share(share, shares, call):
    weights = np.empty(padded(call.vocabulary), np.float32)[: call.vocabulary]
    for b in range(share, len(call.tokens), shares):
        _walk(call, b, weights)


@jit
def _verify_tree(addresses, table, threads):
    call = unpack(Call, addresses, table)
    return run_shares(_walk_share, (call,), min(len(call.tokens), worth(threads, 4 * call.logits.size)))


def _bind(
    target_logits: torch.Tensor,
    draft_tokens: torch.Tensor,
    parents: torch.Tensor,
    *,
    draft_probs: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
) -> Binding:
    path, tokens, num_accepted = _results(target_logits)
    return Binding(
        _verify_tree,
        Call,
        logits=target_logits,
        drafts=draft_tokens,
        parents=parents,
        probs=draft_probs,
        temperature=temperature,
        seed=seed,
        step=step,
        path=path,
        tokens=tokens,
        num_accepted=num_accepted,
        element=FORMATS[target_logits.dtype],
        vocabulary=target_logits.shape[2],
    )


def _results(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, nodes, _ = logits.shape
    path, tokens = torch.empty(batch, nodes, dtype=torch.int32), torch.empty(batch, nodes, dtype=torch.int64)
    return path, tokens, torch.empty(batch, dtype=torch.int32)


@prepared(_bind)
def verify_tree(
    binding: Binding,
    target_logits: torch.Tensor,
    draft_tokens: torch.Tensor,
    parents: torch.Tensor,
    *,
    draft_probs: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`kvops.verify_tree`."""
    path, tokens, num_accepted = _results(target_logits)
    binding(target_logits, draft_tokens, parents, draft_probs, temperature, seed, step, path, tokens, num_accepted)
    return path, tokens, num_accepted
