"""Lazy import of the adapters whose libraries take time or are optional."""

from __future__ import annotations

import importlib
import sys
from typing import Any

_PACKAGE = "hesscurv.integrations"
_CHANNELS = ("torch-pruning", "")  # a dependency, but seconds to import
# Each with its module, its library's name, and the extra that installs it.
_HOMES = {
    "EigenspaceImportance": ("importances.pruning_importance", *_CHANNELS),
    "FisherImportance": ("importances.pruning_importance", *_CHANNELS),
    "CompensatedImportance": ("importances.compensated_importance", *_CHANNELS),
    "compensate_channels_": ("channels.compensation", *_CHANNELS),
    "remove_channels_": ("channels.removal", *_CHANNELS),
    "macs_per_entry": ("channels.costs", *_CHANNELS),
    "CurvatureCallback": ("training.lightning_callback", "Lightning", "lightning"),
    "CurvatureTrainerCallback": ("training.trainer_callback", "Transformers", "transformers"),
}


def __getattr__(name: str) -> Any:
    """Import an adapter, as an attribute of the package.

    Raises:
        AttributeError: If there is no adapter of this name.
        ImportError: If its library is not installed.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {_PACKAGE!r} has no attribute {name!r}")
    home, library, extra = _HOMES[name]
    try:
        return getattr(importlib.import_module(f"{_PACKAGE}.{home}"), name)
    except ModuleNotFoundError as error:
        package = f"hesscurv[{extra}]" if extra else library
        raise ImportError(
            f"{name} needs {library}, and {error.name} is not installed; install it with "
            f"pip install '{package}'"
        ) from error


def __dir__() -> list[str]:
    """Return the package's names, including the lazily imported ones."""
    return sorted({*vars(sys.modules[_PACKAGE]), *_HOMES})
