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
from hesscurv import GGNOperator, HessianOperator

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


def matrix(kind, model, loss, x, y, size, **options):
    batches = list(zip(x.split(size), y.split(size), strict=True))
    return kind(model, hesscurv.supervised(loss), batches, **options).to_dense()


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
    whole = cases.supervised(model, [(x, y)], loss)
    for kind, dense in (
        (HessianOperator, oracles.dense_hessian(whole)),
        (GGNOperator, oracles.dense_ggn(whole)),
    ):
        for size, options in ((7, {}), (N, {"memory_budget": 3000})):
            # 1e-10: float64, sums over samples in another order.
            found = matrix(kind, model, loss, x, y, size, **options)
            assert float((found - dense).norm()) <= 1e-10 * float(dense.norm()) + 1e-14
