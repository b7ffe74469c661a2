"""The scheduler's side: a cache spec that says how much a request needs, and the manager that frees what is emptied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from kvops.integrations.vllm.rule import Rule


class CompressedManager(FullAttentionManager):
    """Pages of requests whose cache the worker compresses.

    The worker empties pages by the same rule, before it computes the next step of a request. A page is therefore freed
    in the very moment in which that step is given its new pages, and not before: a request that is not scheduled keeps
    its pages, because the worker does not see it.
    """

    def __init__(self, kv_cache_spec: CompressedSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        if self._record_new_block_ids:
            raise ValueError(
                "kv_cache_config: compression expects a model whose new pages are not zeroed; one with Mamba layers or "
                "a cache of several dtypes zeroes pages that are still to be emptied. Next step: ratio=1"
            )
        self.rule = kv_cache_spec.rule
        self.in_flight = kv_cache_spec.in_flight
        self.num_freed = 0
        # Of each request: the columns that are compacted and freed, and those that are compacted when it runs again.
        self._freed: dict[str, int] = {}
        self._old: dict[str, int] = {}

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Note what is emptied once the request runs again; :meth:`allocate_new_blocks` frees it."""
        self._old[request_id] = self.rule.old(processed_computed_tokens)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, apply_admission_cap: bool = False, **kwargs: Any
    ) -> int:
        wanted = super().get_num_blocks_to_allocate(request_id, num_tokens, *args, apply_admission_cap=False, **kwargs)
        if apply_admission_cap:
            held = sum(not block.is_null for block in self.req_to_blocks.get(request_id, ()))
            return min(wanted, max(0, self.rule.peak(num_tokens, self.in_flight) - held))
        # Not below 0: other groups may be given their pages before this one frees any.
        return max(0, wanted - len(self._emptied(request_id)))

    def allocate_new_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> list[Any]:
        emptied = self._emptied(request_id)
        for column in emptied:
            self._remove_blocks_in_range(request_id, column, column + 1)
        self.num_freed += len(emptied)
        if request_id in self._old:
            self._freed[request_id] = max(self._old.pop(request_id), self._freed.get(request_id, 0))
        return super().allocate_new_blocks(request_id, *args, **kwargs)  # type: ignore[no-any-return]

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        self._freed.pop(request_id, None)
        self._old.pop(request_id, None)
        return [block for block in super().pop_blocks_for_free(request_id) if not block.is_null]

    def _emptied(self, request_id: str) -> list[int]:
        """Columns of the request that the worker empties now and that are not free yet."""
        return self.rule.emptied(self._freed.get(request_id, 0), self._old.get(request_id, 0))


@register_kv_cache_spec(manager_class=CompressedManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class CompressedSpec(FullAttentionSpec):  # type: ignore[misc]
    """Full attention whose cache is compressed.

    Attributes:
        asked: the rule, for the size of pages that vLLM had first.
        in_flight: the most tokens of a request that the steps under way may compute.
    """

    asked: Rule
    in_flight: int

    @property
    def rule(self) -> Rule:
        return replace(self.asked, block_size=self.block_size)

    @property
    def prefix_cacheable(self) -> bool:
        return False  # what a page holds after a compaction is not what its tokens say

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        pages = self.rule.peak(vllm_config.model_config.max_model_len, self.in_flight)
        return pages * self.page_size_bytes  # type: ignore[no-any-return]

    @classmethod
    def of(cls, spec: FullAttentionSpec, rule: Rule, in_flight: int) -> CompressedSpec:
        return cls(**_fields(spec), asked=rule, in_flight=in_flight)

    @classmethod
    def merge(cls, specs: Sequence[CompressedSpec]) -> CompressedSpec:  # type: ignore[override]
        """vLLM merges the specs of layers by the fields that it knows: ours are those of the first."""
        first = specs[0]
        merged = FullAttentionSpec.merge([FullAttentionSpec(**_fields(spec)) for spec in specs])
        return cls.of(merged, first.asked, first.in_flight)


def _fields(spec: FullAttentionSpec) -> dict[str, Any]:
    """What vLLM's own full attention is made of."""
    return {each.name: getattr(spec, each.name) for each in fields(FullAttentionSpec) if each.init}
