"""One context in a full cache, and what every policy makes of it: compressed copies that answer probes."""

from __future__ import annotations

import copy
import hashlib
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.quality.tasks import TEXT, Probe, Unit
from kvops.cache import PagedKVCache
from kvops.generation.passes import decode, new_cache, prefill, recite
from kvops.models.llama import Llama
from kvops.ops.attention import flash_attention
from kvops.policies import Compression, Policy, Prefill, Recital, Recited

_TIMED_STEPS = 7

Scores = dict[str, list[Tensor]]
"""By policy, of every layer: float32 ``[1, Hkv, S]``."""


@dataclass(frozen=True, kw_only=True)
class _Watch(Policy):
    """Lets several policies judge the same prefill; ``keep`` takes what they were shown, for questions yet to come."""

    policies: Mapping[str, Policy]
    scores: Scores
    keep: list[Prefill] | None

    def score(self, seen: Prefill) -> Tensor:
        for name, policy in self.policies.items():
            self.scores.setdefault(name, []).append(policy.score(seen))
        if self.keep is not None:
            self.keep.append(seen)
        return torch.zeros(1, seen.k.shape[2], seen.k.shape[1], device=seen.k.device)


def _score(policy: Policy, shown: Sequence[Prefill], recited: Sequence[Recited] | None) -> list[Tensor]:
    known = recited or [None] * len(shown)
    return [policy.score(replace(seen, recited=found)) for seen, found in zip(shown, known, strict=True)]


class Context:
    """A prefix in a cache, uncompressed, scored by every policy in the one pass that read it, or once it was recited.

    ``room``: tokens that questions and answers take beyond it; ``questions``: whether some are read before compression,
    for which queries and keys of the whole prefix are kept. ``recital_cost`` is how many times as long it took to read
    and recite it as to read it, for each way of reciting.
    """

    def __init__(
        self, model: Llama, prefix: Sequence[int], policies: Mapping[str, Policy], *, room: int, questions: bool
    ) -> None:
        self.model, self.policies, self.prefix = model, policies, tuple(prefix)
        self.device = model.embedding.weight.device
        self.cache = new_cache(model, max_batch=1, max_tokens=len(prefix) + room)
        # Copies are made into the same memory again and again: fresh pages would take longer than the copying.
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
        """Append ``question`` to the full cache, attending to all of it; the layers as one prefill would show them."""
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
        """With the question in the cache. The prefix is not recited again: as if the two had been read one by one, each
        recited right behind."""
        start = len(self.prefix)
        tokens = torch.tensor([[*self.prefix, *question]], device=self.device)
        recited = {}
        for recital, before in self.recited.items():
            found = recite(self.model, self.cache, tokens, 0, recital, start=start)
            recited[recital] = [
                Recited(*(torch.cat((old, new[..., start:]), -1) for old, new in zip(*pair, strict=True)))
                for pair in zip(before, found, strict=True)
            ]
        return {
            name: _score(policy, shown, recited[policy.recital] if policy.recital else None)
            for name, policy in self.policies.items()
        }

    def copy(self) -> PagedKVCache:
        """The cache once more; the last copy is overwritten."""
        memo: dict[int, Any] = {}
        for own, other in zip((self.cache.k_cache, self.cache.v_cache), self._copies, strict=True):
            memo[id(own)] = other.copy_(own)
        return copy.deepcopy(self.cache, memo)


@torch.no_grad()
def ask(model: Llama, cache: PagedKVCache, probes: Sequence[Probe]) -> list[Tensor]:
    """The logits that predict each token of each answer, float32 ``[N, V]``; the cache is left as it was.

    All probes are branches of one tree, which begins with the token that their tails have in common: one pass answers
    them all, and none of them sees another.
    """
    tokens, parents, ends = [probes[0].tail[0]], [-1], []
    for probe in probes:
        if probe.tail[0] != tokens[0]:
            raise ValueError(f"probes: expected tails that begin with the same token, got {probe.tail[0]}")
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


class Full:
    """What the full cache says about a unit: all else is held against that.

    ``row`` has its figures; ``asked`` are the probes that it answers right, at least in part, and with each the tokens
    that it gets right. What the full cache does not know, no compressed one can be blamed for.
    """

    def __init__(self, model: Llama, unit: Unit, cache: PagedKVCache) -> None:
        self.unit = unit
        blocks = cache.blocks_for(unit.length)  # those of questions taken back stay with the cache
        self.row: dict[str, Any] = {"policy": "full", "scope": "", "ratio": 1, "blocks": blocks}
        logits = ask(model, cache, unit.probes)
        if unit.setting == TEXT:
            self.logits = logits[0]
            self.row |= _agreement(unit.probes[0], self.logits, self.logits)
            return
        hits = [_hits(probe, predicted) for probe, predicted in zip(unit.probes, logits, strict=True)]
        self.asked = [(probe, hit) for probe, hit in zip(unit.probes, hits, strict=True) if any(hit)]
        self.row["right"] = _by_task(zip(unit.probes, hits, strict=True))

    @property
    def knows(self) -> bool:
        return self.unit.setting == TEXT or bool(self.asked)

    def measure(self, model: Llama, cache: PagedKVCache) -> dict[str, Any]:
        """The figures of a compressed cache. ``right``: of the answers that the full cache gets right."""
        if self.unit.setting == TEXT:
            probe = self.unit.probes[0]
            return _agreement(probe, ask(model, cache, [probe])[0], self.logits)
        answers = []
        for (probe, full), predicted in zip(
            self.asked, ask(model, cache, [probe for probe, _ in self.asked]), strict=True
        ):
            hits = _hits(probe, predicted)
            answers.append((probe, [hit for hit, known in zip(hits, full, strict=True) if known]))
        return {"right": _by_task(answers)}


def _hits(probe: Probe, logits: Tensor) -> list[int]:
    """1 and 0: whether greedy decoding gives the answer, or each token of it after those before it."""
    hits = logits.argmax(-1).cpu() == torch.tensor(list(probe.answer))
    return [int(hits.all())] if probe.exact else hits.int().tolist()


def _by_task(answers: Iterable[tuple[Probe, list[int]]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for probe, hits in answers:
        found.setdefault(probe.task, []).extend(hits)
    return found


def compress(cache: PagedKVCache, scores: Sequence[Tensor], policy: Policy, ratio: float, length: int) -> None:
    for layer, layer_scores in enumerate(scores):
        cache.set_scores(layer, layer_scores)
    Compression(ratio=ratio, policy=policy).apply(cache, [length])


def fingerprint(cache: PagedKVCache) -> str:
    """The same for two caches that keep the same tokens in the same lists."""
    positions = cache.positions[cache.block_tables[:, 0].long()].flatten(-2)  # [layers, heads, slots]
    slot = torch.arange(positions.shape[-1], device=cache.device)
    kept = positions.masked_fill(slot >= cache.seq_lens[:, 0, :, None], -1)
    return hashlib.sha256(kept.cpu().numpy().tobytes()).hexdigest()


@torch.no_grad()
def step_ms(model: Llama, caches: Mapping[str, PagedKVCache]) -> dict[str, float]:
    """Milliseconds of decoding one token from each cache, medians of a few, taken in turn and back again."""
    gpu = next(iter(caches.values())).device.type == "cuda"
    samples: dict[str, list[float]] = {name: [] for name in caches}
    for turn in range(-1, _TIMED_STEPS):
        for name, cache in caches.items():
            token = torch.zeros(1, 1, dtype=torch.int64, device=cache.device)
            started = time.perf_counter()
            model.logits(decode(model, cache, token))
            if gpu:
                torch.cuda.synchronize(cache.device)
            if turn >= 0:
                samples[name].append(1e3 * (time.perf_counter() - started))
            cache.rollback(1)
    return {name: statistics.median(times) for name, times in samples.items()}


def _agreement(probe: Probe, logits: Tensor, full: Tensor) -> dict[str, Any]:
    """Mean negative log-likelihood (nats) of the held-out text, divergence from the full cache, top-1 in common."""
    answer = torch.tensor(list(probe.answer), device=logits.device)
    ours, theirs = logits.log_softmax(-1), full.log_softmax(-1)
    return {
        "nll": float(F.nll_loss(ours, answer)),
        "kl": float(F.kl_div(ours, theirs, log_target=True, reduction="batchmean")),
        "top1": float((logits.argmax(-1) == full.argmax(-1)).float().mean()),
    }
