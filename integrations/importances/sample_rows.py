"""Products of per-sample gradients and weights, reduced to sums by row and column.

``g_ni w_i`` for N samples and D parameters is never stored: chunks of samples are summed over all
axes of a parameter except one. Shapes: n samples of a chunk, c outputs of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hesscurv.integrations.channels.slices import ChannelSlice, channel_sums, sum_along
from hesscurv.objective.data.batches import split
from hesscurv.objective.objective import Objective
from hesscurv.operators.sample_space.sample_gradients import (
    SampleGradients,
    Values,
    output_roots,
    random_signs,
)
from hesscurv.pruning.curvature.sample_weights import check_mean_over_samples, weigh

Rows = Literal["fisher", "ggn"]

_MOST_AT_ONCE = 16
# Batches on which the loss is checked, as representatives of all.
_MOST_CHECKED = 4


class SampleRows:
    """Sums of the rows of a model's per-sample curvature, times its weights.

    Args:
        model: The module.
        task: A task with outputs and loss.
        batches: Re-iterable batches.
        rows: "fisher", gradients of the samples' losses; or "ggn", random combinations of the rows
            of a square root of the Gauss-Newton matrix.
        draws: Rows per sample, for "ggn".
        names: The parameters to differentiate.
        chunk_size: Samples per chunk; None for as many as fit.
        generator: Source of the random signs.

    Attributes:
        sums: After `measure`: for a parameter's name and an axis, shape (N draws, shape[axis]).
        weights: After `measure`: shape (N draws,), float64, each row's weight in the mean, by
            `sample_weights`, with sum 1. Samples of zero weight have no row.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        batches: Iterable[Any],
        *,
        rows: Rows,
        draws: int,
        names: Sequence[str],
        chunk_size: int | None,
        generator: torch.Generator,
    ) -> None:
        self._objective = Objective(
            model, task, batches, names, training=False, compute_dtype=None, budget=None
        )
        self._axes = _axes_of_layers(self._objective.model, set(names))
        self._kind, self._draws = rows, draws if rows == "ggn" else 1
        self._chunk_size = chunk_size
        self._seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        self._gradients = SampleGradients(self._objective)
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.weights = torch.empty(0, dtype=torch.float32, device="cpu")

    def measure(self) -> None:
        """Compute all rows and sum them along the axes of the model's layers."""
        self._objective.refresh()
        names = list(dict.fromkeys(name for name, _ in self._axes))
        found, weights = self._collect(
            names,
            lambda values: {(n, a): sum_along(values[n], a) for n, a in self._axes},
            first=True,
        )
        self.sums = {key: torch.cat([part[key] for part in found]) for key in self._axes}
        self.weights = weights

    def channel_sums(self, parts: Mapping[str, list[ChannelSlice]], count: int) -> Tensor:
        """Sum rows by channel for any slices of some parameters, in a separate pass.

        Args:
            parts: The slices by parameter.
            count: C, the number of channels.

        Returns:
            Shape (N draws, C).
        """

        def reduce(values: Values) -> Tensor:
            found = [channel_sums(values[name], mine, count) for name, mine in parts.items()]
            return torch.stack(found).sum(0)

        return torch.cat(self._collect(list(parts), reduce, first=False)[0])

    def _collect(
        self, names: list[str], reduce: Callable[[Values], Any], *, first: bool
    ) -> tuple[list[Any], Tensor]:
        """Reduce the rows of all samples, chunk by chunk; return the result and the row weights."""
        objective = self._objective
        # The same signs in every pass, so that parts of a group add up.
        signs = torch.Generator().manual_seed(self._seed)
        found, weights = [], []
        with objective.environment():
            batches = objective.batches.first_pass() if first else objective.batches
            for number, (batch, weights_n) in enumerate(weigh(objective, batches)):
                if first and number < _MOST_CHECKED:
                    check_mean_over_samples(objective, objective.parameters(), (batch, weights_n))
                size = self._samples_at_once()
                for chunk, part_n in zip(split(batch, size), weights_n.split(size), strict=True):
                    for directions in self._directions(chunk, signs):
                        values = self._products(names, chunk, directions)
                        found.append(reduce(values))
                        weights.append(part_n)
        if not found:
            raise ValueError(
                "expected at least one batch that has a weight, got none; pass a list of batches"
            )
        out = torch.cat(weights)
        return found, (out / out.sum()).to(objective.device)

    def _products(self, names: list[str], batch: Any, directions: Tensor | None) -> Values:
        """Return ``g_ni w_i``, shape (n, *shape), for some parameters."""
        objective = self._objective
        everything = dict(zip(objective.layout.names, objective.parameters(), strict=True))
        chosen = {name: everything[name].detach() for name in names}
        rows = self._gradients(chosen, batch, directions)
        return {name: rows[name].detach() * chosen[name] for name in names}

    def _directions(self, batch: Any, signs: torch.Generator) -> list[Tensor | None]:
        """Return, for each draw, the coefficients of the outputs' gradients, shape (n, c)."""
        if self._kind == "fisher":
            return [None]
        objective = self._objective
        with torch.no_grad():
            out = objective.outputs(objective.parameters(), batch)
        root = output_roots(objective.task_parts, out, batch)
        drawn = random_signs((self._draws, *root.shape[:2], 1), root, signs)
        return [(root @ s).squeeze(2) for s in drawn]

    def _samples_at_once(self) -> int:
        if self._chunk_size is not None:
            return self._chunk_size
        size = 2 * self._objective.layout.numel * self._objective.dtype.itemsize
        return max(1, min(_MOST_AT_ONCE, self._objective.budget // (4 * size)))


def check_rows(rows: str, draws: int, chunk_size: int | None) -> None:
    """Require options that `SampleRows` supports.

    Raises:
        ValueError: If one is unknown or out of range.
    """
    if rows not in ("fisher", "ggn"):
        raise ValueError(f"expected rows 'fisher' or 'ggn', got {rows!r}")
    for name, value in (("draws", draws), ("chunk_size", 1 if chunk_size is None else chunk_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"expected {name} to be a positive int, got {value!r}")
    if draws > 1 and rows == "fisher":
        raise ValueError(f"expected one draw for rows='fisher', which are not random, got {draws}")


def _axes_of_layers(model: nn.Module, names: set[str]) -> list[tuple[str, int]]:
    """Return the axes along which torch-pruning slices the parameters of common layers."""
    own = {id(p): name for name, p in model.named_parameters()}
    found: dict[tuple[str, int], None] = {}
    for module in model.modules():
        both_sides = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
        for p in module.parameters(recurse=False):
            name = own[id(p)]
            if name not in names or p.ndim == 0:
                continue
            if p.ndim == 1:
                axes = [0]
            elif both_sides:
                axes = [0, 1]
            else:
                axes = [1] if isinstance(module, nn.Embedding) else []
            found.update({(name, axis): None for axis in axes})
    return list(found)
