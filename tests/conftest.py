"""What all tests share: no calibration files outside the test, and the same numbers every time."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread each, where several processes test side by side; also in what they start. Before
    # torch is imported, which reads it once.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Before any test module builds an operator: nothing is remembered between runs.
os.environ["HESSCURV_CACHE"] = "off"


# What torch 2.6 says of its own compiler, checkpoint files and schedulers, and of the oldest
# accelerate, and newer ones of an early Python 3.13: errors otherwise.
OWN_WARNINGS = (
    "ignore:Graph break due to unsupported builtin:UserWarning",
    "ignore:TypedStorage is deprecated:UserWarning",
    "ignore:.torch.cpu.amp.autocast:FutureWarning",
    "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning",
    r"ignore:The epoch parameter in `scheduler.step\(\)`:UserWarning",
)


def pytest_configure(config):
    for line in OWN_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True)
def seeded():
    """Seed torch's generator, so that a test's data does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def terminal(capsys, monkeypatch):
    """Capture what a program writes whose stderr is a terminal."""
    monkeypatch.setattr("hesscurv.interface.progress_bar.is_shown_somewhere", lambda: True)
    return capsys


@pytest.fixture
def compiler():
    """Skip where torch 2.6 compiles nothing any more: it may, after threads have differentiated."""
    torch.compiler.reset()
    runs = []

    def backend(graph, _):
        return lambda *args: runs.append(1) or graph(*args)

    torch.compile(torch.nn.Linear(2, 2), backend=backend)(torch.ones(1, 2))
    torch.compiler.reset()
    if not runs:
        assert torch.__version__ < "2.7"
        pytest.skip("this torch has lost its compiler to threads before")
