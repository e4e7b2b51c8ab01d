"""Products in lower and higher precision than the weights', against float64 at the same values."""

import copy

import cases
import oracles
import pytest
import torch
from tensor_cores import TensorCores
from torch import nn

import hesscurv
from hesscurv import EmpiricalFisherOperator, GGNOperator, HessianOperator

KINDS = {"hessian": HessianOperator, "ggn": GGNOperator, "fisher": EmpiricalFisherOperator}
ALL = [(name, kind) for name in cases.CASES for kind in cases.kinds(name)]
SOME = [(name, kind) for name, kind in ALL if name in ("mlp", "conv_bn", "transformer", "lstm")]
# Of each kind of graph one matrix; of some networks all.
EACH = [(name, "hessian") for name in cases.OWN_GRAPH if (name, "hessian") not in SOME] + SOME


def gap(got, expected):
    scale = float(expected.norm()) or 1.0
    return float((got.double() - expected).norm()) / scale


def at_values_of(name, kind, dtype, data=None):
    """The dense matrix in float64 at weights and data that were rounded to a dtype."""
    return oracles.MATRICES[kind](cases.build(name).cast(dtype, data).cast(torch.float64))


# float32 rounds each sum at 6e-8 relative; a product passes some ten layers of sums of up to a
# hundred terms each way, which leaves a few times 1e-7. 1e-5 is the precision promised.


@pytest.mark.parametrize(("name", "kind"), EACH)
def test_the_matrix_is_exact_in_float32(name, kind):
    way = "auto" if (name, kind) in SOME else "batched"
    operator = cases.build(name).cast(torch.float32).operator(KINDS[kind], way=way)
    assert operator.dtype == torch.float32
    assert gap(operator.to_dense(), at_values_of(name, kind, torch.float32)) < 1e-5


@pytest.mark.parametrize("way", HessianOperator.ways)
def test_every_way_is_exact_in_float32(way):
    problem = cases.build("conv_bn", batches=1).cast(torch.float32)
    operator = problem.operator(HessianOperator, way=way, check=False)
    expected = oracles.dense_hessian(
        cases.build("conv_bn", batches=1).cast(torch.float32).cast(torch.float64)
    )
    assert gap(operator.to_dense(), expected) < 1e-5


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "kind"), SOME)
def test_half_precision_weights_are_computed_with_in_float32(name, kind, half):
    problem = cases.build(name).cast(half)
    operator = problem.operator(KINDS[kind])
    assert operator.dtype == torch.float32
    assert gap(operator.to_dense(), at_values_of(name, kind, half)) < 1e-5
    assert {p.dtype for p in problem.model.parameters()} == {half}


def test_half_precision_weights_on_float32_data():
    problem = cases.build("mlp").cast(torch.bfloat16, data=torch.float32)
    operator = problem.operator(HessianOperator)
    expected = at_values_of("mlp", "hessian", torch.bfloat16, torch.float32)
    assert gap(operator.to_dense(), expected) < 1e-5


def test_a_checkpointed_model_in_half_precision():
    # Its forward runs again inside the backward pass, and must again be in float32 there.
    operator = cases.build("checkpointed").cast(torch.bfloat16).operator(HessianOperator)
    expected = at_values_of("checkpointed", "hessian", torch.bfloat16)
    assert gap(operator.to_dense(), expected) < 1e-5


@pytest.mark.parametrize("way", HessianOperator.ways)
def test_every_way_of_computing_with_half_precision_weights(way):
    problem = cases.build("mlp").cast(torch.bfloat16)
    operator = problem.operator(HessianOperator, way=way, check=False)
    assert gap(operator.to_dense(), at_values_of("mlp", "hessian", torch.bfloat16)) < 1e-5


@pytest.mark.parametrize(("name", "kind"), SOME)
def test_float64_products_of_a_float32_model(name, kind):
    problem = cases.build(name).cast(torch.float32)
    operator = problem.operator(KINDS[kind], compute_dtype=torch.float64)
    assert operator.dtype == torch.float64
    assert gap(operator.to_dense(), at_values_of(name, kind, torch.float32)) < 1e-10


def test_mixed_weights_are_computed_with_in_the_widest_of_the_selected():
    problem = cases.build("mlp").cast(torch.float32)
    problem.model[0].bfloat16()
    twin = copy.deepcopy(problem.model).double()
    problem.model[0].register_forward_pre_hook(lambda m, args: (args[0].to(m.weight.dtype),))
    operator = problem.operator(HessianOperator)
    expected = cases.build("mlp").cast(torch.float32).cast(torch.float64)
    expected.model = twin
    assert operator.dtype == torch.float32
    assert gap(operator.to_dense(), oracles.dense_hessian(expected)) < 1e-5


def test_a_frozen_half_precision_body_stays_as_it_is():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    model[0].bfloat16().requires_grad_(False)
    seen = []
    model[0].register_forward_pre_hook(lambda m, args: (args[0].bfloat16(),))
    model[1].register_forward_pre_hook(
        lambda m, args: seen.append(args[0].dtype) or (args[0].float(),)
    )
    batches = [(torch.randn(6, 4), torch.randint(3, (6,)))]
    task = hesscurv.supervised(nn.CrossEntropyLoss())
    G = GGNOperator(model, task, batches)
    H = HessianOperator(model, task, batches)
    assert set(seen) == {torch.bfloat16}
    torch.testing.assert_close(G.to_dense(), H.to_dense())


def test_a_loss_with_class_weights_follows_the_compute_dtype():
    weights = torch.tensor([0.2, 1.0, 3.0])
    loss = nn.CrossEntropyLoss(weight=weights)
    problem = cases.build("mlp").cast(torch.float32)
    task = hesscurv.supervised(loss)
    H = HessianOperator(problem.model, task, problem.batches[:1], compute_dtype=torch.float64)
    twin = cases.build("mlp", batches=1).cast(torch.float32).cast(torch.float64)
    loss64 = nn.CrossEntropyLoss(weight=weights.double())
    twin.loss = lambda model, batch: loss64(model(batch[0]), batch[1])
    assert gap(H.to_dense(), oracles.dense_hessian(twin)) < 1e-10
    assert loss.weight is not None
    assert loss.weight.dtype == torch.float32


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_products_ignore_reduced_matmul_precision(setting):
    problem = cases.build("mlp").cast(torch.float32)
    expected = problem.operator(HessianOperator).to_dense()
    torch.set_float32_matmul_precision(setting)
    try:
        assert torch.equal(problem.operator(HessianOperator).to_dense(), expected)
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("switched_on", [False, True], ids=["default", "matrix products too"])
def test_products_do_not_run_on_tensor_cores(kind, switched_on):
    """Convolutions would by default: cuDNN's switch is not the one of matrix products."""
    problem = cases.build("conv_bn", batches=1).cast(torch.float32)
    exact = cases.build("conv_bn", batches=1).cast(torch.float32).cast(torch.float64)
    expected = oracles.MATRICES[kind](exact)
    V = torch.randn(len(expected), 6)
    product = expected @ V.double()
    torch.backends.cuda.matmul.allow_tf32 = switched_on
    try:
        with TensorCores() as cores:
            problem.model.eval()(problem.batches[0][0])
            assert cores.rounded > 0
            rounded = cores.rounded
            for way in ("auto", *KINDS[kind].ways):
                H = problem.operator(KINDS[kind], way=way)
                assert gap(H @ V, product) < 1e-5, way
        assert cores.rounded == rounded
        assert torch.backends.cudnn.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32 == switched_on
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
