"""Speculative decoding: drafters, drafts, their verification, and the removal of refused drafts from caches.

A drafter proposes a chain or a tree of tokens for each request. One pass of the model verifies all of them. The emitted
tokens have the same distribution as without drafts (:func:`kvops.verify_draft`, :func:`kvops.verify_tree`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from kvops.cache import PagedKVCache
from kvops.generation.options import GenerationOptions
from kvops.generation.passes import Decoder, decode, is_decoder, new_cache, prefill
from kvops.generation.sampler import Sampler
from kvops.ops.verify import lookup_key, lookup_start, prompt_lookup, verify_draft
from kvops.ops.verify_tree import verify_tree


@dataclass(frozen=True)
class Drafts:
    """The drafts that one pass verifies, for a batch of B requests.

    Attributes:
        tokens: int64 ``[B, T]``, padded with -1.
        lens: int32 ``[B]``, the number of drafted tokens in each row.
        probs: float32 ``[B, T, V]``, the distributions that the tokens were sampled from; None for point masses.
        parents: int32 ``[B, T + 1]`` for trees, as in :func:`kvops.verify_tree`: node 0 is the root (the last token of
            the text) and node n + 1 is ``tokens[:, n]``. None for chains.
    """

    tokens: Tensor
    lens: Tensor
    probs: Tensor | None = None
    parents: Tensor | None = None


@dataclass(frozen=True)
class Verdict:
    """The result of a verification.

    ``tokens`` int64 ``[B, T + 1]`` are emitted (padded with -1); ``accepted`` int32 ``[B]`` of them are drafts. For
    trees, ``path`` int32 ``[B, T + 1]`` has the accepted nodes, the root first (padded with -1).
    """

    tokens: Tensor
    accepted: Tensor
    path: Tensor | None = None


def verify(
    drafts: Drafts, logits: Tensor, text: Tensor, lens: Tensor, sampler: Sampler, method: Literal["token", "block"]
) -> Verdict:
    """Verify drafts after ``text`` (int64 [B, L] of ``lens`` [B] tokens) with the model's logits [B, T + 1, V]."""
    arguments = sampler.arguments()
    step = lens.long()  # no two calls of a request share it
    if drafts.parents is None:
        logits = sampler.process(logits, text, drafts.tokens)
        tokens, accepted = verify_draft(
            logits,
            drafts.tokens,
            draft_lens=drafts.lens,
            draft_probs=drafts.probs if arguments else None,
            step=step,
            method=method,
            **arguments,
        )
        return Verdict(tokens, accepted)
    nodes = torch.nn.functional.pad(drafts.tokens, (1, 0), value=-1)
    logits = sampler.process(logits, text, nodes, drafts.parents)
    path, tokens, accepted = verify_tree(logits, nodes, drafts.parents, step=step, **arguments)
    return Verdict(tokens, accepted, path)


def keep_accepted(cache: PagedKVCache, drafts: Drafts, verdict: Verdict, running: Tensor) -> None:
    """Remove the refused drafts from the cache, which holds all drafts. ``running`` int32 [B] is 1 for rows in use."""
    if verdict.path is None:
        cache.rollback((drafts.lens - verdict.accepted) * running)
    else:
        cache.retain(on_path(verdict.path), q_lens=(drafts.lens + 1) * running)


def on_path(path: Tensor) -> Tensor:
    """The nodes of a path int32 [B, N], as a mask bool [B, N]."""
    return (path[:, None] == torch.arange(path.shape[1], device=path.device)[:, None]).any(2)


class Pace:
    """The length of the next draft of a request, from the results of its earlier drafts.

    A draft may be about twice as long as the last accepted one; the first is short. Even one refused token costs time,
    so refusals in a row are followed by 1, 3 and then 7 passes without a draft. Text that cannot be predicted is then
    decoded at almost the speed without drafts.
    """

    def __init__(self, most: int) -> None:
        self.most, self.limit = most, min(3, most)
        self.refusals = self.wait = 0

    def ahead(self) -> int:
        return 0 if self.wait else self.limit

    def learn(self, drafted: int, accepted: int) -> None:
        """Record the result of a pass; ``drafted`` is 0 for a pass without drafts."""
        if drafted:
            self.limit = min(2 * accepted + 1, self.most)
            self.refusals = 0 if accepted else self.refusals + 1
            self.wait = (1 << min(max(self.refusals - 1, 0), 3)) - 1
        elif self.wait:
            self.wait -= 1


class Drafter(Protocol):
    """Proposes the next tokens. ``room`` is the most tokens that it proposes for a request."""

    room: int

    def begin(self, row: int, prompt: Tensor) -> None:
        """A request of prompt int64 [1, S] starts in ``row``."""

    def propose(self, text: Tensor, lens: Tensor, running: Tensor, wanted: Sequence[int]) -> Drafts:
        """Draft at most ``wanted[b]`` positions after the first ``lens[b]`` (int32) tokens of ``text[b]`` (int64
        [B, L], padded with -1). Rows where ``running`` (int32) is 0 get no draft."""

    def settle(self, verdict: Verdict) -> None:
        """Take the verdict on the latest proposal."""

    def end(self, row: int) -> None:
        """The request in ``row`` has ended."""


class LookupDrafter:
    """Drafts the tokens that followed earlier occurrences of the last tokens (:func:`kvops.prompt_lookup`).

    With a ``width`` above 1 the branches of a tree are the ``width`` best occurrences with different next tokens.
    """

    def __init__(self, num_draft: int, width: int, *, min_ngram: int, max_ngram: int) -> None:
        self.num_draft, self.width, self.min_ngram, self.max_ngram = num_draft, width, min_ngram, max_ngram
        self.room = num_draft * width

    def begin(self, row: int, prompt: Tensor) -> None:
        pass

    def propose(self, text: Tensor, lens: Tensor, running: Tensor, wanted: Sequence[int]) -> Drafts:
        limit = torch.tensor(wanted, dtype=torch.int32, device=text.device)
        if self.width == 1:
            tokens, draft_lens = prompt_lookup(
                text, lens, num_draft=self.num_draft, min_ngram=self.min_ngram, max_ngram=self.max_ngram
            )
            drafts = Drafts(tokens, torch.minimum(draft_lens, limit))
        else:
            drafts = self._branches(text, lens, limit)
        if text.device.type != "cpu":  # on a GPU every step has the same shape
            return drafts
        longest = int(drafts.lens.max())  # no synchronisation on the CPU
        parents = None if drafts.parents is None else drafts.parents[:, : longest + 1]
        return Drafts(drafts.tokens[:, :longest], drafts.lens, None, parents)

    def settle(self, verdict: Verdict) -> None:
        pass

    def end(self, row: int) -> None:
        pass

    def _branches(self, text: Tensor, lens: Tensor, limit: Tensor) -> Drafts:
        B, L = text.shape
        T, device = self.num_draft, text.device
        end, start = lens.long()[:, None], torch.arange(L, device=device)
        matched = torch.zeros((B, L), dtype=torch.int64, device=device)
        running = start < end
        for back in range(1, self.max_ngram + 1):
            suffix = text.gather(1, (end - back).clamp_min(0))
            running = running & (start >= back) & (end >= back) & (text.roll(back, 1) == suffix)
            matched += running
        key = lookup_key(matched, start, end, T, L).masked_fill_(matched < self.min_ngram, 0)
        chains, real = [], []
        for _ in range(self.width):
            best = key.amax(1, keepdim=True)
            first = lookup_start(best, L)
            at = first + torch.arange(T, device=device)
            chains.append(text.gather(1, at.clamp_max(L - 1)))
            real.append((best > 0) & (at < torch.minimum(end, first + limit[:, None])))
            key = key.masked_fill(text == chains[-1][:, :1], 0)
        tokens, there = torch.cat(chains, 1), torch.cat(real, 1)
        # The real nodes come first, in their order; a node's parent is the one before it, or the root.
        order = there.long().argsort(dim=1, descending=True, stable=True)
        tokens = tokens.masked_fill(~there, -1).gather(1, order)
        parents = torch.where(order % T == 0, 0, torch.arange(self.room, device=device))
        parents = parents.masked_fill(~there.gather(1, order), -1)
        parents = torch.nn.functional.pad(parents, (1, 0), value=-1).int()
        return Drafts(tokens, there.sum(1, dtype=torch.int32), None, parents)


class ModelDrafter:
    """A smaller model of the same vocabulary, with a cache of its own.

    A chain is sampled token by token with the request's temperature and filters. With a ``width`` above 1 the draft is
    a tree of at most ``width`` nodes at each position, those of the highest joint probability. They are chosen and not
    sampled, so they are verified as point masses.
    """

    def __init__(
        self, model: Decoder, sampler: Sampler, num_draft: int, width: int, *, max_batch: int, max_tokens: int
    ) -> None:
        self.model, self.sampler, self.num_draft, self.width = model, sampler, num_draft, width
        self.room = num_draft * width
        self.cache = new_cache(model, max_batch=max_batch, max_tokens=max_tokens + self.room)
        self._cached = torch.empty(0)  # int32 [B]: tokens of the latest proposal in the cache

    def begin(self, row: int, prompt: Tensor) -> None:
        prefill(self.model, self.cache, prompt, row)

    def end(self, row: int) -> None:
        self.cache.free(slice(row, row + 1))

    def propose(self, text: Tensor, lens: Tensor, running: Tensor, wanted: Sequence[int]) -> Drafts:
        limit = torch.tensor(wanted, dtype=torch.int32, device=text.device)
        hidden = self._catch_up(text, lens, running)
        draft = self._chain if self.width == 1 else self._tree
        return draft(hidden, text, lens, limit, max(wanted))

    def settle(self, verdict: Verdict) -> None:
        """Remove refused tokens from the drafting model's cache."""
        if verdict.path is None:
            self.cache.rollback((self._cached - verdict.accepted).clamp_min(0))
        else:
            self.cache.retain(on_path(verdict.path)[:, 1:], q_lens=self._cached)

    def _catch_up(self, text: Tensor, lens: Tensor, running: Tensor) -> Tensor:
        """Run the tokens that are not in the cache yet: the last one, and the one before if the whole draft was
        accepted, because a draft's last token is never run. Returns the last token's hidden state, [B, 1, hidden]."""
        behind = (lens - self.cache.next_positions[: len(lens)]) * running
        width = int(behind.max()) if text.device.type == "cpu" else 2
        at = (lens - behind)[:, None].long() + torch.arange(width, device=text.device)
        tokens = text.gather(1, at.clamp_(0, text.shape[1] - 1)).clamp_min_(0)
        hidden = decode(self.model, self.cache, tokens, q_lens=behind)
        last = (behind - 1).clamp_min(0).long()[:, None, None]
        return hidden.gather(1, last.expand(-1, 1, hidden.shape[2]))

    def _chain(self, root: Tensor, text: Tensor, lens: Tensor, limit: Tensor, count: int) -> Drafts:
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        hidden = root
        text = text.clone() if self.sampler.needs_text else text
        for t in range(count):
            if t:
                hidden = decode(self.model, self.cache, tokens[-1].clamp_min(0)[:, None], q_lens=(limit > t).int())
            logits = self.sampler.process(self.model.logits(hidden), text)
            # A position that is drafted again gets other noise.
            tokens.append(self.sampler.draw_draft(logits, lens.long() + (t << 32)))
            if self.sampler.temperature is not None:
                probs.append(self.sampler.probabilities(logits))
            if self.sampler.needs_text:
                text.scatter_(1, (lens + t).long()[:, None].clamp_max(text.shape[1] - 1), tokens[-1][:, None])
        self._cached = (limit - 1).clamp_min(0)
        chain = torch.stack(tokens, 1) if tokens else text[:, :0]
        return Drafts(chain, limit, torch.cat(probs, 1) if probs else None)

    def _tree(self, root: Tensor, text: Tensor, lens: Tensor, limit: Tensor, count: int) -> Drafts:
        B, W, device = len(lens), self.width, text.device
        tokens = torch.empty((B, 0), dtype=torch.int64, device=device)
        parents = torch.full((B, 1), -1, dtype=torch.int32, device=device)
        joint = torch.zeros((B, 1), dtype=torch.float32, device=device)
        hidden, self._cached = root, torch.zeros_like(limit)
        for t in range(count):
            if t:
                # All nodes run again with each level: the mask of a pass covers only the tokens of that pass.
                self.cache.rollback(self._cached)
                self._cached = W * limit.clamp_max(t)
                below = decode(self.model, self.cache, tokens, q_lens=self._cached, parents=parents[:, 1:] - 1)
                hidden = torch.cat((root, below), 1)
            frontier = joint.shape[1]
            rows = hidden if self.sampler.needs_text else hidden[:, -frontier:]
            nodes = torch.nn.functional.pad(tokens, (1, 0), value=-1)
            logits = self.sampler.process(self.model.logits(rows), text, nodes, parents)[:, -frontier:]
            share, candidate = torch.log_softmax(logits.float(), -1).topk(W)  # [B, frontier, W]
            joint, pick = (joint[..., None] + share).flatten(1).topk(W)
            first = parents.shape[1] - frontier
            tokens = torch.cat((tokens, candidate.flatten(1).gather(1, pick)), 1)
            parents = torch.cat((parents, (first + pick // W).int()), 1)
        beyond = torch.arange(W * count, device=device) >= W * limit[:, None]
        tokens = tokens.masked_fill(beyond, -1)
        parents[:, 1:].masked_fill_(beyond, -1)
        return Drafts(tokens, W * limit, None, parents)


def make_drafter(
    options: GenerationOptions, model: Decoder, sampler: Sampler, *, max_batch: int, max_tokens: int
) -> Drafter | None:
    """The drafter for ``options.draft``; None without drafts.

    Raises ValueError for a drafting model that does not fit ``model``.
    """
    draft, num_draft, width = options.draft, options.num_draft, options.tree
    if draft is None:
        return None
    if draft == "prompt_lookup":
        min_ngram, max_ngram = options.min_ngram, options.max_ngram
        return LookupDrafter(num_draft, width, min_ngram=min_ngram, max_ngram=max_ngram)
    if not is_decoder(draft):
        raise ValueError(f"draft: expected None, 'prompt_lookup' or a model, got {draft!r}")
    ours, theirs = model.config, draft.config
    if theirs.vocab_size != ours.vocab_size:
        raise ValueError(
            f"draft: expected a model with the vocabulary of {ours.vocab_size} tokens that it drafts for, "
            f"got one of {theirs.vocab_size}"
        )
    if theirs.max_positions < max_tokens:
        raise ValueError(
            f"draft: expected a model of at least {max_tokens} positions, as many as prompt and new tokens take, "
            f"got one of {theirs.max_positions}"
        )
    if width > ours.vocab_size:
        raise ValueError(f"tree: expected at most the vocabulary of {ours.vocab_size} tokens, got {width}")
    device = model.embedding.weight.device
    if draft.embedding.weight.device != device:
        raise ValueError(f"draft: expected a model on {device}, got one on {draft.embedding.weight.device}")
    return ModelDrafter(draft, sampler, num_draft, width, max_batch=max_batch, max_tokens=max_tokens)
