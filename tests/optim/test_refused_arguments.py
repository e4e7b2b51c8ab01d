"""What cannot be is refused at construction, with what was expected, and nothing is changed."""

import copy

import pytest
import torch
from optim.training import TASK, data, net, sgd
from support.bundles import bundled
from torch import nn

from hesscurv.optim import NewtonCG, PreconditionedOptimizer, PreconditionerOptions


class OwnKey(torch.optim.SGD):
    """A base that has a hyperparameter called as one of the wrapper's."""

    def __init__(self, params, lr=0.1):
        super().__init__([{"params": list(params), "curvature_rank": 128}], lr=lr)


def wrap(base=None, model=None, task=TASK, batches=(), **options):
    model = net() if model is None else model
    base = torch.optim.SGD(model.parameters(), lr=0.1) if base is None else base
    batches = data() if batches == () else batches
    return PreconditionedOptimizer(
        base, model, task, batches, **bundled(PreconditionerOptions, options)
    )


def of_another_model():
    return wrap(torch.optim.SGD(net().parameters(), lr=0.1))


def twice():
    model = net()
    return wrap(sgd(model), model)


REFUSED = {
    "moved": (
        lambda: wrap(seed=3),
        TypeError,
        "seed= has moved: pass generator=torch.Generator",
    ),
    "moved in NewtonCG": (
        lambda: NewtonCG(net().parameters(), seed=3),
        TypeError,
        "seed= has moved: pass generator=torch.Generator",
    ),
    "class": (lambda: wrap(torch.optim.SGD), TypeError, "got the class SGD; pass an instance"),
    "no optimizer": (lambda: wrap(3), TypeError, "expected base to be a torch.optim.Optimizer"),
    "LBFGS": (
        lambda: wrap(torch.optim.LBFGS(net().parameters())),
        ValueError,
        "got LBFGS, which evaluates its closure many times",
    ),
    "twice": (twice, ValueError, "not preconditioned yet"),
    "no module": (
        lambda: PreconditionedOptimizer(wrap().base, lambda x: x, TASK, data()),
        TypeError,
        "expected model to be a torch.nn.Module",
    ),
    "another model": (of_another_model, ValueError, "none of those selected which require grad"),
    "own key": (
        lambda: wrap(OwnKey((m := net()).parameters()), m),
        ValueError,
        r"without hyperparameters called \['curvature_rank'\]",
    ),
    "unknown name": (lambda: wrap(params=["nothing"]), ValueError, "no parameter or submodule"),
    "no task": (lambda: wrap(task=3), TypeError, "expected task"),
    "a loss as task": (lambda: wrap(task=nn.MSELoss()), TypeError, "hesscurv.supervised"),
    "one batch": (lambda: wrap(batches=data()[0]), ValueError, "looks like one batch"),
    "one shot": (lambda: wrap(batches=iter(data())), TypeError, "can be iterated again"),
    "no batches": (lambda: wrap(batches=None), ValueError, "expected batches for a task"),
    "parts": (
        lambda: wrap(task=lambda model, batch: TASK(model, batch), curvature="ggn"),
        TypeError,
        "expected a task with outputs and loss for the GGNOperator",
    ),
    "curvature": (lambda: wrap(curvature="fischer"), ValueError, "expected curvature to be one of"),
    "mode": (lambda: wrap(mode="both"), ValueError, "expected mode to be one of"),
    "learning rate": (lambda: wrap(learning_rate=0.1), ValueError, "expected learning_rate to be"),
    "rank 0": (lambda: wrap(rank=0), ValueError, "expected rank >= 1, got 0"),
    "rank 2.5": (lambda: wrap(rank=2.5), TypeError, "expected rank to be an int, got 2.5"),
    "damping": (lambda: wrap(damping=-1.0), ValueError, "expected a finite damping >= 0, got -1"),
    "NaN": (lambda: wrap(damping=float("nan")), ValueError, "finite damping >= 0, got nan"),
    "interval": (lambda: wrap(refresh_every=0), ValueError, "expected refresh_every >= 1"),
    "fraction": (lambda: wrap(max_fraction=1.0), ValueError, "max_fraction > 0 and < 1, got 1.0"),
    "drift": (lambda: wrap(drift_tol=0), ValueError, "expected a finite drift_tol > 0"),
    "check": (lambda: wrap(check_every=0), ValueError, "expected check_every >= 1"),
    "samples": (lambda: wrap(samples=0), ValueError, "expected samples >= 1"),
    "tol": (lambda: wrap(tol=0.0), ValueError, "expected a finite tol > 0"),
    "generator": (lambda: wrap(generator=3), TypeError, "expected generator to be a torch.Gener"),
    "growth": (lambda: wrap(max_growth="2"), TypeError, "expected max_growth to be a number"),
    "share": (lambda: wrap(rate_fraction=-0.5), ValueError, "expected a finite rate_fraction > 0"),
    "group": (lambda: wrap(process_group="gloo"), TypeError, "process group"),
    "option": (
        lambda: wrap(operator_options={"params": None}),
        TypeError,
        r"got \['params'\]; other arguments of the operator",
    ),
    "way": (lambda: wrap(operator_options={"way": "quick"}), ValueError, "way to be one of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_any_work(name):
    build, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        build()


def test_a_refused_base_is_as_before():
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(base.state_dict())
    for options in ({"rank": 0}, {"batches": iter(())}, {"params": ["nothing"]}):
        with pytest.raises((TypeError, ValueError)):
            wrap(base, model, **options)
    assert base.state_dict() == before


@pytest.mark.parametrize("kind", [wrap, lambda **o: NewtonCG(net().parameters(), **o)])
def test_a_generator_is_drawn_from_once_and_not_where_an_argument_is_refused(kind):
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    with pytest.raises(ValueError, match="damping"):
        kind(damping=-1.0, generator=generator)
    assert torch.equal(generator.get_state(), before)
    kind(generator=generator)
    assert not torch.equal(generator.get_state(), before)
