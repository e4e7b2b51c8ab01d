"""The stages of `prune_model`, on copies of the weights."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hesscurv.interface.progress_bar import ProgressBar
from hesscurv.linalg.device_memory import free_memory, used_memory
from hesscurv.linalg.woodbury import SupportSystem
from hesscurv.objective.objective import Objective
from hesscurv.objective.parameters import layout_of
from hesscurv.pruning.curvature.layer_inputs import has_input_rows, num_columns
from hesscurv.pruning.curvature.memory_plan import Sizes, plan_memory
from hesscurv.pruning.curvature.quadratic_model import (
    Measuring,
    QuadraticModel,
    measure_quadratic_model,
)
from hesscurv.pruning.run.calibration_loss import CalibrationLoss, SampleStream
from hesscurv.pruning.run.pruning_report import LayerReport, PruningReport, StageReport
from hesscurv.pruning.targets import Budget, Pattern, next_mask
from hesscurv.pruning.weights import Weight

METHODS = ("obs", "obd", "magnitude")
logger = logging.getLogger(__name__)

# Candidate factors of mu, chosen by the calibration loss.
_FACTORS = (0.25, 1.0, 4.0)


class PruningRun:
    """Prune copies of a model's weights; the model itself is not written to.

    Args:
        objective: The model, the task and the weights as parameters, refreshed.
        weights: The weights by dense name, in the objective's order.
        start: Their values, masked.
        mask: Shape (D,), bool, the initial mask.
        method: One of `METHODS`.
        compensate: Whether the kept weights move.
        pattern: An N:M pattern, or None for budgets.
        measuring: Options of the curvature.
        stream: Samples for the curvature.
        calibration: Loss on the calibration set.
        generator: Generator of the random signs.

    Attributes:
        values: Shape (D,), the present weights.
        mask: Shape (D,), the present mask.
        budgets: The pruning targets; must be set if there is no pattern.
        needs_curvature: Whether curvature is measured at all.
        planned_bytes: Planned memory of rows and factors, see `plan`.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        weights: dict[str, Weight],
        start: dict[str, Tensor],
        mask: Tensor,
        method: str,
        compensate: bool,
        pattern: Pattern | None,
        measuring: Measuring,
        stream: SampleStream,
        calibration: CalibrationLoss,
        generator: torch.Generator,
    ) -> None:
        self.objective, self.weights, self.start = objective, weights, start
        self.layout = layout_of(start)
        self.dense = torch.cat([p.flatten() for p in start.values()])
        self.values = self._origin = self.dense
        self.mask = self._first_mask = mask
        self.method, self.compensate, self.pattern = method, compensate, pattern
        self.measuring, self.stream, self.calibration = measuring, stream, calibration
        self.generator = generator
        self.budgets: list[Budget] = []
        self.planned_bytes = 0
        self._mu, self._gradients = 1.0, 0
        self.needs_curvature = compensate or method != "magnitude"
        self._model: QuadraticModel | None = None
        self._system: SupportSystem | None = None

    def check(self) -> None:
        """Check the targets, before anything is computed.

        Raises:
            ValueError: If more is pruned already than requested.
        """
        for budget in self.budgets:
            alive = int(self.mask[budget.index].sum())
            if alive < budget.num_kept(budget.sparsity):
                raise ValueError(
                    f"expected a sparsity of at least the present one, "
                    f"{1 - alive / len(budget.index):.4f} of {budget.name}, got {budget.sparsity}"
                )

    def plan(self, gradients: int | None, num_samples: int | None) -> None:
        """Choose number and kind of the rows, if curvature is needed.

        Args:
            gradients: n, the samples of a stage; None for as many as fit, up to 1000.
            num_samples: Total number of samples, if known.

        Raises:
            ValueError: If there are too many outputs for the rows chosen in `measuring`.
            MemoryError: If rows and factors do not fit.
        """
        if not self.needs_curvature:
            return
        known = {n: w for n, w in self.weights.items() if has_input_rows(w)}
        sizes = Sizes(
            [p.numel() for p in self.start.values()],
            [num_columns(w) for w in known.values()] if self.measuring.rest == "kronecker" else [],
            self.dense.element_size(),
        )
        free = free_memory(self.objective.device)
        plan = plan_memory(sizes, self.measuring, gradients, free, num_samples)
        logger.info("pruning needs about %.3g GB of %.3g GB free", plan.num_bytes / 1e9, free / 1e9)
        self.measuring, self.stream.count = plan.measuring, plan.gradients
        self.planned_bytes = plan.num_bytes

    def prune(
        self,
        path: Sequence[float],
        steps_per_stage: int,
        on_step: Callable[[StageReport, dict[str, Tensor]], None] | None,
        progress: bool,
        layer_losses: bool,
    ) -> PruningReport:
        """Take all steps and return the report.

        Args:
            path: Sparsity at the end of each step, relative to that of the budgets.
            steps_per_stage: Steps with the same curvature.
            on_step: Called after each step.
            progress: Whether to show a progress bar.
            layer_losses: Whether to measure the true change of the loss due to each layer.
        """
        begun = time.perf_counter()
        dense_loss = loss = self._loss(self.dense)
        if not math.isfinite(loss):
            raise ValueError("expected a finite loss on the calibration set, got NaN or inf")
        stages: list[StageReport] = []
        memory = partial(used_memory, self.objective.device)
        with ProgressBar(len(path), "pruning", " steps", progress, memory) as bar:
            for number, end in enumerate(path):
                if number % steps_per_stage == 0 and self.needs_curvature:
                    bar.show(note="measuring curvature", at_once=True)
                    self._measure()
                before = loss
                loss, predicted, mu = self._step(end)
                stages.append(
                    StageReport(
                        sparsity=1 - float(self.mask.double().mean()),
                        loss=loss,
                        predicted_change=predicted,
                        true_change=loss - before,
                        mu=mu,
                        gradients=self._gradients,
                        seconds=time.perf_counter() - begun,
                    )
                )
                if on_step is not None:
                    on_step(stages[-1], self.layout.split(self.values))
                bar.update(note=f"sparsity {stages[-1].sparsity:.3f}, loss {loss:.4g}")
        self._system = None
        method, magnitude_loss = self.method, loss
        if self.method != "magnitude" or self.compensate:
            mask = self._first_mask
            for end in path if self.pattern else path[-1:]:
                mask = self._next_mask(self.dense.abs(), mask, end)
            magnitude_loss = self._loss(self.dense * mask)
            if magnitude_loss < loss:
                logger.warning(
                    "magnitude pruning has a lower calibration loss, %.4g against %.4g: taken",
                    magnitude_loss,
                    loss,
                )
                method, loss = "magnitude", magnitude_loss
                self.mask, self.values = mask, self.dense * mask
        layers = self._layers(dense_loss, layer_losses)
        kept = int(self.mask.sum())
        return PruningReport(
            method=method,
            sparsity=1 - kept / self.layout.numel,
            kept=kept,
            numel=self.layout.numel,
            dense_loss=dense_loss,
            loss=loss,
            magnitude_loss=magnitude_loss,
            recalibrated_loss=None,
            gradients=self._gradients,
            planned_bytes=self.planned_bytes,
            seconds=time.perf_counter() - begun,
            stages=stages,
            layers=layers,
        )

    def _measure(self) -> None:
        samples = self.stream.take()
        self._model = self._system = None  # free the old rows first: two sets may not fit
        self._origin = self.values
        self._model = measure_quadratic_model(
            self.objective,
            self.weights,
            self._split(self.values),
            samples,
            self.measuring,
            self.generator,
            self.start,
        )
        self._gradients += self._model.cost

    def _step(self, end: float) -> tuple[float, float, float | None]:
        """Drop entries and adjust the others; return the loss, its predicted change, and mu."""
        model, before = self._model, self.values
        mask = self._next_mask(self._saliency(), self.mask, end)
        if not torch.equal(mask, self.mask):
            self.mask, self._system = mask, None
        dropped = torch.where(self.mask, self.values, 0)
        if model is None or not self.compensate:
            self.values = dropped
            predicted = self._predicted(before, dropped)
            return self._loss(dropped), predicted, None
        system = self._factored(model)
        best, best_loss, best_mu = dropped, self._loss(dropped), None
        for factor in _FACTORS:
            mu = self._mu * factor
            trial = self._origin + system.solve(mu, model.residual, model.gradient)
            # Rounding in the solve must not make dropped entries nonzero.
            trial = torch.where(self.mask, trial, 0)
            loss = self._loss(trial)
            if loss < best_loss:
                best, best_loss, best_mu = trial, loss, mu
        # If no candidate reduces the loss, the next steps are shorter (larger mu).
        self._mu = self._mu * _FACTORS[-1] if best_mu is None else best_mu
        predicted = self._predicted(before, best)
        self.values = best
        return best_loss, predicted, best_mu

    def _factored(self, model: QuadraticModel) -> SupportSystem:
        """Return the curvature factored on the kept entries, cached until the mask changes."""
        if self._system is None:
            self._system = model.matrix.restrict(self.mask, -self._origin)
        return self._system

    def _predicted(self, before: Tensor, after: Tensor) -> float:
        if self._model is None:
            return math.nan
        model = replace(self._model, mu=self._mu)
        return model.change(after - self._origin) - model.change(before - self._origin)

    def _saliency(self) -> Tensor:
        if self.method == "magnitude":
            return self.values.abs()
        assert self._model is not None
        if self.method == "obd":
            return self.values.square() * self._model.matrix.diagonal(self._mu)
        inverse = self._factored(self._model).inverse_diagonal(self._mu)
        return torch.where(self.mask, self.values.square() / inverse, 0)

    def _next_mask(self, scores: Tensor, mask: Tensor, end: float) -> Tensor:
        if self.pattern is not None:
            return self.pattern.next_mask(scores, mask, self.layout, self.weights, end)
        return next_mask(scores, mask, self.budgets, end)

    def _layers(self, dense_loss: float, measure: bool) -> list[LayerReport]:
        out = []
        delta = self.layout.split(self.values - self.dense)
        masks = self.layout.split(self.mask)
        for name, part in self.layout.slices().items():
            true = predicted = math.nan
            if self._model is not None:
                alone = torch.zeros_like(self.dense)
                alone[part] = delta[name].flatten()
                rows = self._model.matrix
                predicted = QuadraticModel(self.layout, rows, self._mu).change(alone)
            if measure:
                values = self.dense.clone()
                values[part] = self.values[part]
                true = self._loss(values) - dense_loss
            kept = int(masks[name].sum())
            n = masks[name].numel()
            out.append(LayerReport(name, n, kept, 1 - kept / n, predicted, true))
        return out

    def _split(self, values: Tensor) -> dict[str, Tensor]:
        if values is self.dense:
            return self.start
        return self.layout.split(values)

    def _loss(self, values: Tensor) -> float:
        return self.calibration(tuple(self._split(values).values()))
