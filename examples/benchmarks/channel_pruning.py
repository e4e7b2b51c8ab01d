"""Channel pruning of a ResNet's inner widths by torch-pruning, with its importances and with ours.

Import it; it is not run. `contenders` makes the importances by kind and setting, `shrunk` prunes a
model with one of them to a number of multiply-adds (MACs), in stages.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from models import CIFARResNet
from resnet56 import Batches, Images
from torch import Tensor, nn
from torch.nn import functional as F

import hesscurv
from hesscurv.integrations import (
    CompensatedImportance,
    EigenspaceImportance,
    FisherImportance,
    macs_per_entry,
    remove_channels_,
)

OURS = ("eigenspace", "fisher", "ggn", "compensated")
THEIRS = ("magnitude", "taylor", "hessian")
JOINTLY = "per MAC, jointly"
COMPENSATED = ", compensated"  # what a setting ends in
UNITS = {"group_reduction": "sum", "normalizer": None}
Make = Callable[[nn.Module, Batches, int], Any]  # model, batches, seed -> an importance


# -- contenders ---------------------------------------------------------------------------------


def task() -> hesscurv.Task:
    return hesscurv.supervised(nn.CrossEntropyLoss())


class Logits(hesscurv.Task):
    """How much the logits change, up to a constant that the softmax does not see.

    Images that the network was trained on leave it sure of nearly all of them, and the loss's own
    curvature to the few others; to the logits all count.
    """

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return 0.5 * (outputs - outputs.mean(1, keepdim=True)).square().sum(1).mean()


def taylor(model: nn.Module, batches: Batches, **options: Any) -> Any:
    """Return torch-pruning's Taylor importance, with the mean gradient in .grad as it asks for."""
    model.zero_grad()
    for x, y in batches:
        (F.cross_entropy(model(x), y) / len(batches)).backward()
    return tp.importance.GroupTaylorImportance(**options)


def hessian(model: nn.Module, batches: Batches, **options: Any) -> Any:
    """Return torch-pruning's Hessian importance, used as its documentation shows."""
    importance = tp.importance.GroupHessianImportance(**options)
    importance.zero_grad()
    for x, y in batches:
        for i in range(len(x)):
            model.zero_grad()
            F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
            importance.accumulate_grad(model)
    return importance


def eigenspace(k: int, costs: dict[str, float] | None) -> Make:
    known: dict[Any, hesscurv.Eigenpairs] = {}

    def compute(model: nn.Module, batches: Batches, seed: int) -> hesscurv.Eigenpairs:
        widths = tuple(len(p) for p in model.parameters())
        key = (seed, widths, float(sum(p.detach().double().sum() for p in model.parameters())))
        if key not in known:  # the dense model's serve all targets
            part = [(x[: len(x) // 4], y[: len(y) // 4]) for x, y in batches]
            G = hesscurv.GGNOperator(model, task(), part)
            known[key] = hesscurv.eigsh(G, k, tol=5e-2)
        return known[key]

    return lambda model, batches, seed: EigenspaceImportance(
        model, lambda m: compute(m, batches, seed), weights="readers", costs=costs
    )


def rows(kind: Any, costs: dict[str, float] | None) -> Make:
    return lambda model, batches, seed: FisherImportance(
        model,
        task(),
        batches,
        rows=kind,
        weights="readers",
        costs=costs,
        generator=torch.Generator().manual_seed(seed),
    )


def compensated(loss: hesscurv.Task, costs: dict[str, float]) -> Make:
    return lambda model, batches, seed: CompensatedImportance(
        model,
        loss,
        batches,
        params=lambda name, p: name.endswith("conv2.weight"),
        exact=0.3,
        costs=costs,
        generator=torch.Generator().manual_seed(seed),
    )


def contenders(costs: dict[str, float], k: int) -> dict[tuple[str, str], Make]:
    """Return an importance for each kind and setting."""
    out: dict[tuple[str, str], Make] = {}
    for setting, given in [
        ("per loss", None),
        ("per MAC", costs),
        (JOINTLY, costs),
        (JOINTLY + COMPENSATED, costs),
    ]:
        out["eigenspace", setting] = eigenspace(k, given)
        out["fisher", setting] = rows("fisher", given)
        out["ggn", setting] = rows("ggn", given)
    for name, loss in [("loss", task()), ("logits", Logits())]:
        setting = f"{name}, {JOINTLY}{COMPENSATED}"
        out["compensated", setting] = compensated(loss, costs)
    # Dearer still where MACs are many: more channels at the same MACs, of the layers in the back.
    dearer = {name: cost**1.5 for name, cost in costs.items()}
    setting = f"logits, costs^1.5, {JOINTLY}{COMPENSATED}"
    out["compensated", setting] = compensated(Logits(), dearer)
    for name, options in [("defaults", {}), ("sum, None", UNITS)]:
        out["magnitude", name] = lambda model, batches, seed, options=options: (
            tp.importance.GroupMagnitudeImportance(**options)
        )
        out["taylor", name] = lambda model, batches, seed, options=options: taylor(
            model, batches, **options
        )
        out["hessian", name] = lambda model, batches, seed, options=options: hessian(
            model, batches, **options
        )
    out["both", "defaults" + COMPENSATED] = out["magnitude", "defaults"]
    return out


# -- pruning to a number of MACs ----------------------------------------------------------------


def macs(model: nn.Module, example: Tensor) -> float:
    return tp.utils.count_ops_and_params(model, example)[0]


def prune(
    model: CIFARResNet, importance: Any, example: Tensor, budget: float, setting: str, data: Batches
) -> None:
    """Prune a model in place, globally, to the most channels with at most `budget` MACs."""
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance,
        global_pruning=True,
        ignored_layers=[model.conv1, model.linear, *(block.conv2 for block in model.blocks())],
    )
    if JOINTLY in setting:
        importance.rank_jointly(pruner)
    before = macs(model, example)
    per_entry = macs_per_entry(model, example)
    names = {m: name for name, m in model.named_modules()}

    def chosen(ratio: float) -> list[Any]:
        # Groups are yielded before they are pruned: a ratio is tried without a copy.
        pruner.per_step_pruning_ratio, pruner.current_step = [0.0, ratio], 0
        return list(pruner.step(interactive=True))

    def saved(groups: list[Any]) -> float:
        total = 0.0
        for group in groups:
            name = names[group[0].dep.target.module]
            first, second = model.get_submodule(name), model.get_submodule(name[:-1] + "2")
            # All outputs of the one, all inputs of the other: no other weight goes.
            for layer, axis in ((first, 0), (second, 1)):
                weight = layer.weight
                per_channel = (
                    weight.numel() / weight.shape[axis] * per_entry[names[layer] + ".weight"]
                )
                total += len(group[0].idxs) * per_channel
        return total

    low, high = 0.0, 0.97
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if before - saved(chosen(middle)) > budget else (low, middle)
    groups = chosen(high)
    damping = 1e-3 if COMPENSATED in setting else None
    remove_channels_(model, task(), data, groups, damping=damping)
    if macs(model, example) > 1.02 * budget:
        raise RuntimeError(f"expected at most {budget:.3g} MACs, got {macs(model, example):.3g}")


def shrunk(
    images: Images,
    make: Make,
    batches: Batches,
    seed: int,
    target: float,
    stages: int,
    setting: str,
) -> CIFARResNet:
    """Return the dense model with `target` times fewer MACs, reached in equal factors."""
    model, example = copy.deepcopy(images.model), images.x[:1]
    dense = macs(model, example)
    for stage in range(1, stages + 1):
        model.eval()
        budget = dense / target ** (stage / stages)
        prune(model, make(model, batches, seed), example, budget, setting, batches)
    model.zero_grad()
    return model


def of_widths(images: Images, widths: list[int]) -> CIFARResNet:
    """Return a model of the pruned shape, to load a state dict into."""
    model = copy.deepcopy(images.model)
    for block, width in zip(model.blocks(), widths, strict=True):
        gone = list(range(width, block.conv1.out_channels))
        tp.prune_conv_out_channels(block.conv1, gone)
        tp.prune_batchnorm_out_channels(block.bn1, gone)
        tp.prune_conv_in_channels(block.conv2, gone)
    return model
