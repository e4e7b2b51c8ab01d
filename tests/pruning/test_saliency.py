"""Scores of single weights against the dense Hessian of a small net."""

from dataclasses import replace

import cases
import oracles
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import hesscurv
from hesscurv import Eigenpairs, ParameterLayout
from hesscurv.metrics import top_k_mask
from hesscurv.pruning.curvature.eigenspace_model import quadratic_model_of
from hesscurv.pruning.curvature.saliency import saliency

SEEDS = (0,)
KINDS = ("obd", "obs", "leverage")


def problem(seed=0):
    """A net of 43 parameters away from any minimum, so that both signs and a gradient are there."""
    p = cases.build("mlp")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in p.model.parameters():
            parameter.normal_()
    return p


def layout_of(model):
    named = dict(model.named_parameters())
    return ParameterLayout(tuple(named), tuple(tuple(p.shape) for p in named.values()))


def pairs_of(matrix, layout, k=None):
    """The k eigenpairs of largest magnitude, from a dense decomposition."""
    values, vectors = torch.linalg.eigh(matrix)
    order = values.abs().argsort(descending=True)[:k]
    return Eigenpairs(
        values[order],
        vectors[:, order],
        torch.zeros(len(order)).double(),
        torch.ones(len(order), dtype=torch.bool),
        0,
        layout=layout,
    )


def gradient_of(p):
    total = 0
    for batch in p.batches:
        slopes = torch.autograd.grad(p.loss(p.model, batch), list(p.model.parameters()))
        total = total + len(batch[0]) * torch.cat([s.flatten() for s in slopes])
    return total / sum(len(batch[0]) for batch in p.batches)


def flat_weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def in_weights(model, vector):
    """A flat vector's parts that belong to weights, as saliency has them."""
    pieces = layout_of(model).split(vector)
    return {(model[i], "weight"): pieces[f"{i}.weight"] for i in (0, 2)}


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for key, value in expected.items():
        # float64, sums of a few dozen terms, divided by a damping of 1e-3 at least.
        torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-10)


# -- obd --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_obd_of_all_pairs_is_the_second_order_change_of_the_loss(seed):
    p = problem(seed)
    H, w, g = oracles.dense_hessian(p), flat_weights(p.model), gradient_of(p)
    found = saliency(p.model, pairs_of(H, layout_of(p.model)), negative="keep", gradient=g)
    assert_equal(found, in_weights(p.model, w**2 * H.diagonal() / 2 - g * w))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("negative", ["abs", "clip"])
def test_negative_eigenvalues_count_by_magnitude_or_not_at_all(seed, negative):
    p = problem(seed)
    H, w = oracles.dense_hessian(p), flat_weights(p.model)
    pairs = pairs_of(H, layout_of(p.model), k=9)
    assert bool((pairs.eigenvalues < 0).any())
    used = pairs.eigenvalues.abs() if negative == "abs" else pairs.eigenvalues.clamp(min=0)
    h = pairs.eigenvectors.square() @ used + pairs.eigenvalues[-1].abs()
    found = saliency(p.model, pairs, negative=negative)
    assert_equal(found, in_weights(p.model, w**2 * h / 2))
    assert all(bool((s >= 0).all()) for s in found.values())


def test_signed_scores_fall_below_zero_where_curvature_does():
    p = problem()
    pairs = pairs_of(oracles.dense_hessian(p), layout_of(p.model))
    found = saliency(p.model, pairs, negative="keep")
    assert any(bool((s < 0).any()) for s in found.values())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_diagonal_fills_in_what_few_pairs_leave(seed):
    p = problem(seed)
    H, w = oracles.dense_hessian(p), flat_weights(p.model)
    pairs = pairs_of(H, layout_of(p.model), k=4)
    found = saliency(p.model, pairs, negative="keep", diagonal=H.diagonal())
    assert_equal(found, in_weights(p.model, w**2 * H.diagonal() / 2))
    V, values = pairs.eigenvectors, pairs.eigenvalues
    rest = (H.diagonal() - V.square() @ values).clamp(min=1e-3)
    found = saliency(p.model, pairs, diagonal=H.diagonal(), damping=1e-3)
    assert_equal(found, in_weights(p.model, w**2 * (V.square() @ values.abs() + rest) / 2))


def test_masked_entries_of_a_pruned_weight_score_zero():
    p = problem()
    pairs = pairs_of(oracles.dense_hessian(p), layout_of(p.model), k=5)
    dense = saliency(p.model, pairs, gradient=torch.ones(43).double())
    prune.random_unstructured(p.model[0], "weight", 0.5)
    pruned = saliency(p.model, pairs, gradient=torch.ones(43).double())
    kept = p.model[0].weight_mask.bool()
    key = (p.model[0], "weight")
    assert torch.equal(pruned[key][kept], dense[key][kept])
    assert not bool(pruned[key][~kept].any())


# -- obs --------------------------------------------------------------------------------------


def cost_of_removal(H, g, w, i):
    """The quadratic's minimum with d_i = -w_i less its free minimum, by elimination."""
    others = torch.arange(len(w)) != i
    d = torch.zeros_like(w)
    d[i] = -w[i]
    d[others] = -torch.linalg.solve(H[others][:, others], (g + H @ d)[others])
    free = -torch.linalg.solve(H, g)
    return (g @ d + d @ H @ d / 2) - (g @ free + free @ H @ free / 2)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [6, None])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_obs_is_the_cost_of_one_removal_when_all_others_follow(seed, k, with_gradient):
    p = problem(seed)
    pairs = pairs_of(oracles.dense_hessian(p), layout_of(p.model), k)
    V, damping = pairs.eigenvectors, 1e-2
    H = V * pairs.eigenvalues.abs() @ V.T + damping * torch.eye(43).double()
    g = gradient_of(p) if with_gradient else torch.zeros(43).double()
    # Biases stand still.
    scored = torch.cat([torch.full((q.numel(),), q.ndim == 2) for q in p.model.parameters()])
    H, g_s, w = H[scored][:, scored], g[scored], flat_weights(p.model)[scored]
    costs = torch.stack([cost_of_removal(H, g_s, w, i) for i in range(len(w))])
    expected = torch.zeros(43).double()
    expected[scored] = costs
    found = saliency(p.model, pairs, "obs", damping=damping, gradient=g if with_gradient else None)
    assert_equal(found, in_weights(p.model, expected))


def test_obs_of_a_diagonal_hessian_is_obd():
    p = problem()
    H = torch.diag(torch.rand(43).double() + 0.1)
    pairs = pairs_of(H, layout_of(p.model), k=3)
    options = {"diagonal": H.diagonal(), "damping": 1e-6}
    assert_equal(saliency(p.model, pairs, "obs", **options), saliency(p.model, pairs, **options))


# -- leverage ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_no_mask_overlaps_more_with_the_eigenspace_than_that_of_most_leverage(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))
    matrix = torch.randn(35, 35).double()
    pairs = pairs_of(matrix + matrix.T, layout_of(model), k=7)
    found = torch.cat([s.flatten() for s in saliency(model, pairs, "leverage").values()])
    best = top_k_mask(found, 7)
    assert torch.equal(best, hesscurv.best_mask(pairs))
    most = hesscurv.overlap(best, pairs)
    for _ in range(200):
        mask = top_k_mask(torch.rand(35), 7)
        # Equal but for the rounding of sums of 7 terms.
        assert hesscurv.overlap(mask, pairs) <= most + 1e-12


# -- which weights, and in what form ----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_from_before_and_after_pruning_score_alike(kind):
    p = problem()
    before = layout_of(p.model)
    H = oracles.dense_hessian(p)
    prune.identity(p.model[0], "weight")
    # torch moves a pruned parameter behind the bias.
    after = layout_of(p.model)
    assert after.names == ("0.bias", "0.weight_orig", "2.weight", "2.bias")
    order = torch.cat(
        [torch.arange(43)[before.slices()[n.removesuffix("_orig")]] for n in after.names]
    )
    old = pairs_of(H, before, k=5)
    new = replace(old, eigenvectors=old.eigenvectors[order], layout=after)
    assert_equal(saliency(p.model, new, kind), saliency(p.model, old, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_the_pairs_lack_are_left_out_unless_asked_for(kind):
    p = problem()
    layout = ParameterLayout(("2.weight",), ((3, 5),))
    pairs = pairs_of(torch.eye(15).double(), layout, k=2)
    assert list(saliency(p.model, pairs, kind)) == [(p.model[2], "weight")]
    with pytest.raises(ValueError, match=r"weights \['0.weight'\]"):
        saliency(p.model, pairs, kind, weights=["0.weight", "2.weight"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("own", "basis"), [("float32", "bfloat16"), ("float64", "float32")])
def test_scores_have_the_wider_dtype_and_the_weights_shapes(kind, own, basis):
    p = problem()
    p.model.to(getattr(torch, own))
    pairs = pairs_of(oracles.dense_hessian(problem()), layout_of(p.model), k=3)
    found = saliency(p.model, pairs.to(getattr(torch, basis)), kind)
    for (module, _), scores in found.items():
        assert scores.shape == module.weight.shape
        assert scores.dtype == getattr(torch, own)


def test_scores_prune_the_model_through_torch():
    p = problem()
    pairs = pairs_of(oracles.dense_hessian(p), layout_of(p.model), k=5)
    scores = saliency(p.model, pairs)
    prune.global_unstructured(
        list(scores), prune.L1Unstructured, importance_scores=scores, amount=17
    )
    flat = torch.cat([s.flatten() for s in scores.values()])
    kept = torch.cat([m.weight_mask.flatten() for m, _ in scores]).bool()
    assert int((~kept).sum()) == 17
    assert flat[~kept].max() <= flat[kept].min()


def test_the_quadratic_model_is_that_of_the_formula():
    p = problem()
    pairs = pairs_of(oracles.dense_hessian(p), layout_of(p.model), k=5)
    gradient = gradient_of(p)
    quadratic = quadratic_model_of(p.model, pairs, gradient=gradient, weights="2.weight")
    part = layout_of(p.model).slices()["2.weight"]
    V = pairs.eigenvectors[part]
    H = V * pairs.eigenvalues.abs() @ V.T + pairs.eigenvalues[-1].abs() * torch.eye(15).double()
    d = torch.randn(15).double()
    assert quadratic.layout == ParameterLayout(("2.weight",), ((3, 5),))
    assert quadratic.change(d) == pytest.approx(float(gradient[part] @ d + d @ H @ d / 2))


# -- errors -----------------------------------------------------------------------------------

WRONG = {
    "an unknown kind": ({"kind": "magnitude"}, ValueError, "expected kind"),
    "an unknown sign": ({"negative": "drop"}, ValueError, "expected negative"),
    "signed obs": ({"kind": "obs", "negative": "keep"}, ValueError, "H has to be positive"),
    "obs without rest": ({"kind": "obs", "damping": 0.0}, ValueError, "positive damping"),
    "negative damping": ({"damping": -1.0}, ValueError, "not negative"),
    "a short gradient": ({"gradient": torch.ones(3)}, ValueError, r"gradient of shape \(43,\)"),
    "counts": ({"diagonal": torch.ones(43).long()}, TypeError, "floating tensor"),
    "NaN": ({"diagonal": torch.full((43,), float("nan"))}, ValueError, "finite diagonal"),
    "leverage with damping": ({"kind": "leverage", "damping": 1.0}, ValueError, "alone"),
    "two rests": (
        {"negative": "keep", "damping": 1.0, "diagonal": torch.ones(43)},
        ValueError,
        "expected no damping",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_refused(wrong):
    options, error, message = WRONG[wrong]
    p = problem()
    pairs = pairs_of(oracles.dense_hessian(p), layout_of(p.model), k=5)
    with pytest.raises(error, match=message):
        saliency(p.model, pairs, **options)


def test_pairs_that_do_not_fit_the_model_are_refused():
    p = problem()
    pairs = pairs_of(oracles.dense_hessian(p), layout_of(p.model), k=5)
    with pytest.raises(TypeError, match="expected Eigenpairs"):
        saliency(p.model, pairs.eigenvectors)
    with pytest.raises(ValueError, match="with the layout"):
        saliency(p.model, replace(pairs, layout=None))
    other = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(5, 3)).double()
    with pytest.raises(ValueError, match=r"expected shape \(4, 5\) for '0.weight'"):
        saliency(other, pairs)
    with pytest.raises(ValueError, match="that have the weights"):
        saliency(nn.ModuleDict({"fc": nn.Linear(2, 2)}), pairs)
    with pytest.raises(ValueError, match="finite basis"):
        saliency(p.model, replace(pairs, eigenvectors=pairs.eigenvectors * float("nan")))
