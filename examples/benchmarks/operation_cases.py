"""Small networks around each operation of torch.nn and torch.nn.functional, found by name.

A layer stands between a linear map, whose weights lie upstream, and a fixed projection to two
outputs; a loss stands on the outputs of a linear map. What has no recipe here is tried as a
function of one tensor of numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SAMPLES = 5


@dataclass
class Recipe:
    """How to use an operation.

    Args:
        shape: Of a sample of its input.
        make: Returns a module that computes the operation.
        call: Calls it on inputs (n, *shape); by default with the inputs alone.
        tokens: Whether the inputs are integers below 4, and not computed.
        training: The mode to measure in.
    """

    shape: tuple[int, ...]
    make: Callable[[], nn.Module]
    call: Callable[[Any, Tensor], Any] = field(default=lambda module, h: module(h))
    tokens: bool = False
    training: bool = False


@dataclass
class LossRecipe:
    """How to use a loss: the shape of a sample's outputs, its targets, and a function of these."""

    shape: tuple[int, ...]
    targets: Callable[[], Any]
    loss: Callable[[Tensor, Any], Tensor]


class Plain(nn.Module):
    """A function as a module."""

    def __init__(self, fn: Callable[..., Any], **weights: Tensor) -> None:
        super().__init__()
        self.fn = fn
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, h: Tensor) -> Any:
        return self.fn(h, **dict(self.named_parameters()))


class Net(nn.Module):
    """The operation with weights before it, and two outputs after it."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        size = torch.Size(recipe.shape).numel()
        self.before = nn.Linear(3, 4)
        self.register_buffer("spread", torch.randn(4, size) / 2)
        self.operation = recipe.make()
        with torch.no_grad():
            out = self._apply_operation(self.example(SAMPLES))
        self.register_buffer("after", torch.randn(out.numel() // SAMPLES, 2))

    def example(self, n: int) -> Tensor:
        return (
            torch.randint(4, (n, *self.recipe.shape)) if self.recipe.tokens else torch.randn(n, 3)
        )

    def _apply_operation(self, x: Tensor) -> Tensor:
        h = x
        if not self.recipe.tokens:
            h = (torch.tanh(self.before(x)) @ self.spread).view(len(x), *self.recipe.shape)
        return first_tensor(self.recipe.call(self.operation, h))

    def forward(self, x: Tensor) -> Tensor:
        out = self._apply_operation(x).reshape(len(x), -1)
        if self.recipe.tokens:  # weights that the operation does not depend on
            out = out + self.before.weight.sum()
        return out.to(self.after.dtype) @ self.after


class LossNet(nn.Module):
    """A linear map to the outputs of a loss."""

    def __init__(self, recipe: LossRecipe) -> None:
        super().__init__()
        self.shape = recipe.shape
        self.map = nn.Linear(3, torch.Size(recipe.shape).numel())

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.map(x)).view(len(x), *self.shape)


def first_tensor(value: Any) -> Tensor:
    while not isinstance(value, Tensor):
        value = value[0]
    return value


def _layer(shape: tuple[int, ...], make: Callable[[], nn.Module], **options: Any) -> Recipe:
    return Recipe(shape, make, **options)


def _fn(shape: tuple[int, ...], fn: Callable[..., Any], **options: Any) -> Recipe:
    weights = options.pop("weights", {})
    return Recipe(
        shape, lambda: Plain(fn, **{k: torch.randn(s) / 2 for k, s in weights.items()}), **options
    )


def _lazy(shape: tuple[int, ...], make: Callable[[], nn.Module]) -> Recipe:
    def run_once() -> nn.Module:
        module = make()
        with torch.no_grad():
            module(torch.randn(SAMPLES, *shape))
        return module

    return Recipe(shape, run_once)


def _unpool(dim: int) -> Recipe:
    pool = getattr(F, f"max_pool{dim}d")
    return Recipe(
        (1, *(4,) * dim),
        lambda: getattr(nn, f"MaxUnpool{dim}d")(2),
        lambda module, h: module(*pool(h, 2, return_indices=True)),
    )


def _by_dim(
    name: str, make: Callable[[Any, int], nn.Module], dims: Any, side: int, channels: int = 2
) -> dict[str, Recipe]:
    return {
        f"{name}{d}d": _layer(
            (channels, *(side,) * d), lambda d=d: make(getattr(nn, f"{name}{d}d"), d)
        )
        for d in dims
    }


ALL = (1, 2, 3)
MODULES: dict[str, Recipe] = {
    **_by_dim("AdaptiveAvgPool", lambda c, d: c(2), ALL, 3),
    **_by_dim("AdaptiveMaxPool", lambda c, d: c(2), ALL, 3),
    **_by_dim("AvgPool", lambda c, d: c(2), ALL, 4, 1),
    **_by_dim("MaxPool", lambda c, d: c(2), ALL, 4, 1),
    **_by_dim("LPPool", lambda c, d: c(2.0, 2), ALL, 4, 1),
    **_by_dim("BatchNorm", lambda c, d: c(2), ALL, 2),
    **_by_dim("InstanceNorm", lambda c, d: c(2, affine=True), ALL, 3),
    **_by_dim("Conv", lambda c, d: c(2, 2, 2), ALL, 3),
    **_by_dim("ConvTranspose", lambda c, d: c(2, 2, 2), ALL, 2),
    **_by_dim("CircularPad", lambda c, d: c(1), ALL, 2),
    **_by_dim("ConstantPad", lambda c, d: c(1, 0.5), ALL, 2),
    **_by_dim("ReflectionPad", lambda c, d: c(1), ALL, 2),
    **_by_dim("ReplicationPad", lambda c, d: c(1), ALL, 2),
    **_by_dim("ZeroPad", lambda c, d: c(1), ALL, 2),
    **_by_dim("Dropout", lambda c, d: c(0.5), ALL, 2),
    **{f"MaxUnpool{d}d": _unpool(d) for d in ALL},
    **{f"LazyBatchNorm{d}d": _lazy((2, *(2,) * d), getattr(nn, f"LazyBatchNorm{d}d")) for d in ALL},
    **{
        f"LazyInstanceNorm{d}d": _lazy((2, *(3,) * d), getattr(nn, f"LazyInstanceNorm{d}d"))
        for d in ALL
    },
    **{
        f"LazyConv{d}d": _lazy((2, *(3,) * d), lambda d=d: getattr(nn, f"LazyConv{d}d")(2, 2))
        for d in ALL
    },
    **{
        f"LazyConvTranspose{d}d": _lazy(
            (2, *(2,) * d), lambda d=d: getattr(nn, f"LazyConvTranspose{d}d")(2, 2)
        )
        for d in ALL
    },
    "LazyLinear": _lazy((3,), lambda: nn.LazyLinear(2)),
    "AdaptiveLogSoftmaxWithLoss": _layer(
        (4,), lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4]), call=lambda m, h: m.log_prob(h)
    ),
    "Bilinear": _layer((3,), lambda: nn.Bilinear(3, 3, 2), call=lambda m, h: m(h, h.cos())),
    "ChannelShuffle": _layer((4, 2, 2), lambda: nn.ChannelShuffle(2)),
    "CosineSimilarity": _layer((4,), nn.CosineSimilarity, call=lambda m, h: m(h, h.cos())),
    "PairwiseDistance": _layer((4,), nn.PairwiseDistance, call=lambda m, h: m(h, h.cos())),
    "LocalResponseNorm": _layer((3, 2, 2), lambda: nn.LocalResponseNorm(2)),
    "DataParallel": _layer((3,), lambda: nn.DataParallel(nn.Linear(3, 2))),
    "Embedding": _layer((2,), lambda: nn.Embedding(4, 3), tokens=True),
    "EmbeddingBag": _layer((2,), lambda: nn.EmbeddingBag(4, 3), tokens=True),
    "FeatureAlphaDropout": _layer((2, 3), lambda: nn.FeatureAlphaDropout(0.5)),
    "Flatten": _layer((2, 3), nn.Flatten),
    "Unflatten": _layer((6,), lambda: nn.Unflatten(1, (2, 3))),
    "Fold": _layer((4, 4), lambda: nn.Fold((3, 3), 2)),
    "Unfold": _layer((1, 3, 3), lambda: nn.Unfold(2)),
    "FractionalMaxPool2d": _layer((1, 7, 7), lambda: nn.FractionalMaxPool2d(2, output_ratio=0.6)),
    "FractionalMaxPool3d": _layer(
        (1, 7, 7, 7), lambda: nn.FractionalMaxPool3d(2, output_ratio=0.6)
    ),
    "GLU": _layer((4,), nn.GLU),
    "GRU": _layer((3, 2), lambda: nn.GRU(2, 3, batch_first=True)),
    "LSTM": _layer((3, 2), lambda: nn.LSTM(2, 3, batch_first=True)),
    "RNN": _layer((3, 2), lambda: nn.RNN(2, 3, batch_first=True)),
    "GRUCell": _layer((2,), lambda: nn.GRUCell(2, 3)),
    "LSTMCell": _layer((2,), lambda: nn.LSTMCell(2, 3)),
    "RNNCell": _layer((2,), lambda: nn.RNNCell(2, 3)),
    "GroupNorm": _layer((4, 3), lambda: nn.GroupNorm(2, 4)),
    "LayerNorm": _layer((4,), lambda: nn.LayerNorm(4)),
    "RMSNorm": _layer((4,), lambda: nn.RMSNorm(4)),
    "SyncBatchNorm": _layer((2, 3), lambda: nn.SyncBatchNorm(2)),
    "Linear": _layer((3,), lambda: nn.Linear(3, 2)),
    "Identity": _layer((3,), nn.Identity),
    "Sequential": _layer((3,), lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh())),
    "MultiheadAttention": _layer(
        (3, 4), lambda: nn.MultiheadAttention(4, 2, batch_first=True), call=lambda m, h: m(h, h, h)
    ),
    "PixelShuffle": _layer((4, 2, 2), lambda: nn.PixelShuffle(2)),
    "PixelUnshuffle": _layer((1, 4, 4), lambda: nn.PixelUnshuffle(2)),
    "Softmax": _layer((4,), lambda: nn.Softmax(1)),
    "LogSoftmax": _layer((4,), lambda: nn.LogSoftmax(1)),
    "Softmin": _layer((4,), lambda: nn.Softmin(1)),
    "Softmax2d": _layer((3, 2, 2), nn.Softmax2d),
    "Threshold": _layer((6,), lambda: nn.Threshold(0.1, 0.2)),
    "Transformer": _layer(
        (2, 4),
        lambda: nn.Transformer(4, 2, 1, 1, 5, dropout=0.1, batch_first=True),
        call=lambda m, h: m(h, h.cos()),
    ),
    "TransformerEncoderLayer": _layer(
        (3, 4), lambda: nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)
    ),
    "TransformerEncoder": _layer(
        (3, 4),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), 1),
    ),
    "TransformerDecoderLayer": _layer(
        (3, 4),
        lambda: nn.TransformerDecoderLayer(4, 2, 5, batch_first=True),
        call=lambda m, h: m(h, h.cos()),
    ),
    "TransformerDecoder": _layer(
        (3, 4),
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 5, batch_first=True), 1),
        call=lambda m, h: m(h, h.cos()),
    ),
    "Upsample": _layer((1, 2, 2), lambda: nn.Upsample(scale_factor=2)),
    "UpsamplingBilinear2d": _layer((1, 2, 2), lambda: nn.UpsamplingBilinear2d(scale_factor=2)),
    "UpsamplingNearest2d": _layer((1, 2, 2), lambda: nn.UpsamplingNearest2d(scale_factor=2)),
}

_TOKENS = torch.tensor([[0, 1], [3, 2], [1, 1], [2, 0], [3, 3]])


def _attention(h: Tensor, w: Tensor, o: Tensor) -> Any:
    h = h.transpose(0, 1)
    zeros = h.new_zeros
    out = F.multi_head_attention_forward(
        h, h, h, 4, 2, w, zeros(12), None, None, False, 0.0, o, zeros(4), training=False
    )
    return out[0].transpose(0, 1)


FUNCTIONS: dict[str, Recipe] = {
    **{
        f"adaptive_avg_pool{d}d": _fn(
            (2, *(3,) * d), lambda h, d=d: getattr(F, f"adaptive_avg_pool{d}d")(h, 2)
        )
        for d in ALL
    },
    **{
        f"adaptive_max_pool{d}d{tail}": _fn(
            (2, *(3,) * d), lambda h, d=d, t=tail: getattr(F, f"adaptive_max_pool{d}d{t}")(h, 2)
        )
        for d in ALL
        for tail in ("", "_with_indices")
    },
    **{
        f"avg_pool{d}d": _fn((1, *(4,) * d), lambda h, d=d: getattr(F, f"avg_pool{d}d")(h, 2))
        for d in ALL
    },
    **{
        f"lp_pool{d}d": _fn((1, *(4,) * d), lambda h, d=d: getattr(F, f"lp_pool{d}d")(h, 2.0, 2))
        for d in ALL
    },
    **{
        f"max_pool{d}d{tail}": _fn(
            (1, *(4,) * d), lambda h, d=d, t=tail: getattr(F, f"max_pool{d}d{t}")(h, 2)
        )
        for d in ALL
        for tail in ("", "_with_indices")
    },
    **{
        f"fractional_max_pool{d}d{tail}": _fn(
            (1, *(4,) * d),
            # Fixed, so that it is a function; the module draws anew in every call.
            lambda h, d=d, t=tail: getattr(F, f"fractional_max_pool{d}d{t}")(
                h, 2, output_size=2, _random_samples=h.new_full((len(h), 1, d), 0.4)
            ),
        )
        for d in (2, 3)
        for tail in ("", "_with_indices")
    },
    **{
        f"max_unpool{d}d": _fn(
            (1, *(4,) * d),
            lambda h, d=d: getattr(F, f"max_unpool{d}d")(
                *getattr(F, f"max_pool{d}d")(h, 2, return_indices=True), 2
            ),
        )
        for d in ALL
    },
    **{
        f"conv{d}d": _fn(
            (2, *(3,) * d), getattr(F, f"conv{d}d"), weights={"weight": (2, 2, *(2,) * d)}
        )
        for d in ALL
    },
    **{
        f"conv_transpose{d}d": _fn(
            (2, *(2,) * d), getattr(F, f"conv_transpose{d}d"), weights={"weight": (2, 2, *(2,) * d)}
        )
        for d in ALL
    },
    "conv_tbc": _fn(  # along the samples: its backward pass takes no other layout
        (3, 2),
        lambda h, weight, bias: F.conv_tbc(h, weight, bias, pad=1),
        weights={"weight": (3, 2, 2), "bias": (2,)},
    ),
    "affine_grid": _fn((2, 3), lambda h: F.affine_grid(h, [len(h), 1, 2, 2], align_corners=False)),
    "grid_sample": _fn(
        (2, 3, 3),
        lambda h: F.grid_sample(h, 0.9 * h.view(len(h), 3, 3, 2).tanh(), align_corners=False),
    ),
    "batch_norm": _fn((3,), lambda h: F.batch_norm(h, h.new_zeros(3), h.new_ones(3))),
    "bilinear": _fn(
        (3,), lambda h, weight: F.bilinear(h, h.cos(), weight), weights={"weight": (2, 3, 3)}
    ),
    "channel_shuffle": _fn((4, 2, 2), lambda h: F.channel_shuffle(h, 2)),
    "native_channel_shuffle": _fn((4, 2, 2), lambda h: F.native_channel_shuffle(h, 2)),
    "cosine_similarity": _fn((4,), lambda h: F.cosine_similarity(h, h.cos())),
    "pairwise_distance": _fn((4,), lambda h: F.pairwise_distance(h, h.cos())),
    "pdist": _fn((4,), lambda h: F.pdist(h)),
    "dropout": _fn((4,), lambda h: F.dropout(h, training=False)),
    "alpha_dropout": _fn((4,), lambda h: F.alpha_dropout(h, training=False)),
    "dropout1d": _fn((2, 3), lambda h: F.dropout1d(h, training=False)),
    "dropout2d": _fn((2, 2, 2), lambda h: F.dropout2d(h, training=False)),
    "dropout3d": _fn((2, 2, 2, 2), lambda h: F.dropout3d(h, training=False)),
    "feature_alpha_dropout": _fn((2, 3), lambda h: F.feature_alpha_dropout(h, training=False)),
    "embedding": _fn((2,), F.embedding, weights={"weight": (4, 3)}, tokens=True),
    "embedding_bag": _fn((2,), F.embedding_bag, weights={"weight": (4, 3)}, tokens=True),
    "fold": _fn((4, 4), lambda h: F.fold(h, (3, 3), 2)),
    "unfold": _fn((1, 3, 3), lambda h: F.unfold(h, 2)),
    "glu": _fn((4,), lambda h: F.glu(h)),
    "group_norm": _fn((4, 3), lambda h: F.group_norm(h, 2)),
    "instance_norm": _fn((2, 3), lambda h: F.instance_norm(h)),
    "layer_norm": _fn((4,), lambda h: F.layer_norm(h, (4,))),
    "rms_norm": _fn((4,), lambda h: F.rms_norm(h, (4,))),
    "local_response_norm": _fn((3, 2, 2), lambda h: F.local_response_norm(h, 2)),
    "normalize": _fn((4,), lambda h: F.normalize(h)),
    "grouped_mm": _fn(
        (8,),
        lambda h, weight: F.grouped_mm(
            h, weight, offs=torch.tensor([2, len(h)], dtype=torch.int32)
        ),
        weights={"weight": (2, 8, 8)},
    ),
    "interpolate": _fn((1, 3, 3), lambda h: F.interpolate(h, size=(4, 4), mode="bicubic")),
    "upsample": _fn((1, 2, 2), lambda h: F.interpolate(h, scale_factor=2)),
    "upsample_bilinear": _fn(
        (1, 2, 2), lambda h: F.interpolate(h, scale_factor=2, mode="bilinear")
    ),
    "upsample_nearest": _fn(
        (1, 2, 2), lambda h: F.interpolate(h, scale_factor=2, mode="nearest-exact")
    ),
    "linear": _fn((3,), F.linear, weights={"weight": (2, 3)}),
    "multi_head_attention_forward": _fn((3, 4), _attention, weights={"w": (12, 4), "o": (4, 4)}),
    "scaled_dot_product_attention": _fn(
        (1, 3, 4), lambda h: F.scaled_dot_product_attention(h, h, h)
    ),
    "pad": _fn((2, 3), lambda h: F.pad(h, (1, 1), mode="reflect")),
    "pixel_shuffle": _fn((4, 2, 2), lambda h: F.pixel_shuffle(h, 2)),
    "pixel_unshuffle": _fn((1, 4, 4), lambda h: F.pixel_unshuffle(h, 2)),
    "prelu": _fn((4,), F.prelu, weights={"weight": (1,)}),
    "softmax": _fn((4,), lambda h: F.softmax(h, 1)),
    "log_softmax": _fn((4,), lambda h: F.log_softmax(h, 1)),
    "softmin": _fn((4,), lambda h: F.softmin(h, 1)),
    "gumbel_softmax": _fn((4,), lambda h: F.gumbel_softmax(h)),
    "threshold": _fn((6,), lambda h: F.threshold(h, 0.1, 0.2)),
    "threshold_": _fn((6,), lambda h: F.threshold_(h, 0.1, 0.2)),
    "sigmoid": _fn((6,), torch.sigmoid),
    "tanh": _fn((6,), torch.tanh),
}

WITHOUT_RECIPE = {
    **dict.fromkeys(
        ("Container", "Module", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList"),
        "holds others, computes nothing",
    ),
    **dict.fromkeys(("RNNBase", "RNNCellBase"), "base class"),
    **dict.fromkeys(
        (
            *("Optional", "assert_int_or_pair", "boolean_dispatch", "handle_torch_function"),
            *("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"),
        ),
        "no operation",
    ),
    "CrossMapLRN2d": "torch's backward is not its derivative, as gradcheck tells",
    "one_hot": "integers to integers",
    **dict.fromkeys(("scaled_mm", "scaled_grouped_mm"), "8-bit floats, which have no gradient"),
}
