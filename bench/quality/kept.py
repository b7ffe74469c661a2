"""Rows into shares of the full cache's quality: 1 is as good as with everything kept."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import mean
from typing import NamedTuple

from bench.results import Result, Row
from kvops.generation.evaluate import AFTER, BEFORE, TEXT

SETTINGS = (TEXT, BEFORE, AFTER)
PERPLEXITY, AGREEMENT = "perplexity", "agreement"


class Form(NamedTuple):
    """A policy whose heads compete for blocks (``ragged``) or keep the same number of them."""

    policy: str
    ragged: bool

    @property
    def heads(self) -> str:
        return "ragged" if self.ragged else "equal"


class Task(NamedTuple):
    setting: str
    name: str


@dataclass
class Kept:
    """What a result says. Policies that were measured on fewer units than others, and units that were not measured for
    every form and ratio, are ``left_out`` of all of it.

    Attributes:
        forms, ratios, tasks: what there are shares of; ``default`` are the forms that policies have by themselves.
        main: the label of the texts that count among the tasks; others are in ``texts`` only.
        shares: by form, ratio and task.
        texts: the shares of perplexity by label, form and ratio.
        answered: of each task with answers, how many the full cache gives right, and how many there are.
        rows: of the units that count.
    """

    forms: list[Form] = field(default_factory=list)
    default: set[Form] = field(default_factory=set)
    ratios: list[int] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    main: str = ""
    left_out: list[str] = field(default_factory=list)
    shares: dict[tuple[Form, int, Task], float] = field(default_factory=dict)
    texts: dict[str, dict[tuple[Form, int], float]] = field(default_factory=dict)
    answered: dict[Task, tuple[int, int]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @property
    def settings(self) -> list[str]:
        """Those that have tasks."""
        return [setting for setting in SETTINGS if any(task.setting == setting for task in self.tasks)]

    def setting(self, form: Form, ratio: int, setting: str) -> float:
        """The mean over the tasks of a setting."""
        return mean(self.shares[form, ratio, task] for task in self.tasks if task.setting == setting)

    def overall(self, form: Form, ratio: int) -> float:
        """The mean over the settings, each counting the same."""
        return mean(self.setting(form, ratio, setting) for setting in self.settings)

    def best(self, ratio: int, setting: str | None = None, ragged: bool | None = None) -> tuple[Form, float]:
        """The form that keeps most, overall or in a setting, of all or of those with ragged or equal heads."""
        forms = [form for form in self.forms if ragged is None or form.ragged == ragged]
        shares = {form: self.of(form, ratio, setting) for form in forms}
        form = max(shares, key=lambda form: shares[form])
        return form, shares[form]

    def of(self, form: Form, ratio: int, setting: str | None) -> float:
        return self.overall(form, ratio) if setting is None else self.setting(form, ratio, setting)

    def pairs(self) -> list[str]:
        """Policies measured in both forms."""
        return [form.policy for form in self.forms if form.ragged and form._replace(ragged=False) in self.forms]

    def gain(self, policy: str, ratio: int, setting: str | None = None) -> float:
        """What ragged heads keep beyond equal ones at the same number of blocks."""
        ragged, equal = (self.of(Form(policy, kind), ratio, setting) for kind in (True, False))
        return ragged - equal


def form_of(row: Row) -> Form:
    return Form(row["policy"], row["scope"] != "head")


def label_of(row: Row) -> str:
    """``text 4k`` of the unit ``text 4k, part 0``."""
    return row["unit"].partition(",")[0]


def kept(result: Result) -> Kept:
    """ValueError where nothing has been measured whole."""
    rows = result["rows"]
    full = {row["unit"]: row for row in rows if row["policy"] == "full"}
    compressed = [row for row in rows if row["policy"] != "full"]
    study = Kept(
        forms=list(dict.fromkeys(map(form_of, sorted(compressed, key=lambda row: row["policy"])))),
        default={form_of(row) for row in compressed if row["default"]},
        ratios=sorted({row["ratio"] for row in compressed}),
    )
    by_unit = {unit: [row for row in compressed if row["unit"] == unit] for unit in full}
    measured = {unit: {(form_of(row), row["ratio"]) for row in members} for unit, members in by_unit.items()}
    # Policies that came later: some unit is whole for another one and has nothing of theirs.
    whole = [
        {form for form, _ in those}
        for those in measured.values()
        if any(all((form, ratio) in those for ratio in study.ratios) for form in study.forms)
    ]
    behind = [form for form in study.forms if any(form not in there for there in whole)]
    study.forms = [form for form in study.forms if form not in behind]
    study.default -= set(behind)
    study.left_out = list(dict.fromkeys(form.policy for form in behind))
    everything = {(form, ratio) for form in study.forms for ratio in study.ratios}
    for unit, members in by_unit.items():
        if measured[unit] >= everything:
            study.rows += [row for row in members if form_of(row) in study.forms]
        elif members:
            study.left_out.append(unit)
    if not study.rows or not study.forms:
        raise ValueError("quality: expected units measured for every policy and ratio, got none; next step: go on")
    texts = [row for row in study.rows if row["setting"] == TEXT]
    study.main = label_of(texts[0]) if texts else ""
    _add_texts(study, texts, full)
    _add_answers(study, [row for row in study.rows if row["setting"] != TEXT], full)
    order = {setting: place for place, setting in enumerate(SETTINGS)}
    study.tasks = sorted(dict.fromkeys(task for _, _, task in study.shares), key=lambda task: order[task.setting])
    return study


def _add_texts(study: Kept, rows: Iterable[Row], full: dict[str, Row]) -> None:
    perplexity: dict[tuple[str, Form, int], list[float]] = {}
    agreement: dict[tuple[Form, int], list[float]] = {}
    for row in rows:
        form, ratio, label = form_of(row), row["ratio"], label_of(row)
        perplexity.setdefault((label, form, ratio), []).append(math.exp(full[row["unit"]]["nll"] - row["nll"]))
        if label == study.main:
            agreement.setdefault((form, ratio), []).append(row["top1"])
    for (label, form, ratio), shares in perplexity.items():
        study.texts.setdefault(label, {})[form, ratio] = mean(shares)
        if label == study.main:
            study.shares[form, ratio, Task(TEXT, PERPLEXITY)] = mean(shares)
    for (form, ratio), shares in agreement.items():
        study.shares[form, ratio, Task(TEXT, AGREEMENT)] = mean(shares)


def _add_answers(study: Kept, rows: Iterable[Row], full: dict[str, Row]) -> None:
    answers: dict[tuple[Form, int, Task], list[int]] = {}
    for row in rows:
        for name, right in row["right"].items():
            answers.setdefault((form_of(row), row["ratio"], Task(row["setting"], name)), []).extend(right)
    study.shares |= {key: mean(right) for key, right in answers.items()}
    counted: dict[Task, list[int]] = {}
    for row in full.values():
        for name, right in row.get("right", {}).items():
            if row["unit"] not in study.left_out:
                counted.setdefault(Task(row["setting"], name), []).extend(right)
    study.answered = {task: (sum(right), len(right)) for task, right in counted.items()}
