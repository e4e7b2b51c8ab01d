"""Lightning and the Trainer on two gloo ranks: training is unchanged, and the first rank logs."""

import pytest
import torch
from host_ranks import run_lightning, run_trainer
from support.worlds import run_world

pytestmark = pytest.mark.slow


def told(records):
    """Records without what each rank's own clock says."""
    return [{k: v for k, v in r.items() if k not in ("seconds", "fraction")} for r in records]


def assert_unchanged_and_alike(world, steps):
    for rank in world:
        plain, watched = rank["states"][:2]
        assert [name for name in plain if not torch.equal(plain[name], watched[name])] == []
        assert [(r["step"], r["status"]) for r in rank["records"]] == [(s, "ok") for s in steps]
    assert told(world[0]["records"]) == told(world[1]["records"])
    assert [rank["logged"] for rank in world] == [steps, []]


def test_lightnings_ddp(tmp_path):
    pytest.importorskip("lightning")
    world = run_world(run_lightning, 2, tmp_path, timeout=400, collective_timeout=200)
    assert_unchanged_and_alike(world, [0, 2])  # three steps of 2 x 8 samples


def test_the_trainers_ddp_and_its_checkpoints(tmp_path):
    pytest.importorskip("transformers")
    world = run_world(run_trainer, 2, tmp_path, timeout=400, collective_timeout=200)
    assert_unchanged_and_alike(world, [0, 2, 4])
    for rank in world:
        assert rank["files"] == ["curvature_monitor.pt"]
        assert told(rank["resumed"]) == told(rank["records"])
