"""Where inputs and outputs lie: layers that store a weight in another way are pruned alike."""

import copy

import pytest
import torch
from mask_cases import lowest_slices_by_sorting, n_of_m_by_sorting, permuted_scores
from torch import nn

import hesscurv
from hesscurv.pruning import (
    Measuring,
    PruningOptions,
    compensate_,
    curvature_nm,
    curvature_structured,
    curvature_unstructured,
    prune_model,
    register_weight_axes,
    saliency,
    weight_axes,
)
from hesscurv.pruning.curvature.layer_inputs import has_input_rows, unfolded
from hesscurv.pruning.masks.semi_structured import to_semi_structured_
from hesscurv.pruning.masks.state_dicts import masks_of
from hesscurv.pruning.targets import Pattern
from hesscurv.pruning.weight_axes import AS_LINEAR, REVERSED, WeightAxes, axes_of, find_axes
from hesscurv.pruning.weights import Weight, current_mask, current_parameter

TASK = hesscurv.supervised(nn.CrossEntropyLoss())
SEEDS = (0,)


class Conv1D(nn.Module):
    """The layer of transformers, by its own definition: a weight (inputs, outputs)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(
            *x.shape[:-1], self.nf
        )


class Raw(nn.Module):
    """A product with a weight that no table knows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3))

    def forward(self, x):
        return x @ self.weight


# -- twins: the same function, stored in two ways ---------------------------------------------


def linear_twins():
    """Layers of Conv1D and of Linear, and how a tensor of the one becomes that of the other."""
    there = nn.Sequential(Conv1D(12, 8), nn.Tanh(), Conv1D(4, 12), nn.Tanh(), nn.Linear(4, 3))
    here = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3))
    return there, here, lambda name, t: t if name == "4.weight" else t.mT, (8,)


def convolution_twins(groups):
    """A transposed convolution of stride 1 is one with the kernel reversed and full padding."""
    there = nn.Sequential(nn.ConvTranspose2d(8, 4, (2, 3), groups=groups, bias=False))
    here = nn.Sequential(nn.Conv2d(8, 4, (2, 3), padding=(1, 2), groups=groups, bias=False))
    for net in (there, here):
        net.extend([nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)])

    def turn(name, t):
        if name != "0.weight":
            return t
        parts = t.unflatten(0, (groups, -1)).transpose(1, 2)  # each group on its own
        return parts.flatten(0, 1).flip(2, 3)

    return there, here, turn, (8, 3, 4)


TWINS = {
    "conv1d": linear_twins,
    "transposed": lambda: convolution_twins(1),
    "grouped transposed": lambda: convolution_twins(2),
}


def make(kind, seed=0):
    torch.manual_seed(seed)
    there, here, turn, shape = TWINS[kind]()
    there, here = there.double(), here.double()
    state = {n: turn(n, t) if "weight" in n else t for n, t in there.state_dict().items()}
    here.load_state_dict({n: t.clone() for n, t in state.items()})
    x = torch.randn(20, *shape).double()
    torch.testing.assert_close(there(x), here(x))
    return there, here, turn, [(x, torch.randint(3, (20,)))]


def assert_alike(there, here, turn):
    """The same masks and, but for rounding, the same weights."""
    masks = masks_of(here)
    assert list(masks_of(there)) == list(masks)
    for name, mask in masks_of(there).items():
        assert torch.equal(turn(name, mask), masks[name])
    parameters = dict(here.named_parameters())
    for name, p in there.named_parameters():
        dense = name.removesuffix("_orig")
        t = turn(dense, p) if "weight" in name else p
        # float64, behind one Cholesky factorisation of a damped matrix.
        torch.testing.assert_close(t, parameters[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("structure", [None, "2:4", "1:2"])
@pytest.mark.parametrize("method", ["obs", "obd", "magnitude"])
@pytest.mark.parametrize("kind", TWINS)
def test_twins_are_pruned_alike(kind, method, structure):
    there, here, turn, batches = make(kind)
    reports = [
        prune_model(
            net,
            TASK,
            batches,
            0.6,
            method=method,
            structure=structure,
            stages=2,
            gradients_per_stage=12,
            options=PruningOptions(compensate=method != "magnitude"),
        )
        for net in (there, here)
    ]
    assert_alike(there, here, turn)
    assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-9)
    for a, b in zip(reports[0].layers, reports[1].layers, strict=True):
        assert (a.name, a.kept) == (b.name, b.kept)
        assert a.predicted_change == pytest.approx(b.predicted_change, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    "how",
    [
        Measuring(rows="fisher"),
        Measuring(rest="diagonal"),
        Measuring(rest="isotropic"),
        Measuring(largest_block=6),  # a channel's kernel, which is reversed as a whole
        Measuring(largest_block=1),
    ],
    ids=repr,
)
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("kind", TWINS)
def test_twins_are_pruned_alike_however_curvature_is_measured(kind, scope, how):
    there, here, turn, batches = make(kind)
    for net in (there, here):
        prune_model(
            net,
            TASK,
            batches,
            0.5,
            scope=scope,
            stages=1,
            gradients_per_stage=12,
            options=PruningOptions(measuring=how),
        )
    assert_alike(there, here, turn)


@pytest.mark.parametrize("kind", TWINS)
@pytest.mark.parametrize("saliency_kind", ["obd", "obs", "leverage"])
def test_twins_have_the_same_saliency_and_compensation(kind, saliency_kind):
    there, here, turn, batches = make(kind)
    scores = {}
    for which, net in (("there", there), ("here", here)):
        H = hesscurv.HessianOperator(net, TASK, batches)
        pairs = hesscurv.eigsh(H, k=6, tol=1e-10)
        found = saliency(net, pairs, saliency_kind)
        names = {m: n for n, m in net.named_modules()}
        scores[which] = {f"{names[w.module]}.weight": s for w, s in found.items()}
        masks = {n: s > s.median() for n, s in scores[which].items()}
        if saliency_kind == "obs":
            compensate_(net, masks, pairs)
    for name, s in scores["there"].items():
        # Eigenvectors to a relative residual of 1e-10, over gaps of some hundredths.
        torch.testing.assert_close(turn(name, s), scores["here"][name], rtol=1e-6, atol=1e-9)
    if saliency_kind == "obs":
        for name, p in there.named_parameters():
            other = dict(here.named_parameters())[name]
            t = turn(name.removesuffix("_orig"), p) if "weight" in name else p
            torch.testing.assert_close(t, other, rtol=1e-6, atol=1e-8)


def test_transformers_own_layer_is_known_before_and_while_it_is_pruned():
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(12, 8)
    assert find_axes(layer, "weight") == REVERSED
    scores = permuted_scores((8, 12))
    curvature_unstructured(layer, "weight", 10, scores)
    assert find_axes(layer, "weight") == REVERSED
    alive = current_mask(layer, "weight")
    curvature_nm(layer, "weight", 2, 4, scores)
    expected = n_of_m_by_sorting(scores, alive, 2, 4, dim=0)
    assert torch.equal(current_mask(layer, "weight"), expected)


# -- the table --------------------------------------------------------------------------------

LAYERS = [
    (nn.Linear(8, 3), "weight", AS_LINEAR),
    (nn.LazyLinear(3), "weight", AS_LINEAR),
    (nn.modules.linear.NonDynamicallyQuantizableLinear(8, 3), "weight", AS_LINEAR),
    (Conv1D(3, 8), "weight", REVERSED),
    (nn.Bilinear(8, 4, 3), "weight", AS_LINEAR),
    (nn.Conv1d(8, 4, 3), "weight", AS_LINEAR),
    (nn.Conv2d(8, 4, 3, groups=4), "weight", WeightAxes(0, 1, 4)),
    (nn.Conv3d(8, 4, 3), "weight", AS_LINEAR),
    (nn.ConvTranspose1d(8, 4, 3), "weight", WeightAxes(1, 0, 1, "inputs")),
    (nn.ConvTranspose2d(8, 4, 3, groups=2), "weight", WeightAxes(1, 0, 2, "inputs")),
    (nn.ConvTranspose3d(8, 4, 3), "weight", WeightAxes(1, 0, 1, "inputs")),
    (nn.Embedding(5, 8), "weight", AS_LINEAR),
    (nn.EmbeddingBag(5, 8), "weight", AS_LINEAR),
    (nn.MultiheadAttention(8, 2), "in_proj_weight", AS_LINEAR),
    (nn.MultiheadAttention(8, 2, kdim=4, vdim=4), "k_proj_weight", AS_LINEAR),
    (nn.LSTM(4, 8, 2, proj_size=2, bidirectional=True), "weight_hr_l1_reverse", AS_LINEAR),
    (nn.GRU(4, 8), "weight_ih_l0", AS_LINEAR),
    (nn.RNN(4, 8), "weight_hh_l0", AS_LINEAR),
    (nn.LSTMCell(4, 8), "weight_hh", AS_LINEAR),
    (nn.Linear(8, 3), "bias", None),
    (nn.LSTM(4, 8), "bias_ih_l0", None),
    (nn.LayerNorm((4, 8)), "weight", None),
    (nn.BatchNorm2d(8), "weight", None),
    (nn.PReLU(8), "weight", None),
    (Raw(), "weight", None),
]


@pytest.mark.parametrize(("layer", "name", "axes"), LAYERS, ids=lambda v: type(v).__name__)
def test_the_table_says_where_outputs_and_inputs_lie(layer, name, axes):
    assert find_axes(layer, name) == axes
    if axes is None:
        with pytest.raises(ValueError, match=f"'a.{name}' of a {type(layer).__name__}"):
            axes_of(layer, name, f"a.{name}")


CONVOLUTIONS = [
    (nn.Conv1d(3, 4, 3, stride=2, padding=1, dilation=2), (2, 3, 11)),
    (nn.Conv1d(3, 4, 3, padding=2, padding_mode="circular"), (2, 3, 11)),
    (nn.Conv1d(3, 4, 2, padding="valid"), (3, 11)),
    (nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), (2, 3, 5, 6)),
    (nn.Conv2d(3, 4, 3, stride=2, dilation=2, padding=(1, 2)), (2, 3, 9, 8)),
    (nn.Conv3d(2, 4, (1, 3, 3), padding="same", dilation=(1, 1, 2)), (2, 2, 4, 5, 6)),
    (nn.ConvTranspose1d(3, 4, 3, 2, 1, 1, dilation=2), (2, 3, 5)),
    (nn.ConvTranspose2d(3, 4, (3, 2), (2, 3), (1, 0), (0, 2)), (2, 3, 5, 4)),
    (nn.ConvTranspose3d(3, 4, 2, padding=1), (2, 3, 4, 4, 4)),
    (nn.ConvTranspose2d(3, 4, 1, stride=2), (3, 5, 4)),
    (nn.Linear(3, 4), (2, 5, 3)),
    (Conv1D(4, 3), (2, 5, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=lambda v: str(v)[:40])
def test_outputs_are_the_rows_of_inputs_times_the_matrix(layer, shape):
    layer = copy.deepcopy(layer).double()
    assert has_input_rows(Weight(layer, "weight"))
    nn.init.zeros_(layer.bias)
    x = torch.randn(shape).double()
    out = layer(x).detach()
    if hasattr(layer, "kernel_size"):
        out = (out if out.ndim == len(layer.kernel_size) + 2 else out[None]).movedim(1, -1)
    W = axes_of(layer, "weight").to_matrix(layer.weight.detach())
    torch.testing.assert_close(unfolded(layer, x) @ W.T, out.reshape(-1, 4))


# -- rules that follow it ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "dim"),
    [
        (nn.Linear(8, 4), 0),
        (Conv1D(4, 8), 1),
        (nn.Conv2d(8, 4, 3, groups=2), 0),
        (nn.ConvTranspose2d(8, 4, 3), 1),
        (nn.Embedding(5, 8), 0),
    ],
    ids=lambda v: type(v).__name__,
)
def test_structured_pruning_takes_outputs_by_default(layer, dim):
    layer = copy.deepcopy(layer)
    scores = permuted_scores(layer.weight.shape)
    curvature_structured(layer, "weight", 2, importance_scores=scores)
    alive = torch.ones(scores.shape, dtype=torch.bool)
    expected = lowest_slices_by_sorting(scores, alive, dim, 2)
    assert torch.equal(current_mask(layer, "weight"), expected)


def test_outputs_of_a_grouped_transposed_convolution_are_no_slices():
    layer = nn.ConvTranspose2d(8, 4, 3, groups=2)
    scores = permuted_scores(layer.weight.shape)
    with pytest.raises(ValueError, match=r"groups=2, .*pass dim=1"):
        curvature_structured(layer, "weight", 1, importance_scores=scores)
    assert current_mask(layer, "weight") is None
    curvature_structured(layer, "weight", 1, 1, scores)
    assert int(current_mask(layer, "weight").sum()) == scores.numel() // 2


@pytest.mark.parametrize("given", [None, 0])
def test_patterns_do_not_reach_from_one_group_of_inputs_into_the_next(given):
    layer = nn.ConvTranspose1d(12, 4, 3, groups=2)  # 6 inputs a group
    scores = permuted_scores(layer.weight.shape)
    with pytest.raises(ValueError, match=r"m=4 divides, got 6 for 'weight' of a ConvTranspose1d"):
        curvature_nm(layer, "weight", 2, 4, scores, dim=given)
    assert current_mask(layer, "weight") is None
    assert not Pattern(2, 4).fits(Weight(layer, "weight"), (12, 2, 3))
    assert Pattern(1, 3).fits(Weight(layer, "weight"), (12, 2, 3))
    curvature_nm(layer, "weight", 1, 3, scores, dim=given)
    groups = current_mask(layer, "weight").unflatten(0, (2, 2, 3))
    assert bool((groups.sum(2) == 1).all())


# -- layers that the table does not know ------------------------------------------------------


@pytest.fixture
def no_registrations(monkeypatch):
    monkeypatch.setattr(weight_axes, "_REGISTERED", {})


def raw_setting():
    torch.manual_seed(0)
    return Raw().double(), [(torch.randn(16, 8).double(), torch.randint(3, (16,)))]


@pytest.mark.parametrize(
    "call",
    [
        lambda m, b: prune_model(m, TASK, b, structure="2:4", stages=1),
        lambda m, b: curvature_nm(m, "weight", 2, 4, permuted_scores((8, 3))),
        lambda m, b: curvature_structured(
            m, "weight", 1, importance_scores=permuted_scores((8, 3))
        ),
    ],
    ids=["prune_model", "n of m", "structured"],
)
def test_an_unknown_layer_is_refused_by_name_where_its_inputs_matter(call):
    net, batches = raw_setting()
    before = net.weight.detach().clone()
    with pytest.raises(ValueError, match=r"got 'weight' of a Raw; .*register_weight_axes\(Raw"):
        call(net, batches)
    assert masks_of(net) == {}
    assert torch.equal(net.weight, before)


def test_an_unknown_layer_is_pruned_where_they_do_not():
    net, batches = raw_setting()
    report = prune_model(net, TASK, batches, 0.5, stages=1, gradients_per_stage=8)
    assert report.kept == 12
    curvature_nm(net, "weight", 1, 4, permuted_scores((8, 3)), dim=0)
    curvature_structured(net, "weight", 1, 1, permuted_scores((8, 3)))


@pytest.mark.usefixtures("no_registrations")
def test_a_layer_of_ones_own_is_registered():
    class Child(Raw):
        pass

    register_weight_axes(Raw, outputs=1, inputs=0)
    assert find_axes(Child(), "weight") == REVERSED
    assert find_axes(Child(), "other") is None
    net, batches = raw_setting()
    prune_model(net, TASK, batches, structure="2:4", stages=1, gradients_per_stage=8)
    assert bool((current_mask(net, "weight").view(2, 4, 3).sum(1) == 2).all())
    register_weight_axes(Child, outputs=0, inputs=1)
    assert find_axes(Child(), "weight") == AS_LINEAR
    assert find_axes(Raw(), "weight") == REVERSED


@pytest.mark.usefixtures("no_registrations")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Raw(), 0, 1), TypeError, "expected a subclass of torch.nn.Module"),
        ((int, 0, 1), TypeError, "expected a subclass of torch.nn.Module"),
        ((Raw, 0.0, 1), TypeError, "expected outputs as an int, got 0.0"),
        ((Raw, 0, True), TypeError, "expected inputs as an int, got True"),
        ((Raw, -1, 0), ValueError, "not negative, got -1"),
        ((Raw, 1, 1), ValueError, "two dimensions, got 1 for both"),
    ],
)
def test_wrong_registrations_are_refused(arguments, error, message):
    cls, outputs, inputs = arguments
    with pytest.raises(error, match=message):
        register_weight_axes(cls, outputs=outputs, inputs=inputs)
    assert weight_axes._REGISTERED == {}


def test_reversed_weights_are_named_where_a_gpu_format_cannot_take_them():
    net = nn.Sequential(Conv1D(8, 8))
    curvature_nm(net[0], "weight", 2, 4, permuted_scores((8, 8)))
    with pytest.raises(ValueError, match=r"\['0.weight'\] \(1 in all\) lie the other way"):
        to_semi_structured_(net)


def test_parameters_with_torchs_suffixes_in_their_own_names_are_scored():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight_orig = nn.Parameter(torch.randn(8, 3))
            self.weight_x = nn.Parameter(torch.randn(8, 3))

        def forward(self, x):
            return x @ (self.weight_orig + 2 * self.weight_x)

    torch.manual_seed(0)
    net = Named().double()
    batches = [(torch.randn(16, 8).double(), torch.randint(3, (16,)))]
    pairs = hesscurv.eigsh(hesscurv.HessianOperator(net, TASK, batches), k=3, tol=1e-10)
    scores = saliency(net, pairs, "leverage")
    assert {w.name for w in scores} == {"weight_orig", "weight_x"}
    found = scores[Weight(net, "weight_x")]
    torch.testing.assert_close(found, 4 * scores[Weight(net, "weight_orig")], rtol=1e-6, atol=1e-9)
    assert current_parameter(net, "weight_orig") is net.weight_orig
