"""Eviction policies: what a key is worth to a head. ``kvops.policies.POLICIES`` names them for command lines.

A policy is a small dataclass with one method, ``score``; the cache, the selection and the compaction are the same for
all of them. Write your own the same way and hand an instance to ``Compression(policy=...)``.
"""

from kvops.policies.base import Policy, Prefill, share_out
from kvops.policies.h2o import H2O
from kvops.policies.kv_compress import KVCompress
from kvops.policies.snapkv import SnapKV
from kvops.policies.streaming import Streaming

POLICIES: dict[str, type[Policy]] = {
    "h2o": H2O,
    "kv-compress": KVCompress,
    "snapkv": SnapKV,
    "streaming": Streaming,
}

__all__ = ["H2O", "POLICIES", "KVCompress", "Policy", "Prefill", "SnapKV", "Streaming", "share_out"]
