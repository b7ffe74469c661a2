"""The results of a tuning run so far, written to disk after every step, so that a killed run can resume."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvops.autotune.devices import slug
from kvops.autotune.spec import Config, OpSpec, Problem, config_to_json

# A candidate is rejected if the tuner ended this often during its trial: it may crash the machine.
_FATAL_STARTS = 2


class Ledger:
    """JSON lines, each synchronised to disk before the next step. With ``path`` None they stay in memory."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._separator = "\n"  # the last line of an earlier run may be incomplete
        self._starts: Counter[str] = Counter()
        self._checks: dict[str, dict[str, float]] = {}
        self._rejected: dict[str, str] = {}
        self._samples: dict[tuple[int, str], list[float]] = {}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lines = path.read_bytes().decode(errors="replace").splitlines()
            except FileNotFoundError:
                lines = []
            for line in lines:
                try:
                    self._apply(json.loads(line))
                except (ValueError, KeyError, TypeError):
                    continue  # the line that was being written when the run was killed
        for config, count in self._starts.items():
            if count >= _FATAL_STARTS and config not in self._checks:
                self._rejected.setdefault(config, f"ended the tuner {count} times")

    @staticmethod
    def path_of(folder: Path, spec: OpSpec, problem: Problem, device: str, mark: Sequence[str]) -> Path:
        """The ledger of one problem under one state of sources and versions (``mark``)."""
        digest = hashlib.sha256(json.dumps([dict(problem), list(mark)]).encode()).hexdigest()[:16]
        return folder / "ledger" / f"{spec.name}.{slug(device)}.{digest}.jsonl"

    def _apply(self, event: dict[str, Any]) -> None:
        config = _key(event["config"])
        if event["event"] == "started":
            self._starts[config] += 1
        elif event["event"] == "checked":
            self._checks[config] = {"error": float(event["error"]), "limit": float(event["limit"])}
        elif event["event"] == "rejected":
            self._rejected[config] = str(event["reason"])
        elif event["event"] == "measured":
            self._samples[int(event["stage"]), config] = [float(sample) for sample in event["samples"]]

    def _write(self, event: dict[str, Any]) -> None:
        self._apply(event)
        if self.path is None:
            return
        with open(self.path, "a") as file:
            file.write(f"{self._separator}{json.dumps(event)}\n")
            file.flush()
            os.fsync(file.fileno())
        self._separator = ""

    def start(self, config: Config) -> None:
        self._write({"event": "started", "config": config_to_json(config)})

    def check(self, config: Config, check: dict[str, float]) -> None:
        self._write({"event": "checked", "config": config_to_json(config), **check})

    def reject(self, config: Config, reason: str) -> None:
        self._write({"event": "rejected", "config": config_to_json(config), "reason": reason})

    def measured(self, stage: int, config: Config, samples: list[float]) -> None:
        self._write({"event": "measured", "stage": stage, "config": config_to_json(config), "samples": samples})

    def check_of(self, config: Config) -> dict[str, float] | None:
        return self._checks.get(_key(config_to_json(config)))

    def rejection_of(self, config: Config) -> str | None:
        return self._rejected.get(_key(config_to_json(config)))

    def samples_of(self, stage: int, config: Config) -> list[float] | None:
        return self._samples.get((stage, _key(config_to_json(config))))

    def remove(self) -> None:
        """Remove the file, once the result is stored."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _key(config: dict[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)
