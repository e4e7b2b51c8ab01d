"""The examples in the docstrings of public names run and give what they say."""

import copy
import doctest
import importlib
import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PACKAGES = ["hesscurv"]
PACKAGES += [f"hesscurv.{part}" for part in ("distributed", "eigensolvers", "hooks", "metrics")]
PACKAGES += [f"hesscurv.{part}" for part in ("operators", "optim", "plots", "pruning", "spectra")]
PACKAGES += ["hesscurv.integrations"]
# A union of types, without a docstring of its own.
WITHOUT_EXAMPLE = {"Subspace"}


def public_names():
    """Return each public function and class once, by the first package that has it."""
    homes = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        if package == "hesscurv.integrations":  # each is there alone, and imported when it is run
            names = [*module.__all__, "CurvatureCallback", "CurvatureTrainerCallback"]
            homes.update({name: f"{package}.{name}" for name in names})
            continue
        for name in module.__all__:
            if not inspect.ismodule(value := getattr(module, name)):
                homes.setdefault(id(value), f"{package}.{name}")
    # Importing Lightning and Transformers takes seconds.
    slow = pytest.mark.slow
    return [
        pytest.param(path, marks=[slow] if path.endswith("Callback") else [])
        for path in sorted(homes.values())
    ]


def find(path):
    package, _, name = path.rpartition(".")
    return inspect.unwrap(getattr(importlib.import_module(package), name))


@pytest.fixture(scope="module")
def environment():
    """The names that the first page of the reference says the examples may use."""
    page = (ROOT / "examples" / "guide" / "pages" / "reference" / "index.md").read_text()
    (setup,) = re.findall(r"```python exec=.*?\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(setup, names)
    return names


@pytest.mark.parametrize("path", public_names())
def test_the_example_of_a_public_name_runs(path, environment, monkeypatch, tmp_path):
    if path.rpartition(".")[2] in WITHOUT_EXAMPLE:
        pytest.skip("no docstring of its own")
    monkeypatch.chdir(tmp_path)
    value = find(path)
    before = copy.deepcopy(environment["model"].state_dict())
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(value, path, module=False, globs=dict(environment))
    assert example.examples, f"{path} has no example"
    flags = doctest.NORMALIZE_WHITESPACE
    with warnings.catch_warnings():
        # Of other libraries, while they are imported.
        warnings.filterwarnings("ignore", module="lightning|torch_pruning|tensorboard|google")
        assert doctest.DocTestRunner(optionflags=flags, verbose=False).run(example).failed == 0
    # Examples share the model, so none may change it.
    torch.testing.assert_close(environment["model"].state_dict(), before, rtol=0, atol=0)


def test_a_wrong_example_is_found(capsys):
    parser = doctest.DocTestParser()
    example = parser.get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 1
    assert "Expected" in capsys.readouterr().out
