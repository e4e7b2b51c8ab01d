"""Products fit the memory they are given: it is measured, and less is taken when it runs out."""

import gc
import logging

import cases
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hesscurv
from hesscurv import EmpiricalFisherOperator, GGNOperator, HessianOperator
from hesscurv.objective import memory
from hesscurv.operators.local_product import LocalProduct
from hesscurv.operators.timing import calibration

KINDS = {"hessian": HessianOperator, "ggn": GGNOperator, "fisher": EmpiricalFisherOperator}
TASK = hesscurv.supervised(nn.CrossEntropyLoss())


def data(*sizes):
    return [(torch.randn(n, 4, dtype=torch.float64), torch.arange(n) % 3) for n in sizes]


def graph_bytes(problem):
    H = problem.operator(HessianOperator)
    batch = None if problem.batches is None else problem.batches[0]
    return memory._graph_bytes(H.objective, batch)


# -- measuring --------------------------------------------------------------------------------


def test_a_graphs_bytes_are_counted_from_the_tensors_it_holds():
    # x -> x W^T, squared, summed: the graph of the gradient holds the product and the mean of its
    # square, whose gradient is 2 (x W^T) / n, and little beside.
    n, inputs, outputs = 64, 8, 16
    layer = nn.Linear(inputs, outputs, bias=False).double()
    problem = cases.Problem(layer, lambda m, b: m(b).square().mean(), [], None)
    problem.batches = [torch.randn(n, inputs, dtype=torch.float64)]
    product = 8 * n * outputs
    assert product <= graph_bytes(problem) <= 5 * product


def test_a_graphs_bytes_grow_with_the_samples():
    problem = cases.build("conv_bn")
    found = []
    for n in (4, 8, 16):
        problem.batches = [(torch.randn(n, 1, 6, 6, dtype=torch.float64), torch.arange(n) % 3)]
        found.append(graph_bytes(problem))
    slope = found[1] - found[0]
    assert slope > 0
    assert abs((found[2] - found[1]) / 2 - slope) <= 0.1 * slope


@pytest.mark.parametrize("name", ["pinn_func", "pinn", "checkpointed", "lstm", "conv_bn_train"])
def test_the_graph_of_any_model_can_be_measured(name):
    assert graph_bytes(cases.build(name)) > 0


def test_checkpointing_is_seen_to_save_memory():
    class Deep(nn.Module):
        def __init__(self, saving):
            super().__init__()
            self.saving = saving
            self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(6)])

        def body(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False) if self.saving else self.body(x)

    def loss(saving):
        model = Deep(saving).double()
        problem = cases.Problem(model, lambda m, b: m(b).square().mean(), [], None)
        problem.batches = [torch.randn(50, 16, dtype=torch.float64)]
        H = problem.operator(HessianOperator, check=False)
        with memory._Storages() as made:
            kept = H.objective.loss(H.objective.leaves(), problem.batches[0])
        assert kept.requires_grad
        return made.bytes_alive()

    assert loss(True) < 0.5 * loss(False)


def test_measuring_holds_nothing_afterwards():
    problem = cases.build("conv_bn")
    H = problem.operator(HessianOperator)
    with memory._Storages() as made:
        loss = H.objective.loss(H.objective.leaves(), problem.batches[0])
    assert made.bytes_alive() > 0
    del loss
    gc.collect()
    assert made.bytes_alive() == 0


def test_the_budget_is_a_share_of_the_machines_memory_unless_given():
    H = cases.build("mlp").operator(HessianOperator)
    assert 1 << 26 < H.memory_plan.budget < 1 << 45
    assert (
        cases.build("mlp").operator(HessianOperator, memory_budget=12345).memory_plan.budget
        == 12345
    )


# -- running out ------------------------------------------------------------------------------


@pytest.fixture
def run_out(monkeypatch):
    """Let setting a product up fail as a GPU does, for batches that a condition picks."""

    def start(condition):
        monkeypatch.setattr(calibration, "_REMEMBERED", {})
        prepare = LocalProduct.prepare
        sizes = []

        def limited(self, batch, way):
            sizes.append(len(batch[0]))
            if condition(len(batch[0]), way):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return prepare(self, batch, way)

        monkeypatch.setattr(LocalProduct, "prepare", limited)
        return sizes

    return start


def test_running_out_while_measuring_the_ways_is_no_error(run_out, caplog):
    model, batches = cases.build("mlp").model, data(16, 10)
    expected = HessianOperator(model, TASK, batches).to_dense()
    H = HessianOperator(model, TASK, batches)
    sizes = run_out(lambda n, way: n > 5)
    with caplog.at_level(logging.WARNING):
        H.calibrate()
    assert H.memory_plan.max_samples == 4
    assert sizes[:3] == [16, 16, 8]
    assert "without keeping graphs" in caplog.text
    assert "micro-batches of 4 samples" in caplog.text
    torch.testing.assert_close(H.to_dense(), expected, rtol=1e-10, atol=1e-13)


def test_a_way_that_runs_out_is_left_out(run_out):
    H = HessianOperator(cases.build("mlp").model, TASK, data(16))
    run_out(lambda n, way: way == "batched")
    measured = H.calibrate().seconds
    assert "retained" in measured
    assert "batched" not in measured


def test_what_couples_samples_is_not_cut_when_memory_runs_out(run_out):
    problem = cases.build("conv_bn_train")
    H = problem.operator(HessianOperator)
    run_out(lambda n, way: True)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"one batch, which cannot be cut; use smaller"
    ):
        H @ torch.ones(H.shape[0], dtype=torch.float64)


def test_what_only_looks_like_a_mean_is_not_cut_when_memory_runs_out(run_out):
    x, y = data(40)[0]
    y[20:] = -100
    task = hesscurv.supervised(lambda out, y: nn.functional.cross_entropy(out, y))
    H = HessianOperator(cases.build("mlp").model, task, [(x, y)])
    run_out(lambda n, way: n > 30)
    with pytest.raises(torch.OutOfMemoryError, match="cannot be cut"):
        H @ torch.ones(H.shape[0], dtype=torch.float64)


def test_after_running_out_later_products_start_smaller(run_out):
    H = HessianOperator(cases.build("mlp").model, TASK, data(16), way="retained")
    sizes = run_out(lambda n, way: n > 8)
    v = torch.ones(H.shape[0], dtype=torch.float64)
    H @ v
    assert sizes == [16, 16, 8, 8]
    H @ v
    assert sizes[4:] == [8, 8]
    assert H.num_matvecs == 2


def test_a_batch_with_one_sample_first_is_measured_by_the_largest():
    H = HessianOperator(cases.build("mlp").model, TASK, data(1, 60), memory_budget=8_000)
    assert H.memory_plan.max_samples < 60
    whole = HessianOperator(cases.build("mlp").model, TASK, H.objective.batches.kept)
    torch.testing.assert_close(H.to_dense(), whole.to_dense(), rtol=1e-10, atol=1e-13)
