"""The passes of a model over a paged cache: prompts, further tokens, and chains or trees of drafts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from kvops import checks
from kvops.cache import PagedKVCache
from kvops.models.llama import Attend
from kvops.ops.attention import flash_attention
from kvops.ops.scores import attention_scores
from kvops.ops.verify_tree import tree_mask
from kvops.policies import Cached, Compression, Policy, Prefill, RecentQueries, Recital, Recited

Reduction = Literal["sum", "sumsq", "max"]


class Decoder(Protocol):
    """The interface of a model for generation; :class:`kvops.models.llama.Llama` implements it.

    ``config`` has ``vocab_size``, ``num_layers``, ``num_kv_heads``, ``head_dim`` and ``max_positions``;
    ``embedding.weight`` has the model's device and dtype. ``rope`` has the frequencies of the rotary embedding, float32
    ``[D / 2]``, or is None.
    """

    @property
    def config(self) -> Any: ...

    @property
    def embedding(self) -> nn.Embedding: ...

    @property
    def rope(self) -> Tensor | None: ...

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states [B, T, hidden] of tokens int64 [B, T] at positions int [B, T]. ``attend`` computes
        attention."""

    def options(self, layer: int) -> dict[str, Any]:
        """The attention options of a layer for :func:`kvops.flash_attention`: ``window_left``, and ``scale``,
        ``softcap`` and ``sinks`` where the layer has them. Called while the layer attends, and afterwards."""

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden] -> [..., vocab_size]."""


def is_decoder(value: object) -> TypeGuard[Decoder]:
    """Whether ``value`` implements Decoder. From Python 3.12 on ``isinstance`` with a protocol does not call
    ``__getattr__``, through which torch's modules find parameters, buffers and submodules."""
    names = ("config", "embedding", "rope", "options", "logits")
    return callable(value) and all(hasattr(value, name) for name in names)


def new_cache(
    model: Decoder, *, max_batch: int, max_tokens: int, block_size: int = 16, num_blocks: int | None = None
) -> PagedKVCache:
    """A cache for ``max_batch`` sequences of ``max_tokens`` tokens of this model. ``num_blocks`` is None for room for
    all of them without compression."""
    config = model.config
    blocks_per_list = -(-max_tokens // block_size)
    weight = model.embedding.weight
    return PagedKVCache(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_blocks=num_blocks or config.num_layers * config.num_kv_heads * max_batch * blocks_per_list,
        max_batch=max_batch,
        max_tokens=max_tokens,
        block_size=block_size,
        dtype=weight.dtype,
        device=weight.device,
    )


def prefill(
    model: Decoder,
    cache: PagedKVCache,
    tokens: Tensor,
    row: int,
    policy: Policy | None = None,
    recent: RecentQueries | None = None,
) -> Tensor:
    """Run a prompt, int64 [1, S], into the empty ``row`` of the cache; returns the hidden states [1, S, hidden].

    With a ``policy``, the prompt's keys get scores for an eviction: layer by layer, or after a recital if the policy
    needs one. ``recent`` stores the last queries of every layer.

    Raises ValueError for a row that is not empty (checked on the CPU and with ``KVOPS_DEBUG=1``).
    """
    checks.expect_int("row", row, 0)
    checks.expect_at_least("cache.max_batch", cache.max_batch, row + 1)
    checks.expect_shape("tokens", tokens, "[1, S]", 1, None)
    if checks.may_look(cache.next_positions) and int(cache.next_positions[row]):
        raise ValueError(f"row: expected an empty one, got {row}, which holds tokens: free() it, or decode() on top")
    rows = slice(row, row + 1)
    rope = None if policy is None else model.rope
    last: list[Tensor] = []
    positions = cache.extend(tokens.shape[1], rows=rows)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = model.options(layer)
        cache.append(layer, k, v, positions, rows=rows)
        out, lse = flash_attention(q, k, v, causal=True, **options)
        if policy is not None and policy.recital is not None:
            last.append(q[:, -policy.recall :].clone())
        elif policy is not None:
            options.pop("sinks", None)  # they are in the lse
            seen = Prefill(q, k, v, lse, layer=layer, num_layers=model.config.num_layers, rope=rope, **options)
            cache.set_scores(layer, policy.checked_score(seen), rows=rows)
        if recent is not None:
            recent.begin(layer, row, q)
        return out

    hidden = model(tokens, positions, attend)
    if policy is not None and policy.recital is not None:
        _judge(model, cache, row, policy, last, recite(model, cache, tokens, row, policy.recital))
    return hidden


def recite(
    model: Decoder, cache: PagedKVCache, tokens: Tensor, row: int, recital: Recital, start: int = 0
) -> list[Recited]:
    """Let the model repeat ``tokens``, int64 [1, S], the whole text of ``row``, from ``start`` on.

    The model reads the tokens of the text; nothing is sampled. They attend to everything that the row holds, compressed
    or not. Their keys and values do not go into the cache, and the row is not changed.

    Returns, for each layer, the attention that the recital of a chunk paid to the chunk's keys: ``[1, Hkv, W]`` in list
    order. W is the longest list; shorter lists are padded in front. Keys from before ``start`` have 0.

    Raises ValueError if a layer's window is narrower than the text, or if the model has too few positions after it.
    """
    rows, length = slice(row, row + 1), tokens.shape[1]
    lens = cache.seq_lens[:, row].tolist()
    width = max(map(max, lens))
    shape = 2, 1, cache.num_kv_heads, width
    recited = [Recited(*torch.zeros(shape, dtype=torch.float32, device=cache.device)) for _ in lens]
    for read, chunk in recital.passes(tokens, model.config.max_positions - length, start):
        positions = length + torch.arange(read.shape[1], dtype=torch.int32, device=cache.device)[None]
        judged = slice(width - length + chunk.start, width - length + chunk.stop)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, judged: slice = judged) -> Tensor:
            options = model.options(layer)
            _expect_no_window(options.pop("window_left"), length + q.shape[1])
            sinks = options.pop("sinks", None)
            seen = Cached(cache, layer, q, rows=rows, width=width)
            keys, values = (torch.cat((held.to(new.dtype), new), 1) for held, new in ((seen.k, k), (seen.v, v)))
            out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
            group = q.shape[2] // k.shape[2]
            for head, held in enumerate(lens[layer]):
                own, heads = slice(head, head + 1), slice(head * group, (head + 1) * group)
                real = slice(width - held, None)
                sink = None if sinks is None else sinks[heads]
                out[:, :, heads], lse = flash_attention(
                    q[:, :, heads], keys[:, real, own], values[:, real, own], causal=True, sinks=sink, **options
                )
                # The whole recital comes after the chunk: there is nothing to mask.
                pair = q[:, :, heads], keys[:, judged, own], lse
                largest, total = recited[layer]
                largest[:, own, judged] = attention_scores(*pair, reduce="max", group="max", **options)
                total[:, own, judged] = attention_scores(*pair, **options)
            return out

        model(read, positions, attend)
    return recited


def _expect_no_window(window_left: int, num_tokens: int) -> None:
    if 0 <= window_left < num_tokens - 1:
        raise ValueError(
            f"policy: expected one without recital, as the model's window of {window_left + 1} tokens does not reach "
            f"back over a prompt and its recital, {num_tokens} tokens; next step: Standout, or another policy"
        )


def read_prompt(
    model: Decoder,
    cache: PagedKVCache,
    tokens: Tensor,
    row: int,
    compression: Compression | None = None,
    recent: RecentQueries | None = None,
    held: int = 0,
) -> Tensor:
    """Run a prompt, int64 [1, S], into ``row`` and compress the row, as a whole or chunk by chunk.

    The row already holds the first ``held`` tokens, compressed or not; only the others are run. Returns the hidden
    state of the last token, [1, 1, hidden]. ``recent`` stores the last queries of every layer.
    """
    length, rows = tokens.shape[1], slice(row, row + 1)
    if compression is None:
        hidden = decode(model, cache, tokens[:, held:], rows=rows) if held else prefill(model, cache, tokens, row)
        return hidden[:, -1:]
    if not held and compression.chunk == 0:
        hidden = prefill(model, cache, tokens, row, compression.policy, recent)
        compression.apply(cache, [length], rows)
        return hidden[:, -1:]
    size = compression.chunk or length
    for start in range(held, length, size):
        hidden = _read_chunk(model, cache, tokens[:, : start + size], start, row, compression.policy, recent)
        compression.apply(cache, [length], rows)
    return hidden[:, -1:]


def _read_chunk(
    model: Decoder,
    cache: PagedKVCache,
    tokens: Tensor,
    start: int,
    row: int,
    policy: Policy,
    recent: RecentQueries | None,
) -> Tensor:
    """Run ``tokens``, int64 [1, S], from ``start`` on, and score all keys of the row, which holds the tokens before
    ``start``, compressed or not."""
    rows, new = slice(row, row + 1), tokens[:, start:]
    rope = model.rope
    positions = cache.extend(new.shape[1], rows=rows)
    # The host reads one number in each chunk: the width of the gathered keys.
    width = int(cache.seq_lens[:, rows].amax())
    last: list[Tensor] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.append(layer, k, v, positions, rows=rows)
        options = model.options(layer)
        out = cache.attend(layer, q, rows=rows, query_positions=positions, **options)
        if policy.recital is None:
            Cached(cache, layer, q, rows=rows, width=width, rope=rope, **options).judge(policy)
        else:
            last.append(q[:, -policy.recall :].clone())
        if recent is not None:
            recent.begin(layer, row, q)
        return out

    hidden = model(new, positions, attend)
    if policy.recital is not None:
        _judge(model, cache, row, policy, last, recite(model, cache, tokens, row, policy.recital, start))
    return hidden


def decode(
    model: Decoder,
    cache: PagedKVCache,
    tokens: Tensor,
    *,
    q_lens: Tensor | None = None,
    rows: slice = slice(None),
    parents: Tensor | None = None,
    accumulate: Reduction | None = None,
    queries: list[Tensor] | None = None,
) -> Tensor:
    """Run tokens, int64 [B, T], after those in the cache's ``rows``; returns the hidden states [B, T, hidden].

    Args:
        q_lens: int32 [B]: the first ``q_lens[b]`` tokens of a row are real; None for all of them.
        parents: int32 [B, T], for trees, as in :func:`kvops.verify_tree`: a token sees itself and its ancestors, and
            its depth gives its position. None for a chain.
        accumulate: how the attention that cached keys receive is added to their scores; None for not at all.
        queries: collects each layer's queries for :func:`add_scores`, which runs after the verification.
    """
    positions = cache.extend(tokens.shape[1], q_lens=q_lens, rows=rows)
    mask = None
    if parents is not None:
        mask = tree_mask(parents)
        positions = positions[:, :1] + mask.sum(-1, dtype=torch.int32) - 1

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if queries is not None:
            queries.append(q)
        cache.append(layer, k, v, positions, q_lens=q_lens, rows=rows)
        return cache.attend(
            layer,
            q,
            q_lens=q_lens,
            rows=rows,
            query_positions=positions,
            tree_mask=mask,
            accumulate=accumulate,
            **model.options(layer),
        )

    return model(tokens, positions, attend)


def judge(
    model: Decoder, cache: PagedKVCache, row: int, policy: Policy, recent: RecentQueries, num_tokens: int
) -> None:
    """Score all keys of a row of ``num_tokens`` tokens again, with the row's last queries."""
    _judge(model, cache, row, policy, [recent.of(layer, row, num_tokens) for layer in range(cache.num_layers)])


def _judge(
    model: Decoder,
    cache: PagedKVCache,
    row: int,
    policy: Policy,
    queries: Sequence[Tensor],
    recited: Sequence[Recited] | None = None,
) -> None:
    """Score all keys of a row, given the queries of every layer and the result of :func:`recite`."""
    rows = slice(row, row + 1)
    width = int(cache.seq_lens[:, rows].amax())
    rope = model.rope
    for layer, q in enumerate(queries):
        known = None if recited is None else recited[layer]
        options = model.options(layer)
        Cached(cache, layer, q, rows=rows, width=width, rope=rope, recited=known, **options).judge(policy)


def add_scores(
    model: Decoder, cache: PagedKVCache, queries: Sequence[Tensor], q_lens: Tensor, accumulate: Reduction
) -> None:
    """Add the attention of accepted tokens, ``q_lens`` int32 [B] of each row, to the scores.

    This is a second pass of attention, after the verification: during the first pass it is not known which drafts will
    be accepted, and float sums cannot be undone exactly.
    """
    for layer, q in enumerate(queries):
        cache.attend(layer, q, q_lens=q_lens, accumulate=accumulate, **model.options(layer))
