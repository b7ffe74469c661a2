"""How vLLM comes to kvops' backend: on CUDA by its own registry, on the CPU with functions around two of its own."""

from __future__ import annotations

import sys
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

BACKEND = "kvops.integrations.vllm.backend.KVOpsBackend"


def honour_custom_on_cpu() -> None:
    """Let ``--attention-backend CUSTOM`` choose kvops on a CPU too.

    ``CpuPlatform.get_attn_backend_cls`` knows vLLM's own backend alone, whatever is asked for. It is asked only where
    CUSTOM is not.
    """
    if not current_platform.is_cpu():
        return
    platform = type(current_platform)
    own = platform.get_attn_backend_cls
    if getattr(own, "honours_custom", False):  # vLLM may load a plugin more than once
        return

    def get_attn_backend_cls(
        cls: type, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if selected_backend != AttentionBackendEnum.CUSTOM:
            return own(selected_backend, attn_selector_config, num_heads)  # type: ignore[no-any-return]
        backend = AttentionBackendEnum.CUSTOM.get_class()
        reasons = backend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
        if reasons:
            raise ValueError(f"attention_backend: kvops (CUSTOM) does not serve this model: {'; '.join(reasons)}")
        return BACKEND

    get_attn_backend_cls.honours_custom = True  # type: ignore[attr-defined]
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def hide_llvmlite_on_cpu() -> None:
    """Let an engine start on a CPU in a process that has imported numba, such as one that had an engine before.

    vLLM looks for copies of its Triton kernels in every module that is imported, and stops at objects of llvmlite whose
    ``__dict__`` is none.
    """
    if not current_platform.is_cpu():
        return
    platform = type(current_platform)
    own = platform.register_triton_kernel_overrides
    if getattr(own, "hides_llvmlite", False):
        return

    def register_triton_kernel_overrides(cls: type) -> None:
        hidden = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "llvmlite"}
        for name in hidden:
            del sys.modules[name]
        try:
            own()
        finally:
            sys.modules.update(hidden)

    register_triton_kernel_overrides.hides_llvmlite = True  # type: ignore[attr-defined]
    platform.register_triton_kernel_overrides = classmethod(register_triton_kernel_overrides)
