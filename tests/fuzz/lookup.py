"""``prompt_lookup`` against a search of each text, one place after another."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch

import kvops
from fuzz.inputs import TENSOR, backend, draw_mutation, expect_refusal, laid_out, often

MUTATIONS = {
    "tokens": (*(how for how in TENSOR if how != "last"), "strided"),
    "lens": TENSOR,
    "num_draft": ("negative", "string", "fraction", "none"),
    "max_ngram": ("negative", "string", "fraction", "none"),
    "min_ngram": ("negative", "string", "fraction", "none"),
}


@dataclass(frozen=True)
class Case:
    seed: int = 0
    backend: str = "eager"
    lengths: tuple[int, ...] = ()
    kinds: int = 1  # of tokens
    period: int = 0  # texts repeat themselves after so many tokens
    num_draft: int = 0
    min_ngram: int = 1
    more: int = 0  # max_ngram - min_ngram
    padding: int = 0
    layout: str = ""
    wide_lens: bool = False
    bad: str = ""


def draw(r: Random) -> Case:
    longest = r.choice((3, 12, 40, 40, 300))
    return Case(
        seed=r.randrange(2**31),
        backend=r.choice(("eager", "numba")) if r.random() < 0.85 else "triton",
        lengths=tuple(r.randint(0, longest) for _ in range(r.randint(0, 4))),
        kinds=r.choice((1, 2, 2, 3, 10, 1000)),
        period=often(r, 0, r.randint(1, 7)),
        num_draft=r.choice((0, 1, 2, 5, 10, 70)),
        min_ngram=often(r, 1, 2, 3, 5),
        more=r.choice((0, 1, 2, 2, 4, 8)),
        padding=r.choice((0, 0, 1, 9)),
        layout=often(r, "", "padded", "transposed", "expanded 0"),
        wide_lens=r.random() < 0.3,
        bad=draw_mutation(r, MUTATIONS) if r.random() < 0.1 else "",
    )


def expected(text: list[int], num_draft: int, max_ngram: int, min_ngram: int) -> list[int]:
    """Of the earlier occurrences of the longest suffix that has one: the latest that has ``num_draft`` tokens behind
    it, else the one with most."""
    for n in range(max_ngram, min_ngram - 1, -1):
        suffix = text[len(text) - n :]
        starts = [s for s in range(len(text) - n) if text[s : s + n] == suffix]
        if starts and len(suffix) == n:
            full = [s for s in starts if len(text) - s - n >= num_draft]
            start = full[-1] if full else starts[0]
            return text[start + n : start + n + num_draft]
    return []


def check(case: Case) -> None:
    g = torch.Generator().manual_seed(case.seed)
    texts = []
    for length in case.lengths:
        text = torch.randint(0, case.kinds, (length,), generator=g).tolist()
        if case.period:
            text = (text[: case.period] * (length // case.period + 1))[:length]
        texts.append(text)
    width = max([0, *case.lengths]) + case.padding
    tokens = torch.randint(0, case.kinds, (len(texts), width), generator=g)
    for b, text in enumerate(texts):
        tokens[b, : len(text)] = torch.tensor(text, dtype=torch.int64)
    tokens = laid_out(tokens, case.layout)
    lens = torch.tensor(case.lengths, dtype=torch.int64 if case.wide_lens else torch.int32)
    max_ngram = case.min_ngram + case.more
    numbers = {"num_draft": case.num_draft, "max_ngram": max_ngram, "min_ngram": case.min_ngram}
    arguments = {"tokens": tokens, "lens": lens, **numbers}
    with backend(case.backend):
        if case.bad:
            expect_refusal(kvops.prompt_lookup, arguments, case.bad)
            return
        drafts, counts = kvops.prompt_lookup(**arguments)
    assert (drafts.dtype, counts.dtype, drafts.shape) == (torch.int64, torch.int32, (len(texts), case.num_draft))
    for b, length in enumerate(case.lengths):
        text = tokens[b, :length].tolist()
        draft = expected(text, case.num_draft, max_ngram, case.min_ngram)
        found = drafts[b].tolist()
        assert int(counts[b]) == len(draft), f"drafted {found}, expected {draft} in {text}"
        assert found == draft + [-1] * (case.num_draft - len(draft)), f"drafted {found}, expected {draft} in {text}"
