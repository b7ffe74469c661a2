"""How far a cache is compressed, when, and by whose judgement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvops import checks
from kvops.cache import PagedKVCache
from kvops.policies.base import Policy, share_out
from kvops.policies.snapkv import SnapKV


@dataclass(frozen=True)
class Compression:
    """How far, by what policy and how often a sequence's cache is compressed.

    The budget is the least of those that are given, ``ratio``, ``blocks``, ``tokens`` and ``mib``; with none given the
    cache becomes 4 times smaller. Where the protected tokens alone need more than the budget (short prompts), they are
    what is kept; the statistics tell what came out.

    Attributes:
        ratio: how many times smaller than the full cache, in blocks, at least 1.
        policy: what a key is worth.
        protect_first: the sinks: that many first tokens are never evicted.
        protect_last: the recent window: that many last tokens are never evicted.
        every: 0: once, after the prefill. N: also after every N tokens that a sequence decodes. Drafts end before that
            point and only those that stand are counted: they change nothing. Where the policy accumulates scores that
            takes a second pass of attention in each step.
        blocks: at most so many blocks, over all layers and heads.
        tokens: at most the blocks of so many tokens in every list: what a head holds on average.
        mib: at most so many MiB of keys and values.
        chunk: 0: a prompt is read whole and compressed afterwards. N: it is read N tokens at a time and compressed to
            its budget after each: the cache never holds more than the budget and one chunk. The policy then judges by
            the queries of a chunk instead of those at the prompt's end, and each chunk is recited once it is read.
    """

    ratio: float | None = None
    policy: Policy = field(default_factory=SnapKV)
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
        """Blocks that a sequence of ``num_tokens`` tokens may keep, over all layers and heads."""
        full = cache.blocks_for(num_tokens)
        most = [full]
        if self.ratio is not None or (self.blocks, self.tokens, self.mib) == (None, None, None):
            most.append(math.floor(full / (4.0 if self.ratio is None else self.ratio)))
        if self.blocks is not None:
            most.append(self.blocks)
        if self.tokens is not None:
            most.append(cache.blocks_for(self.tokens))
        if self.mib is not None:
            most.append(math.floor(self.mib * 2**20 / cache.bytes_per_block))
        return max(min(most), cache.blocks_for(min(self.protect_first + self.protect_last, num_tokens)))

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
