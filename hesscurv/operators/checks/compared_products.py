"""Products by a fast way, compared with the reference on every micro-batch and after a solve."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hesscurv.linalg.transfers import all_finite
from hesscurv.operators.checks.agreement import Combination, agree, relative_gap
from hesscurv.operators.checks.references import on_batch, with_reference
from hesscurv.operators.linear_operator import require_finite
from hesscurv.operators.ways.linearizations import Linearization

if TYPE_CHECKING:
    from hesscurv.operators.curvature_operator import CurvatureOperator

logger = logging.getLogger(__name__)


def multiply_compared(operator: CurvatureOperator, vectors_BD: Tensor) -> tuple[Tensor, str]:
    """Multiply by all micro-batches, each in the chosen way where that is right on it.

    Returns:
        The products (B, D), and the way.

    Raises:
        WayError: If the reference fails.
        ValueError: If the way was named by the user, and is not right on a micro-batch.
    """
    out_BD = torch.empty_like(vectors_BD)
    while True:
        way, chunk = operator.choice(len(vectors_BD))
        failed = _pass_over(operator, out_BD, vectors_BD, way, chunk)
        if not failed:
            return out_BD, way
        if operator.checks_late:
            require_finite(vectors_BD)  # NaN agrees with nothing, whatever the way
        _leave_out(operator, way, failed)  # and multiply again: `out` holds what is wrong


def require_finite_product(operator: CurvatureOperator, vectors_BD: Tensor, out_BD: Tensor) -> None:
    """Refuse products that have NaN or inf entries, and vectors that were not looked at before.

    Raises:
        ValueError: If there are any; it says in which.
    """
    if all_finite(out_BD, *((vectors_BD,) if operator.checks_late else ())):
        return
    require_finite(vectors_BD)
    raise ValueError(
        "the product has NaN or inf entries, so the loss has no finite second derivative "
        "here; look for overflow, sqrt or norm at zero, or try compute_dtype=torch.float64"
    )


def confirm(operator: CurvatureOperator, record: Combination) -> None:
    """Compare a combination of products with the reference's, by one product; warn of a gap.

    Warns:
        RuntimeWarning: If they differ by more than rounding, with the way and the micro-batch that
            make the difference.
    """
    reference = operator.ways[0]

    def multiply() -> Tensor:
        out_D = torch.zeros_like(record.x_D)
        for index, batch, weight in operator.microbatches():
            product_1D = _by_reference(operator, index, batch, record.x_D[None])
            out_D.add_(product_1D[0], alpha=weight)
        return out_D

    with torch.inference_mode(False):
        expected_D = with_reference(operator, lambda: operator.within_memory(multiply))
    # Products of many vectors add up here, and so does their rounding.
    precision = operator.objective.precision
    if agree(expected_D, record.y_D, rounding=4.0, precision=precision):
        return
    way = operator.choice(len(expected_D))[0]
    warnings.warn(
        f"the last {record.count} products, by way {way!r}, differ from those of {reference!r} by "
        f"{relative_gap(expected_D, record.y_D):.1e} of their norm, so results made of them are "
        f"off by as much; {_find_cause(operator, way, record.x_D)}; build the operator with "
        f"way={reference!r}, or report it",
        RuntimeWarning,
        stacklevel=4,
    )


def _pass_over(
    operator: CurvatureOperator, out_BD: Tensor, vectors_BD: Tensor, way: str, chunk: int
) -> dict[int, Exception]:
    """Multiply by all micro-batches; return those that the way is not right on, with causes."""
    failed: dict[int, Exception] = {}
    width = min(chunk, len(vectors_BD))
    for number, (index, batch, weight) in enumerate(operator.microbatches()):
        agreement = operator.agreement
        used = agreement.way_for(index, way)
        due = operator.compares and agreement.is_due(index, used, width)
        seen = Combination(operator.layout, vectors_BD, seed=index) if due else None
        add = number > 0
        if used == agreement.reference:
            with on_batch(used, batch):
                apply = operator.prepared(index, batch, used)
                operator.multiply_into(out_BD, used, apply, vectors_BD, weight, chunk, add=add)
            continue
        try:
            apply = operator.prepared(index, batch, used)
            operator.multiply_into(
                out_BD, used, apply, vectors_BD, weight, chunk, add=add, seen=seen
            )
            if seen is not None:
                _compare(operator, index, batch, used, apply, seen)
                operator.agreement.passed(index, used, width)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            failed[index] = error
    return failed


def _compare(
    operator: CurvatureOperator,
    index: int,
    batch: Any,
    way: str,
    apply: Linearization,
    seen: Combination,
) -> None:
    """Compare the products in `seen` with the reference's.

    Few vectors, or sparse ones, need not reach all parameters: a random one is multiplied too.
    """
    if seen.count < 4 or bool((seen.x_D == 0).any()):
        extra_1D = seen.random_vector()
        seen.add(extra_1D, operator.run(apply, extra_1D, way))
    expected_1D = _by_reference(operator, index, batch, seen.x_D[None])
    if not agree(expected_1D[0], seen.y_D, precision=operator.objective.precision):
        raise ValueError(
            f"it gives other products than {operator.ways[0]!r}, by "
            f"{relative_gap(expected_1D[0], seen.y_D):.1e} of their norm"
        )


def _by_reference(
    operator: CurvatureOperator, index: int, batch: Any, vectors_BD: Tensor
) -> Tensor:
    """Multiply by a micro-batch; its graph is kept for the next time, where it takes little."""
    way = operator.ways[0]
    with on_batch(way, batch):
        if operator.memory_plan.keep_references:
            apply = operator.prepared(index, batch, way)
        else:
            apply = operator.prepare(batch, way)
        return operator.run(apply, vectors_BD, way)


def _leave_out(operator: CurvatureOperator, way: str, failed: dict[int, Exception]) -> None:
    """Take the reference on the micro-batches that a way is not right on, or in its place."""
    index, cause = next(iter(failed.items()))
    what = operator.describe_microbatch(index)
    reason = str(cause) if isinstance(cause, ValueError) else f"{type(cause).__name__}: {cause}"
    if operator.way == way:
        raise ValueError(
            f"way={way!r} cannot be used: on {what}, {reason}; use way='auto', which takes "
            "another way where this one is not right"
        ) from cause
    for i, error in failed.items():
        operator.refuse_way(i, way, str(error))
    # Not right on the first, which was measured on, or on most: there is nothing to gain.
    count = sum(1 for _ in operator.microbatches())
    everywhere = 0 in failed or 2 * operator.agreement.num_refused(way) > count
    if everywhere:
        operator.leave_out(way)
    logger.warning(
        "way %r is not right on %d of %d micro-batches (%s: %s); going on with %r %s",
        way,
        len(failed),
        count,
        what,
        reason.partition("\n")[0][:200],
        operator.ways[0],
        "or another way on all" if everywhere else "there",
    )


def _find_cause(operator: CurvatureOperator, way: str, vector_D: Tensor) -> str:
    for index, batch, _ in operator.microbatches():
        used = operator.agreement.way_for(index, way)
        expected_D, got_D = (operator.product_on(batch, vector_D[None], w)[0] for w in (None, used))
        if not agree(expected_D, got_D, precision=operator.objective.precision):
            return f"{operator.describe_microbatch(index)} makes the difference"
    return "no micro-batch alone makes the difference at the present weights"
