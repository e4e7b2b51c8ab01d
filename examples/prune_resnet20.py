"""Prune a network to 80 %, fine-tune it with its masks, save it without its zeros, load it again.

    pip install 'hesscurv[examples]'
    python examples/prune_resnet20.py                  # a small conv net on digits; seconds
    python examples/prune_resnet20.py --data DIR --checkpoint FILE     # about 10 minutes on a core

DIR holds CIFAR-10 as ``cifar-10-batches-py``, FILE the state dict of WoodFisher's ResNet-20. Its
shortcuts' convolutions stay dense, as in the papers that prune this checkpoint. The test images are
used for nothing but the accuracies that are printed.
"""

import argparse
import copy
import io
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))

import torch
import torch.nn.functional as F
from models import CIFARResNet
from pruning_cases import cifar10, load_resnet20
from samples import augmented, balanced, digits
from torch import nn
from tqdm import tqdm

import hesscurv
from hesscurv.pruning import (
    PruningOptions,
    load_pruned_,
    load_sparse,
    masks_of,
    prune_model,
    save_sparse,
)

TASK = hesscurv.supervised(nn.CrossEntropyLoss())


class SmallNet(nn.Module):
    """Three convolutions with batch norm, for the digits' 8x8 pixels."""

    def __init__(self):
        super().__init__()
        layers = []
        for fan_in, fan_out, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2)):
            layers += [nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(fan_out), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


def load_digits():
    _, x, y = digits(None, 8, 1)
    x, test = (x - 0.5) / 0.5, balanced(y, 500)
    return (x[~test], y[~test]), (x[test], y[test])


def train(model, data, optimizer, epochs, batch_size, shifted, description):
    """Train by cross-entropy, with a cosine from the optimiser's learning rate to zero."""
    x, y = data
    model.train()
    batches = [i for _ in range(epochs) for i in torch.randperm(len(y)).split(batch_size)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for index in tqdm(batches, desc=description, unit="batch"):
        optimizer.zero_grad()
        part = augmented(x[index], border=-1.0) if shifted else x[index]  # black
        F.cross_entropy(model(part), y[index]).backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def logits_of(model, x):
    return torch.cat([model.eval()(part) for part in x.split(500)])


def accuracy(model, data):
    return float((logits_of(model, data[0]).argmax(1) == data[1]).double().mean())


def dense_bytes(model):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="holds cifar-10-batches-py")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="the ResNet-20's state")
    parser.add_argument("--sparsity", type=float, default=0.8, help="default: 0.8")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the sparse file")
    args = parser.parse_args()
    if (args.data is None) != (args.checkpoint is None):
        parser.error("expected both of --data and --checkpoint, or neither")
    if not 0 < args.sparsity < 1:
        parser.error("expected a --sparsity between 0 and 1")
    if args.out is not None and not args.out.resolve().parent.is_dir():
        parser.error(f"--out: there is no folder {args.out.resolve().parent}")
    start = time.perf_counter()
    torch.manual_seed(0)

    if args.data is not None:
        make_model, (x, y, *test) = CIFARResNet, cifar10(args.data)
        data, model = (x, y), load_resnet20(args.checkpoint)
        tuning = {"epochs": 1, "batch_size": 128, "shifted": True}
        learning_rate, gradients, max_calibration = 0.01, 500, 2000
    else:
        make_model, (data, test) = SmallNet, load_digits()
        model = make_model()
        # The digits are centred, the test images too: shifts of a pixel cost 5 % of accuracy.
        tuning = {"epochs": 1, "batch_size": 32, "shifted": False}
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        train(model, data, optimizer, **tuning | {"epochs": 8}, description="training")
        learning_rate, gradients, max_calibration = 0.01, 200, 400
    dense_accuracy, dense = accuracy(model, test), copy.deepcopy(model)

    # Prune: curvature from the first training images, the true loss from the last ones.
    order = torch.randperm(len(data[1]))
    batches = [(data[0][i], data[1][i]) for i in order[:-max_calibration].split(250)]
    calibration = [(data[0][i], data[1][i]) for i in order[-max_calibration:].split(250)]
    report = prune_model(
        model,
        TASK,
        batches,
        args.sparsity,
        gradients_per_stage=gradients,
        weights=lambda name, parameter: "shortcut" not in name,
        progress=True,
        options=PruningOptions(calibration=calibration, max_calibration=max_calibration),
    )
    print(report)
    masks, pruned_accuracy = masks_of(model), accuracy(model, test)

    # Fine-tune: the masks are torch.nn.utils.prune's, so that any training loop keeps them.
    optimizer = torch.optim.SGD(
        model.parameters(), lr=learning_rate, momentum=0.9, weight_decay=1e-4
    )
    train(model, data, optimizer, **tuning, description="fine-tuning")
    tuned_accuracy = accuracy(model, test)

    # Save the survivors and where they are; load into a model with masks, and into a dense one.
    with tempfile.TemporaryDirectory() as folder:
        path = args.out or Path(folder) / "pruned.sparse"
        sparse_bytes = save_sparse(model, path)
        reloaded, plain = make_model(), make_model()
        load_pruned_(reloaded, load_sparse(path, masks=True))  # to train on
        plain.load_state_dict(load_sparse(path, masks=False))  # to use anywhere
    reloaded_accuracy = accuracy(reloaded, test)

    print(f"\n{'':12}{'test accuracy':>14}{'bytes':>12}")
    before = dense_bytes(dense)
    print(f"{'dense':12}{dense_accuracy:14.2%}{before:12,}  torch.save of the state dict")
    print(f"{'pruned':12}{pruned_accuracy:14.2%}")
    print(f"{'fine-tuned':12}{tuned_accuracy:14.2%}{sparse_bytes:12,}  save_sparse, ", end="")
    print(f"{sparse_bytes / before:.1%} of that")
    print(f"{'reloaded':12}{reloaded_accuracy:14.2%}")
    print(f"\n{time.perf_counter() - start:.0f} s in all.")

    kept, numel = (sum(f(m) for m in masks.values()) for f in (torch.sum, torch.numel))
    assert int(kept) == report.kept == numel - round(args.sparsity * numel), "inexact sparsity"
    for same in (masks_of(model), masks_of(reloaded)):
        assert masks.keys() == same.keys()
        assert all(torch.equal(masks[name], same[name]) for name in masks), "a mask has moved"
    state = plain.state_dict()
    assert all(bool((state[name][~mask] == 0).all()) for name, mask in masks.items())
    outputs = logits_of(model, test[0])
    assert torch.equal(logits_of(reloaded, test[0]), outputs), "the masked model differs"
    assert torch.equal(logits_of(plain, test[0]), outputs), "the dense model differs"
    assert sparse_bytes < before


if __name__ == "__main__":
    main()
