"""Two gloo ranks prune at the same step, to the masks and weights of the first."""

import pytest
import torch
from hooks import pruned_ranks as programs
from support.worlds import run_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return run_world(
        programs.run_all, 2, tmp_path_factory.mktemp("world"), timeout=300, collective_timeout=60
    )


def told(world, program):
    return [by_program[program] for by_program in world]


def test_all_ranks_have_the_first_ones_mask_and_weights(world):
    first, second = told(world, "prune_and_train")
    # Alone they would have pruned otherwise, so that agreement is no accident.
    assert any(not torch.equal(first["alone"][n], m) for n, m in second["alone"].items())
    assert first["pruned"] == second["pruned"] == [(programs.AT, 0.5)]
    assert first["shares"] == second["shares"]
    assert all(0 < share < 1 for share in first["shares"])
    assert first["masks"].keys() == second["masks"].keys() == first["alone"].keys()
    for name, mask in first["masks"].items():
        assert torch.equal(mask, second["masks"][name])
    assert sum(int((~m).sum()) for m in first["masks"].values()) == 54  # of 108
    # After more steps in DDP too, which sums the gradients of the renamed parameters as before.
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name])
    assert torch.equal(first["used"], second["used"])
    assert not bool(first["used"][~first["masks"]["0.weight"]].any())
    assert first["statuses"] == second["statuses"] == ["ok"] * programs.STEPS


def test_the_first_rank_has_the_report(world):
    first, second = told(world, "prune_and_train")
    assert first["told"] == [step == programs.AT for step in range(programs.STEPS)]
    assert not any(second["told"])


def test_a_failure_of_the_first_rank_is_told_to_the_others(world):
    first, second = told(world, "fail_on_first")
    assert "no such weights" in str(first["error"])
    assert "no such weights" in str(second["error"])
    assert "rank 0" in str(second["error"])
    for rank in (first, second):
        assert rank["names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert not rank["done"]


def test_masks_of_a_function_of_ones_own_are_sent_as_well(world):
    first, second = told(world, "prune_other_modules")
    assert list(first["masks"]) == list(second["masks"]) == ["0.bias"]
    assert torch.equal(first["masks"]["0.bias"], second["masks"]["0.bias"])
