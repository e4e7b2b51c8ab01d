"""Curvature of a mean loss as a linear operator: construction, checks, choice of the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hesscurv.distributed import Communicator
from hesscurv.linalg.precision import ROUNDING
from hesscurv.objective.means.mean_check import MeanCheck
from hesscurv.objective.memory import MemoryPlan
from hesscurv.objective.objective import Objective
from hesscurv.objective.parameters import ParamSelection
from hesscurv.operators.checks.construction import (
    check_dependent,
    check_deterministic,
    check_loss,
    check_symmetric,
)
from hesscurv.operators.checks.embedding_gradients import check_gradients
from hesscurv.operators.checks.references import explaining, with_reference
from hesscurv.operators.compared_products import ComparedProducts
from hesscurv.operators.local_product import LocalProduct
from hesscurv.operators.summed_operator import SummedOperator, device_of
from hesscurv.operators.timing.calibration import Calibration
from hesscurv.operators.timing.way_choice import EXPECTED
from hesscurv.operators.ways.way import Curvature


class _Names:
    """The names of ways: of a class, those that its curvature has; of an operator, those in use."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __get__(
        self, operator: CurvatureOperator | None, owner: type[CurvatureOperator]
    ) -> tuple[str, ...]:
        if operator is not None and self._kind == "ways":
            return operator.products.local.ways  # the first is the reference
        return tuple(way.name for way in getattr(owner.curvature, self._kind))


class CurvatureOperator(SummedOperator):
    """A curvature matrix of a model's mean loss over all batches, by products.

    Products loop over batches outside and vectors inside: a batch is read, and its derivative
    set up, once for all vectors of a block; what fits the memory budget is kept for later blocks
    until a weight changes.

    On many ranks, where `torch.distributed` is initialised, each passes its own share of the
    batches, which may differ in number and size and be none: ``H @ V`` with the same V on every
    rank is the product with the mean over all ranks' samples, the same on every rank. Closures
    without batches count alike. All ranks must have the same weights, and call the same methods;
    what fails on one of them is an error on all.

    Args:
        model: The module, on its device, in any mode; left as found.
        task: See `Objective`; `supervised(loss)` for ``(inputs, targets)`` batches.
        batches: An iterable of batches that can be iterated again, on many ranks this one's share;
            None for a closure.
        params: Which parameters: None (all that require grad), names, parameters, or a predicate.
        training: Mode of the modules during products: False (default) as in inference, True as in
            training, None as found.
        compute_dtype: Dtype of computation and vectors; default the parameters' own, float32 for
            half-precision weights. float64 gives products free of float32 noise.
        way: How to compute: "auto" measures and chooses; "reference" takes the way that others are
            compared with; otherwise one of the class's `ways`.
        memory_budget: Bytes for graphs and blocks of vectors; default an eighth of the machine's
            memory, or a quarter of the GPU's. Batches that need more are cut into micro-batches.
        check: Evaluate every batch once, test that a loss which is not one of torch's is a mean
            over samples, and probe determinism and symmetry at construction.
        precision: What the model's products are computed in: "highest" (default), the compute
            dtype's own whatever the process allows; "tf32", float32 on tensor cores; "bf16",
            autocast to bfloat16. With the last two `eigsh` measures the error of the products, and
            adds it to the residuals.
        process_group: The ranks that share the batches; default all where `torch.distributed` is
            initialised. A model that FSDP2 shards needs all ranks that hold its shards.

    Raises:
        TypeError: If an argument is of a wrong type, or batches are a one-shot iterator.
        ValueError: If batches are empty, the loss is not a finite scalar or no mean over samples,
            nothing requires grad, or the operator is not deterministic or not symmetric; on all
            ranks, if their weights or arguments differ.
        DistributedError: If another rank fails.
    """

    curvature: ClassVar[type[Curvature]]
    ways = _Names("ways")
    extra_ways = _Names("gpu_ways")

    def __init__(
        self,
        model: nn.Module,
        task: Callable[..., Tensor],
        batches: Iterable[Any] | None = None,
        params: ParamSelection = None,
        *,
        training: bool | None = False,
        compute_dtype: torch.dtype | None = None,
        way: str = "auto",
        memory_budget: int | None = None,
        check: bool = True,
        process_group: Any = None,
        precision: str = "highest",
    ) -> None:
        self._arguments: dict[str, Any] = {
            "model": model,
            "task": task,
            "batches": batches,
            "training": training,
            "compute_dtype": compute_dtype,
            "way": way,
            "memory_budget": memory_budget,
            "check": check,
            "process_group": process_group,
            "precision": precision,
        }
        communicator = Communicator.of(process_group, device_of(model))
        known = type(self).ways + type(self).extra_ways
        with communicator.together("reading the arguments"), torch.inference_mode(False):
            if way not in ("auto", "reference", *known):
                raise ValueError(f"expected way 'auto', 'reference' or one of {known}, got {way!r}")
            if precision not in ROUNDING:
                raise ValueError(f"expected precision among {list(ROUNDING)}, got {precision!r}")
            objective = Objective(
                model,
                task,
                batches,
                params,
                training=training,
                compute_dtype=compute_dtype,
                budget=memory_budget,
                may_be_empty=communicator.size > 1,
            )
            if self.curvature.needs_parts:
                _ = objective.task_parts
        super().__init__(objective, communicator)
        self.layout, self.way = objective.layout, way
        on_gpu = self.device.type == "cuda"
        # A GPU is waited for once, for the vectors and their products together.
        self.checks_late = on_gpu and communicator.size == 1
        self._checking = check
        self._local = LocalProduct(self.curvature(objective, type(self).__name__), on_gpu)
        self.products = ComparedProducts(self._local, way, checking=check, late=self.checks_late)
        self._count_together("the first pass over the batches")
        objective.precision = precision  # what was checked until here needs all digits

    # -- products -------------------------------------------------------------------------------

    @contextmanager
    def solving(self) -> Iterator[None]:
        """Leave the look at products to the solver, where it would take a wait for a GPU."""
        before, self._solving = self._solving, self.checks_late
        try:
            with super().solving():
                yield
        finally:
            self._solving = before

    def confirm(self) -> None:
        """Compare all products since `expect` with the reference, by one product; warn of a gap.

        Solvers do so at their end. Every micro-batch has been compared on its first block already;
        this sees what a way does on later ones too. The product for it does not count.

        Warns:
            RuntimeWarning: If the products differ by more than rounding, with the way and the
                micro-batch that make the difference.
        """
        self.products.confirm()

    def product_errors(self, vectors_DB: Tensor) -> Tensor | None:
        """Return how far products in "tf32" or "bf16" are off; see `LinearOperator`.

        Cost: two products a vector, one of them in full precision; they do not count.
        """
        if self.objective.precision == "highest":
            return None
        before = self.num_matvecs
        reduced_DB = self @ vectors_DB
        with self.objective.at_precision("highest"):
            self._local.drop_graphs()
            exact_DB = self @ vectors_DB
        self._local.drop_graphs()
        self.num_matvecs = before
        return (exact_DB - reduced_DB).double().norm(dim=0).cpu()

    def restrict(self, params: ParamSelection) -> CurvatureOperator:
        """Return the same curvature of some of these parameters: a principal submatrix.

        Args:
            params: Names, parameters or a predicate, as for the operator itself.

        Raises:
            ValueError: If it picks parameters that this operator does not have.

        Cost: that of building an operator; products cost what fewer parameters cost.
        """
        restricted = type(self)(params=params, **self._arguments)
        others = [name for name in restricted.layout.names if name not in self.layout.names]
        if others:
            raise ValueError(
                f"expected parameters among those of this operator, got {others[:4]} too; build a "
                "new operator for these"
            )
        return restricted

    def release(self) -> None:
        """Give up graphs and copies of the weights; the next product takes them again."""
        self._forget()
        self.objective.release()

    # -- choosing the way -----------------------------------------------------------------------

    def choice(self, width: int) -> tuple[str, int]:
        """Return the way and the number of vectors at once for a block of `width` vectors."""
        return self.products.choice.choose(width)

    def calibrate(self, expected: int = EXPECTED) -> Calibration:
        """Measure which way is fastest for how many vectors, on the first micro-batch.

        Done once, automatically when products come in numbers; eigensolvers call it first. The
        products done for it do not count in `num_matvecs`.

        Args:
            expected: The number of products to come with the same weights, in all: ways with a long
                set-up pay off over many. From here on choices are made for at least so many.

        Returns:
            The measured seconds per vector of every way, on this rank.
        """
        with self.communicator.together("measuring the ways of computing"):
            return with_reference(self._local, lambda: self.products.choice.calibrate(expected))

    def expect(self, products: int) -> None:
        """Choose the way for so many products from here on, whatever was computed before.

        A solver says so first: the same call then takes the same steps on a new operator and on one
        that has been used.
        """
        self.products.expect(products)
        self.objective.compare_loss()

    def settings(self) -> dict[str, Any]:
        """Return what the choice of the way rests on; see `LinearOperator`."""
        return self.products.choice.state()

    def adopt(self, settings: dict[str, Any]) -> None:
        """Choose from here on as the operator did whose `settings` these are."""
        self.products.choice.load(settings)

    def seconds_per_vector(self, block: int) -> float:
        """Return the predicted seconds per vector and pass over the data, in blocks of `block`.

        On many ranks the slowest one's, the same on all of them, and to be called on all.
        """
        choice = self.products.choice
        with self.communicator.together("measuring the ways of computing"):
            block = max(1, min(block, self.memory_plan.max_vectors))
            seconds = with_reference(self._local, lambda: choice.seconds_per_vector(block))
            own = seconds * self.objective.batches.count
        return own if self.communicator.size == 1 else self.largest_of_all(own)

    # -- set-up and memory ----------------------------------------------------------------------

    @property
    def memory_plan(self) -> MemoryPlan:
        """How much goes through a product at once."""
        return self._local.plan

    def memory_needed(self, width: int) -> int:
        """Return the bytes that graphs and vectors passing through take; see `MemoryPlan`."""
        return self.memory_plan.needed(width)

    def _look_at_data(self) -> None:
        objective, local = self.objective, self._local
        micro_batches, means = local.micro_batches, MeanCheck(objective)
        for i, batch in enumerate(objective.batches.first_pass()):
            if not self._add_weight(i, batch):
                continue
            micro_batches.note(batch)
            if self._checking:
                with explaining(local, batch), objective.environment():
                    loss = check_loss(objective, i, batch)
                    local.curvature.check_batch(objective.parameters(), batch, loss)
                means.look_at(i, batch)
        if self.own_weight == 0:
            return
        if self._checking:
            check_deterministic(objective, micro_batches.largest)
            means.refuse(self.communicator.size)
        with explaining(local, micro_batches.largest):
            micro_batches.make_plan(self._checking)
        if self._checking:
            few = micro_batches.few(32)
            with explaining(local, few):
                check_dependent(objective, few)
            with_reference(local, lambda: check_symmetric(local, few))
            check_gradients(objective, micro_batches.few(8), local.curvature.slope())

    def _forget(self) -> None:
        local = self._local
        local.drop_graphs()
        local.micro_batches.forget_weights()
        same = self.objective.batches.reads == self._counted
        self.products.forget_values(same_batches=same)
        if self.objective.is_closure:  # what it has captured is compiled in
            local.curvature.forget_compiled()

    def _count(self) -> None:
        if self._local.micro_batches.largest is None:  # the first batches of this rank
            with self.objective.at_precision("highest"):
                self._look_at_data()
        else:
            super()._count()
