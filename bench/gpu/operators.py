"""One operator of ``python -m bench run``, with a row for every case of it that kvops ran or failed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench import results
from bench.__main__ import main as bench_main
from bench.case import SCALES
from bench.gpu.units import FAILED, PASSED, report
from bench.measure import KVOPS


def arguments_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.operators", description=__doc__)
    parser.add_argument("op")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    return parser.parse_args(words)


def main() -> None:
    arguments = arguments_of()
    words = ["run", "--ops", arguments.op, "--device", arguments.device, "--scale", arguments.scale]
    bench_main([*words, "--json", str(arguments.json)])
    for row in results.load(arguments.json)["rows"]:
        if row["contender"] == KVOPS:
            report(arguments.rows, row["case"], PASSED if row["ms"] is not None else FAILED, row["note"])


if __name__ == "__main__":
    main()
