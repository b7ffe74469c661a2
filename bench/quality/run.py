"""Every policy at every ratio on every unit, resumable: a row is written as soon as it is known."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.quality import measure, tasks
from bench.quality.tasks import BEFORE, MAP_RATIO, TEXT, Size, Unit
from bench.timing import setting
from kvops.models.llama import Llama
from kvops.models.loading import load
from kvops.policies import POLICIES, Policy

RATIOS = (2, 4, 8, 16, 64)
QUICK_RATIOS = (8,)


@dataclass(frozen=True)
class Variant:
    """A policy in one of its two forms: its heads compete for blocks, or all keep the same number."""

    name: str
    policy: Policy
    default: bool


def variants(names: Sequence[str] | None) -> list[Variant]:
    """Every policy as it is by default and, next to it, its twin: the same scores, shared out the other way."""
    unknown = set(names or ()) - set(POLICIES)
    if unknown:
        raise ValueError(f"--policies: expected some of {', '.join(POLICIES)}; got {', '.join(sorted(unknown))}")
    found = []
    for name in names or POLICIES:
        policy = POLICIES[name]()
        twin = replace(policy, scope="sequence" if policy.scope == "head" else "head")
        found += [Variant(name, policy, True), Variant(name, twin, False)]
    return found


@dataclass
class Run:
    """A run and what it is to write. ``rows`` are those of an earlier run where there is a file to go on with.

    Raises ValueError where that file was made with another model, or asked something else.
    """

    size: Size
    ratios: Sequence[int]
    names: Sequence[str] | None = None
    json_path: Path | None = None
    model_path: Path | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.wanted = variants(self.names)
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        loaded = load(self.model_path, dtype=dtype, device=self.device)
        self.tokenizer = loaded.tokenizer
        self.units = tasks.units(self.tokenizer, self.size)
        # The manual is that of the Python that runs: another one asks other questions.
        asked = hashlib.sha256(repr(self.units).encode()).hexdigest()[:12]
        self.facts = setting(self.device) | {"model": loaded.name, "size": self.size.name, "tasks": asked}
        self.rows: list[dict[str, Any]] = []
        if self.json_path and self.json_path.exists():
            old = results.load(self.json_path)
            for name in ("model", "size", "tasks"):
                if old["setting"].get(name, self.facts[name]) != self.facts[name]:
                    raise ValueError(
                        f"--json: expected a file to go on with, of {name} {self.facts[name]!r}, got one of "
                        f"{old['setting'].get(name)!r} in {self.json_path}; next step: another path, or delete it"
                    )
            self.rows = old["rows"]
        self.model = Llama(loaded.config, loaded.weights)

    @property
    def result(self) -> results.Result:
        return {"kind": "quality", "setting": self.facts, "rows": self.rows}

    def quality(self, seconds: float = float("inf")) -> None:
        """Measure what there is no row for yet, for about that long."""
        until = time.perf_counter() + seconds
        with _Progress(len(self.units) * len(self.wanted) * len(self.ratios)) as bar:
            for row in _measure(self.model, self.units, self.wanted, self.ratios, self.rows, bar):
                self.rows.append(row)
                self._save()
                if time.perf_counter() > until:
                    return

    def times(self) -> None:
        """Time a step of every compressed cache of the texts beside the full one, anew; adds to the rows there are."""
        if not self.rows:
            raise ValueError("--times: expected --json with the file of an earlier run, to which times are added")
        policies = {variant.name: variant.policy for variant in self.wanted}
        texts = [unit for unit in self.units if unit.setting == TEXT]
        with _Progress(len(texts) * len(self.wanted) * len(self.ratios)) as bar:
            for unit in texts:
                bar.say(f"reading {unit.name}")
                rows = {_key(row): row for row in self.rows if row["unit"] == unit.name}
                context = measure.Context(self.model, unit.prefix, policies, room=_tokens(unit), questions=False)
                known: dict[str, dict[str, float]] = {}
                for ratio, variant in itertools.product(self.ratios, self.wanted):
                    bar.skip(1)
                    row = rows.get((unit.name, variant.name, variant.policy.scope, ratio))
                    if row is None:
                        continue
                    cache = context.copy()
                    measure.compress(cache, context.scores[variant.name], variant.policy, ratio, unit.length)
                    kept = measure.fingerprint(cache)
                    if kept not in known:
                        known[kept] = measure.step_ms(self.model, {"full_ms": context.cache, "ms": cache})
                    row |= known[kept]
                self._save()

    def _save(self) -> None:
        if self.json_path:
            results.save(self.json_path, "quality", self.facts, self.rows)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["unit"], row["policy"], row["scope"], row["ratio"]


def _knows(full: Mapping[str, Any]) -> bool:
    return full["setting"] == TEXT or any(map(any, full["right"].values()))


def _measure(
    model: Llama,
    every: Sequence[Unit],
    wanted: Sequence[Variant],
    ratios: Sequence[int],
    rows: Sequence[Mapping[str, Any]],
    bar: _Progress,
) -> Iterator[dict[str, Any]]:
    done = {_key(row) for row in rows}
    unknown = {row["unit"] for row in rows if row["policy"] == "full" and not _knows(row)}
    policies = {variant.name: variant.policy for variant in wanted}  # twins score alike
    configurations = [(variant, ratio) for ratio in ratios for variant in wanted]

    def missing(unit: Unit) -> list[tuple[Variant, int]]:
        if unit.name in unknown:
            return []
        return [
            (variant, ratio)
            for variant, ratio in configurations
            if (unit.name, variant.name, variant.policy.scope, ratio) not in done
        ]

    for prefix, group in groupby(every, key=lambda unit: unit.prefix):
        members = list(group)
        bar.skip(sum(len(configurations) - len(missing(unit)) for unit in members))
        members = [unit for unit in members if missing(unit)]
        if not members:
            continue
        bar.say(f"reading {members[0].name}")
        room = max(len(unit.question) + _tokens(unit) for unit in members)
        context = measure.Context(
            model, prefix, policies, room=room, questions=any(unit.setting == BEFORE for unit in members)
        )
        for unit in members:
            yield from _rows(model, context, unit, missing(unit), done, bar)


def _tokens(unit: Unit) -> int:
    return sum(len(probe.tail) + len(probe.answer) for probe in unit.probes)


def _rows(
    model: Llama,
    context: measure.Context,
    unit: Unit,
    missing: Sequence[tuple[Variant, int]],
    done: set[tuple[Any, ...]],
    bar: _Progress,
) -> Iterator[dict[str, Any]]:
    shown = context.read(unit.question) if unit.question else []
    base = {"unit": unit.name, "setting": unit.setting, "length": unit.length}
    full = measure.Full(model, unit, context.cache)
    full_row = base | full.row
    if _key(full_row) not in done:
        yield full_row
    scores = context.judge(shown, unit.question) if shown and full.knows else context.scores
    known: dict[str, dict[str, Any]] = {}
    for variant, ratio in missing if full.knows else ():
        bar.say(f"{unit.name}: {variant.name} {ratio}x")
        cache = context.copy()
        measure.compress(cache, scores[variant.name], variant.policy, ratio, unit.length)
        row = base | {"policy": variant.name, "scope": variant.policy.scope, "default": variant.default}
        row |= {"ratio": ratio, "blocks": cache.stats().blocks_in_use, "full_blocks": full.row["blocks"]}
        # What keeps the same tokens gives the same answers: AdaKV's equal heads are SnapKV's.
        kept = measure.fingerprint(cache)
        if kept not in known:
            known[kept] = full.measure(model, cache)
        row |= known[kept]
        if variant.policy.recital is not None:
            row["reading"] = context.recital_cost[variant.policy.recital]
        if unit.setting == TEXT and ratio == MAP_RATIO:
            row["lengths"] = cache.seq_lens[:, 0].tolist()
        bar.skip(1)
        yield row
    if unit.question:
        context.cache.rollback(len(unit.question))


class _Progress:
    """A bar with the time left, where somebody watches."""

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, unit="cache", desc="quality", disable=None, smoothing=0.05)

    def say(self, text: str) -> None:
        self._bar.set_postfix_str(text)

    def skip(self, count: int) -> None:
        self._bar.update(count)
