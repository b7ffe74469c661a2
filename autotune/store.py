"""The store of records: layers of folders that any number of processes may share.

Later layers win: the wheel's, the site's, the user's, then the folder that ``KVOPS_AUTOTUNE_OVERRIDE`` names. Each
record has its own file. A writer writes a temporary file and renames it, so no lock is needed and no record is lost (8
processes that insert 40 records each leave 320 files). A damaged file counts as a miss: it is logged once, and moved to
a quarantine folder if the layer is writable.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvops.autotune.records import ForeignFileError, Record, dump, load, read_text
from kvops.autotune.spec import OpSpec, Problem
from kvops.user_cache import user_cache

LOGGER = logging.getLogger("kvops.autotune")
SHIPPED = Path(__file__).parent / "configs" / "tuned"
QUARANTINE = "quarantine"
JOURNAL = "misses.jsonl"
# The most files of a folder that are read, and the length at which a journal stops growing.
_MAX_FILES = 20_000
_MAX_JOURNAL = 1 << 20
# Misses of a burst, such as the first pass of a model, are written together after it.
_JOURNAL_DELAY = 2.0

_told: set[str] = set()


def tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        LOGGER.warning(message)


@dataclass(frozen=True)
class Layer:
    """A folder of record files. ``name`` appears in messages. Only a ``writable`` folder is changed."""

    name: str
    folder: Path
    writable: bool = False

    def paths(self, op: str) -> list[str]:
        """Files of one operator, sorted; none if the folder is missing or cannot be read."""
        try:
            with os.scandir(self.folder) as entries:
                names = [entry.name for entry, _ in zip(entries, range(_MAX_FILES), strict=False)]
        except FileNotFoundError:
            return []
        except OSError as error:
            tell_once(f"the {self.name} store {self.folder} cannot be read ({error.strerror}) and counts as empty")
            return []
        prefix = f"{op}."
        return [
            os.path.join(self.folder, name)
            for name in sorted(names)
            if name.startswith(prefix) and name.endswith(".json")
        ]

    def read(self, spec: OpSpec) -> list[Record]:
        """Every valid record of an operator. It never raises: a damaged file counts as a miss."""
        records: list[Record] = []
        for path in self.paths(spec.name):
            try:
                records += load(read_text(path), spec)
            except FileNotFoundError:
                continue  # replaced or removed since the folder was listed
            except ForeignFileError as error:
                tell_once(f"{path} is of another version and is not changed: {error}")
            except OSError as error:
                tell_once(f"{path} cannot be read ({error.strerror}) and counts as missing")
            except ValueError as error:
                self._set_aside(path, str(error))
        return records

    def _set_aside(self, path: str, reason: str) -> None:
        moved = ""
        if self.writable:
            try:
                (self.folder / QUARANTINE).mkdir(exist_ok=True)
                os.replace(path, self.folder / QUARANTINE / os.path.basename(path))
                moved = f" and was moved to {self.folder / QUARANTINE}"
            except OSError:
                pass  # it stays there and is skipped again next time
        tell_once(f"{path} is damaged{moved}: {reason}")

    def insert(self, record: Record) -> bool:
        """Write one record. Returns False, and logs the reason once, if the folder cannot be written."""
        return self.write(record.filename, dump([record]))

    def write(self, name: str, text: str) -> bool:
        """Replace a file atomically. Returns False, and logs the reason once, if the folder cannot be written."""
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=".tmp-", dir=self.folder)
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, self.folder / name)
            return True
        except OSError as error:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            more = "; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
            tell_once(
                f"the {self.name} store {self.folder} cannot be written ({error.strerror}){more}, or name another with "
                "KVOPS_CACHE_DIR; until then no records are kept"
            )
            return False


def user_folder() -> Path | None:
    """The user's layer; None for a user without a home directory."""
    cache = user_cache()
    return None if cache is None else cache / "autotune"


def default_layers() -> list[Layer]:
    """The layers of this environment, weakest first.

    ``KVOPS_SITE_DIR`` is a folder shared by many machines. Records in ``KVOPS_AUTOTUNE_OVERRIDE`` win over all others.
    """
    layers = [Layer("shipped", SHIPPED)]
    site, override = os.environ.get("KVOPS_SITE_DIR"), os.environ.get("KVOPS_AUTOTUNE_OVERRIDE")
    if site:
        layers.append(Layer("site", Path(site)))
    user = user_folder()
    if user is not None:
        layers.append(Layer("user", user, writable=True))
    if override:
        layers.append(Layer("override", Path(override)))
    return layers


class Store:
    """Layers that are read together. The records of an operator are read at its first look-up and cached."""

    def __init__(self, layers: Sequence[Layer] | None = None) -> None:
        self.layers = default_layers() if layers is None else list(layers)
        self._records: dict[str, list[tuple[int, Record]]] = {}

    def records(self, spec: OpSpec) -> list[tuple[int, Record]]:
        """(layer number, record). Of equal identity only the newest of the last layer."""
        records = self._records.get(spec.name)
        if records is None:
            best: dict[tuple[Any, ...], tuple[int, Record]] = {}
            for number, layer in enumerate(self.layers):
                for record in sorted(layer.read(spec), key=lambda record: record.date):
                    best[record.identity] = (number, record)
            records = self._records[spec.name] = list(best.values())
        return records

    def forget(self) -> None:
        """Read the files again at the next look-up."""
        self._records.clear()

    @property
    def writable(self) -> Layer | None:
        return next((layer for layer in reversed(self.layers) if layer.writable), None)

    def insert(self, record: Record) -> bool:
        """Write to the writable layer. Returns False if there is none or it cannot be written."""
        layer = self.writable
        self._records.pop(record.op, None)
        if layer is None:
            tell_once("configurations are not kept, because there is no folder for them: set KVOPS_CACHE_DIR")
            return False
        return layer.insert(record)


class Journal:
    """A file of JSON lines that launches add to, such as the problems without a record, for ``tune --from-misses``.

    A launch only adds to a set. A thread writes the lines together a little later, and the end of the process writes
    the others. No line is written twice, and a long file does not grow further.
    """

    def __init__(self, folder: Path, name: str = JOURNAL) -> None:
        self.path = folder / name
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self._waiting: list[str] = []
        self._thread: threading.Thread | None = None

    def add(self, op: str, problem: Problem, device: str) -> None:
        self.write({"op": op, "problem": dict(problem), "device": device})

    def write(self, value: dict[str, Any]) -> None:
        line = json.dumps(value, sort_keys=True)
        with self._lock:
            if line in self._seen:
                return
            self._seen.add(line)
            self._waiting.append(line)
            if self._thread is None or not self._thread.is_alive():
                if self._thread is None:
                    atexit.register(self.flush)
                self._thread = threading.Thread(target=self._later, name="kvops-misses", daemon=True)
                self._thread.start()

    def _later(self) -> None:
        time.sleep(_JOURNAL_DELAY)
        self.flush()

    def flush(self) -> None:
        """Append the waiting lines in one write, so that lines of different processes do not mix."""
        with self._lock:
            lines, self._waiting = self._waiting, []
        if not lines:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and self.path.stat().st_size > _MAX_JOURNAL:
                return
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.write(descriptor, "".join(f"{line}\n" for line in lines).encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            tell_once(f"launches are not noted in {self.path}: {error.strerror}")


def read_problems(path: Path, specs: dict[str, OpSpec]) -> list[tuple[OpSpec, Problem]]:
    """Problems of a file of JSON lines in the journal's format, without duplicates. Invalid lines are logged and
    skipped.

    Raises FileNotFoundError without the file.
    """
    problems: dict[str, tuple[OpSpec, Problem]] = {}
    for number, line in enumerate(read_text(str(path)).splitlines(), 1):
        try:
            value = json.loads(line)
            spec = specs[value["op"]]
            problem = spec.check_problem(value["problem"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            tell_once(f"{path}:{number} is not a valid problem and is skipped: {error}")
            continue
        problems[json.dumps([spec.name, problem])] = (spec, problem)
    return list(problems.values())


def collect_garbage(layer: Layer, specs: Iterable[OpSpec], current: dict[str, str], *, dry_run: bool) -> list[str]:
    """Remove files that no look-up needs from a writable layer, and return their paths.

    These are quarantined files, temporary files older than an hour, and records of older sources that have a record of
    the current ones.
    """
    doomed = [str(path) for path in sorted((layer.folder / QUARANTINE).glob("*"))]
    for temporary in sorted(layer.folder.glob(".tmp-*")):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - temporary.stat().st_mtime > 3600:
                doomed.append(str(temporary))
    for spec in specs:
        by_path = {}
        for path in layer.paths(spec.name):
            try:
                by_path[path] = load(read_text(path), spec)
            except (OSError, ValueError):
                continue
        fresh = {
            (record.device.name, repr(record.problem))
            for records in by_path.values()
            for record in records
            if record.source == current[spec.name]
        }
        for path, records in by_path.items():
            if records and all(
                record.source != current[spec.name] and (record.device.name, repr(record.problem)) in fresh
                for record in records
            ):
                doomed.append(path)
    if not dry_run:
        for name in doomed:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
    return doomed
