"""Restoration of random states after a measurement runs user code."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hesscurv.objective.running.environment import unchanged_random_state


@contextmanager
def unchanged_random_states(device: torch.device) -> Iterator[None]:
    """Restore the generators of Python, NumPy, torch's CPU and a device, also after an error.

    Args:
        device: The model's device.
    """
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        with unchanged_random_state(device):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None and numpy_state is not None:
            numpy.random.set_state(numpy_state)
