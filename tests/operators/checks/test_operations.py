"""Every operation of torch.nn and torch.nn.functional works, or is refused with a remedy."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

FOLDER = Path(__file__).resolve().parents[3] / "examples" / "benchmarks"
sys.path.append(str(FOLDER))

import operations  # noqa: E402
from operation_cases import FUNCTIONS, MODULES, WITHOUT_RECIPE  # noqa: E402
from operation_losses import LOSSES  # noqa: E402

NAMES = [*operations.module_names(), *operations.function_names()]
TRIED = [name for name in NAMES if name not in WITHOUT_RECIPE]
KINDS = tuple(operations.KINDS)

# What torch 2.13 has no second derivative for, of the model or of the loss; and what it runs in
# no float64, or at random. All else works.
_LOSSES = ("CTCLoss", "MultiLabelMarginLoss", "MultiMarginLoss")
_LOSS_FUNCTIONS = ("ctc_loss", "multi_margin_loss", "multilabel_margin_loss")
_MODEL = ("EmbeddingBag", "Hardsigmoid", "embedding_bag", "hardsigmoid")
_OLD = ("pdist",) if torch.__version__ < "2.14" else ()
_OLD += ("grid_sample",) if torch.__version__ < "2.7" else ()
_NOWHERE = ("FractionalMaxPool2d", "FractionalMaxPool3d", "gumbel_softmax", "grouped_mm")
_NO_DERIVATIVE = ("native_channel_shuffle",)
REFUSED = {
    "Hessian": {*_LOSSES, *_LOSS_FUNCTIONS, *_MODEL, *_OLD, *_NOWHERE, *_NO_DERIVATIVE},
    "GGN": {*_LOSSES, *_LOSS_FUNCTIONS, *_NOWHERE, *_NO_DERIVATIVE},
    "Fisher": {*_NOWHERE, *_NO_DERIVATIVE},
}
# Those that need care here, and a few that do not.
QUICK = [
    *sorted(REFUSED["Hessian"]),
    *("Hardswish", "ReLU6", "grid_sample", "Bilinear", "GRU", "LSTM", "PixelShuffle", "Fold"),
    *("MultiheadAttention", "TransformerEncoderLayer", "LPPool2d", "RReLU", "InstanceNorm1d"),
    *("RMSNorm", "Embedding", "MaxUnpool2d", "AdaptiveMaxPool2d", "GaussianNLLLoss", "conv_tbc"),
    *("MSELoss", "relu_", "scaled_dot_product_attention", "LazyConv1d", "cosine_similarity"),
]


def verdict(name, kind, way="auto"):
    with sdpa_kernel(SDPBackend.MATH):  # the oracles'
        return operations.examine(name, kind, way)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in QUICK if name in TRIED])
def test_an_operation_works_or_is_refused_with_a_remedy(name, kind):
    found = verdict(name, kind)
    assert found.word == ("refused" if name in REFUSED[kind] else "works"), found.text


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in TRIED if name not in QUICK])
def test_every_other_operation_works(name, kind):
    found = verdict(name, kind)
    if found.word == "NO RECIPE":  # newer than the recipes
        pytest.skip(found.text)
    assert found.word == "works", found.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, of ways that are tried in vain
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRIED)
def test_no_way_is_wrong(name, kind):
    for way in operations.KINDS[kind].ways:
        found = verdict(name, kind, way)
        assert found.word in ("works", "refused", "NO RECIPE"), f"{way}: {found.text}"


def test_every_recipe_is_of_an_operation_that_torch_has():
    # The newest torch has all of them; an older one may lack what came later.
    known = {*MODULES, *FUNCTIONS, *LOSSES, *WITHOUT_RECIPE}
    missing = {name for name in known if name not in NAMES}
    newer = {"LinearCrossEntropyLoss", "linear_cross_entropy", "grouped_mm", "scaled_mm"}
    assert missing <= newer | {"scaled_grouped_mm", "LPPool3d", "lp_pool3d"}
    if torch.__version__ >= "2.13":
        assert missing == set()


def test_a_wrong_product_would_be_found(monkeypatch):
    right = operations.ORACLES["Hessian"]
    monkeypatch.setitem(operations.ORACLES, "Hessian", lambda p, v: 1.001 * right(p, v))
    assert verdict("Tanh", "Hessian").word == "WRONG"
