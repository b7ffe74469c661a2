"""Generation: prefill, compress, decode from the ragged cache, speed up by verified drafts.

Sequences of any lengths share one :class:`~kvops.cache.PagedKVCache`, a row each. A prompt is prefilled by dense flash
attention; from then on every step attends to the paged cache, however its heads have been compressed.
"""

from __future__ import annotations

import reprlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvops import checks
from kvops.cache import PagedKVCache
from kvops.generation.passes import Decoder, add_scores, decode, judge, new_cache, read_prompt
from kvops.generation.sampler import Sampler
from kvops.generation.speculation import Drafter, Drafts, Pace, Verdict, keep_accepted, make_drafter, verify
from kvops.generation.stats import GenerationStats
from kvops.policies import Compression, RecentQueries


@dataclass(frozen=True)
class Generation:
    """The new tokens of each prompt (a stop token, where one ended it, included) and what it took."""

    tokens: list[list[int]]
    stats: GenerationStats


@torch.no_grad()
def stream(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float | Sequence[float] = 0.0,
    seed: int | Sequence[int] = 0,
    top_k: int | Sequence[int] | None = None,
    top_p: float | Sequence[float] | None = None,
    min_p: float | Sequence[float] | None = None,
    repetition_penalty: float | Sequence[float] | None = None,
    presence_penalty: float | Sequence[float] | None = None,
    frequency_penalty: float | Sequence[float] | None = None,
    bad_words: Sequence[Sequence[int]] = (),
    stop_tokens: Sequence[int] = (),
    compression: Compression | Sequence[Compression | None] | None = None,
    draft: Literal["prompt_lookup"] | Decoder | None = None,
    num_draft: int = 7,
    tree: int = 1,
    verification: Literal["token", "block"] = "token",
    min_ngram: int = 2,
    max_ngram: int = 4,
    cache: PagedKVCache | None = None,
    stats: GenerationStats | None = None,
) -> Iterator[list[list[int]]]:
    """Generate, yielding after every step the new tokens of each prompt (none for those that have ended).

    Args:
        model: the decoder; ``kvops.integrations.transformers.Decoder`` makes one of a transformers model.
        prompts: token ids, one sequence or more, of any lengths from 1 on.
        max_new_tokens: at most so many new tokens for each prompt.
        temperature: 0 decodes greedily; one number, or one for each prompt.
        seed: of the random numbers; an int gives prompt i the seed ``seed + i``. A prompt's tokens depend on its own
            seed and not on the batch it is in.
        top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, bad_words: as
            :func:`kvops.process_logits` has them; one number, or one for each prompt, and bad words for all. They
            hold for a drafting model and for every position of a draft as they would without drafts.
        stop_tokens: a prompt ends behind any of them.
        compression: of the cache, one for all prompts or one for each; None keeps all of it.
        draft: who guesses up to ``num_draft`` tokens ahead, which one pass then verifies: the emitted tokens are
            distributed exactly as without drafts, greedy ones are the same. ``"prompt_lookup"`` takes what followed
            earlier occurrences of the last ``max_ngram`` to ``min_ngram`` tokens; a smaller model of the same
            vocabulary and device decodes ahead, in a cache of its own. A prompt whose drafts are refused gets shorter
            ones, and for some passes none.
        tree: at most so many drafts beside one another at each position: more than 1 makes the drafts trees, of the
            best earlier occurrences, or of the drafting model's most probable continuations.
        verification: of chains: ``"token"`` by token, or ``"block"``, which accepts at least as much where tokens are
            sampled (:func:`kvops.verify_draft`).
        cache: an empty cache to use, with a row for each prompt and room for ``tree * num_draft`` tokens beyond each
            sequence; it is empty again when the generation ends. None makes one with the blocks that these prompts need
            at most, compressed as they are.
        stats: filled in as the generation goes.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type, by its name.
        kvops.OutOfBlocksError: a given cache is too small.
    """
    prompts = _token_ids(prompts, len(model.embedding.weight))
    batch = len(prompts)
    for name, value in (("max_new_tokens", max_new_tokens), ("num_draft", num_draft), ("tree", tree)):
        checks.expect_int(name, value, 1)
    stops = frozenset(checks.ints("stop_tokens", stop_tokens))
    checks.expect_choice("verification", verification, ("token", "block"))
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > model.config.max_positions:
        raise ValueError(
            f"prompts: expected prompt and new tokens within the model's {model.config.max_positions} positions, "
            f"got {longest}"
        )
    compressions = list(compression) if isinstance(compression, Sequence) else [compression] * batch
    for each in compressions:
        if not isinstance(each, Compression | None):
            raise TypeError(f"compression: expected a kvops.policies.Compression, such as Compression(4), got {each!r}")
    if len(compressions) != batch:
        raise ValueError(f"compression: expected one for all prompts or {batch}, one for each, got {len(compressions)}")
    if len({each.policy.accumulate for each in compressions if each and each.every}) > 1:
        raise ValueError("compression: expected policies that accumulate alike where every > 0")
    device = model.embedding.weight.device
    sampler = Sampler(
        batch,
        model.config.vocab_size,
        device,
        prompt_lens=torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32, device=device),
        temperature=temperature,
        seed=seed,
        bad_words=bad_words,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
    )
    drafter = None
    if draft is not None:
        drafter = make_drafter(
            draft,
            model,
            sampler,
            num_draft=num_draft,
            width=tree,
            min_ngram=min_ngram,
            max_ngram=max_ngram,
            max_batch=batch,
            max_tokens=longest,
        )
    if cache is None:
        room = drafter.room if drafter else 0
        cache = _new_cache(model, [len(prompt) for prompt in prompts], compressions, max_new_tokens, room)
    _expect_fitting(cache, model, batch)
    run = _Run(
        model,
        cache,
        sampler,
        drafter,
        compressions,
        stops,
        max_new_tokens,
        num_draft,
        verification,
        stats if stats is not None else GenerationStats(),
    )
    try:
        yield run.read(prompts)
        while any(run.active):
            yield run.step()
    except BaseException:  # an error, or the caller goes
        cache.free()
        raise


def generate(model: Decoder, prompts: Sequence[Sequence[int]], **options: object) -> Generation:
    """:func:`stream` to the end; takes the same options."""
    stats = GenerationStats()
    tokens: list[list[int]] = [[] for _ in prompts]
    for new in stream(model, prompts, stats=stats, **options):  # type: ignore[arg-type]
        for row, row_tokens in enumerate(new):
            tokens[row] += row_tokens
    return Generation(tokens, stats)


def _token_ids(prompts: Sequence[Sequence[int]], vocab: int) -> list[list[int]]:
    """The prompts as lists, of whatever they are made."""
    if isinstance(prompts, str) or any(isinstance(prompt, str | int) for prompt in prompts):
        raise TypeError(
            f"prompts: expected sequences of token ids, one for each prompt, got {reprlib.repr(prompts)}: "
            "generate(model, [tokenizer.encode(text)])"
        )
    lists = [checks.ints("prompts", prompt) for prompt in prompts]
    if not all(lists) or not lists:
        raise ValueError("prompts: expected at least one prompt, each with at least one token")
    for row, tokens in enumerate(lists):
        if min(tokens) < 0 or max(tokens) >= vocab:
            wrong = next(token for token in tokens if not 0 <= token < vocab)
            raise ValueError(f"prompts: expected token ids from 0 to {vocab - 1}, got {wrong} in prompt {row}")
    return lists


def _expect_fitting(cache: PagedKVCache, model: Decoder, batch: int) -> None:
    """That a cache is made for a model and a batch, and empty."""
    if not isinstance(cache, PagedKVCache):
        raise TypeError(f"cache: expected a kvops.PagedKVCache, got {type(cache).__name__}")
    config = model.config
    sizes = {
        "max_batch": (cache.max_batch, batch),
        "num_layers": (cache.num_layers, config.num_layers),
        "num_kv_heads": (cache.num_kv_heads, config.num_kv_heads),
        "head_dim": (cache.k_cache.shape[2], config.head_dim),
    }
    for name, (got, expected) in sizes.items():
        if got != expected:
            raise ValueError(f"cache: expected {name}={expected}, as the model and its prompts have, got {got}")
    checks.expect_same_device("cache", cache.k_cache, "the model", model.embedding.weight)
    held = cache.next_positions.tolist()
    if any(held):
        raise ValueError(f"cache: expected empty rows, got some of {held} tokens: free() them first")


def _new_cache(
    model: Decoder, prompt_lens: Sequence[int], compressions: Sequence[Compression | None], new_tokens: int, room: int
) -> PagedKVCache:
    """A cache that these prompts cannot fill: each as it is compressed and grows, and the largest while it is read."""
    sizes = new_cache(model, max_batch=1, max_tokens=1, num_blocks=1)
    resting, reading = [], [0]
    for length, compression in zip(prompt_lens, compressions, strict=True):
        most = sizes.blocks_for(length + new_tokens + room)
        held, read = most, sizes.blocks_for(length)
        if compression and compression.every:
            held = compression.budget(sizes, length + new_tokens) + sizes.blocks_for(compression.every + room)
        elif compression:
            held = compression.budget(sizes, length) + sizes.blocks_for(new_tokens + room)
        if compression and compression.chunk:
            read = min(read, compression.budget(sizes, length) + sizes.blocks_for(compression.chunk))
        resting.append(min(most, held))
        reading.append(read - resting[-1])
    return new_cache(
        model,
        max_batch=len(prompt_lens),
        max_tokens=max(prompt_lens) + new_tokens + room,
        num_blocks=sum(resting) + max(reading),
    )


@dataclass
class _Run:
    """A batch on its way. ``text`` int64 [B, L] holds the first ``lens`` int32 [B] tokens of each sequence and -1 from
    there on; all but the last of them are in the cache. ``counts`` are the tokens emitted, ``paces`` how far ahead it
    pays to draft."""

    model: Decoder
    cache: PagedKVCache
    sampler: Sampler
    drafter: Drafter | None
    compressions: Sequence[Compression | None]
    stop_tokens: frozenset[int]
    max_new_tokens: int
    num_draft: int
    verification: str
    stats: GenerationStats

    def __post_init__(self) -> None:
        self.every = [each.every if each else 0 for each in self.compressions]
        again = [each.policy for each in self.compressions if each and each.every]
        self.accumulate = again[0].accumulate if again else None
        self.recent = None
        if again and self.accumulate is None:
            self.recent = RecentQueries(len(self.compressions), max(policy.recall for policy in again))

    def read(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Prefill all prompts; their first tokens."""
        started = time.perf_counter()
        batch, device = len(prompts), self.model.embedding.weight.device
        self.prompt_lens = [len(prompt) for prompt in prompts]
        self.lens = torch.tensor(self.prompt_lens, dtype=torch.int32, device=device)
        room = self.drafter.room if self.drafter else 0
        width = max(self.prompt_lens) + self.max_new_tokens + room + 1  # behind the last token, all that was drafted
        self.text = torch.full((batch, width), -1, dtype=torch.int64, device=device)
        last_hidden = []
        for row, prompt in enumerate(prompts):
            self.text[row, : len(prompt)] = torch.tensor(prompt, device=device)
            tokens = self.text[row : row + 1, : len(prompt)]
            last_hidden.append(read_prompt(self.model, self.cache, tokens, row, self.compressions[row], self.recent))
            if self.drafter:
                self.drafter.begin(row, tokens)
        self.no_drafts = Drafts(self.text[:, :0], torch.zeros_like(self.lens))
        self.counts, self.active = [0] * batch, [True] * batch
        self.paces = [Pace(self.num_draft) for _ in prompts]
        logits = self.model.logits(torch.cat(last_hidden))
        verdict = verify(self.no_drafts, logits, self.text, self.lens, self.sampler, "token")
        new = self._emit(self.no_drafts, verdict, torch.ones_like(self.lens))
        self.stats.prompt_tokens += sum(self.prompt_lens)
        self.stats.first_token_seconds += time.perf_counter() - started
        return new

    def step(self) -> list[list[int]]:
        """Draft, run, verify; the new tokens."""
        started = time.perf_counter()
        before = max(self.counts)
        running = torch.tensor(self.active, dtype=torch.int32, device=self.lens.device)
        drafts = self.no_drafts
        if self.drafter:
            wanted = [self._wanted(row) if active else 0 for row, active in enumerate(self.active)]
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
        verdict = verify(drafts, self.model.logits(hidden), self.text, self.lens, self.sampler, self.verification)
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
        """How far ahead to draft: never past the last token or the next eviction, which come when they would."""
        count = self.counts[row]
        ahead = min(self.paces[row].ahead(), self.max_new_tokens - count - 1)
        every = self.every[row]
        return min(ahead, every - (count - 1) % every - 1) if every else ahead

    def _emit(self, drafts: Drafts, verdict: Verdict, running: Tensor) -> list[list[int]]:
        """Write the verified tokens behind the texts and hand them out; a sequence that ends gives its blocks back."""
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
            held = self.cache.stats()
            self.stats.blocks_in_use = max(self.stats.blocks_in_use, held.blocks_in_use)
            self.stats.bytes_in_use = max(self.stats.bytes_in_use, held.bytes_in_use)
        for row in ended:
            self.cache.free(slice(row, row + 1))
            if self.drafter:
                self.drafter.end(row)
        return new

    def _settle(self, queries: list[Tensor], counts: Tensor, path: Tensor | None) -> None:
        """Let the tokens that stood, ``counts`` of each row and in a tree those on ``path``, be what was seen."""
        if path is not None:
            places = path.clamp_min(0).long()[..., None, None]
            queries = [q.gather(1, places.expand(-1, -1, *q.shape[2:])) for q in queries]
        if self.accumulate:
            add_scores(self.model, self.cache, queries, counts, self.accumulate)
        if self.recent:
            for layer, q in enumerate(queries):
                self.recent.add(layer, q, counts)

    def _evict(self) -> None:
        """Compress the sequences that have decoded another ``every`` tokens, each at its own time."""
        due: dict[int, tuple[Compression, list[int]]] = {}
        for row, (compression, count) in enumerate(zip(self.compressions, self.counts, strict=True)):
            if compression and compression.every and self.active[row] and (count - 1) % compression.every == 0:
                # A policy's floor is one number for all rows of a call: it must not depend on who is in the batch.
                group = -1 - row if compression.policy.floor else id(compression)
                due.setdefault(group, (compression, []))[1].append(row)
        for compression, rows in due.values():
            seen = [self.prompt_lens[row] + self.counts[row] - 1 for row in rows]
            if self.recent:
                for row, num_tokens in zip(rows, seen, strict=True):
                    judge(self.model, self.cache, row, compression.policy, self.recent, num_tokens)
            compression.apply(self.cache, seen, rows)
