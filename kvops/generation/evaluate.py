"""The quality of compressed caches: perplexity, agreement with the full cache, and answers to questions.

``python -m kvops evaluate`` and ``python -m bench quality`` run this code. A :class:`Unit` is a context and the
probes about it. :func:`evaluate` reads each context once, compresses copies of its cache with every policy at every
ratio, and measures the copies. :func:`summarize` turns the rows into one line for each policy and ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import mean
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvops.cache import PagedKVCache
from kvops.generation.contexts import Context, Probe, ask, compress, fingerprint
from kvops.generation.passes import Decoder, decode
from kvops.policies import Policy

Setting = Literal["text", "before", "after"]
TEXT: Setting = "text"
"""The continuation of a text."""
BEFORE: Setting = "before"
"""A question that is read before the cache is compressed."""
AFTER: Setting = "after"
"""A question that is asked after the cache was compressed."""

FULL = "full"
"""The name of the uncompressed cache among the policies of rows."""

Row = dict[str, Any]

Reader = Callable[[Decoder, Sequence[int], float, int], PagedKVCache]
"""Reads tokens into a new cache and compresses it. The arguments are the model, the tokens, the ratio, and the number
of further tokens that the cache needs room for."""


@torch.no_grad()
def forced_logits(
    model: Decoder, cache: PagedKVCache, last_hidden: Tensor, tokens: Tensor, *, row: int = 0, chunk: int = 64
) -> Tensor:
    """The logits that predict each of ``tokens``, given the cache's ``row`` and the tokens before: float32 [N, V].

    ``last_hidden`` [1, 1, hidden] is the hidden state of the last token in the cache, ``tokens`` int64 [N]. All tokens
    but the last are appended to the cache, ``chunk`` at a time.
    """
    predicted = [model.logits(last_hidden)[0]]
    for piece in tokens[:-1].split(chunk):
        hidden = decode(model, cache, piece[None], rows=slice(row, row + 1))
        predicted.append(model.logits(hidden)[0])
    return torch.cat(predicted).float()


def perplexity(logits: Tensor, tokens: Tensor) -> float:
    """exp of the mean negative log-likelihood of ``tokens`` int64 [N] under ``logits`` float32 [N, V]."""
    return float(F.cross_entropy(logits, tokens).exp())


def agreement(logits: Tensor, tokens: Tensor) -> float:
    """The share of ``tokens`` int64 [N] that are the most likely under ``logits`` float32 [N, V]."""
    return float((logits.argmax(-1) == tokens).float().mean())


@dataclass(frozen=True)
class Unit:
    """A context and the probes about it.

    Attributes:
        name: the name of the unit in rows.
        setting: ``"text"``, ``"before"`` or ``"after"``.
        prefix: tokens that are read before compression. Units with the same prefix, one after the other, share it.
        question: tokens that are read after the prefix and before compression, in the setting ``"before"``.
        probes: the probes after compression. All tails begin with the same token; ``"text"`` has exactly one probe.
    """

    name: str
    setting: Setting
    prefix: Sequence[int]
    question: Sequence[int]
    probes: tuple[Probe, ...]

    @property
    def length(self) -> int:
        """Tokens that are read before compression."""
        return len(self.prefix) + len(self.question)

    @property
    def room(self) -> int:
        """The most tokens that the unit needs beyond the prefix."""
        return len(self.question) + sum(len(probe.tail) + len(probe.answer) for probe in self.probes)


@dataclass(frozen=True)
class Variant:
    """A policy and its name in rows.

    Variants of the same name differ in ``scope`` alone; ``default`` marks the policy's own scope among them.
    """

    name: str
    policy: Policy
    default: bool = True


class Full:
    """A unit in the full cache of ``context``: the reference for compressed caches.

    Attributes:
        row: the figures of the full cache.
        shown: the layers after the question was read; empty without a question.
        asked: the probes that the full cache answers right, at least in part, and which of their tokens are right.
            Compressed caches are asked these alone.
    """

    def __init__(self, model: Decoder, unit: Unit, context: Context) -> None:
        self.model, self.unit = model, unit
        self.shown = context.read(unit.question) if unit.question else []
        self.base: Row = {"unit": unit.name, "setting": unit.setting, "length": unit.length}
        self.blocks = context.cache.blocks_for(unit.length)  # the cache keeps the blocks of questions taken back
        self.row: Row = self.base | {"policy": FULL, "scope": "", "ratio": 1, "blocks": self.blocks}
        self.asked: list[tuple[Probe, list[int]]] = []
        logits = ask(model, context.cache, unit.probes)
        if unit.setting == TEXT:
            self.logits = logits[0]
            self.row |= _compared(unit.probes[0], self.logits, self.logits)
            return
        hits = [_hits(probe, predicted) for probe, predicted in zip(unit.probes, logits, strict=True)]
        self.asked = [(probe, hit) for probe, hit in zip(unit.probes, hits, strict=True) if any(hit)]
        self.row["right"] = _by_task(zip(unit.probes, hits, strict=True))

    @property
    def knows(self) -> bool:
        """Whether there is anything to compare."""
        return self.unit.setting == TEXT or bool(self.asked)

    def row_of(self, policy: str, scope: str, ratio: float, cache: PagedKVCache) -> Row:
        """The row of a compressed cache, before its quality is measured."""
        blocks = cache.stats().blocks_in_use
        return self.base | {
            "policy": policy,
            "scope": scope,
            "ratio": ratio,
            "blocks": blocks,
            "full_blocks": self.blocks,
        }

    def measure(self, cache: PagedKVCache) -> Row:
        """The quality of a compressed cache; ``right`` counts among the answers that the full cache gets right."""
        if self.unit.setting == TEXT:
            probe = self.unit.probes[0]
            return _compared(probe, ask(self.model, cache, [probe])[0], self.logits)
        answers = []
        logits = ask(self.model, cache, [probe for probe, _ in self.asked])
        for (probe, full), predicted in zip(self.asked, logits, strict=True):
            hits = _hits(probe, predicted)
            answers.append((probe, [hit for hit, known in zip(hits, full, strict=True) if known]))
        return {"right": _by_task(answers)}


def evaluate(
    model: Decoder,
    units: Sequence[Unit],
    variants: Sequence[Variant],
    ratios: Sequence[float],
    *,
    readers: Mapping[str, Reader] | None = None,
    wanted: Callable[[Unit, Variant, float], bool] = lambda unit, variant, ratio: True,
    progress: Callable[[str, int], None] = lambda what, done: None,
) -> Iterator[tuple[Row, PagedKVCache]]:
    """Measure what every policy keeps at every ratio of every unit.

    Args:
        model: the decoder.
        units: the contexts and their probes; units with the same prefix stand next to each other.
        variants: the policies. Each scores a context in the one pass that reads it.
        ratios: how many times smaller than the full cache, at least 1.
        readers: further methods by name, which read and compress on their own, such as presses of kvpress.
        wanted: returns whether to measure a row; units without such rows are not read.
        progress: called with the name of the next step and the number of rows finished since the last call.

    Yields:
        A row and the cache that it describes. The cache is valid until the next row. A unit's first row is
        the full cache's: ``unit``, ``setting``, ``length``, ``policy`` (``"full"``), ``scope``, ``ratio`` and
        ``blocks``. Rows of compressed caches also have ``default`` and ``full_blocks``, and ``reading`` if the policy
        recites (the time to read as a multiple of reading alone). A text has the figures ``nll`` (mean negative
        log-likelihood of its tokens, in nats), ``kl`` (divergence from the full cache's predictions) and ``top1`` (the
        share of positions at which the most likely token is the full cache's). Questions have ``right``: for each task,
        a 1 or 0 for each answer (for each token if the probe is not ``exact``).
    """
    readers = readers or {}
    policies = {variant.name: variant.policy for variant in variants}
    configurations = [(variant, ratio) for ratio in ratios for variant in variants]
    for prefix, group in groupby(units, key=lambda unit: unit.prefix):
        members = []
        for unit in group:
            missing = [(variant, ratio) for variant, ratio in configurations if wanted(unit, variant, ratio)]
            progress("", len(configurations) - len(missing))
            if missing or readers:
                members.append((unit, missing))
        if not members:
            continue
        progress(f"reading {members[0][0].name}", 0)
        context = Context(
            model,
            prefix,
            policies,
            room=max(unit.room for unit, _ in members),
            questions=any(unit.setting == BEFORE for unit, _ in members),
        )
        for unit, missing in members:
            full = Full(model, unit, context)
            yield full.row, context.cache
            if full.knows:
                yield from _policy_rows(full, context, missing, progress)
                for name, reader in readers.items():
                    yield from _reader_rows(full, name, reader, ratios, progress)
            else:
                progress("", len(missing) + len(readers) * len(ratios))
            if unit.question:
                context.cache.rollback(len(unit.question))


def _policy_rows(
    full: Full,
    context: Context,
    missing: Sequence[tuple[Variant, float]],
    progress: Callable[[str, int], None],
) -> Iterator[tuple[Row, PagedKVCache]]:
    """The rows of compressed copies of the cache of ``context``, and the copies."""
    unit = full.unit
    scores = context.judge(full.shown, unit.question) if full.shown else context.scores
    figures: dict[str, Row] = {}
    for variant, ratio in missing:
        progress(f"{unit.name}: {variant.name} {ratio:g}x", 0)
        cache = context.copy()
        compress(cache, scores[variant.name], variant.policy, ratio, unit.length)
        row = full.row_of(variant.name, variant.policy.scope, ratio, cache) | {"default": variant.default}
        # Caches that keep the same tokens give the same answers (AdaKV with equal heads is SnapKV): measure them once.
        kept = fingerprint(cache)
        if kept not in figures:
            figures[kept] = full.measure(cache)
        row |= figures[kept]
        if variant.policy.recital is not None:
            row["reading"] = context.recital_cost[variant.policy.recital]
        progress("", 1)
        yield row, cache


def _reader_rows(
    full: Full, name: str, reader: Reader, ratios: Sequence[float], progress: Callable[[str, int], None]
) -> Iterator[tuple[Row, PagedKVCache]]:
    """The rows of the caches that ``reader`` makes, and the caches."""
    unit = full.unit
    for ratio in ratios:
        progress(f"{unit.name}: {name} {ratio:g}x", 0)
        cache = reader(full.model, (*unit.prefix, *unit.question), ratio, unit.room)
        row = full.row_of(name, "", ratio, cache) | {"default": True}
        row |= full.measure(cache)
        progress("", 1)
        yield row, cache


def _hits(probe: Probe, logits: Tensor) -> list[int]:
    """1 or 0: for the whole answer by greedy decoding, or for each of its tokens given the tokens before it."""
    hits = logits.argmax(-1).cpu() == torch.tensor(list(probe.answer), device="cpu")
    return [int(hits.all())] if probe.exact else hits.int().tolist()


def _by_task(answers: Iterable[tuple[Probe, list[int]]]) -> dict[str, list[int]]:
    by_task: dict[str, list[int]] = {}
    for probe, hits in answers:
        by_task.setdefault(probe.task, []).extend(hits)
    return by_task


def _compared(probe: Probe, logits: Tensor, full: Tensor) -> Row:
    """Mean negative log-likelihood of a text (nats), divergence from the full cache, share of equal most likely
    tokens."""
    answer = torch.tensor(list(probe.answer), device=logits.device)
    ours, theirs = logits.log_softmax(-1), full.log_softmax(-1)
    return {
        "nll": float(F.nll_loss(ours, answer)),
        "kl": float(F.kl_div(ours, theirs, log_target=True, reduction="batchmean")),
        "top1": float((logits.argmax(-1) == full.argmax(-1)).float().mean()),
    }


@dataclass(frozen=True)
class Summary:
    """The quality of a policy at a ratio, over all units. A figure is None if nothing was measured for it.

    Attributes:
        policy, scope, ratio: the rows that are summarized.
        smaller: how many times smaller the caches really became, in blocks.
        perplexity: the perplexity of all held-out tokens.
        agreement: the share of held-out tokens at which the most likely token is the full cache's.
        right, asked: the number of right answers and of counted ones, which are those that the full cache gets right.
            For the full cache, all answers are counted.
    """

    policy: str
    scope: str
    ratio: float
    smaller: float
    perplexity: float | None
    agreement: float | None
    right: int | None
    asked: int | None


def summarize(rows: Iterable[Mapping[str, Any]]) -> list[Summary]:
    """The rows of :func:`evaluate` in one line for each policy and ratio, the full cache first."""
    groups: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["policy"], row["scope"], row["ratio"]), []).append(row)
    return [_summary(*key, group) for key, group in groups.items()]


def _summary(policy: str, scope: str, ratio: float, rows: Sequence[Mapping[str, Any]]) -> Summary:
    texts = [row for row in rows if "nll" in row]
    answers = [hit for row in rows for hits in row.get("right", {}).values() for hit in hits]
    return Summary(
        policy,
        scope,
        ratio,
        smaller=sum(row.get("full_blocks", row["blocks"]) for row in rows) / max(sum(row["blocks"] for row in rows), 1),
        perplexity=math.exp(mean(row["nll"] for row in texts)) if texts else None,
        agreement=mean(row["top1"] for row in texts) if texts else None,
        right=sum(answers) if answers else None,
        asked=len(answers) if answers else None,
    )
