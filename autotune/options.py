"""Options that several commands of ``python -m kvops.autotune`` share."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from kvops.autotune import lookup
from kvops.autotune.devices import DeviceFacts, matching, this_gpu
from kvops.autotune.records import Record
from kvops.autotune.spec import OpSpec
from kvops.autotune.store import Layer, Store
from kvops.cli.console import suggestion


def chosen_specs(arguments: argparse.Namespace) -> list[OpSpec]:
    """The kernel families that ``--ops`` names; all without it. Raises ValueError for an unknown name."""
    for module in arguments.imports or []:
        importlib.import_module(module)
    known = lookup.specs()
    if not arguments.ops:
        return list(known.values())
    chosen: list[OpSpec] = []
    for name in arguments.ops.split(","):
        named = [spec for spec in known.values() if name == spec.name or name in spec.operators]
        if not named:
            raise ValueError(f"--ops: expected names among {', '.join(known)}, got {name}{suggestion(name, known)}")
        chosen += [spec for spec in named if spec not in chosen]
    return chosen


def store_of(folder: Path | None) -> Store:
    """The store in ``folder``, or all layers of this machine without one."""
    return Store() if folder is None else Store([Layer("given", folder, writable=True)])


def named_device(name: str | None) -> DeviceFacts:
    """The GPU that ``--device`` names, or this machine's; prints the choice where the name fits several."""
    if not name:
        return this_gpu()
    device, *alternatives = matching(name)
    if alternatives and name != device.arch:
        names = ", ".join(alternative.name for alternative in alternatives)
        print(f"{name}: using {device.name}; also matches {names}", file=sys.stderr)
    return device


def parse_problem(text: str) -> dict[str, int]:
    """Parse ``width=128,itemsize=2``. Raises ValueError for anything else."""
    problem = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not value.strip().isdecimal():
            raise ValueError(f"--problem: expected NAME=INTEGER,..., got {part!r}")
        problem[name.strip()] = int(value)
    return problem


def all_records(arguments: argparse.Namespace, store: Store) -> list[tuple[str, OpSpec, Record]]:
    """(layer, family, record) of the chosen families, in a fixed order."""
    entries = [
        (store.layers[number].name, spec, record)
        for spec in chosen_specs(arguments)
        for number, record in store.records(spec)
    ]
    return sorted(entries, key=lambda entry: repr(entry[2].identity))
