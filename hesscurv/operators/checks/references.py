"""Choice of the reference way: the first one that the model has derivatives for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from hesscurv.operators.checks.embedding_gradients import cause_of_wrong_gradients
from hesscurv.operators.checks.missing_derivatives import MissingDerivativeError, explain
from hesscurv.operators.local_product import LocalProduct
from hesscurv.operators.ways.linearization import LinearMap
from hesscurv.operators.ways.way import WayError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class AsymmetryError(ValueError):
    """A matrix of products is not symmetric, or products are not what differences give."""


def with_reference(local: LocalProduct, fn: Callable[[], T]) -> T:
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
        if way == local.reference:
            wrong = _take_next(local, batch, error)
            if wrong is None:
                continue
            explained = _explained(local, batch, wrong)
        else:
            explained = _refused(way, error)
        if explained is error:
            raise error
        raise explained from error


@contextmanager
def explaining(local: LocalProduct, batch: Any) -> Iterator[None]:
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
        explained = _explained(local, batch, error)
        if explained is error:
            raise
        raise explained from error


def _explained(local: LocalProduct, batch: Any, error: Exception) -> Exception:
    return explain(local.objective, batch, error, local.curvature.needs, local.curvature.name)


def _refused(way: str, error: Exception) -> Exception:
    if isinstance(error, ValueError):  # says what is wrong, and what to do
        return error
    return MissingDerivativeError(
        f"way={way!r} is not available on this model: {' '.join(str(error).split())[:200]}; use "
        "way='auto'"
    )


def _take_next(local: LocalProduct, batch: Any, error: Exception) -> Exception | None:
    """Make the next way that is right on a batch the reference; if none is, return why."""
    reason = error
    while local.fallbacks:
        way, *rest = local.fallbacks
        local.fallbacks = tuple(rest)
        try:
            check_by_differences(local, batch, way)
        except torch.OutOfMemoryError:
            raise
        except Exception as other:
            logger.info("way %r is not available here: %s", way, other)
            reason = other if isinstance(other, AsymmetryError) else reason
            continue
        logger.info("the reference is way %r, since %r failed: %s", way, local.reference, error)
        local.take_reference(way)
        return None
    return reason


def check_by_differences(local: LocalProduct, batch: Any, way: str) -> None:
    """Compare v^T G v with the same from differences of the outputs; two forward passes each.

    Forward mode drops what has no rule for it (of a custom operator) without a word, and rows of J
    are what a backward pass says, so that the matrix is symmetric in any case.

    Raises:
        AsymmetryError: If they differ.
    """
    generator = torch.Generator().manual_seed(0)
    size, dtype = local.layout.numel, local.objective.dtype
    eps = torch.finfo(dtype).eps
    vectors_BD = torch.randn(2, size, generator=generator, dtype=torch.float64, device="cpu")
    vectors_BD = vectors_BD.to(local.objective.device, dtype)
    products_BD = local.apply(local.prepare(batch, way), vectors_BD, way)
    for v_D, product_D in zip(vectors_BD, products_BD, strict=True):
        # Truncation and rounding are least where the step is eps^(1/3) of the parameters' size.
        change, middle, noise = local.objective.run(
            partial(_difference, local, batch, v_D, eps ** (1 / 3))
        )
        curved = middle(change[None])[0]
        expected = float((change * curved).double().sum())
        got = float(v_D.double() @ product_D.double())
        tolerance = eps**0.25 * abs(expected) + noise * float(curved.double().norm())
        if not abs(got - expected) <= tolerance:
            cause = cause_of_wrong_gradients(local.objective, batch)
            raise AsymmetryError(
                f"the derivatives are not those of the outputs: v.Gv = {got:.6g}, but "
                f"{expected:.6g} by differences of the outputs; {cause}"
            )


def _difference(
    local: LocalProduct, batch: Any, v_D: Tensor, step: float
) -> tuple[Tensor, LinearMap, float]:
    """Return a difference of the outputs along v, their curvature, and the size of rounding."""
    outputs, curvature = local.curvature.parts(batch)
    params = local.objective.parameters()
    pieces = list(local.layout.split(v_D).values())
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
