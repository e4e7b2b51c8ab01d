"""Ways of computing are compared with the reference on every micro-batch, and after a solve."""

import logging
import warnings

import cases
import oracles
import pytest
import torch
from support.replaced_ways import LINEARIZE, replace_way
from torch import nn
from torch.nn import functional as F

import hesscurv
from hesscurv import EmpiricalFisherOperator, GGNOperator, HessianOperator
from hesscurv.operators.checks.agreement import Combination
from hesscurv.operators.ways import retained as ways

TASK = hesscurv.supervised(nn.CrossEntropyLoss())
KINDS = {"hessian": HessianOperator, "ggn": GGNOperator, "fisher": EmpiricalFisherOperator}


def gap(got, expected):
    return float((got - expected).norm() / expected.norm())


def problem_of(model, batches):
    problem = cases.Problem(
        model.double(),
        TASK,
        batches,
        loss=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]),
        outputs=lambda net, batch: net(batch[0]),
        output_loss=lambda z, batch: F.cross_entropy(z, batch[1]),
    )
    return problem


class Padded(nn.Module):
    """An embedding whose padding row is not zero, and not trained."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 3)
        with torch.no_grad():
            self.embed.weight[0] = 0.3

    def forward(self, tokens):
        return self.out(torch.tanh(self.embed(tokens)).mean(1))


class Branching(nn.Module):
    """Takes another branch where a batch's mean is negative."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.a(x).tanh() if float(x.mean()) > 0 else self.b(x.square()).sin()


class Grouped(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten())
        self.append(nn.Linear(16, 3))


def padded():
    torch.manual_seed(0)
    full, half = torch.randint(1, 9, (6, 5)), torch.randint(1, 9, (6, 5))
    half[:, 2:] = 0
    return problem_of(Padded(), [(x, torch.arange(len(x)) % 3) for x in (full, half, full[:3])])


def branching():
    torch.manual_seed(0)
    xs = [torch.randn(n, 4).double() + s for n, s in ((4, 2), (3, -2), (5, 2))]
    return problem_of(Branching(), [(x, torch.arange(len(x)) % 3) for x in xs])


def grouped():
    torch.manual_seed(0)
    return problem_of(
        Grouped(), [(torch.randn(n, 1, 4, 4).double(), torch.arange(n) % 3) for n in (1, 2, 3)]
    )


PROBLEMS = {"padded": padded, "branching": branching, "grouped": grouped}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_products_are_right_on_every_batch_whatever_is_chosen(name, kind):
    problem = PROBLEMS[name]()
    operator = problem.operator(KINDS[kind])
    operator.calibrate(10_000)
    eye = torch.eye(operator.shape[0], dtype=torch.float64)
    # The oracle is exact to rounding in float64, and so is what agrees with the reference.
    assert gap(operator @ eye, oracles.MATRICES[kind](problem)) < 1e-7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_named_way_is_right_or_refused_with_batch_and_reason(name, kind):
    problem = PROBLEMS[name]()
    for way in KINDS[kind].ways:
        operator = problem.operator(KINDS[kind], way=way)
        eye = torch.eye(operator.shape[0], dtype=torch.float64)
        reason = None
        try:
            got = operator @ eye
        except ValueError as error:
            reason = str(error)
        if reason is None:
            assert gap(got, oracles.MATRICES[kind](problem)) < 1e-7
        else:
            assert way != operator.ways[0]
            assert f"way='{way}' cannot be used: on micro-batch" in reason


class WrongOnSecond:
    """A way that is wrong, or raises, on batches of three samples."""

    def __init__(self, monkeypatch, operator, error=None, factor=1.01):
        self.calls = 0
        right = LINEARIZE["batched"]

        def way(loss, params):
            self.calls += 1
            apply = right(loss, params)

            def wrong(block):
                if error is not None:
                    raise error
                return tuple(None if p is None else factor * p for p in apply(block))

            return wrong if self.calls % 2 == 0 else apply

        replace_way(monkeypatch, "batched", way, operator)


def two_batches():
    torch.manual_seed(0)
    return problem_of(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        [(torch.randn(n, 4).double(), torch.arange(n) % 3) for n in (4, 3)],
    )


@pytest.mark.parametrize("error", [None, RuntimeError("no such thing")])
def test_a_micro_batch_on_which_a_way_is_not_right_takes_the_reference(error, monkeypatch, caplog):
    problem = two_batches()
    operator = problem.operator(HessianOperator)
    operator.calibrate()
    operator.release()
    WrongOnSecond(monkeypatch, operator, error)
    # As if it had been found the fastest on the first micro-batch.
    monkeypatch.setattr(operator.products.choice, "choose", lambda width: ("batched", width))
    eye = torch.eye(operator.shape[0], dtype=torch.float64)
    expected = oracles.dense_hessian(problem)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert gap(operator @ eye, expected) < 1e-10
    told = [r.getMessage() for r in caplog.records if "is not right on" in r.getMessage()]
    assert len(told) == 1
    assert "micro-batch 1" in told[0]
    assert ("no such thing" if error else "by 1.0e-02") in told[0]


def test_weights_at_which_a_way_is_not_right_are_noticed(monkeypatch):
    problem = two_batches()
    problem.batches = problem.batches[:1]
    operator = problem.operator(HessianOperator, way="batched")
    eye = torch.eye(operator.shape[0], dtype=torch.float64)
    operator @ eye
    WrongOnSecond(monkeypatch, operator).calls = 1
    with torch.no_grad():
        problem.model[0].weight.mul_(1.1)
    with pytest.raises(ValueError, match=r"other products than 'retained', by 1\.0e-02"):
        operator @ eye


def test_unit_vectors_alone_do_not_hide_a_wrong_way():
    # The first columns of the identity do not reach the embedding's gradient at all.
    problem = padded()
    operator = problem.operator(HessianOperator)
    operator.calibrate(10_000)
    assert gap(operator.to_dense(block_size=3), oracles.dense_hessian(problem)) < 1e-7


def test_combinations_are_of_vectors_and_their_products():
    torch.manual_seed(0)
    problem = two_batches()
    layout = problem.operator(HessianOperator).layout
    matrix = torch.randn(layout.numel, layout.numel).double()
    vectors = torch.randn(7, layout.numel).double()
    seen = Combination(layout, vectors)
    seen.add(vectors[:4], vectors[:4] @ matrix.T)
    pieces = (vectors[4:] @ matrix.T).split([s.stop - s.start for s in layout.slices().values()], 1)
    seen.add(vectors[4:], tuple(pieces))
    # Exact but for rounding.
    assert gap(seen.x_D @ matrix.T, seen.y_D) < 1e-12
    assert seen.count == 7


# -- after a solve ------------------------------------------------------------------------------


def drifting(monkeypatch, after):
    """Make a way that becomes wrong after so many blocks."""
    right, blocks = ways.hessian_batched, [0]

    def way(loss, params):
        apply = right(loss, params)

        def product(block):
            blocks[0] += 1
            factor = 1.05 if blocks[0] > after else 1.0
            return tuple(None if p is None else factor * p for p in apply(block))

        return product

    replace_way(monkeypatch, "batched", way)


@pytest.mark.parametrize(
    "solve",
    [
        lambda H: hesscurv.eigsh(H, k=20, max_matvecs=200),
        lambda H: hesscurv.eigsh(H, k=8, method="rayleigh_ritz", num_measurements=40),
        lambda H: hesscurv.trace(H, 80),
        lambda H: hesscurv.diagonal(H, 80),
        lambda H: hesscurv.spectral_density(H, num_steps=20, num_probes=4),
    ],
    ids=["block_krylov", "rayleigh_ritz", "trace", "diagonal", "density"],
)
def test_a_way_that_goes_wrong_during_a_solve_is_told_of_at_its_end(solve, monkeypatch):
    torch.manual_seed(0)
    problem = problem_of(
        nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3)),
        [(torch.randn(20, 8).double(), torch.arange(20) % 3)],
    )
    drifting(monkeypatch, after=2)
    operator = problem.operator(HessianOperator, way="batched")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solve(operator)
    told = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert len(told) == 1
    assert "by way 'batched', differ from those of 'retained'" in told[0]
    assert "micro-batch 0" in told[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_solve_with_right_products_ends_without_a_word(kind):
    problem = cases.build("conv_bn")
    for dtype in (torch.float32, torch.float64):
        operator = problem.cast(dtype).operator(KINDS[kind])
        before = operator.num_matvecs
        pairs = hesscurv.eigsh(operator, k=20)
        # What is compared does not count.
        assert operator.num_matvecs - before == pairs.num_matvecs


def test_gauss_newton_ways_are_the_ones_tested():
    assert GGNOperator.ways == EmpiricalFisherOperator.ways
