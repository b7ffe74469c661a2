"""``process_logits`` against a loop over requests, rows and tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch

import kvops
from fuzz.inputs import DTYPES, draw_mutation, expect_refusal, often

_NUMBER = ("nan", "string", "list")
MUTATIONS = {
    "logits": ("dtype", "integer", "rank", "flat", "string", "none"),
    "temperature": (*_NUMBER, "negative", "inf"),
    "top_k": (*_NUMBER, "negative", "fraction"),
    "top_p": (*_NUMBER, "negative", "fraction"),
    "min_p": (*_NUMBER, "negative", "fraction"),
    "repetition_penalty": (*_NUMBER, "negative"),
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "context": ("integer", "rank", "flat", "string"),
    "bad_words": ("string", "list"),
}


@dataclass(frozen=True)
class Case:
    seed: int = 0
    dtype: str = "float32"
    batch: int = 1
    rows: int = 1
    vocab: int = 1
    spread: float = 2.0
    each: bool = False  # numbers for each request, as tensors
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    context: int = 0
    prompt: bool = False
    drafts: bool = False
    tree: bool = False
    bad_words: tuple[tuple[int, ...], ...] = ()
    ties: bool = False
    odd: str = ""  # "-inf" or "nan"
    bad: str = ""


def draw(r: Random) -> Case:
    vocab = r.choice((1, 2, 5, 40, 40, 1500))
    return Case(
        seed=r.randrange(2**31),
        dtype=r.choice(tuple(DTYPES)),
        batch=r.choice((1, 1, 2, 3, 0)),
        rows=r.choice((1, 1, 2, 4, 0)),
        vocab=vocab,
        spread=often(r, 2.0, 0.0, 0.1, 20.0),
        each=r.random() < 0.4,
        temperature=r.choice((None, 0.0, 1.0, 0.3, 2.5, 1e-6)),
        top_k=r.choice((None, None, 0, 1, 2, 7, vocab, vocab + 5, 2**40)),
        top_p=r.choice((None, None, 0.0, 0.1, 0.5, 0.9, 0.99, 1.0)),
        min_p=r.choice((None, None, 0.0, 0.05, 0.5, 1.0)),
        repetition_penalty=r.choice((None, None, 1.0, 1.3, 0.7)),
        presence_penalty=r.choice((None, None, 0.0, 0.7, -1.0)),
        frequency_penalty=r.choice((None, None, 0.0, 0.3, -0.2)),
        context=r.choice((0, 1, 5, 30)),
        prompt=r.random() < 0.4,
        drafts=r.random() < 0.5,
        tree=r.random() < 0.3,
        bad_words=() if r.random() < 0.6 else tuple(
            tuple(r.randrange(vocab) for _ in range(r.randint(1, 3))) for _ in range(r.randint(1, 4))
        ),
        ties=r.random() < 0.3,
        odd=often(r, "", "-inf", "nan", p=0.8),
        bad=draw_mutation(r, MUTATIONS) if r.random() < 0.12 else "",
    )  # fmt: skip


_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def check(case: Case) -> None:
    g = torch.Generator().manual_seed(case.seed)
    B, T, V = case.batch, case.rows, case.vocab
    logits = torch.randn(B, T, V, generator=g) * case.spread
    if case.ties:
        logits = logits.round()
    if case.odd:
        logits = logits.masked_fill(torch.rand(logits.shape, generator=g) < 0.3, float(case.odd))
    logits = logits.to(DTYPES[case.dtype])
    context = torch.randint(0, V, (B, case.context), generator=g)
    lens = torch.randint(0, case.context + 1, (B,), generator=g)
    context = context.masked_fill(torch.arange(case.context) >= lens[:, None], -1)
    drafts = torch.randint(-1, V, (B, T if case.tree else max(T - 1, 0)), generator=g)
    parents = torch.tensor([[-1, *(int(torch.randint(t, (), generator=g)) for t in range(1, T))][:T]] * B).view(B, T)
    prompt = torch.randint(0, case.context + 1, (B,), generator=g)
    numbers: dict[str, Any] = {name: getattr(case, name) for name in (*_FLOATS, "top_k")}
    if case.each:
        for name in _FLOATS:
            if numbers[name] is not None:
                numbers[name] = torch.full((B,), numbers[name])
        if numbers["top_k"] is not None:
            numbers["top_k"] = torch.full((B,), numbers["top_k"])
    arguments = {
        "logits": logits,
        **numbers,
        "context": context if case.context else None,
        "prompt_lens": prompt if case.prompt and case.context else None,
        "draft_tokens": drafts if case.drafts or case.tree else None,
        "parents": parents.int() if case.tree else None,
        "bad_words": case.bad_words,
    }
    if case.bad:
        expect_refusal(kvops.process_logits, arguments, case.bad)
        return
    found = kvops.process_logits(**arguments)
    assert found.dtype == torch.float32
    assert found.shape == logits.shape
    for b in range(B):
        lines: list[list[int]] = []
        text = [token for token in context[b].tolist() if token >= 0]
        for t in range(T):
            line = list(text)
            if t and case.tree:
                line = [*lines[int(parents[b, t])], int(drafts[b, t])]
            elif t and case.drafts:
                line = [*lines[t - 1], int(drafts[b, t - 1])]
            elif t:
                line = [*lines[t - 1], -1]
            lines.append(line)
            skip = min(int(prompt[b]), len(text)) if case.prompt and case.context else 0
            _expect_row(case, logits[b, t].float().tolist(), found[b, t].tolist(), line, skip)


def _expect_row(case: Case, x: list[float], found: list[float], line: list[int], skip: int) -> None:
    if any(math.isnan(value) for value in x):
        assert not any(map(math.isfinite, found)) or any(map(math.isnan, found)), "a row with a NaN"
        return
    f, V = np.float32, len(x)
    row = [f(value) for value in x]
    for token in range(V):
        if case.repetition_penalty is not None and token in line:
            penalty = f(case.repetition_penalty)
            row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
        count = line[skip:].count(token)
        if case.presence_penalty is not None and count:
            row[token] -= f(case.presence_penalty)
        if case.frequency_penalty is not None:
            row[token] -= f(case.frequency_penalty) * f(count)
    for *head, last in case.bad_words:
        if not head or line[-len(head) :] == head:
            row[last] = f(-math.inf)
    largest = max(row)
    if case.temperature and math.isfinite(largest):
        row = [(value - largest) / f(case.temperature) for value in row]
    order = sorted(range(V), key=lambda token: (-row[token], token))
    keep, unsure = set(order), set()
    if case.top_k:
        keep = set(order[: case.top_k])
    finite = [token for token in order if token in keep and math.isfinite(row[token])]
    if case.top_p is not None and case.top_p < 1 and finite:
        weights = [math.exp(float(row[token]) - float(row[finite[0]])) for token in finite]
        before = 0.0
        for place, (token, weight) in enumerate(zip(finite, weights, strict=True)):
            if place and before >= case.top_p:
                keep.discard(token)
            if place and abs(before - case.top_p) < 1e-4:
                unsure.add(token)
            before += weight / sum(weights)
    if case.min_p and finite:
        for token in finite:
            limit = float(row[finite[0]]) + math.log(case.min_p)
            if float(row[token]) < limit:
                keep.discard(token)
            if abs(float(row[token]) - limit) < 1e-4 * (1 + abs(limit)):
                unsure.add(token)
    # float32 may round equals apart where they are unsure: what ties with an unsure token is unsure, too.
    values = {float(row[token]) for token in unsure}
    unsure |= {token for token in range(V) if float(row[token]) in values}
    for token in range(V):
        kept = math.isfinite(found[token])
        right = token in keep and math.isfinite(row[token])
        if token not in unsure or (kept and not math.isfinite(row[token])):
            assert kept == right, f"token {token}: {found[token]}, expected {float(row[token]) if right else -math.inf}"
        if kept:
            close = math.isclose(found[token], float(row[token]), rel_tol=1e-5, abs_tol=1e-6)
            assert close, f"token {token}: {found[token]}, expected {float(row[token])}"
