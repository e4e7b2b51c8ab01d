"""Small problems of every kind that the operators must be exact on, built anew by each call.

A problem says what is measured in two ways: by what the operators take (`model`, `task`, `batches`,
`params`, `training`) and by plain functions on the model for the oracles (`loss`, or `outputs` and
`output_loss`, and the `names` of the parameters in the vector's order).
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import networks
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import hesscurv


@dataclass
class Problem:
    """A model, its data, and what to measure, in float64 until `cast`."""

    model: nn.Module
    task: Any
    batches: list[Any] | None
    loss: Callable[[nn.Module, Any], Tensor]
    outputs: Callable[[nn.Module, Any], Tensor] | None = None
    output_loss: Callable[[Tensor, Any], Tensor] | None = None
    params: Any = None
    names: list[str] | None = None  # default: all that require grad
    training: bool | None = False
    points: list[Tensor] = field(default_factory=list)  # what a closure has captured

    def cast(self, dtype: torch.dtype, data: torch.dtype | None = None) -> Problem:
        """Round the model's weights to a dtype, and the data to the same or another, in place."""
        self.model.to(dtype)
        if self.batches is not None:
            self.batches[:] = [_cast(batch, data or dtype) for batch in self.batches]
        self.points[:] = [_cast(p, data or dtype) for p in self.points]
        return self

    def operator(self, kind: type, **options: Any) -> Any:
        options.setdefault("training", self.training)
        return kind(self.model, self.task, self.batches, self.params, **options)

    def selected(self) -> list[str]:
        names = [n for n, p in self.model.named_parameters() if p.requires_grad]
        return names if self.names is None else self.names


CASES: dict[str, Callable[[], Problem]] = {}
WITHOUT_PARTS = ("own_callable", "pinn", "pinn_of_model", "pinn_func", "linear_loss", "regularised")
# Cases that differ in the graph of the loss, on which every way of computing is tried.
OWN_GRAPH = (
    *("mlp", "relu_mlp", "smooth_l1", "conv_bn", "conv_bn_train", "resnet", "transformer"),
    *("encoder_layer", "lstm", "tied_weights", "unused", "linear_loss", "dict_batches"),
    *("pinn_of_model", "pinn_func", "checkpointed", "weight_norm"),
)
SLOW_TO_TRACE = ("encoder_layer", "lstm", "tied_weights")
# Ways of computing for which torch lacks a rule on these models.
_FUNCTIONAL = ("vmapped", "linearized", "linearized_batched")
REFUSED = {
    ("encoder_layer", "ggn"): ("vmapped",),
    ("encoder_layer", "fisher"): ("vmapped",),
    ("pinn_of_model", "hessian"): _FUNCTIONAL,
    ("checkpointed", "hessian"): _FUNCTIONAL,
    ("checkpointed", "ggn"): ("vmapped", "linearized_batched"),
    ("checkpointed", "fisher"): ("vmapped", "linearized_batched"),
}


def kinds(name: str) -> tuple[str, ...]:
    """The matrices that a case has."""
    return ("hessian",) if name in WITHOUT_PARTS else ("hessian", "ggn", "fisher")


def build(name: str, batches: int | None = None) -> Problem:
    """Build a problem, or one of its first batches alone: the same every time, in float64."""
    torch.manual_seed(len(name))
    problem = CASES[name]()
    problem.model.double()
    if problem.batches is not None:
        problem.batches = [_cast(batch, torch.float64) for batch in problem.batches[:batches]]
    problem.points[:] = [_cast(p, torch.float64) for p in problem.points]
    return problem


def case(fn: Callable[[], Problem]) -> Callable[[], Problem]:
    CASES[fn.__name__] = fn
    return fn


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, UserDict):
        return type(value)({k: _cast(v, dtype) for k, v in value.items()})
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return type(value)(_cast(v, dtype) for v in value)


def supervised(model: nn.Module, batches: list[Any], loss_fn: Any = None, **kw: Any) -> Problem:
    """A problem of (inputs, targets) batches."""
    loss_fn = loss_fn or nn.CrossEntropyLoss()
    return Problem(
        model,
        hesscurv.supervised(loss_fn),
        batches,
        loss=lambda model, batch: loss_fn(model(batch[0]), batch[1]),
        outputs=lambda model, batch: model(batch[0]),
        output_loss=lambda outputs, batch: loss_fn(outputs, batch[1]),
        **kw,
    )


def _data(*shape: int, classes: int = 3, sizes: tuple[int, ...] = (4, 3)) -> list[Any]:
    return [(torch.randn(n, *shape), torch.randint(classes, (n,))) for n in sizes]


def _tokens(length: int, vocabulary: int, sizes: tuple[int, ...] = (2, 1)) -> list[Any]:
    shapes = [(n, length) for n in sizes]
    return [(torch.randint(vocabulary, s), torch.randint(vocabulary, s)) for s in shapes]


def _token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


# -- plain networks ---------------------------------------------------------------------------


@case
def mlp() -> Problem:
    return supervised(_mlp(), _data(4))


@case
def relu_mlp() -> Problem:
    # Its last layer's second derivative with itself, and the ReLU's own, are zero.
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    return supervised(model, [(torch.randn(6, 4), torch.randn(6, 2))], nn.MSELoss())


@case
def ragged() -> Problem:
    return supervised(_mlp(), _data(4, sizes=(5, 5, 2)))


@case
def smooth_l1() -> Problem:
    batches = [(torch.randn(n, 4), 2 * torch.randn(n, 3)) for n in (4, 2)]
    return supervised(_mlp(), batches, nn.SmoothL1Loss())


@case
def linear() -> Problem:
    return supervised(nn.Linear(4, 3), _data(4))


@case
def conv_bn() -> Problem:
    return supervised(networks.ConvNet().train(), _data(1, 6, 6))


@case
def conv_bn_train() -> Problem:
    return supervised(networks.ConvNet().eval(), _data(1, 6, 6, sizes=(5, 4)), training=True)


@case
def resnet() -> Problem:
    return supervised(networks.ResNet(), _data(1, 4, 4, classes=2, sizes=(3, 2)))


@case
def transformer() -> Problem:
    return supervised(networks.Transformer(tied=False), _tokens(3, 5), _token_loss)


@case
def tied_weights() -> Problem:
    return supervised(networks.Transformer(tied=True), _tokens(3, 5), _token_loss)


@case
def encoder_layer() -> Problem:
    return supervised(networks.EncoderLayer(), _data(3, 4, classes=2, sizes=(3, 2)))


@case
def lstm() -> Problem:
    return supervised(networks.Recurrent(), _data(4, 3))


# -- which parameters -------------------------------------------------------------------------


@case
def frozen() -> Problem:
    model = _mlp()
    model[0].weight.requires_grad_(False)
    return supervised(model, _data(4))


@case
def unused() -> Problem:
    return supervised(networks.WithUnused(), _data(4))


@case
def by_name() -> Problem:
    names = ["2.bias", "0.weight"]  # given in another order than the model's
    return supervised(_mlp(), _data(4), params=names, names=["0.weight", "2.bias"])


@case
def by_module() -> Problem:
    return supervised(_mlp(), _data(4), params="2", names=["2.weight", "2.bias"])


@case
def by_parameter() -> Problem:
    model = _mlp()
    params = list(model[0].parameters())
    return supervised(model, _data(4), params=params, names=["0.weight", "0.bias"])


@case
def by_predicate() -> Problem:
    return supervised(
        _mlp(), _data(4), params=lambda n, p: p.ndim == 2, names=["0.weight", "2.weight"]
    )


# -- batches and losses of other forms --------------------------------------------------------


def _encodings() -> list[networks.BatchEncoding]:
    return [
        networks.BatchEncoding(
            input_ids=torch.randint(5, (n, 3)),
            attention_mask=torch.tensor([[1, 1, 0]]).repeat(n, 1),
            labels=torch.randint(4, (n,)),
        )
        for n in (3, 2)
    ]


@case
def own_callable() -> Problem:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(**batch).loss

    return Problem(networks.TokenClassifier(), loss, [dict(b) for b in _encodings()], loss)


@case
def dict_batches() -> Problem:
    def outputs(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["input_ids"], batch["attention_mask"]).logits

    def output_loss(outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch["labels"])

    return Problem(
        networks.TokenClassifier(),
        hesscurv.supervised(nn.CrossEntropyLoss()),
        list(_encodings()),
        loss=lambda model, batch: model(**batch).loss,
        outputs=outputs,
        output_loss=output_loss,
    )


@case
def regularised() -> Problem:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        penalty = sum((p**4).sum() for p in model.parameters())
        return F.cross_entropy(model(batch[0]), batch[1]) + 0.1 * penalty

    return Problem(_mlp(), loss, _data(4), loss)


@case
def linear_loss() -> Problem:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch).mean()

    return Problem(nn.Linear(4, 3), loss, [torch.randn(5, 4), torch.randn(2, 4)], loss)


# -- closures with derivatives of the net's output in them ------------------------------------


def _residual(net: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """The mean squared residual of u'' + u = x."""
    x = points.detach().requires_grad_()
    u = net(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return ((second + u - x) ** 2).mean()


def _residual_func(model: nn.Module, points: Tensor) -> Tensor:
    def u(x: Tensor) -> Tensor:
        return model(x.reshape(1, 1)).squeeze()

    second = torch.func.vmap(torch.func.grad(torch.func.grad(u)))
    return ((second(points[:, 0]) + torch.func.vmap(u)(points[:, 0]) - points[:, 0]) ** 2).mean()


def pinn_net() -> tuple[nn.Module, list[Tensor]]:
    return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)), [torch.randn(6, 1)]


@case
def pinn() -> Problem:
    model, points = pinn_net()
    closure = lambda: _residual(model, points[0])  # noqa: E731
    return Problem(
        model, closure, None, lambda model, _: _residual(model, points[0]), points=points
    )


@case
def pinn_of_model() -> Problem:
    model, points = pinn_net()
    loss = lambda model, _=None: _residual(model, points[0])  # noqa: E731
    return Problem(model, loss, None, loss, points=points)


@case
def pinn_func() -> Problem:
    model, points = pinn_net()
    loss = lambda model, _=None: _residual_func(model, points[0])  # noqa: E731
    return Problem(model, loss, None, loss, points=points)


# -- modules that compute their weights or their graph anew -----------------------------------


@case
def checkpointed() -> Problem:
    return supervised(networks.Checkpointed().train(), _data(4))


@case
def pruned() -> Problem:
    model = _mlp()
    with torch.no_grad():  # else the module cannot be copied
        prune.l1_unstructured(model[0], "weight", amount=0.4)
    return supervised(model, _data(4))


@case
def weight_norm() -> Problem:
    def outputs(model: nn.Module, batch: Any) -> Tensor:
        # By hand: torch 2.13's own second derivative of weight normalisation is wrong.
        g, v = model.first.parametrizations.weight.parameters()
        weight = g * v / v.square().sum(1, keepdim=True).sqrt()
        return model.last(torch.tanh(batch[0] @ weight.T + model.first.bias))

    problem = supervised(networks.WeightNormed(), _data(4))
    problem.outputs = outputs
    problem.loss = lambda model, batch: F.cross_entropy(outputs(model, batch), batch[1])
    return problem
