"""Two gloo ranks: training is unchanged, all measure the same, decide alike and fail together."""

import pytest
import torch
from hooks import watched_ranks as programs
from hooks.watched import data, dense_hessian, net
from support.worlds import run_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return run_world(programs.run_all, 2, folder, timeout=300, collective_timeout=60)


def test_ddp_trains_with_the_same_bits(world):
    for rank in world:
        assert rank["unchanged"]["same"]
    first, second = (rank["unchanged"] for rank in world)
    assert torch.equal(first["weights"], second["weights"])


def test_all_ranks_have_the_same_records_and_the_first_logs(world):
    first, second = (rank["unchanged"] for rank in world)
    assert [r["step"] for r in first["records"]] == [0, 3]
    assert (first["logged"], second["logged"]) == (2, 0)
    assert torch.equal(first["vectors"], second["vectors"])
    for a, b in zip(first["records"], second["records"], strict=True):
        own = ("seconds", "fraction")  # by each rank's clock
        assert {k: v for k, v in a.items() if k not in own} == {
            k: v for k, v in b.items() if k not in own
        }
        assert a["status"] == "ok"


def test_the_probe_set_is_that_of_all_ranks(world):
    hessian, gradient = dense_hessian(net(), data(2))
    values, vectors = torch.linalg.eigh(hessian)
    order = values.abs().argsort(descending=True)[:4]
    share = (vectors[:, order].T @ gradient).square().sum() / gradient.square().sum()
    for rank in world:
        assert rank["joint"]["eigenvalues"] == pytest.approx(values[order].tolist(), rel=1e-9)
        assert rank["joint"]["gradient_share"] == pytest.approx(float(share), rel=1e-6)


def test_the_first_rank_decides_when_there_is_time(world):
    # 3 s after step 0; another 3 s are affordable after 60 s of training, at step 60.
    for rank in world:
        assert rank["decide"] == [0, 60, 90]


def test_what_fails_on_one_rank_fails_on_all_and_training_goes_on(world):
    for rank in world:
        assert rank["fail"]["status"] == ["ok", "failed", "ok", "failed", "ok"]
        assert all(rank["fail"]["errors"][i] for i in (1, 3))
    assert "ZeroDivisionError" in world[1]["fail"]["errors"][3]
    assert "ZeroDivisionError" in world[0]["fail"]["errors"][3]  # quoted from rank 1
    assert len(world[0]["fail"]["told"]) == 2  # the logger, and the measurement
    assert len(world[1]["fail"]["told"]) == 1
