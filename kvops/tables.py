"""Moved to :mod:`kvops.cache.tables`; this name is removed in release 0.3."""

import warnings

from kvops.cache.tables import *  # noqa: F403

warnings.warn("kvops.tables has moved to kvops.cache.tables", DeprecationWarning, stacklevel=2)
