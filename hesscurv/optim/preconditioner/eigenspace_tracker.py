"""Top eigenspace of a model in training: warm-started solves, check of drift."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.distributed import Communicator
from hesscurv.eigensolvers import Eigenpairs
from hesscurv.eigensolvers.krylov.plan import narrow_block
from hesscurv.eigensolvers.tracked_eigenspace import RefreshLimit, refresh_eigenspace
from hesscurv.objective.data.curvature_samples import take_samples
from hesscurv.objective.parameters import unwrap
from hesscurv.operators.curvature_operator import CurvatureOperator
from hesscurv.operators.kinds import OPERATORS
from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.operators.summed_operator import device_of


class EigenspaceTracker:
    """Follows the top eigenspace of a model's curvature while its weights change.

    Operators are built when they are first needed, and serve all later weights.

    Args:
        model: The module.
        task: See `CurvatureOperator`.
        batches: Re-iterable batches, or None for a closure.
        curvature: "hessian", "ggn" or "fisher".
        samples: At most so many samples, from the front of the batches; None takes all.
        rate_samples: As many of the samples that follow are a second, independent batch.
        tol: Of the eigenpairs, relative to the eigenvalue.
        options: Further arguments of the operator.

    Attributes:
        num_matvecs: Products so far.
        seed: Of starting blocks, and of the order of a loader that shuffles; 0 at first.
        thrifty: Whether a solve ends after about two products for each pair, converged or not: the
            next one goes on from there.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Callable[..., Tensor],
        batches: Iterable[Any] | None,
        *,
        curvature: str,
        samples: int | None,
        rate_samples: int,
        tol: float,
        options: dict[str, Any],
    ) -> None:
        self.model, self.task, self.batches = model, task, batches
        self.names: list[str] = []
        self.curvature, self.samples, self.rate_samples = curvature, samples, rate_samples
        self.tol, self.options = tol, options
        self.num_matvecs, self.thrifty, self.seed = 0, False, 0
        self._operators: list[CurvatureOperator] = []
        _ = self._ranks  # refuses what is no process group

    def __getstate__(self) -> dict[str, Any]:
        """Leave the operators out: they hold graphs, and are built again."""
        return self.__dict__ | {"_operators": []}

    def follow(self, names: list[str]) -> None:
        """Measure the curvature in these parameters from here on, with new operators."""
        self.names, self._operators = names, []

    def start_over(self) -> None:
        """Rebuild operators at their next use, after a failure."""
        self._operators = []

    def largest(self, number: float) -> float:
        """Return the largest of a number over all processes that share the curvature."""
        return float(self._ranks.max_(torch.tensor(number, dtype=torch.float64, device="cpu")))

    def generator(self, step: int) -> torch.Generator:
        """Return the random numbers of a step, the same in a resumed run."""
        return torch.Generator().manual_seed(self.seed + step)

    @property
    def operator(self) -> CurvatureOperator:
        """The curvature that the eigenspace is of."""
        return self._all()[0]

    @property
    def second_operator(self) -> CurvatureOperator:
        """The same on other samples, where there are some."""
        return self._all()[-1]

    def solve(self, count: int, generator: torch.Generator, initial: Tensor | None) -> Eigenpairs:
        """Return the top `count` pairs at the present weights.

        Args:
            count: Their number; fewer where D is smaller.
            generator: Of the starting block.
            initial: The last solution's vectors, columns, or None.

        Cost: `count` products where the space is still within `tol`, and a block, of 4 to 16, that
        measures their noise; a few times as many otherwise. If `thrifty`, twice `count`
        or 8 at most.
        """
        # Small blocks get further with few products, where eigenvalues lie apart.
        limit, least = (_THRIFTY, 2) if self.thrifty else (_LIMIT, 4)
        with self._measuring():
            return refresh_eigenspace(
                self.operator,
                count,
                max_matvecs=limit.matvecs(count, initial is not None),
                tol=self.tol,
                generator=generator,
                initial=initial,
                block_size=narrow_block(count, count, least),
            )

    def drift(self, vector: Tensor, expected: Tensor) -> float:
        """Return ||H v - expected|| / ||expected|| at the present weights; one product."""
        with self._measuring():
            product = self.operator @ vector.to(self.operator.dtype)
        return float((product - expected).norm() / expected.norm())

    def largest_preconditioned(
        self, scale: Callable[[Tensor], Tensor], generator: torch.Generator
    ) -> float:
        """Return the largest |eigenvalue| of S H S on the second batch, a dozen products.

        Args:
            scale: Multiplies columns (D, b) by S, the preconditioner's square root.
            generator: Of the starting block.
        """
        with self._measuring():
            pairs = refresh_eigenspace(
                _Scaled(self.second_operator, scale),
                1,
                max_matvecs=40,
                tol=0.05,
                generator=generator,
                block_size=2,
            )
        return float(pairs.eigenvalues[0].abs())

    @property
    def _ranks(self) -> Communicator:
        return Communicator.of(self.options.get("process_group"), device_of(self.model))

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Add up the products of the body, with the modules in the modes that they are measured in.

        Unless told otherwise, batch norms are as found, since the loss that is trained has their
        batches' statistics in it, and all else is as in inference: dropout's loss is another one
        each time.
        """
        told = self.options.get("training") is not None
        modules = [] if told else list(unwrap(self.model).modules())
        flags = [m.training for m in modules]
        before = 0
        try:
            for m in modules:
                m.training = m.training and isinstance(m, nn.modules.batchnorm._NormBase)
            before = sum(H.num_matvecs for H in self._all())
            yield
        finally:
            for m, flag in zip(modules, flags, strict=True):
                m.training = flag
            self.num_matvecs += sum(H.num_matvecs for H in self._operators) - before
            for H in self._operators:
                H._forget()  # graphs, which training needs the memory of

    def _all(self) -> list[CurvatureOperator]:
        if not self._operators:
            self._operators = [
                OPERATORS[self.curvature](
                    self.model, self.task, part, params=self.names, **self.options
                )
                for part in self._parts()
            ]
        return self._operators

    def _parts(self) -> list[Any]:
        """Return this process's samples, and those of the second batch where any process has some.

        All processes have to build as many operators.
        """
        if self.batches is None:
            return [None]
        counts: list[int | None] = [self.samples]
        if self.rate_samples and self.samples is not None:
            counts.append(self.rate_samples)
        with self._ranks.together("reading the samples of the curvature") as step:
            parts = take_samples(self.batches, counts, self.seed)
            step.note = sum(map(bool, parts))
        return parts[: max(1, *step.notes)]


class _Scaled(LinearOperator):
    """S H S."""

    def __init__(self, H: CurvatureOperator, scale: Callable[[Tensor], Tensor]) -> None:
        super().__init__(H.shape[0], H.dtype, H.device)
        self.communicator = H.communicator
        self._H, self._scale = H, scale

    def _matmat(self, vectors_DB: Tensor) -> Tensor:
        return self._scale(self._H @ self._scale(vectors_DB))


# What has not converged by then enters the damping by its residual. With fewer than 8 matvecs, one
# or two pairs are hardly more than random directions.
_LIMIT, _THRIFTY = RefreshLimit(12, 12, least=8), RefreshLimit(2, 2, least=8)
