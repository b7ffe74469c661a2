"""The paged KV cache: one pool of blocks, in which every head of every layer has blocks and a length of its own."""

from kvops.cache.paged import PagedKVCache
from kvops.cache.pool import OutOfBlocksError
from kvops.cache.rows import Rows
from kvops.cache.stats import CacheStats

__all__ = ["CacheStats", "OutOfBlocksError", "PagedKVCache", "Rows"]
