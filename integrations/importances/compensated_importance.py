"""Channel importance after compensation: loss that the following layers cannot make up for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.integrations.channels.slices import ChannelSlice, by_name, read_group
from hesscurv.integrations.importances.curvature_importance import (
    CurvatureImportance,
    Normalizer,
    root_of,
)
from hesscurv.integrations.importances.reader_rows import ReaderRows, reader_rows
from hesscurv.integrations.importances.ridge import centred, relative_ridge, ridge_factor
from hesscurv.integrations.importances.sample_rows import Rows, check_rows
from hesscurv.linalg.random_matrices import default_generator
from hesscurv.objective.objective import Objective
from hesscurv.objective.parameters import ParamSelection, select_parameters
from hesscurv.pruning.curvature.layer_inputs import has_covariance
from hesscurv.pruning.weights import Weight


class CompensatedImportance(CurvatureImportance):
    r"""Score channels by what `compensate_channels_` cannot make up for.

    A layer with weights W (o, i) that loses its inputs in P and is refitted changes by
    :math:`\Delta W = -W_P [A^{-1}]_{PP}^{-1} [A^{-1}]_{P \cdot}` with :math:`A = C + \mu I`, C the
    covariance of its inputs: a block of the Optimal Brain Surgeon. A channel's score is the
    resulting rise in loss, :math:`\frac{1}{2N} \sum_n \langle g_n, \Delta W \rangle^2`, with rows
    :math:`g_n` of the Fisher or Gauss-Newton matrix as in `FisherImportance`, summed inside over
    all layers that read it. A redundant channel costs nothing.

    The means of the inputs are compensated by the layer's bias, or by a following batch norm; see
    `compensate_channels_`, which must be called before the groups of a step are pruned. With
    `rank_jointly` each channel is chosen given the removed ones: the layers are refitted after
    each, and of two interchangeable channels one stays.

    On training data, the curvature of the loss is dominated by the few samples on which the model
    is uncertain. A task with the squared outputs as loss measures the change of all outputs.

    Args:
        model: The pruner's model.
        task: A task with outputs and loss, see `hesscurv.supervised`.
        batches: A list or DataLoader of batches; the same ones in every step.
        rows: "ggn", the default, or "fisher", see `FisherImportance`.
        draws: Rows per sample for "ggn", each with new signs; default 1.
        params: The weights that may be refitted, see `select_parameters`; of these, the ones of
            dense layers and of two-dimensional convolutions without groups. Default all.
        damping: mu, relative to the mean of the diagonal of C; default 1e-3.
        exact: The fraction of all channels that a joint ranking orders one by one; the rest follow
            by their scores at that point. Choose more than one step removes; default 0.5.
        normalizer: Applied to each group's scores, see `CurvatureImportance`; default None.
        costs: Cost of the parameters' entries, by name, as from `macs_per_entry`; scores are then
            loss per unit of cost. Default None, the loss itself.
        generator: Source of the random signs, on the CPU; default a new one with seed 0.

    Raises:
        TypeError: If the model, the task or the batches have the wrong type.
        ValueError: If an option is out of range. When scoring: if a group has no measured layer,
            the samples are not along the first axis of a layer's inputs, and as in
            `CurvatureImportance`.

    Cost:
        One backward pass per sample and draw, R o i floats for R rows and ``i^3`` operations per
        layer; for each channel of a joint ranking R o i C more, with C channels in its layer.

    References:
        Hassibi and Stork, NIPS 1992, equation (5), and Kurtic et al., NeurIPS 2023, arXiv
        2302.04089, equations (2) and (3), for the blocks.

    Example:
        >>> import torch_pruning
        >>> from hesscurv.integrations import CompensatedImportance
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).double()
        >>> importance = CompensatedImportance(net, task, batches)
        >>> pruner = torch_pruning.pruner.BasePruner(
        ...     net, inputs, importance, pruning_ratio=0.5, ignored_layers=[net[2]])
        >>> _ = hesscurv.integrations.remove_channels_(net, task, batches, pruner)
        >>> net[0].out_features
        4
    """

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        batches: Iterable[Any],
        *,
        rows: Rows = "ggn",
        draws: int = 1,
        params: ParamSelection = None,
        damping: float = 1e-3,
        exact: float = 0.5,
        normalizer: Normalizer = None,
        costs: Mapping[str, float] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            model, weights="readers", group_reduction="sum", normalizer=normalizer, costs=costs
        )
        check_rows(rows, draws, None)
        if isinstance(damping, bool) or not 0 < damping < float("inf"):
            raise ValueError(f"expected a positive finite damping, got {damping!r}")
        if isinstance(exact, bool) or not 0 < exact <= 1:
            raise ValueError(f"expected exact in (0, 1], got {exact!r}")
        self._damping, self._exact = damping, exact
        self._kind, self._draws = rows, draws if rows == "ggn" else 1
        self._task, self._batches = task, batches
        self._signs = default_generator(generator)
        chosen = set(select_parameters(self.model, params))
        # By name, since pruning replaces the parameters.
        self._layers = [
            name
            for name, module in self.model.named_modules()
            if has_covariance(Weight(module, "weight")) and f"{name}.weight" in chosen
        ]
        self._rows_of: dict[str, ReaderRows] = {}

    def refresh(self) -> None:
        """Measure gradients and inputs of the present model, in one pass over the batches."""
        self._rows_of, self._ranks = {}, None
        layers = {name: self.model.get_submodule(name) for name in self._layers}
        objective = Objective(
            self.model,
            self._task,
            self._batches,
            [f"{name}.weight" for name in layers],
            training=False,
            compute_dtype=None,
            budget=None,
        )
        with torch.enable_grad():
            found = reader_rows(objective, layers, self._kind, self._draws, self._signs)
        self._rows_of = {f"{name}.weight": rows for name, rows in found.items()}
        self._has_changed()

    def measured(self) -> set[str]:
        """Return the names of the measured weights."""
        return set(self._rows_of)

    def _why_unmeasured(self, names: list[str]) -> str:
        kinds = []
        for name in names:
            module = self.model.get_submodule(name.rpartition(".")[0])
            if not has_covariance(Weight(module, name.rpartition(".")[2])):
                kinds.append(f"{name!r} of a {_describe(module)}")
        if not kinds:
            return super()._why_unmeasured(names)
        return (
            "layers that this importance refits are nn.Linear and nn.Conv2d without groups and "
            f"with padding in numbers, not {', '.join(kinds)}; use FisherImportance, which scores "
            "layers of any type"
        )

    def _follow(self, changed: bool) -> None:
        if changed or not self._rows_of:
            self.refresh()

    def _apart(self, scores: Tensor) -> Tensor:
        """Order channels of zero cost, such as those of a dead layer, by position."""
        if len(scores) > 1 and bool((scores == 0).all()):
            smallest = torch.finfo(scores.dtype).tiny
            return torch.arange(len(scores), dtype=scores.dtype, device=scores.device) * smallest
        return scores

    def _fit(self, name: str) -> _Fit:
        weight = dict(self.model.named_parameters())[name]
        return _Fit.of(self._rows_of[name], weight.detach(), self._damping)

    def _rows(self, slices: list[ChannelSlice], count: int) -> tuple[Tensor, Tensor]:
        total: Tensor | None = None
        for name, mine in by_name(slices).items():
            rows = self._fit(name).rows(_inputs_of(mine, count))
            total = rows if total is None else total + rows
        assert total is not None
        return total, total.new_zeros(count)

    def _rank_all(self) -> dict[Any, Tensor]:
        """Rank the channels of all groups of the pruner, each given the removed ones."""
        groups: list[_Group] = []
        fits: dict[str, _Fit] = {}
        for group, parts in self._groups():
            found = read_group(group, self._names(), True)
            slices = [part for layer in self._known(found) for part in layer]
            inputs = {n: _inputs_of(mine, found.count) for n, mine in by_name(slices).items()}
            fits |= {name: self._fit(name) for name in inputs if name not in fits}
            costs = torch.ones(found.count, dtype=torch.float32, device="cpu").double()
            if self.costs is not None:
                costs = self._costs_of(read_group(group, self._names())).double()
            units = torch.arange(found.count, device="cpu").view(parts, -1).mT.tolist()
            together = {n: [torch.cat([i[c] for c in u]) for u in units] for n, i in inputs.items()}
            costs = costs.view(parts, -1).sum(0)
            groups.append(_Group(root_of(group), parts, together, costs))
        places = _eliminate(groups, fits, self._exact)
        return {
            g.root: place.float().repeat(g.parts) for g, place in zip(groups, places, strict=True)
        }


def _describe(module: nn.Module) -> str:
    """Return a layer's type and its unsupported options."""
    options = []
    if getattr(module, "groups", 1) != 1:
        options.append(f"groups={module.groups}")
    if isinstance(getattr(module, "padding", None), str):
        options.append(f"padding={module.padding!r}")
    return type(module).__name__ + (f" with {' and '.join(options)}" if options else "")


@dataclass
class _Group:
    """The channels of a group: by reader, the inputs of each channel, (e,) each.

    With several equal parts, such as heads, a channel represents those at its position in all.
    """

    root: Any
    parts: int
    inputs: dict[str, list[Tensor]]
    costs: Tensor


@dataclass
class _Fit:
    """A layer fitted to its remaining inputs; removed ones are zero throughout."""

    gradients: Tensor  # (R, o i)
    sums: Tensor  # (R, o)
    mean: Tensor  # (i,)
    weight: Tensor  # (o, i), float64
    inverse: Tensor  # (i, i), float64

    @classmethod
    def of(cls, rows: ReaderRows, weight: Tensor, damping: float) -> _Fit:
        mean = rows.mean if rows.has_intercept else torch.zeros_like(rows.mean)
        C = centred(rows.second, mean, rows.gradients.dtype)
        inverse = torch.cholesky_inverse(ridge_factor(C, relative_ridge(C, damping)))
        W = weight.to(inverse).flatten(1).clone()
        return cls(rows.gradients.flatten(1), rows.sums, mean, W, inverse)

    def change(self, inputs_ce: Tensor) -> Tensor:
        """Return the change of the weights for the removal of each of some channels, (c, o, i)."""
        blocks = self.inverse[inputs_ce[:, :, None], inputs_ce[:, None, :]]
        across = torch.linalg.solve(blocks, self.inverse[inputs_ce])
        return -self.weight[:, inputs_ce].transpose(0, 1) @ across

    def rows(self, inputs: list[Tensor]) -> Tensor:
        """Return the change of each row's combination of outputs, by channel, (R, c)."""
        out = self.gradients.new_zeros(len(self.gradients), len(inputs), dtype=torch.float64)
        sizes: dict[int, list[int]] = {}
        inputs = [self._left(mine) for mine in inputs]
        for channel, mine in enumerate(inputs):
            if len(mine):
                sizes.setdefault(len(mine), []).append(channel)
        for channels in sizes.values():
            change = self.change(torch.stack([inputs[c] for c in channels]))
            straight = self.gradients @ change.flatten(1).to(self.gradients).mT
            constant = self.sums @ (change @ self.mean).to(self.sums).mT
            out[:, channels] = (straight - constant).double()
        return out

    def remove_(self, inputs_e: Tensor) -> None:
        inputs_e = self._left(inputs_e)
        if len(inputs_e) == 0:
            return
        self.weight = self.weight + self.change(inputs_e[None])[0]
        block = self.inverse[inputs_e][:, inputs_e]
        self.inverse = self.inverse - self.inverse[:, inputs_e] @ torch.linalg.solve(
            block, self.inverse[inputs_e]
        )
        self.weight[:, inputs_e] = 0
        self.inverse[inputs_e] = 0
        self.inverse[:, inputs_e] = 0

    def _left(self, inputs_e: Tensor) -> Tensor:
        inputs_e = inputs_e.to(self.inverse.device)
        return inputs_e[self.inverse.diagonal()[inputs_e] > 0]


def _inputs_of(parts: list[ChannelSlice], count: int) -> list[Tensor]:
    """Return the inputs of a reader's weight matrix for each of C channels, (e,) each.

    Behind a split a layer reads only some channels; the others have none.
    """
    found: list[list[Tensor]] = [[] for _ in range(count)]
    for part in parts:
        kernel = torch.arange(torch.Size(part.shape[2:]).numel(), device="cpu")
        entries = part.index[:, None] * len(kernel) + kernel
        for channel, mine in zip(part.channel.tolist(), entries, strict=True):
            found[channel].append(mine)
    nothing = torch.empty(0, dtype=torch.long, device="cpu")
    return [torch.cat(mine).unique() if mine else nothing for mine in found]


def _eliminate(groups: list[_Group], fits: dict[str, _Fit], exact: float) -> list[Tensor]:
    """Return each channel's rank in the order of removal, 0 first, by group."""
    left = [torch.ones(len(g.costs), dtype=torch.bool, device="cpu") for g in groups]
    places = [torch.zeros(len(g.costs), dtype=torch.float32, device="cpu").double() for g in groups]
    rows = [_rows_left(g, fits, keep) for g, keep in zip(groups, left, strict=True)]
    gone_R = rows[0].new_zeros(len(rows[0]))
    count = sum(len(g.costs) for g in groups)

    def rises(g: int, all_may_go: bool = False) -> Tensor:
        rise = (0.5 * rows[g].square().sum(0) + gone_R @ rows[g]).cpu() / groups[g].costs
        may_go = left[g] & (all_may_go or int(left[g].sum()) > 1)
        return rise.masked_fill(~may_go, float("inf"))

    place = 0
    while place < exact * count and any(int(keep.sum()) > 1 for keep in left):
        found = [rises(g) for g in range(len(groups))]
        g = min(range(len(groups)), key=lambda i: float(found[i].min()))
        c = int(found[g].argmin())
        gone_R = gone_R + rows[g][:, c]
        for name, inputs in groups[g].inputs.items():
            fits[name].remove_(inputs[c])
        left[g][c], places[g][c] = False, place
        place += 1
        for i, other in enumerate(groups):
            if other.inputs.keys() & groups[g].inputs.keys():
                rows[i] = _rows_left(other, fits, left[i])
    # The rest by their present scores; the best of each group last.
    rest = []
    for g in range(len(groups)):
        rise = rises(g, True)
        best = int(rise.masked_fill(~left[g], -float("inf")).argmax())
        rest += [(c == best, float(rise[c]), g, c) for c in left[g].nonzero()[:, 0].tolist()]
    for _, _, g, c in sorted(rest):
        places[g][c] = place
        place += 1
    return places


def _rows_left(group: _Group, fits: dict[str, _Fit], left: Tensor) -> Tensor:
    """Return the rows of a group's channels, (R, C); zero for removed ones."""
    channels = left.nonzero()[:, 0].tolist()
    total = sum(
        fits[name].rows([inputs[c] for c in channels]) for name, inputs in group.inputs.items()
    )
    assert isinstance(total, Tensor)
    out = total.new_zeros(len(total), len(left))
    out[:, left] = total
    return out
