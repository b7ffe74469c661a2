"""Eviction policies: how important each key is to its head. ``kvops.policies.POLICIES`` has their names on command
lines.

A policy is a small dataclass with one method, ``score``. The cache, the selection and the compaction are the same for
all policies. Write your own in the same way and pass an instance to ``Compression(policy=...)``.
"""

from kvops.policies.adakv import AdaKV
from kvops.policies.base import Cached, Policy, Prefill, Seen, share_out
from kvops.policies.by_heart import ByHeart
from kvops.policies.compression import Compression
from kvops.policies.defensive import DefensiveKV
from kvops.policies.expected_attention import ExpectedAttention
from kvops.policies.h2o import H2O
from kvops.policies.keydiff import KeyDiff
from kvops.policies.knorm import Knorm
from kvops.policies.kv_compress import KVCompress
from kvops.policies.kvzip import KVzip
from kvops.policies.pyramidkv import PyramidKV
from kvops.policies.recent import RecentQueries
from kvops.policies.recital import Recital, Recited
from kvops.policies.rkv import RKV
from kvops.policies.snapkv import SnapKV
from kvops.policies.standout import Standout
from kvops.policies.streaming import Streaming
from kvops.policies.tova import TOVA

POLICIES: dict[str, type[Policy]] = {
    "ada-kv": AdaKV,
    "by-heart": ByHeart,
    "defensive-kv": DefensiveKV,
    "expected-attention": ExpectedAttention,
    "h2o": H2O,
    "keydiff": KeyDiff,
    "knorm": Knorm,
    "kv-compress": KVCompress,
    "kvzip": KVzip,
    "pyramid-kv": PyramidKV,
    "r-kv": RKV,
    "snapkv": SnapKV,
    "standout": Standout,
    "streaming": Streaming,
    "tova": TOVA,
}

__all__ = [
    "H2O",
    "POLICIES",
    "RKV",
    "TOVA",
    "AdaKV",
    "ByHeart",
    "Cached",
    "Compression",
    "DefensiveKV",
    "ExpectedAttention",
    "KVCompress",
    "KVzip",
    "KeyDiff",
    "Knorm",
    "Policy",
    "Prefill",
    "PyramidKV",
    "RecentQueries",
    "Recital",
    "Recited",
    "Seen",
    "SnapKV",
    "Standout",
    "Streaming",
    "share_out",
]
