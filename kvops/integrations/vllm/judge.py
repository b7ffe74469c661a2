"""Which slots survive: kvops' policies, by what an engine can know of a request without reading it again.

While an engine runs, each layer adds to the scores of the slots what its newest queries paid to them. When columns are
compacted the policy is shown the keys, the values, the positions and these scores. Earlier queries are gone by then,
and a prompt is read once: policies that need either cannot serve.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

import kvops
from kvops.policies import POLICIES, Policy, Seen, share_out

if TYPE_CHECKING:
    from kvops.integrations.vllm.cells import Cells

Reduce = Literal["sum", "sumsq", "max"]

_BYTES_AT_ONCE = 2**26
"""Keys that a policy is shown at once, in float32."""


class UnseenError(Exception):
    """A policy asked for something that an engine does not have."""


class _EngineSeen(Seen):
    """What a policy sees. What an engine does not keep raises :class:`UnseenError`."""

    window_left, scale, softcap, recited = -1, None, 0.0, None

    @property
    def layer(self) -> int:  # type: ignore[override]
        raise UnseenError("the number of a layer")

    @property
    def num_layers(self) -> int:  # type: ignore[override]
        raise UnseenError("the number of layers")

    @property
    def q(self) -> Tensor:  # type: ignore[override]
        raise UnseenError("the queries")

    @property
    def rope(self) -> Tensor | None:  # type: ignore[override]
        raise UnseenError("the frequencies of the rotary embedding")


class _Question(_EngineSeen):
    """Keys of no layer, shown to a policy once to learn what attention it will ask for."""

    def __init__(self) -> None:
        self.k = self.v = torch.zeros(1, 64, 1, 8, dtype=torch.float32)
        self.positions = torch.arange(64).view(1, 1, 64)
        self.end = torch.tensor([64])
        self.earlier = torch.zeros(1, 1, 64, dtype=torch.float32)
        self.asked: list[tuple[int | None, Reduce, str]] = []

    def attention(self, *, last: int | None = None, reduce: Reduce = "sum", group: str = "sum") -> Tensor:
        self.asked.append((last, reduce, group))
        return torch.zeros(1, 1, 64, dtype=torch.float32)


class _Layers(_EngineSeen):
    """The lists of layers, each a row, as a policy wants them: ``[layers, S, Hkv, ...]``, padded in front."""

    def __init__(self, cells: Cells, tables: Tensor, lens: Tensor, group: int) -> None:
        size = cells.page_size
        self._cells, self._group = cells, group
        width = tables.shape[-1] * size
        slot = torch.arange(width, device=tables.device) - (width - lens.long()[..., None])  # [layers, Hkv, S]
        self._padded = slot < 0
        slot = slot.clamp(min=0)
        self._slots = tables.long().gather(-1, slot // size) * size + slot % size
        self.positions = cells.positions.flatten()[self._slots].masked_fill_(self._padded, -1)
        self.end = self.positions.amax((1, 2)) + 1
        self.earlier = torch.zeros(slot.shape, dtype=torch.float32, device=tables.device)

    def _vectors(self, side: Tensor) -> Tensor:
        return side.flatten(0, 1)[self._slots].masked_fill_(self._padded[..., None], 0).transpose(1, 2)

    @cached_property
    def k(self) -> Tensor:  # type: ignore[override]
        return self._vectors(self._cells.k)

    @cached_property
    def v(self) -> Tensor:  # type: ignore[override]
        return self._vectors(self._cells.v)

    def attention(self, *, last: int | None = None, reduce: Reduce = "sum", group: str = "sum") -> Tensor:
        paid = self._cells.scores.flatten()[self._slots].masked_fill_(self._padded, 0)
        return paid / self._group if group == "mean" else paid


class Judge:
    """A policy in an engine.

    Args:
        policy: what slots are worth.
        group: query heads of a KV head.

    Attributes:
        reduce: what layers add to the scores of slots, None where the policy asks for no attention.
        observe: by how many of the newest queries; None: by all.

    Raises ValueError for a policy that asks for what an engine does not have.
    """

    def __init__(self, policy: Policy, group: int) -> None:
        self.policy, self._group = policy, group
        question = _Question()
        try:
            if policy.recital is not None:
                raise UnseenError("a prompt that is read twice")
            policy.score(question)
        except UnseenError as lacks:
            raise ValueError(
                f"policy: {type(policy).__name__} needs {lacks}, which vLLM does not keep; expected one of "
                f"{', '.join(served())}"
            ) from None
        asked = set(question.asked)
        if len(asked) > 1:
            raise ValueError(f"policy: expected one kind of attention, got {asked} of {type(policy).__name__}")
        self.observe: int | None = None
        self.reduce: Reduce | None = None
        if asked:
            self.observe, self.reduce, _ = asked.pop()

    def decays(self, queries: Tensor) -> Tensor | None:
        """What remains of a score when so many further ``queries`` ``[B]`` come: about the last ``observe`` count.

        float32 ``[B]``, or None where all queries count alike. Of more than ``observe`` the last ones score, from 0.
        """
        if self.observe is None:
            return None
        remaining = (1 - 1 / self.observe) ** queries.float()
        return remaining.masked_fill_(queries > self.observe, 0.0)

    def keep(self, cells: Cells, tables: Tensor, lens: Tensor, *, recent: int, pages: int) -> Tensor:
        """bool ``[lists, C * page_size]``: which slots of the C columns that are compacted survive in ``pages`` pages.

        ``tables`` int32 ``[lists, W]`` and ``lens`` int32 ``[lists]`` are the lists of all layers with all their slots.
        The policy sees them all, as in our own loop; the ``recent`` newest slots of each list are in no column that is
        compacted.
        """
        policy, rule, (L, H) = self.policy, cells.rule, (cells.num_layers, cells.num_heads)
        (lists, width), size = tables.shape, cells.page_size
        place = torch.arange(width * size, device=tables.device) + (width * size - lens.long()[:, None])
        place.clamp_(max=width * size - 1)  # the last slots of each list stand last
        at_once = max(1, _BYTES_AT_ONCE // (H * width * size * cells.k.shape[-1] * 4))
        parts = zip(tables.view(L, H, width).split(at_once), lens.view(L, H).split(at_once), strict=True)
        scores = torch.cat([policy.checked_score(_Layers(cells, *part, self._group)) for part in parts])
        scores = scores.flatten(0, 1).gather(1, place)
        newest = rule.columns(recent)  # which stay, and count as a part of what a head or a layer is to keep
        old = width - newest
        # Numbered from 0, so that only the scores and positions of these lists are read.
        local = torch.arange(lists * old, dtype=torch.int32, device=tables.device).view(lists, old)
        positions = cells.positions[tables[:, :old].long()].flatten(0, 1)
        weights = policy.layer_weights(L)
        apart = weights is not None or policy.scope != "sequence"  # each layer has its share
        rows_of = (L, H) if apart else (1, lists)
        shares = [pages * lists // rows_of[0]] * rows_of[0]
        if weights is not None:
            least = newest + rule.columns(rule.protect_first)
            whole = share_out((pages + newest) * lists, weights, least=least * H, most=width * H)
            shares = [share - newest * H for share in whole]
        _, keep = kvops.select_blocks(
            scores[:, : old * size].reshape(lists * old, size),
            local.view(*rows_of, old),
            (lens - recent).view(rows_of),
            torch.tensor(shares, dtype=torch.int32, device=tables.device),
            positions=positions,
            protect_first=rule.protect_first,
            min_per_head=max(0, int(policy.floor * (pages + newest)) - newest) * size,
            scope="head" if policy.scope == "head" else "sequence",
        )
        return keep.view(lists, old * size)


def served() -> list[str]:
    """The names of policies that an engine can serve."""

    def fits(kind: Any) -> bool:
        try:
            policy = kind()
            if policy.recital is not None:
                return False
            policy.score(_Question())
        except UnseenError:
            return False
        return True

    return [name for name, kind in POLICIES.items() if fits(kind)]
