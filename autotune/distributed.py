"""One set of configurations for all ranks: a frozen snapshot of the records of rank 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvops.autotune import lookup
from kvops.autotune.feasibility import current_source
from kvops.autotune.records import FORMAT, Record
from kvops.autotune.spec import OpSpec
from kvops.autotune.store import Layer, Store
from kvops.extras import require


class FrozenStore(Store):
    """Records in memory; the store reads and writes no files."""

    def __init__(self, records: dict[str, list[Record]]) -> None:
        super().__init__([Layer("snapshot", Path())])
        self._frozen = records

    def records(self, spec: OpSpec) -> list[tuple[int, Record]]:
        return [(0, record) for record in self._frozen.get(spec.name, [])]


def snapshot() -> str:
    """All records that look-ups of this process use, as JSON, with the sources and the version of Triton."""
    triton = require("triton").__version__

    store = Store()
    specs = lookup.specs().values()
    return json.dumps(
        {
            "format": FORMAT,
            "triton": triton,
            "sources": {spec.name: current_source(spec) for spec in specs},
            "records": {spec.name: [record.as_json() for _, record in store.records(spec)] for spec in specs},
        },
        sort_keys=True,
    )


def load_snapshot(text: str) -> FrozenStore:
    """Raises ValueError for a snapshot of other sources or another Triton: ranks would choose differently."""
    triton = require("triton").__version__

    value = json.loads(text)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f"snapshot: expected format {FORMAT}, got {text[:60]!r}")
    specs = lookup.specs()
    ours = {"triton": triton, "sources": {name: current_source(spec) for name, spec in specs.items()}}
    for name, mine in ours.items():
        if value.get(name) != mine:
            raise ValueError(
                f"snapshot: expected {name} {mine}, got {value.get(name)}; install the same versions on every rank"
            )
    records = {
        name: [Record.from_json(record, specs[name]) for record in entries]
        for name, entries in value["records"].items()
    }
    return FrozenStore(records)


def share_snapshot(group: Any = None) -> None:
    """Let all ranks choose configurations from the records that the first rank reads now.

    Call it on every rank of ``group`` (default: all ranks) after ``torch.distributed`` is initialised. Records are sent
    as JSON, so nothing executable is exchanged. Raises ValueError on a rank with other sources or another Triton.
    """
    import torch
    import torch.distributed as dist

    source = dist.get_global_rank(group, 0) if group is not None else 0
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    text = snapshot().encode() if dist.get_rank() == source else b""
    length = torch.tensor([len(text)], device=device)
    dist.broadcast(length, source, group=group)
    data = torch.empty(int(length), dtype=torch.uint8, device=device)
    if text:
        data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(data, source, group=group)
    lookup.use(load_snapshot(bytes(data.cpu().tolist()).decode()))
