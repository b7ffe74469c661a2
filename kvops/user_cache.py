"""Where kvops keeps what it makes for a user: compiled CPU kernels and records of tuning."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path | None:
    """``KVOPS_CACHE_DIR``, or kvops in the XDG cache; None for a user without a home directory."""
    named = os.environ.get("KVOPS_CACHE_DIR")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "kvops" if os.path.isabs(cache) else None
