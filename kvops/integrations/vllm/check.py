"""For tests: every attention compared with dense attention in float32 over exactly the tokens that it should read."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from kvops.integrations.vllm.options import Options
from kvops.integrations.vllm.step import Request, Step


class Check:
    """Keeps every key and value that was ever computed, and compares.

    A request is known by its number, which may be that of its first page. Layers with a sliding window free this page,
    and are not checked.

    Args:
        num_heads: KV heads.
        page_size: slots of a page.
        options: what is protected.
        positions: int32 ``[cells, page_size]``, the positions of a compressed cache; None for a cache that is whole.

    Attributes:
        count: heads that were compared.
        worst: the largest difference of an output.
    """

    def __init__(self, num_heads: int, page_size: int, options: Options, positions: Tensor | None = None) -> None:
        self._num_heads, self._page_size, self._options = num_heads, page_size, options
        self._cell_positions = positions
        # By layer and number of a request: how many tokens were seen; their keys and values in buffers that are larger.
        self._seen: dict[tuple[Hashable, int], tuple[int, tuple[Tensor, Tensor]]] = {}
        self.count, self.worst = 0, 0.0

    def look(
        self,
        layer: Hashable,
        step: Step,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        got: Tensor,
        options: Any,
        lists: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Compare ``got``, the attention of ``q`` in one layer.

        Args:
            q, k, v, got: of all tokens of the step, packed ``[tokens, ...]``.
            lists: int32 ``[B, Hkv, W]`` cells and ``[B, Hkv]`` slots of a compressed cache.

        Raises AssertionError if a list lacks a protected token or is not in order, or if the attention is not finite.
        """
        end = 0
        for row, request in enumerate(step.requests):
            new = slice(end, end + request.tokens - request.computed)
            end = new.stop
            if request.number == 0 or new.start == end:
                continue
            keys, values = self._all(layer, request, k[new], v[new])
            for head, part in enumerate(torch.arange(q.shape[1]).chunk(self._num_heads)):
                kept = torch.arange(request.tokens)
                if lists is not None:
                    kept = self._positions(lists[0][row, head], int(lists[1][row, head]), request)
                truth = self._truth(q[new, part], keys[kept, head], values[kept, head], kept, request, part, options)
                error = (truth - got[new, part].float()).abs().max().item()
                assert math.isfinite(error), f"not finite: head {head} of layer {layer} of {request}"
                self.count, self.worst = self.count + 1, max(self.worst, error)

    def _all(self, layer: Hashable, request: Request, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens of a request, with the new ones."""
        end, none = request.tokens, (0, (k[:0], v[:0]))
        seen, held = self._seen.get((layer, request.number), none) if request.computed else none
        assert seen >= request.computed, f"{seen} tokens were seen of {request}"
        if len(held[0]) < end:
            keys, values = (torch.cat((old, old.new_empty(2 * end - len(old), *old.shape[1:]))) for old in held)
            held = keys, values
        for side, new in zip(held, (k, v), strict=True):
            side[request.computed : end] = new
        self._seen[layer, request.number] = end, held
        return held[0][:end], held[1][:end]

    def _positions(self, table: Tensor, length: int, request: Request) -> Tensor:
        """int64 ``[slots]``: the positions in a list, which are checked."""
        assert self._cell_positions is not None
        blocks = table[: -(-length // self._page_size)].long()
        positions = self._cell_positions[blocks].flatten()[:length].long()
        assert bool((positions[1:] > positions[:-1]).all()), f"not in order: {positions.tolist()} of {request}"
        first = min(self._options.protect_first, request.tokens)
        last = min(max(self._options.protect_last, 1), request.tokens)
        for kept, start in ((positions[:first], 0), (positions[-last:], request.tokens - last)):
            expected = torch.arange(start, start + len(kept), device=kept.device)
            assert torch.equal(kept, expected), f"a protected token is not kept of {request}"
        return positions

    def _truth(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, request: Request, heads: Tensor, options: Any
    ) -> Tensor:
        """float32 ``[T, group, Dv]``."""
        logits = torch.einsum("tgd,sd->tgs", q.float(), k.float()) * options["scale"]
        if options["softcap"]:
            logits = options["softcap"] * torch.tanh(logits / options["softcap"])
        token = torch.arange(request.computed, request.tokens, device=q.device)
        if "alibi_slopes" in options:
            logits -= options["alibi_slopes"][heads, None] * (token[:, None, None] - positions).abs()
        logits = logits.masked_fill(positions > token[:, None, None], -torch.inf)
        if options["sinks"] is not None:
            sinks = options["sinks"][heads].float()[None, :, None].expand(len(q), -1, 1)
            logits, v = torch.cat((logits, sinks), -1), torch.cat((v, torch.zeros_like(v[:1])))
        return torch.einsum("tgs,sd->tgd", logits.softmax(-1), v.float())
