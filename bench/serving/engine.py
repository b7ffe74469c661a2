"""vLLM engines in this process, whose scheduler and pool can be observed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from kvops.extras import require

# Set before vLLM is imported. One process, so that the scheduler and the worker can be observed.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def start(model: Path | str, kvops: Mapping[str, Any] | None, **settings: Any) -> Any:
    """A ``vllm.LLM``: vLLM's own backend if ``kvops`` is None, otherwise ours with these options."""
    # Idle threads of numba, which vLLM drafts with, spin and slow everything else down.
    threads = {"NUMBA_NUM_THREADS": os.environ["OMP_NUM_THREADS"]} if "OMP_NUM_THREADS" in os.environ else {}
    os.environ.update({name: value for name, value in (ENVIRONMENT | threads).items() if name not in os.environ})
    vllm = require("vllm")
    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "seed": 0,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "enable_prefix_caching": False,
    }
    ours = {} if kvops is None else {"attention_backend": "CUSTOM", "additional_config": {"kvops": dict(kvops)}}
    return vllm.LLM(model=str(model), **(defaults | ours | settings))


@contextmanager
def scheduling_ahead() -> Iterator[None]:
    """Engines that are built inside schedule a step before the tokens of the one before it are known.

    vLLM turns asynchronous scheduling off on a CPU. Its scheduler and its queue of steps run there nevertheless; the
    runner stays as it is, because it knows the newest tokens itself.
    """
    platforms, runners = require("vllm.platforms"), require("vllm.v1.worker.cpu_model_runner")
    platform, runner = type(platforms.current_platform), runners.CPUModelRunner
    check, build = platform.check_and_update_config, runner.__init__

    def checked(cls: type, config: Any) -> None:
        check(config)
        config.scheduler_config.async_scheduling = True

    def built(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.use_async_scheduling = False

    with (
        patch.object(platform, "check_and_update_config", classmethod(checked)),
        patch.object(runner, "__init__", built),
    ):
        yield


def page_bytes(config: Any, page_size: int, element_size: int = 4) -> int:
    """Bytes of one page of all layers. ``config`` is that of transformers."""
    heads = config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers * heads * page_size * 2 * size * element_size)


class Watch:
    """Observes the scheduler of an engine, within a ``with`` statement.

    Attributes:
        running: for each step, the number of requests that run.
        held: for each step, the number of pages that requests hold.
        preemptions: the number of preemptions.
    """

    def __init__(self, engine: Any) -> None:
        self.scheduler = engine.engine_core.engine_core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.running: list[int] = []
        self.held: list[int] = []
        self.preemptions = 0
        self._schedule, self._preempt = self.scheduler.schedule, self.scheduler._preempt_request

    def __enter__(self) -> Watch:
        self.scheduler.schedule, self.scheduler._preempt_request = self._scheduled, self._preempted
        return self

    def __exit__(self, *error: object) -> None:
        self.scheduler.schedule, self.scheduler._preempt_request = self._schedule, self._preempt

    def pages_held(self) -> list[int]:
        """The numbers of all pages that requests hold; a page shared by two requests stands twice."""
        return [
            block.block_id
            for manager in self.managers
            for blocks in manager.req_to_blocks.values()
            for block in blocks
            if not block.is_null
        ]

    def _scheduled(self, *args: Any, **kwargs: Any) -> Any:
        out = self._schedule(*args, **kwargs)
        self.running.append(len(self.scheduler.running))
        self.held.append(len(self.pages_held()))
        return out

    def _preempted(self, *args: Any, **kwargs: Any) -> Any:
        self.preemptions += 1
        return self._preempt(*args, **kwargs)
