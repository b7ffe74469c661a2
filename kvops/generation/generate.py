"""Generation: prefill, compression, decoding from the ragged cache, verified drafts.

Sequences of any lengths share one :class:`~kvops.PagedKVCache`; each has a row. A prompt is read with dense flash
attention. Every later step attends to the paged cache, whose heads may have different lengths.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from kvops import checks
from kvops.cache import PagedKVCache
from kvops.generation.batch import Batch
from kvops.generation.options import GenerationOptions
from kvops.generation.passes import Decoder, new_cache
from kvops.generation.sampler import Sampler
from kvops.generation.speculation import make_drafter
from kvops.generation.stats import GenerationStats
from kvops.policies import Compression
from kvops.sampling import BadWords, LogitBias

__all__ = ["Generation", "GenerationOptions", "GenerationStats", "generate", "stream"]


@dataclass(frozen=True)
class Generation:
    """The new tokens of each prompt, including the stop token that ended it, and the statistics."""

    tokens: list[list[int]]
    stats: GenerationStats


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
    bad_words: BadWords = (),
    logit_bias: LogitBias | None = None,
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
    """Generate and yield, after each step, the new tokens of each prompt (an empty list after its end).

    Args:
        model: the decoder; ``kvops.integrations.transformers.Decoder`` makes one of a transformers model.
        prompts: token ids, one sequence or more, of any lengths from 1 on.
        cache: an empty cache with a row for each prompt and room for ``tree * num_draft`` tokens beyond each sequence.
            It is empty again when the generation ends. None makes a cache that is large enough for these prompts and
            their compression.
        stats: updated after each step. At the end ``stats.unmet`` has a sentence for each option that was not met.

    The other arguments are the attributes of :class:`~kvops.generation.options.GenerationOptions`.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type. The message begins with its name.
        kvops.OutOfBlocksError: ``cache`` is too small.
    """
    options = GenerationOptions.of(locals())
    return _stream(model, prompts, options, cache, GenerationStats() if stats is None else stats)


def generate(
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
    bad_words: BadWords = (),
    logit_bias: LogitBias | None = None,
    stop_tokens: Sequence[int] = (),
    compression: Compression | Sequence[Compression | None] | None = None,
    draft: Literal["prompt_lookup"] | Decoder | None = None,
    num_draft: int = 7,
    tree: int = 1,
    verification: Literal["token", "block"] = "token",
    min_ngram: int = 2,
    max_ngram: int = 4,
    cache: PagedKVCache | None = None,
) -> Generation:
    """Generate to the end. Takes the arguments of :func:`stream` and returns all its tokens and its statistics."""
    options, stats = GenerationOptions.of(locals()), GenerationStats()
    tokens: list[list[int]] = [[] for _ in prompts]
    for new in _stream(model, prompts, options, cache, stats):
        for row, row_tokens in enumerate(new):
            tokens[row] += row_tokens
    return Generation(tokens, stats)


@torch.no_grad()
def _stream(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    cache: PagedKVCache | None,
    stats: GenerationStats,
) -> Iterator[list[list[int]]]:
    prompts = _token_ids(prompts, len(model.embedding.weight))
    batch, lengths = len(prompts), [len(prompt) for prompt in prompts]
    longest = max(lengths) + options.max_new_tokens
    if longest > model.config.max_positions:
        raise ValueError(
            f"prompts: expected prompt and new tokens within the model's {model.config.max_positions} positions, "
            f"got {longest}"
        )
    compressions = options.compressions(batch)
    sampler = Sampler.of(options, model, lengths)
    drafter = make_drafter(options, model, sampler, max_batch=batch, max_tokens=longest)
    if cache is None:
        room = drafter.room if drafter else 0
        cache = _new_cache(model, lengths, compressions, options.max_new_tokens, room)
    _expect_fitting(cache, model, batch)
    run = Batch(model, cache, sampler, drafter, compressions, options, stats)
    try:
        yield run.read(prompts)
        while any(run.active):
            yield run.step()
        run.finish()
    except BaseException:  # an error, or the caller stops
        cache.free()
        raise


def _token_ids(prompts: Sequence[Sequence[int]], vocab: int) -> list[list[int]]:
    """The prompts as lists of ints, checked."""
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
    """Check that a cache fits the model and the batch and is empty."""
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
    """A cache that these prompts cannot fill: room for each after compression and growth, and for the largest prompt in
    full."""
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
