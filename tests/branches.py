"""Networks whose channels are joined, split and reshaped, with a mask wherever channels are read.

``forward(x, keep)`` multiplies by ``keep[stream]`` behind the batch norm and the activation, where
a channel that is gone is zero. `streams` says which stream each layer writes.
"""

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F


class Branches(nn.Module):
    streams: ClassVar[dict[str, str]] = {}
    ignored = ("head",)

    def conv(self, fan_in, fan_out, kernel=1, **options):
        return nn.Conv2d(fan_in, fan_out, kernel, padding=kernel // 2, **options)

    @staticmethod
    def at(keep, name, x, axis=1):
        if not keep or name not in keep:
            return x
        shape = [1] * x.ndim
        shape[axis] = -1
        return x * keep[name].view(shape)

    def pruner_options(self):
        """What the pruner has to be told of the network."""
        return {}

    def going(self, root, idxs):
        """What goes with channels of a layer, by stream."""
        return {self.streams.get(root, root): list(idxs)}

    def width(self, stream):
        """The number of channels that a stream has now."""
        layer = next((n for n, s in self.streams.items() if s == stream), stream)
        return self.get_submodule(layer).weight.shape[0]


class Joined(Branches):
    """A batch norm behind a concatenation, the input among what is joined."""

    def __init__(self):
        super().__init__()
        self.a, self.b = self.conv(2, 6, 3), self.conv(2, 5, 3)
        self.bn, self.c = nn.BatchNorm2d(13), self.conv(13, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x, keep=None):
        y = F.relu(self.bn(torch.cat([self.a(x), x, self.b(x)], 1)))
        a, x, b = (
            y[:, : self.a.out_channels],
            y[:, self.a.out_channels : -self.b.out_channels],
            y[:, -self.b.out_channels :],
        )
        if keep:
            y = torch.cat([self.at(keep, "a", a), x, self.at(keep, "b", b)], 1)
        return self.head(self.at(keep, "c", torch.tanh(self.c(y))).mean((2, 3)))


class DenseNet(Branches):
    """Each layer reads all that went before it; a transition, and a second block."""

    def __init__(self, growth=4, layers=3):
        super().__init__()
        self.stem, width = self.conv(2, 4, 3), 4
        self.blocks = nn.ModuleList()
        for _ in range(2):
            block = nn.ModuleList()
            for _ in range(layers):
                block.append(
                    nn.ModuleDict(
                        {
                            "norm": nn.BatchNorm2d(width),
                            "conv": self.conv(width, growth, 3, bias=False),
                        }
                    )
                )
                width += growth
            out = nn.ModuleDict({"norm": nn.BatchNorm2d(width), "conv": self.conv(width, 5)})
            width = 5
            self.blocks.append(nn.ModuleList([block, out]))
        self.head = nn.Linear(width, 3)

    def forward(self, x, keep=None):
        keep = keep or {}
        # Masks of what has been joined, since the norms that follow are the readers' own.
        x, mask = self.stem(x), keep.get("stem", torch.ones(self.stem.out_channels).to(x))
        for b, (block, out) in enumerate(self.blocks):
            for i, layer in enumerate(block):
                read = F.relu(layer["norm"](x))
                new = layer["conv"](self.at({"": mask}, "", read) if keep else read)
                name = f"blocks.{b}.0.{i}.conv"
                mask = torch.cat([mask, keep.get(name, torch.ones(new.shape[1]).to(x))])
                x = torch.cat([x, new], 1)
            read = F.relu(out["norm"](x))
            x = out["conv"](self.at({"": mask}, "", read) if keep else read)
            mask = keep.get(f"blocks.{b}.1.conv", torch.ones(x.shape[1]).to(x))
            x = F.avg_pool2d(x, 2) if b == 0 else x
        return self.head(self.at({"": mask}, "", F.relu(x)).mean((2, 3)))


class Inception(Branches):
    """Branches of several kernels, a pooled one, joined twice and flattened with nine places."""

    def __init__(self):
        super().__init__()
        self.one, self.three0 = self.conv(2, 4), self.conv(2, 3)
        self.three1, self.pooled = self.conv(3, 5, 3), self.conv(2, 4)
        self.bn = nn.BatchNorm2d(5)
        self.next0, self.next1 = self.conv(13, 4), self.conv(13, 5, 3)
        self.head0, self.head = nn.Linear(81, 6), nn.Linear(6, 3)

    def forward(self, x, keep=None):
        three = self.at(keep, "three0", F.relu(self.three0(x)))
        y = [
            self.at(keep, "one", torch.tanh(self.one(x))),
            self.at(keep, "three1", F.relu(self.bn(self.three1(three)))),
            self.at(keep, "pooled", self.pooled(F.max_pool2d(x, 3, 1, 1))),
        ]
        y = torch.cat(y, 1)
        y = [self.at(keep, n, F.relu(getattr(self, n)(y))) for n in ("next0", "next1")]
        y = F.adaptive_avg_pool2d(torch.cat(y, 1), 3).flatten(1)
        return self.head(self.at(keep, "head0", F.relu(self.head0(y))))


class FlattenedBranches(Branches):
    """Flattened before they are joined, with other numbers of places."""

    def __init__(self):
        super().__init__()
        self.a, self.b = self.conv(2, 5, 3), self.conv(2, 4, 3)
        self.dense, self.head = nn.Linear(5 * 4 + 4 * 9, 6), nn.Linear(6, 3)

    def forward(self, x, keep=None):
        a = F.adaptive_avg_pool2d(self.at(keep, "a", F.relu(self.a(x))), 2)
        b = F.adaptive_avg_pool2d(self.at(keep, "b", F.relu(self.b(x))), 3)
        y = self.dense(torch.cat([a.flatten(1), torch.flatten(b, 1)], 1))
        return self.head(self.at(keep, "dense", torch.tanh(y)))


class C2f(Branches):
    """YOLO's: chunks, bottlenecks that add, all joined; a chunk is read twice."""

    def __init__(self, adds=False, in_code=False):
        super().__init__()
        self.adds, self.in_code = adds, in_code
        self.cv1, self.bn = self.conv(2, 8, bias=False), nn.BatchNorm2d(8)
        self.m1, self.m2 = self.conv(4, 5, 3), self.conv(5, 4, 3)
        self.cv2, self.head = self.conv(12, 6), nn.Linear(6, 3)

    def going(self, root, idxs):
        first = self.cv1.out_channels - self.m1.in_channels
        found = {root: list(idxs)}
        if self.adds and root == "m2":
            found["cv1"] = [first + i for i in idxs]
        if self.adds and root == "cv1":
            found["m2"] = [i - first for i in idxs if i >= first]
        return found

    def forward(self, x, keep=None):
        y = self.at(keep, "cv1", F.silu(self.bn(self.cv1(x))))
        sizes = [y.shape[1] - self.m1.in_channels, self.m1.in_channels]
        y = list(y.chunk(2, 1) if self.in_code else y.split(sizes, 1))
        new = self.at(keep, "m1", F.relu(self.m1(y[-1])))
        new = self.at(keep, "m2", torch.tanh(self.m2(new)))
        y.append(y[-1] + new if self.adds else new)
        return self.head(self.at(keep, "cv2", F.relu(self.cv2(torch.cat(y, 1)))).mean((2, 3)))


class Crossed(Branches):
    """Parts of a split that are read in another order than they lie in."""

    def __init__(self):
        super().__init__()
        self.a, self.f, self.g = self.conv(2, 9, 3), self.conv(3, 4), self.conv(6, 5)
        self.head = nn.Linear(9, 3)

    def forward(self, x, keep=None):
        y = self.at(keep, "a", F.relu(self.a(x)))
        p, q = y.split([self.f.in_channels, self.g.in_channels], 1)
        g = self.at(keep, "g", torch.tanh(self.g(q)))
        f = self.at(keep, "f", torch.tanh(self.f(p)))
        return self.head(torch.cat([g, f], 1).mean((2, 3)))


class Tokens(Branches):
    """Dense layers over tokens: joined and gated along the last axis."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(12, 6)
        self.a, self.b, self.gate = nn.Linear(6, 4), nn.Linear(6, 5), nn.Linear(9, 10)
        self.out, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x, keep=None):
        x = self.at(
            keep,
            "embed",
            torch.tanh(self.embed(x.flatten(2).transpose(1, 2).reshape(x.shape[0], 6, 12))),
            2,
        )
        y = [self.at(keep, n, torch.tanh(getattr(self, n)(x)), 2) for n in ("a", "b")]
        p, q = self.at(keep, "gate", self.gate(torch.cat(y, -1)), 2).chunk(2, -1)
        return self.head(
            self.at(keep, "out", torch.relu(self.out(p * torch.sigmoid(q))), 2).mean(1)
        )


class Merged(Branches):
    """Swin's merging of patches: channels last, four places joined."""

    def __init__(self):
        super().__init__()
        self.patch, self.merge = self.conv(2, 5), nn.Linear(20, 6, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x, keep=None):
        x = self.at(keep, "patch", torch.relu(self.patch(x))).permute(0, 2, 3, 1)
        x = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        x = self.at(keep, "merge", torch.tanh(self.merge(torch.cat(x, -1))), 3)
        return self.head(x.mean((1, 2)))


class Grouped(Branches):
    """Grouped and depthwise convolutions, group norm, behind a residual stream."""

    def __init__(self):
        super().__init__()
        self.stem, self.grouped = self.conv(2, 8, 3), self.conv(8, 8, 3, groups=2)
        self.wide, self.depthwise = self.conv(8, 12), self.conv(12, 12, 3, groups=12)
        self.bn, self.back = nn.BatchNorm2d(12), self.conv(12, 8)
        self.head = nn.Linear(8, 3)
        self.streams = {"stem": "stream", "back": "stream", "depthwise": "wide"}

    def forward(self, x, keep=None):
        x = self.at(keep, "stream", F.relu(self.stem(x)))
        y = self.at(keep, "grouped", torch.tanh(self.grouped(x)))
        y = self.at(keep, "wide", F.relu6(self.bn(self.depthwise(self.wide(y)))))
        return self.head((x + self.at(keep, "stream", self.back(y))).mean((2, 3)))


class Attention(Branches):
    """timm's attention: queries, keys and values of one layer, heads by reshape, its own scale."""

    ignored = ("head", "patch", "proj", "fc2")  # the width of the stream

    def __init__(self, heads=2, width=8):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.scale = self.head_dim**-0.5
        self.patch = nn.Conv2d(2, width, 2, 2)
        self.norm1, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.proj, self.norm2 = nn.Linear(width, width), nn.LayerNorm(width)
        self.fc1, self.fc2, self.head = (
            nn.Linear(width, 12),
            nn.Linear(12, width),
            nn.Linear(width, 3),
        )

    def pruner_options(self):
        return {"num_heads": {self.qkv: self.heads}}

    def going(self, root, idxs):
        if root != "proj":
            return super().going(root, idxs)
        width = self.proj.in_features  # the root that torch-pruning takes for the heads
        return {"qkv": [i + k * width for k in range(3) for i in idxs]}

    def forward(self, x, keep=None):
        x = self.patch(x).flatten(2).transpose(1, 2)
        b, n, _ = x.shape
        qkv = self.at(keep, "qkv", self.qkv(self.norm1(x)), 2)
        q, k, v = qkv.reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(b, n, -1))
        x = x + self.fc2(self.at(keep, "fc1", F.gelu(self.fc1(self.norm2(x))), 2))
        return self.head(x.mean(1))


def adapt(model):
    """Set what an attention keeps of its sizes."""
    if isinstance(model, Attention):
        model.head_dim = model.qkv.out_features // (3 * model.heads)
