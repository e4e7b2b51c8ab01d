"""Base class of the channel importances: reading groups, reducing layers, validating scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from hesscurv.integrations.channels.costs import check_costs
from hesscurv.integrations.channels.graph import remake_, repair_
from hesscurv.integrations.channels.slices import (
    ChannelSlice,
    GroupChannels,
    by_name,
    channel_sums,
    read_group,
)
from hesscurv.integrations.importances.joint_ranking import backward_elimination
from hesscurv.interface.descriptions import Words, describe_object
from hesscurv.objective.parameters import unwrap

if TYPE_CHECKING:
    from typing_extensions import Self

Reduction = Literal["sum", "mean", "max", "prod", "first"] | None
Normalizer = str | Callable[[Tensor], Tensor] | None
Weights = Literal["group", "readers"]

_REDUCTIONS = ("sum", "mean", "max", "prod", "first", None)
_NORMALIZERS = ("sum", "mean", "max", "standarization", "gaussian", "lamp")


class CurvatureImportance(tp.importance.Importance):
    """An importance that scores a channel by a quadratic form of the entries it removes.

    Subclasses declare the measured parameters, and evaluate the form on slices of them.

    Args:
        model: The pruner's model; wrappers of torch.compile and DDP are unwrapped.
        weights: The weights that represent a channel. "group": all that it removes. "readers": only
            those that read it, the input side of convolutions and dense layers; setting these to
            zero removes the channel as well, and no layer counts it twice. Groups without readers
            are used whole.
        group_reduction: "sum" uses the channel's entries in all layers jointly. The others evaluate
            each layer separately and return the "mean", "max", "prod", the "first" layer's, or,
            with None, all of them, (layers, C), which no pruner supports.
        normalizer: Applied to each group's scores, as in torch-pruning: None, "sum", "mean", "max",
            "standarization", "gaussian", "sentinel_<fraction>", "lamp", or a function. None keeps
            the unit of the loss, which is comparable between layers.
        costs: Cost per entry, by name of the parameter; others cost nothing. Before normalisation
            scores are divided by the sum over all removed entries: loss per unit of cost. None for
            no division.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weights: Weights,
        group_reduction: Reduction,
        normalizer: Normalizer,
        costs: Mapping[str, float] | None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
        if weights not in ("group", "readers"):
            raise ValueError(f"expected weights 'group' or 'readers', got {weights!r}")
        if group_reduction not in _REDUCTIONS:
            raise ValueError(
                f"expected group_reduction to be one of {_REDUCTIONS}, got {group_reduction!r}"
            )
        check_normalizer(normalizer)
        check_costs(costs)
        self.model = unwrap(model)
        self.weights = weights
        self.group_reduction = group_reduction
        self.normalizer = normalizer
        self.costs = None if costs is None else dict(costs)
        self._marks: tuple[Any, ...] = ()
        self._pruner: Any = None
        self._ranks: dict[Any, Tensor] | None = None

    def __repr__(self) -> str:
        """Return the model and the settings."""
        settings = {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "model"}
        return describe_object(self, model=Words(type(self.model).__name__), **settings)

    def rank_jointly(self, pruner: Any) -> Self:
        """Rank the channels of all of a pruner's groups jointly.

        From then on the scores are ranks, see `backward_elimination`: the next channel removed is
        the one that adds least to the loss of all removed in this step. Individual scores ignore
        that effects add up or cancel, which matters once many are removed at once. Use it with
        global pruning; each step ranks the remaining channels again.

        Args:
            pruner: The `torch_pruning.BasePruner` that has this importance.

        Returns:
            The importance itself.

        Raises:
            ValueError: If there is a normalizer or a group_reduction other than "sum", since ranks
                have no unit and rows are joint, or no rows, as with kind "diagonal".
        """
        if self.normalizer is not None or self.group_reduction != "sum":
            raise ValueError(
                "expected normalizer=None and group_reduction='sum' for a joint ranking, got "
                f"{self.normalizer!r} and {self.group_reduction!r}"
            )
        repair_(pruner.DG)
        self._pruner, self._ranks = pruner, None
        return self

    def __call__(self, group: Any) -> Tensor | None:
        """Return a group's scores, lowest removed first; called by the pruner.

        Args:
            group: A `torch_pruning.Group`.

        Returns:
            Shape (C,) for the C indices of the group's first layer, on the parameters' device;
            None, which excludes the group, if its layers have no parameters.

        Raises:
            ValueError: If none of the group's parameters is measured, scores are not finite or all
                equal, or a layer's weight is computed from other parameters.
        """
        if getattr(group, "_DG", None) is not None and repair_(group._DG):
            remake_(group)
        # Independent of the pruner's grad mode; code that needs gradients enables them.
        with torch.no_grad():
            found = read_group(group, self._names(), self.weights == "readers")
            if not found.layers:
                return None
            changed = self._has_changed()
            if changed:
                self._ranks = None
            try:
                self._follow(changed)
            except BaseException:
                self._marks = ()  # otherwise the next call would use outdated measurements
                raise
            if self._pruner is not None:
                self._ranks = self._ranks or self._rank_all()
                return self._rank_of(group, found)
            layers = self._known(found)
            scores = self._apart(self._reduced(layers, found.count))
            _check_scores(scores, found)
            if self.costs is not None:
                scores = scores / self._costs_of(read_group(group, self._names())).to(scores)
            scores = normalize(scores, self.normalizer)
            _check_scores(scores, found)
        return scores

    @abstractmethod
    def measured(self) -> set[str]:
        """Return the names of the measured parameters."""

    @abstractmethod
    def refresh(self) -> None:
        """Measure the present model. Called automatically once the model has changed.

        Changes of shapes, in-place changes of parameters, and changes of buffers are detected; call
        it after writes through `.data`.
        """

    @abstractmethod
    def _rows(self, slices: list[ChannelSlice], count: int) -> tuple[Tensor, Tensor]:
        """Return a quadratic form of the channels' entries in some slices, in float64.

        Rows (R, C), half of whose squares are summed, and an additive term, shape (C,).
        """

    @abstractmethod
    def _follow(self, changed: bool) -> None:
        """Update to the present state of the model, after a change or not."""

    def _why_unmeasured(self, names: list[str]) -> str:
        """Explain why parameters were not measured, and how to measure them."""
        return "select them (`params`)"

    def _apart(self, scores: Tensor) -> Tensor:
        """Return scores with meaningful ties broken; others are refused."""
        return scores

    def _form(self, slices: list[ChannelSlice], count: int) -> Tensor:
        rows, extra = self._rows(slices, count)
        dtype = next(self.model.parameters()).dtype
        return (0.5 * rows.square().sum(0) + extra).to(torch.promote_types(dtype, torch.float32))

    def _known(self, found: GroupChannels) -> list[list[ChannelSlice]]:
        """Return the measured slices of each of a group's layers."""
        measured = self.measured()
        layers = [[part for part in layer if part.name in measured] for layer in found.layers]
        if not any(layers):
            missing = sorted({part.name for layer in found.layers for part in layer})
            root = found.root.partition(" (")[0]
            raise ValueError(
                f"none of the parameters {missing} of the group of {found.root} was measured; "
                f"{self._why_unmeasured(missing)}, or add {root!r}, whose channels these are, to "
                "the pruner's ignored_layers"
            )
        return [layer for layer in layers if layer]

    def _groups(self) -> Iterator[tuple[Any, int]]:
        """Yield the pruner's groups as it scores them, and the number of equal parts of each.

        Channels at the same position of all parts, such as heads, go together. An attention's group
        has the following layer as its root.
        """
        pruner = self._pruner
        for group in pruner.DG.get_all_groups(
            ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
        ):
            if pruner._is_atten_group(group)[0]:
                group = pruner._downstream_node_as_root_if_attention(group)
                if group is None:
                    continue
            yield group, pruner._get_channel_groups(group)

    def _rank_all(self) -> dict[Any, Tensor]:
        """Rank the channels of all groups of the pruner, by the groups' roots."""
        roots, rows, extras, costs, parts = [], [], [], [], []
        for group, count in self._groups():
            found = read_group(group, self._names(), self.weights == "readers")
            slices = [part for layer in self._known(found) for part in layer]
            mine, extra = self._rows(slices, found.count)
            _check_finite(mine.square().sum(0) + extra, found)
            each = torch.ones_like(extra)
            if self.costs is not None:
                each = self._costs_of(read_group(group, self._names())).to(extra)
            roots.append(root_of(group))
            parts.append(count)
            rows.append(mine.unflatten(1, (count, -1)).sum(1))
            extras.append(extra.view(count, -1).sum(0))
            costs.append(each.view(count, -1).sum(0))
        sizes = torch.tensor([len(extra) for extra in extras], device=extras[0].device)
        places = backward_elimination(
            torch.cat(rows, 1),
            torch.cat(extras),
            torch.cat(costs),
            torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes),
        )
        each_place = places.float().split(sizes.tolist())
        return {
            root: place.repeat(count)
            for root, place, count in zip(roots, each_place, parts, strict=True)
        }

    def _rank_of(self, group: Any, found: GroupChannels) -> Tensor:
        assert self._ranks is not None
        ranks = self._ranks.get(root_of(group))
        if ranks is None or len(ranks) != found.count:
            raise ValueError(
                f"expected one of the pruner's groups with all of its channels, got the group of "
                f"{found.root}; rank its channels without `rank_jointly`"
            )
        return ranks

    def _names(self) -> dict[int, str]:
        return {id(p): name for name, p in self.model.named_parameters()}

    def _has_changed(self) -> bool:
        """Whether the model has changed since the last call; records its state."""
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        marks = tuple(
            (name, tuple(t.shape), t.data_ptr(), 0 if t.is_inference() else t._version)
            for name, t in tensors
        )
        before, self._marks = self._marks, marks
        return marks != before

    def _costs_of(self, found: GroupChannels) -> Tensor:
        """Return the cost of each channel of a group, shape (C,)."""
        assert self.costs is not None
        total = torch.zeros(found.count, dtype=torch.float32, device="cpu")
        for name, mine in by_name([part for layer in found.layers for part in layer]).items():
            if self.costs.get(name, 0) > 0:
                cost = float(self.costs[name])
                each = torch.full((1, *mine[0].shape), cost, dtype=torch.float32, device="cpu")
                total += channel_sums(each, mine, found.count)[0]
        if not bool((total > 0).all()):
            raise ValueError(
                f"expected costs of the channels in the group of {found.root}, got none for some; "
                "name its weights in `costs`, or add the layer to the pruner's ignored_layers"
            )
        return total

    def _reduced(self, layers: list[list[ChannelSlice]], count: int) -> Tensor:
        if self.group_reduction == "sum":
            return self._form([part for layer in layers for part in layer], count)
        if self.group_reduction == "first":
            return self._form(layers[0], count)
        forms = torch.stack([self._form(layer, count) for layer in layers])
        if self.group_reduction == "mean":
            return forms.mean(0)
        if self.group_reduction == "max":
            return forms.amax(0)
        return forms.prod(0) if self.group_reduction == "prod" else forms


def root_of(group: Any) -> Any:
    """Return the identity of a group in its graph: the root layer, and its side."""
    return group[0].dep.target.module, group[0].dep.handler


def check_normalizer(normalizer: Normalizer) -> None:
    """Require a normalizer that `normalize` supports.

    Raises:
        ValueError: If the normalizer is unknown.
    """
    if normalizer is None or callable(normalizer) or normalizer in _NORMALIZERS:
        return
    if isinstance(normalizer, str) and normalizer.startswith("sentinel_"):
        try:
            if 0 <= float(normalizer.removeprefix("sentinel_")) < 1:
                return
        except ValueError:
            pass
    raise ValueError(
        f"expected normalizer None, a function, one of {_NORMALIZERS} or 'sentinel_<fraction>' "
        f"with a fraction in [0, 1), got {normalizer!r}"
    )


def normalize(scores: Tensor, normalizer: Normalizer) -> Tensor:
    """Scale a group's scores (C,) in one of torch-pruning's ways; see `CurvatureImportance`."""
    if normalizer is None:
        return scores
    if callable(normalizer):
        return normalizer(scores)
    if normalizer in ("sum", "mean", "max"):
        return scores / getattr(scores, normalizer)()
    if normalizer == "standarization":
        return (scores - scores.min()) / (scores.max() - scores.min())
    if normalizer == "gaussian":
        return (scores - scores.mean()) / scores.std()
    if normalizer == "lamp":
        ordered, order = scores.sort()
        # Each score over the sum of all scores not below it.
        # On the host: torch.use_deterministic_algorithms refuses cumsum on a GPU.
        left = ordered.flip(0).cpu().cumsum(0).flip(0).to(ordered.device)
        return torch.empty_like(scores).index_copy_(0, order, ordered / left)
    place = int(float(normalizer.removeprefix("sentinel_")) * len(scores))
    return scores / scores.sort().values[place]


def _check_finite(scores: Tensor, found: GroupChannels) -> None:
    if not torch.isfinite(scores).all():
        raise ValueError(
            f"expected finite scores for the group of {found.root}, got NaN or inf, with which a "
            "pruner prunes nothing or the wrong channels; look for such values in the model, the "
            "batches or the eigenpairs, or use another normalizer"
        )


def _check_scores(scores: Tensor, found: GroupChannels) -> None:
    _check_finite(scores, found)
    if scores.ndim == 1 and len(scores) > 1 and bool(scores.min() == scores.max()):
        raise ValueError(
            f"expected scores that differ within the group of {found.root}, got {len(scores)} "
            f"times {float(scores[0]):.3g}, of which a pruner would take all or none; add the "
            "layer to ignored_layers, use more samples or eigenpairs, or another group_reduction"
        )
