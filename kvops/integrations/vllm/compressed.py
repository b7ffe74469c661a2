"""The worker's side of compression: what is compacted before a step, and how its layers write, attend and score."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import kvops
from kvops.integrations.vllm.cells import Cells
from kvops.integrations.vllm.check import Check
from kvops.integrations.vllm.judge import Judge
from kvops.integrations.vllm.options import Options
from kvops.integrations.vllm.rule import Rule
from kvops.integrations.vllm.step import Slots, Step, requests_of


class CompressedLayers:
    """The layers of a group, whose heads compete for the pages that stay.

    Args:
        layers: vLLM's attention layers in the order of their caches, by name.
        rule: which pages stay.
        options: the policy, and what is protected.

    Attributes:
        cells: where the slots of each head are.
        judge: what is scored.
        check: holds every attention to the truth, or None.
    """

    def __init__(self, layers: dict[str, Any], rule: Rule, options: Options) -> None:
        first = next(iter(layers.values()))
        self.judge = Judge(options.make_policy(), first.impl.num_heads // first.impl.num_kv_heads)
        caches = [layer.kv_cache for layer in layers.values()]
        self.cells = Cells(caches, first.impl.head_size, rule, self.judge)
        self.number = {name: number for number, name in enumerate(layers)}
        cells = self.cells
        self.check = Check(cells.num_heads, cells.page_size, options, cells.positions) if options.check else None

    def build(
        self,
        num_tokens: int,
        known_starts: Tensor,
        starts: Tensor,
        tokens: Tensor,
        table: Tensor,
        slots: Slots,
        numbers: Tensor | None = None,
    ) -> Step:
        """Compact what is due, and give the step its lists.

        Pages that are emptied now may belong to another request of this very step. They are read here, before any layer
        of the step runs.

        Args:
            num_tokens: real tokens of the step.
            known_starts: int32 ``[B + 1]``, known to the host: where the query tokens of each request begin, and where
                those of the last one end.
            starts: the same on the device.
            tokens: int32 ``[B]``, known to the host: of each request, with those of this step.
            table: int32 ``[B, columns]``, vLLM's pages.
            slots: where the new tokens go.
            numbers: int64 ``[B]``, known to the host: a number above 0 of each request, which it has as long as it
                runs, 0 for a row without a request. None: its first page, which the host waits for.
        """
        pages, cells = table.long(), self.cells
        new, total = known_starts.diff(), tokens.long()
        numbers = pages[:, 0].cpu() if numbers is None else numbers
        old = cells.compact_due(numbers, pages, total - new)
        lists = cells.lists(pages, total, old)
        # The new tokens of a request stand at its end.
        token = torch.arange(num_tokens, dtype=torch.int32, device=table.device)
        row_of = torch.searchsorted(starts[1:], token, right=True)
        ends = tokens.int().to(table.device) - starts[1:]
        return Step(
            num_tokens,
            slots,
            starts,
            int(new.max()),
            lists.tables,
            lists.lens,
            layers=self,
            positions=(token + ends[row_of])[:, None],
            decays=self.judge.decays(starts.diff()),
            requests=requests_of(numbers, new, total) if self.check is not None else (),
        )

    def forward(
        self,
        name: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        caches: tuple[Tensor, Tensor],
        step: Step,
        output: Tensor,
        options: Any,
    ) -> None:
        """One layer: as :meth:`.backend.KVOpsAttention.forward`, of a cache that is compressed."""
        layer, cells, judge, n = self.number[name], self.cells, self.judge, step.num_tokens
        kvops.paged_append(
            k[:n, None],
            v[:n, None],
            *caches,
            step.slots.pages,
            step.slots.lens,
            positions=cells.positions_of(layer),
            token_positions=step.positions,
            scores=cells.scores_of(layer),
        )

        scored: dict[str, Any] = {}
        if judge.reduce is not None:
            scored = {"scores": cells.scores, "score_reduce": judge.reduce, "score_decays": step.decays}
            if judge.observe is not None:
                scored["score_last"] = judge.observe
        if "alibi_slopes" in options and step.positions is not None:  # slots are closer together than their tokens were
            options = options | {"positions": cells.positions, "query_positions": step.positions[:, 0]}
        tables, lens = step.tables[layer], step.lens[layer]
        kvops.paged_attention(q[:n], cells.k, cells.v, tables, lens, out=output[:n], **step.packed, **scored, **options)
        if self.check is not None:
            self.check.look(layer, step, q, k, v, output, options, (tables, lens))
