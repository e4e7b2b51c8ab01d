"""Each batch counts by what the loss's own mean divides by, and a loss that is no mean is refused.

The oracle is the loss itself over all data at once: a matrix must not depend on how data are
batched.
"""

from functools import partial

import cases
import oracles
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hesscurv
from hesscurv import EmpiricalFisherOperator, GGNOperator, HessianOperator

# The means are the subject, and not the ways of computing products.
hessian, ggn = partial(HessianOperator, way="retained"), partial(GGNOperator, way="retained")
N, C = 24, 4
WEIGHT = torch.tensor([0.3, 6.0, 0.0, 2.0], dtype=torch.float64)


def draw():
    return torch.Generator().manual_seed(5)


def classes(*shape):
    return torch.randint(C, (N, *shape), generator=draw())


def some_ignored(*shape, index=-100):
    # Ever more towards the end: the last batches have none that is valid.
    y = classes(*shape)
    y[
        torch.rand(y.shape, generator=draw())
        < torch.linspace(0, 0.95, N).view(-1, *[1] * len(shape))
    ] = index
    y[-5:] = index
    return y


def shares(*shape):
    return torch.rand(N, C, *shape, generator=draw(), dtype=torch.float64).softmax(1)


def signs():
    return 2.0 * torch.randint(2, (N, C), generator=draw()).double() - 1


def bits():
    return torch.randint(2, (N, C), generator=draw()).double()


class Rows(nn.Module):
    """Outputs (n, C)."""

    def __init__(self, last=None):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, C))
        self.last = last

    def forward(self, x):
        return self.body(x) if self.last is None else self.last(self.body(x))


class Pixels(nn.Module):
    """Outputs (n, C, 2, 3)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Tanh(), nn.Conv2d(2, C, 1))

    def forward(self, x):
        return self.body(x[:, None, None, :].expand(-1, 1, 2, 3))


LOG, UNIT = partial(F.log_softmax, dim=1), torch.sigmoid
LOSSES = {
    "plain": (nn.CrossEntropyLoss(), classes(), None),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHT), classes(), None),
    "ignored": (nn.CrossEntropyLoss(), some_ignored(), None),
    "ignored class": (nn.CrossEntropyLoss(ignore_index=2), classes(), None),
    "weights, ignored, smoothed": (
        nn.CrossEntropyLoss(weight=WEIGHT + 0.1, label_smoothing=0.2),
        some_ignored(),
        None,
    ),
    "pixels": (
        nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=255),
        some_ignored(2, 3, index=255),
        "pixels",
    ),
    "soft targets": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), shares(), None),
    "soft pixels": (nn.CrossEntropyLoss(weight=WEIGHT), shares(2, 3), "pixels"),
    "nll": (nn.NLLLoss(weight=WEIGHT, ignore_index=1), classes(), LOG),
    "nll of pixels": (nn.NLLLoss(ignore_index=255), some_ignored(2, 3, index=255), "pixels"),
    "partial": (
        partial(F.cross_entropy, weight=WEIGHT + 0.1, ignore_index=3, label_smoothing=0.1),
        classes(),
        None,
    ),
    "partial nll": (partial(F.nll_loss, weight=WEIGHT), classes(), LOG),
    "bce": (nn.BCELoss(weight=WEIGHT), bits(), UNIT),
    "bce of logits": (nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT + 1), bits(), None),
    "squares": (nn.MSELoss(), shares(), None),
    "absolute": (nn.L1Loss(), shares(), torch.square),
    "smooth l1": (F.smooth_l1_loss, shares(), None),
    "huber": (partial(F.huber_loss, delta=0.1), shares(), None),
    "poisson": (nn.PoissonNLLLoss(full=True), shares(), None),
    "soft margin": (nn.SoftMarginLoss(), signs(), None),
    "hinge": (nn.HingeEmbeddingLoss(), signs(), torch.square),
    "kl of batches": (nn.KLDivLoss(reduction="batchmean"), shares(), LOG),
    "kl of log targets": (
        partial(F.kl_div, reduction="batchmean", log_target=True),
        shares().log(),
        LOG,
    ),
    "kl of elements": (nn.KLDivLoss(), shares(), LOG),
    "multi margin": (nn.MultiMarginLoss(p=2, weight=WEIGHT), classes(), torch.square),
    "multi-label margin": (nn.MultiLabelMarginLoss(), classes(4), torch.square),
    "multi-label soft margin": (nn.MultiLabelSoftMarginLoss(weight=WEIGHT), bits(), None),
}


def problem_of(name):
    torch.manual_seed(3)
    loss, targets, kind = LOSSES[name]
    model = Pixels() if kind == "pixels" else Rows(kind)
    x = torch.randn(N, 3, generator=draw(), dtype=torch.float64)
    return model.double(), loss, x, targets


def batches_of(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


WITHOUT_SECOND_DERIVATIVE = ("multi margin", "multi-label margin")


@pytest.mark.filterwarnings("ignore:.*'mean' divides the total loss.*:UserWarning")
@pytest.mark.parametrize("name", LOSSES)
def test_weighted_means_over_batches_make_up_the_loss_over_all_data(name):
    model, loss, x, y = problem_of(name)
    task = hesscurv.supervised(loss)
    assert task.torch_loss is not None
    outputs = model(x).detach()
    expected = float(loss(outputs, y))
    order = torch.randperm(N, generator=draw())
    for sizes in ([N], [1] * N, [5, 1, 11, 7], [3] * 8):
        parts = [(outputs[i], y[i]) for i in order.split(sizes)]
        weights = [task.weight(part) for part in parts]
        found = sum(
            w * float(task.loss(*part[:1], part))
            for w, part in zip(weights, parts, strict=True)
            if w
        )
        assert found / sum(weights) == pytest.approx(expected, rel=1e-12)


@pytest.mark.filterwarnings("ignore:.*'mean' divides the total loss.*:UserWarning")
@pytest.mark.parametrize("name", [n for n in LOSSES if n not in WITHOUT_SECOND_DERIVATIVE])
def test_matrices_of_torch_losses_do_not_depend_on_the_batches(name):
    model, loss, x, y = problem_of(name)
    task = hesscurv.supervised(loss)
    whole = cases.supervised(model, [(x, y)], loss)
    for operator, dense in (
        (hessian(model, task, batches_of(x, y, 7)), oracles.dense_hessian(whole)),
        (ggn(model, task, [(x, y)], memory_budget=3000), oracles.dense_ggn(whole)),
    ):
        # 1e-10: float64, sums over samples in another order.
        gap = float((operator.to_dense() - dense).norm())
        assert gap <= 1e-10 * float(dense.norm()) + 1e-14


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(WEIGHT.float()), partial(F.cross_entropy, weight=WEIGHT.float())]
)
def test_class_weights_take_the_dtype_of_the_computation(loss):
    model, _, x, y = problem_of("class weights")
    model.float()
    H = hessian(
        model,
        hesscurv.supervised(loss),
        batches_of(x.float(), y, 5),
        compute_dtype=torch.float64,
    )
    found = H.to_dense()
    exact = nn.CrossEntropyLoss(WEIGHT.float().double())
    whole = cases.supervised(model.double(), [(x.float().double(), y)], exact)
    torch.testing.assert_close(found, oracles.dense_hessian(whole), rtol=1e-10, atol=1e-13)


def test_the_first_samples_may_all_be_ignored():
    model, loss, x, y = problem_of("ignored")
    x, y = x.flip(0), y.flip(0)
    assert bool((y[:5] == -100).all())
    whole = oracles.dense_hessian(cases.supervised(model, [(x, y)], loss))
    for size, budget in ((N, None), (N, 3000), (5, None)):
        task = hesscurv.supervised(loss)
        H = hessian(model, task, batches_of(x, y, size), memory_budget=budget)
        torch.testing.assert_close(H.to_dense(), whole, rtol=1e-10, atol=1e-13)


def test_a_mean_that_divides_by_zero_is_refused():
    # A class of weight 0 has a loss where labels are smoothed, and nothing to divide it by.
    loss = nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1)
    model, _, x, y = problem_of("class weights")
    light = x[:2], torch.tensor([2, 2])
    assert not loss(model(light[0]), light[1]).isfinite()
    with pytest.raises(ValueError, match="positive class weight"):
        hessian(model, hesscurv.supervised(loss), [(x, y), light])


def test_outputs_that_broadcast_against_targets_are_refused():
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    x, y = torch.randn(8, 3).double(), torch.randn(8).double()
    with (
        pytest.warns(UserWarning, match="target size"),
        pytest.raises(ValueError, match=r"broadcast.*same shape"),
    ):
        hessian(model, hesscurv.supervised(nn.MSELoss()), batches_of(x, y, 4))


# -- the Fisher -------------------------------------------------------------------------------


def dense_fisher(model, loss, x, y, weights):
    """sum w_n g_n g_n^T / sum w_n, by a gradient of each sample that has a weight."""
    params, total = list(model.parameters()), 0
    for x_n, y_n, w in zip(x, y, weights, strict=True):
        if w > 0:
            slopes = torch.autograd.grad(loss(model(x_n[None]), y_n[None]), params)
            g = torch.cat([s.reshape(-1) for s in slopes])
            total = total + w * torch.outer(g, g)
    return total / weights.sum()


@pytest.mark.parametrize("name", ["class weights", "ignored", "pixels", "nll", "soft targets"])
def test_the_fisher_of_a_weighted_mean_weighs_samples(name):
    model, loss, x, y = problem_of(name)
    task = hesscurv.supervised(loss)
    weights = torch.tensor([task.weight((x[:1], y_n[None])) for y_n in y], dtype=torch.float64)
    expected = dense_fisher(model, loss, x, y, weights)
    for size, options in ((7, {}), (N, {"memory_budget": 3000}), (N, {"way": "vmapped"})):
        F_ = EmpiricalFisherOperator(
            model, task, batches_of(x, y, size), **{"way": "retained", **options}
        )
        torch.testing.assert_close(F_.to_dense(), expected, rtol=1e-10, atol=1e-13)


def test_the_fisher_of_an_own_task_weighs_samples():
    class Counted(hesscurv.Task):
        def outputs(self, model, batch):
            return model(batch[0])

        def loss(self, outputs, batch):
            losses = outputs.square().mean(1)
            return (batch[1] * losses).sum() / batch[1].sum()

        def weight(self, batch):
            return float(batch[1].sum())

    torch.manual_seed(0)
    model, x = Rows().double(), torch.randn(9, 3).double()
    counts = torch.tensor([1.0, 0, 3, 2, 0, 0, 1, 5, 1], dtype=torch.float64)
    expected = dense_fisher(model, lambda z, y: (z**2).mean(), x, counts, counts)
    for size in (9, 4):
        fisher = EmpiricalFisherOperator(
            model, Counted(), batches_of(x, counts, size), way="retained"
        )
        torch.testing.assert_close(fisher.to_dense(), expected, rtol=1e-10, atol=1e-13)


# -- losses that are tested -------------------------------------------------------------------


def sums(out, y):
    return F.cross_entropy(out, y, reduction="sum")


def weighted(out, y):
    return F.cross_entropy(out, y, weight=WEIGHT.to(out.dtype))


def ignoring(out, y):
    return F.cross_entropy(out, y, ignore_index=1)


def contrastive(out, y):
    return F.cross_entropy(out @ out.T, torch.arange(len(out)))


class Module(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.own = loss

    def forward(self, out, y):
        return self.own(out, y)


class Focal(nn.CrossEntropyLoss):
    def forward(self, out, y):
        return 2 * sums(out, y)


class Parts(hesscurv.Task):
    def __init__(self, loss):
        self.own = loss

    def outputs(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        return self.own(outputs, batch[1])


class Counting(Parts):
    def weight(self, batch):
        return 1.0


def plain(loss):
    return lambda model, batch: loss(model(batch[0]), batch[1])


WRAPPED = {
    "function": hesscurv.supervised,
    "module": lambda loss: hesscurv.supervised(Module(loss)),
    "task": Parts,
    "callable": plain,
}


def data_of(dtype=torch.float64):
    model, _, x, y = problem_of("plain")
    return model.to(dtype), x.to(dtype), y


@pytest.mark.parametrize("sizes", [[8, 5], [8, 8], [13], [1, 1, 1]])
@pytest.mark.parametrize("wrap", WRAPPED)
def test_a_sum_over_samples_is_refused(wrap, sizes):
    model, x, y = data_of()
    batches = list(zip(x[: sum(sizes)].split(sizes), y[: sum(sizes)].split(sizes), strict=True))
    with pytest.raises(ValueError, match=r"is a sum \(reduction='sum'\).*define weight\(batch\)"):
        hessian(model, WRAPPED[wrap](sums), batches)


def test_a_subclass_with_a_forward_of_its_own_is_no_loss_of_torch():
    model, x, y = data_of()
    with pytest.raises(ValueError, match="is a sum"):
        hessian(model, hesscurv.supervised(Focal()), batches_of(x, y, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", [weighted, ignoring, contrastive])
@pytest.mark.parametrize("wrap", WRAPPED)
def test_what_averages_something_else_than_samples_is_refused(wrap, loss, dtype):
    model, x, y = data_of(dtype)
    task = WRAPPED[wrap](loss)
    with pytest.raises(ValueError, match=r"mean over samples.*define weight\(batch\)"):
        hessian(model, task, batches_of(x, y, 8))
    # The curvature of a single batch's loss is what it is.
    H = hessian(model, task, [(x, y)], compute_dtype=torch.float64)
    found = H.to_dense()
    problem = cases.supervised(model.double(), [(x.double(), y)], loss)
    torch.testing.assert_close(found, oracles.dense_hessian(problem), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("wrap", WRAPPED)
def test_means_over_samples_are_exact_however_they_are_written(wrap):
    model, x, y = data_of()
    x, y = x[:5], y[:5]
    expected = oracles.dense_hessian(cases.supervised(model, [(x, y)]))
    task = WRAPPED[wrap](lambda out, y: F.cross_entropy(out, y) + 3.0)
    for size in (5, 3, 1):
        H = hessian(model, task, batches_of(x, y, size))
        torch.testing.assert_close(H.to_dense(), expected, rtol=1e-10, atol=1e-13)


def test_what_a_task_says_that_a_batch_counts_is_believed():
    model, x, y = data_of()
    H = hessian(model, Counting(contrastive), batches_of(x, y, 16))
    parts = [
        oracles.dense_hessian(cases.supervised(model, [b], contrastive))
        for b in batches_of(x, y, 16)
    ]
    torch.testing.assert_close(H.to_dense(), (parts[0] + parts[1]) / 2, rtol=1e-10, atol=1e-13)


def test_the_test_can_be_left_out():
    model, x, y = data_of()
    H = hessian(model, hesscurv.supervised(sums), batches_of(x, y, 16), check=False)
    assert H.shape[0] > 0


def test_a_task_of_several_outputs_is_tested_through_the_model():
    class Several(Parts):
        def outputs(self, model, batch):
            return model(batch[0]), model(-batch[0])

        def loss(self, outputs, batch):
            return sum(self.own(out, batch[1]) for out in outputs)

    model, x, y = data_of()
    found = hessian(model, Several(F.cross_entropy), batches_of(x, y, 9)).to_dense()
    whole = hessian(model, Several(F.cross_entropy), [(x, y)]).to_dense()
    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-13)
    with pytest.raises(ValueError, match=r"mean over samples.*define weight\(batch\)"):
        hessian(model, Several(weighted), batches_of(x, y, 9))


def test_a_weighted_batch_after_the_first_is_found():
    model, x, y = data_of()
    y = y.clone()
    y[:8] = 0  # one class: the first batch is a plain mean
    with pytest.raises(ValueError, match=r"mean over samples.*weight\(batch\)"):
        hessian(model, plain(weighted), batches_of(x, y, 8))


def test_small_differences_of_large_losses_are_no_other_mean():
    # In float32 the mean of numbers near 1e4 that cancel is known to 1e-3.
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1), torch.randn(64, 3)
    y = 1e4 * (torch.arange(64) % 2 * 2.0 - 1)[:, None]
    task = hesscurv.supervised(lambda out, y: (out + y).mean() + 1e-6 * (out**2).mean())
    hessian(model, task, batches_of(x, y, 32))


def test_batch_statistics_are_no_other_mean():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, C)).double()
    _, x, y = data_of()
    for task in (Parts(F.cross_entropy), plain(F.cross_entropy)):
        hessian(model, task, batches_of(x, y, 8), training=True)
    with pytest.raises(ValueError, match="is a sum"):
        hessian(model, Parts(sums), batches_of(x, y, 8), training=True)


class Graph(nn.Module):
    """Nodes and edges of one graph in, one row of outputs out."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, C)

    def forward(self, x, edges):
        h = torch.tanh(self.first(x))
        h = h.index_add(0, edges[1], h[edges[0]])
        return self.last(h.mean(0, keepdim=True))


def graph(nodes, edges):
    return torch.randn(nodes, 3).double(), nodes - 1 - torch.arange(2 * edges).view(
        2, edges
    ) % nodes


def test_doubtful_numbers_of_samples_are_refused():
    # The first tensor has a row a node, and the loss is that of one graph.
    torch.manual_seed(0)
    model = Graph().double()
    batches = [(*graph(n, 9), torch.tensor([n % C])) for n in (6, 4)]

    def loss(model, batch):
        return F.cross_entropy(model(*batch[:2]), batch[2])

    with pytest.raises(ValueError, match=r"samples is known.*\[6, 2, 1\].*weight\(batch\)"):
        hessian(model, loss, batches)
    # Targets that are named decide, and so do those of `supervised`.
    named = [{"x": x, "edges": e, "y": y} for x, e, y in batches]
    pairs = [((x, e), y) for x, e, y in batches]
    expected = sum(hessian(model, loss, [b]).to_dense() for b in batches) / 2
    for task, data in (
        (lambda m, b: F.cross_entropy(m(b["x"], b["edges"]), b["y"]), named),
        (hesscurv.supervised(lambda out, y: F.cross_entropy(out, y)), pairs),
    ):
        found = hessian(model, task, data).to_dense()
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_samples_behind_another_dimension_are_refused_without_a_weight():
    lstm = nn.LSTM(3, C).double()
    batches = [(torch.randn(5, n, 3).double(), torch.arange(n) % C) for n in (4, 2)]
    with pytest.raises(ValueError, match=r"first dimension.*define weight\(batch\)"):
        hessian(lstm, lambda m, b: F.cross_entropy(m(b[0])[0][-1], b[1]), batches)


def test_a_random_loss_is_said_to_be_random():
    model, x, y = data_of()
    noisy = plain(lambda out, y: F.cross_entropy(out + torch.randn_like(out), y))
    with pytest.raises(ValueError, match="not deterministic"):
        hessian(model, noisy, batches_of(x, y, 8))
