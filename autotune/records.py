"""Records of measurements, and reading them from files that are not trusted."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from kvops.autotune.devices import DeviceFacts, slug
from kvops.autotune.spec import OpSpec

FORMAT = 1
# A record takes less than 2 KiB, so even a file of very many shapes is below this.
MAX_BYTES = 8 << 20
_ORIGINS = ("measured", "borrowed", "heuristic")


class ForeignFileError(ValueError):
    """A file in the format of another version, which must not be changed."""


@dataclass(frozen=True)
class Times:
    """Microseconds over ``count`` launches."""

    p20: float
    p50: float
    p80: float
    count: int

    @classmethod
    def from_json(cls, value: object) -> Times:
        if not isinstance(value, Mapping) or set(value) != set(cls.__dataclass_fields__):
            raise ValueError(f"time: expected the fields {', '.join(cls.__dataclass_fields__)}, got {value!r:.200}")
        for name in ("p20", "p50", "p80"):
            _finite(f"time.{name}", value[name])
        if not isinstance(value["count"], int) or value["count"] < 1:
            raise ValueError(f"time.count: expected at least 1, got {value['count']!r:.100}")
        return cls(**value)


@dataclass(frozen=True)
class Record:
    """A configuration for one problem on one device, and how it was found.

    Attributes:
        source: hash of the measured kernel's sources.
        runner_up: the second best, ``{"config", "p50"}``; None without one.
        heuristic_us: the heuristic's p50 in the same rounds.
        static: registers, spills and shared memory of the compiled kernel; empty if unknown.
        check: largest error against the reference, and its limit.
        environment: driver, CUDA, torch and Triton.
    """

    op: str
    source: str
    key: dict[str, int]
    shape: dict[str, int]
    config: dict[str, int | bool]
    time: Times
    device: DeviceFacts
    environment: dict[str, str]
    date: str
    origin: str = "measured"
    runner_up: dict[str, Any] | None = None
    heuristic_us: float | None = None
    static: dict[str, int] = field(default_factory=dict)
    check: dict[str, float] = field(default_factory=dict)

    @property
    def problem(self) -> dict[str, int]:
        return {**self.key, **self.shape}

    @property
    def triton(self) -> str:
        return self.environment.get("triton", "")

    @property
    def identity(self) -> tuple[Any, ...]:
        """A newer record of equal identity replaces this one: problem, device, sources and Triton."""
        key, shape = tuple(sorted(self.key.items())), tuple(sorted(self.shape.items()))
        return self.op, self.device.name, key, shape, self.source, self.triton

    @property
    def filename(self) -> str:
        """One file for each identity, so that writers of different records use different files."""
        digest = hashlib.sha256(repr(self.identity).encode()).hexdigest()[:16]
        return f"{self.op}.{slug(self.device.name)}.{digest}.json"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: object, spec: OpSpec) -> Record:
        """Raises ValueError unless every field is present, of its type and finite, and fits ``spec``."""
        if not isinstance(value, Mapping) or set(value) != set(cls.__dataclass_fields__):
            raise ValueError(f"record: expected the fields {', '.join(cls.__dataclass_fields__)}, got {value!r:.200}")
        if value["op"] != spec.name:
            raise ValueError(f"op: expected {spec.name}, got {value['op']!r:.100}")
        for name in ("source", "date"):
            if not isinstance(value[name], str) or len(value[name]) > 64:
                raise ValueError(f"{name}: expected a short string, got {value[name]!r:.100}")
        if value["origin"] not in _ORIGINS:
            raise ValueError(f"origin: expected one of {', '.join(_ORIGINS)}, got {value['origin']!r:.100}")
        for name, names in (("key", spec.key), ("shape", spec.sizes)):
            if not isinstance(value[name], Mapping) or set(value[name]) != set(names):
                raise ValueError(f"{name}: expected the fields {', '.join(names)}, got {value[name]!r:.200}")
        spec.check_problem({**value["key"], **value["shape"]})
        spec.config_from_json(value["config"])
        runner_up = value["runner_up"]
        if runner_up is not None:
            if not isinstance(runner_up, Mapping) or set(runner_up) != {"config", "p50"}:
                raise ValueError(f"runner_up: expected the fields config and p50, got {runner_up!r:.200}")
            spec.config_from_json(runner_up["config"])
            _finite("runner_up.p50", runner_up["p50"])
        if value["heuristic_us"] is not None:
            _finite("heuristic_us", value["heuristic_us"])
        for name, kind in (("environment", str), ("static", int), ("check", (int, float))):
            mapping = value[name]
            if not isinstance(mapping, Mapping) or len(mapping) > 16:
                raise ValueError(f"{name}: expected a few named values, got {mapping!r:.200}")
            for inner, entry in mapping.items():
                if not isinstance(entry, kind) or (isinstance(entry, str) and len(entry) > 128):
                    raise ValueError(f"{name}.{inner}: got {entry!r:.100}")
        fields = dict(value)
        fields["device"] = DeviceFacts.from_json(value["device"])
        fields["time"] = Times.from_json(value["time"])
        return cls(**fields)


def _finite(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r:.100}")


def dump(records: list[Record]) -> str:
    """The text of a file, sorted and indented for readable diffs."""
    ordered = sorted(records, key=lambda record: repr(record.identity))
    return (
        json.dumps({"format": FORMAT, "records": [record.as_json() for record in ordered]}, indent=1, sort_keys=True)
        + "\n"
    )


def load(text: str, spec: OpSpec) -> list[Record]:
    """Raises ForeignFileError for another format, and ValueError unless the file has records of ``spec``."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("file: nested too deeply") from error
    if not isinstance(value, dict) or "format" not in value:
        raise ValueError(f"file: expected an object with a format, got {text[:60]!r}")
    if value["format"] != FORMAT:
        raise ForeignFileError(f"file: expected format {FORMAT}, got {value['format']!r:.60}")
    if not isinstance(value.get("records"), list):
        raise ValueError("file: expected a list of records")
    return [Record.from_json(record, spec) for record in value["records"]]


def _no_constant(name: str) -> float:
    raise ValueError(f"file: expected finite numbers, got {name}")


def read_text(path: str) -> str:
    """The text of a regular file of limited size. Raises OSError or ValueError, at once also for a pipe or a device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("file: expected a regular file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"file: expected at most {MAX_BYTES} bytes, got {status.st_size}")
        return file.read(MAX_BYTES + 1).decode()
