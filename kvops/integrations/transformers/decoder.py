"""A causal language model of transformers for :func:`kvops.generation.generate.generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from kvops.integrations.transformers.attention import enable
from kvops.integrations.transformers.config import head_dim_of, rope_of
from kvops.integrations.transformers.masks import Mask
from kvops.integrations.transformers.placeholders import NotATensorError, Placeholder
from kvops.models.llama import Attend
from kvops.ops.attention import flash_attention


@dataclass(frozen=True)
class DecoderConfig:
    """What generation wants to know."""

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

    Raises ValueError for a model whose layers or logits are of another kind; two tokens are run to see.
    """

    def __init__(self, model: Any) -> None:
        text = model.config.get_text_config(decoder=True)
        others = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if others:
            raise ValueError(f"model: expected layers of full or sliding attention, got {', '.join(sorted(others))}")
        if model.get_output_embeddings() is None:
            raise ValueError(f"model: expected a causal language model, got {type(model).__name__}")
        model.set_attn_implementation(enable())
        self.model = model
        self.embedding: nn.Embedding = model.get_input_embeddings()
        self.rope = rope_of(text)
        if self.rope is not None:
            self.rope = self.rope.to(self.embedding.weight.device)
        self._options: dict[int, dict[str, Any]] = {}
        self._softcap: float | None = getattr(text, "final_logit_softcapping", None)
        self.config = DecoderConfig(
            vocab_size=text.vocab_size,
            num_layers=text.num_hidden_layers,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_dim=head_dim_of(text),
            max_positions=getattr(text, "max_position_embeddings", None) or 2**31 - 1,  # a config may know no end
        )
        if not self.embedding.weight.is_meta:
            self._try()

    def _try(self) -> None:
        """Two tokens through the model and through this class: no list of families tells which do more than is done
        here."""
        device = self.embedding.weight.device
        tokens, positions = torch.zeros(1, 2, dtype=torch.int64, device=device), torch.arange(2, device=device)[None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flash_attention(q, k, v, causal=True, **self.options(layer))[0]

        training = self.model.training
        self.model.eval()  # no dropout
        kind = type(self.model).__name__
        try:
            with torch.no_grad():
                got = self.logits(self(tokens, positions, attend)).float()
                expected = self.model(input_ids=tokens, use_cache=False).logits.float()
        except NotATensorError as error:
            raise ValueError(f"model: {error} ({kind}): use model.generate") from None
        finally:
            self.model.train(training)
        if got.shape != expected.shape or bool((got - expected).abs().max() > 0.01 * expected.abs().max()):
            raise ValueError(
                f"model: expected logits as the output matrix gives them of the last hidden states, got a {kind}, "
                "which does more to them: generate with model.generate and KVOpsCache"
            )

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The hidden states after the last norm: tokens int64 [B, T], positions int [B, T] -> [B, T, hidden]."""
        out = self.model.base_model(
            input_ids=tokens, position_ids=positions.long(), past_key_values=_Handover(self, attend), use_cache=True
        )
        return out.last_hidden_state

    def options(self, layer: int) -> dict[str, Any]:
        """How a layer attended last, as keywords of :func:`kvops.flash_attention`: the layers know themselves."""
        return dict(self._options[layer])

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden] -> logits [..., vocab_size]."""
        logits = self.model.get_output_embeddings()(hidden)
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)


class _Handover:
    """Stands in the place of a cache and holds nothing: what a layer puts in goes to ``attend``."""

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


@dataclass(eq=False)
class _NewTokens(Placeholder):
    """What the attention function of :mod:`kvops.integrations.transformers` is given for keys and values."""

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
        raise NotATensorError(f"expected one that hands keys and values straight on to attention, got {use}")

    def attend(self, q: Tensor, mask: Mask, options: dict[str, Any]) -> Tensor:
        self.decoder._options[self.layer] = options | {"window_left": mask.window_left}
        return self.hand_over(self.layer, q, self.k, self.v)
