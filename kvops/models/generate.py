"""Moved to :mod:`kvops.generation.generate`; this name is removed in release 0.3."""

import warnings

from kvops.generation.generate import *  # noqa: F403

warnings.warn("kvops.models.generate has moved to kvops.generation.generate", DeprecationWarning, stacklevel=2)
