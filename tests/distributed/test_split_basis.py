"""The eigensolvers over 2 and 4 gloo ranks: one process' pairs, a share of the memory each."""

import pytest
import torch
from distributed import solver_programs as programs
from support.worlds import run_world

import hesscurv

DIM, K = 122, programs.K
SKETCHES = ["single_pass", "rayleigh_ritz"]
SOLVES = [*programs.OPTIONS, "float32", "warm"]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def world(request, tmp_path_factory):
    return run_world(programs.solve_all, request.param, tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def exact():
    H = hesscurv.HessianOperator(programs.net(), programs.TASK, programs.batches()).to_dense()
    values, vectors = torch.linalg.eigh(H)
    order = values.abs().argsort(descending=True)[:K]
    return H, values[order], vectors[:, order]


@pytest.mark.parametrize("name", SOLVES)
def test_eigenvalues_are_those_of_one_process(world, exact, name):
    _, values, _ = exact
    # Half precision: Ritz values err by the square of 1e-3. Sketches err by themselves.
    rtol = {"half": 1e-4, "float32": 1e-5}.get(name, 1e-9)
    if name in SKETCHES:
        values = programs.solve(**programs.OPTIONS[name]).eigenvalues
    for rank in world:
        torch.testing.assert_close(rank[name]["eigenvalues"].double(), values, rtol=rtol, atol=0)


@pytest.mark.parametrize("name", SOLVES)
def test_vectors_and_residuals_are_right(world, exact, name):
    H, _, _ = exact
    for rank in world:
        V, values = rank[name]["vectors"], rank[name]["eigenvalues"].double()
        gaps = (H @ V - V * values).norm(dim=0)
        # A half-precision basis: estimates, which a pair may exceed by a half.
        slack = 1.5 if name == "half" else 1.01
        assert bool((gaps <= slack * rank[name]["residuals"] + 1e-12).all())
        tolerance = {"half": 1e-3, "float32": 1e-5}.get(name, 1e-12)
        assert float((V.mT @ V - torch.eye(K)).abs().max()) < tolerance


@pytest.mark.parametrize("name", [n for n in SOLVES if n not in SKETCHES])
def test_all_pairs_have_converged(world, name):
    assert all(bool(rank[name]["converged"].all()) for rank in world)


@pytest.mark.parametrize("name", SOLVES)
def test_every_rank_has_the_same_bits(world, name):
    first, *others = world
    for rank in others:
        for key in ("eigenvalues", "residuals", "vectors"):
            assert torch.equal(rank[name][key], first[name][key])
        assert rank[name]["num_matvecs"] == first[name]["num_matvecs"]


@pytest.mark.parametrize("name", ["plain", "restarts", "disk"])
def test_each_rank_holds_its_share_of_the_rows(world, name):
    assert sum(rank[name]["rows"] for rank in world) == DIM
    assert max(rank[name]["rows"] for rank in world) == -(-DIM // len(world))
    assert {rank[name]["shape"] for rank in world} == {(DIM, K)}


def test_the_planned_memory_falls_as_the_number_of_ranks(world):
    alone = programs.solve().info["planned_bytes"]
    for rank in world:
        assert rank["plain"]["bytes"] <= alone / len(world) * 1.05


def test_metrics_files_and_truncation_take_what_is_spread(world):
    mask = hesscurv.magnitude_mask(programs.net(), K)
    expected = float(hesscurv.overlap(mask, programs.solve()))
    for rank in world:
        assert rank["overlap"] == pytest.approx(expected, rel=1e-6)
        assert torch.equal(rank["loaded"]["vectors"], rank["plain"]["vectors"])
        assert rank["first three"] == (DIM, 3)


def test_jobs_that_do_not_communicate_are_no_ranks(world):
    for rank in world:
        assert rank["measure"][0] == "ValueError"
        assert "jobs of `measure` do not communicate" in rank["measure"][1]


def test_wrapped_models_give_the_same_eigenvalues(exact, tmp_path):
    for rank in run_world(programs.solve_wrapped, 2, tmp_path):
        for name in rank:
            torch.testing.assert_close(rank[name]["eigenvalues"], exact[1], rtol=1e-9, atol=0)


def test_a_solve_that_failed_on_one_rank_or_all_goes_on(tmp_path):
    ranks = run_world(programs.go_on, 2, tmp_path)
    for number, rank in enumerate(ranks):
        assert rank["all"][:2] == ("RuntimeError", "the power went out")
        kind = "RuntimeError" if number == 0 else "DistributedError"
        assert rank["one"][0] == kind
        assert "the power went out" in rank["one"][1]
        assert torch.equal(rank["resumed"]["eigenvalues"], rank["whole"]["eigenvalues"])
        assert torch.equal(rank["resumed"]["vectors"], rank["whole"]["vectors"])
        assert rank["new products"] < rank["whole"]["num_matvecs"] - 30
        assert rank["foreign"][0] in ("ValueError", "DistributedError")
        assert "another problem" in rank["foreign"][1]
        assert rank["again"][0] == ""
        kind = "DistributedError" if number == 0 else "ValueError"
        assert rank["damaged"][0] == kind
        assert "is damaged" in rank["damaged"][1]
        assert rank["unlike"][0] == "ValueError"
        assert "arguments of the solve" in rank["unlike"][1]
        assert rank["bad k"][0] == kind
        assert "1 <= k <= D" in rank["bad k"][1]
        assert all(rank[name][2] < 8 for name in ("one", "damaged", "foreign", "unlike", "bad k"))


def test_a_full_disk_of_one_rank_ends_all(tmp_path):
    ranks = run_world(programs.fill_one_disk, 2, tmp_path)
    for first, second in zip(*ranks, strict=True):  # of the basis, and of the checkpoint
        assert second[0] == "DiskFullError"
        assert first[0] == "DistributedError"
        assert "rank 1 failed" in first[1]
        assert first[2] < 8


def test_ranks_without_a_row_take_part(tmp_path):
    for rank in run_world(programs.solve_few_rows, 2, tmp_path):
        assert rank["eigenvalues"].tolist() == pytest.approx([3.0, -2.0])


@pytest.mark.slow
def test_more_ranks_than_rows_are_fine(tmp_path):
    for rank in run_world(programs.solve_few_rows, 4, tmp_path):
        assert rank["eigenvalues"].tolist() == pytest.approx([3.0, -2.0])


def test_a_rank_that_dies_ends_the_solve_of_the_others(tmp_path):
    first, second = run_world(programs.lose_one, 2, tmp_path, may_die=(1,))
    assert second is None
    assert first[0] == "DistributedError"
    assert first[2] < 15  # the timeout of the group is 10 s
