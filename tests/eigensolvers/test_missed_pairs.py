"""No pair is called converged where one of at least its size was missed."""

import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
import torch

import hesscurv

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def planted():
    """The benchmark's spectra."""
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("missed_pairs", FOLDER / "missed_pairs.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["missed_pairs"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("missed_pairs", "results"):
            sys.modules.pop(name, None)


def check(module, numbers):
    told = []
    for number, (name, case) in enumerate(module.cases(max(numbers) + 1)):
        if number in numbers and len(case.values) < 2000:
            missed, _, _ = case.missed()
            if missed:
                told.append(f"{number} ({name}): {missed} missed")
    assert not told


def test_planted_spectra(planted):
    check(planted, range(31))


@pytest.mark.slow
def test_many_planted_spectra(planted):
    check(planted, range(31, 400))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("copies", [3, 20])
def test_copies_in_a_rounded_basis_are_found_or_not_called_converged(dtype, copies):
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(150, 150).double())[0]
    values = torch.cat([torch.ones(150 - copies), torch.full((copies,), 50.0)]).double()
    A = ((Q * values) @ Q.T).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hesscurv.ConvergenceWarning)
        pairs = hesscurv.eigsh((A + A.T) / 2, k=copies, storage_dtype=dtype, tol=1e-2)
    found = int((pairs.eigenvalues > 40).sum())
    assert found == copies or int(pairs.converged.sum()) <= found


def test_what_is_not_known_is_said():
    """With too few products for a search, pairs are not called converged without a warning."""
    values = torch.cat([torch.full((30,), 10.0), torch.linspace(0, 9, 400)]).double()
    with pytest.warns(hesscurv.ConvergenceWarning):
        pairs = hesscurv.eigsh(torch.diag(values), k=30, block_size=1, max_matvecs=60, tol=1e-2)
    found = int((pairs.eigenvalues > 9.9).sum())
    assert int(pairs.converged.sum()) <= found
