"""Warnings attributed to the user's line."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def warn_user(message: str, category: type[Warning]) -> None:
    """Warn at the innermost line of the call stack outside torch and this library."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
