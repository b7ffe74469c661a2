"""The model's passes over a paged cache: a prompt, tokens on top of it, and drafts, in chains or trees."""

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
    """What generation asks of a model; :class:`kvops.models.llama.Llama` is one.

    ``config`` has ``vocab_size``, ``num_layers``, ``num_kv_heads``, ``head_dim`` and ``max_positions``;
    ``embedding.weight`` tells device and dtype; ``rope`` are the rotary embedding's frequencies, float32 ``[D / 2]``,
    or None.
    """

    @property
    def config(self) -> Any: ...

    @property
    def embedding(self) -> nn.Embedding: ...

    @property
    def rope(self) -> Tensor | None: ...

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states [B, T, hidden] of tokens int64 [B, T] at positions int [B, T]; ``attend`` does the rest."""

    def options(self, layer: int) -> dict[str, Any]:
        """How a layer attends: ``window_left``, and maybe ``scale``, ``softcap`` and ``sinks``, for
        :func:`kvops.flash_attention`. Asked for when the layer attends, and later."""

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden] -> [..., vocab_size]."""


def is_decoder(value: object) -> TypeGuard[Decoder]:
    """Whether ``value`` has what a Decoder has. ``isinstance`` with a protocol overlooks, from Python 3.12 on, what
    torch's modules find in ``__getattr__``: parameters, buffers and submodules."""
    names = ("config", "embedding", "rope", "options", "logits")
    return callable(value) and all(hasattr(value, name) for name in names)


def new_cache(
    model: Decoder, *, max_batch: int, max_tokens: int, block_size: int = 16, num_blocks: int | None = None
) -> PagedKVCache:
    """A cache for ``max_batch`` sequences of ``max_tokens`` tokens of this model, of ``num_blocks`` blocks or with
    room for all of them uncompressed."""
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

    With a ``policy``, the prompt's keys are scored as they pass, ready for an eviction, or once the prompt has been
    recited where the policy asks for that; ``recent`` takes the last queries of every layer.

    Raises ValueError for a row that is not empty (looked at on the CPU and with ``KVOPS_DEBUG=1``).
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
    """Let the model repeat ``tokens``, int64 [1, S], all that ``row`` was given, from ``start`` on.

    The tokens are those of the text, whatever the model would have said; they attend to all that the row holds, however
    compressed, and the row stays as it is (unshared): neither their keys nor their values go into the cache.

    Returns, of each layer, what the recital of a chunk paid to the chunk's keys: ``[1, Hkv, W]`` in list order, W being
    the longest list and shorter ones padded in front; 0 for keys from before ``start``.

    Raises ValueError where a layer's window is narrower than the text, or the model has no positions left behind it.
    """
    rows, length = slice(row, row + 1), tokens.shape[1]
    lens = cache.seq_lens[:, row].tolist()
    width = max(map(max, lens))
    shape = 2, 1, cache.num_kv_heads, width
    found = [Recited(*torch.zeros(shape, dtype=torch.float32, device=cache.device)) for _ in lens]
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
                # All of the recital stands behind the chunk: there is nothing to mask.
                pair = q[:, :, heads], keys[:, judged, own], lse
                largest, total = found[layer]
                largest[:, own, judged] = attention_scores(*pair, reduce="max", group="max", **options)
                total[:, own, judged] = attention_scores(*pair, **options)
            return out

        model(read, positions, attend)
    return found


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

    The row holds the first ``held`` tokens, however compressed, and only the others are run. Returns the hidden states
    of the last token, [1, 1, hidden]. ``recent`` takes the last queries of every layer.
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
    """Run ``tokens``, int64 [1, S], from ``start`` on on top of what ``row`` holds of those before them, however
    compressed, and judge all its keys."""
    rows, new = slice(row, row + 1), tokens[:, start:]
    rope = model.rope
    positions = cache.extend(new.shape[1], rows=rows)
    # The one number that the host asks for in each chunk: how wide the gathered keys of a layer are.
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
    """Run tokens, int64 [B, T], on top of what the cache's ``rows`` hold; returns the hidden states [B, T, hidden].

    Args:
        q_lens: int32 [B]: the first ``q_lens[b]`` tokens of a row are real, all of them where None.
        parents: int32 [B, T], for trees, as :func:`kvops.verify_tree` takes them: a token sees itself and its
            ancestors, and its position is that of its depth. None: a chain.
        accumulate: adds the attention that the cached keys receive to their scores.
        queries: takes each layer's queries, for :func:`add_scores` once it is known which of the tokens stay.
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
    """Let ``policy`` judge all keys of a row of ``num_tokens`` tokens anew, by its last queries."""
    _judge(model, cache, row, policy, [recent.of(layer, row, num_tokens) for layer in range(cache.num_layers)])


def _judge(
    model: Decoder,
    cache: PagedKVCache,
    row: int,
    policy: Policy,
    queries: Sequence[Tensor],
    recited: Sequence[Recited] | None = None,
) -> None:
    """The same, given the queries of every layer, and what :func:`recite` found."""
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
    """Add to the scores what the tokens that stayed, ``q_lens`` int32 [B] of each row, attend to, and nothing else.

    It is a second pass of attention, behind the verification: during the first one nobody knows which drafts will
    stand, and float sums cannot be taken back exactly.
    """
    for layer, q in enumerate(queries):
        cache.attend(layer, q, q_lens=q_lens, accumulate=accumulate, **model.options(layer))
