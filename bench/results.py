"""Result files: ``{"kind": ..., "setting": {...}, "rows": [...]}``, rows flat, under ``bench/results/<device>/``.

Without ``kind``, a file's name is its kind. Without ``setting``, the entries beside its rows are the setting.
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
    """Write a row on each line. The file is replaced as a whole, so an interrupted run leaves the last complete one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    head = json.dumps({"kind": kind, "setting": dict(setting)}, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    partial.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')
    os.replace(partial, path)


def load(path: Path) -> Result:
    """Load a result file. Raises ValueError with its path for other files."""
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
    """Every result file below a folder, in the order of paths; other JSON files are skipped."""
    for path in sorted(folder.rglob("*.json")):
        try:
            yield path, load(path)
        except ValueError:
            continue
