"""Recipes for the losses of torch.nn and torch.nn.functional."""

from __future__ import annotations

from functools import cache

import torch
from operation_cases import SAMPLES, LossRecipe
from torch import Tensor, nn
from torch.nn import functional as F


def _like(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape)


def _classes(count: int = 3) -> Tensor:
    return torch.arange(SAMPLES) % count


def _signs(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape).sign()


def _labels() -> Tensor:
    """Each row lists classes, ended by -1."""
    return torch.tensor([[0, -1, -1], [1, 2, -1], [2, -1, -1], [0, 1, -1], [1, -1, -1]])


def _words() -> Tensor:
    return torch.tensor([[1, 2], [2, 1], [1, 3], [3, 1], [2, 3]])


def _ctc(z: Tensor, t: Tensor) -> Tensor:
    lengths = torch.full((len(z),), 5), torch.full((len(z),), 2)
    return F.ctc_loss(z.log_softmax(-1).transpose(0, 1), t, *lengths)


def _weight_of(z: Tensor) -> Tensor:
    return torch.linspace(-1, 1, 12, dtype=z.dtype).view(3, 4)


def _linear_cross_entropy(z: Tensor, t: Tensor) -> Tensor:
    module = _linear_loss()
    return torch.func.functional_call(module, {"linear.weight": _weight_of(z)}, (z, t))


@cache
def _linear_loss() -> nn.Module:
    return nn.LinearCrossEntropyLoss(4, 3)


LOSSES = {
    "BCELoss": LossRecipe(
        (2,), lambda: torch.rand(SAMPLES, 2), lambda z, t: nn.BCELoss()(z.sigmoid(), t)
    ),
    "BCEWithLogitsLoss": LossRecipe((2,), lambda: torch.rand(SAMPLES, 2), nn.BCEWithLogitsLoss()),
    "CTCLoss": LossRecipe(
        (5, 4),
        _words,
        lambda z, t: nn.CTCLoss()(
            z.log_softmax(-1).transpose(0, 1),
            t,
            torch.full((len(z),), 5),
            torch.full((len(z),), 2),
        ),
    ),
    "CosineEmbeddingLoss": LossRecipe(
        (3,), lambda: _signs(1), lambda z, t: nn.CosineEmbeddingLoss()(z, z.cos(), t[:, 0])
    ),
    "CrossEntropyLoss": LossRecipe((3,), _classes, nn.CrossEntropyLoss()),
    "GaussianNLLLoss": LossRecipe(
        (2,), lambda: _like(2), lambda z, t: nn.GaussianNLLLoss()(z, t, z.exp())
    ),
    "HingeEmbeddingLoss": LossRecipe((2,), lambda: _signs(2), nn.HingeEmbeddingLoss()),
    "HuberLoss": LossRecipe((2,), lambda: _like(2), nn.HuberLoss(delta=0.7)),
    "LinearCrossEntropyLoss": LossRecipe(
        (4,), lambda: (_linear_loss(), _classes())[1], _linear_cross_entropy
    ),
    "linear_cross_entropy": LossRecipe(
        (4,), _classes, lambda z, t: F.linear_cross_entropy(z, _weight_of(z), t)
    ),
    "KLDivLoss": LossRecipe(
        (3,), lambda: _like(3).softmax(1), lambda z, t: nn.KLDivLoss()(z.log_softmax(1), t)
    ),
    "L1Loss": LossRecipe((2,), lambda: _like(2), nn.L1Loss()),
    "MSELoss": LossRecipe((2,), lambda: _like(2), nn.MSELoss()),
    "MarginRankingLoss": LossRecipe(
        (2,), lambda: _signs(1), lambda z, t: nn.MarginRankingLoss(0.1)(z[:, 0], z[:, 1], t[:, 0])
    ),
    "MultiLabelMarginLoss": LossRecipe((3,), _labels, nn.MultiLabelMarginLoss()),
    "MultiLabelSoftMarginLoss": LossRecipe(
        (2,), lambda: _signs(2).relu(), nn.MultiLabelSoftMarginLoss()
    ),
    "MultiMarginLoss": LossRecipe((3,), _classes, nn.MultiMarginLoss()),
    "NLLLoss": LossRecipe((3,), _classes, lambda z, t: nn.NLLLoss()(z.log_softmax(1), t)),
    "NLLLoss2d": LossRecipe(
        (3, 2, 2),
        lambda: _classes()[:, None, None].expand(-1, 2, 2),
        lambda z, t: nn.NLLLoss()(z.log_softmax(1), t),
    ),
    "PoissonNLLLoss": LossRecipe((2,), lambda: _like(2).abs(), nn.PoissonNLLLoss()),
    "SmoothL1Loss": LossRecipe((2,), lambda: _like(2), nn.SmoothL1Loss()),
    "SoftMarginLoss": LossRecipe((2,), lambda: _signs(2), nn.SoftMarginLoss()),
    "TripletMarginLoss": LossRecipe(
        (3,), lambda: _like(3), lambda z, t: nn.TripletMarginLoss()(z, z.cos(), t)
    ),
    "TripletMarginWithDistanceLoss": LossRecipe(
        (3,), lambda: _like(3), lambda z, t: nn.TripletMarginWithDistanceLoss()(z, z.cos(), t)
    ),
    "binary_cross_entropy": LossRecipe(
        (2,), lambda: torch.rand(SAMPLES, 2), lambda z, t: F.binary_cross_entropy(z.sigmoid(), t)
    ),
    "binary_cross_entropy_with_logits": LossRecipe(
        (2,), lambda: torch.rand(SAMPLES, 2), F.binary_cross_entropy_with_logits
    ),
    "cosine_embedding_loss": LossRecipe(
        (3,), lambda: _signs(1), lambda z, t: F.cosine_embedding_loss(z, z.cos(), t[:, 0])
    ),
    "cross_entropy": LossRecipe((3,), _classes, F.cross_entropy),
    "ctc_loss": LossRecipe((5, 4), _words, _ctc),
    "gaussian_nll_loss": LossRecipe(
        (2,), lambda: _like(2), lambda z, t: F.gaussian_nll_loss(z, t, z.exp())
    ),
    "hinge_embedding_loss": LossRecipe((2,), lambda: _signs(2), F.hinge_embedding_loss),
    "huber_loss": LossRecipe((2,), lambda: _like(2), F.huber_loss),
    "kl_div": LossRecipe(
        (3,), lambda: _like(3).softmax(1), lambda z, t: F.kl_div(z.log_softmax(1), t)
    ),
    "l1_loss": LossRecipe((2,), lambda: _like(2), F.l1_loss),
    "mse_loss": LossRecipe((2,), lambda: _like(2), F.mse_loss),
    "margin_ranking_loss": LossRecipe(
        (2,), lambda: _signs(1), lambda z, t: F.margin_ranking_loss(z[:, 0], z[:, 1], t[:, 0], 0.1)
    ),
    "multi_margin_loss": LossRecipe((3,), _classes, F.multi_margin_loss),
    "multilabel_margin_loss": LossRecipe((3,), _labels, F.multilabel_margin_loss),
    "multilabel_soft_margin_loss": LossRecipe(
        (2,), lambda: _signs(2).relu(), F.multilabel_soft_margin_loss
    ),
    "nll_loss": LossRecipe((3,), _classes, lambda z, t: F.nll_loss(z.log_softmax(1), t)),
    "poisson_nll_loss": LossRecipe((2,), lambda: _like(2).abs(), F.poisson_nll_loss),
    "smooth_l1_loss": LossRecipe((2,), lambda: _like(2), F.smooth_l1_loss),
    "soft_margin_loss": LossRecipe((2,), lambda: _signs(2), F.soft_margin_loss),
    "triplet_margin_loss": LossRecipe(
        (3,), lambda: _like(3), lambda z, t: F.triplet_margin_loss(z, z.cos(), t)
    ),
    "triplet_margin_with_distance_loss": LossRecipe(
        (3,), lambda: _like(3), lambda z, t: F.triplet_margin_with_distance_loss(z, z.cos(), t)
    ),
}
