"""NVIDIA's kvpress: a press chooses what stays of a prompt, and kvops evicts the rest for real.

    with kvops.integrations.kvpress.evicting(model, press) as compression:
        cache = KVOpsCache(model.config, max_tokens=4096, compression=compression)
        model.generate(**inputs, past_key_values=cache)

A press takes keys out of the tensors of a cache, or masks them where heads keep different numbers. Here it is shown the
prompt as it passes, what it leaves is read off its result, and those slots alone stay in the paged cache, head by head:
their blocks are free for other sequences. Presses that only select keys work, whatever they select by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from kvops.cache import PagedKVCache
from kvops.extras import require
from kvops.generation.passes import new_cache, prefill
from kvops.integrations.transformers.attention import NAME, attention, enable
from kvops.integrations.transformers.decoder import Decoder
from kvops.policies import Compression, Policy, Prefill, Seen

# What a layer was called with: the module, and its arguments by name.
Shown = tuple[nn.Module, dict[str, Any]]


@dataclass(frozen=True)
class PressPolicy(Policy):
    """Asks the press which keys of a prompt stay: 1 for those, 0 for the others."""

    press: Any = None
    shown: dict[int, Shown] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)

    def score(self, seen: Seen) -> Tensor:
        if not isinstance(seen, Prefill):
            raise ValueError("compression: expected every=0 and chunk=0, a press judges whole prompts")
        module, kwargs = self.shown[seen.layer]
        hidden = kwargs["hidden_states"]
        if hidden.shape[:2] != seen.k.shape[:2]:
            raise ValueError(
                "attention_mask: expected prompts of one length, a press cannot tell padding from text: generate from "
                "one prompt at a time"
            )
        kwargs.setdefault("cache_position", torch.arange(hidden.shape[1], device=hidden.device))
        k, v = seen.k.transpose(1, 2), seen.v.transpose(1, 2)
        module.masked_key_indices = None  # type: ignore[assignment]
        left, _ = self.press.compress(module, hidden, k, v, None, kwargs)
        masked = module.masked_key_indices
        module.masked_key_indices = None  # type: ignore[assignment]
        kept = _which(k, left)
        if masked is not None:
            kept[tuple(index.to(kept.device) for index in masked)] = False  # type: ignore[union-attr]
        self.kept[seen.layer] = kept
        return kept.float()


@dataclass(frozen=True)
class PressCompression(Compression):
    """What :func:`evicting` yields: takes the place of a :class:`kvops.policies.Compression`."""

    policy: PressPolicy = field(default_factory=PressPolicy)

    def apply(self, cache: PagedKVCache, num_tokens: Sequence[int], rows: slice | Sequence[int] = slice(None)) -> None:
        for layer, kept in self.policy.kept.items():
            cache.keep(layer, kept, rows=rows)
        self.policy.kept.clear()


@contextmanager
def evicting(model: nn.Module, press: Any) -> Iterator[PressCompression]:
    """While this lasts, prompts that ``model`` reads into a ``KVOpsCache`` with the yielded compression lose the keys
    that ``press`` (a kvpress press) would take from them. They are of one length, without padding.

    Raises ValueError for a press that does more than select keys (rotates, merges or prunes them, needs the matrix of
    attention, or further passes).
    """
    require("transformers")
    require("kvpress")
    from kvpress import BasePress, ObservedAttentionPress
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not isinstance(press, BasePress) or type(press).compress is BasePress.compress:
        raise ValueError(f"press: expected a press of kvpress with a compress method, got {type(press).__name__}")
    if isinstance(press, ObservedAttentionPress):
        raise ValueError("press: expected one that needs no matrix of attention, use kvops.policies.H2O in its place")
    model.set_attn_implementation(enable())  # type: ignore[operator]
    # kvpress wraps what is registered when it is imported, in order to mask keys that are gone here.
    ALL_ATTENTION_FUNCTIONS[NAME] = attention
    press.post_init_from_model(model)
    policy = PressPolicy(press=press)

    def show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        policy.shown[module.layer_idx] = module, dict(kwargs)  # type: ignore[index]

    decoder = model.base_model
    hooks = []
    for layer in decoder.layers:  # type: ignore[union-attr]
        layer.self_attn.rotary_emb = decoder.rotary_emb  # type: ignore[union-attr]
        hooks.append(layer.self_attn.register_forward_pre_hook(show, with_kwargs=True))
    try:
        yield PressCompression(policy=policy)
    finally:
        for hook in hooks:
            hook.remove()
        policy.shown.clear()


def _which(keys: Tensor, left: Tensor) -> Tensor:
    """Which of ``keys`` [B, H, S, D] are among ``left`` [B, H, n, D]: bool [B, H, S].

    Of keys that are the same to the last bit the first ones are taken: to attention they are one as good as the other,
    but for their values.
    """
    kept = torch.zeros(keys.shape[:3], dtype=torch.bool, device=keys.device)
    for place in product(*map(range, keys.shape[:2])):
        rows, chosen = keys[place], left[place]
        _, number = torch.unique(torch.cat((rows, chosen)), dim=0, return_inverse=True)
        own, wanted = number[: len(rows)], number[len(rows) :].bincount(minlength=int(number.max()) + 1)
        order = own.argsort(stable=True)
        ordered = own[order]
        first = torch.searchsorted(ordered, ordered)
        copy = torch.arange(len(rows), device=keys.device) - first  # how many of the same stand before
        kept[place][order] = copy < wanted[ordered]
        if int(kept[place].sum()) != len(chosen):
            raise ValueError("press: expected one that selects keys as they are, got one that changes them")
    return kept


def reader(press: Any) -> Callable[[Any, Sequence[int], float, int], PagedKVCache]:
    """The press for :func:`kvops.generation.evaluate.evaluate`: reads tokens and keeps what the press chooses.

    Its ``compression_ratio`` is set for each ratio. The model has to be a
    :class:`kvops.integrations.transformers.Decoder`.
    """

    @torch.no_grad()
    def read(model: Any, tokens: Sequence[int], ratio: float, room: int) -> PagedKVCache:
        if not isinstance(model, Decoder):
            raise ValueError(f"model: expected one that transformers loaded, for a press, got {type(model).__name__}")
        press.compression_ratio = 1 - 1 / ratio
        cache = new_cache(model, max_batch=1, max_tokens=len(tokens) + room)
        ids = torch.tensor([list(tokens)], device=model.embedding.weight.device)
        with evicting(model.model, press) as compression:
            prefill(model, cache, ids, 0, compression.policy)
            compression.apply(cache, [len(tokens)])
        return cache

    return read
