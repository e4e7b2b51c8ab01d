"""What cannot be measured is refused before work starts, with what was expected and what to do."""

import cases
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hesscurv
from hesscurv import EmpiricalFisherOperator, GGNOperator, HessianOperator

TASK = hesscurv.supervised(nn.CrossEntropyLoss())


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def data(n=6):
    return [(torch.randn(n, 4), torch.arange(n) % 3)]


def with_input(value):
    batches = data() + data()
    batches[1][0][0, 0] = value
    return batches


def lazily():
    return nn.Sequential(nn.LazyLinear(3))


def frozen():
    return net().requires_grad_(False)


class Integers(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, 4, dtype=torch.int64), requires_grad=False)

    def forward(self, x):
        return x @ self.w.T.to(x)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batches": []}, ValueError, "at least one batch, got an empty iterable"),
        (
            {"batches": DataLoader(TensorDataset(torch.empty(0, 4)), batch_size=2)},
            ValueError,
            "at least one batch",
        ),
        ({"batches": data()[0]}, ValueError, r"looks like one batch; wrap it in a list: \[batch\]"),
        ({"batches": {"x": torch.ones(2)}}, ValueError, "wrap it in a list"),
        ({"batches": torch.ones(3, 4)}, ValueError, "wrap it in a list"),
        ({"batches": (b for b in data())}, TypeError, r"one-shot generator.*list\(...\)"),
        ({"batches": iter(data())}, TypeError, "one-shot list_iterator"),
        ({"batches": 3}, TypeError, "iterable of batches, got a int"),
        ({"batches": None}, ValueError, "expected batches for a task"),
        ({"batches": with_input(float("nan"))}, ValueError, "finite loss, got nan on batch 1"),
        (
            {"batches": with_input(float("inf")), "model": nn.Linear(4, 3)},
            ValueError,
            "finite loss.* on batch 1",
        ),
        ({"task": lambda m, b: m(b[0])}, ValueError, r"scalar loss, got shape \(6, 3\)"),
        ({"task": lambda m, b: 1.5}, TypeError, "scalar tensor, got a float"),
        ({"task": nn.CrossEntropyLoss()}, TypeError, r"wrap a loss with hesscurv.supervised"),
        ({"task": "loss"}, TypeError, "expected a task such as"),
        ({"task": lambda a, b: 0, "batches": None}, ValueError, "takes 2 arguments; pass batches"),
        ({"model": frozen()}, ValueError, "no parameter requires grad.*requires_grad_"),
        ({"model": Integers()}, TypeError, "real floating dtype, got torch.int64 for 'w'"),
        ({"model": "net"}, TypeError, "torch.nn.Module, got str"),
        ({"model": nn.ReLU()}, ValueError, "a model with parameters"),
        ({"model": lazily()}, ValueError, "not initialised yet; run the lazy model"),
        ({"params": "3"}, ValueError, "no parameter or submodule '3'; it has"),
        ({"params": [torch.ones(2)]}, ValueError, "not one of the model's"),
        ({"params": lambda n, p: False}, ValueError, "selected none of the parameters"),
        ({"params": []}, ValueError, "at least one name or parameter"),
        ({"params": 3}, TypeError, "names, parameters or a predicate"),
        ({"way": "fast"}, ValueError, "way 'auto', 'reference' or one of .*retained.*got 'fast'"),
        ({"memory_budget": 0}, ValueError, "positive int, got 0"),
        ({"memory_budget": 1e9}, ValueError, "positive int, got 1000000000.0"),
        ({"compute_dtype": torch.int32}, TypeError, "floating compute_dtype"),
    ],
)
def test_bad_arguments_are_refused_with_a_remedy(arguments, error, message):
    arguments = {"model": net(), "task": TASK, "batches": data(), **arguments}
    model = arguments["model"]
    flags = [m.training for m in model.modules()] if isinstance(model, nn.Module) else []
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        HessianOperator(**arguments)
    assert torch.equal(torch.get_rng_state(), state)
    if flags:
        assert [m.training for m in model.modules()] == flags
        assert all(p.grad is None for p in model.parameters())


def test_a_frozen_parameter_asked_for_by_name_is_refused():
    model = net()
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"got frozen \['0.weight'\]; call requires_grad_"):
        HessianOperator(model, TASK, data(), params=["0.weight"])


@pytest.mark.parametrize(
    ("operand", "error", "message"),
    [
        (lambda n: torch.ones(n + 1), ValueError, r"expected shape \(38,\) or \(38, b\), got"),
        (lambda n: torch.ones(3, n), ValueError, r"got \(3, 38\); vectors are columns"),
        (lambda n: torch.ones(n, 2, 2), ValueError, "expected shape"),
        (lambda n: torch.tensor(1.0), ValueError, "expected shape"),
        (lambda n: torch.ones(n).double(), TypeError, r"float32, got torch.float64; convert"),
        (lambda n: torch.ones(n, device="meta"), ValueError, "device cpu, got meta; move it"),
        (lambda n: torch.full((n,), float("nan")), ValueError, "finite vector"),
        (lambda n: [1.0] * n, TypeError, "expected a torch.Tensor.*got list"),
    ],
)
def test_a_wrong_operand_is_refused_and_not_counted(operand, error, message):
    task = hesscurv.supervised(nn.MSELoss())
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2), nn.Flatten())
    H = HessianOperator(model, task, [(torch.randn(3, 4), torch.randn(3, 2))])
    message = message.replace("38", str(H.shape[0]))
    with pytest.raises(error, match=message):
        H @ operand(H.shape[0])
    assert H.num_matvecs == 0


@pytest.mark.parametrize("kind", [GGNOperator, EmpiricalFisherOperator])
def test_a_loss_without_parts_is_refused_where_parts_are_needed(kind):
    with pytest.raises(TypeError, match=r"two parts, outputs.*hesscurv.supervised"):
        kind(net(), lambda model, batch: TASK(model, batch), data())


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_loss_that_is_no_mean_is_refused(reduction):
    with pytest.raises(ValueError, match=f"reduction='mean', got reduction='{reduction}'"):
        hesscurv.supervised(nn.CrossEntropyLoss(reduction=reduction))


def test_unknown_class_weights_are_refused_for_the_fisher_with_a_remedy():
    weight = torch.tensor([1.0, 5.0, 0.2])
    task = hesscurv.supervised(lambda out, y: nn.functional.cross_entropy(out, y, weight))
    with pytest.raises(ValueError, match=r"no plain mean over samples.*override sample_losses"):
        EmpiricalFisherOperator(net(), task, data())


# -- not one operator -------------------------------------------------------------------------


def dropout_net():
    return nn.Sequential(nn.Linear(4, 20), nn.Dropout(0.5), nn.Linear(20, 3))


def test_dropout_is_measured_in_eval_mode_by_default():
    model = dropout_net().train()
    H = HessianOperator(model, TASK, data())
    v = torch.randn(H.shape[0])
    torch.testing.assert_close(H @ v, H @ v, rtol=0, atol=0)
    assert model.training


def test_active_dropout_is_refused_with_cause_and_remedy():
    with pytest.raises(ValueError, match=r"not deterministic.*dropout is active.*eval mode"):
        HessianOperator(dropout_net(), TASK, data(), training=True)


def test_randomness_that_eval_mode_does_not_stop_is_refused():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return F.dropout(self.layer(x))

    with pytest.raises(ValueError, match=r"not deterministic.*draws random numbers"):
        HessianOperator(Noisy(), TASK, data())


class WrongBackward(torch.autograd.Function):
    """exp, with a backward that is not its derivative: not the gradient of anything."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.flip(-1)


class Asymmetric(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return WrongBackward.apply(self.layer(x))


def test_an_operator_that_is_not_symmetric_is_refused_with_cause_and_remedy():
    with pytest.raises(ValueError, match=r"not symmetric.*autograd.Function.*check=False"):
        HessianOperator(Asymmetric(), TASK, data())


def test_check_false_lets_it_pass():
    H = HessianOperator(Asymmetric(), TASK, data(), check=False)
    assert (H @ torch.ones(H.shape[0])).isfinite().all()


def test_batch_statistics_are_measured_where_asked_for():
    problem = cases.build("conv_bn_train")
    H = problem.operator(HessianOperator)
    E = problem.operator(HessianOperator, training=False)
    v = torch.randn(H.shape[0], dtype=torch.float64)
    assert not torch.allclose(H @ v, E @ v)


def test_a_shuffled_loader_that_fits_in_memory_is_one_operator():
    dataset = TensorDataset(torch.randn(20, 4), torch.arange(20) % 3)
    H = HessianOperator(net(), TASK, DataLoader(dataset, batch_size=8, shuffle=True))
    v = torch.randn(H.shape[0])
    torch.testing.assert_close(H @ v, H @ v, rtol=0, atol=0)


def test_batches_that_differ_from_pass_to_pass_are_refused():
    class Augmented:
        passes = 0

        def __iter__(self):
            self.passes += 1
            inputs = torch.randn(50, 4, generator=torch.Generator().manual_seed(self.passes))
            return iter([(inputs, torch.arange(50) % 3)])

    H = HessianOperator(net(), TASK, Augmented(), memory_budget=2000, check=False)  # not kept
    with pytest.raises(ValueError, match=r"same batches in every pass.*list\(loader\)"):
        H @ torch.ones(H.shape[0])


def test_a_second_derivative_that_is_not_finite_is_an_error():
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    H = HessianOperator(model, lambda m: (m.weight.abs() ** 1.5).sum(), check=False)
    with pytest.raises(ValueError, match=r"no finite second derivative.*compute_dtype"):
        H @ torch.ones(H.shape[0])
