"""The public API gives the same results on a (pretended) CUDA device as on the CPU.

The CPU plays the device, in float64, so results differ by the rounding of sums in another order at
most; iterations that stop at a tolerance of 1e-8 differ by about that.
"""

import functools
from typing import Any

import pytest
import torch
from devices import api_programs as api
from torch import Tensor

import hesscurv


def assert_same(there: Any, here: Any, tolerance: float, at: str = "") -> None:
    """Compare nested results entry by entry; the message says where they differ."""
    if isinstance(here, dict):
        assert there.keys() == here.keys(), at
        for name, value in here.items():
            assert_same(there[name], value, tolerance, f"{at}.{name}")
    elif isinstance(here, (list, tuple)):
        assert len(there) == len(here), at
        for i, value in enumerate(here):
            assert_same(there[i], value, tolerance, f"{at}[{i}]")
    elif isinstance(here, (Tensor, float)):
        got, expected = torch.as_tensor(there), torch.as_tensor(here).detach()
        torch.testing.assert_close(
            got, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{at}: {m}"
        )
    else:
        assert there == here, at


@functools.cache
def expected_product(kind, case):
    """By the reference way on the CPU, which every way on the device is to agree with."""
    return api.product("cpu", kind, case, "retained")


def check(pretended, program, *args, tolerance=1e-9):
    here = program("cpu", *args)
    there = pretended.run(program, "cuda", *args)
    assert_same(there, here, tolerance)


WAYS = [
    (kind, case, way)
    for kind, operator in api.KINDS.items()
    for case in ("mlp", "conv_bn")
    for way in operator.ways
]
ATTENTION = [("hessian", "transformer", way) for way in ("retained", "batched", "vmapped")]
TRACED = [
    pytest.param(kind, "transformer", way, marks=pytest.mark.slow)
    for kind, way in [
        ("hessian", "linearized"),
        ("hessian", "linearized_batched"),
        ("ggn", "linearized_batched"),
        ("fisher", "vmapped"),
    ]
]


@pytest.mark.parametrize(("kind", "case", "way"), [*WAYS, *ATTENTION, *TRACED])
def test_products(pretended, kind, case, way):
    got = pretended.run(api.product, "cuda", kind, case, way)
    assert_same(got, expected_product(kind, case), 1e-9)


# torch's fused cells on CUDA have no forward mode, which ways but the first two need.
@pytest.mark.parametrize("way", hesscurv.HessianOperator.ways)
def test_products_of_recurrent_networks(pretended, way):
    got = pretended.run(api.product, "cuda", "hessian", "lstm", way)
    assert_same(got, expected_product("hessian", "lstm"), 1e-9)


@pytest.mark.parametrize("kind", list(api.KINDS))
def test_products_by_the_chosen_way(pretended, kind):
    check(pretended, api.chosen_way, kind)


def test_changed_weights_are_noticed(pretended):
    check(pretended, api.changed_weights)


def test_vectors_of_another_device_and_nan_are_refused(pretended):
    elsewhere, nan = pretended.run(api.refused_vectors, "cuda")
    assert "expected a vector on device cuda" in elsewhere
    assert "expected a finite vector" in nan


SOLVES = [
    ("block_krylov", {}),
    ("block_krylov", {"which": "LA"}),
    ("block_krylov", {"which": "SA"}),
    ("block_krylov", {"storage": "device"}),
    ("block_krylov", {"storage": "cpu"}),
    ("block_krylov", {"storage": "disk"}),
    ("block_krylov", {"storage_dtype": torch.float16, "tol": 1e-2}),
    ("rayleigh_ritz", {}),
]


@pytest.mark.parametrize(("method", "options"), SOLVES)
def test_eigenpairs(pretended, method, options):
    # The vectors of float16 are rounded by up to 5e-4; both devices round alike, but for sums in
    # another order.
    tolerance = 1e-2 if "tol" in options else 1e-6
    check(pretended, api.solved, method, options, tolerance=tolerance)


@pytest.mark.parametrize("method", ["single_pass", "rayleigh_ritz"])
def test_eigenpairs_of_a_matrix_of_low_rank(pretended, method):
    check(pretended, api.sketched, method)


def test_eigenpairs_by_jobs(pretended):
    check(pretended, api.measured_in_jobs)


def test_a_checkpoint_goes_on_where_it_was(pretended):
    result = pretended.run(api.resumed_solve, "cuda")
    assert result["same"]
    assert_same(result, api.resumed_solve("cpu"), 1e-6)


def test_saved_pairs_load_on_the_cpu(pretended):
    check(pretended, api.saved_pairs, tolerance=1e-6)


def test_spectra(pretended):
    check(pretended, api.spectra, tolerance=1e-6)


def test_the_device_may_be_the_default_one(pretended):
    check(pretended, api.by_default, tolerance=1e-6)


def test_metrics(pretended):
    check(pretended, api.metrics, tolerance=1e-6)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("mode", ["update", "gradient"])
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_preconditioned_training(pretended, base, mode, loaded):
    check(pretended, api.trained, base, mode, loaded, tolerance=1e-6)


@pytest.mark.parametrize("options", [{}, {"curvature": "gauss_newton"}])
def test_newton_cg(pretended, options):
    check(pretended, api.newton, options, tolerance=1e-6)


def test_a_monitor_sees_the_same_and_leaves_training_alone(pretended):
    result = pretended.run(api.monitored, "cuda")
    assert result["same"]
    assert result["records"]
    assert_same(result, api.monitored("cpu"), 1e-6)


@pytest.mark.parametrize("structure", [None, "2:4"])
@pytest.mark.parametrize("method", ["obs", "obd", "magnitude"])
def test_pruned_models(pretended, method, structure):
    check(pretended, api.pruned, method, structure, tolerance=1e-6)


@pytest.mark.parametrize("kind", ["obd", "obs", "leverage"])
def test_masks_by_curvature(pretended, kind):
    check(pretended, api.curvature_pruned, kind)


@pytest.mark.parametrize("name", ["unstructured", "structured", "nm"])
def test_pruning_methods(pretended, name):
    check(pretended, api.pruning_method, name)


def test_sparse_files_load_on_both_devices(pretended):
    check(pretended, api.pruned_files)
