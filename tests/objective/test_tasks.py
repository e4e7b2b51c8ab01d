"""Batches are split into inputs and targets, outputs and losses, as the model and the loss need."""

from collections import OrderedDict, UserDict, namedtuple
from functools import partial

import cases
import oracles
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hesscurv
from hesscurv import EmpiricalFisherOperator, GGNOperator, HessianOperator
from hesscurv.objective.memory import is_mean_over_parts, is_mean_over_samples
from hesscurv.objective.tasks import map_tensors, split_batch, tensors_of

Pair = namedtuple("Pair", ["inputs", "targets"])
X, Y = torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 0])


def gap(got, expected):
    return float((got - expected).norm() / expected.norm())


# -- batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], Pair(X, Y), {"x": X, "labels": Y}])
def test_a_batch_is_split_into_inputs_and_targets(batch):
    inputs, targets = split_batch(batch)
    assert torch.equal(inputs["x"] if isinstance(inputs, dict) else inputs, X)
    assert torch.equal(targets, Y)


@pytest.mark.parametrize("key", ["labels", "label", "targets", "target", "y"])
def test_targets_are_found_under_their_usual_names(key):
    assert split_batch({"x": X, key: Y})[1] is Y


@pytest.mark.parametrize("batch", [(X,), (X, Y, Y), X, {"x": X, "answer": Y}, "xy", 3])
def test_a_batch_without_targets_is_refused_with_a_remedy(batch):
    with pytest.raises(
        ValueError, match=r"expected (batches|a dict batch).*subclass hesscurv.Task"
    ):
        split_batch(batch)


@pytest.mark.parametrize(
    "value",
    [
        {"a": X, "b": [Y, {"c": X}]},
        OrderedDict(a=X, b=Y),
        UserDict(a=X, b="text"),
        [X, (Y, 3, None)],
        Pair(X, Pair(Y, "label")),
        X,
    ],
)
def test_mapping_tensors_keeps_the_structure_and_the_original(value):
    doubled = map_tensors(value, lambda t: 2 * t)
    assert type(doubled) is type(value)
    assert all(
        torch.equal(2 * old, new)
        for old, new in zip(tensors_of(value), tensors_of(doubled), strict=True)
    )
    others = [map_tensors(v, lambda t: None) for v in (value, doubled)]
    assert others[0] == others[1]


# -- calling the model ------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2).double()

    def forward(self, first, second=0):
        return self.layer(first) + second


@pytest.mark.parametrize(
    "inputs", [X, (X, 2 * X), [X, 2 * X], {"first": X, "second": X}, {"first": X}, {"x": X}]
)
def test_inputs_reach_the_model_by_position_or_by_name(inputs):
    model = TwoInputs()
    inputs = map_tensors(inputs, torch.Tensor.double)
    outputs = hesscurv.supervised(F.cross_entropy).outputs(model, (inputs, Y))
    if isinstance(inputs, dict):
        expected = model(inputs.get("first", inputs.get("x")), inputs.get("second", 0))
    else:
        expected = model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    assert torch.equal(outputs, expected)


def test_names_that_the_model_does_not_take_are_refused_with_a_remedy():
    batch = {"tokens": X, "mask": X, "labels": Y}
    with pytest.raises(ValueError, match=r"forward takes \['first', 'second'\].*rename the keys"):
        hesscurv.supervised(F.cross_entropy).outputs(TwoInputs(), batch)


def test_outputs_that_are_no_tensor_are_refused_with_a_remedy():
    class Tuple(nn.Linear):
        def forward(self, x):
            return (super().forward(x),)

    with pytest.raises(TypeError, match=r"return a tensor.*got tuple; subclass hesscurv.Task"):
        GGNOperator(Tuple(2, 2), hesscurv.supervised(F.cross_entropy), [(X, Y)])


def test_a_loss_that_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match=r"CrossEntropyLoss\(\), got str"):
        hesscurv.supervised("cross entropy")


@pytest.mark.parametrize(
    "loss", [nn.MSELoss(reduction="sum"), partial(F.mse_loss, reduction="sum")]
)
def test_a_sum_is_refused(loss):
    with pytest.raises(ValueError, match="reduction='mean', got reduction='sum'"):
        hesscurv.supervised(loss)


# -- weights ----------------------------------------------------------------------------------


class Masked(hesscurv.Task):
    """A mean over the unmasked targets, which counts them."""

    def outputs(self, model, batch):
        return model(batch["x"])

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch["y"], ignore_index=-100)

    def weight(self, batch):
        return float((batch["y"] != -100).sum())


def masked_batches(*kept):
    batches = []
    for n in kept:
        y = torch.randint(3, (6,))
        y[n:] = -100
        batches.append({"x": torch.randn(6, 4, dtype=torch.float64), "y": y})
    return batches


@pytest.mark.parametrize("budget", [None, 3000])
def test_a_task_that_counts_its_own_samples_is_exact_in_micro_batches_too(budget):
    model = cases.build("mlp").model
    batches = masked_batches(6, 2, 4)
    H = HessianOperator(model, Masked(), batches, memory_budget=budget)
    assert budget is None or H.memory_plan.max_samples < 6
    kept = [(b["x"][b["y"] >= 0], b["y"][b["y"] >= 0]) for b in batches]
    whole = cases.supervised(model, [tuple(map(torch.cat, zip(*kept, strict=True)))])
    assert gap(H.to_dense(), oracles.dense_hessian(whole)) < 1e-10


def test_a_batch_of_no_weight_changes_nothing():
    # All its targets are masked, so its mean is 0 / 0.
    model, batches = cases.build("mlp").model, masked_batches(6, 0, 4)
    assert Masked()(model, batches[1]).isnan()
    H = HessianOperator(model, Masked(), batches)
    without = HessianOperator(model, Masked(), [batches[0], batches[2]])
    torch.testing.assert_close(H.to_dense(), without.to_dense(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight):
    task = Masked()
    task.weight = lambda batch: weight
    with pytest.raises(ValueError, match=f"weight >= 0, got {weight} for batch 0"):
        HessianOperator(cases.build("mlp").model, task, masked_batches(6))


def test_weights_that_are_all_zero_are_refused():
    with pytest.raises(ValueError, match="positive total weight, got 0"):
        HessianOperator(cases.build("mlp").model, Masked(), masked_batches(0))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 2), nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][-1])


def test_inputs_with_time_first_are_weighted_by_their_targets():
    torch.manual_seed(1)
    batches = [(torch.randn(5, n, 3), torch.randint(3, (n,))) for n in (4, 2)]
    batches = map_tensors(batches, lambda t: t.double() if t.is_floating_point() else t)
    model = Recurrent().double()
    H = HessianOperator(model, hesscurv.supervised(F.cross_entropy), batches)
    joined = [
        tuple(torch.cat(t, dim) for t, dim in zip(zip(*batches, strict=True), (1, 0), strict=True))
    ]
    assert gap(H.to_dense(), oracles.dense_hessian(cases.supervised(model, joined))) < 1e-10


class TokensOfAll(nn.Module):
    """As in small GPTs: tokens (n, T) in, and logits of all tokens (n T, V) out."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)

    def forward(self, tokens):
        return self.head(torch.tanh(self.embedding(tokens))).flatten(0, 1)


@pytest.mark.parametrize("budget", [None, 2000])
@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_targets_of_another_length_than_the_inputs_stay_right(kind, budget):
    model = TokensOfAll().double()
    batches = [(torch.randint(5, (n, 4)), torch.randint(5, (4 * n,))) for n in (8, 3)]
    operators = {"hessian": HessianOperator, "ggn": GGNOperator, "fisher": EmpiricalFisherOperator}
    operator = operators[kind](
        model, hesscurv.supervised(F.cross_entropy), batches, memory_budget=budget
    )
    tokens = [(x.reshape(-1, 1), y) for x, y in batches]
    problem = cases.supervised(model, tokens)
    assert gap(operator.to_dense(), oracles.MATRICES[kind](problem)) < 1e-10


def test_a_dict_batch_with_a_number_in_it_is_cut_right():
    class Tempered(nn.Linear):
        def forward(self, x, temperature, names):
            return super().forward(x) / temperature

    model = Tempered(4, 3).double()
    x = torch.randn(40, 4, dtype=torch.float64)
    batch = {
        "x": x,
        "temperature": torch.tensor(2.0).double(),
        "names": "ab",
        "y": torch.arange(40) % 3,
    }
    task = hesscurv.supervised(F.cross_entropy)
    for kind in (HessianOperator, GGNOperator, EmpiricalFisherOperator):
        whole = kind(model, task, [batch])
        cut = kind(model, task, [batch], memory_budget=8_000)
        assert cut.memory_plan.max_samples < 40
        torch.testing.assert_close(cut.to_dense(), whole.to_dense(), rtol=1e-10, atol=1e-14)


def test_a_loss_that_only_looks_like_a_mean_is_not_cut():
    # The first samples have as many masked targets in each half; the rest has not.
    model = cases.build("mlp").model
    (batch,) = masked_batches(6)
    batch = map_tensors(batch, lambda t: t.repeat_interleave(7, 0))
    batch["y"][30:] = -100
    task = hesscurv.supervised(lambda out, y: F.cross_entropy(out, y))
    pair = (batch["x"], batch["y"])
    whole = HessianOperator(model, task, [pair])
    small = HessianOperator(model, task, [pair], memory_budget=3000)
    assert is_mean_over_samples(small.objective, pair)
    assert not is_mean_over_parts(small.objective, pair, 10)
    torch.testing.assert_close(small.to_dense(), whole.to_dense(), rtol=1e-10, atol=1e-14)


def test_a_fisher_of_own_sample_losses():
    class Weighted(hesscurv.Task):
        weights = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)

        def outputs(self, model, batch):
            return model(batch[0])

        def sample_losses(self, outputs, batch):
            return F.cross_entropy(outputs, batch[1], reduction="none") * self.weights[batch[1]]

        def loss(self, outputs, batch):
            return self.sample_losses(outputs, batch).mean()

    problem = cases.build("mlp")
    task = Weighted()
    problem.task, problem.output_loss = task, task.loss
    operator = problem.operator(EmpiricalFisherOperator)
    assert gap(operator.to_dense(), oracles.dense_fisher(problem)) < 1e-10


@pytest.mark.parametrize("loss", [nn.SoftMarginLoss(), nn.HuberLoss(), nn.BCEWithLogitsLoss()])
def test_losses_are_taken_apart_by_samples(loss):
    batches = [(torch.randn(n, 4).double(), torch.rand(n, 3).double()) for n in (4, 3)]
    problem = cases.supervised(cases.build("mlp").model, batches, loss)
    operator = problem.operator(EmpiricalFisherOperator)
    assert gap(operator.to_dense(), oracles.dense_fisher(problem)) < 1e-10


def test_sample_losses_of_another_shape_are_refused():
    class Wrong(hesscurv.Task):
        def outputs(self, model, batch):
            return model(batch[0])

        def loss(self, outputs, batch):
            return F.cross_entropy(outputs, batch[1])

        def sample_losses(self, outputs, batch):
            return self.loss(outputs, batch)

    problem = cases.build("mlp")
    with pytest.raises(ValueError, match=r"sample_losses of shape \(n,\), got \(\)"):
        EmpiricalFisherOperator(problem.model, Wrong(), problem.batches)


class Whole(hesscurv.Task):
    """A task that is called as a whole, and has no parts."""

    def __call__(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Outputs(hesscurv.Task):
    def outputs(self, model, batch):
        return model(batch[0])


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("kind", [hesscurv.GGNOperator, hesscurv.EmpiricalFisherOperator])
@pytest.mark.parametrize(
    ("task", "missing"), [(Whole, "outputs"), (hesscurv.Task, "outputs"), (Outputs, "loss")]
)
def test_a_task_without_a_part_says_which_to_define(task, missing, kind, check):
    batch = (torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    with pytest.raises(TypeError, match=rf"implements {missing}\(self.*got {task.__name__}"):
        kind(nn.Linear(3, 3), task(), [batch], check=check) @ torch.ones(12)
    if task is Whole:
        assert hesscurv.HessianOperator(nn.Linear(3, 3), task(), [batch]).shape[0] == 12


@pytest.mark.parametrize("weight", [None, "many", torch.ones(3)])
def test_a_weight_that_is_no_number_is_refused(weight):
    class Weighed(Whole):
        def weight(self, batch):
            return weight

    batch = (torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    with pytest.raises(TypeError, match=r"expected Weighed\.weight\(batch\) to return a number"):
        hesscurv.HessianOperator(nn.Linear(3, 3), Weighed(), [batch])


def test_an_error_inside_weight_comes_out_as_it_is():
    class Weighed(Whole):
        def weight(self, batch):
            raise TypeError("of the task's own")

    batch = (torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    with pytest.raises(TypeError, match="of the task's own"):
        hesscurv.HessianOperator(nn.Linear(3, 3), Weighed(), [batch])


def test_data_whose_targets_are_all_ignored_are_refused_with_the_cause():
    batch = (torch.randn(4, 3), torch.full((4,), -7))
    task = hesscurv.supervised(nn.CrossEntropyLoss(ignore_index=-7))
    with pytest.raises(ValueError, match=r"positive total weight, got 0.*is -7, .*ignore_index"):
        hesscurv.HessianOperator(nn.Linear(3, 3), task, [batch, batch])
