"""torch's warnings of operations that vmap takes one by one stay inside; all others come out."""

import contextlib
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hesscurv
from hesscurv import EmpiricalFisherOperator, GGNOperator, HessianOperator
from hesscurv.objective.running.environment import without_fallback_warnings

X, Y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.pairs, self.head = nn.Bilinear(4, 4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.pairs(x, x)))


CASES = [
    (Pairs, nn.CrossEntropyLoss(), Y),
    (lambda: nn.Linear(4, 3), nn.SoftMarginLoss(), torch.randn(6, 3).sign()),
]


def warn_once():
    """What torch says where nobody silences it."""
    torch.func.vmap(F.soft_margin_loss)(torch.randn(3, 4), torch.ones(3, 4))


@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator, EmpiricalFisherOperator])
@pytest.mark.parametrize(("model", "loss", "targets"), CASES)
def test_products_by_any_way_do_not_warn(model, loss, targets, kind, capfd):
    for way in (*kind.ways, "auto"):
        H = kind(model(), hesscurv.supervised(loss), [(X, targets)], way=way)
        # Some ways are refused, for want of a derivative; they may not warn either.
        with contextlib.suppress(ValueError):
            for _ in range(4):
                H @ torch.randn(H.shape[0], 8)
    # Some are written by torch itself, past Python's warnings.
    assert "performance drop" not in capfd.readouterr().err


def test_outside_products_torch_warns_as_before():
    with without_fallback_warnings(), without_fallback_warnings():
        warn_once()
    HessianOperator(nn.Linear(4, 3), hesscurv.supervised(nn.CrossEntropyLoss()), [(X, Y)])
    with pytest.warns(UserWarning, match="performance drop"):
        warn_once()


def test_other_warnings_of_the_model_come_through():
    class Warns(nn.Linear):
        def forward(self, x):
            warnings.warn("of the model's own", stacklevel=2)
            return super().forward(x)

    with pytest.warns(UserWarning, match="of the model's own"):
        HessianOperator(Warns(4, 3), hesscurv.supervised(nn.CrossEntropyLoss()), [(X, Y)])
