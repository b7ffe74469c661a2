"""Sampling for each request: the drafting model and the verifying model share one set of filters."""

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
from kvops.sampling import BadWords, LogitBias, process_logits, token_bias

# Drafts are sampled with another seed. With the seed of the verification, the same noise would decide twice.
_DRAFTER_KEY = 0x6A09E667F3BCC908


class Sampler:
    """Temperatures, seeds and filters of a batch.

    Args:
        batch, vocab, device: the number of requests, and the vocabulary and the device of the model.
        prompt_lens: the length of each request's prompt.
        temperature, seed: one number, or one for each request (one seed grows by 1 from request to request).
        bad_words, logit_bias: as in :func:`kvops.process_logits`.
        filters: the other filters of :func:`kvops.process_logits` by name: a number, one for each request, or None.

    Raises ValueError for numbers out of range. The message begins with the argument's name.
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
        bad_words: BadWords = (),
        logit_bias: LogitBias | None = None,
        filters: Mapping[str, float | Sequence[float] | None] | None = None,
    ) -> None:
        heat = one_each("temperature", temperature, batch)
        seeds = checks.ints("seed", one_each("seed", seed, batch, 1))
        if not all(-(2**63) <= number < 2**63 for number in seeds):
            raise ValueError(f"seed: expected int64 numbers, got {seed}")
        if not all(0 <= value < float("inf") for value in heat):
            raise ValueError(f"temperature: expected finite numbers of at least 0, got {temperature}")
        self.temperature = torch.tensor(heat, dtype=torch.float32, device=device) if any(heat) else None
        self.seed = torch.tensor(seeds, dtype=torch.int64, device=device)
        self._filters: dict[str, Any] = {}
        logits = torch.zeros(1, 1, vocab, dtype=torch.float32, device="cpu")
        for name, value in (filters or {}).items():
            if value is None:
                continue
            values = one_each(name, value, batch)
            for number in set(values):
                process_logits(logits[..., :1], **{name: number})  # raises for a value out of range
            # One number for all requests stays a number: top-k is cheaper if its largest value is known on the host.
            same, kind = len(set(values)) == 1, torch.int64 if name == "top_k" else torch.float32
            self._filters[name] = values[0] if same else torch.tensor(values, dtype=kind, device=device)
        if bad_words:
            process_logits(logits.expand(batch, 1, vocab), bad_words=bad_words)
            self._filters["bad_words"] = bad_words
        added = token_bias(logit_bias, logits.expand(batch, 1, vocab).to(device))
        if added is not None:
            self._filters["logit_bias"] = added[0, 0] if len(added) == 1 else added[:, 0]
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
            logit_bias=options.logit_bias,
            filters=options.filters,
        )

    def process(
        self, logits: Tensor, text: Tensor, drafts: Tensor | None = None, parents: Tensor | None = None
    ) -> Tensor:
        """Apply the filters to logits [B, T, V] after ``text`` (int64 [B, L], padded with -1) and the drafts.

        Without filters the logits are returned unchanged: the verification applies the temperature.
        """
        if not self._filters:
            return logits
        given: dict[str, Any] = self._filters
        if self.needs_text:
            given = {**given, "context": text, "draft_tokens": drafts, "parents": parents}
        return process_logits(logits, temperature=self.temperature, **given)

    def arguments(self) -> dict[str, Any]:
        """The sampling arguments for the verification of processed logits."""
        if self.temperature is None:
            return {}
        # The filters apply to logits that are divided by the temperature, so it must not be applied again.
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
        """The distribution that :meth:`draw_draft` samples from, float32 [B, 1, V]."""
        x = logits.float()
        temperature = self.arguments()["temperature"][:, None, None]
        # A greedy request's draft is not tested against its probability.
        return torch.softmax(x / torch.where(temperature > 0, temperature, 1.0), -1)


def one_each(name: str, value: object, batch: int, stride: int = 0) -> list:
    """``value`` as one for each request; a single number grows by ``stride`` from one to the next."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not all(isinstance(number, Real) for number in (value if isinstance(value, Sequence) else (value,))):
        raise TypeError(f"{name}: expected a number, or one for each prompt, got {value!r}")
    if isinstance(value, Sequence):
        if len(value) != batch:
            raise ValueError(f"{name}: expected one number or {batch}, one for each prompt, got {len(value)}")
        return list(value)
    return [value + stride * row for row in range(batch)]  # type: ignore[operator]
