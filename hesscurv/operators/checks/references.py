"""The reference way of computing products: the first one that this model has derivatives for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from hesscurv.operators.checks.embedding_gradients import cause_of_wrong_gradients
from hesscurv.operators.checks.missing_derivatives import MissingDerivativeError, explain
from hesscurv.operators.ways.linearizations import LinearMap, NonFiniteLossError

if TYPE_CHECKING:
    from hesscurv.operators.curvature_operator import CurvatureOperator
    from hesscurv.operators.ggn import GaussNewtonOperator

logger = logging.getLogger(__name__)

T = TypeVar("T")


class AsymmetryError(ValueError):
    """A matrix of products is not symmetric, or products are not what differences give."""


class WayError(Exception):
    """A way failed on a batch; the cause is what was raised."""

    def __init__(self, way: str, batch: Any, error: Exception) -> None:
        super().__init__(str(error))
        self.way, self.batch, self.error = way, batch, error


@contextmanager
def on_batch(way: str, batch: Any) -> Iterator[None]:
    """Let errors inside tell the way and the batch, to `with_reference`.

    Raises:
        WayError: Instead of what was raised, but for a lack of memory and a loss that is not
            finite.
    """
    try:
        yield
    except (torch.OutOfMemoryError, NonFiniteLossError, WayError):
        raise
    except Exception as error:
        raise WayError(way, batch, error) from error


def with_reference(operator: CurvatureOperator, fn: Callable[[], T]) -> T:
    """Run what uses the reference way; where that fails, take the next one and run again.

    Raises:
        Exception: What was raised last, if no way is left; of a missing derivative, an error that
            names the operation, its module and a remedy.
    """
    while True:
        try:
            return fn()
        except WayError as failed:
            way, batch, error = failed.way, failed.batch, failed.error
        if way == operator.ways[0]:
            wrong = _take_next(operator, batch, error)
            if wrong is None:
                continue
            explained = _explained(operator, batch, wrong)
        else:
            explained = _refused(way, error)
        if explained is error:
            raise error
        raise explained from error


@contextmanager
def explaining(operator: CurvatureOperator, batch: Any) -> Iterator[None]:
    """Explain what a model cannot do on a batch.

    Raises:
        Exception: What was raised; of a missing derivative or a wrong dtype, an error that names
            the operation, its module and a remedy.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        explained = _explained(operator, batch, error)
        if explained is error:
            raise
        raise explained from error


def _explained(operator: CurvatureOperator, batch: Any, error: Exception) -> Exception:
    return explain(operator.objective, batch, error, operator.needs, type(operator).__name__)


def _refused(way: str, error: Exception) -> Exception:
    if isinstance(error, ValueError):  # says what is wrong, and what to do
        return error
    return MissingDerivativeError(
        f"way={way!r} is not available on this model: {' '.join(str(error).split())[:200]}; use "
        "way='auto'"
    )


def _take_next(operator: Any, batch: Any, error: Exception) -> Exception | None:
    """Make the next way that is right on a batch the reference; if none is, return why."""
    reason = error
    while operator.fallbacks:
        way, *rest = operator.fallbacks
        operator.fallbacks = tuple(rest)
        try:
            check_by_differences(operator, batch, way)
        except torch.OutOfMemoryError:
            raise
        except Exception as other:
            logger.info("way %r is not available here: %s", way, other)
            reason = other if isinstance(other, AsymmetryError) else reason
            continue
        logger.info("the reference is way %r, since %r failed: %s", way, operator.ways[0], error)
        operator.take_reference(way)
        return None
    return reason


def check_by_differences(operator: GaussNewtonOperator, batch: Any, way: str) -> None:
    """Compare v^T G v with the same from differences of the outputs; two forward passes each.

    Forward mode drops what has no rule for it (of a custom operator) without a word, and rows of J
    are what a backward pass says, so that the matrix is symmetric in any case.

    Raises:
        AsymmetryError: If they differ.
    """
    generator = torch.Generator().manual_seed(0)
    size, dtype = operator.shape[0], operator.dtype
    eps = torch.finfo(dtype).eps
    vectors_BD = torch.randn(2, size, generator=generator, dtype=torch.float64, device="cpu")
    vectors_BD = vectors_BD.to(operator.device, dtype)
    products_BD = operator.run(operator.prepare(batch, way), vectors_BD, way)
    for v_D, product_D in zip(vectors_BD, products_BD, strict=True):
        # Truncation and rounding are least where the step is eps^(1/3) of the parameters' size.
        change, middle, noise = operator.objective.run(
            partial(_difference, operator, batch, v_D, eps ** (1 / 3))
        )
        curved = middle(change[None])[0]
        expected = float((change * curved).double().sum())
        got = float(v_D.double() @ product_D.double())
        tolerance = eps**0.25 * abs(expected) + noise * float(curved.double().norm())
        if not abs(got - expected) <= tolerance:
            cause = cause_of_wrong_gradients(operator.objective, batch)
            raise AsymmetryError(
                f"the derivatives are not those of the outputs: v.Gv = {got:.6g}, but "
                f"{expected:.6g} by differences of the outputs; {cause}"
            )


def _difference(
    operator: GaussNewtonOperator, batch: Any, v_D: Tensor, step: float
) -> tuple[Tensor, LinearMap, float]:
    """Return a difference of the outputs along v, their curvature, and the size of rounding."""
    outputs, curvature = operator.parts(batch)
    params = operator.objective.parameters()
    pieces = list(operator.layout.split(v_D).values())
    scale = torch.stack([p.abs().max() for p in params if p.numel()]).max().clamp(min=1e-3)
    h = step * float(scale) / float(v_D.abs().max())
    with torch.no_grad():
        up, down = (
            outputs(tuple(p + sign * h * v for p, v in zip(params, pieces, strict=True)))
            for sign in (1, -1)
        )
        z = outputs(params)
    noise = 10 * torch.finfo(z.dtype).eps * float(z.double().norm()) / h
    return (up - down) / (2 * h), curvature(z), noise
