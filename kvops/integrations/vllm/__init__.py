"""vLLM: kvops' attention backend, and compression of each head by itself in vLLM's own pages.

vLLM finds it by itself (entry point ``vllm.general_plugins``); it serves where it is asked for::

    vllm serve MODEL --attention-backend CUSTOM
    vllm serve MODEL --attention-backend CUSTOM --additional-config '{"kvops": {"ratio": 4}}'

The first is a plain attention backend. The second compresses the cache of every request while it is read and while it
is written, so that more requests fit into the same memory: see :class:`~kvops.integrations.vllm.options.Options` for
what can be set, and ``docs/integrations/vllm.md`` for how it works and what it does not support.
"""

from __future__ import annotations

from kvops.integrations.vllm.options import Options

__all__ = ["Options", "register"]


def register() -> None:
    """Make kvops' backend the one that vLLM calls CUSTOM. vLLM calls this in each of its processes.

    Raises RuntimeError where a hook of vLLM that kvops needs is not there, or is not as it was: the message names it.
    """
    from kvops.integrations.vllm import hooks

    hooks.check()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from kvops.integrations.vllm import platform

    register_backend(AttentionBackendEnum.CUSTOM, platform.BACKEND)
    platform.honour_custom_on_cpu()
    platform.hide_llvmlite_on_cpu()
