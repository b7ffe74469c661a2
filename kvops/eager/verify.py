"""Draft verification on the CPU."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from kvops.eager.philox import ACCEPT, GROUP_WIDTH, race_exponentials, uniform
from kvops.packed import verify_padded

LOG2_E = math.log2(math.e)
# Partial sums of the softmax run over chunks of this size and then over the chunks, so that a row's sum never depends
# on how many rows there are (torch would split a lone long row among its threads).
_CHUNK = 4096
# Requests are served in groups of about so many logits: the float32 copies stay small and in cache.
GROUP_ELEMENTS = 1 << 24


def lookup_key(matched: Tensor, start: Tensor, lens: Tensor, num_draft: int, width: int) -> Tensor:
    """What ranks the drafts that begin at ``start`` of texts of ``lens`` tokens, in rows of ``width``.

    The longest match wins. Of equals the latest that ``num_draft`` tokens follow does, else the earliest, which most
    tokens follow: a text of one period is drafted over many. :func:`lookup_start` finds ``start`` in a key above 0.
    """
    rank = torch.where(start + num_draft <= lens, width + start, width - start)
    return torch.add(rank, matched, alpha=2 * width)


def lookup_start(key: Tensor, width: int) -> Tensor:
    """Where the draft of a key begins, 0 for key 0; see :func:`lookup_key`."""
    rank = key % (2 * width)
    return torch.where(rank > width, rank - width, width - rank).masked_fill_(key == 0, 0)


def prompt_lookup(
    tokens: Tensor, lens: Tensor, *, num_draft: int, max_ngram: int = 3, min_ngram: int = 1
) -> tuple[Tensor, Tensor]:
    B, L = tokens.shape
    lens = lens.long().clamp(0, L)[:, None]
    if B == 0 or L < 2 or num_draft == 0:
        return tokens.new_full((B, num_draft), -1), lens.new_zeros(B, dtype=torch.int32)
    # Few positions hold the text's last token: only those are compared further back.
    back = torch.arange(min(max_ngram, L - 1), device=tokens.device)
    suffix = tokens.gather(1, (lens - 1 - back).clamp_(min=0))  # the last token first
    end = torch.arange(L - 1, device=tokens.device)
    row, end = ((tokens[:, :-1] == suffix[:, :1]) & (end < lens - 1)).nonzero().unbind(1)
    at = end[:, None] - back
    matched = ((tokens[row[:, None], at.clamp(min=0)] == suffix[row]) & (at >= 0)).cumprod(1).sum(1)
    key = lookup_key(matched, end + 1, lens[row, 0], num_draft, L)
    if min_ngram > 1:
        key.masked_fill_(matched < min_ngram, 0)
    start = lookup_start(lens.new_zeros(B).scatter_reduce_(0, row, key, "amax"), L)[:, None]
    at = start + torch.arange(num_draft, device=tokens.device)
    inside = (start > 0) & (at < lens)
    draft_tokens = tokens.gather(1, at.clamp_(max=L - 1)).masked_fill_(~inside, -1)
    return draft_tokens, inside.sum(1, dtype=torch.int32)


def row_sum(x: Tensor) -> Tensor:
    size = x.shape[-1]
    whole = size // _CHUNK * _CHUNK
    total = x[..., whole:].sum(-1)
    if whole:
        total = total + x[..., :whole].unflatten(-1, (-1, _CHUNK)).sum(-1).sum(-1)
    return total


def excess(p: Tensor, q: Tensor) -> Tensor:
    """max(p - q, 0), and 0 beside a NaN; ``where`` takes several times as long where neither is always larger."""
    return (p - q).clamp_(min=0).nan_to_num_(0.0, posinf=torch.inf)


def exponent_scale(temperature: Tensor) -> Tensor:
    """log2(e) / temperature, kept finite: a temperature near 0 takes the largest logit, inf is uniform."""
    return (LOG2_E / temperature).clamp(1e-30, 1e38)


def softmax_weights(logits: Tensor, row_max: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """exp((logits - max) / temperature) and its sum; logits [n, rows, V], row_max [n, rows], scale [n]."""
    weights = logits.float() - row_max.float()[..., None]
    weights.mul_(scale[:, None, None]).exp2_()
    return weights, row_sum(weights)


def race(weights: Tensor, position: Tensor, seed: Tensor, step: Tensor, fallback: Tensor) -> Tensor:
    """An index drawn from each row of weights [n, V]; ``fallback`` where no weight is positive.

    The smallest of ``exponential / weight`` is distributed like the weights (the exponential race, which is Gumbel-max
    without its second logarithm). Groups of 1024 indices race by their sums and then the winner's indices by their own
    weights: a vocabulary of 49,152 takes 1,072 random numbers and not as many as it has tokens.
    """
    V = weights.shape[-1]
    groups, width = -(-V // GROUP_WIDTH), min(V, GROUP_WIDTH)
    group_exponential, exponential = race_exponentials(position, seed, step, groups, width)
    start = torch.zeros_like(position)[:, None]
    weight = weights
    if groups > 1:
        whole = V // GROUP_WIDTH * GROUP_WIDTH
        mass = weights[:, :whole].unflatten(1, (-1, GROUP_WIDTH)).sum(-1)
        if whole < V:
            mass = torch.cat((mass, weights[:, whole:].sum(-1, keepdim=True)), 1)
        start = torch.where(mass > 0, mass / group_exponential, -1.0).argmax(-1, keepdim=True) * GROUP_WIDTH
        index = start + torch.arange(width, device=weights.device)
        weight = weights.gather(1, index.clamp_max(V - 1)).masked_fill_(index >= V, 0.0)
    score, winner = torch.where(weight > 0, weight / exponential, -1.0).max(-1)  # of equals the first
    return torch.where(score > 0, start[:, 0] + winner, fallback)


def verify_draft(
    target_logits: Tensor,
    draft_tokens: Tensor,
    *,
    draft_lens: Tensor | None = None,
    draft_probs: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    method: str = "token",
) -> tuple[Tensor, Tensor]:
    B, rows, V = target_logits.shape
    given = {
        "draft_lens": draft_lens,
        "draft_probs": draft_probs,
        "temperature": temperature,
        "seed": seed,
        "step": step,
    }
    group = max(1, GROUP_ELEMENTS // max(1, rows * V))
    if 0 < B <= group:
        return _verify_group(target_logits, draft_tokens, method=method, **given)
    tokens = draft_tokens.new_full((B, rows), -1)
    num_accepted = draft_tokens.new_zeros(B, dtype=torch.int32)
    for start in range(0, B, group):
        part = slice(start, start + group)
        own = {name: None if value is None else value[part] for name, value in given.items()}
        tokens[part], num_accepted[part] = _verify_group(target_logits[part], draft_tokens[part], method=method, **own)
    return tokens, num_accepted


verify_draft_varlen = partial(verify_padded, verify_draft)


def _accept_tokens(
    weights: Tensor, total: Tensor, draft: Tensor, offered: Tensor, probs: Tensor | None, threshold: Tensor
) -> tuple[Tensor, Tensor | None]:
    """How many drafts pass one after another, u < p / q; p stands in the residual as it is."""
    T = draft.shape[1]
    if probs is not None:
        threshold = threshold * probs.gather(2, draft[..., None])[..., 0]
    passes = threshold * total[:, :T] < weights[:, :T].gather(2, draft[..., None])[..., 0]
    return (offered & passes).cumprod(1).sum(1), None


def _accept_block(
    weights: Tensor, total: Tensor, draft: Tensor, offered: Tensor, probs: Tensor | None, threshold: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Algorithm 2 of arXiv 2403.10444: how many drafts stand, and the factor of p in the residual behind them."""
    T = draft.shape[1]
    count = offered.cumprod(1).sum(1)
    p = weights[:, :T].gather(2, draft[..., None])[..., 0] / total[:, :T]
    q = None if probs is None else probs.gather(2, draft[..., None])[..., 0]
    path = [torch.ones_like(total[:, 0])]  # the paper's p_0, p_1, ...
    stop = torch.zeros_like(count)
    for t in range(T):
        if q is None:
            path.append(path[t] * p[:, t])
        else:
            path.append(torch.where(p[:, t] > 0, (path[t] * p[:, t] / q[:, t]).clamp_max(1.0), 0.0))
        i = t + 1
        passes = threshold[:, t] < path[i]  # behind the last draft that counts
        if i < T:
            if probs is None:
                left = path[i] * (1.0 - p[:, i])
            else:
                ahead = weights[:, i] / total[:, i, None] * path[i][:, None]
                left = row_sum(excess(ahead, probs[:, i]))
            passes = torch.where(i < count, threshold[:, t] * (left + (1.0 - path[i])) < left, passes)
        stop = torch.where(passes & (i <= count), i, stop)
    return stop, torch.stack(path, 1).gather(1, stop[:, None])[:, 0]


def _verify_group(
    logits: Tensor,
    draft_tokens: Tensor,
    *,
    draft_lens: Tensor | None,
    draft_probs: Tensor | None,
    temperature: Tensor | None,
    seed: Tensor | None,
    step: Tensor | None,
    method: str,
) -> tuple[Tensor, Tensor]:
    B, rows, V = logits.shape
    T = rows - 1
    position = torch.arange(rows, device=logits.device)
    row_max, row_argmax = logits.max(-1)  # of equals the first
    usable = row_max.abs() < torch.inf
    offered = usable[:, :T]
    if draft_lens is not None:
        offered = offered & (position[:T] < draft_lens[:, None])
    num_accepted = (offered & (draft_tokens == row_argmax[:, :T])).cumprod(1).sum(1)
    following = row_argmax.gather(1, num_accepted[:, None])[:, 0]

    sampled = () if temperature is None else (temperature > 0).nonzero()[:, 0]
    if temperature is not None and len(sampled):
        offered = offered & (draft_tokens >= 0) & (draft_tokens < V)
        zero = draft_tokens.new_zeros(len(sampled))
        seed, step = (zero if value is None else value[sampled] for value in (seed, step))
        weights, total = softmax_weights(logits[sampled], row_max[sampled], exponent_scale(temperature[sampled]))
        offered = torch.cat((offered[sampled], offered.new_zeros(len(sampled), 1)), 1)
        draft = torch.cat((draft_tokens[sampled].clamp(0, V - 1), zero[:, None]), 1)
        probs = None if draft_probs is None else draft_probs[sampled]
        row, ratio = zero, None
        if T:
            threshold = uniform(ACCEPT, position[:T], seed[:, None], step[:, None])
            accept = _accept_block if method == "block" else _accept_tokens
            row, ratio = accept(weights, total, draft[:, :T], offered[:, :T], probs, threshold)
        each = torch.arange(len(sampled), device=logits.device)
        weight = weights[each, row]
        # A row behind a draft that was offered and refused has its residual left to draw from.
        refused = offered[each, row].nonzero()[:, 0]
        if len(refused):
            at = row[refused]
            if probs is None:
                weight[refused, draft[refused, at]] = 0.0
            else:
                p = weight.index_select(0, refused).div_(total[refused, at, None])
                if ratio is not None:
                    p *= ratio[refused, None]
                weight.index_copy_(0, refused, excess(p, probs[refused, at]))
        num_accepted[sampled] = row
        following[sampled] = race(weight, row, seed, step, row_argmax[sampled, row])
    following = torch.where(usable.gather(1, num_accepted[:, None])[:, 0], following, -1)
    last = num_accepted[:, None]

    padded = torch.cat((draft_tokens, draft_tokens.new_full((B, 1), -1)), 1)
    tokens = torch.where(position < last, padded, -1).scatter_(1, last, following[:, None])
    return tokens, num_accepted.int()
