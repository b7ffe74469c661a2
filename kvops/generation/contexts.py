"""A context in a full cache, scored by several policies at once; compressed copies of the cache answer probes."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvops.cache import PagedKVCache
from kvops.generation.passes import Decoder, decode, new_cache, prefill, recite
from kvops.ops.attention import flash_attention
from kvops.policies import Compression, Policy, Prefill, Recital, Recited, Seen

# Probes that one pass answers. Their tokens are masked from one another, so the cost is quadratic in this number.
_PROBES_AT_ONCE = 64

Scores = dict[str, list[Tensor]]
"""The scores of each layer, float32 ``[1, Hkv, S]``, by the name of the policy."""


@dataclass(frozen=True, kw_only=True)
class _Watch(Policy):
    """Runs several policies on one prefill. ``keep`` collects their inputs for questions that follow."""

    policies: Mapping[str, Policy]
    scores: Scores
    keep: list[Prefill] | None

    def score(self, seen: Seen) -> Tensor:
        assert isinstance(seen, Prefill)
        for name, policy in self.policies.items():
            self.scores.setdefault(name, []).append(policy.checked_score(seen))
        if self.keep is not None:
            self.keep.append(seen)
        return torch.zeros(1, seen.k.shape[2], seen.k.shape[1], device=seen.k.device)


@dataclass(frozen=True)
class Probe:
    """An answer that should follow a context.

    Attributes:
        task: the name that answers are counted under.
        tail: the tokens after the context, at least one.
        answer: the tokens that should follow ``tail``.
        exact: True counts an answer as right only as a whole; False counts each of its tokens.
    """

    task: str
    tail: Sequence[int]
    answer: Sequence[int]
    exact: bool = True


def _score(policy: Policy, shown: Sequence[Prefill], recited: Sequence[Recited] | None) -> list[Tensor]:
    paid: Sequence[Recited | None] = recited or [None] * len(shown)
    return [policy.checked_score(replace(seen, recited=layer)) for seen, layer in zip(shown, paid, strict=True)]


class Context:
    """A prefix in an uncompressed cache, scored by each policy while it is read, or after it is recited.

    Args:
        model: the decoder.
        prefix: token ids.
        policies: by name.
        room: the most tokens that a question and its answer take beyond the prefix.
        questions: whether questions are read before compression. If so, queries and keys of the whole prefix are kept.

    Attributes:
        cache: the uncompressed cache.
        scores: the scores of each policy.
        recital_cost: for each recital, the time to read and recite the prefix as a multiple of the time to read it.
    """

    def __init__(
        self, model: Decoder, prefix: Sequence[int], policies: Mapping[str, Policy], *, room: int, questions: bool
    ) -> None:
        self.model, self.policies, self.prefix = model, policies, tuple(prefix)
        self.device = model.embedding.weight.device
        self.cache = new_cache(model, max_batch=1, max_tokens=len(prefix) + room)
        # Copies reuse this memory: the page faults of fresh memory would take longer than the copy itself.
        self._copies = torch.empty_like(self.cache.k_cache), torch.empty_like(self.cache.v_cache)
        self.seen: list[Prefill] = []
        self.scores: Scores = {}
        self.recited: dict[Recital, list[Recited]] = {}
        self.recital_cost: dict[Recital, float] = {}
        recitals = {policy.recital for policy in policies.values() if policy.recital is not None}
        at_once = {name: policy for name, policy in policies.items() if policy.recital is None}
        watch = _Watch(policies=at_once, scores=self.scores, keep=self.seen if questions or recitals else None)
        tokens = torch.tensor([self.prefix], device=self.device)
        with torch.no_grad():
            started = time.perf_counter()
            prefill(model, self.cache, tokens, 0, watch)
            reading = time.perf_counter() - started
            for recital in recitals:
                started = time.perf_counter()
                self.recited[recital] = recite(model, self.cache, tokens, 0, recital)
                self.recital_cost[recital] = 1 + (time.perf_counter() - started) / reading
        for name, policy in policies.items():
            if policy.recital is not None:
                self.scores[name] = _score(policy, self.seen, self.recited[policy.recital])
        if not questions:
            self.seen.clear()

    @torch.no_grad()
    def read(self, question: Sequence[int]) -> list[Prefill]:
        """Append ``question`` to the full cache. It attends to the whole cache.

        Returns, for each layer, what a policy would see after one prefill of prefix and question.
        """
        positions = self.cache.extend(len(question))
        shown = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.cache.append(layer, k, v, positions)
            before = self.seen[layer]
            q_all, k_all, v_all = (torch.cat(pair, 1) for pair in ((before.q, q), (before.k, k), (before.v, v)))
            out, lse = flash_attention(q, k_all, v_all, causal=True, **self.model.options(layer))
            shown.append(replace(before, q=q_all, k=k_all, v=v_all, lse=torch.cat((before.lse, lse), -1)))
            return out

        self.model(torch.tensor([list(question)], device=self.device), positions, attend)
        return shown

    @torch.no_grad()
    def judge(self, shown: Sequence[Prefill], question: Sequence[int]) -> Scores:
        """The scores of every policy with the question in the cache.

        The prefix is not recited again: it was recited when it was read, and only the question is recited now.
        """
        start = len(self.prefix)
        tokens = torch.tensor([[*self.prefix, *question]], device=self.device)
        recited = {}
        for recital, before in self.recited.items():
            after = recite(self.model, self.cache, tokens, 0, recital, start=start)
            recited[recital] = [
                Recited(*(torch.cat((old, new[..., start:]), -1) for old, new in zip(*pair, strict=True)))
                for pair in zip(before, after, strict=True)
            ]
        return {
            name: _score(policy, shown, recited[policy.recital] if policy.recital else None)
            for name, policy in self.policies.items()
        }

    def copy(self) -> PagedKVCache:
        """A copy of the cache. It overwrites the copy made before."""
        memo: dict[int, Any] = {}
        for own, other in zip((self.cache.k_cache, self.cache.v_cache), self._copies, strict=True):
            memo[id(own)] = other.copy_(own)
        return copy.deepcopy(self.cache, memo)


@torch.no_grad()
def ask(model: Decoder, cache: PagedKVCache, probes: Sequence[Probe]) -> list[Tensor]:
    """The logits that predict each token of each answer, float32 ``[N, V]``. The cache is not changed.

    Probes are branches of one tree whose root is the first token of all tails. One pass answers up to 64 probes, which
    do not see one another. Raises ValueError for tails that begin with different tokens.
    """
    for probe in probes:
        if probe.tail[0] != probes[0].tail[0]:
            raise ValueError(f"probes: expected tails that begin with the same token, got {probe.tail[0]}")
    parts = (probes[start : start + _PROBES_AT_ONCE] for start in range(0, len(probes), _PROBES_AT_ONCE))
    return [logits for part in parts for logits in _ask_together(model, cache, part)]


def _ask_together(model: Decoder, cache: PagedKVCache, probes: Sequence[Probe]) -> list[Tensor]:
    tokens, parents, ends = [probes[0].tail[0]], [-1], []
    for probe in probes:
        path = [0]
        for token in (*probe.tail[1:], *probe.answer[:-1]):
            parents.append(path[-1])
            path.append(len(tokens))
            tokens.append(token)
        ends.append(path[len(probe.tail) - 1 :])
    device = cache.device
    tree = torch.tensor([parents], dtype=torch.int32, device=device) if len(probes) > 1 else None
    hidden = decode(model, cache, torch.tensor([tokens], device=device), parents=tree)[0]
    cache.rollback(len(tokens))
    return [model.logits(hidden[places]).float() for places in ends]


def compress(cache: PagedKVCache, scores: Sequence[Tensor], policy: Policy, ratio: float, length: int) -> None:
    """Compress a cache of ``length`` tokens once, ``ratio`` times, with the scores that a policy gave before."""
    for layer, layer_scores in enumerate(scores):
        cache.set_scores(layer, layer_scores)
    Compression(ratio=ratio, policy=policy).apply(cache, [length])


def fingerprint(cache: PagedKVCache) -> str:
    """A hash that is equal for caches that keep the same tokens in the same lists."""
    positions = cache.positions[cache.block_tables[:, 0].long()].flatten(-2)  # [layers, heads, slots]
    slot = torch.arange(positions.shape[-1], device=cache.device)
    kept = positions.masked_fill(slot >= cache.seq_lens[:, 0, :, None], -1)
    return hashlib.sha256(kept.cpu().numpy().tobytes()).hexdigest()
