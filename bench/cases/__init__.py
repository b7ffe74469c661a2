"""The registry: every case of every family at one scale. A family is a module here with ``cases(scale)``."""

from __future__ import annotations

import importlib
import pkgutil

from bench.case import Case, Scale


def all_cases(scale: Scale) -> list[Case]:
    """Every case, in the order of families and then of shapes; names are unique."""
    cases: dict[str, Case] = {}
    for module in sorted(found.name for found in pkgutil.iter_modules(__path__)):
        for case in importlib.import_module(f"{__name__}.{module}").cases(scale):
            if case.name in cases:
                raise ValueError(f"case {case.name}: expected a name of its own, but {module} gives it a second time")
            cases[case.name] = case
    return list(cases.values())


def select(cases: list[Case], ops: list[str] | None = None, shapes: list[str] | None = None) -> list[Case]:
    """The cases of these operators whose name contains one of ``shapes``; None selects all. Raises ValueError if none
    matches."""
    known = {case.op for case in cases}
    unknown = sorted(set(ops or ()) - known)
    if unknown:
        raise ValueError(f"--ops: expected some of {', '.join(sorted(known))}, got {', '.join(unknown)}")
    chosen = [
        case
        for case in cases
        if (ops is None or case.op in ops)
        and (shapes is None or any(word.lower() in case.name.lower() for word in shapes))
    ]
    if not chosen:
        raise ValueError(
            f"--shapes: expected part of a name that `python -m bench list` prints, got {', '.join(shapes or ())}"
        )
    return chosen
