"""The pretended CUDA device, one process for all tests that need one."""

import pytest
from support.pretended_cuda.build import CannotBuild
from support.pretended_cuda.child import PretendedDevice


@pytest.fixture(scope="session")
def pretended():
    """A `PretendedDevice`; its tests are skipped, with the reason, where it cannot be compiled."""
    try:
        device = PretendedDevice()
    except CannotBuild as why:
        pytest.skip(str(why))
    yield device
    device.close()
