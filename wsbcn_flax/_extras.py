"""Imports optional packages."""

import importlib
from typing import Any


def require(module: str, *, extra: str) -> Any:
    """Imports a module that an extra of this package installs.

    Raises:
        ImportError: If it cannot be imported; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed here and cannot be imported ({error}); "
            f"run: pip install 'wsbcn_flax[{extra}]'"
        ) from error
