"""Rows, covariances and losses of samples count by the task's weights, as operators' batches do."""

import copy
import itertools

import cases
import oracles
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hesscurv
from hesscurv.objective.objective import Objective
from hesscurv.pruning import prune_model
from hesscurv.pruning.curvature import quadratic_model
from hesscurv.pruning.curvature.layer_inputs import input_covariances
from hesscurv.pruning.curvature.quadratic_model import Measuring, measure_quadratic_model
from hesscurv.pruning.curvature.sample_weights import weigh
from hesscurv.pruning.masks.state_dicts import masks_of
from hesscurv.pruning.run.calibration_loss import CalibrationLoss
from hesscurv.pruning.weights import find_weights

# float64, sums of some dozen terms.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
TOKENS, CLASSES = 3, 2


class Mixing(nn.Module):
    """Tokens that see each other, so that no sequence falls apart into single ones."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, CLASSES)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.second(h + h.mean(1, keepdim=True))


class Language(hesscurv.Task):
    """The mean over unmasked tokens, which are counted: the README's."""

    def outputs(self, model, batch):
        return model(batch["x"])

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs.flatten(0, 1), batch["y"].flatten())

    def weight(self, batch):
        return float((batch["y"] != -100).sum())


class Weighted(hesscurv.Task):
    """A mean over samples that count by numbers in the batch."""

    def outputs(self, model, batch):
        return model(batch[0])

    def sample_losses(self, outputs, batch):
        return (outputs - batch[1]).square().sum(1)

    def loss(self, outputs, batch):
        return (batch[2] * self.sample_losses(outputs, batch)).sum() / batch[2].sum()

    def weight(self, batch):
        return float(batch[2].sum())


def sequences(*unmasked):
    """Batches of sequences with these numbers of unmasked tokens."""
    torch.manual_seed(0)
    batches = []
    for counts in unmasked:
        y = torch.randint(CLASSES, (len(counts), TOKENS))
        for row, count in zip(y, counts, strict=True):
            row[count:] = -100
        batches.append({"x": torch.randn(len(counts), TOKENS, 4).double(), "y": y})
    return batches


# Unequal within a batch and between them; a sequence and a batch without any.
UNEQUAL = ((3, 1, 0), (2,), (0, 0), (1, 1, 3, 2))


def setting(model, task, batches):
    weights = find_weights(model)
    objective = Objective(
        model, task, batches, list(weights), training=False, compute_dtype=None, budget=None
    )
    objective.refresh()
    return objective, weights


def measured(objective, weights, batches, how):
    dense = dict(zip(weights, objective.parameters(), strict=True))
    generator = torch.Generator().manual_seed(0)
    return measure_quadratic_model(objective, weights, dense, batches, how, generator, dense)


def mean_over_signs(monkeypatch, objective, weights, batches, how, outputs):
    """R^T R and R^T r, averaged over all signs; the same ones for each sample, which never meet."""
    square = slope = 0
    for signs in itertools.product([-1.0, 1.0], repeat=outputs):
        e = torch.tensor(signs).double().view(1, outputs, 1)
        monkeypatch.setattr(quadratic_model, "random_signs", lambda *_, e=e: e)
        model = measured(objective, weights, batches, how)
        R = torch.cat(model.matrix.rows, 1)
        square, slope = square + R.T @ R / 2**outputs, slope + R.T @ model.residual / 2**outputs
    return square, slope


def gradient_of_mean(model, task, batches, names):
    """The gradient of the mean over all data, by its definition."""
    batches = [b for b in batches if task.weight(b)]
    total = sum(map(task.weight, batches))
    loss = sum(task.weight(b) / total * task(model, b) for b in batches)
    named = dict(model.named_parameters())
    return torch.cat([t.flatten() for t in torch.autograd.grad(loss, [named[n] for n in names])])


@pytest.mark.parametrize("unmasked", [UNEQUAL, ((3, 3), (3, 3)), ((1,), (3,))])
def test_rows_average_to_the_gauss_newton_matrix_of_the_weighted_mean(monkeypatch, unmasked):
    model, task, batches = Mixing().double(), Language(), sequences(*unmasked)
    objective, weights = setting(model, task, batches)
    how = Measuring(rest="isotropic", root_floor=1e-14, target="loss")
    square, slope = mean_over_signs(monkeypatch, objective, weights, batches, how, TOKENS * CLASSES)
    G = hesscurv.GGNOperator(model, task, batches, list(weights)).to_dense()
    torch.testing.assert_close(square, G, **CLOSE)
    # The floor's square root, 1e-7, is what the slope of a masked token is divided by.
    expected = gradient_of_mean(model, task, batches, weights)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("at_once", [32, 2, 1])
def test_tokens_that_do_not_see_each_other_count_as_samples_of_their_own(monkeypatch, at_once):
    # The matrix of single tokens by plain loops, in which there is no weight at all.
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    batches = sequences(*UNEQUAL)
    objective, weights = setting(model, Language(), batches)
    how = Measuring(rest="isotropic", root_floor=1e-14)
    monkeypatch.setattr(quadratic_model, "_samples_at_once", lambda _: at_once)
    square, _ = mean_over_signs(monkeypatch, objective, weights, batches, how, TOKENS * CLASSES)
    kept = [(b["x"][b["y"] >= 0], b["y"][b["y"] >= 0]) for b in batches]
    tokens = cases.supervised(model, [tuple(map(torch.cat, zip(*kept, strict=True)))])
    tokens.names = list(weights)
    torch.testing.assert_close(square, oracles.dense_ggn(tokens), **CLOSE)


def test_fisher_rows_are_the_sequences_own_gradients_by_their_tokens():
    model, task, batches = Mixing().double(), Language(), sequences(*UNEQUAL)
    objective, weights = setting(model, task, batches)
    found = measured(objective, weights, batches, Measuring(rows="fisher", rest="isotropic"))
    R, expected = torch.cat(found.matrix.rows, 1), 0
    for batch in batches:
        for i in range(len(batch["x"])):
            alone = {key: value[i : i + 1] for key, value in batch.items()}
            if count := task.weight(alone):
                g = gradient_of_mean(model, task, [alone], weights)
                expected = expected + count / 13 * torch.outer(g, g)  # 13 tokens in all
    assert found.num_rows == 7  # of 10 sequences
    torch.testing.assert_close(R.T @ R, expected, **CLOSE)
    slope = gradient_of_mean(model, task, batches, weights)
    torch.testing.assert_close(R.T @ found.residual, slope, **CLOSE)


def test_eigenspace_rows_are_those_of_the_weighted_mean():
    model, task, batches = Mixing().double(), Language(), sequences(*UNEQUAL)
    objective, weights = setting(model, task, batches)
    found = measured(
        objective, weights, batches, Measuring(rows="eigenspace", rest="isotropic", rank=100)
    )
    R = torch.cat(found.matrix.rows, 1)
    H = hesscurv.HessianOperator(model, task, batches, list(weights)).to_dense()
    values, V = torch.linalg.eigh(H)
    # Pairs to a residual of 1 % of their eigenvalue.
    torch.testing.assert_close(R.T @ R, (V * values.abs()) @ V.T, rtol=0, atol=0.05 * values.max())


def weighted_batches(*weights):
    torch.manual_seed(0)
    return [
        (torch.randn(len(w), 4).double(), torch.randn(len(w), 1).double(), torch.tensor(w).double())
        for w in weights
    ]


def test_input_covariances_are_those_of_the_weighted_mean():
    # With one output and a squared error the matrix is 2 A itself.
    model, task = nn.Linear(4, 1, bias=False).double(), Weighted()
    batches = weighted_batches([1.0, 5.0, 0.0, 1.0], [0.25], [2.0, 2.0, 2.0])
    objective, weights = setting(model, task, batches)
    found = input_covariances(
        objective, objective.parameters(), weigh(objective, batches), weights, 100
    )
    G = hesscurv.GGNOperator(model, task, batches).to_dense()
    torch.testing.assert_close(2 * found["weight"][0], G, **CLOSE)


def test_the_floor_is_relative_to_the_weighted_mean_eigenvalue(monkeypatch):
    class Scaled(Weighted):
        """Another curvature for each sample, 2 y^2."""

        def sample_losses(self, outputs, batch):
            return (batch[1] * outputs).square().sum(1)

    model, task = nn.Linear(4, 1, bias=False).double(), Scaled()
    batches = weighted_batches([1.0, 5.0, 0.0], [0.25])
    objective, weights = setting(model, task, batches)
    how = Measuring(rest="isotropic", root_floor=3.0)
    square, _ = mean_over_signs(monkeypatch, objective, weights, batches, how, 1)
    x, y, w = (torch.cat(t) for t in zip(*batches, strict=True))
    w = w / w.sum()
    h = 2 * y[:, 0].square()
    expected = (x.T * (w * (h + 3 * (w @ h)))) @ x
    torch.testing.assert_close(square, expected, **CLOSE)


def test_the_calibration_loss_is_the_mean_over_all_tokens():
    model, task, batches = Mixing().double(), Language(), sequences(*UNEQUAL)
    objective, _ = setting(model, task, batches)
    x, y = (torch.cat([b[key] for b in batches]) for key in "xy")
    with torch.no_grad():
        expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        first = F.cross_entropy(model(x[:4]).flatten(0, 1), y[:4].flatten())
    found = CalibrationLoss(objective, batches, 1000)(objective.parameters())
    assert found == pytest.approx(float(expected), rel=1e-12)
    cut = CalibrationLoss(objective, batches, 4)(objective.parameters())
    assert cut == pytest.approx(float(first), rel=1e-12)


def test_samples_of_no_weight_change_nothing_of_what_is_pruned():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with_masked, without = [], []
    for n, kept in ((6, 4), (5, 0), (6, 6)):
        x, y = torch.randn(n, 4).double(), torch.randint(3, (n,))
        y[torch.randperm(n)[kept:]] = -100
        with_masked.append({"x": x, "y": y})
        if kept:
            without.append({"x": x[y >= 0], "y": y[y >= 0]})

    class Masked(Language):
        def loss(self, outputs, batch):
            return F.cross_entropy(outputs, batch["y"])

    models = []
    for batches in (with_masked, without):
        models.append(copy.deepcopy(dense))
        prune_model(models[-1], Masked(), batches, 0.5, stages=2)
    first, second = map(masks_of, models)
    for name, mask in first.items():
        assert torch.equal(mask, second[name])
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


# -- what is refused --------------------------------------------------------------------------


CLASS_WEIGHTS = torch.tensor([1.0, 3.0, 0.5]).double()


class ClassWeighted(hesscurv.Task):
    """What the message of the refusal says to do: count what the loss averages."""

    def outputs(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1], CLASS_WEIGHTS)

    def weight(self, batch):
        return float(CLASS_WEIGHTS[batch[1]].sum())


def class_weighted(outputs, targets):
    """A weighted mean that is not known as one."""
    return F.cross_entropy(outputs, targets, CLASS_WEIGHTS)


@pytest.mark.parametrize("rows", ["ggn", "fisher", "both"])
def test_a_loss_that_is_no_mean_by_weight_is_refused(rows):
    p = cases.build("mlp")
    task = hesscurv.supervised(class_weighted)
    objective, weights = setting(p.model, task, p.batches)
    with pytest.raises(ValueError, match=r"weighted by task\.weight.*count that in weight"):
        measured(objective, weights, p.batches, Measuring(rows=rows))


@pytest.mark.parametrize(
    "task", [ClassWeighted(), hesscurv.supervised(nn.CrossEntropyLoss(CLASS_WEIGHTS))]
)
def test_class_weights_that_the_weight_counts_are_right(task, monkeypatch):
    p = cases.build("mlp")
    objective, weights = setting(p.model, task, p.batches)
    how = Measuring(rest="isotropic", root_floor=1e-14)
    square, _ = mean_over_signs(monkeypatch, objective, weights, p.batches, how, 3)
    G = hesscurv.GGNOperator(p.model, task, p.batches, list(weights)).to_dense()
    torch.testing.assert_close(square, G, **CLOSE)


def test_a_large_batch_is_looked_at_all_over():
    # Sorted by class: a beginning of one class has the same mean whatever the class's weight.
    torch.manual_seed(0)
    batch = (torch.randn(90, 4).double(), torch.arange(3).repeat_interleave(30))
    model = cases.build("mlp").model
    task = hesscurv.supervised(class_weighted)
    objective, weights = setting(model, task, [batch])
    with pytest.raises(ValueError, match=r"weighted by task\.weight"):
        measured(objective, weights, [batch], Measuring())


def test_a_sure_network_is_not_refused_for_its_rounding():
    # In float32 losses of 1e-6 are differences of outputs of 30, known to 1e-6 themselves.
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x = torch.randn(30, 4)
    with torch.no_grad():
        model.weight.mul_(60 / model(x).abs().mean())
        y = model(x).argmax(1)
    task = hesscurv.supervised(nn.CrossEntropyLoss())
    objective, weights = setting(model, task, [(x, y)])
    assert measured(objective, weights, [(x, y)], Measuring()).num_rows == 30


def test_outputs_without_one_row_a_sample_are_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.Flatten(0, 1)).double()
    batches = [(torch.randn(5, 2, 4).double(), torch.randint(3, (10,)))]
    objective, weights = setting(model, hesscurv.supervised(nn.CrossEntropyLoss()), batches)
    with pytest.raises(ValueError, match=r"one row a sample, 5 here, got shape \(10, 3\); keep"):
        measured(objective, weights, batches, Measuring())


@pytest.mark.parametrize("rows", ["ggn", "fisher", "eigenspace"])
def test_samples_without_any_weight_are_refused(rows):
    batches = sequences((0, 0), (0,))
    objective, weights = setting(Mixing().double(), Language(), batches)
    with pytest.raises(ValueError, match="positive total weight of the samples of a stage, got 0"):
        measured(objective, weights, batches, Measuring(rows=rows))
    with pytest.raises(ValueError, match=r"total weight of the calibration samples, got 0\.0"):
        CalibrationLoss(objective, batches, 100)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight):
    batches, task = sequences((1, 2)), Language()
    task.weight = lambda batch: weight
    objective, weights = setting(Mixing().double(), task, batches)
    with pytest.raises(ValueError, match=f"batch weight >= 0, got {weight}"):
        measured(objective, weights, batches, Measuring())


def test_a_weight_that_no_sample_has_is_refused():
    batches, task = sequences((1, 2)), Language()
    task.weight = lambda batch: float(len(batch["x"]) > 1)
    objective, weights = setting(Mixing().double(), task, batches)
    with pytest.raises(ValueError, match="weight of a batch, 1, to be that of its samples in all"):
        measured(objective, weights, batches, Measuring())


def test_a_weight_of_whole_batches_is_shared_by_their_samples():
    batches, task = sequences((3, 3), (3, 3, 3)), Language()
    task.weight = lambda batch: 1.0  # a mean of the batches' means
    objective, _ = setting(Mixing().double(), task, batches)
    found = [weights_n.tolist() for _, weights_n in weigh(objective, batches)]
    assert found == [[0.5, 0.5], pytest.approx([1 / 3] * 3)]
