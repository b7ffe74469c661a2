"""The description of a kernel family for the store: configurations, problems, and a workload to try them with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvops.autotune.devices import DeviceFacts

Config = Any  # a frozen dataclass of integers and booleans, one type for each family
Problem = Mapping[str, int]


@dataclass(frozen=True)
class Workload:
    """A call to try configurations with.

    ``run`` takes no arguments, launches the kernels of the operator and returns its outputs (tensors, in-place results
    included), which are the same at every call. ``exact`` returns the correct outputs. If it is None, the outputs of
    the default configuration are the reference.
    """

    run: Callable[[], tuple[Any, ...]]
    exact: Callable[[], tuple[Any, ...]] | None = None


@dataclass(frozen=True, eq=False)
class OpSpec:
    """A kernel family of the store.

    Attributes:
        name: letters, digits and underscores; part of file names.
        config: the frozen dataclass of its configurations; every field an int or a bool.
        key: names of the numbers that must be equal for a configuration to be reused (dtype widths, head sizes,
            masks).
        sizes: names of the numbers that may differ by a bounded factor (lengths, batches). ``choose`` takes both, in
            this order.
        heuristic: (problem, device) -> config, fast and without I/O.
        reason: (problem, device, config) -> the reason of the heuristic's choice, in one line.
        space: (problem, device) -> the candidates, in the order that decides ties. The heuristic's choice is always
            added.
        refuse: the validity predicate, (config, problem, device) -> None, or the reason why it cannot run. Pruner,
            tuner and look-up share it.
        numerics: config -> its class. Configurations of one class give the same bits. By default every configuration
            has its own class.
        kernels: JIT functions, as ``"module:name"`` or the functions themselves. Records depend on their sources and on
            those of the functions that they call.
        workload: (problem, device string, small) -> Workload, or ``"module:name"`` of one. ``small`` asks for sizes
            that a reference can afford, with the same key.
        problems: typical problems, the default of ``tune`` and ``prune``.
        corners: problems beside the typical ones that calls have. ``prune`` proves their default configurations alone.
        proof_key: problem -> the key whose compiled kernel proves it, if not its own.
        operators: names in ``torch.ops.kvops`` that launch this family.
        twin: a family of the same key and sizes with the same results. This one computes them with features of some
            GPUs only. It runs in place of the twin only if a record of that GPU shows that it is faster
            (``lookup.choose_proven``).
        max_distance: the largest distance, in doublings summed over the sizes, of a shape whose record is reused.
    """

    name: str
    config: type
    key: tuple[str, ...]
    sizes: tuple[str, ...]
    heuristic: Callable[[Problem, DeviceFacts], Config]
    space: Callable[[Problem, DeviceFacts], Iterable[Config]]
    kernels: tuple[Any, ...]
    workload: Callable[[Problem, str, bool], Workload] | str | None = None
    reason: Callable[[Problem, DeviceFacts, Config], str] = lambda problem, device, config: "the author's default"
    refuse: Callable[[Config, Problem, DeviceFacts], str | None] = lambda config, problem, device: None
    numerics: Callable[[Config], Hashable] = lambda config: config
    problems: tuple[Problem, ...] = ()
    corners: tuple[Problem, ...] = ()
    proof_key: Callable[[Problem], Problem] | None = None
    operators: tuple[str, ...] = ()
    twin: str = ""
    max_distance: float = 4.0
    fields: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or not self.name.isascii():
            raise ValueError(f"name: expected ASCII letters, digits and underscores, got {self.name!r}")
        if not (dataclasses.is_dataclass(self.config) and self.config.__dataclass_params__.frozen):  # type: ignore[attr-defined]
            raise TypeError(f"config: expected a frozen dataclass, got {self.config!r}")
        object.__setattr__(self, "fields", (*self.key, *self.sizes))
        if len(set(self.fields)) != len(self.fields):
            raise ValueError(f"sizes: expected names that differ from each other and from the key, got {self.fields}")
        for problem in (*self.problems, *self.corners):
            self.check_problem(problem)

    def check_problem(self, problem: Mapping[str, Any]) -> Problem:
        """The problem with its fields in order. Raises ValueError for a missing, unknown or negative field."""
        if set(problem) != set(self.fields):
            raise ValueError(
                f"problem: expected the fields {', '.join(self.fields)} of {self.name}, "
                f"got {', '.join(map(str, problem)) or 'none'}"
            )
        for name, value in problem.items():
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 48:
                raise ValueError(f"problem.{name}: expected an integer from 0 to 2^48, got {value!r:.100}")
        return {name: problem[name] for name in self.fields}

    def key_of(self, problem: Problem) -> dict[str, int]:
        return {name: problem[name] for name in self.key}

    def sizes_of(self, problem: Problem) -> dict[str, int]:
        return {name: problem[name] for name in self.sizes}

    def bucket_of(self, problem: Problem) -> tuple[int, ...]:
        """Sizes rounded up to powers of two: 1, 2, 3..4, 5..8, ..."""
        return tuple(max(problem[name] - 1, 0).bit_length() for name in self.sizes)

    def distance(self, problem: Problem, other: Problem) -> float:
        """The distance between the sizes of two problems, in doublings."""
        return sum(abs(math.log2(max(problem[name], 1) / max(other[name], 1))) for name in self.sizes)

    def proof_of(self, problem: Problem) -> dict[str, int]:
        """The key of this problem in the feasibility table."""
        return self.key_of(self.proof_key(problem) if self.proof_key else problem)

    def candidates(self, problem: Problem, device: DeviceFacts) -> list[Config]:
        """The heuristic's choice, then the space, without duplicates and without those that ``refuse`` excludes."""
        ordered = dict.fromkeys([self.heuristic(problem, device), *self.space(problem, device)])
        return [config for config in ordered if self.refuse(config, problem, device) is None]

    def config_from_json(self, value: object) -> Config:
        """Raises ValueError unless ``value`` is a dictionary with exactly the fields, of their types and in range."""
        fields = {field.name: field for field in dataclasses.fields(self.config)}
        if not isinstance(value, Mapping) or set(value) != set(fields):
            raise ValueError(f"config: expected the fields {', '.join(fields)}, got {value!r:.200}")
        for name, number in value.items():
            kind = fields[name].type
            if kind in ("bool", bool):
                if not isinstance(number, bool):
                    raise ValueError(f"config.{name}: expected true or false, got {number!r:.100}")
            elif not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 1 << 31:
                raise ValueError(f"config.{name}: expected an integer from 0 to 2^31, got {number!r:.100}")
        return self.config(**value)


def config_to_json(config: Config) -> dict[str, int | bool]:
    return dataclasses.asdict(config)


def words(values: Mapping[str, Any]) -> str:
    """``width=128 itemsize=2``: a problem or a configuration as text."""
    return " ".join(f"{name}={value}" for name, value in values.items())
