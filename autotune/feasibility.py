"""Feasibility tables: the facts that compilation without a GPU gives for every configuration.

``prune`` writes one table per operator: registers, spills, shared memory and matrix instructions of every configuration
on every target, with the hash of the compiled sources. Entries of other sources are ignored.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from kvops.autotune.architectures import family
from kvops.autotune.devices import DeviceFacts
from kvops.autotune.records import FORMAT, read_text
from kvops.autotune.source_hash import SourceError, source_hash
from kvops.autotune.spec import Config, OpSpec, Problem, config_to_json
from kvops.autotune.store import tell_once

FOLDER = Path(__file__).parent / "configs" / "feasible"


@dataclass(frozen=True)
class Proof:
    """One configuration compiled for one target. ``problem`` has the reason if it cannot be used."""

    registers: int = 0
    spills: int = 0
    shared_memory: int = 0
    matrix: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Verdict:
    """``status``: ``proven`` (compiles, fits, spills nothing), ``spills``, ``impossible``, or ``unproven`` (never
    compiled from these sources)."""

    status: str
    reason: str
    proof: Proof | None = None


@dataclass
class Group:
    """The proofs of one target and key."""

    source: str
    triton: str
    rows: dict[Config, Proof]


@dataclass
class Table:
    """The proofs of an operator, by (target, key)."""

    groups: dict[tuple[str, tuple[tuple[str, int], ...]], Group] = field(default_factory=dict)

    def group(self, target: str, key: Mapping[str, int]) -> Group | None:
        return self.groups.get((target, tuple(sorted(key.items()))))

    def put(self, target: str, key: Mapping[str, int], group: Group) -> None:
        self.groups[target, tuple(sorted(key.items()))] = group


@cache
def current_source(spec: OpSpec) -> str:
    """The hash of the current kernels; empty, and equal to no record's, where the sources cannot be read."""
    try:
        return source_hash(spec.kernels)
    except (SourceError, OSError, SyntaxError) as error:
        tell_once(f"{spec.name}: existing records and tables count as outdated: {error}")
        return ""


def dump_table(spec: OpSpec, table: Table) -> str:
    """The text of a table, one line per configuration."""
    configs = [f.name for f in dataclasses.fields(spec.config)]
    proofs = [f.name for f in dataclasses.fields(Proof)]
    head = {"format": FORMAT, "op": spec.name, "config": configs, "proof": proofs}
    groups = []
    for (target, key), group in sorted(table.groups.items()):
        about = {"target": target, "key": dict(key), "source": group.source, "triton": group.triton}
        rows = ",\n   ".join(
            json.dumps([list(config_to_json(config).values()), *dataclasses.astuple(proof)])
            for config, proof in group.rows.items()
        )
        groups.append(f'  {json.dumps(about)[:-1]}, "rows": [\n   {rows}]}}')
    body = ",\n".join(groups)
    return f'{json.dumps(head)[:-1]},\n "groups": [\n{body}\n ]}}\n'


def parse_table(text: str, spec: OpSpec) -> Table:
    """Parse a table. Raises ValueError unless it is one of ``spec`` with its current fields."""
    try:
        value = json.loads(text)
        names = [f.name for f in dataclasses.fields(spec.config)]
        if value["format"] != FORMAT or value["op"] != spec.name or value["config"] != names:
            raise ValueError(f"table: expected format {FORMAT} of {spec.name} with fields {', '.join(names)}")
        table = Table()
        for entry in value["groups"]:
            rows = {
                spec.config_from_json(dict(zip(names, numbers, strict=True))): Proof(*proof)
                for numbers, *proof in entry["rows"]
            }
            table.put(entry["target"], entry["key"], Group(entry["source"], entry["triton"], rows))
        return table
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"table: not one of {spec.name}: {type(error).__name__} {error}") from error


@cache
def load_table(spec: OpSpec, folder: Path = FOLDER) -> Table:
    """The shipped table. A missing or damaged one counts as empty; the reason is logged once."""
    path = folder / f"{spec.name}.json"
    try:
        return parse_table(read_text(str(path)), spec)
    except FileNotFoundError:
        return Table()
    except (OSError, ValueError) as error:
        tell_once(f"{path} is ignored: {error}")
        return Table()


# Widths of the tables. A configuration takes no more shared memory for a narrower head.
_WIDTHS = (64, 128, 256, 512)


def judge(spec: OpSpec, config: Config, problem: Problem, device: DeviceFacts, table: Table | None = None) -> Verdict:
    """Whether ``config`` can run this problem on this device, by the family's predicate and by the table.

    What was proven for an architecture holds for others of its family, and what was proven for a head size (``width``)
    holds for narrower heads, unless the table has the very architecture and head size.
    """
    refusal = spec.refuse(config, problem, device)
    if refusal is not None:
        return Verdict("impossible", refusal)
    table = load_table(spec) if table is None else table
    found = _proof_of(spec, config, problem, device, table)
    if found is None:
        return Verdict("unproven", f"never compiled for {device.arch}")
    group, proof, arch, width = found
    if group.source != current_source(spec):
        return Verdict("unproven", f"compiled for {arch} from other sources ({group.source})")
    if proof.problem:
        return Verdict("impossible", proof.problem, proof)
    if proof.shared_memory > device.shared_memory:
        reason = f"takes {proof.shared_memory} bytes of shared memory, {device.name} has {device.shared_memory}"
        return Verdict("impossible", reason, proof)
    facts = f"{proof.registers} registers, {proof.shared_memory} bytes of shared memory by Triton {group.triton}"
    if width != problem.get("width"):
        facts += f" for heads of {width}, which take more"
    if arch != device.arch:
        facts += f" for {arch}, whose family has {device.arch}"
    if proof.spills:
        return Verdict("spills", f"{proof.spills} spill instructions, {facts}", proof)
    return Verdict("proven", facts, proof)


def _proof_of(
    spec: OpSpec, config: Config, problem: Problem, device: DeviceFacts, table: Table
) -> tuple[Group, Proof, str, int | None] | None:
    """The proof of a configuration with its group, architecture and head size; None if there is none."""
    key = spec.proof_of(problem)
    own = key.get("width")
    for width in (own, *(wider for wider in _WIDTHS if own is not None and wider > own)):
        for arch in (device.arch, family(device.arch)):
            group = table.group(arch, key if width is None else {**key, "width": width})
            proof = None if group is None else group.rows.get(config)
            if group is None or proof is None:
                continue
            if width == own or not (proof.problem or proof.spills or proof.shared_memory > device.shared_memory):
                return group, proof, arch, width
    return None


def static_facts(verdict: Verdict) -> dict[str, Any]:
    """The facts of a proof that a record keeps."""
    if verdict.proof is None:
        return {}
    proof = verdict.proof
    return {"registers": proof.registers, "shared_memory": proof.shared_memory, "spills": proof.spills}
