"""Channel importances for torch-pruning from the top eigenspace and per-sample gradients.

Each scores a channel by the predicted rise in loss of its removal, ``1/2 w_C^T H w_C``, with C all
entries that it removes, over all layers of the group. Unlike sums of single-weight saliencies it
includes the off-diagonal curvature between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.integrations.channels.slices import (
    ChannelSlice,
    by_name,
    channel_sums,
    sum_by_channel,
)
from hesscurv.integrations.importances.curvature_importance import (
    CurvatureImportance,
    Normalizer,
    Reduction,
    Weights,
)
from hesscurv.integrations.importances.sample_rows import Rows, SampleRows, check_rows
from hesscurv.linalg.random_matrices import default_generator
from hesscurv.objective.parameters import ParamSelection, select_parameters

if TYPE_CHECKING:
    from typing_extensions import Self

_BLOCK_ENTRIES = 2**23  # values of one block of eigenvectors, 32 MiB in float32


class EigenspaceImportance(CurvatureImportance):
    r"""Score channels by the curvature of the top eigenspace along their weights.

    For the entries C of a channel, weights w and eigenpairs :math:`(\lambda_j, v_j)`:

    - "joint": :math:`\frac12 \sum_j |\lambda_j| (\sum_{i \in C} v_{ij} w_i)^2
      + \frac12 \sum_{i \in C} d_i w_i^2`, the quadratic form of the channel as a whole;
    - "diagonal": :math:`\frac12 \sum_{i \in C} w_i^2 (\sum_j |\lambda_j| v_{ij}^2 + d_i)`, optimal
      brain damage, weight by weight;
    - "leverage": :math:`\sum_{i \in C} \sum_j v_{ij}^2`, the channel's share of the eigenspace,
      independent of its weights.

    Parameters of the group that the eigenpairs do not cover contribute nothing.

    Args:
        model: The pruner's model.
        pairs: Eigenpairs with a layout, as returned by `eigsh` for an operator of this model; or a
            function of the model that computes them. Pruning changes shapes, so fixed pairs serve
            one step; a function is called again at the first group after each change of the model,
            and serves any number of steps, with training in between.
        kind: "joint", "diagonal" or "leverage".
        diagonal: d, shape (D,), the diagonal of the curvature outside the eigenspace (or a damping
            with weight decay); or a function of the model that returns it. Default none.
        weights: "group" or "readers", see `CurvatureImportance`; default "group".
        group_reduction: reduction over the layers of a group, see `CurvatureImportance`; default
            "sum", jointly.
        normalizer: Applied to each group's scores, see `CurvatureImportance`; default None.
        costs: Cost of the parameters' entries, by name, as from `macs_per_entry`; scores are
            then loss per unit of cost. Default None, the loss itself.

    Raises:
        TypeError: If the model or the pairs have the wrong type.
        ValueError: If the pairs have no layout, or an option is unknown. When scoring: if the
            model's shapes are no longer those of the pairs, and as in `CurvatureImportance`.

    Cost: one pass over the eigenvectors' rows of a group, O(D k) for all groups, and 32 MiB.

    References:
        LeCun, Denker, Solla, "Optimal Brain Damage", NeurIPS 1989, for the diagonal.
        Wang et al., "EigenDamage", ICML 2019, arXiv 1905.05934, for structured saliencies.
        Fang et al., "DepGraph", CVPR 2023, arXiv 2301.12900, for the groups.

    Example:
        >>> import torch_pruning
        >>> from hesscurv.integrations import EigenspaceImportance
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).double()
        >>> importance = EigenspaceImportance(
        ...     net, lambda net: hesscurv.eigsh(hesscurv.HessianOperator(net, task, batches), k=3))
        >>> pruner = torch_pruning.pruner.BasePruner(
        ...     net, inputs, importance, pruning_ratio=0.5, ignored_layers=[net[2]])
        >>> pruner.step()
        >>> net[0].out_features
        4
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: Eigenpairs | Callable[[nn.Module], Eigenpairs],
        *,
        kind: Literal["joint", "diagonal", "leverage"] = "joint",
        diagonal: Tensor | Callable[[nn.Module], Tensor] | None = None,
        weights: Weights = "group",
        group_reduction: Reduction = "sum",
        normalizer: Normalizer = None,
        costs: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(
            model,
            weights=weights,
            group_reduction=group_reduction,
            normalizer=normalizer,
            costs=costs,
        )
        if kind not in ("joint", "diagonal", "leverage"):
            raise ValueError(f"expected kind 'joint', 'diagonal' or 'leverage', got {kind!r}")
        if kind == "leverage" and diagonal is not None:
            raise ValueError("expected no diagonal with kind 'leverage', which has no eigenvalues")
        if not isinstance(pairs, Eigenpairs) and not callable(pairs):
            raise TypeError(
                "expected Eigenpairs or a function (model) -> Eigenpairs, got "
                f"{type(pairs).__name__}"
            )
        self.kind = kind
        self._source, self._diagonal_source = pairs, diagonal
        self._pairs: Eigenpairs | None = None
        self._diagonal: Tensor | None = None
        if isinstance(pairs, Eigenpairs):
            self.refresh()

    @property
    def pairs(self) -> Eigenpairs | None:
        """The eigenpairs of the scores; None before a function's first call."""
        return self._pairs

    def refresh(self) -> None:
        """Update the eigenpairs for the present model: call the functions, check the shapes."""
        with torch.enable_grad():
            given, extra = self._source, self._diagonal_source
            pairs = given if isinstance(given, Eigenpairs) else given(self.model)
            diagonal = extra(self.model) if callable(extra) else extra
        if not isinstance(pairs, Eigenpairs):
            raise TypeError(f"expected Eigenpairs of `pairs`, got {type(pairs).__name__}")
        if pairs.layout is None:
            raise ValueError(
                "expected eigenpairs with a layout, got some of a bare matrix; compute them with "
                "eigsh of an operator of this model"
            )
        pairs = pairs.gather()
        if diagonal is not None and tuple(diagonal.shape) != (pairs.eigenvectors.shape[0],):
            raise ValueError(
                f"expected a diagonal of shape ({pairs.eigenvectors.shape[0]},) for these pairs, "
                f"got {tuple(diagonal.shape)}"
            )
        self._check_shapes(pairs)
        self._pairs, self._diagonal, self._ranks = pairs, diagonal, None
        self._has_changed()

    def rank_jointly(self, pruner: Any) -> Self:
        """Rank the channels of all of a pruner's groups jointly; see `CurvatureImportance`."""
        if self.kind != "joint":
            raise ValueError(f"expected kind 'joint' for a joint ranking, got {self.kind!r}")
        return super().rank_jointly(pruner)

    def measured(self) -> set[str]:
        """Return the names of the parameters that the eigenpairs cover."""
        assert self._pairs is not None
        assert self._pairs.layout is not None
        return set(self._pairs.layout.names)

    def _follow(self, changed: bool) -> None:
        if self._pairs is not None and isinstance(self._source, Eigenpairs):
            self._check_shapes(self._pairs)
        elif changed or self._pairs is None:
            self.refresh()

    def _check_shapes(self, pairs: Eigenpairs) -> None:
        assert pairs.layout is not None
        present = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        for name, shape in zip(pairs.layout.names, pairs.layout.shapes, strict=True):
            if present.get(name) != shape:
                raise ValueError(
                    f"expected {name!r} of shape {shape}, as when the eigenpairs were computed, "
                    f"got {present.get(name, 'no such parameter')}; after a step of pruning they "
                    "have to be computed again: pass a function, pairs=lambda model: eigsh("
                    "HessianOperator(model, task, batches), k), instead of eigenpairs"
                )

    def _rows(self, slices: list[ChannelSlice], count: int) -> tuple[Tensor, Tensor]:
        pairs = self._pairs
        assert pairs is not None
        assert pairs.layout is not None
        places, parameters = pairs.layout.slices(), dict(self.model.named_parameters())
        parts = by_name(slices)
        device = next(iter(parameters.values())).device
        rows: list[Tensor] = []
        if self.kind == "joint":
            width = max(1, _BLOCK_ENTRIES // max(parameters[name].numel() for name in parts))
            for start in range(0, len(pairs), width):
                columns = slice(start, start + width)
                found = [
                    self._projections(places[name], columns, parameters[name], mine, count)
                    for name, mine in parts.items()
                ]
                sums_bC = torch.stack(found).sum(0)
                scale = pairs.eigenvalues[columns].abs().to(sums_bC).sqrt()
                rows.append(scale[:, None] * sums_bC)
        extra = torch.zeros(count, dtype=torch.float64, device=device)
        for name, mine in parts.items():
            value = self._weightwise(places[name], parameters[name])
            if value is not None:
                extra += channel_sums(value.unsqueeze(0).to(device), mine, count)[0]
        return torch.cat(rows) if rows else extra.new_zeros(0, count), extra

    def _projections(
        self, rows: slice, columns: slice, p: Tensor, parts: list[ChannelSlice], count: int
    ) -> Tensor:
        """Return the contribution of one parameter to ``v_j^T w_C``, shape (b, C), in float64."""
        assert self._pairs is not None
        dtype = torch.promote_types(p.dtype, torch.float32)
        V_bp = self._pairs.eigenvectors[rows, columns].mT.to(device=p.device, dtype=dtype)
        values = V_bp.reshape(-1, *p.shape) * p.detach().to(dtype)
        return channel_sums(values, parts, count).double()

    def _weightwise(self, rows: slice, p: Tensor) -> Tensor | None:
        """Return the separable contribution of each entry of one parameter, in float64."""
        assert self._pairs is not None
        factor: Tensor | None = None
        if self.kind != "joint":
            scale = torch.ones_like(self._pairs.eigenvalues, dtype=torch.float64)
            if self.kind == "diagonal":
                scale = self._pairs.eigenvalues.abs().double()
            width = max(1, _BLOCK_ENTRIES // len(scale))
            vectors = self._pairs.eigenvectors[rows]
            factor = torch.cat([(part.double() ** 2) @ scale for part in vectors.split(width)])
            if self.kind == "leverage":
                return factor.reshape(p.shape)
        if self._diagonal is not None:
            extra = self._diagonal[rows].double()
            factor = extra if factor is None else factor + extra.to(factor.device)
        if factor is None:
            return None
        return 0.5 * factor.to(p.device).reshape(p.shape) * p.detach().double().square()


class FisherImportance(CurvatureImportance):
    r"""Score channels by the mean square of their first-order effect on each sample's loss.

    :math:`\frac{1}{2N} \sum_n (\sum_{i \in C} g_{ni} w_i)^2 = \frac12 w_C^T F w_C` for the entries
    C of a channel: exact, for the Fisher of these samples, and joint over the whole group. Rows
    :math:`g_n`:

    - "fisher": the gradient of sample n's loss at its target, for the empirical Fisher;
    - "ggn": :math:`J_n^T L_n s`, with J the Jacobian of the outputs, :math:`L_n L_n^T` the Hessian
      of the loss in them and s random signs: the generalised Gauss-Newton matrix in expectation,
      which does not vanish when the training targets are met.

    The model is not changed: gradients, hooks, modes, buffers and random state are untouched, and
    batch normalisation runs in eval mode. It is measured at the first group, and again at the first
    one after a change of the model, as iterative pruning needs.

    Args:
        model: The pruner's model.
        task: A task with outputs and loss, see `hesscurv.supervised`; a sample's loss is that of
            `sample_losses` for this sample only, weighted by its share of `weight` instead of 1/N
            if the task overrides it.
        batches: A list or DataLoader of batches; the same ones in every step.
        rows: "fisher" or "ggn".
        draws: Rows per sample for "ggn", each with new signs; default 1.
        params: The parameters included, see `select_parameters`; default all that require grad.
        weights: "group" or "readers", see `CurvatureImportance`; default "group".
        group_reduction: reduction over the layers of a group, see `CurvatureImportance`; default
            "sum", jointly.
        normalizer: Applied to each group's scores, see `CurvatureImportance`; default None.
        costs: Cost of the parameters' entries, by name, as from `macs_per_entry`; scores are
            then loss per unit of cost. Default None, the loss itself.
        chunk_size: Samples per vectorised gradient; by default as many as the memory allows, at
            most 64.
        generator: Source of the random signs, on the CPU; default a new one with seed 0.

    Raises:
        TypeError: If the model, the task or the batches have the wrong type.
        ValueError: If an option is unknown or out of range. When scoring: if the loss is not a mean
            over samples, there are too many outputs for "ggn", and as in `CurvatureImportance`.

    Cost: one per-sample gradient per sample and draw, in each step; N W floats for layers with W
    inputs and outputs in total, and 2 D floats per sample of a chunk. A group that removes rows and
    columns of one weight, or has parameters outside of layers, takes a separate pass over the data.

    References:
        Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018, arXiv
        1801.05787, equation (8).
        Liu et al., "Group Fisher Pruning for Practical Network Compression", ICML 2021, arXiv
        2108.00708, for coupled layers.

    Example:
        >>> import torch_pruning
        >>> from hesscurv.integrations import FisherImportance
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).double()
        >>> importance = FisherImportance(net, task, batches)
        >>> pruner = torch_pruning.pruner.BasePruner(
        ...     net, inputs, importance, pruning_ratio=0.5, ignored_layers=[net[2]])
        >>> pruner.step()
        >>> net[0].out_features
        4
    """

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        batches: Iterable[Any],
        *,
        rows: Rows = "fisher",
        draws: int = 1,
        params: ParamSelection = None,
        weights: Weights = "group",
        group_reduction: Reduction = "sum",
        normalizer: Normalizer = None,
        costs: Mapping[str, float] | None = None,
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            model,
            weights=weights,
            group_reduction=group_reduction,
            normalizer=normalizer,
            costs=costs,
        )
        check_rows(rows, draws, chunk_size)
        # By name, since pruning replaces the parameters.
        self._selected = tuple(select_parameters(self.model, params))
        source = default_generator(generator)
        self._measure = lambda: SampleRows(
            self.model,
            task,
            batches,
            rows=rows,
            draws=draws,
            names=self._selected,
            chunk_size=chunk_size,
            generator=source,
        )
        self._rows_of_samples: SampleRows | None = None

    def refresh(self) -> None:
        """Measure per-sample gradients of the present model, in one pass over the batches."""
        self._rows_of_samples = self._ranks = None
        samples = self._measure()
        samples.measure()
        self._rows_of_samples = samples
        self._has_changed()

    def measured(self) -> set[str]:
        """Return the names of the differentiated parameters."""
        return set(self._selected)

    def _follow(self, changed: bool) -> None:
        if changed or self._rows_of_samples is None:
            self.refresh()

    def _rows(self, slices: list[ChannelSlice], count: int) -> tuple[Tensor, Tensor]:
        samples = self._rows_of_samples
        assert samples is not None
        found: list[Tensor] = []
        rest: dict[str, list[ChannelSlice]] = {}
        for name, mine in by_name(slices).items():
            sums = samples.sums.get((name, mine[0].axis)) if mine[0].is_plain else None
            if len(mine) > 1 or sums is None:
                rest[name] = mine
            else:
                found.append(sum_by_channel(sums, mine[0], count))
        if rest:
            found.append(samples.channel_sums(rest, count))
        total = torch.stack(found).sum(0).double()
        return samples.weights.sqrt()[:, None] * total, total.new_zeros(count)
