"""Compiled models: looked through, exact, and still compiled afterwards."""

import time

import cases
import oracles
import pytest
import torch
from torch import nn

from hesscurv import GGNOperator, HessianOperator


def gap(got, expected):
    return float((got - expected).norm() / expected.norm())


def compile_root(model, backend):
    return torch.compile(model, backend=backend)


def compile_in_place(model, backend):
    model.compile(backend=backend)
    return model


def compile_first_layer(model, backend):
    model.first = torch.compile(model.first, backend=backend)
    return model


HOW = [compile_root, compile_in_place, compile_first_layer]
# Inductor's own import warns of torch's own deprecated code.
QUIET = pytest.mark.filterwarnings("ignore:.torch.jit")
BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, QUIET])]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_gives_the_uncompiled_ones_matrix(how, backend):
    torch.compiler.reset()
    problem = cases.build("unused")
    problem.model = how(problem.model, backend)
    inputs = problem.batches[0][0]
    before = problem.model(inputs)
    H = problem.operator(HessianOperator)
    assert gap(H.to_dense(), oracles.dense("unused", "hessian")) < 1e-10
    assert gap(problem.operator(GGNOperator).to_dense(), oracles.dense("unused", "ggn")) < 1e-10
    assert torch.equal(problem.model(inputs), before)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("how", HOW)
def test_a_compiled_model_runs_compiled_afterwards(how):
    torch.compiler.reset()
    runs = []

    def backend(graph, _):
        return lambda *args: runs.append(1) or graph(*args)

    problem = cases.build("unused")
    model = how(problem.model, backend)
    model(problem.batches[0][0])
    compiled_runs = len(runs)
    assert compiled_runs > 0
    H = HessianOperator(model, problem.task, problem.batches)
    H @ torch.ones(H.shape[0], dtype=torch.float64)
    assert len(runs) == compiled_runs
    model(problem.batches[0][0])
    assert len(runs) > compiled_runs


def test_a_compiled_closure_over_a_compiled_model():
    torch.compiler.reset()
    problem = cases.build("unused", batches=1)
    model = torch.compile(problem.model, backend="eager")
    inputs, targets = problem.batches[0]
    loss = torch.compile(
        lambda: nn.functional.cross_entropy(model(inputs), targets), backend="eager"
    )
    loss()
    H = HessianOperator(model, loss)
    assert gap(H.to_dense(), oracles.dense("unused", "hessian", 1)) < 1e-10


def test_parameters_of_a_compiled_model_have_the_plain_models_names():
    problem = cases.build("unused")
    model = torch.compile(problem.model, backend="eager")
    H = HessianOperator(model, problem.task, problem.batches, params="first.weight")
    assert H.layout.names == ("first.weight",)


@pytest.mark.parametrize("wrap", [nn.DataParallel])
def test_a_data_parallel_model_is_looked_through(wrap):
    problem = cases.build("unused")
    H = HessianOperator(wrap(problem.model), problem.task, problem.batches)
    assert gap(H.to_dense(), oracles.dense("unused", "hessian")) < 1e-10


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_a_distributed_data_parallel_model_is_looked_through(tmp_path):
    problem = cases.build("mlp")
    address = f"file://{tmp_path}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(problem.model)
        H = HessianOperator(wrapped, problem.task, problem.batches)
        assert gap(H.to_dense(), oracles.dense("mlp", "hessian")) < 1e-10
        assert H.layout.names[0] == "0.weight"
    finally:
        time.sleep(0.1)  # gloo's threads need the GIL once more, which the group's end would hold
        torch.distributed.destroy_process_group()


@QUIET
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "relu_mlp", "conv_bn", "by_module"])
def test_the_compiled_way_is_exact_and_follows_all_weights_and_buffers(name):
    torch.compiler.reset()
    problem = cases.build(name, batches=1)
    H = problem.operator(HessianOperator, way="compiled")
    vectors = torch.randn(H.shape[0], 3, dtype=torch.float64)
    assert gap(H @ vectors, oracles.dense(name, "hessian", 1) @ vectors) < 1e-10
    with torch.no_grad():
        for t in [*problem.model.parameters(), *problem.model.buffers()]:
            if t.is_floating_point():
                t.mul_(1.5)
    before = {k: t.clone() for k, t in problem.model.state_dict().items()}
    expected = oracles.dense_hessian(problem)
    assert gap(H @ vectors, expected @ vectors) < 1e-10
    assert all(torch.equal(t, before[k]) for k, t in problem.model.state_dict().items())
