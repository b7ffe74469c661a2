"""Result files: ``{"kind": ..., "setting": {...}, "rows": [...]}``, rows flat, under ``bench/results/<device>/``.

A file without ``kind`` is of the kind of its name; without ``setting``, what stands beside its rows is that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

Result = dict[str, Any]
Row = Mapping[str, Any]


def save(path: Path, kind: str, setting: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """A row a line. Whole or not at all: a run that is stopped leaves the last file that was complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    head = json.dumps({"kind": kind, "setting": dict(setting)}, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    partial.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')
    os.replace(partial, path)


def load(path: Path) -> Result:
    """ValueError with the path where the file is not a result."""
    try:
        result = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a result file, got {error}") from None
    if not isinstance(result, dict) or not isinstance(result.get("rows"), list):
        raise ValueError(f"{path}: expected a result file with 'rows'")
    if "setting" not in result:
        result["setting"] = {name: value for name, value in result.items() if name not in ("kind", "rows", "lengths")}
    return result


def under(folder: Path) -> Iterator[tuple[Path, Result]]:
    """Every result file below a folder, in the order of their paths; other JSON files are passed over."""
    for path in sorted(folder.rglob("*.json")):
        try:
            yield path, load(path)
        except ValueError:
            continue
