"""Networks whose channels torch-pruning takes out, and an independent way to a channel's entries.

What a channel takes along is found by taking it: a copy whose entries are their own numbers is
pruned by torch-pruning, and the numbers that are gone are the channel's.
"""

import copy

import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

import hesscurv
from hesscurv.objective.parameters import layout_of, select_parameters

TASK = hesscurv.supervised(nn.CrossEntropyLoss())


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


def forms(matrix, weights, masks):
    """``1/2 w_C^T A w_C`` with all entries outside of the channel zero."""
    rows = masks * weights
    return 0.5 * torch.einsum("ci,ij,cj->c", rows, matrix, rows)
