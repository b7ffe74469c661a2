"""Every policy at every ratio on every unit, resumable: a row is written as soon as it is known."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.quality import tasks
from bench.quality.steps import step_ms
from bench.quality.tasks import MAP_RATIO, Size
from bench.timing import setting
from kvops.generation.contexts import Context, compress, fingerprint
from kvops.generation.evaluate import FULL, TEXT, Unit, Variant, evaluate
from kvops.models.llama import Llama
from kvops.models.loading import load
from kvops.policies import POLICIES

RATIOS = (2, 4, 8, 16, 64)
QUICK_RATIOS = (8,)


def variants(names: Sequence[str] | None) -> list[Variant]:
    """Every policy in both forms, its default first: heads that compete for blocks, and heads of equal length."""
    unknown = set(names or ()) - set(POLICIES)
    if unknown:
        raise ValueError(f"--policies: expected some of {', '.join(POLICIES)}; got {', '.join(sorted(unknown))}")
    forms = []
    for name in names or POLICIES:
        policy = POLICIES[name]()
        twin = replace(policy, scope="sequence" if policy.scope == "head" else "head")
        forms += [Variant(name, policy), Variant(name, twin, default=False)]
    return forms


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
        """Time a step of every compressed cache of the texts and of the full one again, and add the times to the
        rows."""
        if not self.rows:
            raise ValueError("--times: expected --json with the file of an earlier run, to which times are added")
        policies = {variant.name: variant.policy for variant in self.wanted}
        texts = [unit for unit in self.units if unit.setting == TEXT]
        with _Progress(len(texts) * len(self.wanted) * len(self.ratios)) as bar:
            for unit in texts:
                bar.step(f"reading {unit.name}", 0)
                rows = {_key(row): row for row in self.rows if row["unit"] == unit.name}
                context = Context(self.model, unit.prefix, policies, room=unit.room, questions=False)
                known: dict[str, dict[str, float]] = {}
                for ratio, variant in itertools.product(self.ratios, self.wanted):
                    bar.step("", 1)
                    row = rows.get((unit.name, variant.name, variant.policy.scope, ratio))
                    if row is None:
                        continue
                    cache = context.copy()
                    compress(cache, context.scores[variant.name], variant.policy, ratio, unit.length)
                    kept = fingerprint(cache)
                    if kept not in known:
                        known[kept] = step_ms(self.model, {"full_ms": context.cache, "ms": cache})
                    row |= known[kept]
                self._save()

    def _save(self) -> None:
        if self.json_path:
            results.save(self.json_path, "quality", self.facts, self.rows)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["unit"], row["policy"], row["scope"], row["ratio"]


def _measure(
    model: Llama,
    units: Sequence[Unit],
    variants: Sequence[Variant],
    ratios: Sequence[int],
    rows: Sequence[Mapping[str, Any]],
    bar: _Progress,
) -> Iterator[dict[str, Any]]:
    """The rows that ``rows`` lacks."""
    done = {_key(row) for row in rows}
    unknown = {row["unit"] for row in rows if row["policy"] == FULL and not _knows(row)}

    def wanted(unit: Unit, variant: Variant, ratio: float) -> bool:
        return unit.name not in unknown and (unit.name, variant.name, variant.policy.scope, ratio) not in done

    for row, cache in evaluate(model, units, variants, ratios, wanted=wanted, progress=bar.step):
        if _key(row) in done:
            continue
        if row["setting"] == TEXT and row["ratio"] == MAP_RATIO:
            row["lengths"] = cache.seq_lens[:, 0].tolist()
        yield row


def _knows(full: Mapping[str, Any]) -> bool:
    return full["setting"] == TEXT or any(map(any, full["right"].values()))


class _Progress:
    """A progress bar with the time left, on a terminal."""

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, unit="cache", desc="quality", disable=None, smoothing=0.05)

    def step(self, what: str, done: int) -> None:
        if what:
            self._bar.set_postfix_str(what)
        self._bar.update(done)
