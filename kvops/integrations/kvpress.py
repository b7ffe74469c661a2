"""NVIDIA's kvpress: a press chooses which keys of a prompt stay, and kvops returns the memory of the others.

    with kvops.integrations.kvpress.evicting(model, press) as compression:
        cache = KVOpsCache(model.config, max_tokens=4096, compression=compression)
        model.generate(**inputs, past_key_values=cache)

A press removes keys from the tensors of a cache, or masks them if heads keep different numbers. Here it gets a copy of
the prompt's keys and values. The keys in its result stay in the paged cache, head by head. The blocks of all other keys
are free for other sequences. Presses that select keys of the prompt, or of the cache while decoding, work.
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
from kvops.integrations.transformers.config import head_groups, storing_layers
from kvops.integrations.transformers.decoder import Decoder
from kvops.policies import Cached, Compression, Policy, Prefill, Seen

# An attention layer and the arguments of its last call, by name.
Call = tuple[nn.Module, dict[str, Any]]


@dataclass
class _Layer:
    """A layer of a cache as presses know it: keys and values ``[B, H, S, ·]``, which they replace."""

    keys: Tensor
    values: Tensor


class _Layers:
    """The cache that a press is shown: one layer with copies of what kvops holds."""

    def __init__(self, layer: int, keys: Tensor, values: Tensor) -> None:
        # Clones, because a press may write into its inputs.
        self.layers = {layer: _Layer(keys.clone(), values.clone())}


@dataclass(frozen=True)
class PressPolicy(Policy):
    """Scores a prompt's keys with a press: 1 for keys that stay, 0 for the others.

    Attributes:
        press: acts on the prompt; None keeps it whole.
        layers: the layers of the model that store keys.
        calls: for each of them, the arguments of its last call.
        kept: for each of them, bool ``[B, H, S]``, what a press has left and :class:`PressCompression` is to keep.
    """

    press: Any = None
    layers: Sequence[int] = ()
    calls: dict[int, Call] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)

    def score(self, seen: Seen) -> Tensor:
        if not isinstance(seen, Prefill):
            raise ValueError("compression: expected chunk=0, as a press scores whole prompts, got another")
        module, kwargs = self.calls[self.layers[seen.layer]]
        hidden = kwargs["hidden_states"]
        if hidden.shape[:2] != seen.k.shape[:2]:
            raise ValueError(
                "attention_mask: expected prompts of one length, as a press cannot tell padding from text: generate "
                "from one prompt at a time"
            )
        kwargs = {"cache_position": torch.arange(hidden.shape[1], device=hidden.device)} | kwargs
        kept = torch.ones(seen.positions.shape, dtype=torch.bool, device=hidden.device)
        if self.press is not None:
            kept = run(self.press, module, kwargs, seen.k.transpose(1, 2), seen.v.transpose(1, 2))
        self.kept[seen.layer] = kept
        return kept.float()


def _cache(kwargs: dict[str, Any]) -> Any:
    """The cache among the arguments of an attention layer: transformers 5.24 has renamed it."""
    return kwargs.get("cache", kwargs.get("past_key_values"))


def run(press: Any, module: nn.Module, kwargs: dict[str, Any], k: Tensor, v: Tensor) -> Tensor:
    """Let ``press`` act on keys and values ``[B, H, S, ·]``: which of them it leaves, bool ``[B, H, S]``."""
    name, layer = type(press).__name__, module.layer_idx
    shown = _Layers(layer, k, v)  # type: ignore[arg-type]
    module.masked_key_indices = None  # type: ignore[assignment]
    try:
        press.forward_hook(module, (), kwargs | {"past_key_values": shown}, (None, None))
    except Exception as error:
        raise ValueError(f"press: expected one that selects keys, {name} failed: {error}") from error
    left, masked = shown.layers[layer], module.masked_key_indices  # type: ignore[index]
    module.masked_key_indices = None  # type: ignore[assignment]
    sizes = left.keys.shape[3], left.values.shape[3]
    if left.keys.shape[:3] != left.values.shape[:3] or sizes != (k.shape[3], v.shape[3]):
        raise ValueError(
            f"press: expected one that keeps keys with their values, got {list(left.keys.shape)} keys and "
            f"{list(left.values.shape)} values from {name}"
        )
    kept = _which(torch.cat((k, v), -1), torch.cat((left.keys, left.values), -1))
    if masked is not None:
        kept[tuple(index.to(kept.device) for index in masked)] = False  # type: ignore[union-attr]
    return kept


@dataclass(frozen=True)
class PressCompression(Compression):
    """The :class:`kvops.policies.Compression` that :func:`evicting` yields."""

    policy: PressPolicy = field(default_factory=PressPolicy)

    def apply(self, cache: PagedKVCache, num_tokens: Sequence[int], rows: slice | Sequence[int] = slice(None)) -> None:
        for layer, kept in self.policy.kept.items():
            cache.keep(layer, kept, rows=rows)
        self.policy.kept.clear()


@dataclass
class _Decoding:
    """Shows a press that acts while decoding what the cache holds, after each layer of each pass."""

    press: Any
    policy: PressPolicy

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        start = self.policy.calls[module.layer_idx][1][_START]  # type: ignore[index]
        if not start:
            return  # the prompt
        hidden = kwargs["hidden_states"]
        # Not by cache.pools: after the last layer it would evict at once.
        paged, place = _cache(kwargs)._pools.of(module.layer_idx)
        lens = paged.seq_lens[place]
        width = int(lens[0, 0])
        if bool((lens != width).any()):
            raise ValueError(
                "press: expected heads of one length, as a press that acts while decoding sees one tensor, got "
                f"{int(lens.min())} to {int(lens.max())} keys in layer {place}: compress the prompt by a press that "
                "keeps the same number in every head, and generate from prompts of one length"
            )
        held = Cached(paged, place, hidden, rows=slice(None), width=width)
        positions = torch.arange(start, start + hidden.shape[1], device=hidden.device)
        kept = run(
            self.press,
            module,
            kwargs | {"cache_position": positions},
            held.k.transpose(1, 2),
            held.v.transpose(1, 2),
        )
        if not kept.all():
            self.policy.kept[place] = kept


# Where record() puts the number of tokens before a pass.
_START = "kvops_start"


@contextmanager
def evicting(model: nn.Module, press: Any) -> Iterator[PressCompression]:
    """A context in which ``press`` chooses the keys that stay.

    Args:
        model: a transformers model; its ``attn_implementation`` becomes ``"kvops"``.
        press: a press of kvpress that selects keys: of the prompt, also composed of several or with a ratio for each
            layer, and while decoding (``DecodingPress``, ``PrefillDecodingPress``).

    Yields:
        A compression for :class:`~kvops.integrations.transformers.KVOpsCache`. The prompts of a batch are of one
        length, without padding. With a press that acts while decoding, ``compression.every`` is its interval.

    Raises:
        ValueError: ``press`` acts in passes of its own, or needs the matrix of attention; the layers of ``model`` have
            different heads. Raised while the model runs: the press fails, or changes keys or values.
        ImportError: kvpress or transformers is not installed.
    """
    require("transformers")
    require("kvpress")
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from kvops.integrations.transformers.cache import KVOpsCache

    prompt, decoding = _parts(press)
    text = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    if len(head_groups(text)) > 1:
        raise ValueError(f"model: expected layers with heads of one number and size, got {type(model).__name__}")
    model.set_attn_implementation(enable())  # type: ignore[operator]
    # Importing kvpress wraps all registered attention functions to mask keys. Here those keys are evicted.
    ALL_ATTENTION_FUNCTIONS[NAME] = attention
    press.post_init_from_model(model)
    policy = PressPolicy(press=prompt, layers=storing_layers(text))

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = _cache(kwargs)
        start = cache.get_seq_length() if isinstance(cache, KVOpsCache) else 0
        policy.calls[module.layer_idx] = module, kwargs | {_START: start}  # type: ignore[index]

    decoder = model.base_model
    hooks = []
    for layer in decoder.layers:  # type: ignore[union-attr]
        if not hasattr(layer, "self_attn"):
            continue
        layer.self_attn.rotary_emb = decoder.rotary_emb  # type: ignore[union-attr]
        hooks.append(layer.self_attn.register_forward_pre_hook(record, with_kwargs=True))
        if decoding is not None:
            hooks.append(layer.self_attn.register_forward_hook(_Decoding(decoding, policy), with_kwargs=True))
    try:
        yield PressCompression(policy=policy, every=decoding.compression_interval if decoding is not None else 0)
    finally:
        for hook in hooks:
            hook.remove()
        policy.calls.clear()
        if decoding is not None:
            decoding.reset()


def _parts(press: Any) -> tuple[Any, Any]:
    """What acts on the prompt and what acts while decoding. Raises ValueError for a press that cannot be shown."""
    kvpress = require("kvpress")
    if not isinstance(press, kvpress.BasePress):
        raise ValueError(f"press: expected a press of kvpress, got {type(press).__name__}")
    parts = press, None
    if isinstance(press, kvpress.PrefillDecodingPress):
        parts = press.prefilling_press, press.decoding_press
    elif isinstance(press, kvpress.DecodingPress):
        parts = None, press
    prompt, decoding = parts
    once = kvpress.BasePress, kvpress.ComposedPress, kvpress.PerLayerCompressionPress
    for inner in _with_inner(prompt, kvpress.BasePress):
        if _owner(inner, "forward_hook") not in once or _owner(inner, "__call__") is not kvpress.BasePress:
            raise ValueError(
                f"press: expected one that acts once, on the whole prompt, got {type(inner).__name__}, which acts at "
                "other times too"
            )
        if _owner(inner, "forward_hook") is _owner(inner, "compress"):
            raise ValueError(f"press: expected one with a compress method, got {type(inner).__name__}")
    if decoding is not None and _owner(decoding, "forward_hook") is not kvpress.DecodingPress:
        raise ValueError(f"press: expected a DecodingPress for decoding, got {type(decoding).__name__}")
    for inner in _with_inner(decoding, kvpress.BasePress):
        if isinstance(inner, kvpress.AdaKVPress):
            raise ValueError(
                "press: expected one that keeps the same number of keys in every head while decoding, got AdaKVPress: "
                "use kvops.policies.AdaKV with Compression(every=...)"
            )
    for inner in (*_with_inner(prompt, kvpress.BasePress), *_with_inner(decoding, kvpress.BasePress)):
        if isinstance(inner, kvpress.ObservedAttentionPress):
            raise ValueError(
                "press: expected one that needs no matrix of attention, use kvops.policies.H2O in its place"
            )
    return parts


def _owner(press: Any, method: str) -> type | None:
    """The class that defines ``method`` of ``press``."""
    return next((kind for kind in type(press).__mro__ if method in vars(kind)), None)


def _with_inner(press: Any, kind: type) -> Iterator[Any]:
    """The press and its inner presses of class ``kind``; nothing for None."""
    if press is None:
        return
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
