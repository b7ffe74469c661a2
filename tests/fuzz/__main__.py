"""Sweep areas at random for some minutes: ``make fuzz MINUTES=10 AREAS="paged dense"``.

Every run takes another seed. A failure is shrunk and printed with the command that repeats it; the exit status is then
1. An area runs in a process of its own, so that a crash or a hang is a failure like any other, with its case.
"""

from __future__ import annotations

import argparse
import random
import sys

from fuzz.apart import area_module, run
from fuzz.core import AREAS, from_json, to_json


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("areas", nargs="*", metavar="AREA", help=f"some of {', '.join(AREAS)}; all by default")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all areas together (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of a run to repeat; another one every time by default")
    parser.add_argument("--case", help="check this one case of one area, as a failure prints it")
    options = parser.parse_args()
    areas = options.areas or list(AREAS)
    if unknown := set(areas) - set(AREAS):
        parser.error(f"AREA: expected some of {', '.join(AREAS)}, got {', '.join(sorted(unknown))}")
    if options.case is not None:
        if len(areas) != 1:
            parser.error("--case: expected one area")
        module = area_module(areas[0])
        module.check(from_json(module.Case, options.case))
        print("holds")
        return 0
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    results = {}
    for area in areas:
        result = results[area] = run(area, seed, 60 * options.minutes / len(areas))
        print(f"{area}: {result.cases} cases in {result.seconds:.0f} s", flush=True)
        for failure in result.failures:
            print(f"\n{area} FAILS (seed {seed}): {failure.kind}\n{failure.error}")
            command = f"PYTHONPATH=tests python -m fuzz {area} --case '{to_json(failure.case)}'"
            print(f"repeat it with:\n  {command}\n", flush=True)
    print(f"\n{'area':<14} {'cases':>8} {'seconds':>8} {'failures':>8}")
    for area, (cases, seconds, failures) in results.items():
        print(f"{area:<14} {cases:>8} {seconds:>8.0f} {len(failures):>8}")
    return 1 if any(result.failures for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
