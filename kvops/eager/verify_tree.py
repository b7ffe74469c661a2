"""Verification of trees of drafts on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kvops.eager.philox import ACCEPT, uniform
from kvops.eager.verify import GROUP_ELEMENTS, excess, exponent_scale, race, row_sum, softmax_weights


def verify_tree(
    target_logits: Tensor,
    draft_tokens: Tensor,
    parents: Tensor,
    *,
    draft_probs: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    step: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    B, N, V = target_logits.shape
    path = parents.new_full((B, N), -1)
    tokens = draft_tokens.new_full((B, N), -1)
    num_accepted = parents.new_zeros(B)
    if temperature is None:
        temperature = torch.zeros(B, dtype=torch.float32, device=target_logits.device)
    seed, step = (draft_tokens.new_zeros(B) if value is None else value for value in (seed, step))
    group = max(1, GROUP_ELEMENTS // V)
    for start in range(0, B, group):
        part = slice(start, start + group)
        walk = _Walk(target_logits[part], temperature[part])
        probs = None if draft_probs is None else draft_probs[part]
        walk.run(draft_tokens[part], parents[part], probs, seed[part], step[part])
        path[part], tokens[part], num_accepted[part] = walk.path, walk.tokens, walk.depth.int()
    return path, tokens, num_accepted


class _Walk:
    """Every request's way down its tree. ``weight`` [B, V] of sum ``mass`` is what its node still has to give:
    the target's distribution less what the node's refused children have been offered."""

    def __init__(self, logits: Tensor, temperature: Tensor) -> None:
        B, N, V = logits.shape
        self.logits = logits
        self.sampled = temperature > 0
        self.scale = exponent_scale(temperature)
        self.node = torch.zeros(B, dtype=torch.int64, device=logits.device)
        self.depth = torch.zeros_like(self.node)
        self.argmax = torch.zeros_like(self.node)
        self.usable = torch.zeros_like(self.sampled)
        width = V if bool(self.sampled.any()) else 0
        self.weight = torch.empty(B, width, dtype=torch.float32, device=logits.device)
        self.mass = torch.zeros(B, dtype=torch.float32, device=logits.device)
        self.path = torch.full((B, N), -1, dtype=torch.int32, device=logits.device)
        self.tokens = torch.full((B, N), -1, dtype=torch.int64, device=logits.device)
        self.enter(torch.arange(B, device=logits.device))

    def enter(self, requests: Tensor) -> None:
        """Read the row of logits that these requests have come to."""
        node = self.node[requests]
        self.path[requests, self.depth[requests]] = node.int()
        row = self.logits[requests, node]
        row_max, self.argmax[requests] = row.max(-1)  # of equals the first
        self.usable[requests] = row_max.isfinite()
        some = self.sampled[requests].nonzero()[:, 0]
        if len(some):
            requests = requests[some]
            weight, mass = softmax_weights(row[some, None], row_max[some, None], self.scale[requests])
            self.weight[requests], self.mass[requests] = weight[:, 0], mass[:, 0]

    def run(self, drafts: Tensor, parents: Tensor, probs: Tensor | None, seed: Tensor, step: Tensor) -> None:
        V = self.logits.shape[2]
        for node in range(1, drafts.shape[1]):
            here = (parents[:, node] == self.node) & self.usable & (drafts[:, node] >= 0) & (drafts[:, node] < V)
            requests = here.nonzero()[:, 0]
            if len(requests) == 0:
                continue
            token = drafts[requests, node]
            accepted = token == self.argmax[requests]
            some = self.sampled[requests].nonzero()[:, 0]
            if len(some):
                accepted[some] = self.offer(requests[some], node, token[some], probs, seed, step)
            requests, token = requests[accepted], token[accepted]
            self.tokens[requests, self.depth[requests]] = token
            self.depth[requests] += 1
            self.node[requests] = node
            self.enter(requests)
        following = self.argmax
        some = (self.sampled & self.usable).nonzero()[:, 0]
        if len(some):
            following[some] = race(self.weight[some], self.node[some], seed[some], step[some], following[some])
        following = torch.where(self.usable, following, -1)
        self.tokens.scatter_(1, self.depth[:, None], following[:, None])

    def offer(
        self, requests: Tensor, node: int, token: Tensor, probs: Tensor | None, seed: Tensor, step: Tensor
    ) -> Tensor:
        """Which of the sampled requests take this child; the others take its share out of what is left."""
        position = torch.full_like(requests, node - 1)  # as verify_draft numbers the drafts of a chain
        threshold = uniform(ACCEPT, position, seed[requests], step[requests])
        if probs is not None:
            threshold *= probs[requests, node, token]
        accepted = threshold * self.mass[requests] < self.weight[requests, token]
        refused = ~accepted
        requests, token = requests[refused], token[refused]
        if probs is None:
            self.mass[requests] -= self.weight[requests, token]
            self.weight[requests, token] = 0.0
        else:
            p = self.weight[requests] / self.mass[requests, None]
            q = probs[requests, node]
            residual = excess(p, q)
            self.weight[requests], self.mass[requests] = residual, row_sum(residual)
        return accepted
