"""A transformers cache over :class:`kvops.PagedKVCache`: every head has its own length, and eviction frees memory."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer
from transformers.utils import logging

from kvops import checks
from kvops.cache import CacheStats, PagedKVCache
from kvops.integrations.transformers.attention import NAME
from kvops.integrations.transformers.columns import Columns
from kvops.integrations.transformers.config import expect_layers, head_groups, num_layers_of, rope_of, state_layers
from kvops.integrations.transformers.masks import Mask, QueryOffset, Source
from kvops.integrations.transformers.placeholders import NotATensorError, Placeholder
from kvops.integrations.transformers.pools import Pools, copies
from kvops.integrations.transformers.step import NewTokens, Step
from kvops.ops.attention import flash_attention
from kvops.policies import Compression

_OWN_CACHE = "generate with the model's own cache"
_NO_GRADIENT = "KVOpsCache has no gradient: generate under torch.no_grad(), train with use_cache=False"


class KVOpsCache(Cache):
    """A cache for transformers models that is compressed head by head.

    ``model.generate(..., past_key_values=KVOpsCache(model.config, max_tokens=4096, compression=Compression(4)))``

    Keys and values live in one :class:`kvops.PagedKVCache`, which attention reads in place. Padding is not stored. With
    a ``compression``, the prompt is scored while it is read and compressed before the next token. Decoded tokens are
    compressed as ``compression.every`` says. Other tokens use the freed blocks.

    Args:
        config: the config of the model, whose ``attn_implementation`` is ``"kvops"``.
        max_tokens: the most tokens of a sequence, prompt and new tokens.
        compression: how the cache is compressed. None keeps everything.
        num_blocks: the blocks of the pool, for all sequences. None makes room for all sequences uncompressed. The pool
            holds the prompts of a batch uncompressed until they are evicted. Several pools get parts of this number.
        block_size: the slots in a block.

    The first pass of the model counts as the prompt: with ``generate(..., prefill_chunk_size=N)`` only the first N
    tokens are compressed. :class:`~kvops.integrations.transformers.Decoder` reads prompts in chunks
    (``Compression.chunk``).

    Without a compression, layers with a sliding window give up the keys that no later token sees, several blocks at a
    time.

    Sequence lengths and positions count the tokens of the text, evicted ones included. So does a sliding window:
    padding within a row is no distance. Beams that continue from one row share its blocks until they write.
    :meth:`crop` removes drafts. While transformers uses drafts, evictions wait for it.

    Layers with other heads are in a pool of their own (:attr:`pools`); heads compete for the budget within a pool. A
    model that computes with keys after storing them (latent attention) gets copies of them in every pass, as from
    transformers' own cache. They cannot be compressed.

    Raises:
        ValueError: the model has layers of another kind than full, sliding or chunked attention; the compression has a
            ``chunk``, scores that cannot grow while decoding together with ``every``, or a policy with a recital.
            While the model runs: layers have heads that the config does not tell, attention is not causal, or there is
            a compression and the model computes with keys after storing them or has a dense mask or a position bias.
        TypeError: an argument of another type; while the model runs, ``attn_implementation`` is not ``"kvops"``, or the
            model computes with stored keys without making its mask by transformers' functions.
        RuntimeError: the model runs with gradients.
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
        super().__init__(layers=[])  # set below
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"config: expected that of a model, model.config, got {type(config).__name__}")
        checks.expect_int("max_tokens", max_tokens, 1)
        checks.expect_int("block_size", block_size, 1)
        if num_blocks is not None:
            checks.expect_int("num_blocks", num_blocks, 1)
        if not isinstance(compression, Compression | None):
            raise TypeError(f"compression: expected a kvops.policies.Compression, got {compression!r}")
        text = config.get_text_config(decoder=True)
        expect_layers("config", text, states=True, advice=_OWN_CACHE)
        if compression is not None:
            _expect_judging_once(compression)
        self.num_layers: int = num_layers_of(text)
        # Of the layers that store keys. Other layers may use the keys of an earlier layer.
        self._pools = Pools(head_groups(text), num_blocks, max_tokens, block_size)
        # transformers keeps the states of convolutions and linear attention.
        states = getattr(text, "number_of_conv_states", None) or 1
        with_state = state_layers(text)
        self.layers: list[Any] = [
            LinearAttentionLayer(number_of_states=states) if layer in with_state else _PagedLayer()
            for layer in range(self.num_layers)
        ]
        self._states = [layer for layer in self.layers if isinstance(layer, LinearAttentionLayer)]
        self._text = text
        self.max_tokens, self.compression = max_tokens, compression
        self.num_blocks, self.block_size = num_blocks, block_size
        self._length = 0  # of the rows, including padding, as transformers counts
        self._columns = Columns()  # which of them are stored
        self._since_eviction = 0
        self._rope = rope_of(text)  # an input of some policies
        self._recording = False  # tokens may be removed: evict after crop()
        self._due = False
        self._step: Step | None = None
        self._source: Source | None = None  # what the masks of this pass were made from: it tells the padding
        self._known = False  # that a pass stores keys in all layers
        # For each layer: the widest window of its keys, in positions before the query's own; -1 without a window.
        self._windows: dict[int, int] = {}
        self._trimmed = 0  # the length when keys outside the windows were last freed

    @property
    def paged(self) -> PagedKVCache | None:
        """The :class:`kvops.PagedKVCache`; None before the first token. RuntimeError if there are several."""
        if len(self._pools) > 1:
            raise RuntimeError(
                f"paged: expected a model whose layers have heads of one number and size, got {len(self._pools)} kinds "
                "of layers: see pools"
            )
        return next(iter(self.pools), None)

    @property
    def pools(self) -> tuple[PagedKVCache, ...]:
        """A :class:`kvops.PagedKVCache` for each kind of layers, by the number and size of heads."""
        self._settle()
        return tuple(self._pools)

    def stats(self) -> CacheStats:
        """The statistics of :attr:`paged`."""
        paged = self.paged
        if paged is None:
            raise RuntimeError("paged: expected a cache that a model has run with, got one that is new")
        return paged.stats()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Called by the model with ``[B, Hkv, T, ·]``. The attention function stores them, because it has the
        padding."""
        if layer_idx not in self._pools.places:
            raise ValueError(
                f"config: expected keys from layers {sorted(self._pools.places)}, as the config has it, got some from "
                f"layer {layer_idx}: {_OWN_CACHE}"
            )
        if self._length == 0 and self._step is None:
            self._pools.clear_for(key_states)
        self._pools.admit(layer_idx, key_states, value_states)
        new = NewTokens(self, layer_idx, key_states, value_states, self._length + key_states.shape[2])
        return new, new.values

    def _see(self, source: Source) -> None:
        self._source = source

    def attend(self, new: NewTokens, q: Tensor, mask: Mask, options: dict[str, Any]) -> Tensor:
        """Store ``new`` and attend, q ``[B, T, Hq, D]`` -> ``[B, T, Hq, Dv]``; called by the attention function.

        A model may attend to the same ``new`` several times in a pass: they are stored once.
        """
        if torch.is_grad_enabled() and q.requires_grad:
            raise RuntimeError(_NO_GRADIENT)
        if mask.bias is None and not mask.causal:
            raise ValueError("KVOpsCache: expected causal attention, got bidirectional")
        if mask.source is None and mask.packing is not None:
            raise ValueError("position_ids: expected one sequence to a row with a KVOpsCache, got packed sequences")
        if mask.bias is not None or options.get("bias") is not None:
            return self._attend_with_bias(new, q, mask, options)
        paged, place = self._pools.of(new.layer)
        if mask.chunk and self.compression is not None:
            raise ValueError(
                "compression: expected None with chunked attention, which policies do not know, got "
                f"{type(self.compression.policy).__name__}"
            )
        window = mask.chunk - 1 if mask.chunk else mask.window_left
        widest = self._windows.setdefault(new.layer, window)
        self._windows[new.layer] = -1 if min(window, widest) < 0 else max(window, widest)
        if new.step is not None:
            return new.step.attend_again(paged, place, q, mask, options)
        step = new.step = self._begin(new, mask.real_queries())
        out = step.store_and_attend(paged, place, (q, new.k, new.v), mask, options, self.compression)
        self._stored(step, new.layer)
        return out

    def _attend_with_bias(self, new: NewTokens, q: Tensor, mask: Mask, options: dict[str, Any]) -> Tensor:
        """Attend under a dense mask or beside a position bias, ``options["bias"]``."""
        name = "attention_mask" if mask.bias is not None else "position_bias"
        if self.compression is not None:
            raise ValueError(
                f"{name}: expected a causal mask with windows and padding only beside a compression, as policies score "
                f"keys by it, got {checks.shown(mask.bias if mask.bias is not None else options['bias'])}: leave out "
                "the compression"
            )
        paged, place = self._pools.of(new.layer)
        first = self._length == 0 if new.step is None else new.step.empty
        if new.step is None:
            step = new.step = self._begin(new, mask.real_queries())
            step.store(paged, place, new.k, new.v)
            self._stored(step, new.layer)
        if first and mask.bias is not None and q.shape[1] == new.k.shape[1]:  # all keys are at hand
            k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (new.k, new.v))
            return flash_attention(q, k, v, bias=mask.bias, **options)[0]
        bias = options["bias"] if mask.bias is None else mask.bias
        columns = self._columns_of_slots(new, mask.bias)
        options = {key: value for key, value in options.items() if key != "bias"}
        return new.step.attend_with_bias(paged, place, q, mask, bias, columns, options)

    def _columns_of_slots(self, new: NewTokens, mask: Tensor | None) -> Tensor | None:
        """int64 ``[B, S]``: the column of each slot of a layer; None where slot j is column j.

        Raises ValueError where ``mask``, bool or float ``[B or 1, H or 1, T, S]``, shows keys that are freed.
        """
        if self._trimmed == 0 or self._windows.get(new.layer, -1) < 0:
            return self._columns.order()
        # The lists lack keys outside of the windows, those of all heads the same ones.
        paged, place = self._pools.of(new.layer)
        positions = paged.positions[paged.block_tables[place, :, 0].long()].flatten(1)
        columns = self._columns.of_tokens(positions[:, : new.kv_length].long().clamp(0, new.kv_length - 1))
        if mask is not None and self._columns.shows_others(mask, columns, paged.seq_lens[place, :, 0]):
            raise ValueError(
                "attention_mask: expected a mask that hides the keys outside of the layer's sliding window, which are "
                f"freed, got {checks.shown(mask)}, which shows some: {_OWN_CACHE}"
            )
        return columns

    def copies(self, new: NewTokens) -> tuple[Tensor, Tensor]:
        """Store ``new`` and copy the keys and values of all tokens out of the cache, ``[B, Hkv, S, ·]`` with zeros for
        padding: what a model gets that computes with them before it attends."""
        if torch.is_grad_enabled() and new.k.requires_grad:
            raise RuntimeError(_NO_GRADIENT)
        if self._source is None or new.step is not None:
            raise NotATensorError(self.explain_use("one that computes with them"))
        if self.compression is not None:
            raise ValueError(
                "compression: expected None, as this model computes with keys after storing them, so that a policy "
                f"cannot see what it attends to, got {type(self.compression.policy).__name__}"
            )
        logging.get_logger(__name__).warning_once(
            "KVOpsCache: this model computes with keys after storing them, so that it gets copies of all of them in "
            "every pass, as from transformers' own cache."
        )
        paged, place = self._pools.of(new.layer)
        step = new.step = self._begin(new, self._source.real_queries(new.k.shape[1]))
        length = self._length
        step.store_by_column(paged, place, new.k, new.v, length)
        self._stored(step, new.layer)
        return copies(paged, place, length + step.num_tokens)

    def _begin(self, new: NewTokens, real: Tensor | None) -> Step:
        """The pass that stores ``new``; ``real`` is bool ``[B, T]``, False for padding."""
        if self._step is not None and new.layer in self._step.layers:
            self._take_back_broken_pass(self._step)
        if self._step is None:
            self._settle(force=True)
            self._step = Step(new.k.shape[1], real, self._rope, empty=self._length == 0)
            self._columns.add(new.k.shape[1], real)
        return self._step

    def _stored(self, step: Step, layer: int) -> None:
        step.layers.add(layer)
        if len(step.layers) == len(self._pools.places):
            self._finish(step)

    def explain_use(self, use: str) -> str:
        """The message for a model that did ``use`` with keys and values instead of passing them to attention."""
        implementation = getattr(self._text, "_attn_implementation", NAME)
        if implementation != NAME:
            return (
                f"attn_implementation: expected {NAME!r} with a KVOpsCache, got {implementation!r}: call "
                "model.set_attn_implementation(kvops.integrations.transformers.enable())"
            )
        return (
            "past_key_values: expected a model that hands new keys and values straight on to attention, got "
            f"{use}: {_OWN_CACHE}"
        )

    def _finish(self, step: Step) -> None:
        """Called when all layers have stored a pass' tokens. Eviction comes later: layers that share keys may still
        attend."""
        self._step, self._source, self._known = None, None, True
        self._length += step.num_tokens
        self._since_eviction = 0 if step.empty else self._since_eviction + 1
        every = self.compression.every if self.compression else 0
        self._due = step.empty or 0 < every <= self._since_eviction

    def _take_back_broken_pass(self, step: Step) -> None:
        """Undo the last pass if it has not stored its tokens in all layers, because an exception ended it."""
        if not self._known:
            missing = sorted(set(self._pools.places) - step.layers)
            raise RuntimeError(
                f"KVOpsCache: expected keys from every layer in the first pass, got none from layers {missing}: call "
                f"reset() where the pass was broken off by an error; where it was not, {_OWN_CACHE}"
            )
        self._undo()

    def _undo(self) -> None:
        """Remove what an interrupted pass has stored."""
        if self._step is not None and self._states:
            raise RuntimeError(
                "KVOpsCache: expected passes that end, as states of convolutions and linear attention cannot be taken "
                "back, got one that was broken off: call reset() and read the text again"
            )
        if self._step is not None:
            self._step.undo()
            self._columns.crop(self._step.num_tokens)
        self._step = None

    def _settle(self, force: bool = False) -> None:
        """Run the evictions that a finished pass made due; with drafts, only with ``force``."""
        if self._step is None and (force or not self._recording):
            self._evict()

    def _evict(self) -> None:
        if self._due and self.compression is not None:
            seen = next(iter(self._pools)).next_positions.tolist()
            # A policy's floor is one number for all rows of a call, and must not depend on the other rows.
            parts = [[row] for row in range(len(seen))] if self.compression.policy.floor else [range(len(seen))]
            for rows in parts:
                self._pools.compress(self.compression, [seen[row] for row in rows], rows)
            self._since_eviction = 0
        self._due = False
        if self.compression is None:
            self._trim()

    def _trim(self) -> None:
        """Free keys outside the windows, once it is worth a compaction."""
        windows = {layer: width for layer, width in self._windows.items() if width >= 0}
        reach = min(windows.values(), default=self._length)
        if self._length <= reach or self._length - self._trimmed < max(self.block_size, reach // 4):
            return
        for layer, window_left in windows.items():
            paged, place = self._pools.of(layer)
            positions = paged.positions[paged.block_tables[place].long()].flatten(2)
            paged.keep(place, positions >= (paged.next_positions - window_left)[:, None, None])
        self._trimmed = self._length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return QueryOffset.of(self._length, self._see)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_tokens

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return all(layer.is_croppable for layer in self._states)

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self.num_layers

    @property
    def is_linear(self) -> list[bool]:
        return [isinstance(layer, LinearAttentionLayer) for layer in self.layers]

    @property
    def is_dummy(self) -> list[bool]:
        return [layer not in self._pools.places and not state for layer, state in enumerate(self.is_linear)]

    @property
    def is_initialized(self) -> bool:
        return any(True for _ in self._pools)

    @property
    def batch_size(self) -> int:
        return next((pool.max_batch for pool in self._pools), -1)

    def __len__(self) -> int:
        return self.num_layers

    def __getattr__(self, name: str) -> Any:
        raise NotATensorError(_refusal(f"one that reads .{name}"))

    def __iter__(self) -> NoReturn:
        raise NotATensorError(_refusal("one that loops over it"))

    def __repr__(self) -> str:
        reports = [str(pool.stats()) for pool in self.pools] or ["empty"]
        return f"KVOpsCache({self._length} tokens, {'; '.join(reports)})"

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens of every row."""
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
        if tokens_to_remove and not self.is_croppable:
            raise ValueError(
                f"tokens_to_remove: expected 0, got {tokens_to_remove}: the states of linear attention cannot be taken "
                "back"
            )
        self._undo()
        for layer in self._states if tokens_to_remove or self._recording else ():
            layer.crop(tokens_to_remove)
        if tokens_to_remove:
            for pool in self._pools:
                pool.rollback(-tokens_to_remove)
            self._length += tokens_to_remove
            self._columns.crop(-tokens_to_remove)
        self._evict()

    def activate_past_recording(self) -> None:
        super().activate_past_recording()
        self._recording = True

    def reset(self) -> None:
        """Empty the cache. The next batch may have another size; one of the same size uses the same memory."""
        for pool in self._pools:
            pool.free()
        for layer in self._states:
            layer.reset()
        self._length, self._since_eviction, self._trimmed = 0, 0, 0
        self._recording, self._due, self._step, self._source = False, False, None, None
        self._columns.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue from row ``beam_idx[i]``. Rows share blocks until they write: no key is copied here."""
        self._settle_rows()
        order = beam_idx.tolist()
        self._columns.take(order)
        for pool in self._pools:
            pool.reorder(order)
        for layer in self._states:
            layer.reorder_cache(beam_idx.long())  # type: ignore[arg-type]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times. The copies share their blocks."""
        self._take_rows([row for row in range(self.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, an int64 or a bool tensor, in this order."""
        self._take_rows(torch.arange(self.batch_size, device=indices.device)[indices].tolist())

    def _take_rows(self, order: list[int]) -> None:
        self._settle_rows()
        self._pools.with_rows(order)
        self._columns.take(order)
        for layer in self._states:
            layer.reorder_cache(torch.tensor(order))  # type: ignore[arg-type]

    def _settle_rows(self) -> None:
        """What is due is done before rows move: rows that share blocks would need copies for it."""
        self._undo()
        self._settle(force=True)


class _PagedLayer(Placeholder):
    """A layer whose keys and values are in the paged cache."""

    def refuse(self, use: str) -> NoReturn:
        raise NotATensorError(_refusal(f"{use} in a layer"))


def _refusal(use: str) -> str:
    return f"past_key_values: expected a model that works with any cache of transformers, got {use}: {_OWN_CACHE}"


def _expect_judging_once(compression: Compression) -> None:
    """Raise ValueError for a compression that needs more than one pass over the prompt and scores that grow."""
    if compression.chunk:
        raise ValueError(f"compression: expected chunk=0, as transformers reads prompts, got {compression.chunk}")
    if compression.every and compression.policy.accumulate is None:
        raise ValueError(
            f"compression: expected every=0 with {type(compression.policy).__name__}, whose scores do not grow "
            "while decoding: generate with kvops.integrations.transformers.Decoder, which scores keys again"
        )
    if compression.policy.recital is not None:
        raise ValueError(
            f"compression: expected a policy without recital, as a cache cannot make the model read again, got "
            f"{type(compression.policy).__name__}: generate with kvops.integrations.transformers.Decoder, which can"
        )
