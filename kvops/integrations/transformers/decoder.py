"""A causal language model of transformers for :func:`kvops.generation.generate.generate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from kvops.integrations.transformers.attention import enable
from kvops.integrations.transformers.config import cache_argument, expect_layers, head_dim_of, num_layers_of, rope_of
from kvops.integrations.transformers.masks import Mask
from kvops.integrations.transformers.placeholders import NotATensorError, Placeholder
from kvops.models.llama import Attend
from kvops.ops.attention import flash_attention

_GENERATE = "use model.generate"


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes that generation needs."""

    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int


class Decoder:
    """``generate(Decoder(model), prompts, draft="prompt_lookup", compression=Compression(4))``

    Runs a transformers model in this package's own loop: ragged batches without padding, drafts for all of them (by
    prompt lookup or by another ``Decoder``), trees, eviction per head.

    Args:
        model: a causal language model with layers of full or sliding attention; its ``attn_implementation`` becomes
            ``"kvops"``.

    The model is checked with three tokens, together and one after the other, against its own logits. A model on the
    meta device is not checked.

    Raises ValueError for a model that keeps other states than keys and values, shares them between layers, has layers
    with different heads, or does not take its positions from ``position_ids``.
    """

    def __init__(self, model: Any) -> None:
        text = model.config.get_text_config(decoder=True)
        expect_layers("model", text, states=False, advice=_GENERATE)
        if model.get_output_embeddings() is None:
            raise ValueError(f"model: expected a causal language model, got {type(model).__name__}")
        model.set_attn_implementation(enable())
        self.model = model
        self.embedding: nn.Embedding = model.get_input_embeddings()
        self.rope = rope_of(text)
        if self.rope is not None:
            self.rope = self.rope.to(self.embedding.weight.device)
        self._cache_argument = cache_argument(model.base_model)
        self._options: dict[int, dict[str, Any]] = {}
        self._softcap: float | None = getattr(text, "final_logit_softcapping", None)
        self._whole_head = False  # logits from the model's forward, if they are not a plain product
        if self.embedding.weight.is_meta:
            heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
            head_dim = head_dim_of(text)
        else:
            heads, head_dim = self._try(num_layers_of(text))
        self.config = DecoderConfig(
            vocab_size=text.vocab_size,
            num_layers=num_layers_of(text),
            num_kv_heads=heads,
            head_dim=head_dim,
            max_positions=getattr(text, "max_position_embeddings", None) or 2**31 - 1,  # some configs have no limit
        )

    def _try(self, num_layers: int) -> tuple[int, int]:
        """The number and size of KV heads, found by running three tokens, so that no list of families is needed."""
        device, kind = self.embedding.weight.device, type(self.model).__name__
        pad = getattr(self.model.config.get_text_config(decoder=True), "pad_token_id", None)
        tokens = torch.tensor([[token for token in range(1, 5) if token != pad][:3]], device=device)
        positions = torch.arange(3, device=device)[None]
        training = self.model.training
        self.model.eval()  # no dropout
        try:
            with torch.no_grad():
                expected = self.model(input_ids=tokens, use_cache=False).logits.float()
                whole = _Trial(self)
                hidden = self(tokens, positions, whole.attend)
                self._whole_head = not _agree(self.logits(hidden), expected)
                if not _agree(self.logits(hidden), expected):
                    raise ValueError(
                        f"model: expected logits that follow from tokens, positions from 0 on and the last hidden "
                        f"states, got {kind}, which goes by more than these: {_GENERATE}"
                    )
                whole.held.clear()
                parts = [self(tokens[:, part], positions[:, part], whole.attend) for part in (slice(0, 1), slice(1, 3))]
                if not _agree(self.logits(torch.cat(parts, 1)), expected):
                    raise ValueError(
                        f"model: expected one that goes by its position_ids, got {kind}, which counts tokens itself: "
                        f"{_GENERATE}"
                    )
        except NotATensorError as error:
            raise ValueError(f"{error} ({kind}): {_GENERATE}") from None
        finally:
            self.model.train(training)
        return whole.heads(num_layers)

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The hidden states after the last norm: tokens int64 [B, T], positions int [B, T] -> [B, T, hidden]."""
        cache = {self._cache_argument: _Handover(self, attend)}
        return self.model.base_model(
            input_ids=tokens, position_ids=positions.long(), **cache, use_cache=True
        ).last_hidden_state

    def options(self, layer: int) -> dict[str, Any]:
        """The options of a layer's last attention, as keywords of :func:`kvops.flash_attention`."""
        return dict(self._options[layer])

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden] -> logits [..., vocab_size]."""
        if self._whole_head:
            with _base_returns(self.model, hidden.reshape(1, -1, hidden.shape[-1])) as tokens:
                logits = self.model(input_ids=tokens, use_cache=False).logits
            return logits.reshape(*hidden.shape[:-1], logits.shape[-1])
        logits = self.model.get_output_embeddings()(hidden)
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)


@contextmanager
def _base_returns(model: Any, hidden: Tensor) -> Iterator[Tensor]:
    """A context in which the base model returns ``hidden [1, T, hidden]``. Yields tokens to call the model with."""
    base = model.base_model
    own = base.__dict__.get("forward")
    base.forward = lambda *args, **kwargs: _BaseOutput(hidden)
    try:
        yield torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    finally:
        del base.forward
        if own is not None:
            base.forward = own


@dataclass
class _BaseOutput:
    """The output of a base model, with None for everything but the hidden states."""

    last_hidden_state: Tensor

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def _agree(logits: Tensor, expected: Tensor) -> bool:
    if logits.shape != expected.shape:
        return False
    error, largest = (logits.float() - expected).abs().max(), expected.abs().max()
    return bool(error <= (1e-3 if logits.dtype == torch.float32 else 0.03) * largest)


@dataclass
class _Trial:
    """Stores keys and values of three tokens, and how the layers use them."""

    decoder: Decoder
    held: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before = self.held.get(layer, (k[:, :0], v[:, :0]))
        k, v = torch.cat((before[0], k), 1), torch.cat((before[1], v), 1)
        self.held[layer] = k, v
        return flash_attention(q, k, v, causal=True, **self.decoder.options(layer))[0]

    def heads(self, num_layers: int) -> tuple[int, int]:
        """The number and size of KV heads. Raises ValueError if layers differ."""
        shapes = {(k.shape[2], k.shape[3], v.shape[3]) for k, v in self.held.values()}
        if sorted(self.held) != list(range(num_layers)) or len(shapes) > 1:
            raise ValueError(
                f"model: expected keys with the same heads from all {num_layers} layers, got "
                f"{len(shapes)} kinds of heads from layers {sorted(self.held)}: {_GENERATE}"
            )
        heads, head_dim, v_head_dim = shapes.pop()
        if head_dim != v_head_dim:
            raise ValueError(
                f"model: expected keys and values of one size, got {head_dim} and {v_head_dim}: use model.generate "
                "with KVOpsCache"
            )
        return heads, head_dim


class _Handover(Placeholder):
    """Takes the place of a cache and stores nothing: a layer's keys and values go to ``attend``."""

    is_compileable, is_initialized = False, True

    def __init__(self, decoder: Decoder, attend: Attend) -> None:
        self._decoder, self._attend = decoder, attend

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        new = _NewTokens(self._decoder, self._attend, layer, keys.transpose(1, 2), values.transpose(1, 2))
        return new, new

    def get_seq_length(self, layer: int = 0) -> int:
        return 0

    def get_query_offset(self, layer: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer: int) -> tuple[int, int]:
        return query_length, 0

    def refuse(self, use: str) -> NoReturn:
        raise NotATensorError(f"model: expected one that keeps keys and values only, got {use.replace('on it', '')}")


@dataclass(eq=False)
class _NewTokens(Placeholder):
    """The keys and values that the attention function of :mod:`kvops.integrations.transformers` receives."""

    decoder: Decoder
    hand_over: Attend
    layer: int
    k: Tensor
    v: Tensor
    attended: bool = False

    @property
    def kv_length(self) -> int:
        return self.k.shape[1]

    def refuse(self, use: str) -> NoReturn:
        raise NotATensorError(f"model: expected one that hands keys and values straight on to attention, got {use}")

    def to(self, device: Any) -> _NewTokens:
        """Itself: transformers before 5.23 moves keys that layers share to the queries."""
        if device != self.k.device:
            self.refuse("one that reads .to")
        return self

    def attend(self, q: Tensor, mask: Mask, options: dict[str, Any]) -> Tensor:
        if self.attended:
            self.refuse("one whose layers share them")
        self.attended = True
        self.decoder._options[self.layer] = options | {"window_left": mask.window_left}
        return self.hand_over(self.layer, q, self.k, self.v)
