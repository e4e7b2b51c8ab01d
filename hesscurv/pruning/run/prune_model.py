"""Pruning in one call: stages of fresh curvature, joint compensation, a trust region."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hesscurv.interface.moved_arguments import moved_to_options
from hesscurv.interface.options import as_options
from hesscurv.interface.ranges import check_count, check_generator
from hesscurv.linalg.random_matrices import default_generator
from hesscurv.objective.objective import Objective
from hesscurv.objective.parameters import unwrap
from hesscurv.pruning.attention import prepare_attention_
from hesscurv.pruning.curvature.memory_plan import DEFAULT_GRADIENTS
from hesscurv.pruning.curvature.quadratic_model import Measuring, with_rows_that_run
from hesscurv.pruning.masks.state_dicts import write_pruned_
from hesscurv.pruning.rollback import unchanged_on_error
from hesscurv.pruning.run.batch_statistics import recalibrate_
from hesscurv.pruning.run.calibration_loss import CalibrationLoss, SampleStream
from hesscurv.pruning.run.pruning_options import PruningOptions
from hesscurv.pruning.run.pruning_report import PruningReport
from hesscurv.pruning.run.pruning_run import METHODS, PruningRun
from hesscurv.pruning.run.sparsity_schedules import sparsities
from hesscurv.pruning.targets import Pattern, Scope, make_budgets
from hesscurv.pruning.weights import (
    Weight,
    WeightSelection,
    current_mask,
    current_parameter,
    find_weights,
)

logger = logging.getLogger(__name__)


@moved_to_options(PruningOptions)
def prune_model(
    model: nn.Module,
    task: Any,
    batches: Iterable[Any],
    sparsity: float = 0.8,
    *,
    method: str = "obs",
    scope: Scope = "global",
    structure: str | None = None,
    stages: int = 10,
    steps_per_stage: int = 1,
    gradients_per_stage: int | None = None,
    weights: WeightSelection = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    options: PruningOptions | None = None,
) -> PruningReport:
    """Prune a model to an exact sparsity and adjust the kept weights, by second-order models.

    At each stage a quadratic model of the loss is measured at the present weights, the entries of
    least saliency are dropped, and the kept weights move to the minimiser of

    ``1/2 |R d + r|^2 + mu/2 d^T K d``  with  ``d_i = -w_i`` for all that are dropped,

    by one Woodbury solve; see `Measuring` for R, r and K. mu is chosen from three values around the
    last one, or no change at all, by the true loss on the calibration set. If plain magnitude
    pruning ends with a lower calibration loss, its result is taken.

    The model is written only at the very end: an error or an interrupt leaves it unchanged. Its
    masks are those of `torch.nn.utils.prune` and persist through training; `prune.remove` makes
    them permanent. A partly pruned model is pruned further.

    Args:
        model: The module; evaluated as in inference.
        task: A task with outputs and loss, such as ``hesscurv.supervised(CrossEntropyLoss())``.
        batches: Re-iterable batches on which curvature is measured; reread when they run out.
        sparsity: Fraction of all selected weights to prune, in (0, 1); pruned ones count.
        method: The saliency. "obs": ``w_i^2 / (2 [H^-1]_ii)``; "obd": ``w_i^2 H_ii / 2``;
            "magnitude": ``|w_i|``.
        scope: "global": all weights compete; "layer": each weight has the sparsity; or a dict from
            the name of a weight or module to its sparsity, all others stay.
        structure: None, or "N:M", such as "2:4": at most N of M neighbours along the inputs are
            kept; `sparsity` and `scope` are then ignored, and weights whose number of inputs M does
            not divide are skipped. The input dimension of torch's layers and transformers' Conv1D
            is known; register others by `register_weight_axes`.
        stages: Number of curvature measurements.
        steps_per_stage: Pruning steps with the same curvature.
        gradients_per_stage: n, the samples of one stage, one gradient each; see `Measuring` for
            their weights if the task weights its batches. By default 1000, or as many as fit in the
            free memory, which is logged.
        weights: The weights to prune, see `find_weights`; default all prunable ones.
        generator: A CPU generator for the random signs; default one seeded with 0.
        progress: Whether to show a progress bar in a terminal or a notebook: steps, sparsity, loss,
            the expected end, the memory in use. Elsewhere nothing is printed: the same goes to the
            logger "hesscurv", level INFO, at most every 30 seconds.
        options: Schedule of the sparsity, compensation, kind of the curvature, calibration set, and
            what is reported; default `PruningOptions()`.

    Returns:
        A `PruningReport`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of range, the sparsity is below the model's own, the loss is not
            finite, or a batch's loss is not the `task.weight`-weighted mean of its samples' losses.
        MemoryError: If rows and factors do not fit, before anything is computed; it names the
            arguments to change and their values.

    Cost:
        `gradients_per_stage` gradients and a few forward passes over the calibration set per stage;
        two factorisations per step, about ``2 n s (n + i)`` operations for s kept weights with i
        inputs; memory for ``2 n D`` numbers for D weights.

    References:
        Hassibi and Stork, NIPS 1992, equation (5), for a single weight; Benbaki et al., ICML 2023
        (CHITA), for the joint problem; Martens and Grosse, ICML 2015, for K.

    Example:
        >>> net = copy.deepcopy(model)
        >>> report = hesscurv.pruning.prune_model(net, task, batches, sparsity=0.5, stages=2)
        >>> report.sparsity, int((net[0].weight == 0).sum() + (net[2].weight == 0).sum())
        (0.5, 9)
    """
    how = as_options(PruningOptions, options)
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if method not in METHODS:
        raise ValueError(f"expected method to be one of {METHODS}, got {method!r}")
    if not 0 < sparsity < 1:
        raise ValueError(f"expected a sparsity in (0, 1), got {sparsity!r}")
    check_count("stages", stages)
    check_count("steps_per_stage", steps_per_stage)
    check_count("gradients_per_stage", gradients_per_stage, optional=True)
    check_generator(generator)
    pattern = Pattern.parse(structure)
    samples = batches if how.calibration is None else how.calibration
    inner = unwrap(model)
    with unchanged_on_error(inner.modules()):
        prepare_attention_(inner)
        selected = find_weights(inner, weights)
        if pattern is not None:
            fitting = {
                n: w
                for n, w in selected.items()
                if pattern.fits(w, tuple(current_parameter(*w).shape), n)
            }
            if not fitting:
                raise ValueError(f"{structure} fits no weight: M divides no input dimension")
            if left_out := [n for n in selected if n not in fitting]:
                logger.info(
                    "%s leaves out %s, whose number of inputs M does not divide",
                    structure,
                    left_out,
                )
            selected = fitting
        objective = _objective_of(model, task, batches, selected)
        dense = _stored_names(inner, selected)
        selected = {dense[s]: selected[dense[s]] for s in objective.layout.names}
        start = {
            n: (p if (mask := current_mask(*selected[n])) is None else p * mask)
            for n, p in zip(selected, objective.parameters(), strict=True)
        }
        mask = torch.cat(
            [
                (torch.ones_like(p, dtype=torch.bool) if m is None else m).flatten()
                for p, m in ((p, current_mask(*selected[n])) for n, p in start.items())
            ]
        )
        run = PruningRun(
            objective=objective,
            weights=selected,
            start=start,
            mask=mask,
            method=method,
            compensate=method == "obs" if how.compensate is None else how.compensate,
            pattern=pattern,
            measuring=how.measuring or Measuring(),
            stream=SampleStream(objective, batches, gradients_per_stage or DEFAULT_GRADIENTS),
            calibration=CalibrationLoss(objective, samples, how.max_calibration),
            generator=default_generator(generator),
        )
        if pattern is not None:
            run.budgets, goal = [], 1 - pattern.n / pattern.m
        else:
            run.budgets = make_budgets(run.layout, scope, sparsity, objective.device)
            goal = max((b.sparsity for b in run.budgets), default=0.0)
            if goal == 0:
                raise ValueError(f"expected a scope with some sparsity above 0, got {scope!r}")
        run.check()
        if run.needs_curvature:
            first = run.calibration.batches[0]
            run.measuring = with_rows_that_run(objective, first, how.measuring)
            # If the calibration set has all samples, their number is known.
            found = run.calibration.num_samples
            run.plan(
                gradients_per_stage,
                found if how.calibration is None and found < how.max_calibration else None,
            )
        # With several sparsities the schedule applies to the highest; the others scale with it.
        begun = 0.0 if not isinstance(scope, str) else min(1 - float(mask.double().mean()), goal)
        steps = stages * steps_per_stage
        path = [s / goal for s in sparsities(how.schedule, steps, begun, goal)]
        if len(path) != steps:
            raise ValueError(
                f"expected a schedule of stages * steps_per_stage = {steps} sparsities, got "
                f"{len(path)}"
            )
        report = run.prune(path, steps_per_stage, how.on_step, progress, how.layer_losses)
        with unchanged_on_error(inner.modules(), values=True):
            values, masks = run.layout.split(run.values), run.layout.split(run.mask)
            write_pruned_(inner, selected, values, masks)
            if how.recalibrate_batch_norm:
                recalibrate_(model, task, batches)
                objective = _objective_of(model, task, batches, selected)
                again = CalibrationLoss(objective, run.calibration.batches, how.max_calibration)
                report = report.with_recalibrated(again(objective.parameters()))
    return report


def _objective_of(
    model: nn.Module, task: Any, batches: Iterable[Any], weights: dict[str, Weight]
) -> Objective:
    """Return the loss as a function of some weights, under their present names and values."""
    stored = list(_stored_names(unwrap(model), weights))
    objective = Objective(
        model, task, batches, stored, training=False, compute_dtype=None, budget=None
    )
    _ = objective.task_parts
    objective.refresh()
    return objective


def _stored_names(model: nn.Module, weights: dict[str, Weight]) -> dict[str, str]:
    """Map the present names of the weights to their dense names."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(current_parameter(*weight))]: dense for dense, weight in weights.items()}
