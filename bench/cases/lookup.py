"""Prompt lookup: drafts found in the text itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import kvops
from bench.case import SMOLLM, Case, Inputs, Outputs, Peer, Scale, UnavailableError

_DRAFT, _MAX_NGRAM = 7, 3


def _run(inputs: Inputs) -> Outputs:
    return kvops.prompt_lookup(inputs["tokens"], inputs["lens"], num_draft=_DRAFT, max_ngram=_MAX_NGRAM)


def _best(starts: list[int], length: int) -> int:
    """Of ascending places where a draft may begin: the latest with a whole draft behind it, else the earliest."""
    return max((start for start in starts if start + _DRAFT <= length), default=starts[0])


def _lookup(text: list[int]) -> list[int]:
    """The tokens after the best of the longest earlier occurrences of the text's last tokens."""
    for n in range(_MAX_NGRAM, 0, -1):
        suffix = text[len(text) - n :]
        starts = [end for end in range(n, len(text)) if text[end - n : end] == suffix]
        if starts:
            start = _best(starts, len(text))
            return text[start : start + _DRAFT]
    return []


def _padded(drafts: list[list[int]], device: torch.device) -> Outputs:
    tokens = torch.tensor([draft + [-1] * (_DRAFT - len(draft)) for draft in drafts], device=device)
    return tokens, torch.tensor([len(draft) for draft in drafts], dtype=torch.int32, device=device)


def _truth(inputs: Inputs, dtype: torch.dtype) -> Outputs:
    texts = [row[:n] for row, n in zip(inputs["tokens"].tolist(), inputs["lens"].tolist(), strict=True)]
    return _padded([_lookup(text) for text in texts], inputs["tokens"].device)


def _python(inputs: Inputs) -> Callable[[], Outputs]:
    """Lists in Python, as an engine on the host does it: the tokens come over and the drafts go back."""
    return lambda: _truth(inputs, torch.float32)


def _unfold(inputs: Inputs) -> Callable[[], Outputs]:
    """Windows compared with the suffix, one n-gram and one text after another."""
    tokens, lens = inputs["tokens"], inputs["lens"]

    def call() -> Outputs:
        drafts = []
        for row, length in zip(tokens, lens.tolist(), strict=True):
            text, draft = row[:length], row[:0]
            for n in range(_MAX_NGRAM, 0, -1):
                matches = (text[:-1].unfold(0, n, 1) == text[-n:]).all(1).nonzero()
                if len(matches):
                    start = _best((matches[:, 0] + n).tolist(), length)
                    draft = text[start : start + _DRAFT]
                    break
            drafts.append(draft.tolist())
        return _padded(drafts, tokens.device)

    return call


def _transformers(inputs: Inputs) -> Callable[[], Outputs]:
    """Its candidate generator serves one text and takes the earliest match, so only its time is comparable."""
    from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

    if len(inputs["tokens"]) > 1:
        raise UnavailableError("serves one text at a time")
    generator = PromptLookupCandidateGenerator(
        num_output_tokens=_DRAFT, max_matching_ngram_size=_MAX_NGRAM, max_length=1 << 30, vocab_size=1 << 30
    )
    text = inputs["tokens"][:, : int(inputs["lens"][0])]

    def call() -> Outputs:
        generator.get_candidates(text)
        return None, None

    return call


def lookup(batch: int, context: int, vocab: int) -> Case:
    """Texts as repetitive as prose: a token is one of the vocabulary's first few, most often an early one."""

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        rank = torch.rand(batch, context, device=device, generator=generator)
        tokens = (vocab**rank - 1).long().clamp_(max=vocab - 1)  # Zipf's law
        share = torch.linspace(1.0, 0.5, batch, device=device)
        return {"tokens": tokens, "lens": (share * context).int()}

    def length_sum() -> int:
        return int((torch.linspace(1.0, 0.5, batch) * context).int().sum())

    return Case(
        op="prompt_lookup",
        model=SMOLLM.name,
        shape={"batch": batch, "context": context, "drafts": _DRAFT},
        make_inputs=make,
        run=_run,
        oracle=_truth,
        flops=0,
        bytes=lambda size: 8 * length_sum() + batch * (4 + 8 * _DRAFT + 4),
        peers=(
            Peer("Python lists", _python),
            Peer("torch unfold", _unfold),
            Peer("transformers", _transformers, "transformers"),
        ),
    )


def cases(scale: Scale) -> Iterator[Case]:
    vocab = scale.model(SMOLLM).vocab
    for context in scale.contexts:
        yield lookup(1, context, vocab)
    if scale.batches[-1] > 1:
        yield lookup(scale.batches[-1], scale.contexts[-1], vocab)
