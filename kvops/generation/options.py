"""The options of a generation, shared by ``generate``, ``stream`` and the code that runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvops import checks
from kvops.generation.passes import Decoder
from kvops.policies import Compression
from kvops.sampling import BadWords, LogitBias

PerPrompt = float | Sequence[float] | None
"""One number for all prompts, or one for each."""

_FILTERS = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
# Filters that have no effect on greedy decoding.
_SAMPLING_FILTERS = ("top_k", "top_p", "min_p")


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """The options of :func:`~kvops.generation.generate.generate` and :func:`~kvops.generation.generate.stream`.

    Attributes:
        max_new_tokens: the most new tokens for each prompt.
        temperature: 0 is greedy decoding; one number, or one for each prompt.
        seed: seed of the random numbers. One int gives prompt i the seed ``seed + i``; a sequence has one for each
            prompt. The tokens of a prompt depend on its own seed and not on the other prompts of the batch.
        top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty: as in
            :func:`kvops.process_logits`; one number, or one for each prompt. They apply to a drafting model and to
            every position of a draft as they would without drafts.
        bad_words: token sequences that are never generated, for all prompts, or one list of them for each prompt.
        logit_bias: what is added to the logits of tokens, as in :func:`kvops.process_logits`: ``{17: -2.5}`` for all
            prompts, one such mapping (or None) for each, or a float32 tensor ``[V]`` or ``[B, V]``.
        stop_tokens: a prompt ends after any of these tokens.
        compression: how the cache is compressed: one for all prompts, or one for each. None keeps the whole cache.
        draft: the source of drafts of up to ``num_draft`` tokens. One pass of the model verifies a draft. Sampled
            tokens have the same distribution as without drafts, and greedy tokens are the same. ``"prompt_lookup"``
            searches the text for the last ``max_ngram`` to ``min_ngram`` tokens and drafts the tokens that followed
            them. A smaller model with the same vocabulary on the same device decodes ahead with its own cache. After
            refused drafts a prompt gets shorter ones, and none for some passes.
        num_draft: the most tokens of a draft.
        tree: the number of drafts at each position. Above 1 the drafts are trees: of the best earlier occurrences, or
            of the drafting model's most probable continuations.
        verification: how chains of drafts are verified: ``"token"``, or ``"block"``, which accepts at least as many
            sampled tokens (:func:`kvops.verify_draft`).
        min_ngram, max_ngram: lengths of the n-grams that prompt lookup searches for.
    """

    max_new_tokens: int = 128
    temperature: float | Sequence[float] = 0.0
    seed: int | Sequence[int] = 0
    top_k: int | Sequence[int] | None = None
    top_p: float | Sequence[float] | None = None
    min_p: float | Sequence[float] | None = None
    repetition_penalty: float | Sequence[float] | None = None
    presence_penalty: float | Sequence[float] | None = None
    frequency_penalty: float | Sequence[float] | None = None
    bad_words: BadWords = ()
    logit_bias: LogitBias | None = None
    stop_tokens: Sequence[int] = ()
    compression: Compression | Sequence[Compression | None] | None = None
    draft: Literal["prompt_lookup"] | Decoder | None = None
    num_draft: int = 7
    tree: int = 1
    verification: Literal["token", "block"] = "token"
    min_ngram: int = 2
    max_ngram: int = 4

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_draft", "tree"):
            checks.expect_int(name, getattr(self, name), 1)
        object.__setattr__(self, "stop_tokens", tuple(checks.ints("stop_tokens", self.stop_tokens)))
        checks.expect_choice("verification", self.verification, ("token", "block"))
        if self.draft is None and self.tree > 1:
            raise ValueError(f"tree: expected 1 without drafts, got {self.tree}; next step: draft='prompt_lookup'")
        if self.verification == "block" and (self.draft is None or self.tree > 1):
            raise ValueError("verification: expected 'token' without draft or with tree > 1, got 'block'")

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> GenerationOptions:
        """Take the options from a function's ``locals()``."""
        return cls(**{field.name: arguments[field.name] for field in dataclasses.fields(cls)})

    @property
    def filters(self) -> dict[str, PerPrompt]:
        """The filters of :func:`kvops.process_logits` that take numbers, by name."""
        return {name: getattr(self, name) for name in _FILTERS}

    def compressions(self, batch: int) -> list[Compression | None]:
        """The compression of each of ``batch`` prompts.

        Raises TypeError for entries that are not a Compression, and ValueError for a wrong number of entries.
        """
        given = self.compression
        compressions = list(given) if isinstance(given, Sequence) else [given] * batch
        for entry in compressions:
            if not isinstance(entry, Compression | None):
                raise TypeError(
                    f"compression: expected a kvops.policies.Compression, such as Compression(4), got {entry!r}"
                )
        if len(compressions) != batch:
            raise ValueError(
                f"compression: expected one for all prompts or {batch}, one for each, got {len(compressions)}"
            )
        if len({entry.policy.accumulate for entry in compressions if entry and entry.every}) > 1:
            raise ValueError("compression: expected policies that accumulate alike where every > 0")
        return compressions

    def without_effect(self) -> list[str]:
        """A sentence for each option that has no effect together with the others."""
        heat = self.temperature.tolist() if hasattr(self.temperature, "tolist") else self.temperature
        if any(heat) if isinstance(heat, Sequence) else heat:
            return []
        return [
            f"{name}: asked for {getattr(self, name)}, without effect: temperature=0 always takes the most likely token"
            for name in _SAMPLING_FILTERS
            if getattr(self, name) is not None
        ]
