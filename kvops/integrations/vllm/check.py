"""For tests: every attention over a compressed cache beside dense attention in float32 over the kept tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvops.integrations.vllm.cells import Cells
from kvops.integrations.vllm.options import Options
from kvops.integrations.vllm.step import Group, Request, Step


class Check:
    """Keeps every key and value that was ever computed, and compares.

    Attributes:
        count: heads that were compared.
        worst: the largest difference of an output.
    """

    def __init__(self, cells: Cells, options: Options) -> None:
        self._cells, self._options = cells, options
        self._seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.count, self.worst = 0, 0.0

    def look(
        self, layer: int, step: Step, group: Group, q: Tensor, k: Tensor, v: Tensor, got: Tensor, options: Any
    ) -> None:
        """Raises AssertionError where a list lacks a protected token, holds a token twice or attends to another."""
        rectangle = group.rectangle
        new_k, new_v = rectangle.pack(k), rectangle.pack(v)
        rows, heads = torch.arange(len(step.requests))[rectangle.rows].tolist(), self._cells.num_heads
        for place, request in enumerate(step.requests[row] for row in rows):
            if request.first_page == 0:
                continue
            count = request.tokens - request.computed
            keys, values = self._all(layer, request, new_k[place, :count], new_v[place, :count])
            for head, part in enumerate(torch.arange(q.shape[2]).chunk(heads)):
                kept = self._positions(group, layer, place, head, request)
                truth = self._truth(
                    q[place, :count, part], keys[kept, head], values[kept, head], kept, request, part, options
                )
                error = (truth - got[place, :count, part].float()).abs().max().item()
                self.count, self.worst = self.count + 1, max(self.worst, error)

    def _all(self, layer: int, request: Request, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens of a request, with the new ones."""
        old = self._seen.get((layer, request.first_page)) if request.computed else None
        if old is not None:
            k, v = (torch.cat((before[: request.computed], new)) for before, new in zip(old, (k, v), strict=True))
        k, v = k.clone(), v.clone()
        assert len(k) == request.tokens, f"{len(k)} tokens were seen of {request}"
        self._seen[layer, request.first_page] = k, v
        return k, v

    def _positions(self, group: Group, layer: int, place: int, head: int, request: Request) -> Tensor:
        """int64 ``[slots]``, the positions in a list, which are what they have to be."""
        length = int(group.lens[layer, place, head])
        blocks = group.tables[layer, place, head, : -(-length // self._cells.page_size)].long()
        positions = self._cells.positions[blocks].flatten()[:length].long()
        assert bool((positions[1:] > positions[:-1]).all()), f"not in order: {positions.tolist()} of {request}"
        first = min(self._options.protect_first, request.tokens)
        last = min(max(self._options.protect_last, 1), request.tokens)
        for expected in (torch.arange(first), torch.arange(request.tokens - last, request.tokens)):
            assert bool(torch.isin(expected, positions.cpu()).all()), f"a protected token is not kept of {request}"
        return positions

    def _truth(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, request: Request, heads: Tensor, options: Any
    ) -> Tensor:
        """float32 ``[T, group, Dv]``."""
        logits = torch.einsum("tgd,sd->tgs", q.float(), k.float()) * options["scale"]
        if options["softcap"]:
            logits = options["softcap"] * torch.tanh(logits / options["softcap"])
        token = torch.arange(request.computed, request.tokens, device=q.device)
        logits = logits.masked_fill(positions > token[:, None, None], -torch.inf)
        if options["sinks"] is not None:
            sinks = options["sinks"][heads].float()[None, :, None].expand(len(q), -1, 1)
            logits, v = torch.cat((logits, sinks), -1), torch.cat((v, torch.zeros_like(v[:1])))
        return torch.einsum("tgs,sd->tgd", logits.softmax(-1), v.float())
