"""The loss and its gradient over all batches and ranks, and counts that an error interrupts."""

import cases
import oracles
import pytest
import torch
from distributed import rank_programs as programs
from support.worlds import run_world
from torch import nn

import hesscurv
from hesscurv import GGNOperator, HessianOperator
from hesscurv.operators.loss_gradient import loss_and_gradient

# float64: sums in another order.
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def plain(model, batches, task):
    """The weighted mean loss and its gradient, by one backward pass."""
    total = sum(task.weight(batch) for batch in batches)
    loss = sum(task.weight(batch) / total * task(model, batch) for batch in batches)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    return float(loss.detach()), torch.cat([g.flatten() for g in gradient])


def test_it_is_the_weighted_mean_over_all_batches():
    model, data = programs.net(), programs.batches()
    loss, gradient = plain(model, data, programs.TASK)
    for kind in (HessianOperator, GGNOperator):
        got = loss_and_gradient(kind(model, programs.TASK, data))
        assert got[0] == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(got[1], gradient, **CLOSE)


def test_over_ranks_it_is_that_of_all_batches(tmp_path):
    loss, gradient = plain(programs.net(), programs.batches(), programs.TASK)
    for rank in run_world(programs.differentiate, 2, tmp_path):
        assert rank["loss"] == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(rank["gradient"], gradient, **CLOSE)
        assert rank["without data"] == pytest.approx(loss, rel=1e-12)


class Counting(hesscurv.Task):
    """Cross-entropy whose weights cannot be told once."""

    def __init__(self):
        self.fails = False

    def outputs(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch[1])

    def weight(self, batch):
        if self.fails and len(batch[0]) == 9:
            raise OSError("no weight now")
        return float(len(batch[0]))


def test_batches_are_counted_again_after_an_error_in_counting_them():
    problem, task = cases.build("mlp"), Counting()
    problem.task = task
    H = problem.operator(HessianOperator)
    V = torch.randn(H.shape[0], 2).double()
    H @ V
    x, y = torch.randn(9, 4).double(), torch.arange(9) % 3
    problem.batches.append((x, y))
    task.fails = True
    for _ in range(2):  # it fails as long as the reason is there, and computes nothing half
        with pytest.raises(OSError, match="no weight now"):
            H @ V
    task.fails = False
    torch.testing.assert_close(H @ V, oracles.dense_hessian(problem) @ V, rtol=1e-10, atol=1e-12)
    assert H.total_weight == sum(len(b[0]) for b in problem.batches)


def test_weights_are_taken_again_after_an_error_in_counting():
    problem, task = cases.build("mlp"), Counting()
    problem.task = task
    H = problem.operator(HessianOperator)
    V = torch.randn(H.shape[0], 2).double()
    H @ V
    with torch.no_grad():
        problem.model[0].weight.mul_(2)
    problem.batches.append((torch.randn(9, 4).double(), torch.arange(9) % 3))
    task.fails = True
    with pytest.raises(OSError, match="no weight now"):
        H @ V
    problem.batches.pop()
    torch.testing.assert_close(H @ V, oracles.dense_hessian(problem) @ V, rtol=1e-10, atol=1e-12)
    assert H.total_weight == sum(len(b[0]) for b in problem.batches)
