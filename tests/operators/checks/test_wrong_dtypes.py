"""Where a dtype does not fit, the error names the tensor and a cast, and following it works."""

import re

import pytest
import torch
from torch import nn

import hesscurv
from hesscurv import EmpiricalFisherOperator, GGNOperator, HessianOperator

OPERATORS = [HessianOperator, GGNOperator, EmpiricalFisherOperator]
CLASSES = torch.tensor([0, 1, 2, 0, 1, 2])
CE, BCE = hesscurv.supervised(nn.CrossEntropyLoss()), hesscurv.supervised(nn.BCEWithLogitsLoss())


def dense(outputs=3):
    return nn.Linear(4, outputs)


def embedded():
    return nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3))


def integers():
    return torch.arange(24).view(6, 4)


def numbers():
    return torch.randn(6, 4)


TOKENS = torch.arange(18).view(6, 3) % 7
# A model, a task, inputs, targets, and the casts that are needed.
CASES = {
    "int32 classes": (dense, CE, numbers, CLASSES.int(), ["batch[1].long()"]),
    "float classes": (dense, CE, numbers, CLASSES.float(), ["batch[1].long()"]),
    "integer inputs": (dense, CE, integers, CLASSES, ["batch[0].float()"]),
    "double inputs": (dense, CE, lambda: numbers().double(), CLASSES, ["batch[0].float()"]),
    "float tokens": (embedded, CE, lambda: TOKENS.float(), CLASSES, ["batch[0].long()"]),
    "long bits": (lambda: dense(1), BCE, numbers, CLASSES[:, None] % 2, ["batch[1].float()"]),
    "both": (
        *(dense, CE, integers, CLASSES.int()),
        ["batch[0].float()", "batch[1].long()"],
    ),
}


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("compute_dtype", [None, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_the_cast_that_is_named_works(case, compute_dtype, kind):
    if (case, compute_dtype) == ("double inputs", torch.float64):
        pytest.skip("which converts them")
    model, task, inputs, targets, casts = CASES[case]
    net, batch = model(), [inputs(), targets]
    with pytest.raises(ValueError, match="does not run in") as caught:
        kind(net, task, [tuple(batch)], compute_dtype=compute_dtype)
    text = str(caught.value)
    assert all(cast in text for cast in casts), text
    for item, call in re.findall(r"batch\[(\d)\]\.(\w+)\(\)", text):
        batch[int(item)] = getattr(batch[int(item)], call)()
    H = kind(net, task, [tuple(batch)], compute_dtype=compute_dtype)
    assert torch.isfinite(H @ torch.ones(H.shape[0], dtype=H.dtype)).all()


def test_a_compute_dtype_is_named_only_where_it_works():
    batch = (numbers().double(), CLASSES)
    with pytest.raises(ValueError, match=r"compute_dtype=torch\.float64"):
        HessianOperator(dense(), CE, [batch])
    assert HessianOperator(dense(), CE, [batch], compute_dtype=torch.float64).shape[0] == 15
    with pytest.raises(ValueError, match="does not run in") as caught:
        HessianOperator(dense(), CE, [(numbers(), CLASSES.int())])
    assert "compute_dtype" not in str(caught.value)


def test_tensors_are_named_by_their_keys():
    batch = {"x": numbers(), "labels": CLASSES.int()}
    with pytest.raises(ValueError, match=r"batch\['labels'\]\.long\(\) .*\(torch\.int32\)"):
        HessianOperator(dense(), CE, [batch])


def test_an_error_that_no_cast_mends_stays_as_it_is():
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        HessianOperator(nn.Linear(5, 3), CE, [(numbers(), CLASSES)])
