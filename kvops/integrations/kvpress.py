"""NVIDIA's kvpress: a press chooses which keys of a prompt stay, and kvops returns the memory of the others.

    with kvops.integrations.kvpress.evicting(model, press) as compression:
        cache = KVOpsCache(model.config, max_tokens=4096, compression=compression)
        model.generate(**inputs, past_key_values=cache)

A press removes keys from the tensors of a cache, or masks them if heads keep different numbers. Here it gets a copy of
the prompt's keys and values. The keys in its result stay in the paged cache, head by head. The blocks of all other keys
are free for other sequences. Every press that selects keys once, while the prompt is read, works.
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

# An attention layer and the arguments of its last call, by name.
Call = tuple[nn.Module, dict[str, Any]]


@dataclass(frozen=True)
class PressPolicy(Policy):
    """Scores a prompt's keys with a press: 1 for keys that stay, 0 for the others."""

    press: Any = None
    calls: dict[int, Call] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)

    def score(self, seen: Seen) -> Tensor:
        if not isinstance(seen, Prefill):
            raise ValueError(
                "compression: expected every=0 and chunk=0, as a press scores whole prompts, got one of them"
            )
        module, kwargs = self.calls[seen.layer]
        hidden = kwargs["hidden_states"]
        if hidden.shape[:2] != seen.k.shape[:2]:
            raise ValueError(
                "attention_mask: expected prompts of one length, as a press cannot tell padding from text: generate "
                "from one prompt at a time"
            )
        kwargs.setdefault("cache_position", torch.arange(hidden.shape[1], device=hidden.device))
        k, v = seen.k.transpose(1, 2), seen.v.transpose(1, 2)
        module.masked_key_indices = None  # type: ignore[assignment]
        left = self._compress(module, hidden, k, v, kwargs)
        masked = module.masked_key_indices
        module.masked_key_indices = None  # type: ignore[assignment]
        kept = _which(torch.cat((k, v), -1), left)
        if masked is not None:
            kept[tuple(index.to(kept.device) for index in masked)] = False  # type: ignore[union-attr]
        self.kept[seen.layer] = kept
        return kept.float()

    def _compress(self, module: nn.Module, hidden: Tensor, k: Tensor, v: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The keys and values that the press keeps, concatenated: ``[B, H, n, D + Dv]``."""
        name = type(self.press).__name__
        try:
            # Clones, because a press may write into its inputs.
            left_k, left_v = self.press.compress(module, hidden, k.clone(), v.clone(), None, kwargs)
        except Exception as error:
            raise ValueError(f"press: expected one that selects keys, {name} failed: {error}") from error
        if left_k.shape[:3] != left_v.shape[:3] or (left_k.shape[3], left_v.shape[3]) != (k.shape[3], v.shape[3]):
            raise ValueError(
                f"press: expected one that keeps keys with their values, got {list(left_k.shape)} keys and "
                f"{list(left_v.shape)} values from {name}"
            )
        return torch.cat((left_k, left_v), -1)


@dataclass(frozen=True)
class PressCompression(Compression):
    """The :class:`kvops.policies.Compression` that :func:`evicting` yields."""

    policy: PressPolicy = field(default_factory=PressPolicy)

    def apply(self, cache: PagedKVCache, num_tokens: Sequence[int], rows: slice | Sequence[int] = slice(None)) -> None:
        for layer, kept in self.policy.kept.items():
            cache.keep(layer, kept, rows=rows)
        self.policy.kept.clear()


@contextmanager
def evicting(model: nn.Module, press: Any) -> Iterator[PressCompression]:
    """A context in which ``press`` chooses the keys that stay of prompts.

    Args:
        model: a transformers model; its ``attn_implementation`` becomes ``"kvops"``.
        press: a press of kvpress that selects keys while the prompt is read.

    Yields:
        A compression for :class:`~kvops.integrations.transformers.KVOpsCache`. The prompts of a batch are of one
        length, without padding.

    Raises:
        ValueError: ``press`` acts at other times than on the whole prompt, or needs the matrix of attention. Raised
            while the prompt is read: the press fails, or changes keys or values.
        ImportError: kvpress or transformers is not installed.
    """
    require("transformers")
    require("kvpress")
    from kvpress import BasePress, ObservedAttentionPress
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not isinstance(press, BasePress) or type(press).compress is BasePress.compress:
        raise ValueError(f"press: expected a press of kvpress with a compress method, got {type(press).__name__}")
    for inner in _with_inner(press, BasePress):
        if type(inner).forward_hook is not BasePress.forward_hook or type(inner).__call__ is not BasePress.__call__:
            raise ValueError(
                f"press: expected one that acts once, on the whole prompt, got {type(inner).__name__}, which acts at "
                "other times too"
            )
    if isinstance(press, ObservedAttentionPress):
        raise ValueError("press: expected one that needs no matrix of attention, use kvops.policies.H2O in its place")
    model.set_attn_implementation(enable())  # type: ignore[operator]
    # Importing kvpress wraps all registered attention functions to mask keys. Here those keys are evicted.
    ALL_ATTENTION_FUNCTIONS[NAME] = attention
    press.post_init_from_model(model)
    policy = PressPolicy(press=press)

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        policy.calls[module.layer_idx] = module, dict(kwargs)  # type: ignore[index]

    decoder = model.base_model
    hooks = []
    for layer in decoder.layers:  # type: ignore[union-attr]
        layer.self_attn.rotary_emb = decoder.rotary_emb  # type: ignore[union-attr]
        hooks.append(layer.self_attn.register_forward_pre_hook(record, with_kwargs=True))
    try:
        yield PressCompression(policy=policy)
    finally:
        for hook in hooks:
            hook.remove()
        policy.calls.clear()


def _with_inner(press: Any, kind: type) -> Iterator[Any]:
    """The press and its inner presses of class ``kind``."""
    yield press
    for value in vars(press).values():
        for inner in value if isinstance(value, list | tuple) else (value,):
            if isinstance(inner, kind):
                yield from _with_inner(inner, kind)


def _which(keys: Tensor, left: Tensor) -> Tensor:
    """Which of ``keys`` [B, H, S, D] are among ``left`` [B, H, n, D]: bool [B, H, S].

    Of keys with equal bits the first ones are taken.
    """
    kept = torch.zeros(keys.shape[:3], dtype=torch.bool, device=keys.device)
    for place in product(*map(range, keys.shape[:2])):
        rows, chosen = keys[place], left[place]
        _, number = torch.unique(torch.cat((rows, chosen)), dim=0, return_inverse=True)
        own, wanted = number[: len(rows)], number[len(rows) :].bincount(minlength=int(number.max()) + 1)
        order = own.argsort(stable=True)
        ordered = own[order]
        first = torch.searchsorted(ordered, ordered)
        copy = torch.arange(len(rows), device=keys.device) - first  # the number of equal keys before it
        kept[place][order] = copy < wanted[ordered]
        if int(kept[place].sum()) != len(chosen):
            raise ValueError("press: expected one that selects keys and values as they are, got one that changes them")
    return kept


def reader(press: Any) -> Callable[[Any, Sequence[int], float, int], PagedKVCache]:
    """Make a reader of a press for :func:`kvops.generation.evaluate.evaluate`.

    It reads tokens and keeps the keys that the press chooses. ``press.compression_ratio`` is set for each ratio. The
    model must be a :class:`kvops.integrations.transformers.Decoder`.
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
