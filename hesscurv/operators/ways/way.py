"""Interfaces of a way of computing products, and of a kind of curvature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hesscurv.objective.objective import Objective
from hesscurv.operators.checks.derivative_check import Slope
from hesscurv.operators.checks.missing_derivatives import Differentiation
from hesscurv.operators.ways.linearization import (
    Linearization,
    LinearMap,
    NonFiniteLossError,
    Params,
)


@dataclass(frozen=True)
class Way:
    """A way of computing products.

    Args:
        name: Its name, as in ``HessianOperator(..., way=name)``.
        linearize: Sets the product with one batch's curvature up, from what its `Curvature` says.
        looped: Whether it takes vectors one by one.
        traced: Whether the set-up is long and pays off over many products.
        runs_model_code: Whether each product runs the model's code again.
    """

    name: str
    linearize: Callable[..., Linearization]
    looped: bool = False
    traced: bool = False
    runs_model_code: bool = False


class Curvature(ABC):
    """A kind of curvature of an objective's loss: what is differentiated, and in which ways.

    Args:
        objective: The loss over data.
        name: The name of the operator, for messages.

    Attributes:
        ways: In the order in which they are tried; the first is the reference, which all others
            must agree with.
        gpu_ways: Further ones, tried on GPUs and on demand.
        fallbacks: Further references, for models that lack the first one's derivatives.
        needs_parts: Whether the task must have the parts `outputs` and `loss`.
    """

    ways: ClassVar[tuple[Way, ...]] = ()
    gpu_ways: ClassVar[tuple[Way, ...]] = ()
    fallbacks: ClassVar[tuple[Way, ...]] = ()
    needs_parts: ClassVar[bool] = False

    def __init__(self, objective: Objective, name: str) -> None:
        self.objective, self.name = objective, name

    @abstractmethod
    def linearize(self, way: Way, params: Params, batch: Any, room: int) -> Linearization:
        """Set up the product of one batch's curvature with blocks of vectors.

        Args:
            way: One of the ways.
            params: The selected parameters' values.
            batch: The batch.
            room: Bytes that the set-up may keep between products.
        """

    @abstractmethod
    def needs(self, batch: Any) -> Iterable[Differentiation]:
        """Return what is differentiated on a batch, and how often."""

    @abstractmethod
    def slope(self) -> Slope:
        """Return what is differentiated first, to be compared with differences."""

    def check_batch(self, params: Params, batch: Any, loss: Tensor) -> None:  # noqa: B027
        """Refuse a batch that this kind of curvature cannot be computed on."""

    def forget_compiled(self) -> None:  # noqa: B027, most kinds compile nothing
        """Forget compiled code: what it has captured may have changed."""

    def parts(self, batch: Any) -> tuple[Callable[[Params], Tensor], Callable[[Tensor], LinearMap]]:
        """Return outputs as a function of the parameters, and their curvature at given outputs.

        Raises:
            TypeError: If this kind is no product J^T C J.
        """
        raise TypeError(f"{self.name} has no outputs with a curvature of their own")

    def output_rows(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the rows of this matrix in the outputs, see `root_columns`: (c, *outputs.shape).

        Raises:
            TypeError: If this kind is no product J^T C J.
        """
        raise TypeError(f"{self.name} has no rows by sample")


class WayError(Exception):
    """A way failed on a batch; the cause is what was raised."""

    def __init__(self, way: str, batch: Any, error: Exception) -> None:
        super().__init__(str(error))
        self.way, self.batch, self.error = way, batch, error


@contextmanager
def on_batch(way: str, batch: Any) -> Iterator[None]:
    """Let errors inside tell the way and the batch.

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
