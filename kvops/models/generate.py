"""Generation: prefill, compress, decode from the ragged cache, speed up by verified drafts.

Sequences of any lengths share one :class:`~kvops.cache.PagedKVCache`, a row each. A prompt is prefilled by dense flash
attention; from then on every step attends to the paged cache, however its heads have been compressed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from kvops.cache import PagedKVCache
from kvops.models.llama import Llama, rope_frequencies
from kvops.ops.attention import flash_attention
from kvops.ops.verify import prompt_lookup, verify_draft
from kvops.policies import Policy, Prefill, SnapKV, share_out


@dataclass(frozen=True)
class Compression:
    """How far, by what policy and how often a sequence's cache is compressed.

    Attributes:
        ratio: how many times smaller than the full cache, in blocks, at least 1. Where the protected tokens alone need
            more than that (short prompts), they are what is kept; the statistics tell what came out.
        policy: what a key is worth.
        protect_first: the sinks: that many first tokens are never evicted.
        protect_last: the recent window: that many last tokens are never evicted.
        every: 0: once, after the prefill. N: also after every N decoded tokens, to the same ratio of the tokens seen.
    """

    ratio: float = 4.0
    policy: Policy = field(default_factory=SnapKV)
    protect_first: int = 4
    protect_last: int = 32
    every: int = 0

    def __post_init__(self) -> None:
        for name, minimum in (("ratio", 1), ("protect_first", 0), ("protect_last", 0), ("every", 0)):
            if not getattr(self, name) >= minimum:
                raise ValueError(f"{name}: expected at least {minimum}, got {getattr(self, name)}")

    def apply(self, cache: PagedKVCache, num_tokens: Sequence[int], rows: slice = slice(None)) -> None:
        """Evict from each of ``rows``, whose sequences have seen ``num_tokens`` tokens, down to its budget."""
        protected = self.protect_first + self.protect_last
        layers = cache.num_layers
        lists = layers * cache.num_kv_heads
        weights = self.policy.layer_weights(layers)
        totals = [
            max(math.floor(cache.blocks_for(tokens) / self.ratio), cache.blocks_for(min(protected, tokens)))
            for tokens in num_tokens
        ]
        budgets: list[int] | list[list[int]] = totals
        if weights is not None or self.policy.scope == "layer":
            budgets = [
                share_out(
                    total,
                    weights or [1.0] * layers,
                    least=cache.blocks_for(min(protected, tokens)) // layers,
                    most=cache.blocks_for(tokens) // layers,
                )
                for total, tokens in zip(totals, num_tokens, strict=True)
            ]
        cache.evict(
            budgets,
            rows=rows,
            protect_first=self.protect_first,
            protect_last=self.protect_last,
            min_per_head=int(self.policy.floor * min(totals, default=0) / lists) * cache.block_size,
            scope="head" if self.policy.scope == "head" else "sequence",
        )


@dataclass
class GenerationStats:
    """What a generation did, over all its prompts.

    Attributes:
        prompt_tokens, new_tokens: tokens read and emitted.
        decoded_tokens: those emitted after each prompt's first, which the prefill gives.
        steps, sequence_steps: passes of the model after the prefill, and these times the sequences that took part.
        drafted, accepted: draft tokens verified, and found to be what the model would have said.
        first_token_seconds: prefill, compression and the first token of every prompt.
        decode_seconds: everything after.
        blocks_in_use, bytes_in_use: the most that the cache held, looked at when a sequence ended.
        tokens_per_second: ``decoded_tokens / decode_seconds``.
        accepted_per_step: ``accepted / sequence_steps``.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    decoded_tokens: int = 0
    steps: int = 0
    sequence_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    first_token_seconds: float = 0.0
    decode_seconds: float = 0.0
    blocks_in_use: int = 0
    bytes_in_use: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def accepted_per_step(self) -> float:
        return self.accepted / self.sequence_steps if self.sequence_steps else 0.0


@dataclass(frozen=True)
class Generation:
    """The new tokens of each prompt (a stop token, where one ended it, included) and what it took."""

    tokens: list[list[int]]
    stats: GenerationStats


def new_cache(model: Llama, *, max_batch: int, max_tokens: int, block_size: int = 16) -> PagedKVCache:
    """A cache with room for ``max_batch`` uncompressed sequences of ``max_tokens`` tokens of this model."""
    config = model.config
    blocks_per_list = -(-max_tokens // block_size)
    weight = model.embedding.weight
    return PagedKVCache(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_blocks=config.num_layers * config.num_kv_heads * max_batch * blocks_per_list,
        max_batch=max_batch,
        max_tokens=max_tokens,
        block_size=block_size,
        dtype=weight.dtype,
        device=weight.device,
    )


def window_left(model: Llama) -> int:
    """The model's sliding window as the operators count it: positions before the query's own, -1 without limit."""
    return -1 if model.config.sliding_window is None else model.config.sliding_window - 1


def prefill(model: Llama, cache: PagedKVCache, tokens: Tensor, row: int, policy: Policy | None = None) -> Tensor:
    """Run a prompt, int64 [1, S], into the empty ``row`` of the cache; returns the hidden states [1, S, hidden].

    With a ``policy``, the prompt's keys are scored as they pass, ready for an eviction.
    """
    rows = slice(row, row + 1)
    window = window_left(model)
    rope = None if policy is None else rope_frequencies(model.config).to(tokens.device)
    positions = cache.extend(tokens.shape[1], rows=rows)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.append(layer, k, v, positions, rows=rows)
        out, lse = flash_attention(q, k, v, causal=True, window_left=window)
        if policy is not None:
            seen = Prefill(q, k, v, lse, window, layer, model.config.num_layers, rope)
            cache.set_scores(layer, policy.score(seen), rows=rows)
        return out

    return model(tokens, positions, attend)


def decode(
    model: Llama,
    cache: PagedKVCache,
    tokens: Tensor,
    *,
    q_lens: Tensor | None = None,
    rows: slice = slice(None),
    accumulate: Literal["sum", "sumsq", "max"] | None = None,
) -> Tensor:
    """Run tokens, int64 [B, T], on top of what the cache's ``rows`` hold; returns the hidden states [B, T, hidden].

    The first ``q_lens[b]`` (int32 [B]) tokens of a row are real, all of them where None. ``accumulate`` adds the
    attention that the cached keys receive to their scores.
    """
    window = window_left(model)
    positions = cache.extend(tokens.shape[1], q_lens=q_lens, rows=rows)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.append(layer, k, v, positions, q_lens=q_lens, rows=rows)
        return cache.attend(
            layer, q, q_lens=q_lens, rows=rows, query_positions=positions, window_left=window, accumulate=accumulate
        )

    return model(tokens, positions, attend)


@torch.no_grad()
def stream(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float | Sequence[float] = 0.0,
    seed: int | Sequence[int] = 0,
    stop_tokens: Sequence[int] = (),
    compression: Compression | None = None,
    draft: Literal["prompt_lookup"] | None = None,
    num_draft: int = 7,
    min_ngram: int = 2,
    max_ngram: int = 4,
    cache: PagedKVCache | None = None,
    stats: GenerationStats | None = None,
) -> Iterator[list[list[int]]]:
    """Generate, yielding after every step the new tokens of each prompt (none for those that have ended).

    Args:
        model: the decoder.
        prompts: token ids, one sequence or more, of any lengths from 1 on.
        max_new_tokens: at most so many new tokens for each prompt.
        temperature: 0 decodes greedily; one number, or one for each prompt.
        seed: of the random numbers; an int gives prompt i the seed ``seed + i``. A prompt's tokens depend on its own
            seed and not on the batch it is in.
        stop_tokens: a prompt ends behind any of them.
        compression: of the cache; None keeps all of it.
        draft: ``"prompt_lookup"`` guesses up to ``num_draft`` tokens a step from earlier occurrences of the last
            ``max_ngram`` to ``min_ngram`` tokens and verifies them in one pass: the emitted tokens are distributed
            exactly as without drafts. A prompt whose drafts are refused gets shorter ones.
        cache: an empty cache to use; None makes one that holds all prompts uncompressed.
        stats: filled in as the generation goes.

    Raises:
        ValueError: an argument out of range, by its name.
        kvops.OutOfBlocksError: a given cache is too small.
    """
    batch = len(prompts)
    if batch == 0 or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("prompts: expected at least one prompt, each with at least one token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if draft not in (None, "prompt_lookup"):
        raise ValueError(f"draft: expected None or 'prompt_lookup', got {draft!r}")
    temperatures = _one_each("temperature", temperature, batch, 0)
    seeds = _one_each("seed", seed, batch, 1)
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > model.config.max_positions:
        raise ValueError(
            f"prompts: expected prompt and new tokens within the model's {model.config.max_positions} positions, "
            f"got {longest}"
        )
    draft_room = num_draft if draft else 0
    cache = cache or new_cache(model, max_batch=batch, max_tokens=longest + draft_room)
    stats = stats if stats is not None else GenerationStats()
    device = model.embedding.weight.device
    policy = compression.policy if compression else None
    accumulate = compression.policy.accumulate if compression and compression.every else None
    stop = frozenset(stop_tokens)

    started = time.perf_counter()
    sampling: dict[str, Any] = {
        "temperature": torch.tensor(temperatures, dtype=torch.float32, device=device),
        "seed": torch.tensor(seeds, dtype=torch.int64, device=device),
    }
    history = torch.full((batch, longest + draft_room), -1, dtype=torch.int64, device=device)
    last_hidden = []
    for row, prompt in enumerate(prompts):
        history[row, : len(prompt)] = torch.tensor(prompt, device=device)
        last_hidden.append(prefill(model, cache, history[row : row + 1, : len(prompt)], row, policy)[:, -1:])
        if compression:
            compression.apply(cache, [len(prompt)], slice(row, row + 1))
    lens = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32, device=device)
    limit = torch.full_like(lens, num_draft)  # a draft may be about twice as long as what was last accepted
    no_draft = torch.empty((batch, 0), dtype=torch.int64, device=device)
    tokens, _ = verify_draft(model.logits(torch.cat(last_hidden)), no_draft, step=lens.long(), **sampling)
    history.scatter_(1, lens[:, None].long(), tokens)
    lens += 1
    new = [[token] for (token,) in tokens.tolist()]
    stats.prompt_tokens += sum(map(len, prompts))
    stats.first_token_seconds += time.perf_counter() - started
    started = time.perf_counter()
    counts = [1] * batch
    active = [not (stop & set(tokens)) and max_new_tokens > 1 for tokens in new]
    since_eviction = 0
    while True:
        stats.new_tokens += sum(map(len, new))
        ended = [row for row in range(batch) if new[row] and not active[row]]
        if ended:
            held = cache.stats()
            stats.blocks_in_use = max(stats.blocks_in_use, held.blocks_in_use)
            stats.bytes_in_use = max(stats.bytes_in_use, held.bytes_in_use)
        for row in ended:
            cache.free(slice(row, row + 1))
        stats.decode_seconds += time.perf_counter() - started
        yield new
        started = time.perf_counter()
        if not any(active):
            return

        running = torch.tensor(active, dtype=torch.int32, device=device)
        drafts, draft_lens, q_lens = no_draft, None, running
        if draft:
            drafts, draft_lens = prompt_lookup(
                history, lens, num_draft=num_draft, min_ngram=min_ngram, max_ngram=max_ngram
            )
            left = torch.tensor([max_new_tokens - count - 1 for count in counts], dtype=torch.int32, device=device)
            draft_lens = torch.minimum(torch.minimum(draft_lens, limit), left.clamp_min(0)) * running
            if device.type == "cpu":  # reading a length costs nothing here; on a GPU every step has the same shape
                drafts = drafts[:, : int(draft_lens.max())]
            q_lens = running + draft_lens
        feed = torch.cat((history.gather(1, lens[:, None].long() - 1), drafts.clamp_min(0)), dim=1)
        hidden = decode(model, cache, feed, q_lens=q_lens, accumulate=accumulate)
        tokens, accepted = verify_draft(
            model.logits(hidden), drafts, draft_lens=draft_lens, step=lens.long(), **sampling
        )
        emitted = (accepted + 1) * running
        if draft_lens is not None:
            cache.rollback((draft_lens - accepted) * running)
            limit = torch.where(draft_lens > 0, (2 * accepted + 1).clamp_max(num_draft), limit)
        columns = lens[:, None].long() + torch.arange(tokens.shape[1], device=device)
        history.scatter_(1, columns.clamp_max(history.shape[1] - 1), tokens)
        lens += emitted

        stats.steps += 1
        new = [[] for _ in prompts]
        for row, (row_tokens, row_drafts) in enumerate(
            zip(tokens.tolist(), [0] * batch if draft_lens is None else draft_lens.tolist(), strict=True)
        ):
            if not active[row]:
                continue
            row_tokens = [token for token in row_tokens if token >= 0]
            stats.drafted += row_drafts
            stats.accepted += len(row_tokens) - 1
            stats.sequence_steps += 1
            end = next((i + 1 for i, token in enumerate(row_tokens) if token in stop), len(row_tokens))
            new[row] = row_tokens[:end]
            stats.decoded_tokens += end
            counts[row] += end
            active[row] = row_tokens[end - 1] not in stop and counts[row] < max_new_tokens
        since_eviction += max(map(len, new))
        if compression and compression.every and since_eviction >= compression.every and any(active):
            since_eviction = 0
            seen = [len(prompt) + count - 1 for prompt, count in zip(prompts, counts, strict=True)]
            compression.apply(cache, seen)


def generate(model: Llama, prompts: Sequence[Sequence[int]], **options: object) -> Generation:
    """:func:`stream` to the end; takes the same options."""
    stats = GenerationStats()
    tokens: list[list[int]] = [[] for _ in prompts]
    for new in stream(model, prompts, stats=stats, **options):  # type: ignore[arg-type]
        for row, row_tokens in enumerate(new):
            tokens[row] += row_tokens
    return Generation(tokens, stats)


def _one_each(name: str, value: object, batch: int, stride: int) -> list:
    """``value`` as one for each prompt; a single number grows by ``stride`` from prompt to prompt."""
    if isinstance(value, Sequence):
        if len(value) != batch:
            raise ValueError(f"{name}: expected one number or {batch}, one for each prompt, got {len(value)}")
        return list(value)
    return [value + stride * row for row in range(batch)]  # type: ignore[operator]
