"""The generation of a batch: each request has a row of one cache; drafts are verified and rows compressed on the
way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvops.cache import PagedKVCache
from kvops.generation.options import GenerationOptions
from kvops.generation.passes import Decoder, add_scores, decode, judge, read_prompt
from kvops.generation.sampler import Sampler
from kvops.generation.speculation import Drafter, Drafts, Pace, Verdict, keep_accepted, verify
from kvops.generation.stats import GenerationStats
from kvops.policies import Compression, RecentQueries


@dataclass
class Batch:
    """Requests that are generated together.

    ``text`` int64 [B, L] holds the first ``lens`` int32 [B] tokens of each sequence, and -1 after them. All but the
    last token are in the cache. ``counts`` has the number of emitted tokens, ``paces`` the length of the next drafts,
    and ``compressed_at`` the length of each sequence at its last compression. With ``keep``, sequences that end stay in
    the cache.
    """

    model: Decoder
    cache: PagedKVCache
    sampler: Sampler
    drafter: Drafter | None
    compressions: Sequence[Compression | None]
    options: GenerationOptions
    stats: GenerationStats
    keep: bool = False

    def __post_init__(self) -> None:
        self.stop_tokens = frozenset(self.options.stop_tokens)
        self.max_new_tokens = self.options.max_new_tokens
        self.every = [compression.every if compression else 0 for compression in self.compressions]
        self.drafted, self.most_wanted = 0, 0
        again = [compression.policy for compression in self.compressions if compression and compression.every]
        self.accumulate = again[0].accumulate if again else None
        self.recent = None
        if again and self.accumulate is None:
            self.recent = RecentQueries(len(self.compressions), max(policy.recall for policy in again))

    def read(self, prompts: Sequence[Sequence[int]], held: int = 0) -> list[list[int]]:
        """Read all prompts and return the first new tokens. The cache already holds the first ``held`` tokens of each
        prompt."""
        started = time.perf_counter()
        batch, device = len(prompts), self.model.embedding.weight.device
        self.prompt_lens = [len(prompt) for prompt in prompts]
        self.compressed_at = list(self.prompt_lens)
        self.lens = torch.tensor(self.prompt_lens, dtype=torch.int32, device=device)
        room = self.drafter.room if self.drafter else 0
        width = max(self.prompt_lens) + self.max_new_tokens + room + 1  # room for drafts after the last token
        self.text = torch.full((batch, width), -1, dtype=torch.int64, device=device)
        last_hidden = []
        for row, prompt in enumerate(prompts):
            self.text[row, : len(prompt)] = torch.tensor(prompt, device=device)
            tokens = self.text[row : row + 1, : len(prompt)]
            compression = self.compressions[row]
            last_hidden.append(read_prompt(self.model, self.cache, tokens, row, compression, self.recent, held))
            if self.drafter:
                self.drafter.begin(row, tokens)
        self.no_drafts = Drafts(self.text[:, :0], torch.zeros_like(self.lens))
        self.counts, self.active = [0] * batch, [True] * batch
        self.paces = [Pace(self.options.num_draft) for _ in prompts]
        logits = self.model.logits(torch.cat(last_hidden))
        verdict = verify(self.no_drafts, logits, self.text, self.lens, self.sampler, "token")
        new = self._emit(self.no_drafts, verdict, torch.ones_like(self.lens))
        self.stats.prompt_tokens += sum(self.prompt_lens) - held * batch
        self.stats.first_token_seconds += time.perf_counter() - started
        return new

    def step(self) -> list[list[int]]:
        """Draft, run the model, verify. Returns the new tokens."""
        started = time.perf_counter()
        before = max(self.counts)
        running = torch.tensor(self.active, dtype=torch.int32, device=self.lens.device)
        drafts = self.no_drafts
        if self.drafter:
            wanted = [self._wanted(row) if active else 0 for row, active in enumerate(self.active)]
            self.most_wanted = max(self.most_wanted, *wanted)
            drafts = self.drafter.propose(self.text, self.lens, running, wanted)
            self.stats.draft_seconds += time.perf_counter() - started
        last = self.text.gather(1, self.lens[:, None].long() - 1)
        later = self.accumulate if self.drafter else None
        queries: list[Tensor] | None = [] if later or self.recent else None
        hidden = decode(
            self.model,
            self.cache,
            torch.cat((last, drafts.tokens), 1).clamp_min_(0),
            q_lens=running + drafts.lens,
            parents=drafts.parents,
            accumulate=None if later else self.accumulate,
            queries=queries,
        )
        verdict = verify(
            drafts, self.model.logits(hidden), self.text, self.lens, self.sampler, self.options.verification
        )
        if self.drafter:
            self.drafter.settle(verdict)
            keep_accepted(self.cache, drafts, verdict, running)
        if queries is not None:
            self._settle(queries, (verdict.accepted + 1) * running, verdict.path)
        drafted = self.stats.drafted
        self.stats.sequence_steps += sum(self.active)
        new = self._emit(drafts, verdict, running)
        self._evict()
        seconds = time.perf_counter() - started
        self.stats.steps += 1
        self.stats.decoded_tokens += sum(map(len, new))
        self.stats.plain_steps += max(self.counts) - before
        self.stats.decode_seconds += seconds
        if self.stats.drafted == drafted:
            self.stats.undrafted_steps += 1
            self.stats.undrafted_seconds += seconds
        return new

    def _wanted(self, row: int) -> int:
        """The length of the next draft. It ends before the last token and before the next eviction, which drafts never
        move."""
        count = self.counts[row]
        ahead = min(self.paces[row].ahead(), self.max_new_tokens - count - 1)
        every = self.every[row]
        return min(ahead, every - (count - 1) % every - 1) if every else ahead

    def _emit(self, drafts: Drafts, verdict: Verdict, running: Tensor) -> list[list[int]]:
        """Append the verified tokens to the texts and return them. A sequence that ends gives its blocks back."""
        at = self.lens[:, None].long() + torch.arange(verdict.tokens.shape[1], device=self.lens.device)
        self.text.scatter_(1, at, verdict.tokens)
        self.lens += (verdict.accepted + 1) * running
        new: list[list[int]] = [[] for _ in self.active]
        ended = []
        numbers = torch.cat((drafts.lens[:, None], verdict.accepted[:, None], verdict.tokens), 1).tolist()
        for row, (drafted, accepted, *tokens) in enumerate(numbers):
            if not self.active[row]:
                continue
            self.stats.drafted += drafted
            self.drafted += drafted
            self.stats.accepted += accepted
            self.paces[row].learn(drafted, accepted)
            refused = tokens[accepted] < 0
            tokens = tokens[: accepted + (not refused)]
            end = next((i + 1 for i, token in enumerate(tokens) if token in self.stop_tokens), len(tokens))
            new[row] = tokens[:end]
            self.counts[row] += end
            self.stats.new_tokens += end
            self.stats.refused += refused
            stopped = end > 0 and tokens[end - 1] in self.stop_tokens
            if stopped or refused or self.counts[row] >= self.max_new_tokens:
                self.active[row] = False
                ended.append(row)
        if ended:
            self._record_cache(ended)
        for row in ended:
            if not self.keep:
                self.cache.free(slice(row, row + 1))
            if self.drafter:
                self.drafter.end(row)
        return new

    def _record_cache(self, ended: Sequence[int]) -> None:
        """Record the cache's figures before the rows in ``ended`` give their blocks back."""
        held = self.cache.stats()
        self.stats.blocks_in_use = max(self.stats.blocks_in_use, held.blocks_in_use)
        self.stats.bytes_in_use = max(self.stats.bytes_in_use, held.bytes_in_use)
        for row in ended:
            compression = self.compressions[row]
            blocks = int((-(-held.lengths[:, row] // self.cache.block_size)).sum())
            self.stats.final_blocks += blocks
            self.stats.full_blocks += self.cache.blocks_for(int(held.tokens_seen[row]))
            unmet = compression and compression.unmet(self.cache, self.compressed_at[row], grown_to=blocks)
            if unmet:
                self.stats.unmet.append(f"compression: prompt {row}: {unmet}")

    def finish(self) -> None:
        """Record in the statistics which options were not met."""
        self.stats.unmet += self.options.without_effect()
        if self.drafter is None or self.drafted:
            return
        if not self.most_wanted:
            why = f"max_new_tokens={self.max_new_tokens}"
            why += f" and every={max(self.every)}" if any(self.every) else ""
            why += " leave no token to draft" if any(self.every) else " leaves no token to draft"
            if max(self.counts) < self.max_new_tokens:
                why = "every prompt ended before a pass with drafts"
        else:
            options = self.options
            why = f"the last {options.max_ngram} to {options.min_ngram} tokens never occurred earlier in the text"
        self.stats.unmet.append(f"draft: asked for drafts, none was made: {why}")

    def _settle(self, queries: list[Tensor], counts: Tensor, path: Tensor | None) -> None:
        """Score and remember the queries of accepted tokens: the first ``counts`` of each row, or those on ``path`` in
        a tree."""
        if path is not None:
            places = path.clamp_min(0).long()[..., None, None]
            queries = [q.gather(1, places.expand(-1, -1, *q.shape[2:])) for q in queries]
        if self.accumulate:
            add_scores(self.model, self.cache, queries, counts, self.accumulate)
        if self.recent:
            for layer, q in enumerate(queries):
                self.recent.add(layer, q, counts)

    def _evict(self) -> None:
        """Compress the sequences that have decoded another ``every`` tokens since their last compression."""
        due: dict[int, tuple[Compression, list[int]]] = {}
        for row, (compression, count) in enumerate(zip(self.compressions, self.counts, strict=True)):
            if compression and compression.every and self.active[row] and (count - 1) % compression.every == 0:
                # A policy's floor is one number for all rows of a call, and must not depend on the other rows of the
                # batch.
                group = -1 - row if compression.policy.floor else id(compression)
                due.setdefault(group, (compression, []))[1].append(row)
        for compression, rows in due.values():
            seen = [self.prompt_lens[row] + self.counts[row] - 1 for row in rows]
            if self.recent:
                for row, num_tokens in zip(rows, seen, strict=True):
                    judge(self.model, self.cache, row, compression.policy, self.recent, num_tokens)
            compression.apply(self.cache, seen, rows)
            for row, num_tokens in zip(rows, seen, strict=True):
                self.compressed_at[row] = num_tokens
