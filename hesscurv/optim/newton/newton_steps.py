"""Steps along a Newton direction, or to the minimum of a model of many, and their records."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.optim.flat_parameters import FlatParameters
from hesscurv.optim.newton.closure_loss import ClosureLoss
from hesscurv.optim.newton.conjugate_gradients import NewtonDirection
from hesscurv.optim.newton.krylov_model import StepModel, search_damping
from hesscurv.optim.newton.line_search import armijo, next_damping
from hesscurv.optim.snapshot import Snapshot

logger = logging.getLogger(__name__)

_FACTOR = 4.0  # between one damping and the next; 10 missed the best one by too much


def take_step(
    solved: NewtonDirection | StepModel,
    loss: ClosureLoss,
    moving: Sequence[nn.Parameter],
    before: Snapshot,
    options: dict[str, Any],
    numbers: dict[str, Any],
) -> None:
    """Go as far as the loss falls, not at all where it does not, and note it in the numbers.

    Args:
        solved: One direction, for a line search, or the model whose damping is looked for.
        loss: The loss, which is evaluated on the way.
        moving: The parameters that the direction has entries for.
        before: Their weights.
        options: The optimizer's hyperparameters.
        numbers: Its numbers, of which some change.
    """
    weights = before.weights_of(moving)
    layout = FlatParameters(moving)

    def place(step_D: Tensor | None, length: float = 1.0) -> None:
        parts = [None] * len(weights) if step_D is None else layout.split(step_D)
        for p, weight, d in zip(moving, weights, parts, strict=True):
            p.copy_(weight if d is None else torch.add(weight, d, alpha=length))

    def evaluate(step_D: Tensor, length: float = 1.0) -> float:
        place(step_D, length)
        return loss.evaluate()

    if not isinstance(solved, NewtonDirection):
        _by_damping(solved, evaluate, place, options, numbers)
    else:
        _by_length(solved, evaluate, place, options, numbers)
    if not numbers["step_length"]:
        numbers["num_refused"] += 1
        logger.info("step %d is refused: no decrease was found", numbers["step"])


def _by_damping(
    model: StepModel,
    evaluate: Any,
    place: Any,
    options: dict[str, Any],
    numbers: dict[str, Any],
) -> None:
    length = float(options["lr"])
    found = search_damping(
        evaluate,
        numbers["loss"],
        model,
        numbers["damping"],
        length=length,
        decrease=options["sufficient_decrease"],
        factor=_FACTOR,
        max_evaluations=options["max_backtracks"] + 1,
        bounds=options["damping_bounds"] if options["adapt_damping"] else (numbers["damping"],) * 2,
    )
    if found is None:
        place(None)
        if options["adapt_damping"]:
            numbers["damping"] = next_damping(
                numbers["damping"], 0.0, refused=True, bounds=options["damping_bounds"]
            )
        return
    place(model.direction(found.damping), length)
    numbers["step_length"] = length
    numbers["ratio"] = (numbers["loss"] - found.loss) / found.predicted
    numbers["damping"] = found.damping


def _by_length(
    solved: NewtonDirection,
    evaluate: Any,
    place: Any,
    options: dict[str, Any],
    numbers: dict[str, Any],
) -> None:
    found = armijo(
        lambda t: evaluate(solved.direction, t),
        numbers["loss"],
        solved.slope,
        first=float(options["lr"]),
        decrease=options["sufficient_decrease"],
        shrink=options["backtracking"],
        max_backtracks=options["max_backtracks"],
    )
    if found is None:
        place(None)
    else:
        t = numbers["step_length"] = found.length
        predicted = -(t * solved.slope + t * t / 2 * solved.curvature)
        # A fallback has no known curvature; and a model that predicts a rise deserves no trust.
        numbers["ratio"] = (numbers["loss"] - found.loss) / predicted if predicted > 0 else 0.0
    if options["adapt_damping"]:
        numbers["damping"] = next_damping(
            numbers["damping"],
            numbers["ratio"],
            refused=found is None,
            bounds=options["damping_bounds"],
        )
