"""What the layers of one engine have in common: its options, read once from vLLM's configuration."""

from __future__ import annotations

import weakref
from typing import Any

from vllm.logger import init_logger

from kvops.integrations.vllm.judge import Judge
from kvops.integrations.vllm.options import Options

logger = init_logger(__name__)


class Engine:
    """An engine in this process.

    Attributes:
        options: what was asked for.
        in_flight: the most tokens that steps under way may compute.
    """

    _last: Engine | None = None

    def __init__(self, config: Any) -> None:
        self._config = weakref.ref(config)
        self.options = Options.of(config.additional_config)
        self.in_flight: int = config.max_in_flight_tokens
        if self.options.compresses:
            _expect_compressible(config)
            Judge(self.options.make_policy(), group=1)  # raises where an engine cannot serve the policy
            logger.info_once("kvops compresses the KV cache: %s", str(self.options))
        else:
            logger.info_once("kvops attends, and compresses nothing")
        if self.options.check:
            _expect_checkable(config, self.options)

    @classmethod
    def building(cls, config: Any) -> Engine:
        """The engine of ``config``, whose layers are being built."""
        if cls._last is None or cls._last._config() is not config:
            cls._last = cls(config)
        return cls._last

    @classmethod
    def built_last(cls) -> Engine | None:
        """The engine whose layers this process built last.

        vLLM customises the specs of layers without a configuration that could be asked, right after it built them.
        """
        return cls._last


def _expect_checkable(config: Any, options: Options) -> None:
    """Raises ValueError where attention cannot be compared with what was computed."""
    cache = config.cache_config
    if cache.enable_prefix_caching and not options.compresses:
        raise ValueError(
            "check: expected no prefix caching without compression, because a prefix that is found was computed by "
            "another request. Next step: --no-enable-prefix-caching"
        )
    if str(cache.cache_dtype).startswith(("fp8", "int8")):
        raise ValueError(
            f"check: expected a cache that holds what was computed, got one of {cache.cache_dtype}. Next step: "
            "kv_cache_dtype=auto, or check=false"
        )


def _expect_compressible(config: Any) -> None:
    """Raises ValueError where a setting of vLLM does not go together with compression."""
    parallel, speculation = config.parallel_config, config.speculative_config
    for setting, wrong in {
        "kv_transfer_config": config.kv_transfer_config is not None,
        "decode_context_parallel_size": parallel.decode_context_parallel_size > 1,
        "prefill_context_parallel_size": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "enable_dbo": parallel.enable_dbo,
        "kv_cache_dtype": str(config.cache_config.cache_dtype).startswith(("fp8", "nvfp4", "int")),
        "speculative_config": speculation is not None
        and (speculation.method != "ngram" or bool(config.scheduler_config.async_scheduling)),
    }.items():
        if wrong:
            value = config.cache_config.cache_dtype if setting == "kv_cache_dtype" else "the one given"
            raise ValueError(
                f"{setting}: kvops does not compress with {value}. Next step: leave it out, or ratio=1 in "
                'additional_config["kvops"]'
            )
