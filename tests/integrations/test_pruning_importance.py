"""Importances for torch-pruning: exact forms of whole channels, and real models that get pruned.

What a channel takes along is found by taking it: a copy whose entries are their own numbers is
pruned by torch-pruning, and the numbers that are gone are the channel's.
"""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import hesscurv
from hesscurv.integrations import EigenspaceImportance, FisherImportance, macs_per_entry
from hesscurv.integrations.joint_ranking import backward_elimination
from hesscurv.operators.parameters import layout_of, select_parameters

TASK = hesscurv.supervised(nn.CrossEntropyLoss())


# -- networks -----------------------------------------------------------------------------------


class Plain(nn.Module):
    """Convolutions with batch norm, a flatten with four entries a channel, dense layers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.fc1, self.fc2 = nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.adaptive_avg_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        return self.fc2(torch.tanh(self.fc1(x.flatten(1))))


class Residual(nn.Module):
    """A stream where one weight loses rows and columns together, and a branch of its own width."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.square = nn.Conv2d(4, 4, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(4, 3, 1), nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + torch.tanh(self.square(x))
        x = self.norm(x + self.outer(torch.tanh(self.inner(x))))
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """Concatenations, as in DenseNet."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.a, self.b = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(7, 3, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(10), nn.Linear(10, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = torch.cat([x, F.relu(self.a(x))], 1)
        x = torch.cat([x, F.relu(self.b(x))], 1)
        return self.head(self.norm(x).mean((2, 3)))


class Depthwise(nn.Module):
    """A depthwise and a transposed convolution, a slope for each channel, group norm."""

    def __init__(self):
        super().__init__()
        self.widen, self.depthwise = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.act, self.up = nn.PReLU(6), nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.one_slope, self.head = nn.PReLU(), nn.Linear(4, 3)

    def forward(self, x):
        x = self.act(self.depthwise(self.widen(x)))
        return self.head(self.one_slope(self.up(x)).mean((2, 3)))


class ViT(nn.Module):
    """Class token and positions outside of layers, layer norm, attention by torch's own module."""

    def __init__(self, width=8, heads=2, depth=2, own_attention=False):
        super().__init__()
        self.patch = nn.Conv2d(2, width, 2, stride=2)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 10, width))
        kind = OwnAttention if own_attention else TorchAttention
        self.blocks = nn.ModuleList(
            nn.ModuleList(self.block(kind, width, heads)) for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    @staticmethod
    def block(kind, width, heads):
        mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        return nn.LayerNorm(width), kind(width, heads), nn.LayerNorm(width), mlp

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        for norm1, attention, norm2, mlp in self.blocks:
            x = x + attention(norm1(x))
            x = x + mlp(norm2(x))
        return self.head(self.norm(x)[:, 0])


class TorchAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class OwnAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x):
        n, length, _ = x.shape
        q, k, v = (
            f(x).view(n, length, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        weights = torch.softmax(q @ k.transpose(2, 3) / q.shape[3] ** 0.5, 3)
        return self.out((weights @ v).transpose(1, 2).reshape(n, length, -1))


class CifarResNet(nn.Module):
    """A short ResNet-56: three widths, projections where they change."""

    class Block(nn.Module):
        def __init__(self, fan_in, fan_out, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(fan_out)
            self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(fan_out)
            same = fan_in == fan_out
            self.short = nn.Identity() if same else nn.Conv2d(fan_in, fan_out, 1, stride)

        def forward(self, x):
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            return F.relu(y + self.short(x))

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        widths = [(8, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 32, 2), (32, 32, 1)]
        self.blocks = nn.Sequential(*(self.Block(*w) for w in widths))
        self.linear = nn.Linear(32, 3)

    def forward(self, x):
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.linear(x.mean((2, 3)))


NETWORKS = {
    "plain": Plain,
    "residual": Residual,
    "dense": Dense,
    "depthwise": Depthwise,
    "vit": ViT,
    "own attention": lambda: ViT(own_attention=True),
}
EXAMPLE = torch.zeros(1, 2, 6, 6)


def build(name):
    """A network in float64 whose batch norms are those of a trained one."""
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for t in (module.weight, module.bias, module.running_mean):
                    t.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def data(sizes=(5, 3), dtype=torch.float64):
    return [(torch.randn(n, 2, 6, 6, dtype=dtype), torch.randint(3, (n,))) for n in sizes]


def graph_of(model, **options):
    example = EXAMPLE.to(next(model.parameters()).dtype)
    given = [
        (p, p.ndim - 1) for n, p in model.named_parameters() if n in ("cls_token", "pos_embed")
    ]
    graph = tp.DependencyGraph()
    return graph.build_dependency(model, example, unwrapped_parameters=given or None, **options)


def groups_of(model):
    return list(graph_of(model).get_all_groups(ignored_layers=[last_layer(model)]))


def group_of(model, layer):
    """The group with the outputs of one layer."""
    found = graph_of(model)
    roots = dict(model.named_modules())
    for group in found.get_all_groups(ignored_layers=[last_layer(model)]):
        if group[0].dep.target.module is roots[layer]:
            return group
    raise AssertionError(layer)


def last_layer(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]


def random_pairs(model, k=4, params=None):
    """Eigenpairs of both signs of no matrix in particular."""
    layout = layout_of(select_parameters(model, params))
    vectors = torch.linalg.qr(torch.randn(layout.numel, k, dtype=torch.float64)).Q
    values = torch.tensor([5.0, -3.0, 2.0, 1.0, -0.5, 0.2], dtype=torch.float64)[:k]
    return hesscurv.Eigenpairs(
        values, vectors, torch.zeros(k), torch.ones(k, dtype=torch.bool), 0, layout=layout
    )


# -- an independent way to a channel's entries --------------------------------------------------


def entries_of_channels(model, group):
    """For each channel, a mask (D,) of what is gone once torch-pruning has taken it."""
    root = {m: n for n, m in model.named_modules()}[group[0].dep.target.module]
    masks = []
    for channel in range(len(group[0].idxs)):
        numbered = copy.deepcopy(model)
        graph = graph_of(numbered)
        layout = layout_of(dict(numbered.named_parameters()))
        numbers = layout.split(torch.arange(layout.numel, dtype=torch.float64))
        with torch.no_grad():
            for name, p in numbered.named_parameters():
                p.copy_(numbers[name])
        module = numbered.get_submodule(root)
        handler = group[0].dep.handler
        graph.get_pruning_group(module, handler, [channel]).prune()
        gone = torch.ones(layout.numel, dtype=torch.bool)
        for p in numbered.parameters():
            gone[p.detach().long().flatten()] = False
        masks.append(gone)
    return torch.stack(masks)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def sample_gradients(model, batches):
    rows = []
    for x, y in batches:
        for i in range(len(x)):
            loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
            slopes = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        torch.zeros(p.numel(), dtype=p.dtype) if s is None else s.flatten()
                        for s, p in zip(slopes, model.parameters(), strict=True)
                    ]
                )
            )
    return torch.stack(rows)


def gauss_newton(model, batches):
    """The matrix by an explicit Jacobian of the outputs and the softmax's covariance."""
    total, count = 0, 0
    for x, _ in batches:
        for i in range(len(x)):
            out = model(x[i : i + 1])[0]
            jacobian = torch.stack(
                [
                    torch.cat(
                        [
                            torch.zeros(p.numel(), dtype=p.dtype) if s is None else s.flatten()
                            for s, p in zip(
                                torch.autograd.grad(
                                    z,
                                    list(model.parameters()),
                                    retain_graph=True,
                                    allow_unused=True,
                                ),
                                model.parameters(),
                                strict=True,
                            )
                        ]
                    )
                    for z in out
                ]
            )
            p = torch.softmax(out.detach(), 0)
            total = total + jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian
            count += 1
    return total / count


def forms(matrix, weights, masks):
    """``1/2 w_C^T A w_C`` with all entries outside of the channel zero."""
    rows = masks * weights
    return 0.5 * torch.einsum("ci,ij,cj->c", rows, matrix, rows)


# -- exactness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_eigenspace_scores_are_the_quadratic_form_of_the_whole_channel(name):
    model = build(name)
    pairs, w = random_pairs(model), flat(model)
    V, scale = pairs.eigenvectors, pairs.eigenvalues.abs()
    d = torch.rand(len(w), dtype=torch.float64)
    expected = {
        "joint": ({}, (V * scale) @ V.T),
        "diagonal": ({}, torch.diag((V**2) @ scale)),
        "residual": ({"diagonal": d}, (V * scale) @ V.T + d.diag()),
        "diagonal with residual": ({"kind": "diagonal", "diagonal": d}, None),
    }
    expected["diagonal"][0]["kind"] = "diagonal"
    for group in groups_of(model):
        masks = entries_of_channels(model, group)
        assert masks.any(1).all()
        for options, matrix in expected.values():
            if matrix is None:
                matrix = torch.diag((V**2) @ scale + d)
            scores = EigenspaceImportance(model, pairs, **options)(group)
            torch.testing.assert_close(scores, forms(matrix, w, masks))
        scores = EigenspaceImportance(model, pairs, kind="leverage")(group)
        torch.testing.assert_close(scores, (masks * V.square().sum(1)).sum(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_fisher_scores_are_a_loop_over_the_samples(name):
    model, batches = build(name), data()
    w, rows = flat(model), sample_gradients(model, batches)
    importance = FisherImportance(model, TASK, batches)
    for group in groups_of(model):
        masks = entries_of_channels(model, group)
        expected = 0.5 * (rows @ (masks * w).T).square().mean(0)
        torch.testing.assert_close(importance(group), expected)


def test_gauss_newton_rows_have_the_matrix_as_their_mean_square():
    model, batches = build("plain"), data((2,))
    group = group_of(model, "conv1")
    expected = forms(gauss_newton(model, batches), flat(model), entries_of_channels(model, group))
    importance = FisherImportance(model, TASK, batches, rows="ggn", draws=400, chunk_size=2)
    # 400 draws of a square, for two samples: a standard error of 5 % at most.
    torch.testing.assert_close(importance(group), expected, rtol=0.2, atol=0)


def test_rows_of_one_output_need_no_luck():
    # With one output a sign squares away: the mean square is the matrix, at any draw.
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    task = hesscurv.supervised(nn.MSELoss())
    graph = tp.DependencyGraph().build_dependency(model, x[:1])
    group = graph.get_pruning_group(model[0], tp.prune_linear_out_channels, list(range(5)))
    G = hesscurv.GGNOperator(model, task, [(x, y)]) @ torch.eye(31, dtype=torch.float64)
    scores = FisherImportance(model, task, [(x, y)], rows="ggn")(group)
    torch.testing.assert_close(scores, forms(G, flat(model), entries_of_channels_of(group, model)))


def entries_of_channels_of(group, model):
    masks = torch.zeros(5, 31, dtype=torch.bool)
    for c in range(5):  # 0.weight (5, 4), 0.bias (5,), 2.weight (1, 5), 2.bias (1,)
        masks[c, 4 * c : 4 * c + 4] = masks[c, 20 + c] = masks[c, 25 + c] = True
    return masks


def test_grouped_convolutions_count_their_own_group():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 1, bias=False), nn.Conv2d(6, 4, 1, groups=2, bias=False)
    ).double()
    pairs, w = random_pairs(model), flat(model)
    graph = graph_of(model)
    group = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, list(range(6)))
    group_items = [item for item in group if item.dep.target.module is model[1]]
    masks = torch.zeros(6, len(w), dtype=torch.bool)
    for c in range(6):
        masks[c, 2 * c : 2 * c + 2] = True  # (6, 2)
        for row in range(2):  # (4, 3): outputs 2 g and 2 g + 1 read inputs 3 g .. 3 g + 2
            masks[c, 12 + 3 * (2 * (c // 3) + row) + c % 3] = True
    read = {item.dep.handler for item in group_items}
    assert tp.prune_conv_in_channels in read
    if tp.prune_conv_out_channels in read:  # torch-pruning couples the outputs, too
        pytest.skip("this torch-pruning couples both sides of a grouped convolution")
    matrix = (pairs.eigenvectors * pairs.eigenvalues.abs()) @ pairs.eigenvectors.T
    torch.testing.assert_close(EigenspaceImportance(model, pairs)(group), forms(matrix, w, masks))


def test_readers_remove_the_channel_by_themselves():
    model = build("plain")
    pairs, w = random_pairs(model), flat(model)
    slices = pairs.layout.slices()
    matrix = (pairs.eigenvectors * pairs.eigenvalues.abs()) @ pairs.eigenvectors.T
    x = data((4,))[0][0]
    for layer, reader, width in [
        ("conv1", "conv2.weight", 1),
        ("conv2", "fc1.weight", 4),
        ("fc1", "fc2.weight", 1),
    ]:
        group = group_of(model, layer)
        count = len(group[0].idxs)
        masks = torch.zeros(count, len(w), dtype=torch.bool)
        shape = dict(model.named_parameters())[reader].shape
        for c in range(count):
            part = torch.zeros(shape, dtype=torch.bool)
            part[:, c * width : (c + 1) * width] = True
            masks[c, slices[reader]] = part.flatten()
        scores = EigenspaceImportance(model, pairs, weights="readers")(group)
        torch.testing.assert_close(scores, forms(matrix, w, masks))
        for channel in (0, count - 1):
            without, pruned = copy.deepcopy(model), copy.deepcopy(model)
            with torch.no_grad():
                for p, m in zip(
                    without.parameters(), pairs.layout.split(masks[channel]).values(), strict=True
                ):
                    p[m] = 0
            name = {m: n for n, m in model.named_modules()}[group[0].dep.target.module]
            root = pruned.get_submodule(name)
            graph_of(pruned).get_pruning_group(root, group[0].dep.handler, [channel]).prune()
            torch.testing.assert_close(without(x), pruned(x))


def test_part_of_a_group_is_scored_in_the_order_given():
    model = build("plain")
    importance = EigenspaceImportance(model, random_pairs(model))
    graph = graph_of(model)
    whole = importance(graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, range(5)))
    part = importance(graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, [3, 0, 2]))
    torch.testing.assert_close(part, whole[[3, 0, 2]])


def test_parameters_that_were_not_measured_count_nothing():
    model = build("plain")
    pairs = random_pairs(model, params=["conv1.weight", "conv1.bias"])
    importance = EigenspaceImportance(model, pairs)
    group, other = group_of(model, "conv1"), group_of(model, "conv2")
    masks = entries_of_channels(model, group)[:, : pairs.layout.numel]
    matrix = (pairs.eigenvectors * pairs.eigenvalues.abs()) @ pairs.eigenvectors.T
    w = flat(model)[: pairs.layout.numel]
    torch.testing.assert_close(importance(group), forms(matrix, w, masks))
    with pytest.raises(ValueError, match=r"none of the parameters .*bn2.* was measured"):
        importance(other)


# -- options ------------------------------------------------------------------------------------


def test_layers_are_reduced_as_asked():
    model = build("plain")
    pairs, group = random_pairs(model), group_of(model, "conv1")
    score = lambda how: EigenspaceImportance(model, pairs, group_reduction=how)(group)  # noqa: E731
    layers = score(None)
    assert layers.shape == (3, 5)  # conv1, bn1, conv2
    torch.testing.assert_close(score("mean"), layers.mean(0))
    torch.testing.assert_close(score("max"), layers.amax(0))
    torch.testing.assert_close(score("prod"), layers.prod(0))
    torch.testing.assert_close(score("first"), layers[0])
    # Jointly is not one by one.
    assert not torch.allclose(score("sum"), layers.sum(0))


@pytest.mark.parametrize(
    "normalizer", [None, "sum", "mean", "max", "standarization", "gaussian", "sentinel_0.5", "lamp"]
)
def test_normalizers_are_those_of_torch_pruning(normalizer):
    model = build("plain")
    group, pairs = groups_of(model)[0], random_pairs(model)
    raw = EigenspaceImportance(model, pairs)(group)
    scores = EigenspaceImportance(model, pairs, normalizer=normalizer)(group)
    theirs = tp.importance.GroupMagnitudeImportance(normalizer=normalizer)
    expected = theirs._normalize(raw.float(), normalizer)  # lamp makes float32
    torch.testing.assert_close(scores.float(), expected, rtol=1e-5, atol=1e-6)


def test_a_normalizer_may_be_a_function():
    model = build("plain")
    group, pairs = groups_of(model)[0], random_pairs(model)
    scores = EigenspaceImportance(model, pairs, normalizer=torch.log)(group)
    torch.testing.assert_close(scores, EigenspaceImportance(model, pairs)(group).log())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "obd"}, "expected kind"),
        ({"group_reduction": "joint"}, "expected group_reduction"),
        ({"normalizer": "median"}, "expected normalizer"),
        ({"normalizer": "sentinel_2"}, "expected normalizer"),
        ({"weights": "writers"}, "expected weights"),
        ({"kind": "leverage", "diagonal": torch.ones(3)}, "no diagonal"),
        ({"diagonal": torch.ones(3)}, "diagonal of shape"),
    ],
)
def test_unknown_options_are_refused(options, message):
    model = build("plain")
    with pytest.raises(ValueError, match=message):
        EigenspaceImportance(model, random_pairs(model), **options)


@pytest.mark.parametrize("options", [{"rows": "hessian"}, {"draws": 2}, {"chunk_size": 0}])
def test_unknown_rows_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        FisherImportance(build("plain"), TASK, data(), **options)


def test_wrong_types_are_refused():
    model = build("plain")
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        EigenspaceImportance(model.forward, random_pairs(model))
    with pytest.raises(TypeError, match="Eigenpairs"):
        EigenspaceImportance(model, random_pairs(model).eigenvectors)
    bare = random_pairs(model)
    bare = hesscurv.Eigenpairs(
        bare.eigenvalues, bare.eigenvectors, bare.residuals, bare.converged, 0
    )
    with pytest.raises(ValueError, match="layout"):
        EigenspaceImportance(model, bare)


# -- costs and joint ranking --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "residual", "dense", "depthwise"])
def test_costs_are_the_multiply_adds_that_a_channel_takes_along(name):
    model = build(name)
    costs, pairs, example = (
        macs_per_entry(model, EXAMPLE.double()),
        random_pairs(model),
        EXAMPLE.double(),
    )
    per_entry = torch.cat(
        [
            torch.full((p.numel(),), costs.get(name, 0.0), dtype=torch.float64)
            for name, p in model.named_parameters()
        ]
    )
    first = next(n for n, p in model.named_parameters() if p.ndim == 4)
    assert costs[first] == 36  # images of 6 x 6
    assert macs_per_entry(model, torch.cat([example] * 3)) == costs
    for group in groups_of(model):
        plain = EigenspaceImportance(model, pairs)(group)
        scores = EigenspaceImportance(model, pairs, costs=costs)(group)
        expected = plain / (entries_of_channels(model, group) * per_entry).sum(1)
        torch.testing.assert_close(scores, expected, rtol=1e-6, atol=0)


def test_a_transposed_kernel_meets_every_input_once():
    assert macs_per_entry(build("depthwise"), EXAMPLE.double())["up.weight"] == 36


def test_costs_that_cannot_divide_are_refused():
    model = build("plain")
    for cost in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite costs"):
            EigenspaceImportance(model, random_pairs(model), costs={"conv1.weight": cost})
    importance = EigenspaceImportance(model, random_pairs(model), costs={"fc2.weight": 1.0})
    with pytest.raises(ValueError, match=r"costs of the channels in the group of conv1"):
        importance(group_of(model, "conv1"))


def test_counting_leaves_the_model_alone():
    model = build("plain").train()
    state = copy.deepcopy(model.state_dict())
    macs_per_entry(model, EXAMPLE.double())
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())


def test_channels_that_cancel_go_together_and_one_of_two_equals_stays():
    rows = torch.tensor([[3.0, -3.0, 2.0, 2.0, 9.0], [0.1, 0.0, 0.0, 0.0, 9.0]]).double()
    one, nothing = torch.ones(5).double(), torch.zeros(5).double()
    order = backward_elimination(rows, nothing, one, torch.zeros(5, dtype=torch.int64)).argsort()
    # 2 goes first (1/2 4); then 1, which takes the sum from 2 to -1; then 3, from -1 to 1 ...
    assert order.tolist() == [2, 1, 3, 0, 4]
    order = backward_elimination(rows, nothing, one, torch.tensor([0, 0, 1, 1, 1])).argsort()
    assert {0, 1} != set(order[:2].tolist())  # one of the first group stays to the end
    costly = torch.tensor([1.0, 1, 1, 1, 1e6]).double()
    order = backward_elimination(rows, nothing, costly, torch.zeros(5, dtype=torch.int64)).argsort()
    assert order[0] == 4


def test_a_joint_ranking_removes_what_raises_the_form_least():
    model = build("plain")
    pairs, w = random_pairs(model, 6), flat(model)
    pruner = tp.pruner.BasePruner(
        model,
        EXAMPLE.double(),
        importance := EigenspaceImportance(model, pairs),
        global_pruning=True,
        pruning_ratio=0.3,
        ignored_layers=[model.fc2],
    )
    masks, groups = [], groups_of(model)
    for g, group in enumerate(groups):
        masks += [(g, m) for m in entries_of_channels(model, group)]
    matrix = (pairs.eigenvectors * pairs.eigenvalues.abs()) @ pairs.eigenvectors.T
    vectors = torch.stack([m * w for _, m in masks])
    gone, left = [], [len(group[0].idxs) for group in groups]
    for _ in range(5):
        rises = {
            c: float((v := vectors[[*gone, c]].sum(0)) @ matrix @ v)
            for c, (g, _) in enumerate(masks)
            if c not in gone and left[g] > 1
        }
        gone.append(min(rises, key=rises.get))
        left[masks[gone[-1]][0]] -= 1
    importance.rank_jointly(pruner)
    own = {group[0].dep.target.name: importance(group) for group in groups_in(pruner)}
    ranks = torch.cat([own[group[0].dep.target.name] for group in groups])
    assert ranks.argsort()[:5].tolist() == gone
    pruner.step()
    assert torch.isfinite(model(data()[0][0])).all()


def groups_in(pruner):
    return pruner.DG.get_all_groups(
        ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
    )


@pytest.mark.parametrize("options", [{"normalizer": "mean"}, {"group_reduction": "max"}])
def test_a_joint_ranking_has_no_unit_and_no_layers(options):
    model = build("plain")
    with pytest.raises(ValueError, match="for a joint ranking"):
        EigenspaceImportance(model, random_pairs(model), **options).rank_jointly(None)
    with pytest.raises(ValueError, match="for a joint ranking"):
        EigenspaceImportance(model, random_pairs(model), kind="diagonal").rank_jointly(None)


def test_iterative_joint_ranking_reaches_the_ratio():
    torch.manual_seed(0)
    model, batches = CifarResNet().eval(), data(dtype=torch.float32)
    importance = FisherImportance(
        model, TASK, batches, rows="ggn", costs=macs_per_entry(model, EXAMPLE)
    )
    pruner = tp.pruner.BasePruner(
        model,
        EXAMPLE,
        importance,
        global_pruning=True,
        pruning_ratio=0.5,
        iterative_steps=3,
        ignored_layers=[model.linear],
    )
    importance.rank_jointly(pruner)
    before = sum(len(g[0].idxs) for g in groups_in(pruner))
    for _ in range(3):
        pruner.step()
    after = sum(len(g[0].idxs) for g in groups_in(pruner))
    assert after / before == pytest.approx(0.5, abs=0.03)
    assert torch.isfinite(model(batches[0][0])).all()


# -- samples and what is left behind ------------------------------------------------------------


@pytest.mark.parametrize("rows", ["fisher", "ggn"])
def test_batch_and_chunk_size_do_not_matter(rows):
    model, (batch,) = build("residual"), data((8,))
    cut = [(batch[0][i:j], batch[1][i:j]) for i, j in [(0, 3), (3, 4), (4, 8)]]
    group = groups_of(model)[0]
    score = lambda batches, chunk: FisherImportance(  # noqa: E731
        model, TASK, batches, rows=rows, chunk_size=chunk
    )(group)
    whole = score([batch], 8)
    if rows == "ggn":  # the signs are drawn chunk by chunk: equal in distribution alone
        assert whole.shape == score(cut, 2).shape
        torch.testing.assert_close(whole, score([batch], 8), rtol=0, atol=0)
        return
    for batches, chunk in [(cut, None), (cut, 1), ([batch], 3)]:
        torch.testing.assert_close(score(batches, chunk), whole)


def test_weighted_batches_count_by_their_weight():
    class Doubled(type(TASK)):
        def weight(self, batch):
            return 2.0 if len(batch[1]) == 3 else 1.0

    model, batches = build("plain"), data((5, 3))
    group = groups_of(model)[0]
    task = Doubled(nn.CrossEntropyLoss())
    parts = [FisherImportance(model, TASK, [b])(group) for b in batches]
    scores = FisherImportance(model, task, batches)(group)
    torch.testing.assert_close(scores, (parts[0] + 2 * parts[1]) / 3)


def test_operations_without_a_rule_for_vmap_are_taken_one_by_one():
    class Branching(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x if float(x.abs().sum()) > 0 else -x)

    model, batches = Branching(build("plain")), data()
    scores = FisherImportance(model, TASK, batches)(groups_of(model)[0])
    expected = FisherImportance(model.inner, TASK, batches)(groups_of(model.inner)[0])
    torch.testing.assert_close(scores, expected)


def test_nothing_of_the_model_is_touched():
    model, batches = build("plain"), data()
    model.train()
    model.bn1.eval()
    model.conv1.weight.grad = torch.full_like(model.conv1.weight, 7.0)
    calls = []
    model.conv1.weight.register_hook(lambda g: calls.append("gradient"))
    model.conv2.register_full_backward_hook(lambda *a: calls.append("backward"))
    group = groups_of(model)[0]
    model.train()
    model.bn1.eval()
    state = copy.deepcopy(model.state_dict())
    versions = [t._version for t in [*model.parameters(), *model.buffers()]]
    modes = [m.training for m in model.modules()]
    random_states = (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))
    for rows in ("fisher", "ggn"):
        FisherImportance(model, TASK, batches, rows=rows)(group)
        EigenspaceImportance(model, random_pairs_of(model))(group)
    assert not calls
    assert [m.training for m in model.modules()] == modes
    assert [t._version for t in [*model.parameters(), *model.buffers()]] == versions
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert bool((model.conv1.weight.grad == 7).all())
    assert all(p.grad is None for n, p in model.named_parameters() if n != "conv1.weight")
    assert torch.equal(random_states[0], torch.get_rng_state())
    assert random_states[1:] == (random.getstate(), str(np.random.get_state()))


def random_pairs_of(model):
    """`random_pairs`, without drawing from the global generator."""
    with torch.random.fork_rng([]):
        return random_pairs(model)


# -- what is refused ----------------------------------------------------------------------------


def test_nan_is_refused():
    model = build("plain")
    pairs, group = random_pairs(model), group_of(model, "conv1")
    pairs.eigenvectors[3, 0] = torch.nan
    with pytest.raises(ValueError, match=r"expected finite scores for the group of conv1"):
        EigenspaceImportance(model, pairs)(group)
    batches = data()
    batches[0][0][0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="expected finite scores"):
        FisherImportance(model, TASK, batches)(group)


def test_ties_are_refused():
    model = build("plain")
    group = group_of(model, "conv2")
    with torch.no_grad():
        model.bn2.weight.zero_()
        model.bn2.bias.fill_(-1)  # no channel is ever active
        for layer in (model.conv2, model.fc1):
            layer.weight.zero_()
    with pytest.raises(ValueError, match=r"scores that differ within the group of conv2"):
        FisherImportance(model, TASK, data())(group)


def test_masked_and_computed_weights_are_refused():
    model = build("plain")
    group = group_of(model, "conv1")
    with torch.no_grad():
        prune.l1_unstructured(model.conv2, "weight", amount=0.4)
    importance = EigenspaceImportance(model, lambda m: random_pairs(m))
    with pytest.raises(ValueError, match=r"masked by torch.nn.utils.prune.*prune.remove"):
        importance(group)
    prune.remove(model.conv2, "weight")
    assert importance(group).shape == (5,)
    parametrizations.weight_norm(model.conv1)
    with pytest.raises(ValueError, match="computed from other parameters"):
        importance(group)


def test_torch_pruning_itself_breaks_masked_layers():
    # The reason for refusing them; once this no longer fails, they can be let through.
    model = build("plain")
    with torch.no_grad():
        prune.l1_unstructured(model.conv2, "weight", amount=0.4)
    group = graph_of(model).get_pruning_group(model.conv1, tp.prune_conv_out_channels, [0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it reads the gradient of a tensor that has none
        group.prune()
    with pytest.raises((TypeError, RuntimeError, KeyError)):
        model(data()[0][0])


def test_a_group_of_another_model_is_refused():
    model, other = build("plain"), build("plain")
    importance = EigenspaceImportance(model, random_pairs(model))
    with pytest.raises(ValueError, match="not the model's"):
        importance(groups_of(other)[0])


def test_fixed_pairs_serve_one_step():
    model = build("plain")
    importance = EigenspaceImportance(model, random_pairs(model))
    graph = graph_of(model)
    graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, [1]).prune()
    group = graph.get_pruning_group(model.conv2, tp.prune_conv_out_channels, list(range(4)))
    with pytest.raises(ValueError, match=r"pass a function"):
        importance(group)


# -- steps --------------------------------------------------------------------------------------


def test_a_function_is_called_once_for_each_state_of_the_model():
    model, calls = build("plain"), []

    def compute(given):
        calls.append([tuple(p.shape) for p in given.parameters()])
        return random_pairs(given)

    importance = EigenspaceImportance(model, compute)
    graph = graph_of(model)
    for group in graph.get_all_groups(ignored_layers=[model.fc2]):
        importance(group)
    assert len(calls) == 1
    graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, [1]).prune()
    for group in graph.get_all_groups(ignored_layers=[model.fc2]):
        assert importance(group).shape == (len(group[0].idxs),)
    assert len(calls) == 2
    with torch.no_grad():
        model.fc1.weight.mul_(2)  # a step of training
    importance(group)
    assert len(calls) == 3


def test_a_failed_measurement_leaves_no_stale_scores():
    model, fails = build("plain"), []

    def compute(given):
        if fails:
            raise RuntimeError("no more")
        return random_pairs(given)

    importance, group = EigenspaceImportance(model, compute), group_of(model, "conv1")
    importance(group)
    with torch.no_grad():
        model.fc1.weight.mul_(2)
    fails.append(True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no more"):
            importance(group)


def test_scores_of_a_pruned_model_are_those_of_a_new_importance():
    model, batches = build("residual"), data()
    importance = FisherImportance(model, TASK, batches)
    graph = graph_of(model)
    importance(next(iter(graph.get_all_groups(ignored_layers=[model.head]))))
    graph.get_pruning_group(model.stem, tp.prune_conv_out_channels, [2]).prune()
    for group in graph.get_all_groups(ignored_layers=[model.head]):
        expected = FisherImportance(model, TASK, batches)(group)
        torch.testing.assert_close(importance(group), expected, rtol=0, atol=0)


def importances(model, batches):
    def compute(given):
        H = hesscurv.GGNOperator(given, TASK, batches, way="retained")
        return hesscurv.eigsh(H, k=3, method="single_pass", tol=0.5)

    return {
        "eigenspace": EigenspaceImportance(model, compute),
        "fisher": FisherImportance(model, TASK, batches),
        "ggn": FisherImportance(model, TASK, batches, rows="ggn", weights="readers"),
    }


@pytest.mark.parametrize("kind", ["eigenspace", "fisher", "ggn"])
@pytest.mark.parametrize("is_global", [True, False])
def test_iterative_pruning_reaches_the_ratio(kind, is_global):
    torch.manual_seed(0)
    model, batches = CifarResNet().eval(), data(dtype=torch.float32)
    pruner = tp.pruner.BasePruner(
        model,
        EXAMPLE,
        importances(model, batches)[kind],
        global_pruning=is_global,
        pruning_ratio=0.5,
        max_pruning_ratio=0.9,
        iterative_steps=3,
        ignored_layers=[model.linear],
    )
    widths = lambda: sum(  # noqa: E731
        len(g[0].idxs) for g in pruner.DG.get_all_groups(ignored_layers=[model.linear])
    )
    before, seen = widths(), []
    for _ in range(3):
        pruner.step()
        seen.append(widths() / before)
        assert torch.isfinite(model(batches[0][0])).all()
    assert seen[0] > seen[1] > seen[2]
    assert seen[2] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("kind", ["eigenspace", "fisher", "ggn"])
@pytest.mark.parametrize("net", [lambda: ViT(16), lambda: ViT(16, own_attention=True), Dense])
def test_real_architectures_get_pruned(kind, net):
    torch.manual_seed(0)
    model, batches = net().eval(), data(dtype=torch.float32)
    given = [
        (p, p.ndim - 1) for n, p in model.named_parameters() if n in ("cls_token", "pos_embed")
    ]
    heads = {
        layer: module.heads
        for module in model.modules()
        if isinstance(module, OwnAttention)
        for layer in (module.q, module.k, module.v)
    }
    pruner = tp.pruner.BasePruner(
        model,
        EXAMPLE,
        importances(model, batches)[kind],
        pruning_ratio=0.5,
        ignored_layers=[model.head],
        unwrapped_parameters=given or None,
        num_heads=heads,
    )
    before = sum(p.numel() for p in model.parameters())
    pruner.step()
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before
    assert torch.isfinite(model(batches[0][0])).all()
