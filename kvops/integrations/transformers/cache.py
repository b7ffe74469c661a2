"""A transformers cache over :class:`kvops.PagedKVCache`: every head has its own length, and eviction frees memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvops import checks
from kvops.cache import CacheStats, PagedKVCache
from kvops.integrations.transformers.config import rope_of
from kvops.integrations.transformers.masks import Mask
from kvops.ops.attention import flash_attention
from kvops.policies import Compression, Prefill


class NewTokens:
    """What :meth:`KVOpsCache.update` returns in the place of keys and values: the new ones, and where they belong."""

    def __init__(self, cache: KVOpsCache, layer: int, keys: Tensor, values: Tensor) -> None:
        self._cache, self._layer, self._keys, self._values = cache, layer, keys, values

    def attend(self, q: Tensor, mask: Mask, options: dict[str, Any]) -> Tensor:
        """q ``[B, T, Hq, D]`` -> ``[B, T, Hq, Dv]``; the keys and values are in the cache afterwards."""
        k, v = self._keys.transpose(1, 2), self._values.transpose(1, 2)
        return self._cache._attend(self._layer, q, k, v, mask, options)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{name}: a KVOpsCache holds blocks, not tensors of keys and values: use it with a model that has "
            "attn_implementation='kvops'"
        )


class KVOpsCache(Cache):
    """``model.generate(..., past_key_values=KVOpsCache(model.config, max_tokens=4096, compression=Compression(4)))``

    Keys and values live in one :class:`kvops.PagedKVCache`, which attention reads in place; padding is never stored.
    With a ``compression``, prompts are scored while they are read and evicted right behind the first pass of the model
    (and again where ``compression.every`` says so); the freed blocks serve whatever comes next.

    Args:
        config: of the model.
        max_tokens: the longest a sequence may become, prompt and new tokens.
        compression: None keeps everything.
        num_blocks: of the pool, for all sequences; None makes room for all of them uncompressed. A pool must hold the
            prompts of a batch uncompressed for a moment.
        block_size: slots in a block.

    Attributes:
        paged: the :class:`kvops.PagedKVCache`, once the first token has come in (it brings batch size, dtype and
            device).

    A first pass counts as the prompt: with ``generate(..., prefill_chunk_size=N)`` the first N tokens alone are judged
    and compressed. :class:`~kvops.integrations.transformers.Decoder` reads prompts in chunks (``Compression.chunk``).

    Without a compression, layers with a sliding window give up what no later token sees, a few blocks at a time.

    Sequence lengths and positions are those of the text, whatever has been evicted. A batch is one for good: beam
    search and selecting rows raise. Drafts are taken back by :meth:`crop`, and evictions wait for it where transformers
    announces drafts.
    """

    def __init__(
        self,
        config: Any,
        *,
        max_tokens: int,
        compression: Compression | None = None,
        num_blocks: int | None = None,
        block_size: int = 16,
    ) -> None:
        super().__init__(layers=[])
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"config: expected that of a model, model.config, got {type(config).__name__}")
        checks.expect_int("max_tokens", max_tokens, 1)
        checks.expect_int("block_size", block_size, 1)
        if num_blocks is not None:
            checks.expect_int("num_blocks", num_blocks, 1)
        if not isinstance(compression, Compression | None):
            raise TypeError(f"compression: expected a kvops.policies.Compression, got {compression!r}")
        text = config.get_text_config(decoder=True)
        others = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if others:
            raise ValueError(f"config: expected layers of full or sliding attention, got {', '.join(sorted(others))}")
        if compression is not None and compression.chunk:
            raise ValueError(f"compression: expected chunk=0, as transformers reads prompts, got {compression.chunk}")
        if compression is not None and compression.every and compression.policy.accumulate is None:
            raise ValueError(
                f"compression: expected every=0 with {type(compression.policy).__name__}, whose scores do not grow "
                "while decoding: generate with kvops.integrations.transformers.Decoder, which judges anew"
            )
        if compression is not None and compression.policy.recital is not None:
            raise ValueError(
                f"compression: expected a policy without recital, as a cache cannot make the model read again, got "
                f"{type(compression.policy).__name__}: generate with kvops.integrations.transformers.Decoder, which can"
            )
        self.num_layers: int = text.num_hidden_layers
        self.max_tokens, self.compression = max_tokens, compression
        self.num_blocks, self.block_size = num_blocks, block_size
        self.paged: PagedKVCache | None = None
        self._length = 0  # of the rows, padding included: what transformers counts
        self._since_eviction = 0
        self._rope = rope_of(text)  # some policies judge by it
        self._recording = False  # tokens may be taken back: evict behind crop()
        self._due = False
        self._step: _Step | None = None
        self._windows: dict[int, int] = {}  # of the layers that have one, in positions before the query's own
        self._trimmed = 0  # the length when keys behind the windows were given up last

    def stats(self) -> CacheStats:
        """What the cache holds, in blocks and bytes."""
        return self._pool().stats()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Called by the model with ``[B, Hkv, T, ·]``; the attention function stores them, as it knows of padding."""
        if self.paged is None:
            batch, heads, _, head_dim = key_states.shape
            per_list = -(-self.max_tokens // self.block_size)
            self.paged = PagedKVCache(
                num_layers=self.num_layers,
                num_kv_heads=heads,
                head_dim=head_dim,
                v_head_dim=value_states.shape[3],
                num_blocks=self.num_blocks or self.num_layers * heads * batch * per_list,
                max_batch=batch,
                max_tokens=self.max_tokens,
                block_size=self.block_size,
                dtype=key_states.dtype,
                device=key_states.device,
            )
        elif key_states.shape[0] != self.paged.max_batch:
            raise ValueError(
                f"key_states: expected a batch of {self.paged.max_batch}, as before, got {key_states.shape[0]}"
            )
        new = NewTokens(self, layer_idx, key_states, value_states)
        return new, new

    def _pool(self) -> PagedKVCache:
        if self.paged is None:
            raise RuntimeError("paged: expected a cache that a model has run with, got one that is new")
        return self.paged

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Mask, options: dict[str, Any]) -> Tensor:
        if torch.is_grad_enabled() and q.requires_grad:
            raise RuntimeError("KVOpsCache has no gradient: generate under torch.no_grad(), train with use_cache=False")
        if not mask.causal:
            raise ValueError("KVOpsCache: expected causal attention, got bidirectional")
        paged = self._pool()
        if self._step is not None and layer in self._step.layers:
            self._undo()
        if self._step is None:
            self._evict()
            self._step = _Step(paged, mask, q.shape[1], self._rope, empty=self._length == 0)
        step = self._step
        step.layers.add(layer)
        if mask.window_left >= 0:
            self._windows[layer] = mask.window_left
        out = step.attend(layer, (q, k, v), mask.window_left, options, self.compression)
        if layer == self.num_layers - 1:
            self._step = None
            self._length += q.shape[1]
            self._since_eviction = 0 if step.empty else self._since_eviction + 1
            every = self.compression.every if self.compression else 0
            self._due = step.empty or 0 < every <= self._since_eviction
            if not self._recording:
                self._evict()
        return out

    def _undo(self) -> None:
        """Take back what a pass that was broken off has put in."""
        if self._step is not None:
            self._step.undo()
        self._step = None

    def _evict(self) -> None:
        if self._due and self.compression is not None:
            seen = self._pool().next_positions.tolist()
            # A policy's floor is one number for all rows of a call, and no row's may depend on the others.
            parts = [[row] for row in range(len(seen))] if self.compression.policy.floor else [range(len(seen))]
            for rows in parts:
                self.compression.apply(self._pool(), [seen[row] for row in rows], rows)
            self._since_eviction = 0
        self._due = False
        if self.compression is None:
            self._trim()

    def _trim(self) -> None:
        """Give up keys behind the windows, once it is worth a compaction."""
        reach = min(self._windows.values(), default=self._length)
        if self._length <= reach or self._length - self._trimmed < max(self.block_size, reach // 4):
            return
        paged = self._pool()
        for layer, window_left in self._windows.items():
            positions = paged.positions[paged.block_tables[layer].long()].flatten(2)
            paged.keep(layer, positions >= (paged.next_positions - window_left)[:, None, None])
        self._trimmed = self._length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_tokens

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self.num_layers

    @property
    def is_linear(self) -> list[bool]:
        return [False] * self.num_layers

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * self.num_layers

    @property
    def is_initialized(self) -> bool:
        return self.paged is not None

    @property
    def batch_size(self) -> int:
        return -1 if self.paged is None else self.paged.max_batch

    def __len__(self) -> int:
        return self.num_layers

    def __repr__(self) -> str:
        return f"KVOpsCache({self._length} tokens, {self.paged and self.paged.stats()})"

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` tokens of every row back."""
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 passes a 0-d tensor
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected a number from 0 down, got {tokens_to_remove}")
        if self._length + tokens_to_remove < 0:
            raise ValueError(f"tokens_to_remove: expected at least {-self._length}, got {tokens_to_remove}")
        if self._length + tokens_to_remove < self._trimmed:
            raise ValueError(
                f"tokens_to_remove: expected at least {self._trimmed - self._length}, got {tokens_to_remove}: what "
                "earlier tokens saw through a sliding window is gone"
            )
        self._undo()
        if tokens_to_remove:
            self._pool().rollback(-tokens_to_remove)
            self._length += tokens_to_remove
        self._evict()

    def activate_past_recording(self) -> None:
        self._recording = True

    def reset(self) -> None:
        """Empty the cache; its blocks stay for the next batch of the same size."""
        if self.paged is not None:
            self.paged.free()
        self._length, self._since_eviction, self._trimmed = 0, 0, 0
        self._recording, self._due, self._step = False, False, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("KVOpsCache cannot reorder rows: use num_beams=1")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise NotImplementedError("KVOpsCache cannot copy rows: repeat the prompts in the batch instead")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise NotImplementedError("KVOpsCache cannot drop rows: generate with the batch that is wanted")


class _Step:
    """One pass of the model: the positions of its tokens, and where its padding is."""

    def __init__(self, paged: PagedKVCache, mask: Mask, num_tokens: int, rope: Tensor | None, empty: bool) -> None:
        self.paged, self.rope, self.empty = paged, rope, empty
        self.q_lens: Tensor | None = None
        self.place: Tensor | None = None  # where the t-th real token of each row stands among the tokens
        packing = mask.packing
        # A single new token is never padding.
        if (
            packing is not None
            and packing.num_queries is not None
            and packing.first_query is not None
            and num_tokens > 1
        ):
            self.q_lens, first = packing.num_queries, packing.first_query
            tokens = torch.arange(num_tokens, device=paged.device)
            self.place = (first[:, None] + tokens).clamp(max=num_tokens - 1)
        self.num_tokens = num_tokens
        self.positions = paged.extend(num_tokens, q_lens=self.q_lens)
        self.layers: set[int] = set()  # that have begun

    def undo(self) -> None:
        self.paged.rollback(self.num_tokens if self.q_lens is None else self.q_lens)

    def attend(
        self,
        layer: int,
        qkv: tuple[Tensor, Tensor, Tensor],
        window_left: int,
        options: dict[str, Any],
        compression: Compression | None,
    ) -> Tensor:
        """q, k and v ``[B, T, heads, ·]`` of one layer -> ``[B, T, Hq, Dv]``."""
        if self.place is None or self.q_lens is None:
            return self._attend(layer, qkv, window_left, options, compression)
        q, k, v = qkv
        rows = torch.arange(len(q), device=q.device)[:, None].expand_as(self.place)
        # Real tokens first, as the cache wants them, and back.
        sorted_qkv = q[rows, self.place], k[rows, self.place], v[rows, self.place]
        out = self._attend(layer, sorted_qkv, window_left, options, compression)
        real = torch.arange(q.shape[1], device=q.device) < self.q_lens[:, None]
        back = torch.zeros_like(out)
        back[rows[real], self.place[real]] = out[real]
        return back

    def _attend(
        self,
        layer: int,
        qkv: tuple[Tensor, Tensor, Tensor],
        window_left: int,
        options: dict[str, Any],
        compression: Compression | None,
    ) -> Tensor:
        q, k, v = qkv
        self.paged.append(layer, k, v, self.positions, q_lens=self.q_lens)
        if not (self.empty and compression):
            accumulate = compression.policy.accumulate if compression and compression.every else None
            return self.paged.attend(
                layer,
                q,
                q_lens=self.q_lens,
                query_positions=self.positions,
                window_left=window_left,
                accumulate=accumulate,
                **options,
            )
        # The prompt, whose keys are scored as they pass: row by row where lengths differ.
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
        whole = [(slice(None), q.shape[1])]
        parts = whole if self.q_lens is None else [(slice(b, b + 1), n) for b, n in enumerate(self.q_lens.tolist())]
        for rows, length in parts:
            own = q[rows, :length], k[rows, :length], v[rows, :length]
            out[rows, :length], lse = flash_attention(*own, causal=True, window_left=window_left, **options)
            rope = None if self.rope is None else self.rope.to(q.device)
            place = layer, self.paged.num_layers
            seen = Prefill(*own, lse, window_left, *place, rope, options["scale"], options["softcap"])
            self.paged.set_scores(layer, compression.policy.checked_score(seen), rows=rows)
        return out
