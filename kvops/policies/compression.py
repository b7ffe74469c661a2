"""How small a cache becomes, when it is compressed, and by which policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvops import checks
from kvops.cache import PagedKVCache
from kvops.policies.base import Policy, share_out
from kvops.policies.standout import Standout

_BUDGETS = ("ratio", "blocks", "tokens", "mib")
_DEFAULT_RATIO = 4.0


@dataclass(frozen=True)
class Compression:
    """How small the cache of a sequence becomes, by which policy, and how often it is compressed.

    The budget is the smallest of those given, ``ratio``, ``blocks``, ``tokens`` and ``mib``; with none given the cache
    becomes 4 times smaller. If the protected tokens alone take more than the budget (short prompts), exactly they are
    kept. :meth:`unmet` and the statistics of a generation then say so.

    The default policy, :class:`~kvops.policies.Standout`, keeps 94%, 85% and 70% of the full cache's quality at 4x, 8x
    and 16x, where SnapKV, which costs as much, keeps 75%, 68% and 53%: SmolLM2-135M-Instruct over prose, hidden facts,
    questions and digits (``docs/compression-study.md``; two of those contexts served to choose Standout's settings).
    :class:`~kvops.policies.ByHeart` keeps 95%, 94% and 78%, and takes 3.5 times as long to read a prompt.

    Attributes:
        ratio: how many times smaller than the full cache, in blocks, at least 1.
        policy: how keys are scored; the lowest scores are evicted.
        protect_first: the number of first tokens (attention sinks) that are never evicted.
        protect_last: the number of last tokens (the recent window) that are never evicted.
        every: 0 compresses once, after the prompt. N compresses again after every N decoded tokens. Drafts end
            before that point and only accepted ones count, so drafts do not change what is kept. With a policy that
            accumulates scores, drafts need a second pass of attention in each step.
        blocks: the most blocks, over all layers and heads.
        tokens: the most tokens that a head holds on average, in blocks.
        mib: the most MiB of keys and values.
        chunk: 0 reads a prompt whole and compresses it afterwards. N reads N tokens at a time and compresses to the
            budget after each chunk, so that the cache never holds more than the budget and one chunk. The policy then
            scores by the queries of a chunk instead of those at the prompt's end, and a recital follows each chunk.
    """

    ratio: float | None = None
    policy: Policy = field(default_factory=Standout)
    protect_first: int = 4
    protect_last: int = 32
    every: int = 0
    blocks: int | None = None
    tokens: int | None = None
    mib: float | None = None
    chunk: int = 0

    def __post_init__(self) -> None:
        for name in ("protect_first", "protect_last", "every", "chunk"):
            checks.expect_int(name, getattr(self, name), 0)
        for name in ("blocks", "tokens"):
            if getattr(self, name) is not None:
                checks.expect_int(name, getattr(self, name), 0)
        if self.ratio is not None:
            checks.expect_at_least("ratio", self.ratio, 1)
        if self.mib is not None:
            checks.expect_at_least("mib", self.mib, 0)
            checks.expect_finite("mib", self.mib)
        if not isinstance(self.policy, Policy):
            raise TypeError(f"policy: expected a kvops.policies.Policy, such as Standout(), got {self.policy!r}")

    def budget(self, cache: PagedKVCache, num_tokens: int) -> int:
        """Blocks that a sequence of ``num_tokens`` tokens may keep, over all layers and heads.

        It is the requested budget, or the blocks of the protected tokens if these are more (see :meth:`unmet`).
        """
        return max(self._asked(cache, num_tokens), self._protected(cache, num_tokens))

    def unmet(self, cache: PagedKVCache, num_tokens: int, *, grown_to: int | None = None) -> str | None:
        """A sentence that says why a compression of ``num_tokens`` tokens does not meet the budget; None if it does.

        ``grown_to``: the blocks that the sequence holds now. With ``every=0`` it grows after its only compression and
        may exceed a budget in ``blocks``, ``tokens`` or ``mib``.
        """
        asked, protected = self._asked(cache, num_tokens), self._protected(cache, num_tokens)
        if protected > asked:
            return (
                f"asked for {self._wishes()}, {asked} of the {cache.blocks_for(num_tokens)} blocks of {num_tokens} "
                f"tokens; kept {protected}, which the protected tokens alone take ({self.protect_first} first, "
                f"{self.protect_last} last)"
            )
        most = min(self._limits(cache), default=None)
        if grown_to is not None and most is not None and grown_to > most and not self.every:
            return (
                f"asked for {self._wishes()}, {most} blocks; holds {grown_to} at the end, because every=0 compresses "
                "the prompt alone and all new tokens are kept"
            )
        return None

    def _asked(self, cache: PagedKVCache, num_tokens: int) -> int:
        """The smallest of the budgets, in blocks."""
        full = cache.blocks_for(num_tokens)
        most = [full, *self._limits(cache)]
        if self.ratio is not None or len(most) == 1:
            most.append(math.floor(full / (_DEFAULT_RATIO if self.ratio is None else self.ratio)))
        return min(most)

    def _limits(self, cache: PagedKVCache) -> list[int]:
        """The budgets that do not depend on a sequence's length, in blocks."""
        limits = []
        if self.blocks is not None:
            limits.append(self.blocks)
        if self.tokens is not None:
            limits.append(cache.blocks_for(self.tokens))
        if self.mib is not None:
            limits.append(math.floor(self.mib * 2**20 / cache.bytes_per_block))
        return limits

    def _protected(self, cache: PagedKVCache, num_tokens: int) -> int:
        """The blocks of the tokens that are never evicted."""
        return cache.blocks_for(min(self.protect_first + self.protect_last, num_tokens))

    def _wishes(self) -> str:
        values = {name: getattr(self, name) for name in _BUDGETS}
        given = [
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in values.items()
            if value is not None
        ]
        return ", ".join(given) or f"ratio={_DEFAULT_RATIO:g}"

    def apply(self, cache: PagedKVCache, num_tokens: Sequence[int], rows: slice | Sequence[int] = slice(None)) -> None:
        """Evict from each of ``rows`` down to the budget of a sequence of ``num_tokens`` tokens."""
        protected = self.protect_first + self.protect_last
        layers = cache.num_layers
        lists = layers * cache.num_kv_heads
        weights = self.policy.layer_weights(layers)
        if weights is not None and len(weights) != layers:
            raise ValueError(
                f"policy: expected {layers} layer_weights, one for each layer, got {len(weights)} from "
                f"{type(self.policy).__name__}"
            )
        totals = [self.budget(cache, tokens) for tokens in num_tokens]
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
