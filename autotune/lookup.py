"""Choosing a launch configuration: a dictionary look-up at every launch, and what stands behind its first time.

Nothing is ever tuned here. The order: an override, then records of this device (exact, same bucket, nearest shape), of
this device under another Triton or older sources, of the nearest GPU, then the heuristic, then the first candidate that
can run. Whatever is borrowed has been checked against this device's limits.

Where two kernels compute the same (``OpSpec.twin``), the one that needs a proof runs only if a record of this very
device has it faster (``choose_proven``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from kvops.autotune.devices import MAX_DEVICE_DISTANCE, DeviceFacts, LaunchDevice, by_name, distance, facts_of
from kvops.autotune.families import FAMILIES
from kvops.autotune.feasibility import Verdict, current_source, judge
from kvops.autotune.hopper import HOPPER_FAMILIES
from kvops.autotune.records import Record
from kvops.autotune.spec import Config, OpSpec, Problem, config_to_json, words
from kvops.autotune.store import Journal, Store
from kvops.cli.console import suggestion
from kvops.extras import require

_OURS = (*FAMILIES, *HOPPER_FAMILIES)
# Shapes that are remembered; a service that never sees the same shape twice starts over now and then.
_MAX_CHOSEN = 16_384
# Origins of what ran right on the very device, with the sources and the Triton of today.
_PROVEN = ("override", "exact", "bucket", "nearest")
# The sizes that stand for all others where a choice may not depend on them.
_CANONICAL = 4096


@dataclass(frozen=True)
class Choice:
    """A configuration and where it comes from.

    ``origin`` is one of override, exact, bucket, nearest, other-version, other-device, heuristic, safe; ``distance`` is
    in doublings; ``refused`` says of every nearer record why it was not taken. Of a family that has a twin, ``runs``
    says which of the two a launch takes and why. A launch that could not take a proven one is shown with the origin
    refused and the reason, before the choice that it took instead.
    """

    spec: OpSpec
    problem: Problem
    device: DeviceFacts
    config: Config
    origin: str
    reason: str
    distance: float = 0.0
    record: Record | None = None
    refused: tuple[str, ...] = ()
    runs: str = ""

    def __repr__(self) -> str:
        problem = ", ".join(f"{name}={size}" for name, size in self.problem.items())
        return f"Choice({self.spec.name}({problem}) on {self.device.name}: {self.config}, {self.origin}: {self.reason})"

    @property
    def verdict(self) -> Verdict:
        """What compiling without a GPU has proved of it."""
        return judge(self.spec, self.config, self.problem, self.device)


_specs: dict[str, OpSpec] = {spec.name: spec for spec in _OURS}
_overrides: dict[str, Config] = {}
_watchers: list[list[Choice]] = []
_store: Store | None = None
_journal: Journal | None = None
_invariant = False
_chosen: dict[tuple[str, LaunchDevice, tuple[int, ...]], Config] = {}
# Of families with a twin: None where the twin runs.
_proven: dict[tuple[str, LaunchDevice, tuple[int, ...]], Config | None] = {}
_UNKNOWN = object()


def choose(op: str, device: LaunchDevice, *problem: int) -> Any:
    """The configuration of ``op`` for ``problem``, its key and sizes in the order of its spec. Never blocks, never
    tunes.

    Raises KeyError for an operator that is not registered.
    """
    config = _chosen.get((op, device, problem))
    return _choose_first(op, device, problem) if config is None else config


def _choose_first(op: str, device: LaunchDevice, values: tuple[int, ...]) -> Config:
    spec = _specs[op]
    choice = resolve(spec, dict(zip(spec.fields, values, strict=True)), facts_of(device))
    _note_miss(choice, device)
    for watcher in _watchers:
        watcher.append(choice)
    if not _watchers:  # a watcher sees every call
        if len(_chosen) >= _MAX_CHOSEN:
            _chosen.clear()
        _chosen[op, device, values] = choice.config
    return choice.config


def _note_miss(choice: Choice, device: LaunchDevice) -> None:
    if choice.origin in ("other-version", "other-device", "heuristic", "safe") and device.name != device.arch:
        # Where nothing runs (compiling for a GPU, the interpreter) a device has its architecture's name.
        journal = _open_journal()
        if journal is not None:
            journal.add(choice.spec.name, choice.problem, choice.device.name)


def choose_proven(op: str, device: LaunchDevice, *problem: int, refusal: Callable[[], str | None]) -> Any:
    """The configuration of ``op``, a family with a twin, where a measurement on this very device has it faster; else
    None, and the launch takes its twin.

    ``refusal`` says why ``op`` cannot run the call at hand, or returns None; it is asked only where it matters.
    Raises KeyError for an operator that is not registered.
    """
    config = _proven.get((op, device, problem), _UNKNOWN)
    if config is _UNKNOWN:
        return _choose_proven_first(op, device, problem, refusal)
    return None if config is None or refusal() is not None else config


def _choose_proven_first(
    op: str, device: LaunchDevice, values: tuple[int, ...], refusal: Callable[[], str | None]
) -> Config | None:
    spec, config, reason = _specs[op], None, None
    # Where nothing runs, nothing has been proven either: the records are those of the GPU that stands for this one.
    if device.name != device.arch or op in _overrides:
        problem, facts = dict(zip(spec.fields, values, strict=True)), facts_of(device)
        runs, choice = contest(spec, problem, facts)
        if runs:
            config, reason = choice.config, refusal()
            for watcher in _watchers:
                watcher.append(choice if reason is None else replace(choice, origin="refused", reason=reason))
        elif not _overrides and spec.candidates(problem, facts) and refusal() is None:
            _note_miss(choice, device)
    if not _watchers:
        if len(_proven) >= _MAX_CHOSEN:
            _proven.clear()
        _proven[op, device, values] = config
    return config if reason is None else None


def _open_store() -> Store:
    global _store
    if _store is None:
        _store = Store()
    return _store


def _open_journal() -> Journal | None:
    global _journal
    if _journal is None:
        layer = _open_store().writable
        _journal = Journal(layer.folder) if layer is not None else None
    return _journal


def resolve(spec: OpSpec, problem: Problem, device: DeviceFacts) -> Choice:
    """The whole order, without remembering anything."""
    if spec.name in _overrides:
        return Choice(spec, problem, device, _overrides[spec.name], "override", "an override is active")
    must: Callable[[Config], bool]
    if _is_invariant():
        default = spec.heuristic({**problem, **dict.fromkeys(spec.sizes, _CANONICAL)}, device)
        numerics = spec.numerics(default)
        why = "batch-invariant: one numerics class for all sizes"

        def must(config: Config) -> bool:
            return spec.numerics(config) == numerics

    else:
        default = spec.heuristic(problem, device)
        why = ""

        def must(config: Config) -> bool:
            return True

    refused: list[str] = []
    if device.arch != "interpreter":
        for origin, apart, record in _ranked(spec, problem, device):
            config = spec.config(**record.config)
            reason = _refusal(spec, config, problem, device, origin) if must(config) else "another numerics class"
            if reason is None:
                place = (
                    f"{record.time.p50:.1f} µs for {words(record.shape)} on {record.device.name}, {record.date[:10]}"
                )
                return Choice(spec, problem, device, config, origin, place, apart, record, tuple(refused))
            refused.append(f"{origin} {words(record.shape)} on {record.device.name}: {words(record.config)}: {reason}")
    told = tuple(refused)
    refusal = spec.refuse(default, problem, device)
    if refusal is None:
        config, spills = _without_spills(spec, default, problem, device, must)
        reason = (why or spec.reason(problem, device, config)) + spills
        return Choice(spec, problem, device, config, "heuristic", reason, refused=told)
    for config in spec.candidates(problem, device):
        if must(config):
            return Choice(spec, problem, device, config, "safe", f"the heuristic's choice {refusal}", refused=told)
    return Choice(
        spec, problem, device, default, "heuristic", f"nothing else fits either, and this {refusal}", refused=told
    )


def _without_spills(
    spec: OpSpec, default: Config, problem: Problem, device: DeviceFacts, must: Callable[[Config], bool]
) -> tuple[Config, str]:
    """The first candidate that compiled without spills, where the heuristic's choice is known to spill; and a word on
    that. Where all do, the heuristic's; and of a family with a twin, of which nothing unmeasured runs."""
    if not spec.twin and judge(spec, default, problem, device).status == "spills":
        for config in spec.candidates(problem, device):
            if must(config) and judge(spec, config, problem, device).status == "proven":
                return config, f"; {words(config_to_json(default))} spills"
    return default, ""


def contest(spec: OpSpec, problem: Problem, device: DeviceFacts) -> tuple[bool, Choice]:
    """Whether a family with a twin runs in its place, and its own choice, whose ``runs`` says why or why not.

    It takes a record measured on this device from the sources as they are, and less time in it than the twin takes in
    one for the same problem, if there is one; or an override, which holds for whichever of the two it names.
    """
    choice, twin = resolve(spec, problem, device), _specs[spec.twin]

    def decided(runs: bool, why: str) -> tuple[bool, Choice]:
        return runs, replace(choice, runs=f"{spec.name if runs else twin.name}: {why}")

    named = next((op for op in reversed(_overrides) if op in (spec.name, twin.name)), None)
    if named is not None:
        return decided(named == spec.name, "an override is active")
    refusal = spec.refuse(choice.config, problem, device)
    if refusal is not None:
        return decided(False, f"{spec.name} {refusal}")
    if _is_invariant():
        return decided(False, "batch-invariant: one numerics class for all sizes")
    record = choice.record
    if record is None or choice.origin not in _PROVEN or record.origin != "measured":
        there = f"but {choice.origin}: {choice.reason}" if record is not None else "no record"
        return decided(False, f"{spec.name} has not been measured on {device.name} as it is now ({there})")
    told = f"{spec.name} takes {record.time.p50:.1f} µs for {words(record.shape)}"
    overruled = resolve(twin, problem, device).origin == "override"
    if overruled != (choice.origin == "override"):
        return decided(not overruled, "the override folder has a record of it")
    for _, _, other in _ranked(twin, record.problem, device):
        if other.problem == record.problem and other.device.name == device.name:
            compared = f"{told}, {twin.name} {other.time.p50:.1f}"
            return decided(record.time.p50 < other.time.p50, compared)
    return decided(True, f"{told}, {twin.name} has no record of that")


def _ranked(spec: OpSpec, problem: Problem, device: DeviceFacts) -> Iterator[tuple[str, float, Record]]:
    """(origin, distance, record) of all that may be borrowed, best first, in an order that no tie leaves open."""
    store = _open_store()
    records = store.records(spec)
    if not records:
        return
    triton = require("triton").__version__

    key, bucket, source = spec.key_of(problem), spec.bucket_of(problem), current_source(spec)
    ranked = []
    for layer, record in records:
        if record.key != key:
            continue
        far = distance(device, record.device)
        apart = spec.distance(problem, record.problem)
        same_bucket = spec.bucket_of(record.problem) == bucket
        if far > MAX_DEVICE_DISTANCE or (apart > spec.max_distance and not same_bucket):
            continue
        if far:
            origin, rank = "other-device", 5
        elif store.layers and store.layers[layer].name == "override":
            origin, rank = "override", 0
        elif record.source != source or record.triton != triton:
            origin, rank = "other-version", 4
        elif not apart:
            origin, rank = "exact", 1
        elif same_bucket:
            origin, rank = "bucket", 2
        else:
            origin, rank = "nearest", 3
        order = (rank, far, apart, -layer, json.dumps(record.config, sort_keys=True), record.date)
        ranked.append((order, origin, far + apart, record))
    ranked.sort(key=lambda entry: entry[0])
    yield from ((origin, apart, record) for _, origin, apart, record in ranked)


def _refusal(spec: OpSpec, config: Config, problem: Problem, device: DeviceFacts, origin: str) -> str | None:
    """Why a record's configuration cannot be used here. What ran on this very device may spill; what is borrowed from
    another must have been proved for this one."""
    verdict = judge(spec, config, problem, device)
    if verdict.status == "impossible" or (origin == "other-device" and verdict.status != "proven"):
        return verdict.reason
    return None


def specs() -> Mapping[str, OpSpec]:
    """Every registered family by name."""
    return _specs


def register(spec: OpSpec) -> OpSpec:
    """Bring a kernel under the store: ``choose(spec.name, device, *numbers)`` answers from then on.

    Registered again, the last one holds. Raises ValueError for a name of kvops' own families.
    """
    if spec.name in {family.name for family in _OURS}:
        raise ValueError(f"name: expected one that kvops does not use itself, got {spec.name!r}")
    _specs[spec.name] = spec
    _forget_choices()
    return spec


def forget() -> None:
    """Drop what was chosen and read: files are read again at the next look-up, the environment too."""
    global _store, _journal
    if _journal is not None:
        _journal.flush()
    _store = _journal = None
    _forget_choices()


def _forget_choices() -> None:
    _chosen.clear()
    _proven.clear()


def forget_records() -> None:
    """Read the files of the store in use again at the next look-up."""
    _open_store().forget()
    _forget_choices()


@contextmanager
def override(op: str, config: Config) -> Iterator[None]:
    """Every launch of ``op`` in this process takes ``config``, whatever its shape; entered again, the innermost holds.

    Raises TypeError for a configuration of another family.
    """
    spec = _specs[op]
    if type(config) is not spec.config:
        raise TypeError(f"config: expected {spec.config.__name__}, got {type(config).__name__}")
    before = dict(_overrides)
    _overrides.pop(op, None)
    _overrides[op] = config  # the last entered is the last
    _forget_choices()
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)
        _forget_choices()


@contextmanager
def invariant() -> Iterator[None]:
    """Choices of one numerics class, whatever the sizes: a row gets the same bits in any batch.

    ``KVOPS_BATCH_INVARIANT=1`` does so for a whole process.
    """
    global _invariant
    before, _invariant = _invariant, True
    _forget_choices()
    try:
        yield
    finally:
        _invariant = before
        _forget_choices()


def _is_invariant() -> bool:
    return _invariant or os.environ.get("KVOPS_BATCH_INVARIANT") == "1"


@contextmanager
def watch() -> Iterator[list[Choice]]:
    """Collect every choice that launches make: ``with watch() as choices: kvops.flash_attention(...)``."""
    choices: list[Choice] = []
    _watchers.append(choices)
    _forget_choices()
    try:
        yield choices
    finally:
        _watchers.remove(choices)
        _forget_choices()


@contextmanager
def using(store: Store) -> Iterator[None]:
    """Look-ups answer from ``store`` alone; misses go to its writable layer, if it has one."""
    global _store, _journal
    before = _store, _journal
    _store, _journal = store, None
    _forget_choices()
    try:
        yield
    finally:
        _store, _journal = before
        _forget_choices()


def use(store: Store) -> None:
    """From now on look-ups answer from ``store`` alone, whose layers are then never read again."""
    global _store, _journal
    _store, _journal = store, None
    _forget_choices()


def explain(
    op: str, problem: Problem | None = None, device: str | DeviceFacts | LaunchDevice | None = None
) -> list[Choice]:
    """What each family behind ``op`` (a family, or an operator of ``torch.ops.kvops``) would be launched with, and why.

    Without a problem: for the family's realistic ones, but not those that a family with a twin cannot take. ``device``
    is a name from the built-in table or an architecture; no GPU is needed. Raises ValueError for an unknown operator or
    device, or a problem of other fields.
    """
    families = [spec for spec in _specs.values() if op == spec.name or op in spec.operators]
    if not families:
        raise ValueError(
            f"op: expected one of {', '.join(_specs)}, or an operator that launches one, "
            f"got {op!r}{suggestion(op, _specs)}"
        )
    if device is None:
        raise ValueError("device: expected a name such as 'NVIDIA H100 80GB HBM3', got None")
    facts = (
        by_name(device) if isinstance(device, str) else device if isinstance(device, DeviceFacts) else facts_of(device)
    )
    choices = []
    for spec in families:
        problems: Sequence[Problem] = spec.problems if problem is None else [spec.check_problem(problem)]
        for each in problems:
            if not spec.twin:
                others = [
                    other for other in _specs.values() if other.twin == spec.name and other.candidates(each, facts)
                ]
                runs = "; ".join(contest(other, each, facts)[1].runs for other in others)
                choices.append(replace(resolve(spec, each, facts), runs=runs))
            elif spec.candidates(each, facts):
                choices.append(contest(spec, each, facts)[1])
    return choices
