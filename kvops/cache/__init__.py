"""The paged KV cache: one pool of blocks for all heads of all layers. Each head has its own blocks and length."""

from kvops.cache.paged import PagedKVCache
from kvops.cache.pool import OutOfBlocksError
from kvops.cache.rows import Rows
from kvops.cache.stats import CacheStats

__all__ = ["CacheStats", "OutOfBlocksError", "PagedKVCache", "Rows"]
