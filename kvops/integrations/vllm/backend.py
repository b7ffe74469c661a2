"""The attention backend that vLLM builds its layers with, and the one that builds the metadata of a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

import kvops
from kvops.integrations.vllm.check import Check
from kvops.integrations.vllm.compressed import CompressedLayers
from kvops.integrations.vllm.engine import Engine
from kvops.integrations.vllm.rule import Rule
from kvops.integrations.vllm.spec import CompressedSpec
from kvops.integrations.vllm.step import Slots, Step, requests_of

_FLOAT8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
# A slot of a head holds its key, the key's scale in float32, its value and the value's scale.
_SLOT_SCALES = {"int8_per_token_head": torch.int8, "fp8_per_token_head": torch.float8_e4m3fn}
_SCALE_BYTES = 4


class KVOpsBackend(AttentionBackend):  # type: ignore[misc]
    """kvops in vLLM: ``--attention-backend CUSTOM``."""

    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", "float32", *_FLOAT8, *_SLOT_SCALES]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[KVOpsAttention]:
        return KVOpsAttention

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        return StepBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # the slots of a page and head lie together: a block of kvops' ragged cache

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """What the scheduler is told about a layer. vLLM asks the class, after it has built the layers."""
        if spec.kv_quant_mode.name in ("INT8_PER_TOKEN_HEAD", "FP8_PER_TOKEN_HEAD"):
            return replace(spec, state_content_bytes=spec.head_size + spec.head_size_v + 2 * _SCALE_BYTES)
        if type(spec) is not FullAttentionSpec:  # windows free their own pages; block_size 1 measures a window's page
            return spec
        engine = Engine.built_last()
        if engine is None or not engine.options.compresses:
            return spec
        return CompressedSpec.of(spec, Rule.of(engine.options, spec.block_size), engine.in_flight)


class StepBuilder(AttentionMetadataBuilder[Step]):  # type: ignore[misc]
    """Builds the :class:`Step` of a group of layers, before any of them runs."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._compressed: CompressedLayers | None = None
        self._check: Check | None = None
        options = Engine.building(vllm_config).options
        # A CUDA graph reads the slots of every step at the same address. Tables and lengths are vLLM's own buffers.
        graphs = vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        room = vllm_config.scheduler_config.max_num_batched_tokens
        self._slots = Slots.room(room, device) if graphs and not isinstance(kv_cache_spec, CompressedSpec) else None
        if isinstance(kv_cache_spec, CompressedSpec):
            self._expect_compressible()
        elif options.check:
            self._check = Check(kv_cache_spec.num_kv_heads, kv_cache_spec.block_size, options)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Graphs of decoding, with drafts too. None over compressed caches, whose lists grow wider with their requests:
        what lies between the attention of two layers is captured then."""
        compressed = isinstance(kv_cache_spec, CompressedSpec)
        return AttentionCGSupport.NEVER if compressed else AttentionCGSupport.UNIFORM_BATCH

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Step:
        m = common_attn_metadata
        if m.causal is not True:
            raise NotImplementedError("causal: kvops' backend for vLLM expects causal attention")
        slots = Slots.of(m.slot_mapping[: m.num_actual_tokens], self.kv_cache_spec.block_size)
        if self._slots is not None:
            slots = self._slots.filled(slots)
        starts, known_starts = (each[: m.num_reqs + 1] for each in (m.query_start_loc, m.query_start_loc_cpu))
        tables, lens = m.block_table_tensor[: m.num_reqs], m.seq_lens[: m.num_reqs]
        if isinstance(self.kv_cache_spec, CompressedSpec):
            if self._compressed is None:  # vLLM has given the layers their caches by now
                self._compressed = self._compress()
            known = m.seq_lens_cpu_upper_bound if m.seq_lens_cpu_upper_bound is not None else lens.cpu()
            numbers = None
            if m.req_idx is not None:  # of Model Runner V2
                numbers = torch.zeros(m.num_reqs, dtype=torch.int64)
                numbers[: len(m.req_idx)] = torch.from_numpy(m.req_idx[: m.num_reqs]) + 1
            return self._compressed.build(
                m.num_actual_tokens, known_starts, starts, known[: m.num_reqs], tables, slots, numbers
            )
        requests = () if self._check is None else requests_of(tables[:, 0], known_starts.diff(), lens)
        return Step(
            m.num_actual_tokens, slots, starts, m.max_query_len, tables, lens, requests=requests, check=self._check
        )

    def _expect_compressible(self) -> None:
        """Raises ValueError where the layers of this group cannot be compressed beside the others."""
        context = self.vllm_config.compilation_config.static_forward_context
        ours = {
            name: layer for name, layer in context.items() if isinstance(getattr(layer, "impl", None), KVOpsAttention)
        }
        others = [name for name in ours if name not in self.layer_names]
        if others and self.vllm_config.cache_config.enable_prefix_caching:
            raise ValueError(
                f"enable_prefix_caching: expected off where other layers ({others[0]}, ...) are not compressed, "
                "because a prefix that they find is not whole in the compressed ones. Next step: "
                "--no-enable-prefix-caching"
            )
        windows = [name for name in self.layer_names if "window_left" in ours[name].impl.options]
        if windows:
            raise ValueError(
                f"sliding_window: expected layers with windows in a group of their own, got {windows[0]} among those "
                "that are compressed. Next step: leave --disable-hybrid-kv-cache-manager out"
            )

    def _compress(self) -> CompressedLayers:
        """The layers of this group, in the order of their caches."""
        context = self.vllm_config.compilation_config.static_forward_context
        names = sorted(self.layer_names, key=lambda name: int(context[name].kv_cache.data_ptr()))
        layers = {name: context[name] for name in names}
        return CompressedLayers(layers, self.kv_cache_spec.rule, Engine.building(self.vllm_config).options)


class KVOpsAttention(AttentionImpl[Step]):  # type: ignore[misc]
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(
                f"attn_type: kvops' backend for vLLM serves decoders, got {attn_type}. Next step: another "
                "--attention-backend"
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.is_reader = kv_sharing_target_layer_name is not None  # of the cache of another layer
        self.options: dict[str, Any] = {"scale": self.scale, "softcap": float(logits_soft_cap or 0), "sinks": sinks}
        if sliding_window is not None:
            self.options["window_left"] = sliding_window - 1
        if alibi_slopes is not None:
            self.options["alibi_slopes"] = torch.tensor(alibi_slopes, dtype=torch.float32)
        engine = Engine.building(get_current_vllm_config())
        if self.is_reader and (engine.options.compresses or engine.options.check):
            raise NotImplementedError(
                "kv_sharing_target_layer_name: kvops neither compresses nor checks a cache that other layers read, as "
                f"those of {kv_sharing_target_layer_name} do. Next step: ratio=1 and check=false"
            )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write the new keys and values, and attend.

        Args:
            query: ``[tokens, Hq, D]``, packed, padded at the end; ``key`` and ``value`` ``[tokens, Hkv, D]``.
            kv_cache: ``[pages, Hkv, page_size, D + Dv]``, or D + Dv + 8 bytes with scales of slots.
            output: written; ``[tokens, Hq, Dv]``.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("output_scale: kvops' backend for vLLM does not quantise its output")
        if attn_metadata is None:  # while vLLM measures memory
            return output.zero_()
        step, n = attn_metadata, attn_metadata.num_tokens
        caches, scales = self._caches(layer, kv_cache)
        if step.layers is not None:
            step.layers.forward(layer.layer_name, query, key, value, caches, step, output, self.options)
            return output
        if not self.is_reader and key is not None and value is not None:
            slots = step.slots
            kvops.paged_append(key[:n, None], value[:n, None], *caches, slots.pages, slots.lens, **scales)
        k_cache, v_cache = caches
        options = step.packed | scales | self.options
        kvops.paged_attention(query, k_cache, v_cache, step.tables, step.lens, out=output, **options)
        if step.check is not None and "window_left" not in self.options:
            step.check.look(layer.layer_name, step, query, key, value, output, self.options)
        return output

    def _caches(self, layer: Any, kv_cache: Tensor) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """Keys and values ``[pages, page_size, Hkv, D]``, and the scales of a float8 or int8 cache."""
        slots = kv_cache.transpose(1, 2)
        if self.kv_cache_dtype in _SLOT_SCALES:
            k, v = slots.view(torch.int8).split(slots.shape[-1] // 2, dim=-1)
            k_scale, v_scale = (side[..., -_SCALE_BYTES:].view(torch.float32)[..., 0] for side in (k, v))
            k, v = (side[..., :-_SCALE_BYTES].view(_SLOT_SCALES[self.kv_cache_dtype]) for side in (k, v))
            return (k, v), {"k_slot_scale": k_scale, "v_slot_scale": v_scale}
        scales: dict[str, Any] = {}
        if self.kv_cache_dtype in _FLOAT8:
            slots = slots.view(_FLOAT8[self.kv_cache_dtype])
            scales = {"k_scale": layer._k_scale_float, "v_scale": layer._v_scale_float}
        return (slots[..., : self.head_size], slots[..., self.head_size :]), scales
