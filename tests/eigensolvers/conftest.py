import pytest


@pytest.fixture
def folder(tmp_path):
    """Where measurements go; not there yet."""
    return tmp_path / "measurements"
