"""What all tests share: no calibration files outside the test, and the same numbers every time."""

import os

import pytest
import torch

# Before any test module builds an operator: nothing is remembered between runs.
os.environ["HESSCURV_CACHE"] = "off"


@pytest.fixture(autouse=True)
def seeded():
    """Seed torch's generator, so that a test's data does not depend on the tests before it."""
    torch.manual_seed(0)
