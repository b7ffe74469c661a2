"""How an area is swept: cases drawn from a seed, checked, and shrunk where the check fails.

An area is a module with three names: ``Case``, a frozen dataclass of plain values, by default the simplest case;
``draw(random)``, which returns one; and ``check(case)``, which raises where kvops is wrong. A case holds the seed of
its tensors, so it is all that a repetition needs. Any combination of values must be a case: shrinking mixes them.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import time
import traceback
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

AREAS = (
    "dense",
    "packed",
    "merge",
    "sdpa",
    "paged",
    "latents",
    "eviction",
    "cache",
    "verification",
    "sampling",
    "lookup",
    "flash_attn",
    "families",
)


class Failure(NamedTuple):
    """A case that went wrong, as small as shrinking made it, and what it raised."""

    case: Any
    error: str
    kind: str  # by which failures are told apart


class Result(NamedTuple):
    cases: int
    seconds: float
    failures: list[Failure]


def to_json(case: Any) -> str:
    """The values that are not the defaults, as one line."""
    changed = {
        field.name: getattr(case, field.name)
        for field in dataclasses.fields(case)
        if getattr(case, field.name) != field.default
    }
    return json.dumps(changed)


def from_json(kind: type, text: str) -> Any:
    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return kind(**{name: tuples(value) for name, value in json.loads(text).items()})


def failure_of(check: Callable[[Any], None], case: Any) -> Failure | None:
    try:
        check(case)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__} in {frame.filename.rsplit('/', 1)[-1]}:{frame.name}"
        about = re.sub(r"[-\d.]+(e[-+]?\d+)?", "", str(error))[:24]
        return Failure(case, "".join(traceback.format_exception(error)), f"{kind}: {about}")
    return None


def _simpler_values(value: Any, default: Any) -> Iterator[Any]:
    if value == default:
        return
    yield default
    if isinstance(value, tuple):
        half = len(value) // 2
        if half:
            yield value[:half]
            yield value[half:]
        for i, item in enumerate(value):
            yield (*value[:i], *value[i + 1 :])
            for simpler in _simpler_values(item, type(item)()):
                yield (*value[:i], simpler, *value[i + 1 :])
    elif isinstance(value, int) and not isinstance(value, bool) and isinstance(default, int):
        distance = value - default
        yield from (default + int(distance / 2), value - (1 if distance > 0 else -1))


def simpler(case: Any) -> Iterator[Any]:
    """Cases that differ in one value, which is nearer to its default."""
    for field in dataclasses.fields(case):
        for value in _simpler_values(getattr(case, field.name), field.default):
            yield dataclasses.replace(case, **{field.name: value})


def shrink(check: Callable[[Any], None], failure: Failure, seconds: float) -> Failure:
    """The same kind of failure, smaller, for as long as something smaller has it and there is time."""
    end = time.monotonic() + seconds
    tried = {failure.case}
    smaller = True
    while smaller:
        smaller = False
        for case in simpler(failure.case):
            if time.monotonic() > end:
                return failure
            if case in tried:
                continue
            tried.add(case)
            found = failure_of(check, case)
            if found is not None and found.kind == failure.kind:
                failure, smaller = found, True
                break
    return failure


def sweep(
    area: ModuleType,
    seed: int,
    *,
    seconds: float = float("inf"),
    cases: float = float("inf"),
    shrink_seconds: float = 20.0,
    most_failures: int = 5,
    before: Callable[[Any], None] = lambda case: None,
) -> Result:
    """Check cases of one area until the time, the cases or the patience for failures of new kinds runs out."""
    begin, number = time.monotonic(), 0
    failures: dict[str, Failure] = {}
    while number < cases and time.monotonic() - begin < seconds and len(failures) < most_failures:
        case = area.draw(random.Random(f"{area.__name__} {seed} {number}"))
        number += 1
        before(case)
        failure = failure_of(area.check, case)
        if failure is not None and failure.kind not in failures:
            failures[failure.kind] = shrink(area.check, failure, shrink_seconds)
    return Result(number, time.monotonic() - begin, list(failures.values()))
