"""What can be set: ``--additional-config '{"kvops": {...}}'``, vLLM's own place for what plugins need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from kvops import checks
from kvops.policies import POLICIES, Policy

KEY = "kvops"


@dataclass(frozen=True)
class Options:
    """Compression of the cache in vLLM.

    Attributes:
        ratio: how many times smaller a request's cache becomes, at least 1; 1 is a plain attention backend.
        policy: a name of ``kvops.policies.POLICIES`` that an engine can serve, see :mod:`.judge`.
        policy_options: keyword arguments of the policy, such as ``{"observe": 16}``.
        chunk: how many of vLLM's blocks are compacted together while decoding. More cost less time, and a request then
            holds up to that many more.
        slack: how many of vLLM's blocks a request keeps on top of its share, 1 / ``ratio``.
        protect_first: the first tokens of a request, which are never evicted.
        protect_last: the newest tokens of a request, which are never evicted.
        check: compare every attention with dense attention in float32 over the tokens that were kept, except in layers
            with sliding windows. Slow, and keeps a copy of every key and value: for tests.
    """

    ratio: float = 1.0
    policy: str = "standout"
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    chunk: int = 1
    slack: int = 0
    protect_first: int = 4
    protect_last: int = 32
    check: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)):
            raise TypeError(f"ratio: expected a number, got {self.ratio!r}")
        checks.expect_at_least("ratio", self.ratio, 1)
        checks.expect_finite("ratio", self.ratio)
        checks.expect_choice("policy", self.policy, tuple(POLICIES))
        if not isinstance(self.policy_options, Mapping):
            raise TypeError(f"policy_options: expected names and values, got {self.policy_options!r}")
        checks.expect_int("chunk", self.chunk, 1)
        checks.expect_int("slack", self.slack, 0)
        checks.expect_int("protect_first", self.protect_first, 0)
        checks.expect_int("protect_last", self.protect_last, 0)
        if not isinstance(self.check, bool):
            raise TypeError(f"check: expected true or false, got {self.check!r}")
        self.make_policy()

    @property
    def compresses(self) -> bool:
        return self.ratio > 1

    def make_policy(self) -> Policy:
        """Raises TypeError or ValueError where ``policy_options`` do not fit the policy."""
        try:
            return POLICIES[self.policy](**self.policy_options)
        except TypeError as error:
            known = ", ".join(each.name for each in fields(POLICIES[self.policy]))
            raise TypeError(f"policy_options: expected some of {known} for {self.policy}, {error}") from error

    @classmethod
    def of(cls, additional_config: object) -> Options:
        """The options in a ``VllmConfig.additional_config``; the defaults where it has none.

        Raises ValueError for a name that is not one of ours or a value that is out of range, TypeError for a value of
        another type.
        """
        given = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(given, Mapping):
            raise TypeError(f'additional_config: expected {{"{KEY}": {{"ratio": 4}}}}, got {given!r} for "{KEY}"')
        known = [each.name for each in fields(cls)]
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(
                f'additional_config: expected some of {", ".join(known)} in "{KEY}", got {", ".join(map(str, unknown))}'
            )
        return cls(**given)

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in asdict(self).items() if name != "check" or value)
