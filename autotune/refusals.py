"""Configurations that a driver refused at a launch, although predicates and tables allowed them.

A refusal holds for the key of a kernel family on GPUs of one name, for the sources and the Triton that met it. It is
remembered in the process and in a file of the store, so that the next process does not launch it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvops.autotune.devices import DeviceFacts
from kvops.autotune.feasibility import current_source
from kvops.autotune.records import read_text
from kvops.autotune.spec import Config, OpSpec, Problem, config_to_json
from kvops.autotune.store import Journal, tell_once
from kvops.extras import require

FILE = "refusals.jsonl"
_Place = tuple[str, str, tuple[tuple[str, int], ...]]


class Refusals:
    """The refusals of this process, and those in ``folder``; without a folder nothing is read or written."""

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / FILE
        self._journal = None if folder is None else Journal(folder, FILE)
        self._by_place: dict[_Place, dict[Config, str]] = {}
        self._read: set[str] = set()

    def of(self, spec: OpSpec, problem: Problem, device: DeviceFacts) -> Mapping[Config, str]:
        """The refused configurations of a problem, with the reasons."""
        if spec.name not in self._read:
            self._read.add(spec.name)
            self._load(spec)
        return self._by_place.get(_place(spec, spec.key_of(problem), device.name), {})

    def add(self, spec: OpSpec, problem: Problem, device: DeviceFacts, config: Config, reason: str) -> None:
        key = spec.key_of(problem)
        self._by_place.setdefault(_place(spec, key, device.name), {})[config] = reason
        if self._journal is not None:
            value = {"op": spec.name, "key": key, "device": device.name, "config": config_to_json(config)}
            self._journal.write(value | {"reason": reason} | _made_by(spec))
            self._journal.flush()

    def _load(self, spec: OpSpec) -> None:
        """Refusals of other sources or another Triton, and damaged lines, are passed over."""
        if self._path is None or not self._path.exists():
            return
        try:
            lines = read_text(str(self._path)).splitlines()
        except (OSError, ValueError) as error:
            tell_once(f"{self._path} is ignored: {error}")
            return
        for number, line in enumerate(lines, 1):
            try:
                value = json.loads(line)
                if value["op"] != spec.name or any(value[name] != text for name, text in _made_by(spec).items()):
                    continue
                place = _place(spec, value["key"], value["device"])
                self._by_place.setdefault(place, {})[spec.config_from_json(value["config"])] = str(value["reason"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                tell_once(f"{self._path}:{number} is not a valid refusal and is skipped: {error}")


def _place(spec: OpSpec, key: Mapping[str, int], device: str) -> _Place:
    return spec.name, device, tuple((name, key[name]) for name in spec.key)


def _made_by(spec: OpSpec) -> dict[str, Any]:
    return {"source": current_source(spec), "triton": require("triton").__version__}
