"""Projected eigenproblems go where they are solved faster; results are the same to rounding."""

import pytest
import torch

from hesscurv.linalg import small_eigenproblems
from hesscurv.linalg.small_eigenproblems import eigh

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def symmetric(rows):
    A = torch.randn(rows, rows, dtype=torch.float64)
    return (A + A.mT) / 2


@pytest.fixture
def places(monkeypatch):
    """Where problems are solved: a GPU played by the host, which takes `cost` seconds."""
    monkeypatch.setattr(small_eigenproblems, "_LEAST_ROWS", 8)
    monkeypatch.setattr(small_eigenproblems, "_measured", {})
    clock, costs, solved = [0.0], {"host": 1.0, "device": 1.0}, []
    solve = small_eigenproblems._solve

    def on(place):
        def timed(matrix, *_):
            clock[0] += costs[place]
            solved.append(place)
            if costs[place] == float("inf"):
                raise torch.OutOfMemoryError("no memory")
            return solve(matrix)

        return timed

    monkeypatch.setattr(small_eigenproblems, "_solve", on("host"))
    monkeypatch.setattr(small_eigenproblems, "_solve_on", on("device"))
    monkeypatch.setattr(small_eigenproblems.time, "perf_counter", lambda: clock[0])
    return costs, solved


def test_the_upper_triangle_counts_on_the_host():
    A = symmetric(20)
    values, vectors = eigh(A.triu(), CPU)
    torch.testing.assert_close(A @ vectors, vectors * values, rtol=0, atol=1e-12)


def test_operators_on_the_host_and_small_matrices_never_measure(places):
    _, solved = places
    eigh(symmetric(20), CPU)
    eigh(symmetric(7), GPU)
    assert solved == ["host", "host"]


@pytest.mark.parametrize(("cost", "place"), [(0.1, "device"), (10.0, "host")])
def test_the_faster_place_is_taken_from_the_second_matrix_of_a_size_on(places, cost, place):
    costs, solved = places
    costs["device"] = cost
    A = symmetric(20)
    first = eigh(A, GPU)
    assert solved == ["host", "device", "device"]
    second = eigh(A, GPU)
    assert solved[3:] == [place]
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)
    eigh(symmetric(21), GPU)  # of nearly the same size
    assert solved[4:] == [place]
    eigh(symmetric(60), GPU)
    assert solved[5:] == ["host", "device", "device"]


def test_a_device_that_fails_is_left_aside(places):
    costs, solved = places
    costs["device"] = float("inf")
    eigh(symmetric(20), GPU)
    del solved[:]
    eigh(symmetric(20), GPU)
    assert solved == ["host"]
