"""The truth of the verification tests: Philox in Python integers, verification one token at a time, chi-square."""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
ACCEPT, RESAMPLE = 0, 1


def philox(counter: tuple[int, int, int, int], seed: int) -> list[int]:
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & _MASK, a >> 32 ^ c3 ^ k1, a & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return [c0, c1, c2, c3]


def uniform(stream: int, position: int, seed: int, step: int, counter: int = 0, lane: int = 0) -> float:
    words = philox((counter, 4 * position + stream, step & _MASK, step >> 32 & _MASK), seed)
    return (words[lane] + 0.5) / 2**32


def softmax(logits: list[float], temperature: float) -> list[float]:
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    return [w / sum(weights) for w in weights]


def race(weights: list[float], position: int, seed: int, step: int) -> int:
    """Groups of 1024 race by their sums, then the winner's entries by their own weights."""

    def fastest(weights: list[float], noise: list[tuple[int, int]]) -> int:
        scores = [
            w / -math.log1p(-uniform(RESAMPLE, position, seed, step, *at)) if w > 0 else -1.0
            for w, at in zip(weights, noise, strict=True)
        ]
        return scores.index(max(scores))

    groups = [weights[i : i + 1024] for i in range(0, len(weights), 1024)]
    best = fastest([math.fsum(group) for group in groups], [(256 + g, 0) for g in range(len(groups))])
    return 1024 * best + fastest(groups[best], [(i % 256, i // 256) for i in range(len(groups[best]))])


def verify(logits, drafts, probs, temperature, seed, step) -> tuple[list[int], int]:
    """One request: logits [T + 1][V], drafts [T], probs [T][V] or None -> the emitted tokens and how many accepted."""
    emitted: list[int] = []
    for t, draft in enumerate([*drafts, -1]):
        if temperature == 0:
            token = logits[t].index(max(logits[t]))
            emitted.append(token)
            if token != draft:
                return emitted, t
            continue
        p = softmax(logits[t], temperature)
        if not 0 <= draft < len(p):
            return [*emitted, race(p, t, seed, step)], t
        q = [float(i == draft) for i in range(len(p))] if probs is None else probs[t]
        if uniform(ACCEPT, t, seed, step) * q[draft] >= p[draft]:
            return [*emitted, race([max(x - y, 0.0) for x, y in zip(p, q, strict=True)], t, seed, step)], t
        emitted.append(draft)
    raise AssertionError("the last row accepts nothing")


def verify_block(logits, drafts, probs, temperature, seed, step) -> tuple[list[int], int]:
    """One sampled request by algorithm 2 of arXiv 2403.10444; the arguments and results of :func:`verify`."""
    V, count = len(logits[0]), 0
    while count < len(drafts) and 0 <= drafts[count] < V:
        count += 1
    p = [softmax(row, temperature) for row in logits[: count + 1]]
    q = [[float(i == d) for i in range(V)] for d in drafts] if probs is None else probs
    path, stop = [1.0], 0
    for i in range(1, count + 1):
        draft = drafts[i - 1]
        path.append(min(path[-1] * p[i - 1][draft] / q[i - 1][draft], 1.0))
        if i == count:
            h = path[i]
        else:
            left = sum(max(path[i] * x - y, 0.0) for x, y in zip(p[i], q[i], strict=True))
            h = left / (left + 1 - path[i]) if left > 0 else 0.0
        if uniform(ACCEPT, i - 1, seed, step) < h:
            stop = i
    weights = p[stop]
    if stop < count:
        weights = [max(path[stop] * x - y, 0.0) for x, y in zip(p[stop], q[stop], strict=True)]
    return [*drafts[:stop], race(weights, stop, seed, step)], stop


def verify_tree(logits, drafts, parents, probs, temperature, seed, step) -> tuple[list[int], list[int]]:
    """One request: logits [N][V], drafts [N], parents [N], probs [N][V] or None -> the path and the tokens."""
    V = len(logits[0])
    path, emitted = [0], []
    while True:
        node = path[-1]
        greedy = logits[node].index(max(logits[node]))
        left = softmax(logits[node], temperature) if temperature else [float(i == greedy) for i in range(V)]
        taken = None
        for child in range(node + 1, len(parents)):
            draft = drafts[child]
            if parents[child] != node or not 0 <= draft < V:
                continue
            q = [float(i == draft) for i in range(V)] if probs is None or not temperature else probs[child]
            u = uniform(ACCEPT, child - 1, seed, step) if temperature else 0.5
            if u * q[draft] < left[draft]:
                taken = child
                break
            if temperature:
                left = [max(r - x, 0.0) for r, x in zip(left, q, strict=True)]
                left = [r / sum(left) for r in left]
        if taken is None:
            return path, [*emitted, race(left, node, seed, step) if temperature else greedy]
        path.append(taken)
        emitted.append(drafts[taken])


def chi_square(outcomes: Tensor, expected: Tensor) -> float:
    """p-value that outcomes (int64 [trials]) are distributed as expected; 0 when an impossible one is among them.

    Cells that expect fewer than 5 counts are pooled.
    """
    trials = outcomes.numel()
    counts = torch.bincount(outcomes, minlength=expected.numel()).double()
    wanted = expected.double() / expected.double().sum() * trials
    if counts[wanted == 0].sum() > 0:
        return 0.0
    rare = wanted < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    wanted = torch.cat((wanted[~rare], wanted[rare].sum()[None]))
    keep = wanted > 0
    statistic = ((counts - wanted)[keep].square() / wanted[keep]).sum()
    freedom = torch.tensor(int(keep.sum()) - 1.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))
