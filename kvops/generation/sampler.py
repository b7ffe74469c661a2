"""How tokens are drawn, request by request: one set of filters for those who draft and for the model that verifies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from kvops import checks
from kvops.generation.options import GenerationOptions
from kvops.generation.passes import Decoder
from kvops.ops.verify import verify_draft
from kvops.sampling import process_logits

# Drafts are drawn under a seed of their own: shared with the verification's, it would favour what is then accepted.
_DRAFTER_KEY = 0x6A09E667F3BCC908


class Sampler:
    """Temperatures, seeds and filters of a batch.

    Args:
        batch, vocab, device: as many requests for a model of that vocabulary, whose tensors live there.
        prompt_lens: how many tokens of each request are its prompt.
        temperature, seed: one number, or one for each request (one seed grows by 1 from request to request).
        bad_words: as in :func:`kvops.process_logits`.
        filters: the other filters of :func:`kvops.process_logits` by name: a number, one for each request, or None.

    Raises ValueError for numbers out of range, by the argument's name.
    """

    def __init__(
        self,
        batch: int,
        vocab: int,
        device: torch.device,
        *,
        prompt_lens: Tensor,
        temperature: float | Sequence[float],
        seed: int | Sequence[int],
        bad_words: Sequence[Sequence[int]] = (),
        filters: Mapping[str, float | Sequence[float] | None] | None = None,
    ) -> None:
        heat = one_each("temperature", temperature, batch)
        seeds = checks.ints("seed", one_each("seed", seed, batch, 1))
        if not all(-(2**63) <= each < 2**63 for each in seeds):
            raise ValueError(f"seed: expected int64 numbers, got {seed}")
        if not all(0 <= value < float("inf") for value in heat):
            raise ValueError(f"temperature: expected finite numbers of at least 0, got {temperature}")
        self.temperature = torch.tensor(heat, dtype=torch.float32, device=device) if any(heat) else None
        self.seed = torch.tensor(seeds, dtype=torch.int64, device=device)
        self._filters: dict[str, Any] = {}
        one = torch.zeros(1, 1, vocab, dtype=torch.float32)
        for name, value in (filters or {}).items():
            if value is None:
                continue
            values = one_each(name, value, batch)
            for number in set(values):
                process_logits(one[..., :1], **{name: number})  # names what is out of range
            # One number for all stays one: top-k of 50 is cheaper when it is known.
            same, kind = len(set(values)) == 1, torch.int64 if name == "top_k" else torch.float32
            self._filters[name] = values[0] if same else torch.tensor(values, dtype=kind, device=device)
        if bad_words:
            process_logits(one, bad_words=bad_words)
            self._filters["bad_words"] = bad_words
        self.needs_text = bool(bad_words) or any("penalty" in name for name in self._filters)
        if self.needs_text:
            self._filters["prompt_lens"] = prompt_lens

    @classmethod
    def of(cls, options: GenerationOptions, model: Decoder, prompt_lens: Sequence[int]) -> Sampler:
        """The sampler of a batch of prompts of these lengths."""
        device = model.embedding.weight.device
        return cls(
            len(prompt_lens),
            model.config.vocab_size,
            device,
            prompt_lens=torch.tensor(prompt_lens, dtype=torch.int32, device=device),
            temperature=options.temperature,
            seed=options.seed,
            bad_words=options.bad_words,
            filters=options.filters,
        )

    def process(
        self, logits: Tensor, text: Tensor, drafts: Tensor | None = None, parents: Tensor | None = None
    ) -> Tensor:
        """Logits [B, T, V] behind ``text`` (int64 [B, L], padded with -1) and the drafts, as ``process_logits`` does.

        Without filters they are returned as they are: the temperature alone is the verification's.
        """
        if not self._filters:
            return logits
        given: dict[str, Any] = self._filters
        if self.needs_text:
            given = {**given, "context": text, "draft_tokens": drafts, "parents": parents}
        return process_logits(logits, temperature=self.temperature, **given)

    def arguments(self) -> dict[str, Any]:
        """What the verification of processed logits takes."""
        if self.temperature is None:
            return {}
        # The filters are measured on tempered logits: the temperature is in them.
        temperature = (self.temperature > 0).float() if self._filters else self.temperature
        return {"temperature": temperature, "seed": self.seed}

    def draw_draft(self, logits: Tensor, step: Tensor) -> Tensor:
        """A drafter's next tokens, int64 [B], from its processed logits [B, 1, V]."""
        given = self.arguments()
        if given:
            given["seed"] = self.seed ^ _DRAFTER_KEY
        none = torch.empty((len(logits), 0), dtype=torch.int64, device=logits.device)
        return verify_draft(logits, none, step=step, **given)[0][:, 0]

    def probabilities(self, logits: Tensor) -> Tensor:
        """What :meth:`draw_draft` draws from, float32 [B, 1, V]."""
        x = logits.float()
        temperature = self.arguments()["temperature"][:, None, None]
        # A greedy request's draft is not tested against its probability.
        return torch.softmax(x / torch.where(temperature > 0, temperature, 1.0), -1)


def one_each(name: str, value: object, batch: int, stride: int = 0) -> list:
    """``value`` as one for each request; a single number grows by ``stride`` from one to the next."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not all(isinstance(each, Real) for each in (value if isinstance(value, Sequence) else (value,))):
        raise TypeError(f"{name}: expected a number, or one for each prompt, got {value!r}")
    if isinstance(value, Sequence):
        if len(value) != batch:
            raise ValueError(f"{name}: expected one number or {batch}, one for each prompt, got {len(value)}")
        return list(value)
    return [value + stride * row for row in range(batch)]  # type: ignore[operator]
