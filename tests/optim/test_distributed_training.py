"""Two gloo ranks: the training of one process on all data, the same decisions, checkpoints."""

import pytest
import torch
from optim import rank_training as programs
from optim.training import TASK, data, net, precondition, train
from support.worlds import SHARDS_ON_CPUS, run_world, told

# Sums in another order, 1e-16 each, through 5 steps and eigenvectors that their gaps amplify.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
BASES = programs.BASES


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return run_world(programs.run_all, 2, folder, timeout=300, collective_timeout=60)


def one_process(base, batches=None, **options):
    """The weights and the optimizer after the same steps on the joined data."""
    model = net()
    optimizer = precondition(
        BASES[base](model.parameters()),
        model,
        TASK,
        data() if batches is None else batches,
        samples=programs.SAMPLES,
        **programs.options_of(base) | options,
    )
    return train(model, optimizer, programs.STEPS), optimizer


@pytest.mark.parametrize(("base", "inner"), [("SGD", False), ("SGD", True), ("AdamW", False)])
def test_ddp_trains_as_one_process_on_all_data(world, base, inner):
    expected, optimizer = one_process(base)
    first, *others = told(world, "train_ddp")
    for rank in (first, *others):
        torch.testing.assert_close(rank[base, inner], expected, **CLOSE)
        assert torch.equal(rank[base, inner], first[base, inner])
        assert rank[base, inner, "seen"] == first[base, inner, "seen"]
        values, _, factor = rank[base, inner, "seen"]
        assert values == pytest.approx(optimizer.report().eigenvalues, rel=1e-9)
        assert factor == pytest.approx(optimizer.report().rate_factor, rel=1e-9)


def test_ranks_decide_alike_by_clocks_that_differ(world):
    first, *others = told(world, "decide")
    assert first["refreshed"] == [0, 30]  # by the slower clock
    for rank in others:
        assert rank["refreshed"] == first["refreshed"]
        assert torch.equal(rank["weights"], first["weights"])


def test_ranks_see_drift_alike(world):
    first, *others = told(world, "drift")
    assert first["after"] > first["before"]
    for rank in others:
        assert (rank["before"], rank["after"]) == (first["before"], first["after"])
        assert torch.equal(rank["weights"], first["weights"])


@pytest.mark.parametrize("case", ["no second batch", "no samples"])
def test_ranks_may_have_fewer_samples(world, case):
    first, *others = told(world, "differ")
    for rank in (first, *others):
        assert rank[case, "failures"] == 0
        assert torch.equal(rank[case], first[case])
    # The same as one process on what there is: of each batch the first rank's half, and of those
    # that the second rank has the other half too.
    size, halves = programs.SAMPLES // 2, data()
    count = 1 if case == "no second batch" else 0
    firsts = [(x[:size], y[:size]) for x, y in halves]
    model = net()
    joined = [halves[0], firsts[1]] if count else firsts[:2]
    optimizer = precondition(
        BASES["SGD"](model.parameters()),
        model,
        TASK,
        joined,
        samples=programs.SAMPLES if count else size,
        **programs.options_of("SGD"),
    )
    torch.testing.assert_close(train(model, optimizer, programs.STEPS), first[case], **CLOSE)


def test_a_loader_that_fails_on_one_rank_is_the_base_on_all(world):
    ranks = told(world, "differ")
    for i, rank in enumerate(ranks):
        assert torch.equal(rank["broken"], rank["base"])
        (message,) = rank["broken, said"]
        assert "OSError: no such file" in message
        assert ("DistributedError: rank 1 failed" in message) == (i == 0)


@pytest.mark.parametrize(
    ("base", "mesh"),
    [("SGD", "one dimension"), ("AdamW", "one dimension"), ("SGD", (2, 1)), ("SGD", (1, 2))],
)
def test_a_sharded_model_is_trained_as_one_that_is_not(world, base, mesh):
    expected, optimizer = one_process(base)
    for rank in told(world, "train_fsdp"):
        assert rank[base, mesh, "failures"] == 0
        torch.testing.assert_close(rank[base, mesh], expected, **CLOSE)
        values, gains, factor = rank[base, mesh, "seen"]
        report = optimizer.report()
        assert values == pytest.approx(report.eigenvalues, rel=1e-9)
        assert gains == pytest.approx(report.gains, rel=1e-9)
        assert factor == pytest.approx(report.rate_factor, rel=1e-9)


@pytest.mark.parametrize(
    ("mesh", "rows"), [("one dimension", 3), ((2, 1), 6), ((1, 2), 3)], ids=str
)
def test_a_rank_keeps_its_shards_of_the_basis_and_gradients_stay_what_they_are(world, mesh, rows):
    for rank in told(world, "train_fsdp"):
        basis, weight = rank["SGD", mesh, "basis"]
        assert tuple(weight) == (rows, 5)
        assert tuple(basis) == (rows, 5, 4)
        assert rank["SGD", mesh, "same gradients"]


def test_a_model_that_is_sharded_in_part_is_refused(world):
    for rank in told(world, "train_fsdp"):
        kind, message = rank["partly sharded"]
        assert kind == "ValueError"
        assert "sharded over the same processes" in message


@pytest.mark.parametrize("kind", programs.KINDS)
@pytest.mark.parametrize("base", BASES)
def test_a_sharded_model_resumes_with_the_same_bits(world, base, kind):
    for rank in told(world, "checkpoint"):
        expected = rank[base, "expected"]
        assert torch.equal(rank[base, kind, "state"], expected)
        if kind != "full":
            assert torch.equal(rank[base, kind, "files"], expected)


@pytest.mark.slow
@pytest.mark.skipif(not SHARDS_ON_CPUS, reason="torch 2.6 shards no model on CPUs")
def test_replicas_of_shards_are_trained_as_one_process(tmp_path):
    """Four ranks, two by two: hybrid sharding."""
    ranks = run_world(programs.train_fsdp, 4, tmp_path, timeout=300, collective_timeout=60)
    expected, _ = one_process("SGD")
    for rank in ranks:
        for mesh in ("one dimension", (2, 2)):
            assert rank["SGD", mesh, "failures"] == 0
            torch.testing.assert_close(rank["SGD", mesh], expected, **CLOSE)
