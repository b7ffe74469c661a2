"""Third-party packages that only the models need, imported when they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str) -> ModuleType:
    """Import ``module``, or say which command installs it.

    Raises:
        ImportError: it is not installed, or it does not import.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f'{package}: expected to be installed ({error}); the next step is: pip install "kvops[models]"',
            name=package,
        ) from error
