"""The choice of a launch configuration: a dictionary look-up at every launch, and the search behind its first call.

A launch never tunes. The search tries in this order: an override; records of this device (exact, same bucket, nearest
shape); records of this device with another Triton or older sources; records of the nearest GPU; the heuristic; a safe
candidate, where the heuristic's choice cannot run, spills, or was never compiled for this device while the candidate
was. A borrowed configuration is checked against the limits of this device first. What a driver refused at a launch
(``kvops.autotune.relaunch``) is not chosen again.

Of two kernels with the same results (``OpSpec.twin``), the one for some GPUs runs only if a record of this device shows
that it is faster (``choose_proven``).
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
from kvops.autotune.refusals import Refusals
from kvops.autotune.spec import Config, OpSpec, Problem, config_to_json, words
from kvops.autotune.store import Journal, Store, tell_once
from kvops.cli.console import suggestion
from kvops.extras import require

_OURS = (*FAMILIES, *HOPPER_FAMILIES)
# The most shapes to remember. Beyond that the table is cleared, for a service that never repeats a shape.
_MAX_CHOSEN = 16_384
# Origins of records that were measured on this device with the current sources and Triton.
_PROVEN = ("override", "exact", "bucket", "nearest")
# The size that represents all others where a choice must not depend on sizes.
_CANONICAL = 4096


@dataclass(frozen=True)
class Choice:
    """A configuration and where it comes from.

    ``origin`` is one of override, exact, bucket, nearest, other-version, other-device, heuristic, safe, none (no
    candidate can run, and a launch raises RuntimeError); ``distance`` is in doublings; ``refused`` has the reason why
    each nearer record, and each configuration that a driver refused, was not used. For a family with a twin, ``runs``
    says which of the two a launch uses and why. If a launch cannot use a proven configuration, a choice with the origin
    refused and the reason comes before the choice that it uses.
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
        """The verdict of the feasibility table on it."""
        return judge(self.spec, self.config, self.problem, self.device)


_specs: dict[str, OpSpec] = {spec.name: spec for spec in _OURS}
_overrides: dict[str, Config] = {}
_watchers: list[list[Choice]] = []
_store: Store | None = None
_journal: Journal | None = None
_refusals: Refusals | None = None
_invariant = False
_chosen: dict[tuple[str, LaunchDevice, tuple[int, ...]], Config] = {}
# For families with a twin; None where the twin runs.
_proven: dict[tuple[str, LaunchDevice, tuple[int, ...]], Config | None] = {}
_UNKNOWN = object()


def choose(op: str, device: LaunchDevice, *problem: int) -> Any:
    """The configuration of ``op`` for ``problem``: the key, then the sizes, in the order of its spec.

    It neither blocks nor tunes.

    Raises KeyError for an operator that is not registered, and RuntimeError if no configuration can run the problem.
    """
    config = _chosen.get((op, device, problem))
    return _choose_first(op, device, problem) if config is None else config


def _choose_first(op: str, device: LaunchDevice, values: tuple[int, ...]) -> Config:
    spec = _specs[op]
    choice = resolve(spec, dict(zip(spec.fields, values, strict=True)), facts_of(device))
    _note_miss(choice, device)
    if choice.origin == "none":
        raise RuntimeError(
            f"{op}: no configuration can run {words(choice.problem)} on {device.name}: {choice.reason}"
            + "".join(f"; {refusal}" for refusal in choice.refused)
        )
    for watcher in _watchers:
        watcher.append(choice)
    if not _watchers:  # a watcher sees every call
        if len(_chosen) >= _MAX_CHOSEN:
            _chosen.clear()
        _chosen[op, device, values] = choice.config
    return choice.config


def _note_miss(choice: Choice, device: LaunchDevice) -> None:
    if choice.origin in ("other-version", "other-device", "heuristic", "safe") and device.name != device.arch:
        # Without a real GPU (compiling only, the interpreter) the device has the name of its architecture.
        journal = _open_journal()
        if journal is not None:
            journal.add(choice.spec.name, choice.problem, choice.device.name)


def choose_proven(op: str, device: LaunchDevice, *problem: int, refusal: Callable[[], str | None]) -> Any:
    """The configuration of ``op``, a family with a twin, if a measurement on this device found it faster; else None.

    With None the launch uses the twin. ``refusal`` returns the reason why ``op`` cannot run this call, or None; it is
    called only if the answer matters.
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
    # Without a real GPU there is no proof: the records would be those of the GPU that represents the architecture.
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


def _open_refusals() -> Refusals:
    global _refusals
    if _refusals is None:
        layer = _open_store().writable
        _refusals = Refusals(None if layer is None else layer.folder)
    return _refusals


def refuse(choice: Choice, reason: str) -> None:
    """Never choose this configuration for problems of this key again: the driver refused it, for ``reason``."""
    _open_refusals().add(choice.spec, choice.problem, choice.device, choice.config, reason)
    _forget_choices()
    place = f"{choice.spec.name} {words(choice.spec.key_of(choice.problem))} on {choice.device.name}"
    tell_once(
        f"{place}: the driver refused {words(config_to_json(choice.config))} ({reason}); launches take the next "
        f"configuration. Next step: python -m kvops.autotune explain {choice.spec.name}, or tune on this GPU"
    )


def is_overridden() -> bool:
    """Whether some configuration is forced by :func:`override`."""
    return bool(_overrides)


def resolve(spec: OpSpec, problem: Problem, device: DeviceFacts) -> Choice:
    """Search in the full order, without caching the result."""
    if spec.name in _overrides:
        return Choice(spec, problem, device, _overrides[spec.name], "override", "an override is active")
    allowed: Callable[[Config], bool]
    if _is_invariant():
        default = spec.heuristic({**problem, **dict.fromkeys(spec.sizes, _CANONICAL)}, device)
        numerics = spec.numerics(default)
        why = "batch-invariant: one numerics class for all sizes"

        def allowed(config: Config) -> bool:
            return spec.numerics(config) == numerics

    else:
        default = spec.heuristic(problem, device)
        why = ""

        def allowed(config: Config) -> bool:
            return True

    if device.arch == "interpreter" and spec.refuse(default, problem, device) is None:
        return Choice(spec, problem, device, default, "heuristic", why or spec.reason(problem, device, default))
    by_driver = {} if device.arch == "interpreter" else _open_refusals().of(spec, problem, device)
    refused = [f"{words(config_to_json(config))}: refused by the driver ({text})" for config, text in by_driver.items()]
    for origin, apart, record in () if device.arch == "interpreter" else _ranked(spec, problem, device):
        config = spec.config(**record.config)
        reason = _refusal(spec, config, problem, device, origin) if allowed(config) else "another numerics class"
        if reason is None and config not in by_driver:
            place = f"{record.time.p50:.1f} µs for {words(record.shape)} on {record.device.name}, {record.date[:10]}"
            return Choice(spec, problem, device, config, origin, place, apart, record, tuple(refused))
        if reason is not None:
            refused.append(f"{origin} {words(record.shape)} on {record.device.name}: {words(record.config)}: {reason}")
    config, origin, reason = _unmeasured(spec, default, problem, device, allowed, by_driver)
    reason = why or reason if origin == "heuristic" else reason
    return Choice(spec, problem, device, config, origin, reason, refused=tuple(refused))


def _unmeasured(
    spec: OpSpec,
    default: Config,
    problem: Problem,
    device: DeviceFacts,
    allowed: Callable[[Config], bool],
    by_driver: Mapping[Config, str],
) -> tuple[Config, str, str]:
    """The configuration without a record, its origin and the reason.

    The heuristic's choice, unless a candidate is better known: a proven one if it spills or was never compiled for this
    device; any that may run if it cannot. A family with a twin runs measured configurations only, so its choice stays.
    """
    verdict = judge(spec, default, problem, device)
    impossible = verdict.reason if verdict.status == "impossible" else ""
    if default in by_driver:
        impossible = f"was refused by the driver ({by_driver[default]})"
    if not impossible and (spec.twin or verdict.status == "proven"):
        return default, "heuristic", spec.reason(problem, device, default)
    others: dict[str, Config] = {}
    for config in spec.candidates(problem, device):
        if config != default and allowed(config) and config not in by_driver:
            others.setdefault(judge(spec, config, problem, device).status, config)
    given_up = f"the heuristic's choice, {words(config_to_json(default))},"
    if not impossible:
        if "proven" not in others:
            return default, "heuristic", spec.reason(problem, device, default)
        if verdict.status == "spills":
            reason = spec.reason(problem, device, others["proven"])
            return others["proven"], "heuristic", f"{reason}; {words(config_to_json(default))} spills"
        return others["proven"], "safe", f"{given_up} is unproven: {verdict.reason}"
    for status in ("proven", "unproven", "spills"):
        if status in others:
            return others[status], "safe", f"{given_up} {impossible}"
    return default, "none", f"no candidate fits, and {given_up} {impossible}"


def contest(spec: OpSpec, problem: Problem, device: DeviceFacts) -> tuple[bool, Choice]:
    """Whether a family runs in place of its twin, and its choice, whose ``runs`` gives the reason.

    It runs if it has a record of this device and the current sources with less time than the twin's record of the same
    problem, if any. An override decides for the family that it names.
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
    measured = f"{spec.name} takes {record.time.p50:.1f} µs for {words(record.shape)}"
    overruled = resolve(twin, problem, device).origin == "override"
    if overruled != (choice.origin == "override"):
        return decided(not overruled, "the override folder has a record of it")
    for _, _, rival in _ranked(twin, record.problem, device):
        if rival.problem == record.problem and rival.device.name == device.name:
            compared = f"{measured}, {twin.name} {rival.time.p50:.1f}"
            return decided(record.time.p50 < rival.time.p50, compared)
    return decided(True, f"{measured}, {twin.name} has no record of that")


def _ranked(spec: OpSpec, problem: Problem, device: DeviceFacts) -> Iterator[tuple[str, float, Record]]:
    """(origin, distance, record) of all records that may be used, best first, in an order without ties."""
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
    """The reason why a record's configuration cannot be used here, or None.

    A configuration that was measured on this device may spill. One of another device must be proven for this one.
    """
    verdict = judge(spec, config, problem, device)
    if verdict.status == "impossible" or (origin == "other-device" and verdict.status != "proven"):
        return verdict.reason
    return None


def specs() -> Mapping[str, OpSpec]:
    """Every registered family by name."""
    return _specs


def register(spec: OpSpec) -> OpSpec:
    """Register a kernel family, for ``choose(spec.name, device, *numbers)``.

    A second registration replaces the first. Raises ValueError for a name of kvops' own families.
    """
    if spec.name in {family.name for family in _OURS}:
        raise ValueError(f"name: expected a name other than those of kvops, got {spec.name!r}")
    _specs[spec.name] = spec
    _forget_choices()
    return spec


def forget() -> None:
    """Drop all choices and records. The next look-up reads files and environment variables again."""
    global _store, _journal, _refusals
    if _journal is not None:
        _journal.flush()
    _store = _journal = _refusals = None
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
    """Use ``config`` for every launch of ``op`` in this process, for any shape. The innermost override holds.

    Raises TypeError for a configuration of another family.
    """
    spec = _specs[op]
    if type(config) is not spec.config:
        raise TypeError(f"config: expected {spec.config.__name__}, got {type(config).__name__}")
    before = dict(_overrides)
    _overrides.pop(op, None)
    _overrides[op] = config  # last in the order, as the innermost
    _forget_choices()
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)
        _forget_choices()


@contextmanager
def invariant() -> Iterator[None]:
    """Choose within one numerics class for all sizes, so that a row gets the same bits in every batch.

    ``KVOPS_BATCH_INVARIANT=1`` does this for a whole process.
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
def watch(choices: list[Choice] | None = None) -> Iterator[list[Choice]]:
    """Collect every choice that launches make: ``with watch() as choices: kvops.flash_attention(...)``.

    They are appended to ``choices``, a new list by default.
    """
    choices = [] if choices is None else choices
    _watchers.append(choices)
    _forget_choices()
    try:
        yield choices
    finally:
        _watchers[:] = [watcher for watcher in _watchers if watcher is not choices]  # equal lists are others
        _forget_choices()


@contextmanager
def using(store: Store) -> Iterator[None]:
    """Use only ``store`` for look-ups; misses go to its writable layer, if it has one."""
    global _store, _journal, _refusals
    before = _store, _journal, _refusals
    _store, _journal, _refusals = store, None, None
    _forget_choices()
    try:
        yield
    finally:
        _store, _journal, _refusals = before
        _forget_choices()


def use(store: Store) -> None:
    """Use only ``store`` for look-ups from now on."""
    global _store, _journal, _refusals
    _store, _journal, _refusals = store, None, None
    _forget_choices()


def explain(
    op: str, problem: Problem | None = None, device: str | DeviceFacts | LaunchDevice | None = None
) -> list[Choice]:
    """The configuration of each family behind ``op`` (a family, or an operator of ``torch.ops.kvops``), with its
    reason.

    Without a problem, the typical problems of each family; for a family with a twin, those that it can run. ``device``
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
        for own in problems:
            if not spec.twin:
                twins = [twin for twin in _specs.values() if twin.twin == spec.name and twin.candidates(own, facts)]
                runs = "; ".join(contest(twin, own, facts)[1].runs for twin in twins)
                choices.append(replace(resolve(spec, own, facts), runs=runs))
            elif spec.candidates(own, facts):
                choices.append(contest(spec, own, facts)[1])
    return choices
