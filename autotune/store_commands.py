"""The commands of ``python -m kvops.autotune`` that read and write stores, one function each; all return exit codes."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
from collections import Counter

from kvops.autotune import lookup, refusals
from kvops.autotune.devices import KNOWN_DEVICES, slug, this_gpu
from kvops.autotune.feasibility import current_source
from kvops.autotune.options import all_records, chosen_specs, named_device, parse_problem, store_of
from kvops.autotune.records import Record, dump
from kvops.autotune.spec import config_to_json, words
from kvops.autotune.store import JOURNAL, QUARANTINE, Layer, collect_garbage, default_layers, read_problems
from kvops.cli.console import table


def show(arguments: argparse.Namespace) -> int:
    rows, values = [], []
    for layer, spec, record in all_records(arguments, store_of(arguments.store)):
        if arguments.device and arguments.device.lower() not in record.device.name.lower():
            continue
        gain = record.heuristic_us / record.time.p50 if record.heuristic_us and record.time.p50 else None
        stale = "" if record.source == current_source(spec) else "older sources"
        rows.append(
            (
                record.op,
                record.device.name,
                words(record.problem),
                words(record.config),
                f"{record.time.p50:.1f}",
                f"{gain:.2f}" if gain else "",
                layer,
                stale,
            )
        )
        values.append({**record.as_json(), "layer": layer, "gain": gain and round(gain, 4)})
    print(table(rows, ("op", "device", "problem", "config", "µs", "x heuristic", "layer", "")))
    print(f"{len(rows)} records")
    if arguments.json:
        arguments.json.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
    return 0


def explain(arguments: argparse.Namespace) -> int:
    device = named_device(arguments.device)
    problem = parse_problem(arguments.problem) if arguments.problem else None
    chosen = chosen_specs(arguments)
    names = [arguments.op] if arguments.op else [spec.name for spec in chosen]
    with lookup.using(store_of(arguments.store)):
        for name in names:
            choices = lookup.explain(name, problem, device)
            if not choices:
                print(f"{name}: {device.name} cannot run this kernel")
            for choice in choices:
                verdict = choice.verdict
                print(f"{choice.spec.name} {words(choice.problem)} on {device.name}")
                print(f"  {words(config_to_json(choice.config))}")
                distance = f", {choice.distance:.2f} doublings away" if choice.distance else ""
                print(f"  {choice.origin}{distance}: {choice.reason}")
                print(f"  {verdict.status}: {verdict.reason}")
                if choice.runs:
                    print(f"  runs {choice.runs}")
                for refusal in choice.refused[:8]:
                    print(f"  refused {refusal}")
    return 0


def diff(arguments: argparse.Namespace) -> int:
    """Compare two stores. Exit code 1 where they differ."""
    sides = []
    for folder in (arguments.first, arguments.second):
        if not folder.is_dir():
            raise ValueError(f"diff: expected a folder, got {folder}")
        entries = all_records(arguments, store_of(folder))
        sides.append({(r.op, r.device.name, words(r.problem), r.triton): r for _, _, r in entries})
    rows = []
    for key in sorted({*sides[0], *sides[1]}):
        a, b = sides[0].get(key), sides[1].get(key)
        if a is not None and b is not None:
            if a.config == b.config and a.source == b.source:
                continue
            change = "config" if a.config != b.config else "sources"
            ratio = f"{a.time.p50 / b.time.p50:.2f}" if b.time.p50 else ""
            rows.append((change, *key[:3], words(a.config), words(b.config), ratio))
        elif a is not None:
            rows.append(("only first", *key[:3], words(a.config), "", ""))
        elif b is not None:
            rows.append(("only second", *key[:3], "", words(b.config), ""))
    if rows:
        print(table(rows, ("", "op", "device", "problem", "first", "second", "speed-up")))
    print(f"{len(rows)} differences")
    return 1 if rows else 0


def merge(arguments: argparse.Namespace) -> int:
    """Merge the records of other stores into one. Of equal problem, device, sources and Triton the newest stays."""
    target = store_of(arguments.into)
    counts: Counter[str] = Counter()
    specs = chosen_specs(arguments)
    for folder in arguments.sources:
        if not folder.is_dir():
            raise ValueError(f"merge: expected folders, got {folder}")
        for spec in specs:
            ours = {record.identity: record for _, record in target.records(spec)}
            for _, record in store_of(folder).records(spec):
                known = ours.get(record.identity)
                if known is not None and known.date >= record.date:
                    counts["kept"] += 1
                elif target.insert(record):
                    counts["replaced" if known else "added"] += 1
                else:
                    counts["failed"] += 1
    print(", ".join(f"{counts[name]} {name}" for name in ("added", "replaced", "kept", "failed")))
    return 1 if counts["failed"] else 0


def export(arguments: argparse.Namespace) -> int:
    """Write records in the form in which they ship: one sorted file for each operator and device."""
    by_file: dict[str, list[Record]] = {}
    for _, spec, record in all_records(arguments, store_of(arguments.store)):
        if record.source != current_source(spec) and not arguments.older:
            continue
        by_file.setdefault(f"{record.op}.{slug(record.device.name)}.json", []).append(record)
    layer = Layer("exported", arguments.output, writable=True)
    if not all(layer.write(name, dump(records)) for name, records in by_file.items()):
        return 1
    print(f"{sum(map(len, by_file.values()))} records in {len(by_file)} files in {arguments.output}")
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Show the stores that this machine reads and writes, and problems with them."""
    problems = []
    specs = chosen_specs(arguments)
    print(f"built-in devices: {len(KNOWN_DEVICES)}")
    try:
        device = this_gpu()
        print(f"this GPU: {device.name} ({device.arch}), " + ("known" if device.bandwidth else "not in the table"))
    except RuntimeError:
        print("this GPU: none")
    for package in ("torch", "triton", "tqdm"):
        try:
            print(f"{package}: {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package}: not installed")
    rows = []
    for layer in default_layers():
        count = sum(len(layer.read(spec)) for spec in specs)
        aside = len(list((layer.folder / QUARANTINE).glob("*")))
        rows.append((layer.name, str(layer.folder), count, aside or "", _writing(layer)))
        if aside:
            problems.append(f"{aside} damaged files were set aside in {layer.folder / QUARANTINE}; gc removes them")
        if layer.writable and rows[-1][-1] not in ("yes", "when first written"):
            problems.append(f"{layer.folder} cannot be written: name another folder with KVOPS_CACHE_DIR")
    print(table(rows, ("layer", "folder", "records", "set aside", "writable")))
    writable = next((layer for layer in default_layers() if layer.writable), None)
    if writable is not None and (writable.folder / JOURNAL).exists():
        misses = read_problems(writable.folder / JOURNAL, dict(lookup.specs()))
        print(f"misses: {len(misses)} problems without a record; tune --from-misses tunes them on this GPU")
    if writable is not None and (writable.folder / refusals.FILE).exists():
        print(f"refusals: {writable.folder / refusals.FILE} has what a driver refused to launch; explain lists it")
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def _writing(layer: Layer) -> str:
    if not layer.writable:
        return "never"
    existing = layer.folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK):
        return "no"
    return "yes" if existing == layer.folder else "when first written"


def gc(arguments: argparse.Namespace) -> int:
    layer = store_of(arguments.store).writable
    if layer is None:
        print("no folder to clean: none of the layers is writable")
        return 0
    specs = chosen_specs(arguments)
    current = {spec.name: current_source(spec) for spec in specs}
    removed = collect_garbage(layer, specs, current, dry_run=arguments.dry_run)
    for path in removed:
        print(path)
    print(f"{len(removed)} files {'would be' if arguments.dry_run else 'were'} removed from {layer.folder}")
    return 0
